"""FLUX's forward pass in a training: diffusers' modules and its arithmetic, in fewer and larger steps.

What diffusers joins and takes apart in every block (text and picture, attention and MLP) stays as it is needed; layers
that read the same tensor are one function (`lora.flux.layer`); scale and shift are part of the norm before them, the
gate of the sum behind it. Every attention's gradient lies in memory token after token, without which torch's attention
by cuDNN fails on Hopper (pytorch/pytorch#191576 tells it of a sister function: a plan is kept for each layout of
queries, keys and values, and with it the first gradient's layout).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora.flux import layer, rotary
from lora.flux.attention import attention


@contextlib.contextmanager
def for_training(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Within it, calling the transformer runs `forward`, whoever calls."""
    transformer.forward = functools.partial(forward, transformer)
    try:
        yield
    finally:
        del transformer.forward


@contextlib.contextmanager
def of_diffusers(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Within it, calling the transformer runs diffusers' own forward pass: that is what others will see of a LoRA."""
    ours = vars(transformer).pop("forward", None)
    try:
        yield
    finally:
        if ours is not None:
            transformer.forward = ours


def forward(
    transformer: FluxTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """What FluxTransformer2DModel.forward returns for these arguments as a tuple; the shapes are its own.

    `joint_attention_kwargs` must be empty or None: there is one LoRA, and its scale is 1.
    """
    assert not joint_attention_kwargs
    assert not return_dict
    image = transformer.x_embedder(hidden_states)
    times = [timestep.to(image.dtype) * 1000]
    if guidance is not None:
        times.append(guidance.to(image.dtype) * 1000)
    # Modulation sees one vector a picture; its first operation is the same in every block.
    vector = F.silu(transformer.time_text_embed(*times, pooled_projections))
    text = transformer.context_embedder(encoder_hidden_states)
    cosines, sines = transformer.pos_embed(torch.cat([txt_ids, img_ids]))
    turn = torch.complex(cosines[:, ::2], sines[:, ::2])[None, :, None]  # (1, tokens, 1, width of a head / 2)

    def run(block: Any, *states: Tensor) -> Any:
        if transformer.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *states, vector, turn, use_reentrant=False, preserve_rng_state=False)
        return block(*states, vector, turn)

    for double in transformer.transformer_blocks:
        text, image = run(functools.partial(_double, double), text, image)
    tokens = text.shape[1], image.shape[1]
    both = torch.cat([text, image], dim=1)
    for single in transformer.single_transformer_blocks:
        both = run(functools.partial(_single, single), both)
    scale, shift = _modulation(transformer.norm_out.linear, vector, 2)
    return (transformer.proj_out(_norm(both.split(tokens, dim=1)[1], scale, shift)),)


def _double(block: FluxTransformerBlock, text: Tensor, image: Tensor, vector: Tensor, turn: Tensor) -> list[Tensor]:
    """(batch, tokens, width) of both -> the same."""
    attn = block.attn
    heads = functools.partial(_heads, attn)
    of_text, of_image = (_modulation(norm.linear, vector, 6) for norm in (block.norm1_context, block.norm1))
    layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
    text_q, text_k, text_v = map(heads, layer.outputs(_norm(text, of_text[1], of_text[0]), layers))
    layers = [attn.to_q, attn.to_k, attn.to_v]
    image_q, image_k, image_v = map(heads, layer.outputs(_norm(image, of_image[1], of_image[0]), layers))
    q = rotary.turned([(text_q, attn.norm_added_q), (image_q, attn.norm_q)], turn)
    k = rotary.turned([(text_k, attn.norm_added_k), (image_k, attn.norm_k)], turn)
    attended = attention(q, k, torch.cat([text_v, image_v], dim=1))
    text_attended, image_attended = attended.split((text.shape[1], image.shape[1]), dim=1)
    results = []
    for state, (_, _, gate, shift, scale, last_gate), projected, mlp in (
        (text, of_text, attn.to_add_out(text_attended), block.ff_context.net),
        (image, of_image, attn.to_out[0](image_attended), block.ff.net),
    ):
        state = torch.addcmul(state, gate, projected)
        inner = F.gelu(mlp[0].proj(_norm(state, scale, shift)), approximate="tanh")
        results.append(torch.addcmul(state, last_gate, mlp[2](inner)))
    return results


def _single(block: FluxSingleTransformerBlock, state: Tensor, vector: Tensor, turn: Tensor) -> Tensor:
    """(batch, text and image tokens, width) -> the same."""
    attn = block.attn
    shift, scale, gate = _modulation(block.norm.linear, vector, 3)
    layers = [attn.to_q, attn.to_k, attn.to_v, block.proj_mlp]
    q, k, v, inner = layer.outputs(_norm(state, scale, shift), layers)
    q, k, v = (_heads(attn, x) for x in (q, k, v))
    attended = attention(rotary.turned([(q, attn.norm_q)], turn), rotary.turned([(k, attn.norm_k)], turn), v)
    projected = layer.output_of_two(attended, F.gelu(inner, approximate="tanh"), block.proj_out)
    return torch.addcmul(state, gate, projected)


def _modulation(linear: torch.nn.Module, vector: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(batch, width) -> `parts` of (batch, 1, width): shift, scale, gate, once or twice; `norm_out`'s scale first."""
    return linear(vector)[:, None].chunk(parts, dim=-1)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm of x (batch, tokens, width), times 1 + scale, plus shift: of one picture they are a norm's own."""
    if len(x) == 1:
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _heads(attn: FluxAttention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, attn.head_dim))  # (batch, tokens, heads, width of a head)
