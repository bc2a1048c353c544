"""Forward and backward passes of the training, on a GPU recorded once for each size of pictures and then replayed.

A step of FLUX.1-dev is some eight thousand kernels (`script/bench traffic`), and launching them one by one took longer
than an H200 needs to run them (bench/NOTES.md). A CUDA graph is launched as one
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs): the same kernels on the same memory, so a recording
has inputs of its own, into which the batch is copied, and leaves its results where the next replay overwrites them.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora.flux import hardware
from lora.flux.encode import batched

AHEAD = 2
"""Passes that the host may be ahead of the GPU: enough that it never waits, and its clock is still true."""

Loss = Callable[..., Tensor]
"""From tensors with a batch as their first dimension to a scalar."""
Rows = Sequence[Sequence[Tensor]]
"""What a Loss is given, picture by picture, in the machine's memory."""
Pass = tuple[Hashable, Loss, Rows]
"""A key, by which a recording is found again, a loss, and what it is given."""


class CannotRecord(RuntimeError):
    """A pass cannot be recorded here, for another reason than memory; it can be run all the same."""


class NoRoomToRecord(CannotRecord):
    """A recording broke off, most likely because the memory ran out (`hardware.is_capture_out_of_memory`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    loss: Tensor


class Passes:
    """Runs losses forward and backward; adds their gradients up in `gradients`, one for each of `parameters`."""

    def __init__(self, parameters: Sequence[Tensor], generator: torch.Generator) -> None:
        """`generator` is what the losses take their noise from."""
        self._parameters, self._generator = parameters, generator
        self._recordings: dict[Hashable, Recording] = {}
        self._under_way = deque[torch.cuda.Event]()
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]

    def __call__(self, key: Hashable, loss: Loss, rows: Rows) -> Tensor:
        """The loss, a scalar without a gradient. Where `key` is recorded, the recording runs, whatever `loss` is."""
        recording = self._recordings.get(key)
        if recording is None:
            return self._run(loss, [batched(column, self._generator.device) for column in zip(*rows, strict=True)])
        if len(self._under_way) == AHEAD:
            self._under_way.popleft().synchronize()
        for column, kept in zip(zip(*rows, strict=True), recording.inputs, strict=True):
            for tensor, place in zip(column, kept, strict=True):
                place.copy_(tensor, non_blocking=True)
        recording.graph.replay()
        self._under_way.append(torch.cuda.Event())
        self._under_way[-1].record()
        return recording.loss.clone()

    def zero(self) -> None:
        torch._foreach_zero_(self.gradients)

    def record(self, passes: Sequence[Pass]) -> None:
        """Records each for batches such as its rows.

        Leaves the generator and the gradients as they were. Raises CannotRecord, and what says that memory ran out.
        """
        device, before = self._generator.device, self._generator.get_state()
        gradients = [gradient.clone() for gradient in self.gradients]
        # The largest first: recordings share their memory, and what it needs is known from the first one on.
        ready = sorted(passes, key=lambda one: -one[2][0][0].numel())
        inputs = [[batched(column, device) for column in zip(*rows, strict=True)] for _, _, rows in ready]
        try:
            # What is made when it is first used cannot be made in a recording. All before any is recorded: the memory
            # that they take is free again then.
            for (_, loss, _), given in zip(ready, inputs, strict=True):
                self._run(loss, given)
            pool = torch.cuda.graph_pool_handle()
            for (key, loss, _), given in zip(ready, inputs, strict=True):
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(self._generator)
                with _recording(graph, pool, device):
                    result = self._run(loss, given)
                self._recordings[key] = Recording(graph=graph, inputs=given, loss=result)
        except RuntimeError as error:
            if hardware.is_out_of_memory(error):
                raise
            kind = NoRoomToRecord if hardware.is_capture_out_of_memory(error) else CannotRecord
            raise kind(f"{type(error).__name__}: {error}") from error
        torch._foreach_copy_(self.gradients, gradients)
        self._generator.set_state(before)

    def _run(self, loss: Loss, inputs: Sequence[Tensor]) -> Tensor:
        result = loss(*inputs)
        torch._foreach_add_(self.gradients, torch.autograd.grad(result, self._parameters))
        return result.detach()


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """torch.cuda.graph, which where it breaks off leaves its stream in use and, before torch 2.12, the allocator in the
    belief that it goes on: no memory is given back then, that of the pool never (pytorch/pytorch#180395)."""
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                yield
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # raised by the first where the allocator knows
                torch._C._cuda_endAllocateToPool(device.index, pool)
                torch._C._cuda_releasePool(device.index, pool)
            raise
