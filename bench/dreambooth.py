"""DreamBooth's benchmark: subjects of photographs, trained by the project's own job, scored by the published protocol.

`script/bench dreambooth DATASET --folder OUT`, on a GPU with FLUX.1-dev (FLUX_BASE). DATASET is the folder `dataset` of
github.com/google/dreambooth: a folder of photographs for each of 30 subjects, and `prompts_and_classes.txt`. Every
subject is trained with the defaults and without each part (PARTS); every prompt of its kind is drawn four times. Then,
as Ruiz et al. 2022 (arXiv:2208.12242) score:

- *DINO*, *CLIP-I*: the mean cosine between the embeddings of drawings and of the subject's photographs, by DINO
  ViT-S/16 and CLIP ViT-B/32;
- *CLIP-T*: the mean cosine between those of drawings and of their prompts (without the trigger word), by CLIP.

Every line of OUT/results.jsonl is one training; a run goes on where it was stopped. The table is written to
OUT/table.md, beside the published row of a plain LoRA on FLUX.1-dev. All subjects with all parts are 150 trainings and
15,000 drawings: days on one GPU; `--subjects`, `--parts` and `--prompts` choose some.
"""

import argparse
import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from bench.lab.training import default_request
from lora import job
from lora.file import source
from lora.flux import base, generate, hardware
from lora.flux.eye import AT_ONCE, Eye
from lora.flux.generate import Lora
from lora.pictures import buckets
from lora.pictures.photos import PICTURE_SUFFIXES

TRIGGER = "TOK"
PARTS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "without preservation": {"preservation": "off"},
    "without close-ups": {"subject_crop": False},
    "without written captions": {"captioning": "disabled"},
    "one resolution": {"priority": "high_res_only"},
}
"""Inputs other than the defaults."""
PUBLISHED = {"a plain LoRA (arXiv:2603.20755)": (0.7324, 0.8146, 0.3173)}
"""DINO, CLIP-I, CLIP-T."""
DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"
DRAWINGS = 4
"""Of each prompt."""


