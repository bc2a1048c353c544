"""The second Cog model through the real Cog server, with the tar of a real training on the toy base."""

import base64
import gc
import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import save_file

from generate import Predictor
from lora import job
from lora.file import cache, weights
from lora.file.weights import Weights
from lora.flux import adapter, base, generate
from lora.flux.base import Base
from script import signature
from tests import cog_server as server
from tests import tiny_vit, toy_schnell
from tests.cog_server import Server
from tests.test_request import a_request
from toyflux import world

INPUT = {
    "prompt": "a TOK on a red background",
    "seed": 5,
    "num_inference_steps": 3,
    "guidance_scale": 3.5,
    "output_format": "png",
    "disable_safety_checker": True,
}
ROOT = Path(__file__).resolve().parent.parent


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
    """The server with schnell and a safety checker, which takes green pictures for unsafe ones."""
    checker, weights_of_schnell = tmp_path_factory.mktemp("checker"), tmp_path_factory.mktemp("schnell")
    tiny_vit.write(checker)
    toy_schnell.write(weights_of_schnell)
    variables = {"COG_WEIGHTS": str(trained), "SAFETY": str(checker), "SCHNELL": str(weights_of_schnell)}
    with server.serve("predict", tmp_path_factory.mktemp("artist"), "generate.py", variables) as running:
        yield running


@pytest.fixture(scope="module")
def flux() -> Base:
    return base.find(os.environ.get("FLUX_BASE"), None)


def _ask(artist: Server, changes: dict[str, object]) -> tuple[int, server.Answer]:
    return artist.ask_when_free("POST", "/predictions", {"input": {**INPUT, **changes}})


def _answer(artist: Server, **changes: object) -> tuple[list[Image.Image], str]:
    """The pictures and the log."""
    status, answer = _ask(artist, changes)
    assert status == 200, answer
    assert answer["status"] == "succeeded", answer
    output = answer["output"]
    assert isinstance(output, list)
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in output]
    return pictures, str(answer["logs"])


def _drawn(artist: Server, **changes: object) -> list[Image.Image]:
    return _answer(artist, **changes)[0]


def _refused(artist: Server, **changes: object) -> str:
    status, answer = _ask(artist, changes)
    assert status == 200, answer
    assert answer["status"] == "failed"
    return str(answer["error"])


def _uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


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


def test_every_input_that_callers_know_may_be_sent_at_once(artist: Server, trained: Path, flux: Base) -> None:
    """As a client does that fills in the whole form: nothing is dropped, and every one of them counts."""
    start = Image.linear_gradient("L").resize((flux.native, flux.native)).convert("RGB")
    white = Image.new("L", start.size)
    white.paste(255, (32, 32, 64, 64))
    lora = str(trained)
    inputs: dict[str, object] = {
        "prompt": "a TOK on a red background",
        "image": _uri(start),
        "mask": _uri(white),
        "prompt_strength": 0.9,
        "aspect_ratio": "custom",
        "width": 128,
        "height": 64,
        "megapixels": "1",
        "model": "dev",
        "num_outputs": 2,
        "num_inference_steps": 3,
        "guidance_scale": 3,
        "guidance": 3.5,
        "seed": 5,
        "output_format": "png",
        "output_quality": 80,
        "include_metadata": True,
        "go_fast": True,
        "disable_safety_checker": True,
        "lora_weights": lora,
        "lora_scale": 1,
        "extra_lora": lora,
        "extra_lora_scale": 0.8,
        "replicate_weights": lora,
        "finetune_id": "owner/another",
        "finetune_strength": 1.1,
        "hf_api_token": "hf_secret",
        "civitai_api_token": "secret",
    }
    assert inputs.keys() == signature.read(ROOT / "generate.py", "Predictor").inputs.keys()
    pictures, log = _answer(artist, **inputs)
    assert len(pictures) == 2
    inside = np.asarray(white) > 0
    for number, picture in enumerate(pictures):
        assert (np.asarray(picture)[~inside] == np.asarray(start)[~inside]).all()
        assert (np.asarray(picture)[inside] != np.asarray(start)[inside]).any()
        told = picture.info["parameters"]
        assert told.startswith("a TOK on a red background <lora:TOK:1.1> <lora:TOK:0.8>\nSteps: 3, ")
        assert f"Distilled CFG Scale: 3.5, Seed: {5 + number}, Size: 96x96" in told
        assert "Denoising strength: 0.9" in told
    assert "go_fast changes nothing: no faster way" in log
    assert "warning: finetune_id is ignored, because lora_weights is given too" in log
    assert "secret" not in log
    plain = {name: value for name, value in inputs.items() if name not in ("go_fast", "finetune_id", "num_outputs")}
    [same] = _drawn(artist, **plain)
    assert (np.asarray(same) == np.asarray(pictures[0])).all()


