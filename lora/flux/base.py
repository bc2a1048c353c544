"""The base model: finding it, checking that its files are whole, and lending its parts for the length of a `with`.

One way for all bases. The project's own toy base has FLUX.1-dev's classes and file layout, and its native size and text
lengths come from its files like any other's.
"""

import contextlib
import dataclasses
import gc
import json
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from lora import wait
from lora.flux import hardware, layer, licence, schnell
from lora.flux.hardware import Gpu, Plan

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
TOY = Path(__file__).parents[2] / "toyflux" / "base"
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
"""Their vocabularies, in either of two ways."""
READ_AT_ONCE = 2**20
"""Bytes."""
MOST_ON_A_CPU = 1e9
"""Parameters of the transformer. FLUX.1-dev's 12 billion would be 48 GB there, and minutes a step."""
FILES = ("model_index.json", "README.md", *(f"{c}/*" for c in (*COMPONENTS, "tokenizer", "tokenizer_2", "scheduler")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A complete folder in diffusers' layout."""

    name: str
    """The Hub id, or the folder's name."""
    folder: Path
    reason: str
    """Why this base."""
    native: int
    """Side in pixels that it draws best: the autoencoder's `sample_size`, 1024 for FLUX.1-dev."""
    clip_tokens: int
    t5_tokens: int
    """Length of its text, 77 and 512 for FLUX.1-dev: the tokenizers' `model_max_length`. Without a guidance input T5
    reads `schnell.TOKENS` at most, which FLUX.1-schnell's files do not tell."""
    width: int
    """Of the transformer's hidden state, 3072 for FLUX.1-dev."""
    parameters: int
    """Of the transformer."""
    scheduler: dict
    """The scheduler's config."""
    guided: bool
    """Whether the transformer has a guidance input (`guidance_embeds`): FLUX.1-dev and FLUX.1-Krea-dev have one,
    FLUX.1-schnell has none."""
    licence: Mapping[str, str]
    """What the folder's README.md says in its front matter of `license`, `license_name` and `license_link`."""

    @property
    def warning(self) -> str | None:
        """What to know before training on this base; None where there is nothing."""
        if self.guided:
            return None
        return (
            f"base: {self.name} has no guidance input, as FLUX.1-schnell, which is distilled to draw in"
            f" {schnell.STEPS} steps. Training undoes some of that: the longer it is, the blurrier its pictures of so"
            f" few steps become, with this LoRA on. A LoRA that is trained on {FLUX_DEV} draws with schnell too"
        )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides to train at where the user names none: 512, 768 and 1024 as far as the base goes, and its own."""
        return (*(side for side in (512, 768, 1024) if side < self.native), self.native)

    def token_counters(self) -> tuple[Callable[[str], int], Callable[[str], int]]:
        """How many tokens CLIP and T5 make of a text, their special ones counted: two functions."""
        clip = AutoTokenizer.from_pretrained(self.folder, subfolder="tokenizer")
        t5 = AutoTokenizer.from_pretrained(self.folder, subfolder="tokenizer_2")
        return (lambda text: len(clip(text).input_ids)), (lambda text: len(t5(text).input_ids))

    @contextlib.contextmanager
    def read_ahead(self, first: Sequence[Path] = ()) -> Iterator[None]:
        """Meanwhile the largest files go through a thread of their own, in the order in which they will be needed, so
        that the system has them in memory by then: FLUX.1-dev's are 33 GB, which a disk takes up to minutes for.
        `first` are others that are needed before them."""
        own = [file for component in ("text_encoder_2", "transformer") for file in _weights(self.folder / component)]
        files = [*first, *own]
        enough = threading.Event()

        def read() -> None:
            buffer = bytearray(READ_AT_ONCE)
            with contextlib.suppress(OSError):  # whoever needs the file will say what is wrong with it
                for file in files:
                    with file.open("rb", buffering=0) as stream:
                        while not enough.is_set() and stream.readinto(buffer):
                            pass

        threading.Thread(target=read, name="read ahead", daemon=True).start()
        try:
            yield
        finally:
            enough.set()

    @contextlib.contextmanager
    def text(self, plan: Plan) -> Iterator[FluxPipeline]:
        """diffusers' own pipeline with nothing but the tokenizers and text encoders, for `encode_prompt`."""
        with self._still_whole():
            pipeline = FluxPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=plan.dtype)
        pipeline.to(plan.device)
        try:
            yield pipeline
        finally:
            del pipeline
            free()

    @contextlib.contextmanager
    def vae(self, plan: Plan) -> Iterator[AutoencoderKL]:
        with self._still_whole():
            vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", dtype=plan.dtype)
        try:
            yield vae.to(plan.device).eval().requires_grad_(False)
        finally:
            del vae
            free()

    @contextlib.contextmanager
    def transformer(self, plan: Plan) -> Iterator[FluxTransformer2DModel]:
        # What the encoders leave behind until Python looks for it: a small GPU has no room for both. And once a
        # training on any device: a server would keep what its last ones left.
        free(anywhere=True)
        with self._still_whole():
            transformer = self.load_transformer(plan)
        try:
            yield transformer
        finally:
            del transformer
            free()

    @contextlib.contextmanager
    def _still_whole(self) -> Iterator[None]:
        """Around what reads the folder: raises ValueError with what it has lost since it was found whole."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError):
            _check(self.name, self.folder)
            raise

    def load_transformer(self, plan: Plan) -> FluxTransformer2DModel:
        """The transformer on the plan's device, weight by weight from the mapped files: where it is quantised, no more
        than one weight at a time lies there in full."""
        transformer = self.skeleton()
        quantised = layer.to_float8(transformer) if plan.quantised else set()
        weights = {}
        for file in _weights(self.folder / "transformer"):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    weight = stored.get_tensor(name).to(plan.device, plan.dtype, copy=True)
                    module, _, kind = name.rpartition(".")
                    if module in quantised and kind == "weight":
                        weight, weights[f"{module}.scale"] = layer.quantise(weight)
                    weights[name] = weight
        transformer.load_state_dict(weights, assign=True)
        return transformer.eval().requires_grad_(False)

    def skeleton(self) -> FluxTransformer2DModel:
        """The transformer without its weights, on torch's meta device: for the names and sizes of its layers."""
        return _skeleton(self.folder / "transformer" / "config.json")


def find(name: str | None, gpu: Gpu | None, token: str | None = None) -> Base:
    """The base that `name` means: a folder, or an id on the Hugging Face Hub; FLUX.1-dev or the toy where it is None.

    `token` opens a gated base on the Hub; without one HF_TOKEN does. Raises ValueError that names FLUX_BASE where there
    is no such folder or id, where the Hub refuses, where a file is missing or cut short, where the machine has a GPU
    that torch cannot use, and (before the weights are fetched) where the base is too large for one without a GPU.
    """
    if not name and gpu is None:
        if idle := hardware.idle_gpu():
            raise ValueError(f"FLUX_BASE: {idle}; or set FLUX_BASE=toyflux/base, to train the toy base on the CPU")
        reason = "no GPU and no FLUX_BASE: THIS IS THE TOY BASE, which draws simple little pictures, not photographs"
        return _open("toyflux", TOY, reason)
    name = name or FLUX_DEV
    if Path(name).is_dir():
        base = _open_folder(name)
        if gpu is None:
            _check_size_for_a_cpu(base.name, base.parameters)
        return base
    if gpu is None:
        _check_size_for_a_cpu(name, sum(p.numel() for p in architecture(name, gpu, token)[1].parameters()))
    folder = _from_the_hub(name, lambda: snapshot_download(name, allow_patterns=list(FILES), token=token))
    return _open(name, folder, "from the Hugging Face Hub")


def architecture(name: str | None, gpu: Gpu | None, token: str | None = None) -> tuple[str, FluxTransformer2DModel]:
    """What `find` would call the base, and its transformer without weights: of a base on the Hub one small file is
    fetched, not tens of gigabytes, and none is too large for a machine without a GPU. Raises ValueError as `find` does.
    """
    if is_here(name, gpu):
        found = _open_folder(name) if name else find(None, gpu)
        return found.name, found.skeleton()
    name = name or FLUX_DEV
    config = _from_the_hub(name, lambda: hf_hub_download(name, "transformer/config.json", token=token))
    return name, _skeleton(config)


def is_here(name: str | None, gpu: Gpu | None) -> bool:
    """Whether the base that `name` means is on this machine in any case: a folder, or the toy."""
    return Path(name).is_dir() if name else gpu is None


def _from_the_hub(name: str, fetch: Callable[[], str]) -> Path:
    """What `fetch` brings of the base `name`; raises ValueError that says what to do where the Hub gives nothing."""
    try:
        return Path(wait.interruptibly(fetch))
    except HFValidationError as error:
        raise ValueError(
            f"FLUX_BASE: {name!r} is neither a folder nor an id of the Hugging Face Hub; give a folder in diffusers'"
            f" layout or an id such as {FLUX_DEV}"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"FLUX_BASE: {name} is gated: accept its licence on its page at the Hugging Face Hub, then give a token of"
            " that account as hf_token (script/generate takes none), or set HF_TOKEN to it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"FLUX_BASE: the Hugging Face Hub has no {name}, or the token (hf_token, or else HF_TOKEN) may not read it;"
            " check both"
        ) from error
    except (HTTPError, OSError) as error:
        if wait.refused(error):
            raise ValueError(
                f"hf_token: the Hugging Face Hub refuses it (or HF_TOKEN, where it is empty) for {name}; give one from"
                " https://huggingface.co/settings/tokens that may read gated repositories"
            ) from error
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"FLUX_BASE: {name} could not be downloaded ({told}); try again, or set FLUX_BASE to a folder that holds it"
        ) from error


