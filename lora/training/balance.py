"""How much prior preservation weighs beside the pictures: by the ratio of the two gradients' norms.

A fixed weight does not carry over from one base to another: published ones go from 1 (ostris' ai-toolkit) to 1000
(kohya-ss/sd-scripts#1710). What does carry over is how long the one gradient is beside the other, since Adam measures
its steps by their sum. So the weight is steered until that ratio is the recipe's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PACE = 0.1
"""The weight moves by a tenth of its distance to the ratio (in logarithms) at a look, and by a tenth of itself at most,
so that it follows the median of noisy norms."""
BOUNDS = (1e-3, 1e4)
"""Of the weight."""


class Balance:
    """Adds the preservation's gradient to the pictures' with a weight that keeps their norms at a ratio.

    Everything stays on the gradients' device: nothing waits for it.
    """

    def __init__(self, ratio: float, start: float, device: torch.device) -> None:
        """`ratio`: the norm of the weighted preservation gradient over that of the pictures'; `start`: the weight of
        the first look, both above 0."""
        self.ratio = ratio
        self.weight = torch.tensor(start, device=device)
        self.pictures = torch.zeros((), device=device)
        """Norm of the pictures' gradient at the last look."""
        self.preservation = torch.zeros((), device=device)
        """Norm of the preservation's gradient at the last look, weighted."""

    @torch.no_grad()
    def add(self, pictures: Sequence[Tensor], preservation: Sequence[Tensor]) -> None:
        """Adds `preservation`, weighted, to `pictures` in place (gradients of the same parameters in the same order),
        and moves the weight for the next look. `preservation` is left weighted."""
        norms = torch.nn.utils.get_total_norm(pictures), torch.nn.utils.get_total_norm(preservation) * self.weight
        torch._foreach_mul_(list(preservation), self.weight)
        torch._foreach_add_(list(pictures), list(preservation))
        self.steer(*norms)

    @torch.no_grad()
    def steer(self, pictures: Tensor, preservation: Tensor) -> None:
        """Moves the weight for the next look by the two gradients' norms, the preservation's as weighted."""
        self.pictures, self.preservation = pictures, preservation
        away = torch.log(self.ratio * self.pictures / self.preservation)
        # A norm of 0, or one that is not finite, says nothing.
        move = torch.nan_to_num(away, 0.0, 0.0, 0.0).clamp(-1, 1)
        self.weight = (self.weight * torch.exp(PACE * move)).clamp(*BOUNDS)
