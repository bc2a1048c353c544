"""What a run says of itself as data: the header of its weights and `request.json`.

Nothing here depends on the clock, so that the same request on the same machine gives the same bytes; seconds and dates
stand in the log.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora import trigger
from lora.pictures.photos import Photo
from lora.request import TrainRequest, without_secrets

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pillow")


def data_hash(photos: Sequence[Photo]) -> str:
    """SHA-256 over the pictures' names, bytes and captions: which data this was, without showing it."""
    digest = hashlib.sha256()
    for photo in photos:
        for part in (photo.name.encode(), photo.path.read_bytes(), (photo.caption or "").encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def request_json(
    request: TrainRequest,
    decided: Mapping[str, Any],
    data: str,
    upload: Mapping[str, str] | None = None,
    verdict: Mapping[str, Any] | None = None,
    held: Mapping[str, Any] | None = None,
) -> str:
    """Everything that made the weights: the inputs as given, what was decided for those left empty, and versions.

    `run_id` is a hash of all of it: equal runs have equal ids. What came out is no part of the id: `verdict`; `held`,
    how much of a full fine-tuning's change the LoRA holds (`lora.flux.extract.record`); and `upload`, where one was
    asked for.
    """
    given = {name: value for name, value in dataclasses.asdict(request).items() if name != "faults"}
    inputs = {**given, "input_images": request.input_images.suffix or "archive"}
    if request.resume_from:
        inputs["resume_from"] = without_secrets(request.resume_from)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record: dict[str, Any] = {"inputs": inputs, "decided": dict(decided), "data_sha256": data, "versions": versions}
    run_id = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    if verdict is not None:
        record["verdict"] = dict(verdict)
    if held is not None:
        record["held"] = dict(held)
    if upload is not None:
        record["upload"] = dict(upload)
    return json.dumps({"run_id": run_id, **record}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def header(request: TrainRequest, decided: Mapping[str, Any], captions: Sequence[str]) -> dict[str, str]:
    """The weights' metadata: modelspec (Stability AI's ModelSpec 1.0) and the `ss_` keys of kohya's sd-scripts, which
    ComfyUI, the web sites that share LoRAs and their users read.

    The captions stay out of it, for the file is made to be shared: the only tags counted are the trigger words.
    """
    rank, word = str(request.lora_rank), request.trigger_word
    counts = {one: sum(one in caption for caption in captions) for one in trigger.words(word)}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flux-1-{'dev' if decided['guidance_embeds'] else 'schnell'}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": word,
        "modelspec.trigger_phrase": word,
        "modelspec.resolution": "{0}x{0}".format(max(decided["resolutions"])),
        "ss_base_model_version": "flux1",
        "ss_sd_model_name": decided["base"],
        "ss_output_name": "lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_learning_rate": str(decided["learning_rate"]),
        "ss_max_train_steps": str(decided["steps"]),
        "ss_steps": str(decided["weights_of_step"]),
        "ss_seed": str(decided["seed"]),
        "ss_tag_frequency": json.dumps({"pictures": counts}),
    }
