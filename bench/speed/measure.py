"""Seconds, memory and rates of the ways, measured by turns."""

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from bench.speed.case import Case
from bench.speed.model import Lesson, make_lesson, step_tflop, twin
from bench.speed.ways import Way, steps_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One way in one case."""

    case: str
    way: str
    first: float
    """Seconds from the bare transformer to the end of the first lap: the adapter, all recordings, one step a side."""
    rounds: list[list[float]]
    """Seconds a step, for every lap of every turn."""
    processor: list[list[float]]
    """The same by what the process used of the processors: on a GPU, what launching its kernels takes; on a CPU, what
    other processes cannot slow."""
    tflop: float
    """Of a step, by the formula."""
    matrix_rate: float
    """TFLOP/s of large matrix products just before."""
    peak: float | None
    """GB (10⁹ bytes) of the GPU's memory, with the weights; None on a CPU."""
    fault: str = ""
    """Why nothing was measured, where nothing was."""

    @property
    def seconds(self) -> list[float]:
        return sorted(lap for turn in self.rounds for lap in turn)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    ways: Sequence[Way], transformer: FluxTransformer2DModel, case: Case, text_tokens: int, rounds: int, laps: int
) -> list[Cell]:
    """Every way in one case: first all of them get going, then in every round each has a turn of `laps`.

    A turn's first lap is not counted. A way that does not fit the GPU's memory is left out, and says so.
    """
    device = next(transformer.parameters()).device
    lesson = make_lesson(case, transformer, text_tokens)
    rate = matrix_rate(device)
    running: dict[str, tuple[Iterator[object], int]] = {}
    cells: dict[str, Cell] = {}
    for way in ways:
        tflop = statistics.mean(step_tflop(transformer.config, s, case.batch_size, text_tokens) for s in case.sides)
        if way.prior:
            tflop += step_tflop(transformer.config, min(case.sides), case.batch_size, text_tokens)
        cell = Cell(
            case=case.name,
            way=way.name,
            first=0.0,
            rounds=[],
            processor=[],
            tflop=tflop,
            matrix_rate=rate,
            peak=None,
        )
        try:
            steps, held, first, peak = begin(way, transformer, lesson)
        except torch.OutOfMemoryError:
            cells[way.name] = dataclasses.replace(cell, fault="out of memory")
            continue
        cells[way.name] = dataclasses.replace(cell, first=first, peak=peak)
        running[way.name] = steps, held
        print(f"{case.name}, {way.name}: first lap after {first:.1f} s", flush=True)
    for _ in range(rounds):
        for name, (steps, held) in running.items():
            _settle(device)
            others = _allocated(device) - held
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, processor = turn(steps, laps, len(case.sides), device)
            cells[name].rounds.append(seconds)
            cells[name].processor.append(processor)
            if device.type == "cuda":
                peak = max(cells[name].peak or 0.0, (torch.cuda.max_memory_allocated() - others) / 1e9)
                cells[name] = dataclasses.replace(cells[name], peak=peak)
    return list(cells.values())


def begin(
    way: Way, transformer: FluxTransformer2DModel, lesson: Lesson
) -> tuple[Iterator[object], int, float, float | None]:
    """The way after its first lap; the bytes that are its own between the steps, with the shared weights that it uses;
    its seconds so far, and the most GB so far: what a recording holds for its passes is seen only as it is made."""
    device = next(transformer.parameters()).device
    shared = {parameter.data_ptr(): parameter.nbytes for parameter in transformer.parameters()}
    _settle(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = _allocated(device), time.perf_counter()
    own = twin(transformer)
    steps = steps_of(way, own, lesson)
    for _ in lesson.case.sides:
        next(steps)
    _settle(device)
    others = before - sum(shared.get(parameter.data_ptr(), 0) for parameter in own.parameters())
    peak = (torch.cuda.max_memory_allocated() - others) / 1e9 if device.type == "cuda" else None
    return steps, _allocated(device) - others, time.perf_counter() - started, peak


def turn(steps: Iterator[object], laps: int, steps_a_lap: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds a step for each of `laps`, after one that is not counted: by the device's own clock, without a wait
    between the steps that the training would not have, and of the processors."""
    marks, processor = [], []
    for _ in range(laps + 1):
        for _ in range(steps_a_lap):
            next(steps)
        marks.append(_mark(device))
        processor.append(time.process_time())
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (
        [_between(before, after) / steps_a_lap for before, after in itertools.pairwise(marks)],
        [(after - before) / steps_a_lap for before, after in itertools.pairwise(processor)],
    )


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of products of two large random matrices: bf16 on a GPU, float32 elsewhere; the median of ten."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    marks = []
    for _ in range(14):
        a @ b
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    times = [_between(before, after) for before, after in itertools.pairwise(marks)][3:]
    return 2 * side**3 / statistics.median(times) / 1e12


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def _settle(device: torch.device) -> None:
    """Nothing under way on a GPU, nothing cached: one way's leftovers are not the next one's burden."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
