"""The attention of the transformer in a training: fewer kernels, and gradients in one layout.

diffusers has the model; its attention is handed what comes before and after the product here, by `set_attn_processor`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (tokens, width of a head) in float32; every number twice, for the two of a pair."""


@contextlib.contextmanager
def for_training(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Within it the transformer attends by `Processor`, and `in_one_layout`."""
    before = dict(transformer.attn_processors)
    transformer.set_attn_processor(Processor())
    try:
        with in_one_layout(transformer):
            yield
    finally:
        transformer.set_attn_processor(before)


class Processor(FluxAttnProcessor):
    """diffusers' FluxAttnProcessor, number for number, but for the rotation: `rotate`."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Any:
        """(batch, tokens, width) -> the same; of a double block (image, text), of a single one both in one."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))  # (batch, tokens, heads, width of a head)

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            of_text = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
            query = torch.cat([of_text, query], dim=1)
            of_text = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
            key = torch.cat([of_text, key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=1)
        if image_rotary_emb is not None:
            query, key = rotate(query, key, image_rotary_emb)
        attended = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend
        ).flatten(2, 3)
        if encoder_hidden_states is None:
            return attended
        tokens = encoder_hidden_states.shape[1]
        text, image = attended[:, :tokens].contiguous(), attended[:, tokens:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def rotate(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) of queries and keys (batch, tokens, heads, width).

    The numbers of diffusers' apply_rotary_emb: a pair is a complex number, turned by one product, in three kernels
    where that takes seven, and in bf16 the gradient is rounded once instead of twice. A compiler makes one kernel of
    the seven, and none of complex numbers.
    """
    if torch.compiler.is_compiling():
        return apply_rotary_emb(query, rotation, sequence_dim=1), apply_rotary_emb(key, rotation, sequence_dim=1)
    cosines, sines = rotation
    turn = torch.complex(cosines[:, ::2], sines[:, ::2])[None, :, None]  # (1, tokens, 1, width / 2)
    return _turned(query, turn), _turned(key, turn)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


@contextlib.contextmanager
def in_one_layout(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Within it the gradient of every attention's output is contiguous, as torch's cuDNN attention needs it.

    On Hopper that is torch's own choice. Its backward pass keeps a plan for each layout of queries, keys and values,
    and takes the first gradient's layout for all that follow (pytorch/pytorch#191576). A single block joins the
    attention's output with the MLP's, so its gradient lies in rows of both; a double block's, which comes later in the
    same pass, is then read beyond its end: seen on an H200 with torch 2.11.0, in the first steps of every training.
    """
    attentions = [block.attn for block in transformer.single_transformer_blocks]
    hooks = [attention.register_forward_hook(_contiguous_gradient) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _contiguous_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return _ContiguousGradient.apply(output)


class _ContiguousGradient(torch.autograd.Function):
    """The tensor itself; its gradient in memory row after row, copied where it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
