"""What a safetensors file is that is no LoRA for FLUX.1, by its keys: in one sentence, with what reads it."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from lora.file import keys


class Kind(NamedTuple):
    mark: str
    """A regular expression that is found in a key of such a file, and in none of a LoRA for FLUX.1."""
    name: str
    reader: str


_COMFY = "ComfyUI reads it, diffusers' FluxPipeline does not"
_ADAPTERS = (
    Kind(r"\.lokr_[wt]\d", "a LoKr of LyCORIS, whose factors are Kronecker's and no A and B", _COMFY),
    Kind(r"\.hada_[wt]\d", "a LoHa of LyCORIS, a product of two LoRAs", _COMFY),
    Kind(
        r"\.(oft_blocks|oft_diag|oft_R|boft_)", "an OFT or BOFT, which turns weights in place of adding to them", _COMFY
    ),
    Kind(r"\.[ab][12]\.weight$", "a GLoRA of LyCORIS", _COMFY),
    Kind(r"\.on_input$|\.ia3_l|\.vera_lambda", "an IA3 or VeRA", "the tool that trained it reads it"),
    Kind(r"ip_adapter|to_[kv]_ip\b|image_proj\.", "an IP-Adapter", "diffusers' load_ip_adapter and ComfyUI read it"),
    Kind(
        r"controlnet_|input_hint_block|lora_controlnet",
        "a ControlNet",
        "diffusers' FluxControlNetPipeline and ComfyUI read it",
    ),
)
_CONTROL = Kind(
    r"(query|key)_norm\.(scale|set_weight)$|\.norm_(added_)?[qk]\.weight$|\.reshape_weight$",
    "a control LoRA, which draws after a second picture (its edges or depth)",
    "diffusers' FluxControlPipeline and ComfyUI read it",
)
_MODELS = (
    Kind(
        r"lora_te2_text_model|lora_unet_(input|output|middle)_block|(^|\.)(input|output|middle)_blocks?\.\d"
        r"|add_embedding|(down|up|mid)_blocks?[._]\d[._]attentions[._]\d[._]transformer_blocks[._][1-9]",
        "a LoRA for Stable Diffusion XL",
        "diffusers' StableDiffusionXLPipeline and ComfyUI read it",
    ),
    Kind(
        r"lora_unet_(down|up|mid)_block|(^|\.)(down|up|mid)_blocks?\.",
        "a LoRA for Stable Diffusion 1, 2 or XL",
        "diffusers' StableDiffusionPipeline, or the XL one, and ComfyUI read it",
    ),
    Kind(
        r"joint_blocks|transformer_blocks[._]\d+[._]attn2[._](to|add)_.*(proj|to_q)",
        "a LoRA for Stable Diffusion 3",
        "diffusers' StableDiffusion3Pipeline and ComfyUI read it",
    ),
    Kind(
        r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)\b|transformer_blocks_\d+_(img|txt)_(mlp|mod)_",
        "a LoRA for Qwen-Image",
        "diffusers' QwenImagePipeline and ComfyUI read it",
    ),
    Kind(
        r"to_qkv_mlp_proj|(double|single)_stream_modulation|ff(_context)?[._]linear_(in|out)",
        "a LoRA for FLUX.2",
        "diffusers' Flux2Pipeline and ComfyUI read it",
    ),
    Kind(r"(double|single)_stream_blocks", "a LoRA for HiDream", "diffusers' HiDreamImagePipeline and ComfyUI read it"),
    Kind(
        r"\.(img|txt)_attn_qkv\.|individual_token_refiner",
        "a LoRA for HunyuanVideo",
        "diffusers' HunyuanVideoPipeline and ComfyUI read it",
    ),
    Kind(r"distilled_guidance_layer", "a LoRA for Chroma", "diffusers' ChromaPipeline and ComfyUI read it"),
    Kind(
        r"blocks[._]\d+[._](self|cross)_attn[._][qkvo](_img)?\b|lora_unet_blocks_\d+_(self|cross)_attn_[qkvo]\.|blocks\.\d+\.attn1\.to_",
        "a LoRA for Wan or another model of video",
        "diffusers' WanPipeline, or that model's own, and ComfyUI read it",
    ),
    Kind(
        r"(^|[._])(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward|adaLN_modulation)",
        "a LoRA for Z-Image or Lumina",
        "diffusers' ZImagePipeline or Lumina2Pipeline and ComfyUI read it",
    ),
    Kind(
        r"layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        "a LoRA for a language model",
        "peft and vLLM read it",
    ),
)
_WHOLE = (
    Kind(
        r"(^|\.)(double|single)_blocks\.\d+\..*\.(weight|bias|scale)$|(^|\.)(single_)?transformer_blocks\.\d+\..*\.(weight|bias)$",
        "a whole checkpoint of a transformer such as FLUX's, no LoRA",
        "diffusers' FluxTransformer2DModel.from_single_file and ComfyUI's Load Diffusion Model read it",
    ),
    Kind(
        r"model\.diffusion_model\.",
        "a whole checkpoint of Stable Diffusion, no LoRA",
        "diffusers' from_single_file and ComfyUI's Load Checkpoint read it",
    ),
    Kind(
        r"(^|\.)decoder\.(up|mid)|(^|\.)encoder\.(down|conv_in)",
        "a whole VAE, no LoRA",
        "diffusers' AutoencoderKL and ComfyUI's Load VAE read it",
    ),
    Kind(
        r"encoder\.(layers|block)\.\d+\.|token_embedding|shared\.weight",
        "a whole text encoder, no LoRA",
        "transformers and ComfyUI's Load CLIP read it",
    ),
    Kind(
        r"^(emb_params|string_to_param|clip_[lg]|t5(xxl)?|bundle_emb.*)$",
        "a textual inversion (learned words), no LoRA",
        "diffusers' load_textual_inversion and ComfyUI read it",
    ),
)
PICTURE_CHANNELS = 64
"""Inputs of FLUX.1's first layer: 16 channels of 2 x 2 latents."""
FLUX2_RATIO = 6
"""Rows of FLUX.2's first MLP layer, which is gated, for each input: FLUX.1 has 4 in `img_mlp.0`."""


