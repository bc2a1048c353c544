"""The model card of an upload: its front matter, how the LoRA is used, how it was trained, its licence.

Whatever the user typed is quoted for YAML, Python, the shell and Markdown. Nothing of the user's pictures or captions
is in it.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lora import trigger
from lora.request import TrainRequest

WEIGHTS_NAME = "lora.safetensors"

FLUX_WIDTH = 3072
"""Of the layers of every FLUX.1 transformer: 24 heads of 128 (their `transformer/config.json`)."""
FLUX_DEV, FLUX_SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
FLUX_KREA = "black-forest-labs/FLUX.1-Krea-dev"
_BY_FOLDER = {name.partition("/")[2].casefold(): name for name in (FLUX_DEV, FLUX_SCHNELL, FLUX_KREA)}
_LICENCES = {
    FLUX_DEV: (
        "license: other\n"
        "license_name: flux-1-dev-non-commercial-license\n"
        "license_link: https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md\n",
        "The FLUX.1 [dev] Non-Commercial License, as for every LoRA of that model:"
        " https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    FLUX_KREA: (
        "license: other\n"
        "license_name: flux-1-dev-non-commercial-license\n"
        "license_link: https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev/blob/main/LICENSE.md\n",
        "The FLUX.1 [dev] Non-Commercial License, which FLUX.1 Krea [dev] has too:"
        " https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev/blob/main/LICENSE.md",
    ),
    FLUX_SCHNELL: ("license: apache-2.0\n", "Apache 2.0, as FLUX.1 [schnell]."),
}


def card(
    repo_id: str,
    request: TrainRequest,
    decided: Mapping[str, Any],
    pictures: int,
    previews: Mapping[str, str],
    *,
    word: str | None,
    width: int,
    verdict: Sequence[str] = (),
) -> str:
    """The README.md of the repository.

    `decided` holds the base's name, `guidance_embeds`, its `licence` where its files tell it and, where there was a
    training, its learning rate, resolutions, seed and the step whose weights these are; `pictures` counts those trained
    on; `previews` maps the name of an uploaded picture to its prompt. `word` is the trigger word that it was trained
    with, None where that is not known; `width` the size of the layers that it belongs to: only those of FLUX_WIDTH are
    a FLUX.1's.
    """
    base = str(decided["base"])
    if width != FLUX_WIDTH:
        return _card_of_another_base(repo_id, request, decided, pictures, previews, word)
    base_id, whose = _base(base, decided.get("guidance_embeds", True))
    licence, licence_text = _licence(decided.get("licence", {}), base_id, decided.get("guidance_embeds", True))
    few = "" if decided.get("guidance_embeds", True) else ", num_inference_steps=4, guidance_scale=0.0"
    runs = "flux-schnell-lora" if few else "flux-dev-lora"
    private = ""
    if request.hf_private:
        private = (
            " While this repository is private, give it a token that may read it as `hf_api_token`; diffusers takes one"
            " from `HF_TOKEN`."
        )
    widget = "".join(f"- text: {_quoted(prompt)}\n  output:\n    url: {name}\n" for name, prompt in previews.items())
    prompt = next((prompt for prompt in previews.values() if _calls(prompt, word)), word or "a photo of a cat")
    return f"""\
---
{licence}base_model: {base_id}
base_model_relation: adapter
library_name: diffusers
pipeline_tag: text-to-image
tags:
- flux
- lora
- diffusers
- text-to-image
- template:sd-lora
{f"instance_prompt: {_quoted(word)}{chr(10)}" if word else ""}{"widget:" + chr(10) + widget if widget else ""}---

# {_plain(repo_id.split("/")[1])}

{whose} {_how_to_call(word)}

<Gallery />

## Use it

