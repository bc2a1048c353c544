"""Compiling the transformer's blocks for a training: few graphs, whatever the sizes, and none for what is not trained.

FLUX repeats two blocks 57 times, so those two are compiled, not the whole (regional compilation: diffusers'
`compile_repeated_blocks`); a graph is made when it is first needed, in the training's first steps. What draws or
checks between the steps runs as it is (`torch.compiler.set_stance` there): without a gradient, or with the LoRA
switched off, it would need graphs of its own, and does not run often enough to repay them.
"""

import contextlib
from collections.abc import Iterator

import torch._dynamo.config
import torch._functorch.config
from diffusers import FluxTransformer2DModel

MOST = 32
"""Graphs of one kind of block; beyond them it runs as it is. A training needs four of each kind: the first block of a
kind differs from the others (its input has no gradient, or lies otherwise in memory), and a batch of one from larger
ones; and as many more for each way in which `layers_to_optimize_regex` adapts some blocks."""


@contextlib.contextmanager
def compiled(transformer: FluxTransformer2DModel, shapes: int, **options: object) -> Iterator[None]:
    """Within it the blocks are compiled, for any sizes where there are more `shapes` than one.

    What was compiled lies in TORCHINDUCTOR_CACHE_DIR, and the next training on such a GPU finds it there, with what
    comes before the kernels too, which torch keeps by itself only for a model without a function of its own
    (`lora.layer`). The graphs themselves, which torch would count against MOST for as long as the process lives, go.

    A float of a module (a scale, an epsilon) is a constant: where sizes may change torch takes it for an input, and
    then traces most graphs twice. `options` go to `torch.compile`. Where a compiler fails the block runs as it is, and
    torch warns: slower, and right. So that this holds for the backward pass, it is compiled together with the forward
    pass, not when it is first run.
    """
    with (
        torch._dynamo.config.patch(recompile_limit=MOST, suppress_errors=True, specialize_float=True),
        torch._functorch.config.patch(
            autograd_cache_allow_custom_autograd_functions=True, force_non_lazy_backward_lowering=True
        ),
    ):
        transformer.compile_repeated_blocks(dynamic=shapes > 1, **options)
        try:
            yield
        finally:
            torch._dynamo.reset()
