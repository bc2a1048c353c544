"""How long a drawing with a LoRA takes, beside diffusers' plain pipeline, in one run and by turns.

`script/bench generate`, on a GPU: pictures of 1024 x 1024 in 28 steps, on a base of FLUX.1-dev's full size with random
weights (written to `--folder` once, 34 GB; without it to a temporary folder). `script/bench generate --toy`, on a CPU:
the toy base at its own size. What a model has learned changes nothing of its speed.

Each way draws with two LoRAs by turns. The first call with a LoRA takes the other one off and puts it on; the next ones
are with the same. Ours is the whole call of the Cog model; diffusers' is `load_lora_weights`, the pipeline and saving.
Both draw with the same weights in memory, and the pictures are compared. With `--json FILE` the run is added to a file.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from bench import job, step
from generate import Predictor
from lora.file import weights
from lora.flux import adapter
from script import cli, signature

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a TOK on a red background"
STEPS = 28
RANK = 16
GUIDANCE = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A way to draw, in seconds."""

    name: str
    first: list[float]
    """Calls with another LoRA than the call before."""
    again: list[float]
    """Calls with the same LoRA."""


def measure(draws: dict[str, Callable[[Path, int], Image.Image]], loras: Sequence[Path], calls: int) -> list[Way]:
    """Every way, by turns, once with each LoRA: a call that puts it on, and `calls` more.

    Raises ValueError where two ways draw different pictures of the same seed.
    """
    ways = [Way(name=name, first=[], again=[]) for name in draws]
    for turn, lora in enumerate(loras):
        pictures = []
        for way in ways:
            for call in range(calls + 1):
                started = time.perf_counter()
                picture = draws[way.name](lora, turn)
                (way.again if call else way.first).append(time.perf_counter() - started)
            pictures.append(np.asarray(picture).astype(int))
        for way, drawn in zip(ways[1:], pictures[1:], strict=True):
            if np.abs(drawn - pictures[0]).mean() > 1:
                raise ValueError(f"{way.name} draws another picture than {ways[0].name}")
    return ways


def plain(pipeline: FluxPipeline, side: int, tokens: int, folder: Path) -> Callable[[Path, int], Image.Image]:
    """diffusers' pipeline as its documentation uses it; it loads a LoRA where the call before had another."""
    on: list[Path] = []

    def draw(lora: Path, seed: int) -> Image.Image:
        if on != [lora]:
            pipeline.unload_lora_weights()
            pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
            on[:] = [lora]
        drawn = pipeline(
            PROMPT,
            width=side,
            height=side,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=tokens,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        drawn.save(folder / "plain.png")
        return drawn

    return draw


def ours(predictor: Predictor) -> Callable[[Path, int], Image.Image]:
    """The whole call of the Cog model."""
    inputs = signature.read(ROOT / "generate.py", "Predictor")

    def draw(lora: Path, seed: int) -> Image.Image:
        given = {"prompt": PROMPT, "lora_weights": lora, "seed": seed, "num_inference_steps": STEPS}
        given |= {"guidance_scale": GUIDANCE, "output_format": "png"}
        values, faults = cli.check(inputs, [f"{name}={value}" for name, value in given.items()], {})
        assert not faults, faults
        arguments: dict[str, Any] = values
        [path] = predictor.predict(**arguments)
        return Image.open(path).convert("RGB")

    return draw


def write_loras(predictor: Predictor, folder: Path, count: int) -> list[Path]:
    """LoRAs of RANK with small random weights on every layer that a training adapts, in bf16 as it writes them."""
    shapes = adapter.shapes(predictor.pipeline.transformer)
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pairs = {
            layer: (
                torch.randn(RANK, shapes[layer][1], generator=generator).to(adapter.FILE_DTYPE) * 0.02,
                torch.randn(shapes[layer][0], RANK, generator=generator).to(adapter.FILE_DTYPE) * 0.02,
            )
            for layer in adapter.target_modules(predictor.pipeline.transformer)
        }
        paths.append(folder / f"lora-{number}.safetensors")
        weights.write(paths[-1], pairs, {})
    return paths


def table(ways: Sequence[Way]) -> str:
    """Markdown: the median and the range of each way's calls, in seconds."""
    rows = ["| way | call with another LoRA | call with the same LoRA |", "| --- | --- | --- |"]
    rows += [f"| {way.name} | {_spread(way.first)} | {_spread(way.again)} |" for way in ways]
    theirs, own = (statistics.median(way.again) for way in ways[:2])
    return "\n".join(
        [*rows, f"with the same LoRA, {ways[1].name} takes {own / theirs:.2f} times as long as {ways[0].name}"]
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, with the toy base")
    parser.add_argument("--calls", type=int, default=3, help="with the same LoRA, in each of the turns")
    parser.add_argument("--turns", type=int, default=4, help="each with another LoRA")
    parser.add_argument("--folder", type=Path, help="where the base of random weights lies, or is to lie")
    parser.add_argument("--json", type=Path, help="add the run to this file")
    arguments = parser.parse_args(argv)
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy measures on the CPU")

    with tempfile.TemporaryDirectory(prefix="bench-generate-") as scratch:
        device = torch.device("cpu" if arguments.toy else "cuda")
        if not arguments.toy:
            folder = arguments.folder or Path(scratch) / "base"
            if not (folder / "written").exists():
                job.write_base(folder, job.FULL, device, torch.bfloat16)
                (folder / "written").touch()
            torch.cuda.empty_cache()
        os.environ |= {"FLUX_BASE": str(job.TOY if arguments.toy else folder), "SAFETY": "none", "SCHNELL": ""}
        predictor = Predictor()
        predictor.setup()
        loras = write_loras(predictor, Path(scratch), 2)
        side, tokens = predictor.base.native, predictor.base.t5_tokens
        draws = {
            "diffusers": plain(FluxPipeline(**predictor.pipeline.components), side, tokens, Path(scratch)),
            "this generator": ours(predictor),
        }
        for draw in draws.values():  # what only the first call of a process does
            draw(loras[1], 0)
        ways = measure(draws, [loras[turn % 2] for turn in range(arguments.turns)], arguments.calls)
        print(table(ways))
        if arguments.json:
            about = {**step.about_the_machine(device), "side": side, "steps": STEPS, "rank": RANK}
            job.add(arguments.json, {**about, "ways": [dataclasses.asdict(way) for way in ways]})


if __name__ == "__main__":
    main()
