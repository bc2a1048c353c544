"""The keys of LoRA files, as a dozen tools write them -> the layers of diffusers' FLUX and of its CLIP text encoder.

A key is a prefix, a layer and a part: `base_model.model.` + `double_blocks.0.img_attn.qkv` + `.lora_A.weight`.

| tool | a key |
| --- | --- |
| diffusers, ai-toolkit, this trainer | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` |
| the same with old halves | `transformer.transformer_blocks.0.attn.to_q.lora.down.weight` |
| SimpleTuner, peft | `transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight`, or no prefix |
| sd-scripts (kohya), Forge | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, `lora_te1_text_model_…` |
| ComfyUI, fal | `diffusion_model.double_blocks.0.…`, `base_model.model.double_blocks.0.…` |
| OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
| LyCORIS | `lycoris_transformer_blocks_0_attn_to_q.lora_down.weight` |
| XLabs | `double_blocks.0.processor.qkv_lora1.down.weight` |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lora.file import names
from lora.file.names import Layer, some

_PREFIXES = re.compile(r"(?:(?:transformer|base_model\.model|model|diffusion_model|unet|module|_orig_mod)\.)*")
_PARTS = {
    "A": r"\.lora_A(?:\.default)?(?:\.weight)?|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)down\.weight",
    "B": r"\.lora_B(?:\.default)?(?:\.weight)?|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)up\.weight",
    "alpha": r"\.alpha",
    "bias": r"\.lora_B(?:\.default)?\.bias|\.lora_up\.bias",
    "bias_change": r"\.diff_b",
    "change": r"\.diff|\.set_weight",
    "magnitude": r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?|\.dora_scale",
}
_ENDINGS = re.compile("(.+?)(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _PARTS.items()) + ")")

_DIFFUSERS = {
    kind: {*plain, *(layer for layers in joined.values() for layer in layers)}
    for kind, (_, plain, joined) in names.KINDS.items()
}
_BFL = {bfl: {*plain.values(), *joined} for bfl, plain, joined in names.KINDS.values()}
_FLAT = {kind: {layer.replace(".", "_"): layer for layer in layers} for kind, layers in {**_DIFFUSERS, **_BFL}.items()}
_FLAT_OUTSIDE = {name.replace(".", "_"): name for name in (*names.OUTSIDE, *names.OUTSIDE.values())}
_FLAT_PREFIXES = {"lora_unet_": "kohya", "lora_transformer_": "onetrainer", "lycoris_": "lycoris"}
_XLABS = {
    "double_blocks": {
        "qkv_lora1": "img_attn.qkv",
        "qkv_lora2": "txt_attn.qkv",
        "proj_lora1": "img_attn.proj",
        "proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {"qkv_lora": names.SINGLE_QKV, "proj_lora": "linear2"},
}
_CLIP = re.compile(
    r"(?:lora_te1?_text_model_encoder_layers_(\d+)_"
    r"|text_encoder\.(?:base_model\.model\.)?(?:text_model\.)?encoder\.layers\.(\d+)\."
    r"|text_encoders\.clip_l\.transformer\.text_model\.encoder\.layers\.(\d+)\.)"
    r"(?:self_attn[._](?:to_)?(q|k|v|out)(?:_proj)?|mlp[._](fc[12]))"
)
_OTHERS = {
    "T5's text encoder": r"(?:lora_te[23]_|text_encoder_2\.|text_encoders\.t5xxl\.)",
    "CLIP's text encoder, but no attention or MLP of it": r"(?:lora_te1?_|text_encoder\.|text_encoders\.clip_l\.)",
    "learned words (embeddings)": r"(?:bundle_emb|emb_params|string_to_param|clip_[lg]$|t5(?:xxl)?$)",
}
"""Parts of which nothing is made, by the beginnings of their keys."""
NO_LAYER = "no layer of FLUX's transformer"


class Key(NamedTuple):
    naming: str
    """One of names.NAMINGS, or onetrainer, lycoris, xlabs, clip."""
    layer: str
    """As diffusers or Black Forest Labs name it, without a prefix."""
    part: str
    """A key of _PARTS."""


@dataclass
class Parsed:
    """What the keys of a file say, the layers under diffusers' names without `transformer.` or `text_encoder.`."""

    namings: set[str] = field(default_factory=set)
    layers: dict[str, Layer] = field(default_factory=dict)
    """Every alpha is folded into B."""
    text: dict[str, Layer] = field(default_factory=dict)
    """Layers of the CLIP text encoder: `encoder.layers.0.self_attn.q_proj`."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Keys of which nothing is made, by the part that they are."""
    alphas: bool = False


