"""What a recorded pass keeps of a GPU's memory beside its tensors, which `lora.flux.hardware.RECORDING` plans with.

`script/bench recordings`, on a GPU: FLUX.1-dev's transformer at full size with random weights records the passes of
more and more sizes. What the driver holds is what the GPU has in use less what torch's allocator has. `--toy`, on a
CPU: nothing can be recorded, so it only shows that the steps run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.speed import ways
from bench.speed.case import FLUX_DEV, T5_TOKENS, Case
from bench.speed.model import make_lesson, random_transformer, twin
from lora.flux import base, hardware

SIDES = ((512,), (512, 768, 1024), (448, 512, 576, 640, 704, 768, 832))
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench recordings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, with the toy base")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    gpu = None if arguments.toy else hardware.read_gpu()
    if gpu is None and not arguments.toy:
        parser.error("there is no GPU here; --toy runs on the CPU")
    if gpu is None:
        flux = base.find(None, None)
        with flux.transformer(ways.on_a_cpu(Case(sides=(flux.native,), batch_size=1))) as transformer:
            lesson = make_lesson(Case(sides=(64, flux.native), batch_size=1), transformer, flux.t5_tokens)
            next(iter(ways.project(ways.on_a_cpu, 0.0)(transformer, lesson)))
        found: dict[str, float] = {}  # a CPU records nothing
    else:
        found = measure(gpu)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(gpu: hardware.Gpu) -> dict[str, float]:
    """GiB that the driver holds, before any recording and by the number of recorded passes."""
    whole = random_transformer(FLUX_DEV, torch.device("cuda"), torch.bfloat16)
    parameters = sum(p.numel() for p in whole.parameters())
    found = {"before any": _held()}
    for sides in SIDES:
        case = Case(sides=sides, batch_size=1)
        steps = ways.project(lambda case: ways.planned(gpu, parameters, case), 0.0)
        training = steps(transformer := twin(whole), make_lesson(case, transformer, T5_TOKENS))
        next(iter(training))
        found[f"{len(sides)} passes"] = _held()
        del training, transformer
        base.free()
    return found


def _held() -> float:
    torch.cuda.synchronize()
    free, in_all = torch.cuda.mem_get_info()
    return (in_all - free - torch.cuda.memory_reserved()) / GIB


if __name__ == "__main__":
    main()
