"""The second Cog model through the real Cog server, with the tar of a real training on the toy base."""

import base64
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from generate import Predictor
from lora import job
from lora.file import weights
from lora.flux import base
from lora.flux.base import Base
from tests import server
from tests.server import Server
from tests.test_request import a_request
from toyflux import world

INPUT = {"prompt": "a TOK on a red background", "seed": 5, "num_inference_steps": 3, "output_format": "png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar whose LoRA draws visibly otherwise than the base: a few steps at a very high rate."""
    folder = tmp_path_factory.mktemp("trained")
    data = io.BytesIO()
    Image.radial_gradient("L").resize((96, 96)).convert("RGB").save(data, "PNG")
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        archive.writestr("one.png", data.getvalue())
    request = a_request(
        folder / "pictures.zip", training_steps=12, learning_rate=1e-2, preservation="off", preview_prompts="a red"
    )
    return job.run(
        request,
        output=folder,
        flux_base=os.environ.get("FLUX_BASE"),
        captioner=None,
        log=lambda line: None,
        metric=lambda name, value: None,
    )


@pytest.fixture(scope="module")
def artist(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server.serve(
        "predict", tmp_path_factory.mktemp("artist"), "generate.py", {"COG_WEIGHTS": str(trained)}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def flux() -> Base:
    return base.find(os.environ.get("FLUX_BASE"), None)


def _ask(artist: Server, changes: dict[str, object]) -> tuple[int, server.Answer]:
    return artist.ask_when_free("POST", "/predictions", {"input": {**INPUT, **changes}})


def _drawn(artist: Server, **changes: object) -> list[Image.Image]:
    status, answer = _ask(artist, changes)
    assert status == 200, answer
    assert answer["status"] == "succeeded", answer
    output = answer["output"]
    assert isinstance(output, list)
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in output]


def _refused(artist: Server, **changes: object) -> str:
    status, answer = _ask(artist, changes)
    assert status == 200, answer
    assert answer["status"] == "failed"
    return str(answer["error"])


def test_it_draws_with_the_weights_of_the_training_as_diffusers_does(
    artist: Server, trained: Path, flux: Base, tmp_path: Path
) -> None:
    pipeline = FluxPipeline.from_pretrained(flux.folder, dtype=torch.float32)

    def theirs() -> np.ndarray:
        drawn = pipeline(
            prompt=INPUT["prompt"],
            width=flux.native,
            height=flux.native,
            num_inference_steps=3,
            guidance_scale=3.5,
            max_sequence_length=flux.t5_tokens,
            generator=torch.Generator().manual_seed(5),
        )
        return np.asarray(drawn.images[0]).astype(int)

    alone = theirs()
    pipeline.load_lora_weights(str(weights.take_out(trained, tmp_path)))
    with_it = theirs()
    assert np.abs(alone - with_it).mean() > 2, "the training must show, or this test shows nothing"
    [picture] = _drawn(artist)
    assert picture.format == "PNG"
    assert np.abs(np.asarray(picture) - with_it).max() <= 2
    [picture] = _drawn(artist, lora_scale=0)
    assert np.abs(np.asarray(picture) - alone).max() <= 2
    [picture] = _drawn(artist, lora_scale=0.6, extra_lora=str(trained), extra_lora_scale=0.4)
    assert np.abs(np.asarray(picture) - with_it).max() <= 2
    [picture] = _drawn(artist, lora_weights=str(trained))
    assert np.abs(np.asarray(picture) - with_it).max() <= 2


def test_every_picture_of_several_can_be_drawn_again_alone(artist: Server) -> None:
    first, second = _drawn(artist, num_outputs=2)
    [again] = _drawn(artist, seed=6)
    assert (np.asarray(second) == np.asarray(again)).all()
    assert (np.asarray(first) != np.asarray(second)).any()


def test_sizes_formats_and_a_picture_to_start_from(artist: Server, flux: Base) -> None:
    [wide] = _drawn(artist, aspect_ratio="3:2", output_format="webp")
    assert wide.format == "WEBP"
    assert wide.width > wide.height
    [chosen] = _drawn(artist, width=100, height=64, output_format="jpg", output_quality=40)
    assert (chosen.format, chosen.size) == ("JPEG", (96, 64))
    start = io.BytesIO()
    Image.new("RGB", (300, 150), world.COLOURS["blue"]).save(start, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(start.getvalue()).decode()
    cut = "data:image/png;base64," + base64.b64encode(start.getvalue()[:-99]).decode()
    assert "ValueError: image: " in _refused(artist, image=cut)
    [near] = _drawn(artist, image=uri, prompt_strength=0.25, num_inference_steps=8)
    assert near.width / near.height == pytest.approx(2, rel=0.15)
    wanted = np.asarray(Image.open(start).resize(near.size)).astype(int)
    [far] = _drawn(artist, width=near.width, height=near.height)
    assert np.abs(np.asarray(near) - wanted).mean() < 0.7 * np.abs(np.asarray(far) - wanted).mean()


def test_a_prompt_longer_than_the_base_reads_is_warned_of(artist: Server) -> None:
    status, answer = _ask(artist, {"prompt": "a red house " * 60})
    assert (status, answer["status"]) == (200, "succeeded")
    assert "and the base reads 40: its end is lost" in str(answer["logs"])


def test_mistakes_are_told_and_the_next_drawing_is_as_ever(artist: Server, tmp_path: Path) -> None:
    [before] = _drawn(artist)
    assert "extra_lora: 'no/where/here' is no file" in _refused(artist, extra_lora="no/where/here")
    (tmp_path / "pickle.tar").write_bytes(b"\x80\x04\x95")
    assert "lora_weights: pickle.tar" in _refused(artist, lora_weights=str(tmp_path / "pickle.tar"))
    assert "width and height" in _refused(artist, width=96)
    for wrong in ({"num_outputs": 5}, {"aspect_ratio": "7:1"}, {"guidance_scale": 11}, {"lora_scale": 4}):
        assert _ask(artist, wrong)[0] == 422
    [after] = _drawn(artist)
    assert (np.asarray(before) == np.asarray(after)).all()
    assert len([name for name in artist.leftovers() if "pictures" in name]) == 1


def test_after_a_lora_that_failed_the_one_before_is_not_drawn_with_unasked(trained: Path, tmp_path: Path) -> None:
    predictor = Predictor()
    predictor.setup()
    predictor.put_on([("lora_weights", str(trained), 1.0)])
    assert any("lora" in name for name in predictor.pipeline.transformer.state_dict())
    other = tmp_path / "other.safetensors"
    weights.write(other, {"transformer_blocks.0.attn.to_q": (torch.zeros(4, 7), torch.zeros(7, 4))}, {})
    for nothing in (str(other), str(tmp_path / "none.tar")):
        with pytest.raises(ValueError, match="lora_weights"):
            predictor.put_on([("lora_weights", nothing, 1.0)])
    assert len(list(Path(predictor.folder.name).iterdir())) <= 2
    predictor.put_on([])
    assert not any("lora" in name for name in predictor.pipeline.transformer.state_dict())