def of(tensors: Mapping[str, Sequence[int]]) -> Kind | None:
    """The kind of a file of these shapes that is no LoRA for FLUX.1; None where it may be one."""
    if adapter := _found(_ADAPTERS, tensors):
        return adapter
    places = {key: found for key in tensors if (found := keys.read(key))}
    halves = {key: found for key, found in places.items() if found.part in ("A", "B")}
    if not halves and not any("lora" in key for key in tensors):
        return _found((*_WHOLE, *_MODELS), tensors) if tensors else None
    if model := _found(_MODELS, [key for key in tensors if key not in places]):
        return model
    if _found((_CONTROL,), tensors):
        return _CONTROL
    for key, found in halves.items():
        shape = tensors[key]
        if (
            found.layer in ("x_embedder", "img_in")
            and found.part == "A"
            and len(shape) == 2
            and shape[1] > PICTURE_CHANNELS
        ):
            return _CONTROL._replace(name="a LoRA for FLUX.1 Control or Fill, which draws after a second picture")
        if found.layer.endswith((".img_mlp.0", ".txt_mlp.0")) and found.part == "B":
            a = tensors.get(key.replace("lora_B", "lora_A").replace("lora_up", "lora_down"))
            if a is not None and len(a) == len(shape) == 2 and shape[0] == FLUX2_RATIO * a[1]:
                return next(kind for kind in _MODELS if "FLUX.2" in kind.name)
    return None


def _found(kinds: tuple[Kind, ...], names: Collection[str]) -> Kind | None:
    return next((kind for kind in kinds if any(re.search(kind.mark, key) for key in names)), None)
