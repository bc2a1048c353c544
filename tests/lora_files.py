"""LoRA files as each tool writes them, with random weights, for any base: what tools train joined is made joined.

`LAYOUTS` are functions of a `Maker`; each gives the file's tensors and its header. While it makes them the maker notes
what every layer's weight gains, from the joined matrices and by hand, so that a reader can be held against it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.file.names import DOUBLE, DOUBLE_JOINED, OUTSIDE, SINGLE

Tensors = dict[str, Tensor]
CLIP_LAYERS = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
TEXT_SIZES = {f"encoder.layers.0.{layer}": (16, 16) for layer in CLIP_LAYERS}
SIZES = {
    **{f"transformer_blocks.0.{layer}": (48, 48) for joined in DOUBLE_JOINED.values() for layer in joined},
    **{f"transformer_blocks.0.attn.{layer}": (48, 48) for layer in ("to_out.0", "to_add_out")},
    **{f"transformer_blocks.0.{mlp}.net.0.proj": (192, 48) for mlp in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{mlp}.net.2": (48, 192) for mlp in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{norm}.linear": (288, 48) for norm in ("norm1", "norm1_context")},
    **{f"single_transformer_blocks.0.attn.to_{x}": (48, 48) for x in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (192, 48),
    "single_transformer_blocks.0.proj_out": (48, 240),
    "single_transformer_blocks.0.norm.linear": (144, 48),
    "x_embedder": (48, 64),
    "context_embedder": (48, 24),
    **{f"time_text_embed.{x}_embedder.linear_1": (48, 256) for x in ("timestep", "guidance")},
    "time_text_embed.text_embedder.linear_1": (48, 12),
    **{f"time_text_embed.{x}_embedder.linear_2": (48, 48) for x in ("timestep", "guidance", "text")},
    "norm_out.linear": (96, 48),
    "proj_out": (64, 48),
}
"""(outputs, inputs) of a FLUX of one double and one single block, 48 wide, and of a CLIP text encoder of one layer."""
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


class Maker:
    """Makes layers for a base whose linear layers have these (outputs, inputs), the CLIP text encoder's too."""

    def __init__(
        self, sizes: Mapping[str, tuple[int, int]], text: Mapping[str, tuple[int, int]], rank: int = 4
    ) -> None:
        self.sizes, self.text, self.rank = sizes, text, rank
        self.generator = torch.Generator().manual_seed(7)
        self.gains: Tensors = {}
        """By diffusers' name: what its weight gains, (outputs, inputs)."""
        self.text_gains: Tensors = {}
        self.blocks = sorted({tuple(name.split(".")[:2]) for name in sizes if "transformer_blocks." in name})

    def pair(self, outputs: int, inputs: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """In bf16, so that every tool's 16 bits hold it."""
        rank = rank or self.rank
        a = torch.randn(rank, inputs, generator=self.generator) / inputs**0.5
        return a.bfloat16(), (torch.randn(outputs, rank, generator=self.generator) * 0.3).bfloat16()

    def one(self, layer: str, scale: float = 1.0, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A and B of a layer of diffusers'."""
        a, b = self.pair(*self.sizes[layer], rank)
        self.gains[layer] = scale * b.float() @ a.float()
        return a, b

    def joined(self, layers: tuple[str, ...], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """A and B of several layers that are one to the tool, B's rows in this order."""
        heights = [self.sizes[layer][0] for layer in layers]
        a, b = self.pair(sum(heights), self.sizes[layers[0]][1])
        for layer, rows in zip(layers, (scale * b.float() @ a.float()).split(heights), strict=True):
            self.gains[layer] = rows
        return a, b

    def usual(self, norms: bool = False) -> list[str]:
        """Attention and MLP of every block, the modulation's layers too where asked."""
        return [layer for layer in self.sizes if "transformer_blocks." in layer and (norms or ".norm" not in layer)]

    def bfl(self, norms: bool = False, outside: bool = False, scale: float = 1.0) -> Tensors:
        """Every layer as Black Forest Labs' code has it, joined: `double_blocks.0.img_attn.qkv.A`, and `.B`."""
        made: Tensors = {}

        def add(name: str, pair: tuple[Tensor, Tensor]) -> None:
            made[f"{name}.A"], made[f"{name}.B"] = pair

        for kind, number in self.blocks:
            block = f"{kind}.{number}"
            if kind == "transformer_blocks":
                for whole, parts in DOUBLE_JOINED.items():
                    layers = tuple(f"{block}.{part}" for part in parts)
                    add(f"double_blocks.{number}.{whole}", self.joined(layers, scale))
                plain, bfl = DOUBLE, "double_blocks"
            else:
                layers = tuple(f"{block}.{part}" for part in (*QKV, "proj_mlp"))
                add(f"single_blocks.{number}.linear1", self.joined(layers, scale))
                plain, bfl = SINGLE, "single_blocks"
            for own, theirs in plain.items():
                if norms or "norm" not in own:
                    add(f"{bfl}.{number}.{theirs}", self.one(f"{block}.{own}", scale))
        for own, theirs in OUTSIDE.items() if outside else ():
            a, b = self.pair(*self.sizes[own])
            gain = scale * b.float() @ a.float()
            self.gains[own] = torch.cat(gain.chunk(2)[::-1]) if own == "norm_out.linear" else gain
            add(theirs, (a, b))
        return made

    def clip(self, scale: float = 1.0) -> Tensors:
        """`0.self_attn.q_proj` -> A, B by `.A`, `.B`."""
        made: Tensors = {}
        for number in range(1 + max(int(name.split(".")[2]) for name in self.text if ".layers." in name)):
            for layer in CLIP_LAYERS:
                name = f"encoder.layers.{number}.{layer}"
                a, b = self.pair(*self.text[name])
                self.text_gains[name] = scale * b.float() @ a.float()
                made |= {f"{number}.{layer}.A": a, f"{number}.{layer}.B": b}
        return made


def _named(made: Mapping[str, Tensor], stem: Callable[[str], str], a: str, b: str) -> Tensors:
    halves = {"A": a, "B": b}
    return {f"{stem(key[:-2])}{halves[key[-1]]}": tensor for key, tensor in made.items()}


def _flat(made: Mapping[str, Tensor], prefix: str, alpha: float | None) -> Tensors:
    """As kohya's scripts write: dots become underscores, an alpha for each layer."""
    tensors = _named(made, lambda name: prefix + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight")
    if alpha is not None:
        tensors |= {f"{prefix}{key[:-2].replace('.', '_')}.alpha": torch.tensor(alpha) for key in made}
    return {key: tensor.half() for key, tensor in tensors.items()}


def _plain(maker: Maker, layers: list[str], scale: float = 1.0) -> Tensors:
    made: Tensors = {}
    for layer in layers:
        made[f"{layer}.A"], made[f"{layer}.B"] = maker.one(layer, scale)
    return made


def _peft(made: Mapping[str, Tensor], prefix: str) -> Tensors:
    return _named(made, lambda name: prefix + name, ".lora_A.weight", ".lora_B.weight")


def _header(**config: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}


def _prefixed(prefix: str) -> Callable[[Maker], tuple[Tensors, dict[str, str]]]:
    return lambda maker: (_peft(_plain(maker, maker.usual()), prefix), {})


def _ai_toolkit(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    made = _peft(_plain(maker, maker.usual(norms=True)), "transformer.")
    return {key: tensor.half() for key, tensor in made.items()}, {"ss_base_model_version": "flux1"}


def _old_halves(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    made = _plain(maker, maker.usual())
    return _named(made, lambda name: f"transformer.{name}", ".lora.down.weight", ".lora.up.weight"), {}


def _with_alphas(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    layers = maker.usual()
    made = _peft(_plain(maker, layers, 2 / maker.rank), "transformer.")
    return made | {f"transformer.{layer}.alpha": torch.tensor(2.0) for layer in layers}, {}


def _kohya(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    return _flat(maker.bfl(norms=True, scale=1 / maker.rank), "lora_unet_", 1.0), {"ss_network_module": "lora_flux"}


def _kohya_with_text(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    text = {f"text_model.encoder.layers.{key}": t for key, t in maker.clip(1 / maker.rank).items()}
    return _flat(maker.bfl(scale=1 / maker.rank), "lora_unet_", 1.0) | _flat(text, "lora_te1_", 1.0), {}


def _kohya_of_q_alone(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    """Joined layers of which one part alone is trained (sd-scripts' train_blocks and the like): zeros elsewhere."""
    made = {key: t for key, t in maker.bfl(scale=1 / maker.rank).items() if "img_attn.qkv" in key}
    layers = [name for name in maker.gains if name.startswith("transformer_blocks") and name.endswith(QKV)]
    maker.gains = {name: maker.gains[name] for name in layers}
    return _flat(made, "lora_unet_", 1.0), {}


def _comfy(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    return _peft(maker.bfl(outside=True), "diffusion_model."), {}


def _fal(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    return _peft(maker.bfl(norms=True), "base_model.model."), {}


def _onetrainer(attention_alone: bool) -> Callable[[Maker], tuple[Tensors, dict[str, str]]]:
    def make(maker: Maker) -> tuple[Tensors, dict[str, str]]:
        layers = [layer for layer in maker.usual() if ".attn." in layer or not attention_alone]
        return _flat(_plain(maker, layers, 1 / maker.rank), "lora_transformer_", 1.0), {"ot_branch": "master"}

    return make


def _lycoris(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    return _flat(_plain(maker, maker.usual(), 1 / maker.rank), "lycoris_", 1.0), {}


def _xlabs(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    for kind, number in maker.blocks:
        block = f"{kind}.{number}"
        if kind == "transformer_blocks":
            stem = f"double_blocks.{number}.processor"
            parts = {
                "qkv_lora1": maker.joined(tuple(f"{block}.{part}" for part in DOUBLE_JOINED["img_attn.qkv"])),
                "qkv_lora2": maker.joined(tuple(f"{block}.{part}" for part in DOUBLE_JOINED["txt_attn.qkv"])),
                "proj_lora1": maker.one(f"{block}.attn.to_out.0"),
                "proj_lora2": maker.one(f"{block}.attn.to_add_out"),
            }
        else:
            stem = f"single_blocks.{number}.processor"
            parts = {
                "qkv_lora": maker.joined(tuple(f"{block}.{part}" for part in QKV)),
                "proj_lora": maker.one(f"{block}.proj_out"),
            }
        for part, (a, b) in parts.items():
            tensors |= {f"{stem}.{part}.down.weight": a, f"{stem}.{part}.up.weight": b}
    return tensors, {}


def _float8(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    made = {key: t.to(torch.float8_e4m3fn) for key, t in _plain(maker, maker.usual()).items()}
    maker.gains = {key[:-2]: made[f"{key[:-2]}.B"].float() @ made[key].float() for key in made if key.endswith(".A")}
    return _peft(made, "transformer."), {}


def _bias(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    made = _plain(maker, maker.usual())
    biases = {
        f"transformer.{key[:-2]}.lora_B.bias": torch.randn(len(t), generator=maker.generator).bfloat16() * 0.1
        for key, t in made.items()
        if key.endswith(".B")
    }
    return _peft(made, "transformer.") | biases, {}


def _bias_changes(zero: bool) -> Callable[[Maker], tuple[Tensors, dict[str, str]]]:
    def make(maker: Maker) -> tuple[Tensors, dict[str, str]]:
        made = maker.bfl(scale=1 / maker.rank)
        tensors = _flat(made, "lora_unet_", 1.0)
        for key, t in made.items():
            if key.endswith(".B"):
                bias = torch.randn(len(t), generator=maker.generator) * (0.0 if zero else 0.1)
                tensors[f"lora_unet_{key[:-2].replace('.', '_')}.diff_b"] = bias.half()
        return tensors, {}

    return make


def _dora(part: str) -> Callable[[Maker], tuple[Tensors, dict[str, str]]]:
    """As peft saves it; of the layers whose name holds `part`. The magnitudes are as large as the toy base's."""

    def make(maker: Maker) -> tuple[Tensors, dict[str, str]]:
        made = _plain(maker, maker.usual())
        magnitudes = {
            f"transformer.{key[:-2]}.lora_magnitude_vector": 1 + torch.rand(len(t), generator=maker.generator)
            for key, t in made.items()
            if key.endswith(".B") and part in key
        }
        return _peft(made, "transformer.") | magnitudes, {}

    return make


def _dora_scales(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    """As LyCORIS names a DoRA's magnitudes, a column each."""
    tensors, _ = _onetrainer(attention_alone=True)(maker)
    scales = {
        key.replace("lora_up.weight", "dora_scale"): 1 + torch.rand(len(t), 1, generator=maker.generator).half()
        for key, t in tensors.items()
        if key.endswith("lora_up.weight")
    }
    return tensors | scales, {}


def _alpha_pattern(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    for layer in maker.usual():
        scale = 4.0 if layer.endswith(("proj_out", "ff.net.2")) else 0.5
        tensors |= _peft(_plain(maker, [layer], scale), "transformer.")
    rank = maker.rank
    patterns = {"proj_out": 4 * rank, "ff.net.2": 4 * rank}
    header = _header(r=rank, lora_alpha=rank / 2, target_modules=["to_q"], rank_pattern={}, alpha_pattern=patterns)
    return tensors, header


def _rank_pattern(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    """peft's header for two ranks: one alpha for all, so that the layers of the higher rank are scaled down."""
    tensors: Tensors = {}
    for layer in maker.usual():
        rank = 2 * maker.rank if layer.endswith("to_q") else maker.rank
        a, b = maker.one(layer, maker.rank / rank, rank)
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
    patterns = {r"^transformer_blocks\.\d+\.attn\.to_q": 2 * maker.rank, "to_q": 2 * maker.rank}
    return tensors, _header(
        r=maker.rank, lora_alpha=maker.rank, target_modules=["to_q"], rank_pattern=patterns, alpha_pattern={}
    )


def _rank_stabilised(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    scale = maker.rank / maker.rank**0.5
    tensors = _peft(_plain(maker, maker.usual(), scale), "transformer.")
    header = _header(
        r=maker.rank, lora_alpha=maker.rank, use_rslora=True, target_modules=["to_q"], rank_pattern={}, alpha_pattern={}
    )
    return tensors, header


def _mixed_ranks(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    for number, layer in enumerate(maker.usual()):
        a, b = maker.one(layer, rank=2 + number % 3)
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
    return tensors, {}


def _two_namings(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    """The same LoRA under kohya's names and, once more, under diffusers'."""
    again = Maker(maker.sizes, maker.text, maker.rank)
    return _flat(again.bfl(), "lora_unet_", None) | _peft(_plain(maker, maker.usual()), "transformer."), {}


def _zero_b(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    made = _plain(maker, maker.usual())
    maker.gains = {name: torch.zeros_like(gain) for name, gain in maker.gains.items()}
    zeroed = {key: torch.zeros_like(t) if key.endswith(".B") else t for key, t in made.items()}
    return _peft(zeroed, "transformer."), {}


def _diffusers_with_text(maker: Maker) -> tuple[Tensors, dict[str, str]]:
    text = {f"text_encoder.text_model.encoder.layers.{key}": t for key, t in maker.clip().items()}
    return _peft(_plain(maker, maker.usual()), "transformer.") | _peft(text, ""), {}


LAYOUTS: dict[str, Callable[[Maker], tuple[Tensors, dict[str, str]]]] = {
    "diffusers": _prefixed("transformer."),
    "ai-toolkit": _ai_toolkit,
    "old halves": _old_halves,
    "alphas": _with_alphas,
    "no prefix": _prefixed(""),
    "base_model.model.": _prefixed("base_model.model."),
    "transformer.base_model.model.": _prefixed("transformer.base_model.model."),
    "diffusion_model.": _prefixed("diffusion_model."),
    "kohya": _kohya,
    "kohya with text": _kohya_with_text,
    "kohya of attention": _kohya_of_q_alone,
    "comfy": _comfy,
    "fal": _fal,
    "onetrainer attention": _onetrainer(attention_alone=True),
    "onetrainer": _onetrainer(attention_alone=False),
    "lycoris": _lycoris,
    "xlabs": _xlabs,
    "float8": _float8,
    "bias": _bias,
    "zero bias changes": _bias_changes(zero=True),
    "bias changes": _bias_changes(zero=False),
    "dora": _dora(""),
    "dora in part": _dora(".attn."),
    "dora scales": _dora_scales,
    "alpha pattern": _alpha_pattern,
    "rank pattern": _rank_pattern,
    "rank stabilised": _rank_stabilised,
    "mixed ranks": _mixed_ranks,
    "two namings": _two_namings,
    "zero b": _zero_b,
    "diffusers with text": _diffusers_with_text,
}


def write(layout: str, maker: Maker, path: Path) -> Path:
    """A file of this layout at `path`; the maker has what it does."""
    tensors, header = LAYOUTS[layout](maker)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt", **header})
    return path
