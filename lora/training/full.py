"""A full fine-tuning (`finetune_type` full): the weights of a LoRA's layers themselves are trained.

What is trained of each layer is the change of its weights, a matrix of the same size that begins at zero; the base's
own weights stay as they are. So the change is there to make a LoRA of (`lora.flux.extract`), and to be taken away
again. And bf16 holds it: a step of 1e-5 on a weight of .02 is a twelfth of the smallest one that bf16 can tell, so the
weights themselves would be moved by rounding, evenly in all directions, where a LoRA holds few.

A step is made inside the backward pass, as soon as a layer's gradient is there, which is then let go
(https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html). No two layers' gradients
are there at a time; on FLUX.1-dev all of them would take 16 GiB.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import extract
from lora.flux.encode import batched
from lora.flux.extract import Held
from lora.flux.layer import AdaptedLinear
from lora.training.balance import Balance
from lora.training.examine import Examination
from lora.training.graphs import Pass
from lora.training.watch import Log, Watch

DECAY, SMALLEST = 0.8, 1e-30
"""Of the second moments: 1 - step^-0.8 is kept of them at each step; and what is added to a square (Adafactor, section
8 of arXiv:1804.04235)."""
CLIP = 1.0
"""Root mean square that an update may have, over the learning rate (the same)."""


class Adafactor:
    """The step of one matrix: Adafactor without momentum and with a learning rate of its own, as Adam's is, instead of
    one relative to the weights: those begin at zero here. What it remembers is a number for each row and each column.

    Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4; what `transformers.Adafactor` does with `relative_step` and
    `scale_parameter` off.
    """

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        """`generator`: for the rounding of weights that are not in float32."""
        self._weight, self._generator, self._steps = weight.detach(), generator, 0
        self._rows, self._columns = (torch.zeros(count, device=weight.device) for count in weight.shape)

    def state(self) -> dict[str, Any]:
        return {"weight": self._weight, "rows": self._rows, "columns": self._columns, "steps": self._steps}

    @torch.no_grad()
    def go_on(self, state: Mapping[str, Any]) -> None:
        for mine, kept in ((self._weight, "weight"), (self._rows, "rows"), (self._columns, "columns")):
            mine.copy_(state[kept])
        self._steps = state["steps"]

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> Tensor:
        """Moves the weights; the squared norm of the gradient. One that is not finite moves nothing, and nothing waits
        for it."""
        gradient = gradient.float()
        norm = gradient.square().sum()
        gradient = torch.where(torch.isfinite(norm), gradient, 0)
        self._steps += 1
        share = self._steps**-DECAY
        squares = gradient.square().add_(SMALLEST)
        self._rows.lerp_(squares.mean(dim=1), share)
        self._columns.lerp_(squares.mean(dim=0), share)
        by_row = (self._rows / self._rows.mean()).rsqrt_()[:, None]
        update = gradient * by_row * self._columns.rsqrt()
        root_mean_square = torch.linalg.vector_norm(update) / update.numel() ** 0.5
        update *= rate / (root_mean_square / CLIP).clamp(min=1)
        moved = self._weight.float() - update
        self._weight.copy_(moved if self._weight.dtype == torch.float32 else rounded(moved, self._generator))
        return norm


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bf16, up or down by chance, so that it is x on average: small steps add up (stochastic rounding).

    bf16 is the first half of a float32: a random number below its last digit is added, and the second half cut off.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Change:
    """The change of every layer that has a LoRA, which moves in the LoRA's place.

    While it is trained the LoRA is disabled. `as_lora` makes a LoRA of it, and shows that alone.
    """

    def __init__(self, transformer: FluxTransformer2DModel, seed: int) -> None:
        """The LoRA must be attached (`lora.flux.adapter`); until `remove`, this is in its place."""
        self._transformer = transformer
        self._layers = {name: m for name, m in transformer.named_modules() if isinstance(m, AdaptedLinear)}
        device = next(iter(self._layers.values())).lora_A["default"].weight.device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._optimizers: dict[str, Adafactor] = {}
        self.weights: dict[str, torch.nn.Parameter] = {}
        """(outputs, inputs) by layer, in the type of the base's products."""
        self.held: dict[int, Mapping[str, Held]] = {}
        """By step and layer, how much of the change the LoRA holds that was made of it then."""
        self._hooks = []
        for name, adapted in self._layers.items():
            frozen, like = adapted.get_base_layer(), adapted.lora_A["default"].weight
            weight = torch.nn.Parameter(torch.zeros_like(frozen.weight, dtype=like.dtype))
            self._optimizers[name] = optimizer = Adafactor(weight, self._generator)
            weight.register_post_accumulate_grad_hook(functools.partial(self._step, optimizer))
            self._hooks.append(frozen.register_forward_hook(functools.partial(_add, weight)))
            self.weights[name] = weight
        self._squared = torch.zeros((), device=device)
        self._rate = 0.0
        self.skipped = self.in_a_row = torch.zeros((), device=device)
        """As of `masters.Masters`: passes without a finite gradient."""
        transformer.disable_adapters()

    def move(
        self, pictures: Pass, preservation: Pass | None, rate: float, balance: Balance | None, last: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """A step by the pictures and then, where there is one, a step by the preservation, its loss weighted; both
        losses, and the norm of the pictures' gradient.

        The two gradients are never there together, so each is measured as it comes, and the weight for the next look
        follows from both.
        """
        self._rate = rate
        loss, norm = self._backward(pictures)
        if preservation is None:
            return loss, None, norm
        assert balance is not None
        kept, weighted = self._backward(preservation, balance.weight)
        balance.steer(norm, weighted)
        return loss, kept, norm

    def _backward(self, one: Pass, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, loss, rows = one
        device = self._squared.device
        self._squared = torch.zeros((), device=device)
        result = loss(*[batched(column, device) for column in zip(*rows, strict=True)])
        (result if weight is None else result * weight).backward()
        norm = self._squared.sqrt()
        broken = (~torch.isfinite(norm)).float()
        self.skipped, self.in_a_row = self.skipped + broken, (self.in_a_row + 1) * broken
        return result.detach(), norm

    def _step(self, optimizer: Adafactor, weight: Tensor) -> None:
        assert weight.grad is not None
        self._squared += optimizer.step(weight.grad, self._rate)
        weight.grad = None

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as plain values, and what was held at earlier steps; for `go_on`."""
        held = {step: {name: dataclasses.asdict(one) for name, one in of.items()} for step, of in self.held.items()}
        return {
            "layers": {name: optimizer.state() for name, optimizer in self._optimizers.items()},
            "generator": self._generator.get_state(),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "held": held,
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave, in place."""
        for name, optimizer in self._optimizers.items():
            optimizer.go_on(state["layers"][name])
        self._generator.set_state(state["generator"])
        self.skipped, self.in_a_row = (state[name].to(self._squared) for name in ("skipped", "in_a_row"))
        self.held = {step: {name: Held(**one) for name, one in of.items()} for step, of in state["held"].items()}

    def extract(self) -> dict[str, Held]:
        """Puts the LoRA that is nearest to the change in the place of the one that is attached; what it holds of each
        layer's."""
        measured: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            for name, adapted in self._layers.items():
                a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
                pair, whole, held = extract.extract(self.weights[name], len(a))
                measured[name] = whole, held
                torch._foreach_copy_([a, b], pair)
        norms = torch.stack([torch.stack(norms) for norms in measured.values()]).tolist()
        return {name: Held(whole=whole, held=held) for name, (whole, held) in zip(measured, norms, strict=True)}

    @contextlib.contextmanager
    def as_lora(self, step: int) -> Iterator[None]:
        """Within it the transformer is what a user of the LoRA gets, after so many steps."""
        self.held[step] = self.extract()
        self._transformer.enable_adapters()
        try:
            yield
        finally:
            self._transformer.disable_adapters()

    def remove(self) -> None:
        """Takes it out of the transformer, and its memory with it; the LoRA is as it was last made."""
        for hook in self._hooks:
            hook.remove()
        self.weights, self._optimizers = {}, {}
        self._transformer.enable_adapters()


def looking(change: Change, watch: Watch, examination: Examination, steps: int, log: Log) -> Callable[[int], bool]:
    """`watch`, which is shown the LoRA of the change in place of the change. After the last step the log is told what
    the LoRA lacks of it."""

    def gain() -> float:
        return examination.glance(unseen=False, moved=False).own

    def look(step: int) -> bool:
        if not watch.looks(step):
            return False
        whole = gain() if step == steps else None
        with change.as_lora(step):
            if whole is not None:
                log(
                    f"{in_words(change.held[step])}; on training pictures the loss is {whole:.0%} below the"
                    f" base's with all of the change, {gain():.0%} with what the LoRA holds"
                )
            return watch(step)

    return look


def in_words(held: Mapping[str, Held]) -> str:
    """How much of the change a LoRA holds, in all and of its layers."""
    shares = [one.share for one in held.values()]
    return (
        f"the LoRA holds {extract.together(held.values()).share:.0%} of the change of {len(held)} layers (by its norm;"
        f" from {min(shares):.0%} to {max(shares):.0%} of a layer's)"
    )


def _add(change: Tensor, module: torch.nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
    """A layer's output with its change: what the sum of both weights would give, without rounding that to bf16."""
    return output + F.linear(given[0], change)