With [diffusers](https://github.com/huggingface/diffusers):

```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("{base_id}", torch_dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("{repo_id}", weight_name="{WEIGHTS_NAME}")
image = pipeline({_quoted(prompt)}{few}).images[0]
```

In ComfyUI: put [`{WEIGHTS_NAME}`](https://huggingface.co/{repo_id}/resolve/main/{WEIGHTS_NAME}) into `models/loras` and
load it with the node *Load LoRA*.

On [Replicate](https://replicate.com/black-forest-labs/{runs}): set `lora_weights` to
`huggingface.co/{repo_id}`.{private}

{_settings_table(request, decided, pictures)}## Licence

{licence_text}
"""


def _base(base: str, guided: bool) -> tuple[str, str]:
    """The base's id on the Hub, and a sentence on whose LoRA this is. A folder whose name is not that of a FLUX.1 is
    taken for the one that it can be by its guidance input."""
    known = base if "/" in base else _BY_FOLDER.get(base.casefold())
    if known:
        return known, f"A LoRA for {known}."
    likely = FLUX_DEV if guided else FLUX_SCHNELL
    return likely, f"A LoRA for the base in the folder {_code(base)}: it fits {likely} where the folder held that."


def _licence(told: Mapping[str, str], base_id: str, guided: bool) -> tuple[str, str]:
    """The front matter's lines and the text of a licence: the one that the base's own files tell, or else the one that
    is known of its id, or of the FLUX.1 that it comes from."""
    if "license" not in told:
        return _LICENCES.get(base_id) or _LICENCES[FLUX_DEV if guided else FLUX_SCHNELL]
    front = "".join(f"{key}: {_quoted(value)}\n" for key, value in told.items())
    link = f": {told['license_link']}" if "license_link" in told else "."
    return front, f"That of the base, {_plain(told.get('license_name') or told['license'])}{link}"


def _card_of_another_base(
    repo_id: str,
    request: TrainRequest,
    decided: Mapping[str, Any],
    pictures: int,
    previews: Mapping[str, str],
    word: str | None,
) -> str:
    """The card of a LoRA of the toy base, or of another size: nothing made for FLUX.1 can load it."""
    shown = "\n".join(f"![{_plain(prompt)}]({name})" for name, prompt in previews.items())
    prompt = next((prompt for prompt in previews.values() if _calls(prompt, word)), word or "a red circle")
    return f"""\
---
tags:
- lora
---

# {_plain(repo_id.split("/")[1])}

A LoRA for a small base, {_code(str(decided["base"]))}, on which the trainer is tried out. It fits **no FLUX.1 model**:
its layers are of another size. {_how_to_call(word)}

{shown}

With the trainer's own command, where that base is:

```
script/generate -i lora_weights={repo_id} -i prompt={shlex.quote(prompt)}
```

{_settings_table(request, decided, pictures)}"""


def _how_to_call(word: str | None) -> str:
    if word is None:
        return "Its file does not name the trigger word that it was trained with, which calls up what it has learned."
    several = " or ".join(map(_code, trigger.words(word)))
    return f"Put {several} in the prompt to call up what it has learned."


def _calls(prompt: str, word: str | None) -> bool:
    """Whether the prompt has the trigger word, or one of several."""
    return word is not None and any(one in prompt for one in trigger.words(word))


def _settings_table(request: TrainRequest, decided: Mapping[str, Any], pictures: int) -> str:
    """How it was trained; nothing where there was no training."""
    if "weights_of_step" not in decided:
        return ""
    rows = {
        "Pictures": pictures,
        "Kind": request.lora_type,
        "Steps": decided["weights_of_step"],
        "Learning rate": f"{decided['learning_rate']:.3g}",
        "Rank": request.lora_rank,
        "Resolution": ", ".join(map(str, decided["resolutions"])),
        "Batch size": request.batch_size,
        "Caption dropout": request.caption_dropout_rate,
        "Prior preservation": decided["prior_ratio"],
        "Layers": request.layers_to_optimize_regex or "attention and MLP of every block",
        "Seed": decided["seed"],
        "Base": decided["base"],
    }
    if request.finetune_type == "full":
        rows["Trained"] = f"the layers' weights, and a LoRA of rank {request.lora_rank} made of their change"
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return f"## Training\n\n| Setting | Value |\n| --- | --- |\n{table}\n\n"


def of_file(lora: Path) -> tuple[int, str | None]:
    """The width of the layers that a LoRA belongs to, and the trigger word that its header names, if any."""
    with safe_open(lora, framework="numpy") as file:
        blocks = [name for name in file.keys() if "transformer_blocks." in name]  # noqa: SIM118
        sizes = [file.get_slice(name).get_shape() for name in blocks]
        word = (file.metadata() or {}).get("modelspec.trigger_phrase", "").strip()
    # A is (rank, in) and B (out, rank): beside the rank the smallest side of a block is its width
    return min((max(size) for size in sizes), default=0), word if 0 < len(word) <= 60 and word.isprintable() else None


def _quoted(text: str) -> str:
    """A string in double quotes that YAML, Python and JSON all read as `text`."""
    return json.dumps("".join(c if c.isprintable() else " " for c in text), ensure_ascii=False)


def _code(text: str) -> str:
    """The text as a code span of Markdown, whatever backticks are in it (CommonMark 0.31, 6.1)."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(value: object) -> str:
    return _plain(str(value)).replace("|", "\\|")


def _plain(text: str) -> str:
    """The text without what Markdown or HTML would make something of."""
    return re.sub(r"([\\`*_{}\[\]<>#])", r"\\\1", " ".join(text.split()))
