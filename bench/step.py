"""How long a step of the training takes, beside other ways to train the same thing.

`script/bench step`, on a GPU: FLUX.1-dev's transformer at full size with random weights, made on the GPU, and whole
steps (forward, backward, optimizer) of the project's own `lora.training.fit` as a training runs them, beside diffusers'
model with peft's adapter and the way of ostris' trainer: in one run and by turns, so that what slows the machine
slows all.
`script/bench step --toy`, on a CPU: the same on the toy base, beside nothing but forward, backward and optimizer.

The work of a step is counted by a formula (`step_tflop`), which leaves out what is done twice to save memory; its share
is of the rate that large matrix products reach in the same run. With `--json FILE` every case is written as soon as it
is done, and a case that stands in the file is not measured again. Nothing is needed but torch, diffusers, peft,
transformers and this repository.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers import FluxTransformer2DModel

from bench.speed.case import CASES, FLUX_DEV, T5_TOKENS, Case
from bench.speed.measure import Cell, measure
from bench.speed.model import random_transformer
from bench.speed.verdict import table, verdicts
from bench.speed.ways import Way, on_a_cpu, ways_on_a_cpu, ways_on_a_gpu
from lora.flux import base, hardware


def read(file: Path | None) -> list[Cell]:
    """The cells that stand in a file of earlier results, if there is one."""
    if file is None or not file.is_file():
        return []
    return [Cell(**cell) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]


def write(file: Path, about: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    content = {**about, "cells": [dataclasses.asdict(cell) for cell in cells]}
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def about_the_machine(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "command": " ".join(sys.argv[1:]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, with the toy base")
    parser.add_argument("--only", default="", help="cases and ways, separated by semicolons: '1024;ours;ostris'")
    parser.add_argument("--text-tokens", type=int, default=T5_TOKENS, help="on a GPU: 256 hold usual captions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--laps", type=int, default=5, help="of a turn; a lap is a step of each size")
    parser.add_argument("--json", type=Path, help="write the figures here; cases that stand there are not repeated")
    arguments = parser.parse_args(argv)
    gpu = None if arguments.toy else hardware.read_gpu()
    if gpu is None and not arguments.toy:
        parser.error("there is no GPU here; --toy measures on the CPU")

    if gpu is None:
        flux = base.find(None, None)
        cases = [Case(sides=(flux.native,), batch_size=size) for size in (1, 4)]
        ways, text_tokens = ways_on_a_cpu(), flux.t5_tokens
    else:
        cases, text_tokens = list(CASES), arguments.text_tokens
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FluxTransformer2DModel(**FLUX_DEV).parameters())
        ways = ways_on_a_gpu(gpu, parameters)
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    unknown = set(only) - {case.name for case in cases} - {way.name for way in ways}
    if unknown:
        names = [*(case.name for case in cases), *(way.name for way in ways)]
        parser.error(f"--only: {'; '.join(sorted(unknown))}: not one of {'; '.join(names)}")
    cases = [case for case in cases if case.name in only] or cases
    ways = [way for way in ways if way.name in only] or ways
    for way in ways:
        print(f"{way.name}: {way.what}")

    if gpu is None:
        with flux.transformer(on_a_cpu(cases[0])) as transformer:
            cells = run(ways, transformer, cases, text_tokens, arguments)
    else:
        transformer = random_transformer(FLUX_DEV, torch.device("cuda"), torch.bfloat16)
        cells = run(ways, transformer, cases, text_tokens, arguments)
    print(table(cells), *verdicts(cells), sep="\n")


def run(
    ways: Sequence[Way],
    transformer: FluxTransformer2DModel,
    cases: Sequence[Case],
    text_tokens: int,
    arguments: argparse.Namespace,
) -> list[Cell]:
    """Measures the cases that are not yet in the results file, and writes it after every one of them."""
    cells = read(arguments.json)
    about = about_the_machine(next(transformer.parameters()).device)
    for case in cases:
        there = {cell.way for cell in cells if cell.case == case.name}
        if {way.name for way in ways} <= there:
            continue
        if there:
            raise SystemExit(
                f"{arguments.json} holds other ways of {case.name} ({', '.join(sorted(there))}), and speeds are"
                " compared within one run: name another file, or all ways at once"
            )
        found = measure(ways, transformer, case, text_tokens, arguments.rounds, arguments.laps)
        cells += found
        if arguments.json:
            write(arguments.json, about, cells)
    return cells


if __name__ == "__main__":
    main()