class Clip:
    """CLIP's embeddings of pictures and texts, (N, D) of length 1 on the CPU."""

    def __init__(self, name: str, device: str) -> None:
        self._processor, self._tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        self._model = CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32).to(device).eval()

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        found = []
        for start in range(0, len(pictures), AT_ONCE):
            pixels = self._processor(images=list(pictures[start : start + AT_ONCE]), return_tensors="pt")[
                "pixel_values"
            ]
            found.append(self._model.get_image_features(pixel_values=pixels.to(self._model.device)).pooler_output.cpu())
        return F.normalize(torch.cat(found), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        found = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return F.normalize(found.cpu(), dim=-1)


def read_set(folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Of the data set's `prompts_and_classes.txt`: the class of each subject, and the prompts for objects and for live
    subjects, with {0} for the trigger word and {1} for the class. Raises ValueError where it is none."""
    file = folder / "prompts_and_classes.txt"
    if not file.is_file():
        raise ValueError(f"{folder} holds no {file.name}: name the folder dataset of github.com/google/dreambooth")
    text = file.read_text(encoding="utf-8")
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text.partition("subject_name,class")[2], re.MULTILINE))
    things, _, live = text.partition("Live Subject Prompts")
    of_things, of_live = (re.findall(r"^'(.*?)'\.format", part, re.MULTILINE) for part in (things, live))
    if not (classes and of_things and of_live):
        raise ValueError(f"{file} has not the form of github.com/google/dreambooth's")
    return classes, of_things, of_live


def photographs(folder: Path, subject: str) -> list[Path]:
    return sorted(path for path in (folder / subject).iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)


def train(photos: Sequence[Path], inputs: Mapping[str, Any], seed: int, folder: Path, flux: base.Base) -> Path:
    """The safetensors of a training with the defaults of `train.py` but for `inputs`."""
    archive = folder / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for photo in photos:
            out.write(photo, photo.name)
    # One preview, for the drawings that are scored are drawn behind
    request = default_request(
        archive, trigger_word=TRIGGER, lora_type="subject", seed=seed, preview_prompts="a [trigger]", **inputs
    )
    tar = job.run(
        request,
        output=folder,
        flux_base=str(flux.folder),
        captioner=os.environ.get("CAPTIONER"),
        log=print,
        metric=lambda name, value: None,
        eye="none",
    )
    return source.fetch(str(tar), folder, "the tar")


def draw(
    pipeline: FluxPipeline, lora: Path, prompts: Sequence[str], flux: base.Base, steps: int
) -> Iterator[list[Image.Image]]:
    """DRAWINGS of each prompt; the same seeds for every LoRA."""
    generate.put_on(pipeline, [Lora(name="dreambooth", file=lora, scale=1.0)], print)
    side = flux.native
    for number, prompt in enumerate(prompts):
        seeds = [number * DRAWINGS + i for i in range(DRAWINGS)]
        yield [generate.draw(pipeline, prompt, (side, side), s, steps, tokens=flux.t5_tokens) for s in seeds]
    pipeline.unload_lora_weights()


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The mean over subjects of each part's scores, as Markdown."""
    lines = ["| | subjects | DINO | CLIP-I | CLIP-T |", "| --- | --- | --- | --- | --- |"]
    for part in PARTS:
        rows = [result for result in results if result["part"] == part]
        if rows:
            means = [sum(row[name] for row in rows) / len(rows) for name in ("dino", "clip_i", "clip_t")]
            lines.append(f"| {part} | {len(rows)} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    for name, scores in PUBLISHED.items():
        lines.append(f"| {name} | 30 | {' | '.join(f'{score:.4f}' for score in scores)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where results and the table go")
    parser.add_argument("--subjects", help="names, separated by commas; all of them if not given")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--prompts", type=int, help="so many of each subject's prompts; all 25 if not given")
    parser.add_argument("--training-steps", type=int, help="as the defaults decide if not given")
    parser.add_argument("--drawing-steps", type=int, default=generate.STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dino", default=DINO)
    parser.add_argument("--clip", default=CLIP)
    options = parser.parse_args(argv)
    classes, of_things, of_live = read_set(options.dataset)
    subjects = options.subjects.split(",") if options.subjects else list(classes)
    parts = options.parts.split(",")
    if unknown := {*subjects} - {*classes} | {*parts} - {*PARTS}:
        parser.error(f"not known: {', '.join(sorted(unknown))}")

    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    gpu = hardware.read_gpu()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    flux = base.find(os.environ.get("FLUX_BASE"), gpu)
    dino, clip = Eye(options.dino, device), Clip(options.clip, device)
    for subject in subjects:
        noun = classes[subject]
        asked = (of_live if noun in ("dog", "cat") else of_things)[: options.prompts]
        photos = photographs(options.dataset, subject)
        true = [buckets.read_picture(photo) for photo in photos]
        for part in parts:
            if any(result["subject"] == subject and result["part"] == part for result in results):
                continue
            steps = {"training_steps": options.training_steps} if options.training_steps else {}
            with tempfile.TemporaryDirectory(prefix="dreambooth-") as work, contextlib.ExitStack() as lent:
                lora = train(photos, {**PARTS[part], **steps}, options.seed, Path(work), flux)
                pipeline = generate.open_pipeline(flux.folder, device, dtype, offload=False)
                lent.callback(base.free)
                prompts = [prompt.format(TRIGGER, noun) for prompt in asked]
                drawn = list(draw(pipeline, lora, prompts, flux, options.drawing_steps))
                del pipeline
            every = [picture for of_prompt in drawn for picture in of_prompt]
            said = clip.texts([re.sub(" +", " ", prompt.format("", noun)) for prompt in asked])
            seen = clip.pictures(every)
            scores = {
                "dino": (dino.embed(every) @ dino.embed(true).T).mean().item(),
                "clip_i": (seen @ clip.pictures(true).T).mean().item(),
                "clip_t": (seen * said.repeat_interleave(DRAWINGS, 0)).sum(1).mean().item(),
            }
            results.append({"subject": subject, "part": part, "base": flux.name, "prompts": len(asked), **scores})
            with file.open("a") as out:
                out.write(json.dumps(results[-1]) + "\n")
            (options.folder / "table.md").write_text(table(results))
            print(table(results))


if __name__ == "__main__":
    main()
