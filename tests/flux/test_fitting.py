"""LoRAs of other tools on the toy base: what is read is what the tool trained, and what diffusers' loader draws."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from lora.file import judge, weights
from lora.flux import adapter, generate
from lora.flux.base import TOY
from lora.flux.generate import Lora
from tests import lora_files
from tests.lora_files import LAYOUTS, Maker


@pytest.fixture(scope="module")
def ours() -> FluxPipeline:
    return generate.open_pipeline(TOY, "cpu", torch.float32, offload=False)


@pytest.fixture(scope="module")
def theirs() -> FluxPipeline:
    return generate.open_pipeline(TOY, "cpu", torch.float32, offload=False)


@pytest.fixture
def maker(ours: FluxPipeline) -> Iterator[Maker]:
    yield Maker(adapter.shapes(ours.transformer), adapter.shapes(ours.text_encoder))
    ours.unload_lora_weights()


@torch.no_grad()
def _predicted(pipeline: FluxPipeline) -> torch.Tensor:
    """What text encoder and transformer make of a prompt and of noise."""
    embeds, pooled, ids = pipeline.encode_prompt("a red house", None, max_sequence_length=40)
    generator = torch.Generator().manual_seed(1)
    return pipeline.transformer(
        hidden_states=torch.randn(1, 16, 64, generator=generator),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]),
        img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        txt_ids=ids,
        return_dict=False,
    )[0]


def _by_diffusers(pipeline: FluxPipeline, file: Path) -> torch.Tensor | None:
    """What diffusers predicts with a file by its own loader; None where it stops."""
    try:
        pipeline.load_lora_weights(str(file))
        return _predicted(pipeline)
    except Exception:
        return None
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layers_weight_gains_what_the_tool_trained(layout: str, maker: Maker, tmp_path: Path) -> None:
    lora = weights.read(lora_files.write(layout, maker, tmp_path / "lora.safetensors"))
    for own, wanted in ((lora.pairs, maker.gains), (lora.text, maker.text_gains)):
        assert own.keys() == wanted.keys()
        for layer, (a, b) in own.items():
            torch.testing.assert_close(b.float() @ a.float(), wanted[layer], rtol=0.01, atol=1e-3, msg=layer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_draws_as_diffusers_draws_it_and_inspect_says_whether_diffusers_does(
    layout: str, ours: FluxPipeline, theirs: FluxPipeline, maker: Maker, tmp_path: Path
) -> None:
    file = lora_files.write(layout, maker, tmp_path / "lora.safetensors")
    alone, lines = _predicted(ours), []
    generate.put_on(ours, [Lora(name="lora_weights", file=file, scale=1)], lines.append)
    mine = _predicted(ours)
    other = _by_diffusers(theirs, file)
    said = judge.loaders(weights.read(file), file)["diffusers"]
    if other is None or (torch.equal(other, alone) and layout != "zero b"):
        assert said.startswith("no: ")
    else:
        error, change = (float(apart.abs().max()) for apart in (mine - other, mine - alone))
        assert (said == "yes") == (error <= 0.02 * change), (said, error, change)
        assert said == "yes" or said.startswith("in part: ")
    assert torch.equal(mine, alone) == (layout == "zero b")
    assert any("it has no effect" in line for line in lines) == (layout == "zero b")
    generate.put_on(ours, [], lines.append)
    assert torch.equal(_predicted(ours), alone), "it leaves without a trace"
