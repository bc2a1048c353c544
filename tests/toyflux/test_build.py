"""How the toy base is made: the parts of the build that are not hours of work."""

import contextlib
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toyflux import autoencoder, drawing, evaluate, stage, transformer, world
from toyflux.muon import orthogonal
from toyflux.stage import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(rank=0, workers=1, device="cpu", work=tmp_path)


def _pictures(count: int, seed: int) -> Tensor:
    rng = random.Random(seed)
    return autoencoder.to_tensor([drawing.draw(world.training_scene(rng), rng.getrandbits(32)) for _ in range(count)])


def test_the_principal_components_of_the_world_are_of_size_one_and_tell_squares_apart() -> None:
    components = autoencoder.principal_components("cpu")
    z = components(_pictures(400, 5))
    assert z.shape == (400, 16, 12, 12)
    rows = z.movedim(1, -1).flatten(0, 2)
    assert rows.mean(0).abs().max() < 0.2
    assert ((rows.std(0) - 1).abs() < 0.3).all()
    alike = torch.corrcoef(rows.T) - torch.eye(16)
    assert alike.abs().max() < 0.25


def test_the_autoencoder_begins_with_its_halves_apart_and_learns(machine: Machine) -> None:
    """A hundred steps are too few to see a picture by, and enough to see that it is on the way."""
    lines: list[str] = []
    vae = autoencoder.train_vae(machine, 100, 2, lines.append)
    losses = [float(line.split(" loss ")[1].split()[0]) for line in lines if " loss " in line]
    assert losses[-1] < 0.8 * losses[0]
    assert vae.config.scaling_factor > 0
    pictures = _pictures(4, 6)
    with torch.no_grad():
        z = vae.encode(pictures).latent_dist.mode()
        assert z.shape == (4, 16, 12, 12)
        assert vae.decode(z).sample.shape == pictures.shape


def test_a_stage_that_is_done_is_not_done_again_and_one_that_was_stopped_goes_on(machine: Machine) -> None:
    """Stopped after its checkpoint of step 200, and whole: the same weights, bit for bit."""

    def run(name: str, stop: int | None = None) -> tuple[nn.Linear, int]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        done = 0

        def loss_of(step: int, rng: random.Random) -> Tensor:
            nonlocal done
            if step == stop:
                raise KeyboardInterrupt
            done += 1
            x = torch.tensor([[rng.random() for _ in range(3)]])
            return (module(x) - x[:, :2] + torch.randn(1, 2) / 10).square().mean()

        with contextlib.suppress(KeyboardInterrupt):
            stage.fit(
                name, machine, module, loss_of, steps=230, lr=1e-2, matrices=[module.weight], log=lambda line: None
            )
        return module, done

    whole, done = run("stage")
    assert done == 230
    again, done = run("stage")
    assert done == 0
    assert torch.equal(again.weight, whole.weight)
    (machine.work / "stage.pt").unlink()
    assert run("stage", stop=215)[1] == 215
    rest, done = run("stage")
    assert done == 30
    assert torch.equal(rest.weight, whole.weight)
    assert torch.equal(rest.bias, whole.bias)


def test_the_pool_holds_pictures_of_all_kinds_and_sizes_in_their_shares(machine: Machine) -> None:
    vae = evaluate.load(Path(evaluate.__file__).parent / "base").vae
    pool = transformer.render_pool(machine, vae, 60, lambda line: None, company=False)
    assert sum(len(scenes) for _, scenes in pool.values()) == 60
    for (width, height), (z, scenes) in pool.items():
        assert z.shape == (len(scenes), width // 16 * (height // 16), 64)
    again = transformer.render_pool(machine, vae, 60, lambda line: None, company=False)
    assert all(torch.equal(pool[size][0], again[size][0]) for size in pool)
    sizes = [transformer.sample_batch(pool, 2, step, random.Random(step))[2] for step in range(400)]
    assert sizes.count(world.NATIVE) / 400 == pytest.approx(transformer.NATIVE_SHARE, abs=0.08)
    assert set(sizes) == {world.NATIVE, *world.SIZES}


@pytest.mark.parametrize(
    ("company", "pairs", "creature_and_thing", "styled"), [(False, 0.165, 0.08, 0.14), (True, 0.27, 0.24, 0.46)]
)
def test_what_a_pool_shows(company: bool, pairs: float, creature_and_thing: float, styled: float) -> None:
    rng = random.Random(3)
    scenes = [transformer.pool_scene(rng, company) for _ in range(2000)]
    mixed = [{type(item.look) for item in scene.items} == {world.Creature, world.Thing} for scene in scenes]
    assert sum(len(scene.items) == 2 for scene in scenes) / 2000 == pytest.approx(pairs, abs=0.03)
    assert sum(mixed) / 2000 == pytest.approx(creature_and_thing, abs=0.03)
    assert sum(scene.style is not None for scene in scenes) / 2000 == pytest.approx(styled, abs=0.03)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 64), (2, 80, 16)])
def test_muon_steps_along_all_singular_vectors_about_alike(shape: tuple[int, ...]) -> None:
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, sizes, v = torch.linalg.svd(gradients, full_matrices=False)
    turned = u.mT @ orthogonal(gradients) @ v.mT
    found = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(found)).abs().max() < 1e-3
    large = sizes > 0.05 * sizes[:, :1]
    assert large.float().mean() > 0.9
    assert found[large].min() > 0.3
    assert found[large].max() < 1.7
