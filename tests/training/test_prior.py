"""The prompts for what the base draws by itself, and the drawing."""

import itertools

import torch
from diffusers import FluxTransformer2DModel

from lora.flux import flow
from lora.flux.encode import Text, stack
from lora.training import prior, words

KINDS = ("things", "made-up words", "captions")


def test_no_prompt_has_the_trigger_word_and_the_users_captions_come_back_with_another() -> None:
    captions = ["a TOK on a sofa", "tok. sleeping (TOK!)"]
    prompts = prior.prompts(captions, "TOK", 90, 1, KINDS)
    assert len(prompts) == 90
    assert not [prompt for prompt in prompts if "tok" in prompt.casefold()]
    assert any(prompt.endswith("on a sofa") for prompt in prompts)
    assert any("in the style of" in prompt for prompt in prompts)
    assert prompts == prior.prompts(captions, "TOK", 90, 1, KINDS)
    assert prompts != prior.prompts(captions, "TOK", 90, 2, KINDS)


def test_each_kind_of_prompt_is_what_it_says() -> None:
    def asked(*kinds: str) -> list[str]:
        return prior.prompts(["a TOK on a sofa"], "TOK", 40, seed=1, kinds=kinds)

    known = {"a", "an", "on", "the", "left", "right", "at", "top", "bottom", "small", "large", "background", "sofa"}
    known |= {*words.THINGS, *words.COLOURS}
    assert all(set(prompt.split()) <= known for prompt in asked("things") + asked("captions of things"))
    assert all(set(prompt.split()) - known for prompt in asked("made-up words") + asked("captions"))
    assert all(prompt.endswith(" on a sofa") for prompt in asked("captions") + asked("captions of things"))


def test_a_trigger_word_of_signs_is_replaced_as_it_stands() -> None:
    for word in (r"\1", "a+b", "[x]", "(", "猫"):
        prompts = prior.prompts([f"{word} in the sun"], word, 30, 0, KINDS)
        assert not [prompt for prompt in prompts if word in prompt]
        assert [prompt for prompt in prompts if prompt.endswith(" in the sun")]


def test_a_trigger_word_inside_another_word_is_none_and_an_ordinary_one_stands_in_no_prompt() -> None:
    prompts = prior.prompts(["an art museum at a starry party, by ART"], "art", 60, 0, KINDS)
    mine = [prompt for prompt in prompts if "museum" in prompt]
    assert len(mine) == 20
    assert all(" museum at a starry party, by " in prompt and not prompt.endswith("ART") for prompt in mine)
    for word in ("red", "Dog", "background"):
        prompts = prior.prompts([f"a {word} here"], word, 300, 0, (*KINDS, "captions of things"))
        assert not [prompt for prompt in prompts if word.casefold() in prompt.casefold().split()]
        assert words.is_ordinary(word)
    assert not words.is_ordinary("TOK")


def test_each_step_kept_is_the_bases_own_prediction_where_the_drawing_stood(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    scheduler = {"use_dynamic_shifting": False, "shift": 3.0}
    kept = prior.draw(tiny_flux, texts, ["a VEK"] * 3, (4, 4), scheduler, seed=1, guidance=3.5, steps=4, batch_size=2)
    assert len(kept) == 3 * 4
    for one, then in itertools.pairwise(sorted({(p.timestep, p.until) for p in kept}, reverse=True)):
        assert one[1] == then[0]
    assert min(p.until for p in kept) == 0
    for p in kept:
        with torch.no_grad():
            text = stack(texts, [p.prompt], p.noisy.device)
            again = flow.velocity(tiny_flux, p.noisy[None], torch.tensor([p.timestep]), 3.5, text, p.size)
        torch.testing.assert_close(again[0], p.velocity, rtol=1e-4, atol=1e-5)
    # From pure noise, and each step on from the last.
    first = [p for p in kept if p.timestep == 1]
    assert len(first) == 3
    times = flow.sigmas(4, 4, scheduler).tolist()
    here, then = kept[0], next(p for p in kept[1:] if p.timestep < 1)
    torch.testing.assert_close(here.noisy + (times[1] - times[0]) * here.velocity, then.noisy)