def read(key: str) -> Key | None:
    """What a key stands for; None where it is no part of a LoRA on FLUX's transformer or CLIP's text encoder."""
    if xlabs := re.fullmatch(r"(?:diffusion_model\.)?(\w+_blocks)\.(\d+)\.processor\.(\w+)\.(down|up)\.weight", key):
        layer = _XLABS.get(xlabs[1], {}).get(xlabs[3])
        return Key("xlabs", f"{xlabs[1]}.{xlabs[2]}.{layer}", "A" if xlabs[4] == "down" else "B") if layer else None
    match = _ENDINGS.fullmatch(key)
    if match is None or match.lastgroup is None:
        return None
    stem, part = match[1], match.lastgroup
    if clip := _CLIP.fullmatch(stem):
        number = clip[1] or clip[2] or clip[3]
        return Key(
            "clip", f"encoder.layers.{number}.{f'self_attn.{clip[4]}_proj' if clip[4] else f'mlp.{clip[5]}'}", part
        )
    for prefix, naming in _FLAT_PREFIXES.items():
        if stem.startswith(prefix):
            flat = _flat(stem.removeprefix(prefix).replace(".", "_"))
            return Key(naming, flat, part) if flat else None
    dotted = _dotted(stem[len(_PREFIXES.match(stem)[0]) :])  # type: ignore[index]
    if dotted is None:
        return None
    return Key("diffusers" if dotted in names.OUTSIDE or "transformer_blocks" in dotted else "bfl", dotted, part)


def _flat(name: str) -> str | None:
    if name in _FLAT_OUTSIDE:
        return _FLAT_OUTSIDE[name]
    match = re.fullmatch(r"((?:single_)?transformer_blocks|(?:double|single)_blocks)_(\d+)_(.+)", name)
    layer = _FLAT[match[1]].get(match[3]) if match else None
    return f"{match[1]}.{match[2]}.{layer}" if match and layer else None


def _dotted(name: str) -> str | None:
    if name in _FLAT_OUTSIDE.values():
        return name
    kind, number, layer = names.split(name.replace(".processor.", "."))
    layer = "attn.to_out.0" if layer == "attn.to_out" else layer
    return f"{kind}.{number}.{layer}" if layer in _DIFFUSERS.get(kind, _BFL.get(kind, set())) else None


def parse(tensors: Mapping[str, Tensor]) -> Parsed:
    """A file's tensors -> its layers.

    Raises ValueError where nothing is of a LoRA's layer, half of a pair is missing, or a layer has more than a LoRA's
    parts, without which it would do something else.
    """
    parsed = Parsed(alphas=any(key.endswith(".alpha") for key in tensors))
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    spelled: dict[tuple[str, str], list[str]] = {}
    faults: list[str] = []
    odd: list[str] = []
    for key, tensor in tensors.items():
        found = read(key)
        if found is None:
            part = _part(key)
            (odd if part is None else parsed.left_out.setdefault(part, [])).append(key)
        elif found.part not in ("change", "bias_change") or tensor.any():  # some tools write zeros for every layer
            parts.setdefault(found[:2], {})[found.part] = tensor
            spelled.setdefault(found[:2], []).append(key)
    if odd:
        faults.append(f"{len(odd)} of {len(tensors)} keys are of another kind of adapter: {some(odd)}")
    whole = {}
    for place, held in parts.items():
        if held.keys() <= {"change", "bias_change"}:
            parsed.left_out.setdefault("changes of whole weights and biases", []).extend(spelled[place])
        elif "change" in held:
            faults.append(f"{place[1]} has a LoRA and a change of the whole weight, which cannot be applied together")
        else:
            whole[place] = held
    halves = [layer for (_, layer), held in whole.items() if not {"A", "B"} <= held.keys()]
    if halves:
        faults.append(f"{len(halves)} layers have only half of a LoRA: {some(halves)}")
    wrong = [place[1] for place, held in whole.items() if place[1] not in halves and not _fits(held)]
    if wrong:
        faults.append(f"A and B of {len(wrong)} layers do not fit each other: {some(wrong)}")
    if not tensors:
        faults.append("it holds no weights")
    elif not parts:
        faults.append(f"none of its {len(tensors)} keys is of a FLUX LoRA: {some(tensors)}")
    if faults:
        raise ValueError("; ".join(faults))
    _gather(parsed, whole, spelled)
    return parsed