def test_the_other_names_of_a_lora_and_its_scale_mean_the_same(artist: Server, trained: Path) -> None:
    [wanted] = _drawn(artist, lora_weights=str(trained), lora_scale=0.5)
    for name in ("replicate_weights", "finetune_id"):
        [picture] = _drawn(artist, **{name: str(trained)}, finetune_strength=0.5)
        assert (np.asarray(picture) == np.asarray(wanted)).all(), name
    [guided] = _drawn(artist, lora_weights=str(trained), lora_scale=0.5, guidance_scale=1, guidance=3.5)
    assert (np.asarray(guided) == np.asarray(wanted)).all()


def test_schnell_draws_in_its_own_steps_with_the_same_lora(artist: Server) -> None:
    without_steps = {name: value for name, value in INPUT.items() if name != "num_inference_steps"}
    drawn = []
    for more in ({}, {"lora_scale": 0}):
        status, answer = artist.ask_when_free(
            "POST", "/predictions", {"input": {**without_steps, "model": "schnell", **more}}
        )
        assert (status, answer["status"]) == (200, "succeeded"), answer
        assert "4 steps, seed 5" in str(answer["logs"])
        [uri] = answer["output"]  # type: ignore[misc]
        drawn.append(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert "Steps: 4, " in drawn[0].info["parameters"]
    assert "Distilled" not in drawn[0].info["parameters"]
    assert re.search(r"Model: schnell\d+, ", drawn[0].info["parameters"]), "a folder's name, not where it lies"
    assert np.abs(np.asarray(drawn[0]).astype(int) - np.asarray(drawn[1])).mean() > 2


def test_a_picture_that_the_checker_withholds_is_an_error_that_says_so(artist: Server) -> None:
    green = _uri(Image.new("RGB", (96, 96), (0, 255, 0)))
    kept = {"image": green, "prompt_strength": 0.1, "num_inference_steps": 10, "lora_scale": 0}
    told = _refused(artist, **kept, disable_safety_checker=False)
    assert "the safety checker withholds every picture of this call (seed 5)" in told
    [picture] = _drawn(artist, **kept)
    assert np.asarray(picture)[..., 1].mean() > 200
    blue = _uri(Image.new("RGB", (96, 96), (0, 0, 255)))
    assert len(_drawn(artist, **{**kept, "image": blue}, disable_safety_checker=False)) == 1


def test_minus_one_is_a_random_seed_which_the_log_tells(artist: Server) -> None:
    told = []
    for _ in range(2):
        [picture], log = _answer(artist, seed=-1, num_inference_steps=1)
        told.append(int(log.partition("1 steps, seed ")[2].split()[0]))
        assert f"Seed: {told[-1]}, " in picture.info["parameters"]
    assert told[0] != told[1]


def test_sizes_formats_and_a_picture_to_start_from(artist: Server, flux: Base) -> None:
    [wide] = _drawn(artist, aspect_ratio="3:2", output_format="webp")
    assert wide.format == "WEBP"
    assert wide.width > wide.height
    [quarter] = _drawn(artist, megapixels="0.25", include_metadata=False)
    assert quarter.size == (flux.native // 2, flux.native // 2)
    assert "parameters" not in quarter.info
    [chosen] = _drawn(artist, aspect_ratio="custom", width=100, height=64, output_format="jpg", output_quality=40)
    assert (chosen.format, chosen.size) == ("JPEG", (96, 64))
    [square], log = _answer(artist, width=100, height=64)
    assert square.size == (flux.native, flux.native)
    assert "width and height are not used with aspect_ratio 1:1; give aspect_ratio=custom" in log
    start = Image.new("RGB", (300, 150), world.COLOURS["blue"])
    assert "ValueError: image: " in _refused(artist, image=_uri(start)[:-100])
    assert "mask: there is no image that it belongs to" in _refused(artist, mask=_uri(start))
    [near] = _drawn(artist, image=_uri(start), prompt_strength=0.25, num_inference_steps=8)
    assert near.width / near.height == pytest.approx(2, rel=0.15)
    wanted = np.asarray(start.resize(near.size)).astype(int)
    [far] = _drawn(artist, aspect_ratio="custom", width=near.width, height=near.height)
    assert np.abs(np.asarray(near) - wanted).mean() < 0.7 * np.abs(np.asarray(far) - wanted).mean()


def test_a_prompt_without_the_trigger_word_is_told_of(artist: Server) -> None:
    _, log = _answer(artist, prompt="a red house")
    assert "warning: COG_WEIGHTS: the prompt lacks its trigger word, 'TOK'" in log
    for without_need in ({}, {"prompt": "a red house", "lora_scale": 0}):
        assert "trigger" not in _answer(artist, **without_need)[1]


def test_a_prompt_longer_than_the_base_reads_is_warned_of(artist: Server) -> None:
    status, answer = _ask(artist, {"prompt": "a red house " * 60})
    assert (status, answer["status"]) == (200, "succeeded")
    assert "and the base reads 40: its end is lost" in str(answer["logs"])


def test_mistakes_are_told_and_the_next_drawing_is_as_ever(artist: Server, tmp_path: Path) -> None:
    [before] = _drawn(artist)
    assert "extra_lora: 'no/where/here' is no file here, and a version of a model" in _refused(
        artist, extra_lora="no/where/here"
    )
    (tmp_path / "pickle.tar").write_bytes(b"\x80\x04\x95")
    assert "lora_weights: pickle.tar" in _refused(artist, lora_weights=str(tmp_path / "pickle.tar"))
    assert "width and height in pixels; give height too" in _refused(artist, aspect_ratio="custom", width=96)
    for wrong in ({"num_outputs": 5}, {"aspect_ratio": "7:1"}, {"guidance_scale": 11}, {"lora_scale": 4}, {"seed": -2}):
        assert _ask(artist, wrong)[0] == 422
    [after] = _drawn(artist)
    assert (np.asarray(before) == np.asarray(after)).all()
    assert len([name for name in artist.leftovers() if "pictures" in name]) == 1


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    made = Predictor()
    made.setup()
    return made


def test_after_a_lora_that_failed_the_one_before_is_not_drawn_with_unasked(
    predictor: Predictor, trained: Path, tmp_path: Path
) -> None:
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


def _random_lora(predictor: Predictor, path: Path, seed: int, layers: int = 39) -> str:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in adapter.target_modules(predictor.pipeline.transformer)[:layers]:
        outputs, inputs = adapter.shapes(predictor.pipeline.transformer)[layer]
        pairs[layer] = (
            torch.randn(4, inputs, generator=generator) * 0.1,
            torch.randn(outputs, 4, generator=generator) * 0.1,
        )
    weights.write(path, pairs, {})
    return str(path)


def test_the_second_call_with_a_lora_loads_nothing_and_a_switch_leaves_the_base_where_it_is(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (_random_lora(predictor, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    read: list[str] = []
    plain = weights.read
    monkeypatch.setattr(weights, "read", lambda path: read.append(path.stem) or plain(path))
    places = {name: weight.data_ptr() for name, weight in predictor.pipeline.transformer.named_parameters()}
    for origin in (first, first, second, second, first):
        predictor.put_on([("lora_weights", origin, 1.0)])
    assert read == ["1", "2", "1"]
    again = np.asarray(generate.draw(predictor.pipeline, "a TOK", (32, 32), 1, steps=2, tokens=40))
    predictor.put_on([("lora_weights", first, 0.5)])
    half = np.asarray(generate.draw(predictor.pipeline, "a TOK", (32, 32), 1, steps=2, tokens=40))
    predictor.put_on([("lora_weights", first, 1.0)])
    assert read == ["1", "2", "1"], "another scale needs no loading"
    assert (half != again).any()
    assert (np.asarray(generate.draw(predictor.pipeline, "a TOK", (32, 32), 1, steps=2, tokens=40)) == again).all()
    predictor.put_on([])
    assert {name: weight.data_ptr() for name, weight in predictor.pipeline.transformer.named_parameters()} == places


def test_memory_does_not_grow_with_the_number_of_loras(predictor: Predictor, tmp_path: Path) -> None:
    held = []
    for number in range(50):
        origin = _random_lora(predictor, tmp_path / f"{number}.safetensors", number, layers=6)
        predictor.put_on([("lora_weights", origin, 0.8)])
        generate.draw(predictor.pipeline, "a red circle", (32, 32), 1, steps=1, tokens=40)
        if number in (9, 49):
            gc.collect()
            sizes = [thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
            held.append((len(sizes), sum(sizes)))
    assert held[0] == held[1]
    assert len(predictor.cache) <= cache.KEPT + 1
    predictor.put_on([])


def test_a_lora_on_the_text_encoder_which_dev_and_schnell_share_is_on_the_model_that_was_asked_for_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schnell").mkdir()
    toy_schnell.write(tmp_path / "schnell")
    monkeypatch.setenv("SCHNELL", str(tmp_path / "schnell"))
    predictor = Predictor()
    predictor.setup()
    layer = "encoder.layers.0.self_attn.q_proj"
    outputs, inputs = adapter.shapes(predictor.pipeline.text_encoder)[layer]
    lora = Weights(
        naming="",
        pairs={},
        text={layer: (torch.ones(1, inputs), torch.ones(outputs, 1))},
        metadata={},
        has_alphas=False,
    )
    file = tmp_path / "clip.safetensors"
    save_file(weights.tensors_of(lora), file)

    def said(model: str, *loras: tuple[str, str, float]) -> torch.Tensor:
        predictor.put_on(loras, model)
        return predictor.pipelines[model].encode_prompt("a TOK", None, max_sequence_length=16)[1].detach()

    bare = said("dev")
    asked = ("lora_weights", str(file), 1.0)
    changed = said("dev", asked)
    assert not torch.equal(changed, bare)
    assert torch.equal(said("schnell"), bare)
    assert torch.equal(said("dev", asked), changed)
    half = said("schnell", ("lora_weights", str(file), 0.5))
    assert not torch.equal(half, changed)
    assert torch.equal(said("dev", asked), changed)
    assert torch.equal(said("schnell", ("lora_weights", str(file), 0.5)), half)


def test_without_its_weights_schnell_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="model: the weights of schnell are not here"):
        predictor.pipeline_of("schnell")
