"""Where the time of a step goes: to the GPU's kernels, or to the host that launches them.

`script/bench kernels`, on a GPU: steps of FLUX.1-dev's size as `script/bench step` takes them, first by the clock, then
under torch's profiler. Where the kernels' sum is well under the clock's time, the GPU waits for the host, as it does in
every step that is not recorded (`--way eager`). `script/bench kernels --toy`, on a CPU: the same of the toy base, by
torch's operations.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch.profiler import ProfilerActivity, profile

from bench.speed import measure, model
from bench.speed.case import FLUX_DEV, T5_TOKENS, Case
from bench.speed.ways import Way, on_a_cpu, steps_of, ways_on_a_cpu, ways_on_a_gpu
from lora.flux import base, hardware

WARM = 4
"""Steps before any is looked at: all recordings, and the first use of every kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    name: str
    seconds: float
    """Of a step, all its launches together."""
    launches: float
    """Of a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breakdown:
    clock: float
    """Seconds a step, without the profiler."""
    kernels: list[Kernel]
    """The longest first."""

    @property
    def busy(self) -> float:
        """Seconds of kernels a step."""
        return sum(kernel.seconds for kernel in self.kernels)


def look(steps: Iterator[object], device: torch.device, count: int) -> Breakdown:
    """Of `count` steps by the clock and as many more under the profiler."""
    for _ in range(WARM):
        next(steps)
    times, _ = measure.turn(steps, count, 1, device)
    on_a_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_a_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        for _ in range(count):
            next(steps)
        if on_a_gpu:
            torch.cuda.synchronize()
    kernels = []
    for event in seen.key_averages():
        seconds = (event.self_device_time_total if on_a_gpu else event.self_cpu_time_total) / 1e6
        if seconds > 0:
            kernels.append(Kernel(name=event.key, seconds=seconds / count, launches=event.count / count))
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Breakdown(clock=statistics.median(times), kernels=kernels)


def table(breakdown: Breakdown, rows: int) -> str:
    launches = sum(kernel.launches for kernel in breakdown.kernels)
    lines = [
        f"{breakdown.clock * 1e3:.1f} ms a step by the clock; kernels {breakdown.busy * 1e3:.1f} ms"
        f" ({breakdown.busy / breakdown.clock:.0%}), {launches:.0f} launches",
        "| kernel | ms a step | of the kernels | launches |",
        "|" + " --- |" * 4,
    ]
    for kernel in breakdown.kernels[:rows]:
        share = kernel.seconds / breakdown.busy
        lines.append(f"| {kernel.name[:100]} | {kernel.seconds * 1e3:.2f} | {share:.1%} | {kernel.launches:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, with the toy base")
    parser.add_argument("--way", default="no-prior", help="as script/bench step names them")
    parser.add_argument("--sides", default="1024", help="of the pictures, in pixels; several by turns: 512,768,1024")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=40)
    arguments = parser.parse_args(argv)
    gpu = None if arguments.toy else hardware.read_gpu()
    if gpu is None and not arguments.toy:
        parser.error("there is no GPU here; --toy looks at the CPU")
    case = Case(sides=tuple(int(side) for side in arguments.sides.split(",")), batch_size=1)

    def show(ways: Sequence[Way], transformer: FluxTransformer2DModel, case: Case, text_tokens: int) -> None:
        found = [way for way in ways if way.name == arguments.way]
        if not found:
            parser.error(f"--way: {arguments.way!r} is not one of {', '.join(way.name for way in ways)}")
        lesson = model.make_lesson(case, transformer, text_tokens)
        steps = steps_of(found[0], model.twin(transformer), lesson)
        breakdown = look(steps, next(transformer.parameters()).device, arguments.steps * len(case.sides))
        print(f"{case.name}, {found[0].name} ({found[0].what}): {table(breakdown, arguments.rows)}")

    if gpu is None:
        flux = base.find(None, None)
        with flux.transformer(on_a_cpu(case)) as transformer:
            show(ways_on_a_cpu(), transformer, dataclasses.replace(case, sides=(flux.native,)), flux.t5_tokens)
    else:
        transformer = model.random_transformer(FLUX_DEV, torch.device("cuda"), torch.bfloat16)
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        show(ways_on_a_gpu(gpu, parameters), transformer, case, T5_TOKENS)


if __name__ == "__main__":
    main()
