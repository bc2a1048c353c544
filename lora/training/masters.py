"""The weights that the optimizer moves, in float32, with their gradients side by side and the step itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora.training.balance import Balance
from lora.training.graphs import Pass, Passes
from lora.training.ranks import World

BEHIND = 4
"""Numbers behind a row of gradients: the last is the row's loss, so that both go through one exchange; the others keep
the rows' beginnings at multiples of 16 bytes."""


class Mover(Protocol):
    """Moves what is trained by what the passes say."""

    @property
    def skipped(self) -> Tensor:
        """Steps so far without a finite gradient, a scalar."""

    @property
    def in_a_row(self) -> Tensor:
        """The last ones of them without a sound step between."""

    def move(
        self, pictures: Pass, preservation: Pass | None, rate: float, balance: Balance | None, last: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """A step by the gradient of the pictures and, where it is looked at, of the preservation; both losses, and the
        norm of the gradient. `last`: whether it is the training's last step."""

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as it is now; for `go_on`."""

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave, in place."""


class Masters:
    """Moves a LoRA. Its weights are kept in float32, for steps of 1e-4 would vanish in bf16's 8 bits; on a CPU these
    are the parameters.

    The gradients of the pictures (`gradients`) and of the preservation (`scratch`, where there are two rows) lie in one
    flat tensor, which ranks average in one exchange.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        passes: Passes,
        world: World,
        *,
        rows: int,
        learning_rate: float,
        weight_decay: float,
        epsilon: float,
        ema_decay: float,
    ) -> None:
        """`passes` are over the same parameters. `ema_decay`: share of itself that the running mean of the weights
        keeps at each step; 0: no mean."""
        self.passes, self._world = passes, world
        self._parameters: list[Tensor] = list(parameters)
        self._ema_decay = ema_decay
        self.weights = [parameter.detach().float() for parameter in parameters]
        device = parameters[0].device
        self._flat = torch.zeros(rows, sum(weight.numel() for weight in self.weights) + BEHIND, device=device)
        self.gradients, self.scratch = (_views(row, self.weights) for row in (self._flat[0], self._flat[-1]))
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        self._optimizer = torch.optim.AdamW(
            self.weights, lr=learning_rate, weight_decay=weight_decay, eps=epsilon, fused=True
        )
        self._means = [weight.clone() for weight in self.weights] if ema_decay else []
        self.skipped = self.in_a_row = torch.zeros((), device=device)
        """Steps so far without a finite gradient, and the last ones of them without a sound step between."""

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as it is now; for `go_on`."""
        return {
            "weights": self.weights,
            "optimizer": self._optimizer.state_dict()["state"],
            "means": self._means,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    @torch.no_grad()
    def go_on(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave, in place; the parameters too."""
        torch._foreach_copy_(self.weights, list(state["weights"]))
        torch._foreach_copy_(self._parameters, self.weights)
        if self._means:
            torch._foreach_copy_(self._means, list(state["means"]))
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.skipped, self.in_a_row = (state[name].to(self.skipped) for name in ("skipped", "in_a_row"))

    def move(
        self, pictures: Pass, preservation: Pass | None, rate: float, balance: Balance | None, last: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        passes = self.passes
        passes.zero()
        losses = [passes(*pictures)]
        torch._foreach_copy_(self.gradients, passes.gradients)
        if preservation is not None:
            passes.zero()
            losses.append(passes(*preservation))
            torch._foreach_copy_(self.scratch, passes.gradients)
        loss, *kept = self._averaged(*losses)
        if preservation is not None and balance is not None:
            balance.add(self.gradients, self.scratch)
        return loss, kept[0] if kept else None, self._step(rate, last)

    def _averaged(self, *losses: Tensor) -> tuple[Tensor, ...]:
        """Averages over the ranks the rows of gradients that these losses belong to, and the losses, all at once; the
        losses."""
        if self._world.size == 1:
            return losses
        flat = self._flat[: len(losses)]
        for row, loss in zip(flat, losses, strict=True):
            row[-1] = loss
        self._world.average(flat)
        return tuple(row[-1].clone() for row in flat)

    def _step(self, rate: float, last: bool) -> Tensor:
        """Moves the weights by `gradients`, cut to a norm of one, and the parameters with them; the norm before. After
        the last step the parameters are the running mean, where there is one.

        Where the norm is not finite nothing moves, and nothing waits for it: as torch.amp's GradScaler has fused
        optimizers skip a step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        broken = (~torch.isfinite(norm)).float()
        self._optimizer.found_inf = broken  # type: ignore[attr-defined]
        self.skipped, self.in_a_row = self.skipped + broken, (self.in_a_row + 1) * broken
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self.weights)
            if self._means:
                torch._foreach_lerp_(self._means, self.weights, 1 - self._ema_decay)
                if last:
                    torch._foreach_copy_(self._parameters, self._means)
        return norm


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a flat tensor, one after the other, in the shapes of these."""
    parts = torch.split(flat[: sum(one.numel() for one in like)], [one.numel() for one in like])
    return [part.view_as(one) for part, one in zip(parts, like, strict=True)]
