"""The benchmark of where a step's time goes: a small run of it."""

import torch

from bench import kernels
from bench.speed import model, ways
from bench.speed.case import Case
from tests import tiny_flux

CPU = torch.device("cpu")


def test_the_operations_add_up_to_the_time_of_a_step_and_the_longest_come_first() -> None:
    transformer = model.random_transformer(tiny_flux.CONFIG, CPU, torch.float32)
    lesson = model.make_lesson(Case(sides=(64,), batch_size=1), transformer, 5)
    steps = ways.steps_of(ways.ways_on_a_cpu()[0], model.twin(transformer), lesson)
    found = kernels.look(steps, CPU, 5)
    times = [kernel.seconds for kernel in found.kernels]
    assert times == sorted(times, reverse=True)
    assert 0.3 < found.busy / found.clock < 10  # the profiler slows what it looks at
    counts = {kernel.name: kernel.launches for kernel in found.kernels}
    # A step's adapted layers: q, k and v of text and picture, their two outputs and four of the MLPs; all that a single
    # block begins with; and its last.
    assert (counts["_Products"], counts["_ProductOfTwo"]) == (2 + 2 + 4 + 1, 1)
    said = kernels.table(found, 3).splitlines()
    assert len(said) == 6
    assert said[3].startswith(f"| {found.kernels[0].name}")