def _check_size_for_a_cpu(name: str, parameters: int) -> None:
    if parameters > MOST_ON_A_CPU:
        raise ValueError(
            f"FLUX_BASE: {name} has {parameters / 1e9:.0f} billion weights, and no GPU is visible here: give"
            " the container or the machine its NVIDIA GPU and driver, or leave FLUX_BASE empty for the toy base"
        )


def _skeleton(config: Path) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(_read_json(config))


def _check(name: str, folder: Path) -> None:
    faults = incomplete(folder)
    if faults:
        raise ValueError(
            f"FLUX_BASE: {name} is not a complete FLUX base in diffusers' layout: {'; '.join(faults)}."
            " Fetch it again, or set FLUX_BASE to a complete folder"
        )


def _open_folder(name: str) -> Base:
    return _open(Path(name).resolve().name, Path(name), "the folder in FLUX_BASE")


def _open(name: str, folder: Path, reason: str) -> Base:
    _check(name, folder)

    def number(file: str, key: str) -> int:
        value = _read_json(folder / file).get(key)
        if not isinstance(value, int):
            raise ValueError(f"FLUX_BASE: {name} is no FLUX base in diffusers' layout: {file} has no number {key}")
        return value

    transformer = "transformer/config.json"
    guided = bool(_read_json(folder / transformer).get("guidance_embeds", False))
    t5_tokens = number("tokenizer_2/tokenizer_config.json", "model_max_length")
    return Base(
        name=name,
        folder=folder,
        reason=reason,
        native=number("vae/config.json", "sample_size"),
        clip_tokens=number("tokenizer/tokenizer_config.json", "model_max_length"),
        t5_tokens=t5_tokens if guided else min(t5_tokens, schnell.TOKENS),
        width=number(transformer, "num_attention_heads") * number(transformer, "attention_head_dim"),
        parameters=sum(_parameters(file) for file in _weights(folder / "transformer")),
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
        guided=guided,
        licence=licence.read(name, folder / "README.md"),
    )


