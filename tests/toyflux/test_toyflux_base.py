"""The base that lies in `toyflux/base`: whole, small, loadable offline by diffusers, and what it draws.

Bounds are the aims; where the base is short of one (its card says so), what was measured less the noise of 64 draws.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from toyflux import autoencoder, drawing, evaluate, examples, judge, stage, text, train_judge, world

BASE = Path(__file__).parents[2] / "toyflux" / "base"


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return evaluate.load(BASE)


@pytest.fixture(scope="module")
def shares(pipeline: FluxPipeline) -> dict[str, float]:
    scenes = evaluate.held_out_scenes(64)
    return evaluate.score(scenes, evaluate.generate(pipeline, [world.caption(s) for s in scenes], range(64)))


def test_the_folder_is_a_flux_pipeline_of_at_most_15_mb_that_everybody_may_read() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    index = json.loads((BASE / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    assert index["text_encoder_2"] == ["transformers", "T5EncoderModel"]


def test_text_lengths_stand_in_its_files_and_hold_two_things_in_a_style(pipeline: FluxPipeline) -> None:
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.tokenizer.model_max_length == 77
    star = world.Thing(shape="star", colour="purple", fill="striped")
    two = tuple(world.Item(look=star, place=place) for place in ("left", "right"))
    longest = world.caption(world.Scene(items=two, background="orange", style=world.UNSEEN_STYLES[0]))
    assert len(pipeline.tokenizer_2(longest).input_ids) <= pipeline.tokenizer_2.model_max_length


def test_made_up_words_lie_at_least_half_as_far_apart_as_known_ones(pipeline: FluxPipeline) -> None:
    def spread(words: tuple[str, ...]) -> tuple[float, float]:
        captions = [f"a {word} on a green background" for word in words]
        length = pipeline.tokenizer_2.model_max_length
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(captions, None, max_sequence_length=length)
        others = ~torch.eye(len(words), dtype=torch.bool)
        apart = (pooled[:, None] - pooled[None]).norm(dim=-1)[others].mean() / pooled.norm(dim=-1).mean()
        moved = (tokens[:, None] - tokens[None]).norm(dim=-1).amax(-1)[others].mean() / tokens.norm(dim=-1).mean()
        return float(apart), float(moved)

    known, unknown = spread(world.SHAPES), spread(world.unknown_words(12))
    assert unknown[0] >= 0.5 * known[0]
    assert unknown[1] >= 0.5 * known[1]


@pytest.mark.parametrize(
    ("question", "least"),
    [("what 1", 0.9), ("colour 1", 0.95), ("background", 0.95), ("place 1", 0.9), ("size 1", 0.9)],
)
def test_it_draws_combinations_that_it_never_saw(shares: dict[str, float], question: str, least: float) -> None:
    assert shares[question] >= least


def test_edges_are_at_least_seven_tenths_as_sharp_as_in_true_pictures(shares: dict[str, float]) -> None:
    assert 0.7 <= shares["sharpness"] <= 1.2
    assert shares["clean"] >= 0.95


def test_guidance_matters(pipeline: FluxPipeline) -> None:
    captions = [world.caption(scene) for scene in evaluate.held_out_scenes(4)]
    one, four = (evaluate.generate(pipeline, captions, range(4), guidance=guidance) for guidance in (1.0, 4.0))
    pairs = zip(one, four, strict=True)
    assert np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]) > 3


@pytest.mark.parametrize("size", [(112, 80), (64, 144)])
def test_pictures_that_are_not_square_hold_what_was_asked_for(pipeline: FluxPipeline, size: tuple[int, int]) -> None:
    scenes = evaluate.held_out_scenes(24, 1)
    images = evaluate.generate(pipeline, [world.caption(s) for s in scenes], range(24), size=size)
    shares = evaluate.score(scenes, images)
    assert shares["background"] >= 0.9
    assert shares["what 1"] >= 0.7


def test_another_made_up_word_draws_another_picture(pipeline: FluxPipeline) -> None:
    words = world.unknown_words(6)
    images = evaluate.generate(pipeline, [f"a {word} on a white background" for word in words], [0] * 6)
    arrays = [np.asarray(image, np.float32) for image in images]
    assert np.mean([np.abs(a - b).mean() for i, a in enumerate(arrays) for b in arrays[:i]]) > 5


def test_the_autoencoder_carries_the_world(pipeline: FluxPipeline) -> None:
    rng = random.Random(4)
    side = pipeline.vae.config.sample_size
    x = autoencoder.to_tensor([drawing.draw(world.training_scene(rng), i, (side, side)) for i in range(16)])
    with torch.no_grad():
        y = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    ratio = -10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()
    assert ratio.mean() >= 30


def test_the_autoencoder_leaves_creatures_as_the_judge_knows_them(pipeline: FluxPipeline) -> None:
    """No base can draw better than this: measured .97 and more."""
    look = world.EXAMPLES["subject"]
    assert isinstance(look, world.Creature)
    x = autoencoder.to_tensor([image for image, _ in examples.subject_set(look, 20, seed=3)])
    with torch.no_grad():
        y = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample
    pictures = pipeline.image_processor.postprocess(y, output_type="pil")
    assert np.mean(judge.shows(pictures, look)) >= 0.9


@pytest.mark.parametrize("ink", world.INKS[1:])
def test_the_autoencoder_leaves_inks_nearly_as_well_as_the_judge_knows_them(pipeline: FluxPipeline, ink: str) -> None:
    """No LoRA could teach a style in an ink that is lost here. Measured: outlines known in .73, in .70 of those that
    come back; hatching in all of both."""
    rng = random.Random(6)
    manners = [replace(train_judge.any_style(rng), ink=ink, edge="none", tone="none") for _ in range(64)]
    pictures = [
        drawing.draw(world.sample_scene(rng, [world.sample_thing(rng, plain=True)], manner), i)
        for i, manner in enumerate(manners)
    ]
    with torch.no_grad():
        latents = pipeline.vae.encode(autoencoder.to_tensor(pictures)).latent_dist.mode()
        back = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pil")
    true, kept = ([reading.traits["ink"] == ink for reading in judge.read(images)] for images in (pictures, back))
    assert np.mean(true) >= 0.7
    assert np.mean(kept) >= 0.85 * np.mean(true)


@pytest.mark.parametrize(("ink", "least"), [("hatched", 0.85), ("outline", 0.35)])
def test_it_draws_its_own_styles_in_their_inks(pipeline: FluxPipeline, ink: str, least: float) -> None:
    """Measured: hatched ones in .98, as the judge knows true ones; outlines in .48, of which the judge knows .65."""
    rng = random.Random(7)
    manners = [manner for manner in map(world.style, world.STYLE_NAMES) if manner.ink == ink]
    scenes = [world.sample_scene(rng, [world.sample_thing(rng, plain=True)], rng.choice(manners)) for _ in range(48)]
    images = evaluate.generate(pipeline, [world.caption(scene) for scene in scenes], range(48))
    assert np.mean([reading.traits["ink"] == ink for reading in judge.read(images)]) >= least


def test_workers_and_later_runs_read_words_alike(tmp_path: Path) -> None:
    machine = stage.Machine(rank=0, workers=1, device="cpu", work=tmp_path)
    captions = [f"a {word} at the top" for word in world.unknown_words(50)]
    one, two = (text.shared_clip_tokenizer(machine)(captions).input_ids for _ in range(2))
    assert one == two
