"""Drawing with LoRAs, against diffusers' own pipelines; where LoRAs come from; and the second Cog model."""

import http.server
import re
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)
from diffusers import FluxTransformer2DModel as Transformer
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from lora.file import source, weights
from lora.flux import adapter, canvas, generate
from lora.flux.base import TOY
from lora.flux.encode import Text
from lora.flux.generate import Lora
from script import generate as command

SCHEDULER = {"use_dynamic_shifting": False, "shift": 3.0}
SIZE = (64, 48)


def _quiet(line: str) -> None:
    """A log that nobody reads."""


@pytest.fixture
def pipeline(tiny_flux: Transformer) -> FluxPipeline:
    torch.manual_seed(5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    return generate.pipeline_of(tiny_flux, vae, SCHEDULER)


@pytest.fixture
def make_lora(tiny_flux: Transformer, tmp_path: Path) -> Callable[..., Path]:
    """A LoRA file for `tiny_flux` with random weights; some layers renamed where asked for."""

    def make(name: str, seed: int, renamed: Mapping[str, str] | None = None) -> Path:
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for layer in adapter.target_modules(tiny_flux):
            outputs, inputs = adapter.shapes(tiny_flux)[layer]
            pair = (torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator))
            pairs[(renamed or {}).get(layer, layer)] = (pair[0] * 0.3, pair[1] * 0.3)
        weights.write(tmp_path / f"{name}.safetensors", pairs, {})
        return tmp_path / f"{name}.safetensors"

    return make


def _draw(pipeline: FluxPipeline, text: Text, **more: object) -> np.ndarray:
    return np.asarray(generate.draw(pipeline, text, SIZE, 3, steps=2, **more))  # type: ignore[arg-type]


# ---------------------------------------------------------------- drawing


def test_a_drawing_is_that_of_diffusers_pipeline(pipeline: FluxPipeline, texts: dict[str, Text]) -> None:
    text = texts["a TOK"]
    theirs = pipeline(
        prompt_embeds=text["prompt_embeds"][None],
        pooled_prompt_embeds=text["pooled"][None],
        width=64,
        height=48,
        num_inference_steps=2,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert (_draw(pipeline, text) == np.asarray(theirs)).all()
    assert theirs.size == SIZE


def test_drawn_together_they_are_what_each_is_alone(pipeline: FluxPipeline, texts: dict[str, Text]) -> None:
    asked = [texts[prompt] for prompt in ("a TOK", "a red house", "", "a VEK", "a TOK on a table")]
    assert len(asked) > generate.AT_ONCE
    seeds = range(3, 3 + len(asked))
    together = generate.draw_all(pipeline, asked, SIZE, seeds, steps=2)
    for picture, text, seed in zip(together, asked, seeds, strict=True):
        alone = generate.draw(pipeline, text, SIZE, seed, steps=2)
        assert picture.size == alone.size == SIZE
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone)).max() <= 1


