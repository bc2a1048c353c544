"""Which weights of a training are returned."""

import torch

from lora.training.checkpoints import Checkpoints
from lora.training.examine import Glance


def _glance(own: float, drift: float = 0.0, unseen: float | None = None) -> Glance:
    return Glance(loss=1 - own, own=own, unseen=unseen, drift=drift)


def _kept(*glances: Glance) -> tuple[Checkpoints, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    checkpoints = Checkpoints(parameters, 100)
    for step, glance in zip(range(10, 101, 10), glances, strict=False):
        parameters[0].data.fill_(step)
        checkpoints.keep(step, glance)
    return checkpoints, parameters


def test_it_looks_ten_times_and_keeps_from_the_half_on() -> None:
    checkpoints, _ = _kept(*[_glance(0.5)] * 10)
    assert checkpoints.due == list(range(10, 101, 10))
    assert [kept.step for kept in checkpoints.kept] == [50, 60, 70, 80, 90, 100]
    assert Checkpoints([], 3).due == [1, 2, 3]
    assert Checkpoints([], 1).due == [1]


def test_the_last_is_returned_unless_one_before_is_clearly_better() -> None:
    rising, _ = _kept(*(_glance(0.1 * i) for i in range(10)))
    assert rising.choose()[0].step == 100
    a_little, _ = _kept(*[_glance(0.5)] * 6, _glance(0.61), *[_glance(0.6)] * 3)
    assert a_little.choose()[0].step == 100
    fallen, _ = _kept(*[_glance(0.5)] * 6, _glance(0.7), *[_glance(0.6)] * 3)
    best, why = fallen.choose()
    assert best.step == 70
    assert "70% below the base" in why
    drifted, _ = _kept(*[_glance(0.6)] * 9, _glance(0.62, drift=0.2))
    assert drifted.choose()[0].step < 100


def test_the_chosen_weights_are_put_back() -> None:
    checkpoints, [parameter] = _kept(*[_glance(0.5)] * 5, _glance(0.9), *[_glance(0.5)] * 4)
    best, _ = checkpoints.choose()
    checkpoints.put_back(best)
    assert parameter.tolist() == [60, 60, 60]


def test_a_gain_on_held_out_pictures_that_falls_is_overfitting() -> None:
    steady, _ = _kept(*(_glance(0.5, unseen=unseen) for unseen in (0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.48)))
    assert steady.overfitted() is None
    for once in ((0.5, 0.33), (0.5, 0.33, 0.45), (0.5, 0.45, 0.33)):
        noisy, _ = _kept(*[_glance(0.5, unseen=0.1)] * 4, *(_glance(0.5, unseen=unseen) for unseen in once))
        assert noisy.overfitted() is None
    fallen, _ = _kept(*(_glance(0.5, unseen=unseen) for unseen in (0.1, 0.2, 0.3, 0.4, 0.5, 0.38, 0.33)))
    best = fallen.overfitted()
    assert best is not None
    assert best.step == 50
    assert fallen.best() == (best, "the loss on held-out pictures was lowest there")
    fallen.stop_overfitted = False
    assert fallen.best()[0].step == fallen.choose()[0].step
    assert _kept(*[_glance(0.5)] * 10)[0].overfitted() is None


def test_weights_under_which_the_loss_is_no_number_are_not_kept() -> None:
    broken = Glance(loss=float("nan"), own=float("nan"), unseen=None, drift=float("nan"))
    checkpoints, _ = _kept(*[_glance(0.5)] * 6, broken, *[broken] * 3)
    assert [kept.step for kept in checkpoints.kept] == [50, 60]
    assert checkpoints.choose()[0].step == 60
