"""What is trained on: FLUX.1-dev's shape, and pictures of so many sides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FLUX_DEV: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""transformer/config.json of black-forest-labs/FLUX.1-dev."""
T5_TOKENS = 512
RANK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on: pictures of these sides, in pixels, by turns. A *lap* is one step of each side."""

    sides: tuple[int, ...]
    batch_size: int

    @property
    def name(self) -> str:
        return ",".join(map(str, self.sides)) + (f" batch {self.batch_size}" if self.batch_size > 1 else "")


CASES = (
    # the mixed one first, because it is what a training does
    Case(sides=(512, 768, 1024), batch_size=1),
    Case(sides=(1024,), batch_size=1),
    Case(sides=(768,), batch_size=1),
    Case(sides=(512,), batch_size=1),
    Case(sides=(512,), batch_size=4),
)
