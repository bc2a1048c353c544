"""The benchmark of a step: its count of the work, its ways, and a small run of it."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from bench import step
from bench.speed import measure, model, verdict, ways
from bench.speed.case import FLUX_DEV, Case
from bench.speed.measure import Cell
from lora.flux import adapter, flow
from tests import tiny_flux

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TEXT_TOKENS = 5


@pytest.fixture
def tiny() -> FluxTransformer2DModel:
    return model.random_transformer(tiny_flux.CONFIG, CPU, torch.float32)


def test_the_formula_is_what_a_counter_counts_on_flux_1_dev_itself() -> None:
    """Forward and backward to the first block's input, on a device that computes nothing."""
    side = 1024
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FLUX_DEV).requires_grad_(False)
        tokens = (side // 16) ** 2
        noisy = torch.empty(1, tokens, 64, requires_grad=True)
        text = {"prompt_embeds": torch.empty(1, 512, 4096, requires_grad=True), "pooled": torch.empty(1, 768)}
        counter = FlopCounterMode(display=False)
        with counter:
            prediction = flow.velocity(transformer, noisy, torch.empty(1), 1.0, text, (side // 8, side // 8))
            prediction.sum().backward()
    assert model.step_tflop(FLUX_DEV, side, 1, 512) == pytest.approx(counter.get_total_flops() / 1e12, rel=0.02)


def test_the_formula_gives_the_published_count_of_a_step() -> None:
    counts = [model.step_tflop(FLUX_DEV, side, 1, 512) for side in (512, 768, 1024)]
    assert counts == pytest.approx([45.0, 90.1, 164.7], rel=0.02)
    assert model.step_tflop(FLUX_DEV, 512, 4, 512) == pytest.approx(4 * counts[0])


def test_a_random_transformer_is_finite_and_a_twin_shares_its_weights(tiny: FluxTransformer2DModel) -> None:
    lesson = model.make_lesson(Case(sides=(32,), batch_size=2), tiny, TEXT_TOKENS)
    [[(inputs, _), _]] = ways.fixed_inputs(tiny, lesson)
    prediction = tiny(**inputs)[0]
    assert prediction.isfinite().all()
    assert prediction.std() > 0.01
    twin = model.twin(tiny)
    assert torch.equal(twin(**inputs)[0], prediction)
    theirs = dict(twin.named_parameters())
    assert all(parameter.data_ptr() == theirs[name].data_ptr() for name, parameter in tiny.named_parameters())


def test_every_way_trains_what_it_should_and_leaves_the_shared_weights_alone(tiny: FluxTransformer2DModel) -> None:
    before = {name: parameter.clone() for name, parameter in tiny.named_parameters()}
    lesson = model.make_lesson(Case(sides=(32, 64), batch_size=2), tiny, TEXT_TOKENS)
    trained = {}
    for way in [*ways.ways_on_a_cpu(), ways.Way(name="ostris", what="", start=ways.of_ostris)]:
        transformer = model.twin(tiny)
        steps = way.start(transformer, lesson)
        for _ in range(4):
            next(steps)
        adapted = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
        trained[way.name] = {name.partition(".lora_")[0] for name in adapted}
        moved = [p for name, p in transformer.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
        assert len(moved) == len(trained[way.name]), way.name
    assert trained["ours"] == trained["no-prior"] == trained["bare"] == trained["peft"]
    assert {name.rpartition(".")[2] for name in trained["ostris"] - trained["ours"]} == {"linear"}  # the modulation
    assert all(torch.equal(parameter, before[name]) for name, parameter in tiny.named_parameters())


def test_float8_weights_take_the_place_of_the_shared_ones_and_nearly_agree(tiny: FluxTransformer2DModel) -> None:
    lesson = model.make_lesson(Case(sides=(32,), batch_size=1), tiny, TEXT_TOKENS)
    [[(inputs, _), _]] = ways.fixed_inputs(tiny, lesson)
    small = model.twin(tiny)
    ways.hold_in_float8(small)
    shared = {parameter.data_ptr() for parameter in tiny.parameters()}
    own = {name for name, parameter in small.named_parameters() if parameter.data_ptr() not in shared}
    assert own == {f"{name}.weight" for name in adapter.target_modules(tiny)}
    exact, rounded = tiny(**inputs)[0], small(**inputs)[0]
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.05


def test_it_needs_neither_cog_nor_what_only_other_parts_of_a_training_need() -> None:
    code = (
        "import sys\nfor name in ('cog', 'coglet', 'pillow_heif', 'wandb'): sys.modules[name] = None\nimport bench.step"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_lap_takes_every_side_once() -> None:
    taken = []
    steps = (taken.append(n) for n in itertools.count())
    seconds, processor = measure.turn(steps, laps=2, steps_a_lap=3, device=CPU)
    assert len(seconds) == len(processor) == 2
    assert len(taken) == 9


def test_a_small_run_measures_every_way_and_is_not_repeated(
    tiny: FluxTransformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "step.json"
    cases = [Case(sides=(32, 64), batch_size=1), Case(sides=(32,), batch_size=2)]

    class Arguments:
        json, rounds, laps = file, 2, 2

    cells = step.run(ways.ways_on_a_cpu(), tiny, cases, TEXT_TOKENS, Arguments())  # type: ignore[arg-type]
    assert [(cell.case, cell.way) for cell in cells] == [
        (case.name, way.name) for case in cases for way in ways.ways_on_a_cpu()
    ]
    assert all(len(turn) == 2 and min(turn) > 0 for cell in cells for turn in cell.rounds)
    assert len(verdict.table(cells).splitlines()) == 2 + len(cells)
    assert sum("goal 1.1" in line for line in verdict.verdicts(cells)) == 4
    assert json.loads(file.read_text())["torch"] == torch.__version__

    monkeypatch.setattr(step, "measure", None)
    assert step.run(ways.ways_on_a_cpu(), tiny, cases, TEXT_TOKENS, Arguments()) == cells  # type: ignore[arg-type]
    others = [*ways.ways_on_a_cpu()[:1], dataclasses.replace(ways.ways_on_a_cpu()[0], name="another")]
    with pytest.raises(SystemExit, match="speeds are compared within one run"):
        step.run(others, tiny, cases, TEXT_TOKENS, Arguments())  # type: ignore[arg-type]
    assert step.read(file) == cells, "what stands there is not lost"


def _cell(case: str, way: str, *seconds: float, **changes: Any) -> Cell:
    values = {"first": 1.0, "rounds": [list(seconds)], "processor": [[0.1]], "tflop": 100.0, "matrix_rate": 800.0}
    values |= {"peak": 60.0}
    return Cell(case=case, way=way, **{**values, **changes})


def test_the_table_and_the_verdicts_say_what_was_reached() -> None:
    cells = [
        _cell("1024", "ours", 0.5, peak=76.0),
        _cell("1024", "no-prior", 0.25, 0.2, 0.3),
        _cell("1024", "peft", 0.3),
        _cell("1024", "ostris", 0.5),
        _cell("1024", "peft-checkpointing", fault="out of memory", rounds=[]),
        _cell("512,768,1024", "ours", 0.25),
        _cell("512,768,1024", "no-prior", 0.13),
    ]
    rows = verdict.table(cells).splitlines()
    assert "| 1024 | no-prior | 0.2500 (0.2000 to 0.3000) | 0.1000 | 400 | 50% | 60.0 | 1.0 |" in rows
    assert any("out of memory" in row for row in rows)
    said = verdict.verdicts(cells)
    assert "1024: no-prior / ostris = 0.500 (0.50 to 0.50), against the ostris way; goal 0.5: reached" in said
    assert any(
        line.startswith("1024: no-prior / peft = 0.833") and line.endswith("goal 0.667: MISSED") for line in said
    )
    assert "1024: 0.250 s; goal 0.3 s: reached" in said
    assert "1024: 76.0 GB at the most; goal 75 GB: MISSED" in said
    assert "512,768,1024: 190 s for 1000 steps; goal 180 s: MISSED" in said
    assert not any("peft-checkpointing" in line for line in said)


def test_without_a_gpu_it_says_what_can_be_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is what the command says where there is no GPU, and here is one")
    with pytest.raises(SystemExit):
        step.main([])
    assert "--toy measures on the CPU" in capsys.readouterr().err
