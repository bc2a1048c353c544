"""Pictures and prompts as the transformer gets them, held against diffusers' own pipelines."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image

from lora.flux import base, encode, flow
from lora.flux.base import Base
from lora.flux.hardware import Plan


def _pictures() -> list[tuple[str, str, Image.Image]]:
    left = Image.new("RGB", (96, 64), (200, 60, 30))
    left.paste((30, 60, 200), (0, 0, 48, 64))
    return [("a/left.png", "a TOK", left), ("plain.png", "a red TOK", Image.new("RGB", (64, 64), (40, 160, 60)))]


def test_each_record_carries_its_own_name_size_and_caption(toy: Base, cpu: Plan) -> None:
    examples = encode.encode_pictures(toy, cpu, _pictures())
    assert [(e.name, e.caption, e.size) for e in examples] == [
        ("a/left.png at 96x64", "a TOK", (8, 12)),
        ("plain.png at 64x64", "a red TOK", (8, 8)),
    ]
    assert [tuple(e.mean.shape) for e in examples] == [(4 * 6, 64), (4 * 4, 64)]
    with toy.vae(cpu) as vae, torch.no_grad():
        for (_, _, picture), example in zip(_pictures(), examples, strict=True):
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
            wanted = vae.encode(pixels).latent_dist.std * vae.config.scaling_factor
            torch.testing.assert_close(example.std, flow.pack(wanted)[0])


def test_pixels_are_rounded_to_a_gpus_type_once(toy: Base, cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    encode_ = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, pixels: (given.append(pixels), encode_(vae, pixels))[1])
    encode.encode_pictures(toy, dataclasses.replace(cpu, dtype=torch.bfloat16), _pictures()[:1])
    pixels = torch.from_numpy(np.array(_pictures()[0][2])).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(given[0], pixels.bfloat16())


def test_the_latents_decode_to_the_picture_upright_and_in_its_colours(toy: Base, cpu: Plan) -> None:
    examples = encode.encode_pictures(toy, cpu, _pictures())
    with toy.vae(cpu) as vae:
        for (_, _, picture), example in zip(_pictures(), examples, strict=True):
            latents = flow.unpack(example.mean[None], *example.size)
            with torch.no_grad():
                decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample[0]
            pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
            error = pixels - np.asarray(picture, dtype=np.float32)
            assert 20 * np.log10(255 / np.sqrt((error**2).mean())) > 20, example.name


def test_prompts_are_encoded_as_the_whole_pipeline_does(toy: Base, cpu: Plan) -> None:
    long = "a red house " * 60
    texts = encode.encode_texts(toy, cpu, ["a TOK", "", "a TOK", long], toy.t5_tokens)
    assert list(texts) == ["a TOK", "", long]
    pipeline = FluxPipeline.from_pretrained(toy.folder, dtype=torch.float32)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt("a TOK", None, max_sequence_length=toy.t5_tokens)
    # not bit for bit: a product of several prompts is added up in another order
    torch.testing.assert_close(texts["a TOK"]["prompt_embeds"], embeds[0])
    torch.testing.assert_close(texts["a TOK"]["pooled"], pooled[0])
    batch = encode.stack(texts, ["", "a TOK"], torch.device("cpu"))
    assert torch.equal(batch["pooled"][1], texts["a TOK"]["pooled"])
    assert batch["prompt_embeds"].shape == (2, toy.t5_tokens, embeds.shape[-1])


@pytest.mark.parametrize(
    ("counts", "limit", "length"),
    [
        ([], 512, 256),
        ([3, 256], 512, 256),
        ([257, 3], 512, 384),
        ([384], 512, 384),
        ([385], 512, 512),
        ([900], 512, 512),  # cut, which the log says
        ([300], 256, 256),  # FLUX.1-schnell
        ([3], 40, 40),  # the toy base
        ([3], 300, 256),
        ([260], 300, 300),
    ],
)
def test_the_texts_are_as_short_as_the_longest_allows_and_never_longer_than_the_base_reads(
    counts: list[int], limit: int, length: int
) -> None:
    chosen, why = encode.text_length(counts, limit)
    assert chosen == length
    assert f"the longest prompt has {max(counts, default=0)}" in why


def test_a_base_that_reads_512_tokens_is_trained_and_drawn_with_the_256_that_hold_the_prompts(
    toy: Base, cpu: Plan, tmp_path: Path
) -> None:
    shutil.copytree(toy.folder, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 512}))
    roomy = base.find(str(tmp_path / "base"), None)
    _, count = roomy.token_counters()
    length, _ = encode.text_length([count("a TOK")], roomy.t5_tokens)
    texts = encode.encode_texts(roomy, cpu, ["a TOK"], length)
    assert texts["a TOK"]["prompt_embeds"].shape[0] == 256
    with roomy.text(cpu) as pipeline, torch.no_grad():
        embeds, _, _ = pipeline.encode_prompt("a TOK", None, max_sequence_length=256)
    assert torch.equal(texts["a TOK"]["prompt_embeds"], embeds[0])


def test_a_mask_weighs_each_token_by_its_pixels_and_pictures_without_one_stay_as_they_are(toy: Base, cpu: Plan) -> None:
    """By hand: a token is 16 x 16 pixels, black counts a tenth, and the mean is 1."""
    plain = encode.encode_pictures(toy, cpu, _pictures())
    assert all(example.weights is None for example in plain)
    (name, caption, masked), other = _pictures()
    mask = Image.new("L", masked.size)
    mask.paste(255, (0, 0, 40, 32))  # two columns and a half of the upper two rows
    masked.putalpha(mask)
    one, two = encode.encode_pictures(toy, cpu, [(name, caption, masked), other])
    assert torch.equal(one.mean, plain[0].mean)
    row = torch.tensor([1, 1, 0.5, 0.1, 0.1, 0.1])
    wanted = torch.stack([row, row, torch.full((6,), 0.1), torch.full((6,), 0.1)])
    assert one.weights is not None
    torch.testing.assert_close(one.weights, (wanted / wanted.mean()).flatten())
    assert torch.equal(two.weights, torch.ones(16))


def test_batches_have_one_size_and_at_most_so_many() -> None:
    items = ["aa", "b", "cc", "dd", "e", "ff", "ggg"]
    assert list(encode.in_batches(items, len, 3)) == [
        (2, ["aa", "cc", "dd"]),
        (2, ["ff"]),
        (1, ["b", "e"]),
        (3, ["ggg"]),
    ]
    assert list(encode.in_batches([], len, 3)) == []
