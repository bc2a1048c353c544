"""How long a whole job takes, from the command to the tar, split by stage.

`script/bench job`, on a GPU: twenty large pictures go through the whole trainer, on a base of FLUX.1-dev's full size
with random weights: transformer, autoencoder and text encoders are made from their configs and written to `--folder`
once (34 GB; without it to a temporary folder). `script/bench job --toy`, on a CPU: ten small pictures and the toy base,
of which the start-up is what counts, from the command to the first step.

Either way the trainer is started as a user starts it, in a process of its own, and timed by the lines of its log as
they come. `-i NAME=VALUE` gives it further inputs. `--gpus N` trains on so many GPUs, and with `--toy` in so many
processes on the CPU. With `--json FILE` every run is added to the file when it is done.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench import step
from bench.speed.case import FLUX_DEV, T5_TOKENS
from bench.speed.model import made_there

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toyflux" / "base"
GOAL_START = 10.0
"""Seconds from the command to the first step, with ten small pictures and the toy base on two cores."""
GOAL_TAR, GOAL_STEPS = 240.0, 1000
"""Seconds from the command to the tar on one H200 with 20 pictures, and the steps of the training."""
STARTING, ENDING = "starting", "ending"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The configs of a base's four models, and the length of its texts."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]
    t5_tokens: int


FULL = Size(
    transformer=FLUX_DEV,
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    clip={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    t5={"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    t5_tokens=T5_TOKENS,
)
"""The config.json files of black-forest-labs/FLUX.1-dev."""


# ---------------------------------------------------------------- what goes in


def write_base(folder: Path, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """A base with random weights in diffusers' layout. Tokenizers and scheduler are the toy base's: what a text costs
    depends on its length, and that is padded."""
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"), dirs_exist_ok=True)
    for name, tokens in (("tokenizer", 77), ("tokenizer_2", size.t5_tokens)):
        file = folder / name / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": tokens}))
    for name, make in makers(size).items():
        with made_there(device, dtype):
            make().save_pretrained(folder / name)


def makers(size: Size) -> dict[str, Callable[[], Any]]:
    """What makes each of the four models, by its folder's name; the ends of CLIP's texts are the toy tokenizer's."""
    toy = json.loads((TOY / "text_encoder" / "config.json").read_text())
    ends = {name: toy[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "transformer": lambda: FluxTransformer2DModel(**size.transformer),
        "vae": lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **size.vae,
        ),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **ends, **size.clip)),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **size.t5)),
    }


def write_pictures(archive: Path, count: int, sides: tuple[int, int]) -> None:
    """A zip of JPEGs of these sides, upright and lying by turns, soft with some grain; no two alike."""
    with zipfile.ZipFile(archive, "w") as zipped:
        for number in range(count):
            size = sides if number % 2 else sides[::-1]
            soft = [Image.effect_noise((6, 6), 150).resize(size, Image.Resampling.BICUBIC) for _ in "RGB"]
            picture = Image.blend(Image.merge("RGB", soft), Image.effect_noise(size, 60).convert("RGB"), 0.2)
            jpeg = BytesIO()
            picture.save(jpeg, "JPEG", quality=90)
            zipped.writestr(f"{number}.jpg", jpeg.getvalue())


# ---------------------------------------------------------------- a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training, in seconds by the clock of the process that started it."""

    stages: dict[str, float]
    """In order; they add up to the whole. "starting" is everything before the first stage that the log names, imports
    too; a stage that comes twice counts as one."""
    first_step: float
    """From the command to the end of the first step."""
    tar: float
    """From the command to the end of the process: the tar is there."""


def split(lines: Sequence[tuple[float, str]], end: float) -> Run:
    """What the times of a log's lines say; all in seconds from the command.

    Raises ValueError where the log shows no step.
    """
    stages: dict[str, float] = {}
    name, since, first = STARTING, 0.0, None
    for at, line in [*lines, (end, f"== {ENDING}")]:
        new = line.removeprefix("== ") if line.startswith("== ") else ENDING if line.startswith("seconds: ") else None
        if new is not None:
            stages[name] = stages.get(name, 0.0) + at - since
            name, since = new, at
        if "| 1/" in line and first is None:
            first = at
    if first is None:
        raise ValueError("the log shows no step")
    return Run(stages=stages, first_step=first, tar=end)