def test_a_drawing_from_a_picture_is_that_of_diffusers_pipeline(pipeline: FluxPipeline, texts: dict[str, Text]) -> None:
    start = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    text = texts["a TOK"]
    theirs = FluxImg2ImgPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=pipeline.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=pipeline.transformer,
    )(
        image=start,
        strength=0.5,
        prompt_embeds=text["prompt_embeds"][None],
        pooled_prompt_embeds=text["pooled"][None],
        width=64,
        height=48,
        num_inference_steps=2,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    ours = _draw(pipeline, text, start=start, strength=0.5)
    assert (ours == np.asarray(theirs)).all()
    assert (ours != _draw(pipeline, text)).any()


def test_every_step_is_told_of_also_where_some_are_left_out(pipeline: FluxPipeline, texts: dict[str, Text]) -> None:
    told: list[tuple[int, int]] = []
    generate.draw(pipeline, texts["a TOK"], SIZE, 3, steps=3, told=lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    start = Image.new("RGB", SIZE)
    tell = lambda step, steps: told.append((step, steps))  # noqa: E731
    generate.draw(pipeline, texts["a TOK"], SIZE, 3, steps=4, start=start, strength=0.5, told=tell)
    assert told == [(1, 2), (2, 2)]


def test_progress_is_a_line_that_replicates_clients_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pattern of replicate-javascript's `parseProgressFromLogs`."""
    lines: list[str] = []
    generate.progress(lines.append, 0, 4)(1, 28)
    assert lines == [], "not before some seconds have passed"
    monkeypatch.setattr(generate, "SECONDS_BETWEEN_LINES", 0.0)
    generate.progress(lines.append, 1, 4)(14, 28)
    found = re.search(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)", lines[0])
    assert found is not None
    assert found.groups() == ("37", "42", "112")


def test_any_strength_above_none_draws_a_step(pipeline: FluxPipeline, texts: dict[str, Text]) -> None:
    start = Image.new("RGB", SIZE)
    with pytest.raises(ValueError, match=r"prompt_strength: at 0 nothing is left to draw; give more than 0"):
        _draw(pipeline, texts["a TOK"], start=start, strength=0)
    some = {strength: _draw(pipeline, texts["a TOK"], start=start, strength=strength) for strength in (0.01, 1.0)}
    assert not (some[0.01] == some[1.0]).all()


def test_a_part_is_redrawn_as_diffusers_pipeline_does_it(pipeline: FluxPipeline, texts: dict[str, Text]) -> None:
    start = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    white = Image.new("L", SIZE)
    white.paste(255, (16, 8, 40, 32))
    place = canvas.within(start, white, 56)
    assert place.size == SIZE
    text = texts["a TOK"]
    theirs = FluxInpaintPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=pipeline.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=pipeline.transformer,
    )(
        image=start,
        mask_image=white,
        strength=0.9,
        prompt_embeds=text["prompt_embeds"][None],
        pooled_prompt_embeds=text["pooled"][None],
        width=64,
        height=48,
        num_inference_steps=2,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    drawn = generate.draw(pipeline, text, SIZE, 3, steps=2, start=place.start, strength=0.9, mask=place.mask)
    assert (np.asarray(drawn) == np.asarray(theirs)).all()
    ours, inside = np.asarray(place.finish(drawn)), np.asarray(white) > 0
    assert (ours[inside] == np.asarray(theirs)[inside]).all()
    assert (ours[inside] != np.asarray(start)[inside]).any()
    assert (ours[~inside] == np.asarray(start)[~inside]).all()
    assert (np.asarray(theirs)[~inside] != np.asarray(start)[~inside]).any(), "the autoencoder changes what it keeps"


# ---------------------------------------------------------------- LoRAs


def test_a_lora_draws_as_diffusers_loads_it_and_leaves_without_a_trace(
    pipeline: FluxPipeline, texts: dict[str, Text], make_lora: Callable[..., Path]
) -> None:
    text, file = texts["a TOK"], make_lora("one", 1)
    alone = _draw(pipeline, text)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs = _draw(pipeline, text)
    generate.put_on(pipeline, [Lora(name="a", file=file, scale=1.0)], _quiet)
    assert (_draw(pipeline, text) == theirs).all()
    assert (theirs != alone).any()
    generate.put_on(pipeline, [Lora(name="a", file=file, scale=0.0)], _quiet)
    assert (_draw(pipeline, text) == alone).all()
    generate.put_on(pipeline, [], _quiet)
    assert (_draw(pipeline, text) == alone).all()


def test_several_loras_add_up_each_at_its_scale(
    pipeline: FluxPipeline, texts: dict[str, Text], make_lora: Callable[..., Path]
) -> None:
    """Against the base with s1 B1 A1 + s2 B2 A2 + s3 B3 A3 added to its weights by hand."""
    files = {make_lora(f"{seed}", seed): scale for seed, scale in ((1, 0.7), (2, -0.4), (3, 1.5))}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate.put_on(pipeline, [Lora(name="a", file=file, scale=scale) for file, scale in files.items()], _quiet)
    ours = _draw(pipeline, texts["a TOK"]).astype(int)
    generate.rescale(pipeline, [1.0, 1.0, 1.0])
    assert np.abs(ours - _draw(pipeline, texts["a TOK"])).max() > 1
    generate.rescale(pipeline, list(files.values()))
    assert (_draw(pipeline, texts["a TOK"]) == ours).all()
    generate.put_on(pipeline, [], _quiet)
    modules = dict(pipeline.transformer.named_modules())
    with torch.no_grad():
        for file, scale in files.items():
            for layer, (a, b) in weights.read(file).pairs.items():
                modules[layer].weight += scale * b @ a
    assert np.abs(ours - _draw(pipeline, texts["a TOK"])).max() <= 1


def test_a_lora_in_kohyas_names_draws_the_same(
    pipeline: FluxPipeline, texts: dict[str, Text], make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    file = make_lora("one", 1)
    generate.put_on(pipeline, [Lora(name="a", file=file, scale=1.0)], _quiet)
    ours = _draw(pipeline, texts["a TOK"]).astype(int)
    weights.write(tmp_path / "kohya.safetensors", weights.read(file).pairs, {}, "kohya")
    generate.put_on(pipeline, [Lora(name="a", file=tmp_path / "kohya.safetensors", scale=1.0)], _quiet)
    assert np.abs(ours - _draw(pipeline, texts["a TOK"])).max() <= 1


def test_an_alpha_in_the_header_counts_as_diffusers_counts_it(
    pipeline: FluxPipeline, texts: dict[str, Text], tiny_flux: Transformer, tmp_path: Path
) -> None:
    tiny_flux.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=adapter.target_modules(tiny_flux)))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in tiny_flux.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    trained = _draw(pipeline, texts["a TOK"]).astype(int)
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(tiny_flux),
        **_collate_lora_metadata({"transformer": tiny_flux}),
    )
    tiny_flux.delete_adapters("default")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    generate.put_on(pipeline, [Lora(name="a", file=file, scale=1)], _quiet)
    assert np.abs(trained - _draw(pipeline, texts["a TOK"])).max() <= 1


