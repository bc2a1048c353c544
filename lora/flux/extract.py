"""A LoRA out of the change of a layer's weights: the best of its rank, and how much of the change it holds."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora.file.names import Pair

EXACT_UP_TO = 1024
"""Smaller side of a layer up to which all singular vectors are computed; above it only the first ones are, which takes
milliseconds in place of a second."""
OVERSAMPLING = 16
"""Singular vectors more than are wanted that are looked for, and…"""
ITERATIONS = 4
"""…how often: Halko et al. 2009, arXiv:0909.4061, algorithm 4.4. A change by small steps has singular values that fall
slowly, for which torch's own default of 2 is too few: tests/flux/test_extract.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """How large a change is, and how much of it a LoRA holds, as norms (Frobenius)."""

    whole: float
    held: float

    @property
    def share(self) -> float:
        """0 to 1; 1 where there is no change."""
        return self.held / self.whole if self.whole else 1.0


@torch.no_grad()
def extract(change: Tensor, rank: int) -> tuple[Pair, Tensor, Tensor]:
    """(outputs, inputs) -> A (rank, inputs) and B (outputs, rank) in float32, whose product B A is nearest to the
    change of all of this rank (Eckart and Young 1936); and the norms of the change and of that product.

    Each singular value is shared out evenly between A and B. The same change gives the same LoRA on the same machine.
    """
    change = change.float()
    smaller = min(change.shape)
    if smaller <= max(EXACT_UP_TO, 2 * rank):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=rank + OVERSAMPLING, niter=ITERATIONS)
            vh = v.T
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    root = s.sqrt()
    a, b = root[:, None] * vh, u * root
    if missing := rank - len(s):
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(len(b), missing)], dim=1)
    return (a, b), torch.linalg.vector_norm(change), torch.linalg.vector_norm(s)


def record(held: Mapping[str, Held]) -> dict[str, object]:
    """As plain values: the share of the whole change that a LoRA holds, and that of each layer's."""
    shares = {name: round(one.share, 4) for name, one in held.items()}
    return {"share": round(together(held.values()).share, 4), "layers": shares}


def together(parts: Iterable[Held]) -> Held:
    """Of all layers."""
    every = list(parts)
    return Held(whole=math.hypot(*(one.whole for one in every)), held=math.hypot(*(one.held for one in every)))
