"""The compiled blocks: few graphs, the same training."""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from diffusers import FluxTransformer2DModel
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from lora import adapter, attention, fit, graphs, validation
from lora.encode import Example, Text
from tests.test_fit import SETTINGS


def test_sizes_share_four_graphs_that_train_as_the_blocks_do_and_nothing_else_is_compiled(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """By the compiler's front end, which is what can break a graph; what makes kernels of it needs a GPU to matter."""
    tiny_flux.single_transformer_blocks.append(copy.deepcopy(tiny_flux.single_transformer_blocks[0]))
    tiny_flux.transformer_blocks.append(copy.deepcopy(tiny_flux.transformer_blocks[0]))
    tiny_flux.requires_grad_(False)
    settings = dataclasses.replace(SETTINGS, steps=3, batch_size=1)
    assert len({len(example.mean) for example in examples}) == 2

    def train(transformer: FluxTransformer2DModel) -> list[torch.nn.Parameter]:
        parameters = adapter.attach(transformer, 4, seed=3)
        assert len(list(fit.fit(transformer, parameters, examples, [], texts, settings))) == 3
        return parameters

    plain = train(copy.deepcopy(tiny_flux))
    torch._dynamo.reset()
    counters.clear()
    with attention.for_training(tiny_flux), graphs.compiled(tiny_flux, 2, backend="aot_eager", fullgraph=True):
        compiled = train(tiny_flux)
        assert counters["stats"]["unique_graphs"] == 4
        assert not counters["graph_break"]
        validation.loss(tiny_flux, examples[:1], texts, seed=0)
        assert _kept(tiny_flux)
    assert counters["stats"]["unique_graphs"] == 4
    assert not _kept(tiny_flux), "the next training's graphs would come on top of these"
    for ours, wanted in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5)


def _kept(transformer: FluxTransformer2DModel) -> list[object]:
    """The graphs that torch has of the single blocks, in this process, whatever the model."""
    code = type(transformer.single_transformer_blocks[0]).forward.__code__
    return list(_debug_get_cache_entry_list(code))


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["fw_compiler", "bw_compiler"])
def test_where_the_compiler_fails_in_either_pass_the_training_goes_on_without(
    fails: str, tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    asked = []

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., object]:
        asked.append(graph)
        raise RuntimeError("no kernels today")

    tiny_flux.requires_grad_(False)
    settings = dataclasses.replace(SETTINGS, steps=2, batch_size=1)
    plain = copy.deepcopy(tiny_flux)
    wanted = adapter.attach(plain, 4, seed=3)
    list(fit.fit(plain, wanted, examples, [], texts, settings))
    torch._dynamo.reset()
    backend = aot_autograd(**{"fw_compiler": nop, "bw_compiler": nop, fails: compiler})
    with graphs.compiled(tiny_flux, 2, backend=backend):
        trained = adapter.attach(tiny_flux, 4, seed=3)
        list(fit.fit(tiny_flux, trained, examples, [], texts, settings))
    assert asked
    for ours, theirs in zip(trained, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