def test_a_lora_for_another_base_is_an_error_that_names_a_layer(pipeline: FluxPipeline, tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn.to_q"
    weights.write(tmp_path / "dev.safetensors", {layer: (torch.ones(4, 3072), torch.ones(3072, 4))}, {})
    with pytest.raises(ValueError, match=rf"lora_weights: none of its 1 layers .*{layer} is for 3072 .* has 32 and 32"):
        generate.put_on(pipeline, [Lora(name="lora_weights", file=tmp_path / "dev.safetensors", scale=1)], _quiet)


def test_a_lora_that_fits_in_part_draws_with_that_and_names_the_rest(
    pipeline: FluxPipeline, texts: dict[str, Text], make_lora: Callable[..., Path]
) -> None:
    odd = "single_transformer_blocks.0.proj_out"
    file = make_lora("part", 1, {odd: "single_transformer_blocks.7.proj_out"})
    lines: list[str] = []
    generate.put_on(pipeline, [Lora(name="extra_lora", file=file, scale=1)], lines.append)
    assert "warning: extra_lora: 1 of its 17 layers" in lines[0]
    assert "single_transformer_blocks.7.proj_out" in lines[0]
    ours = _draw(pipeline, texts["a TOK"])
    pairs = {layer: pair for layer, pair in weights.read(file).pairs.items() if "blocks.7" not in layer}
    weights.write(file, pairs, {})
    generate.put_on(pipeline, [Lora(name="a", file=file, scale=1)], _quiet)
    assert (ours == _draw(pipeline, texts["a TOK"])).all()


def test_a_lora_whose_training_broke_down_is_refused(pipeline: FluxPipeline, make_lora: Callable[..., Path]) -> None:
    file = make_lora("broken", 1)
    pairs = weights.read(file).pairs
    layer, (a, b) = next(iter(pairs.items()))
    weights.write(file, {**pairs, layer: (a, b * float("nan"))}, {})
    with pytest.raises(
        ValueError, match=rf"lora_weights: 1 of its 17 layers hold weights .* not finite, such as {layer}"
    ):
        generate.put_on(pipeline, [Lora(name="lora_weights", file=file, scale=1)], _quiet)


def test_after_an_error_the_loras_from_before_still_draw(
    pipeline: FluxPipeline, texts: dict[str, Text], make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    generate.put_on(pipeline, [Lora(name="a", file=make_lora("one", 1), scale=1)], _quiet)
    before = _draw(pipeline, texts["a TOK"])
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="extra_lora: bad"):
        generate.put_on(pipeline, [Lora(name="extra_lora", file=tmp_path / "bad.safetensors", scale=1)], _quiet)
    assert (_draw(pipeline, texts["a TOK"]) == before).all()


# ---------------------------------------------------------------- where they come from


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    path = tmp_path / "files" / "mine.safetensors"
    path.parent.mkdir()
    save_file({"transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.ones(1, 2)}, path)
    return path


@pytest.fixture
def tar(lora_file: Path) -> Path:
    path = lora_file.parent / "trained_model.tar"
    with tarfile.open(path, "w") as out:
        out.add(lora_file, "output/flux_train_replicate/lora.safetensors")
    return path


@pytest.fixture
def web(tmp_path: Path, tar: Path) -> Iterator[str]:
    """A web server for the files; /cut/ breaks off, /away/ redirects to a file, /once/ fails the first time."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tar.parent))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            asked.append(self.path)
            where, _, name = self.path.strip("/").rpartition("/")
            if where == "away":
                self.send_response(302)
                self.send_header("Location", f"file://{tar}" if name == "file" else f"/{name}")
                self.end_headers()
            elif where == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"short")
            elif where == "once" and asked.count(self.path) == 1:
                self.send_error(503)
            else:
                self.path = f"/{name}"
                super().do_GET()

        def log_message(self, *arguments: object) -> None:
            """Nothing: the tests say what they expect."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _fetched(origin: str, tmp_path: Path) -> bytes:
    folder = tmp_path / "fetched"
    folder.mkdir(exist_ok=True)
    return source.fetch(origin, folder, "lora_weights").read_bytes()


def test_a_file_a_folder_a_tar_and_their_addresses_give_the_same(
    lora_file: Path, tar: Path, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.web.time.sleep", lambda seconds: None)
    for origin in (
        *(str(lora_file), str(tar), str(lora_file.parent), f" {lora_file} "),
        *(f"{web}/{path}" for path in ("mine.safetensors", "trained_model.tar?sig=1", "away/mine.safetensors")),
        f"{web}/once/trained_model.tar",
    ):
        assert _fetched(origin, tmp_path) == lora_file.read_bytes(), origin


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        ("{web}/gone.tar", r"127.0.0.1:\d+/gone.tar answers 404"),
        ("{web}/cut/x", "ended after 5 bytes of 1000"),
        ("{web}/away/file", "not allowed|unknown url"),
        ("http://user:secret@127.0.0.1:1/a?key=secret", "could not be fetched"),
        ("file:///etc/passwd", "no file or folder here"),
        ("/no/such/file", "there is no file .* where this runs"),
        ("ftp://127.0.0.1/a", "no file or folder here"),
        ("nonsense", "no Hub id"),
        ("", "no file or folder here"),
    ],
)
def test_what_cannot_be_fetched_is_named_without_its_secrets(
    origin: str, says: str, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.web.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^lora_weights: .*({says})") as caught:
        _fetched(origin.format(web=web), tmp_path)
    assert "secret" not in str(caught.value)


def test_a_download_ends_at_the_limit(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_BYTES", 50)
    with pytest.raises(ValueError, match="larger than"):
        _fetched(f"{web}/mine.safetensors", tmp_path)


def test_of_several_files_the_usual_name_is_meant_else_the_user_is_asked(lora_file: Path, tmp_path: Path) -> None:
    data = lora_file.read_bytes()
    (lora_file.parent / "other.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"holds 2 safetensors files \(mine.safetensors, other.safetensors\)"):
        _fetched(str(lora_file.parent), tmp_path)
    (lora_file.parent / "lora.safetensors").write_bytes(data + b" ")
    assert _fetched(str(lora_file.parent), tmp_path) == data + b" "


# ---------------------------------------------------------------- the command


def test_extra_loras_may_be_repeated_each_with_its_scale() -> None:
    text = "-i prompt=x -i extra_lora=a -i extra_lora_scale=.5 -i extra_lora=b -o p.png -i extra_lora=c -i seed=1"
    kept, more = command.split_extras([*text.split(), "--input=extra_lora_scale=2"])
    assert kept == ["-i", "prompt=x", "-o", "p.png", "-i", "seed=1", "-i", "extra_lora=a", "-i", "extra_lora_scale=.5"]
    assert more == [["extra_lora=b"], ["extra_lora=c", "extra_lora_scale=2"]]


def test_a_wrong_scale_of_a_repeated_lora_and_a_wrong_suffix_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = f"-i prompt=x -i extra_lora=a -i extra_lora=b -i extra_lora_scale=9 -o {tmp_path}/p.gif"
    assert command.main(text.split()) == 2
    told = capsys.readouterr().err
    assert "extra_lora_scale: '9' is not a number from -1 to 3" in told
    assert "p.gif must end in .webp or .jpg or .png" in told


def test_drawing_from_a_picture_leaves_the_models_in_their_own_type() -> None:
    """diffusers would make float32 of them, for good, which no GPU has room for (huggingface/diffusers#12754)."""
    pipeline = generate.open_pipeline(TOY, "cpu", torch.bfloat16, offload=False)
    start = Image.new("RGB", (64, 64), "red")
    generate.draw(pipeline, "a red circle", (64, 64), 1, steps=2, tokens=40, start=start)
    white = Image.new("L", (64, 64), 255)
    generate.draw(pipeline, "a red circle", (64, 64), 1, steps=2, tokens=40, start=start, mask=white)
    assert {m.dtype for m in (pipeline.transformer, pipeline.vae, pipeline.text_encoder_2)} == {torch.bfloat16}
