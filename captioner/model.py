"""The captioning model itself: fetched, loaded, asked about pictures, freed again.

Qwen3-VL-Instruct of any size, through transformers' own classes, without torchvision (which its stock processor wants
for videos). Greedy, so that the same picture gets the same answer.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from PIL import Image
from safetensors import SafetensorError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

MODEL = "Qwen/Qwen3-VL-8B-Instruct"
"""The model where none is named: Apache-2.0, 17.5 GB; Qwen3-VL-4B-Instruct and -2B-Instruct work as well."""
MIN_PIXELS, MAX_PIXELS = 256**2, 768**2
"""What a picture is scaled to, in area: 64 to 576 tokens, one for each GRID × GRID."""
GRID = 32
"""Patches of 16, merged two by two: the same in every Qwen3-VL."""
MAX_NEW_TOKENS = 160
"""A caption of 50 words has some 70."""
BATCH_SIZE, CPU_BATCH_SIZE = 20, 4
"""Pictures asked about at once. 20 take some 4 GB beside the weights of the 8B model."""
NOUN_PICTURES, NOUN_TOKENS = 8, 12
"""How many pictures are asked about for the class noun, and how long an answer may be."""

Log = Callable[[str], None]
Read = Callable[[Path, int], Image.Image]
"""Decodes a file to an upright RGB picture, in the detail of at least so many pixels where it has them."""
Fetch = Callable[[str], str]
"""Downloads a model by its Hub id, where it is not in the local cache already; its folder."""
FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")
"""Of a model on the Hub: settings, vocabularies, chat template, weights."""


class PictureProcessor(transformers.ProcessorMixin):
    """Pictures and chats to the model's inputs: transformers' Qwen3VLProcessor without its video half.

    The base class takes the names of its parts from this `__init__`.
    """

    return_mm_token_type_ids = True
    text_kwargs: ClassVar = {"return_token_type_ids": False}

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return str(self.image_token * (patches // self.image_processor.merge_size**2))


class Captioner:
    """A loaded model. `answer` asks it; after `close` its memory is free and it answers no more."""

    def __init__(self, model: Any, processor: PictureProcessor) -> None:
        self.model = model
        self.processor = processor

    def inputs(self, pictures: Sequence[Image.Image], question: str, begin: str = "") -> dict[str, torch.Tensor]:
        """One batch for the model, on its device: token ids and masks (pictures, tokens), padded on the left, and the
        patches of all pictures (patches, 3 * 2 * 16 * 16) with their grids (pictures, 3)."""
        chats = []
        for picture in pictures:
            parts = [{"type": "image", "image": fit_to_model(picture)}, {"type": "text", "text": question}]
            chats.append([{"role": "user", "content": parts}])
            if begin:
                chats[-1].append({"role": "assistant", "content": [{"type": "text", "text": begin}]})
        batch = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=not begin,
            continue_final_message=bool(begin),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
            processor_kwargs={"padding": True, "do_resize": False},
        )
        return dict(batch.to(self.model.device))

    @torch.inference_mode()
    def answer(
        self, pictures: Sequence[Image.Image], question: str, begin: str = "", tokens: int = MAX_NEW_TOKENS
    ) -> list[str]:
        """What the model says about each RGB picture, going on from `begin`, which is not repeated in the answer.

        One batch. Control tokens in the question or the beginning are read as plain text.
        """
        inputs = self.inputs(pictures, question, begin)
        said = self.model.generate(**inputs, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(said, skip_special_tokens=True))

    def close(self) -> None:
        del self.model, self.processor
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def download(model: str) -> str:
    """A model of the Hub with what `load` needs of it; its folder in the local cache."""
    return snapshot_download(model, allow_patterns=list(FILES))


def is_at_hand(model: str) -> bool:
    """Whether `model` is a folder, or a Hub id whose weights all lie in the local cache."""
    return Path(model).is_dir() or bool(weights_at_hand(model))


def weights_at_hand(model: str) -> list[Path]:
    """The files of the weights of `model`, a folder or a Hub id, on this machine; empty where one is missing."""
    if Path(model).is_dir():
        return sorted(Path(model).glob("*.safetensors"))
    try:
        names = ["model.safetensors"]
        index = try_to_load_from_cache(model, "model.safetensors.index.json")
        if isinstance(index, str):
            names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        found = [try_to_load_from_cache(model, name) for name in ("config.json", *names)]
    except HFValidationError:  # neither a folder nor a name that the Hub could know
        return []
    return [Path(file) for file in found[1:] if file] if all(isinstance(file, str) for file in found) else []


@contextmanager
def load(model: str, device: str, dtype: torch.dtype, fetch: Fetch = download) -> Iterator[Captioner]:
    """The captioning model from a folder or the Hub, in memory while the `with` lasts.

    ValueError, naming the model, the reason and the ways out, where it cannot be loaded whole.
    """
    try:
        captioner = _load(model if Path(model).is_dir() else fetch(model), device, dtype)
    except (HTTPError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the captioning model {model} cannot be loaded: {str(error) or repr(error)}\n"
            "Set CAPTIONER to a folder or Hub id of a Qwen3-VL-Instruct model (Qwen/Qwen3-VL-4B-Instruct and "
            "Qwen/Qwen3-VL-2B-Instruct are smaller), or train with captioning=disabled, or put a .txt with a caption "
            "beside every picture."
        ) from error
    try:
        yield captioner
    finally:
        captioner.close()


def _load(model: str, device: str, dtype: torch.dtype) -> Captioner:
    transformers.utils.logging.disable_progress_bar()  # it piles up in a log as one endless line
    config = transformers.AutoConfig.from_pretrained(model)
    if config.model_type != "qwen3_vl":
        raise ValueError(f"it is a {config.model_type} model, not a qwen3_vl one")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
    images = Qwen2VLImageProcessorPil.from_pretrained(model)
    # AutoProcessor wants torchvision; the chat template is the one thing that only a processor's loader reads
    settings, _ = PictureProcessor.get_processor_dict(model)
    processor = PictureProcessor(
        images, tokenizer, chat_template=settings.get("chat_template", tokenizer.chat_template)
    )
    if processor.image_token_id != config.image_token_id:  # without tokenizer files an empty tokenizer is made
        raise ValueError("its tokenizer files are missing, or of another model")
    network, seen = transformers.AutoModelForImageTextToText.from_pretrained(
        model,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        output_loading_info=True,
        # A linear layer for the Conv3d over patches: the same sums, without the seconds that cuDNN takes for it
        fusion_config={"patch_embeddings": True},
    )
    if seen["missing_keys"]:
        raise ValueError(f"its files lack {len(seen['missing_keys'])} weights, {sorted(seen['missing_keys'])[0]} first")
    # Our own but for the ends: the Hub's sample, and a penalty on repetition bans the trigger word of the question
    ends = network.generation_config
    network.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=ends.eos_token_id,
        pad_token_id=ends.pad_token_id if ends.pad_token_id is not None else tokenizer.pad_token_id,
    )
    return Captioner(network.eval(), processor)


def fit_to_model(picture: Image.Image) -> Image.Image:
    """The picture scaled to what the model reads: sides in multiples of 32, an area within MIN_PIXELS and MAX_PIXELS.

    The model's own scaling, done here so that it runs in the threads that read. It refuses a picture more than 200
    times as long as wide, so such a one is squeezed first.
    """
    width, height = picture.size
    width, height = min(width, 200 * height), min(height, 200 * width)
    height, width = smart_resize(height, width, GRID, MIN_PIXELS, MAX_PIXELS)
    if (width, height) == picture.size:
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