def _gather(
    parsed: Parsed, whole: Mapping[tuple[str, str], Mapping[str, Tensor]], spelled: Mapping[tuple[str, str], list[str]]
) -> None:
    """Fills in the layers. One that is there under two namings is taken from diffusers' own, as diffusers does."""
    for naming, layer in sorted(whole, key=lambda place: place[0] != "diffusers"):
        held = _scaled(layer, whole[naming, layer])
        if naming == "clip":
            parsed.text[layer] = held
            continue
        own = names.from_bfl(layer, held) if _is_bfl(layer) else {layer: held}
        if parsed.layers.keys() & own.keys():
            parsed.left_out.setdefault("layers that are there under a second name", []).extend(spelled[naming, layer])
            own = {name: part for name, part in own.items() if name not in parsed.layers}
        parsed.layers |= own
        parsed.namings.add(naming)


def _is_bfl(layer: str) -> bool:
    return layer not in names.OUTSIDE and "transformer_blocks" not in layer


def _part(key: str) -> str | None:
    """What a key is that is none of a LoRA's; None where it is more of a layer that may have one: it counts there."""
    if read(f"{re.sub(r'[.](?:weight|bias)$', '', key)}.alpha"):
        return "whole weights, as a checkpoint holds them"
    if any(read(f"{key[: dot.start()]}.alpha") for dot in re.finditer(r"\.", key)):
        return None
    return next((part for part, begins in _OTHERS.items() if re.match(begins, key)), NO_LAYER)


def _scaled(name: str, held: Mapping[str, Tensor]) -> Layer:
    """A layer with the factor alpha / rank in B and the bias of B; without an alpha, or with alpha = rank, as it is."""
    scale = 1.0
    if "alpha" in held:
        if held["alpha"].numel() != 1:
            raise ValueError(f"{name}: its alpha is no number")
        scale = held["alpha"].item() / len(held["A"])
    a, b, bias, change, magnitude = (held.get(part) for part in ("A", "B", "bias", "bias_change", "magnitude"))
    assert a is not None
    assert b is not None
    if magnitude is not None:
        if magnitude.numel() != len(b) or magnitude.shape[0] != len(b):
            raise ValueError(f"{name}: this DoRA scales a layer's inputs, and peft's its outputs; ComfyUI reads it")
        magnitude = magnitude.flatten()
    if any(part is not None and part.shape != b.shape[:1] for part in (bias, change)):
        raise ValueError(f"{name}: its bias does not fit its outputs")
    layer = scaled(Layer(a, b, bias, magnitude), scale)
    return layer if change is None else layer._replace(bias=change if layer.bias is None else layer.bias + change)


def scaled(layer: Layer, factor: float) -> Layer:
    """The layer with what it adds times `factor`."""
    if factor == 1:
        return layer
    b, bias = (None if part is None else (part.float() * factor).to(part.dtype) for part in (layer.b, layer.bias))
    assert b is not None
    return Layer(layer.a, b, bias, layer.magnitude)


def _fits(held: Mapping[str, Tensor]) -> bool:
    a, b = held["A"], held["B"]
    return a.ndim == b.ndim == 2 and len(a) == b.shape[1] and a.numel() > 0 and b.numel() > 0