def train(archive: Path, folder: Path, inputs: Sequence[str], environ: Mapping[str, str]) -> Run:
    """Starts the trainer and waits for its tar. Raises subprocess.CalledProcessError where it fails."""
    own = Path(sys.prefix) == ROOT / ".venv"  # otherwise script/train would first make that folder
    command = [str(ROOT / "script" / "train")] if own else [sys.executable, "-m", "script.train"]
    given = [f"input_images=@{archive}", "trigger_word=TOK", "seed=1", *inputs]
    if not any(pair.startswith("captioning=") for pair in inputs):
        given.append("captioning=disabled")
    for pair in given:
        command += ["-i", pair]
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    child = subprocess.Popen(
        [*command, "-o", str(folder / "trained_model.tar")],
        env={**os.environ, "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1", **environ},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append((time.monotonic() - started, line.rstrip("\n")))
        print(f"{lines[-1][0]:7.1f}  {lines[-1][1]}", flush=True)
    code = child.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return split(lines, time.monotonic() - started)


# ---------------------------------------------------------------- what is said of it


def table(runs: Sequence[Run]) -> str:
    """Markdown: the median of every stage over the runs, and the least and the most where there are several."""
    rows = ["| stage | seconds |", "| --- | --- |"]
    names = dict.fromkeys(name for run in runs for name in run.stages)
    rows += [f"| {name} | {_spread([run.stages.get(name, 0.0) for run in runs])} |" for name in names]
    rows.append(f"| **from the command to the first step** | {_spread([run.first_step for run in runs])} |")
    rows.append(f"| **from the command to the tar** | {_spread([run.tar for run in runs])} |")
    return "\n".join(rows)


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.1f}"
    return f"{middle} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else middle


def verdict(runs: Sequence[Run], toy: bool, steps: int) -> str:
    """Whether the goal was reached; of a tar after fewer steps than the goal's it says only what they took."""
    value = statistics.median(run.first_step if toy else run.tar for run in runs)
    goal, what = (GOAL_START, "to the first step") if toy else (GOAL_TAR, "to the tar")
    if not toy and steps < GOAL_STEPS:
        return f"{what} {value:.1f} s with {steps} steps; the goal, {goal:g} s, is for {GOAL_STEPS}"
    return f"{what} {value:.1f} s; goal {goal:g} s: {'reached' if value <= goal else 'MISSED'}"


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, with the toy base")
    parser.add_argument("--pictures", type=int, help="20; of the toy 10")
    parser.add_argument("--steps", type=int, help="1000; of the toy 10")
    parser.add_argument("--repeat", type=int, default=1, help="runs, one after the other")
    parser.add_argument("--gpus", type=int, help="how many train; all of the machine, of the toy 1")
    parser.add_argument("-i", dest="inputs", action="append", default=[], metavar="NAME=VALUE", help="another input")
    parser.add_argument("--folder", type=Path, help="where the base of random weights lies, or is to lie")
    parser.add_argument("--json", type=Path, help="add the runs to this file")
    arguments = parser.parse_args(argv)
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy measures on the CPU")

    with tempfile.TemporaryDirectory(prefix="bench-job-") as scratch:
        if arguments.toy:
            environ, device = {"FLUX_BASE": "", "CUDA_VISIBLE_DEVICES": ""}, torch.device("cpu")
            count, steps, sides = arguments.pictures or 10, arguments.steps or 10, (144, 96)
        else:
            folder, device = arguments.folder or Path(scratch) / "base", torch.device("cuda")
            environ = {"FLUX_BASE": str(folder.resolve())}
            count, steps, sides = arguments.pictures or 20, arguments.steps or GOAL_STEPS, (1536, 1024)
            if not (folder / "written").exists():
                started = time.monotonic()
                write_base(folder, FULL, device, torch.bfloat16)
                (folder / "written").touch()
                print(f"a base of random weights, written in {time.monotonic() - started:.0f} s: {folder}", flush=True)
            torch.cuda.empty_cache()
        if arguments.gpus:
            environ |= {"GPUS": f"cpu:{arguments.gpus}" if arguments.toy else str(arguments.gpus)}
        archive = Path(scratch) / "pictures.zip"
        write_pictures(archive, count, sides)
        runs = []
        for _ in range(arguments.repeat):
            runs.append(train(archive, Path(scratch), [f"training_steps={steps}", *arguments.inputs], environ))
            if arguments.json:
                about = {**step.about_the_machine(device), "pictures": count, "steps": steps, "toy": arguments.toy}
                about |= {"gpus": arguments.gpus} if arguments.gpus else {}
                add(arguments.json, {**about, **dataclasses.asdict(runs[-1])})
    print(table(runs))
    if not (arguments.toy and arguments.gpus):
        print(verdict(runs, arguments.toy, steps))


def add(file: Path, entry: Mapping[str, Any]) -> None:
    """Adds an entry to a file that holds a JSON list."""
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    file.write_text(json.dumps([*entries, entry], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