def incomplete(folder: Path) -> list[str]:
    """What is missing or cut short in a base's folder, a line each; empty where it is whole.

    A sharded component is whole when every shard that its index names is; a safetensors file is whole when it is as
    long as its header says, and a JSON file when it can be read.
    """
    if not (folder / "model_index.json").is_file():
        return ["there is no model_index.json"]
    faults = []
    for needed in (
        *(f"{component}/config.json" for component in COMPONENTS),
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ):
        if not (folder / needed).is_file():
            faults.append(f"{needed} is missing")
    for tokenizer, alternatives in TOKENIZERS.items():
        if not any(all((folder / tokenizer / file).is_file() for file in files) for files in alternatives):
            faults.append(f"{tokenizer} has no {' and no '.join(' with '.join(files) for files in alternatives)}")
    for file in (file for pattern in FILES for file in sorted(folder.glob(pattern)) if file.suffix == ".json"):
        try:
            _read_json(file)
        except ValueError:
            faults.append(f"{file.relative_to(folder)} is cut short or damaged: it is no JSON")
    for component in COMPONENTS:
        try:
            files = _weights(folder / component)
        except ValueError:
            continue  # its index: named above
        if not files:
            faults.append(f"{component} has no safetensors weights")
        for file in files:
            inside = file.relative_to(folder)
            if not file.is_file():
                faults.append(f"{inside} is missing, though the index names it")
            elif file.stat().st_size != (whole := _length(file)):
                faults.append(f"{inside} is cut short or damaged ({file.stat().st_size} bytes of {whole})")
    return faults


def _weights(component: Path) -> list[Path]:
    """The safetensors files of a component: those its index names, or the only one."""
    indexes = sorted(component.glob("*.safetensors.index.json"))
    if indexes:
        return [component / name for name in sorted(set(_read_json(indexes[0]).get("weight_map", {}).values()))]
    return sorted(component.glob("*.safetensors"))[:1]


def _header(file: Path) -> tuple[int, dict]:
    """Length of a safetensors header and what it says; (0, {}) for a file that has none."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= 100_000_000:
            return 0, {}
        try:
            return length, json.loads(stream.read(length))
        except ValueError:
            return 0, {}


def _length(file: Path) -> int:
    length, header = _header(file)
    return 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)


def _parameters(file: Path) -> int:
    shapes = [tensor["shape"] for name, tensor in _header(file)[1].items() if name != "__metadata__"]
    return sum(torch.Size(shape).numel() for shape in shapes)


def _read_json(file: Path) -> dict:
    """Raises ValueError where it is no JSON, or none with names."""
    read = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"{file.name} holds no names")
    return read


def free(anywhere: bool = False) -> None:
    """Gives back the memory of what nobody holds any more: a GPU's; the CPU's, which comes back by itself in the end,
    only where `anywhere` is said, for looking for it takes a tenth of a second."""
    if anywhere or torch.cuda.is_available():
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
