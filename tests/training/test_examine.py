"""The looks of the verdict: what they compare, and that they change nothing."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.flux import adapter, flow
from lora.flux.encode import Example, Text
from lora.training import examine, prior
from lora.training.examine import Examination, Questions
from lora.trigger import Subject

SCHEDULER = {"use_dynamic_shifting": False, "shift": 3.0}


def _questions() -> Questions:
    same = {"a TOK": "a VEK", "a TOK on a table": "a VEK"}
    return Questions(
        captions=dict.fromkeys(examine.OTHERS, same), apart=["a red house"], near={"TOK": ["TEK"]}, far=["VEK"]
    )


def _examination(
    transformer: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text], unseen: int = 1
) -> Examination:
    apart = examine.thinned(prior.draw(transformer, texts, ["a red house"], [(4, 4)], SCHEDULER, seed=1))
    return Examination(transformer, examples[unseen:], examples[:unseen], _questions(), apart, texts, seed=3)


def _held_out(count: int, seed: int = 1, copies: Sequence[int] = ()) -> list[str]:
    return examine.hold_out([f"{i}.jpg" for i in range(count)], {f"{i}.jpg" for i in copies}, seed)


def test_pictures_are_held_out_of_eight_and_two_of_sixteen_and_none_of_fewer() -> None:
    assert [len(_held_out(count)) for count in (1, 7, 8, 15, 16, 20)] == [0, 0, 1, 1, 2, 2]
    assert _held_out(20) == _held_out(20)
    assert {*_held_out(20)} != {*_held_out(20, 2)}


def test_a_picture_that_has_a_copy_is_not_held_out() -> None:
    copies = [0, *range(3, 9)]
    assert {_held_out(9, seed, copies)[0] for seed in range(20)} == {"1.jpg", "2.jpg"}
    assert _held_out(10, copies=range(10)) == []


SHAPES = {"tall ": ((6, 2), 3), "square ": ((4, 4), 4)}


def test_pictures_of_several_shapes_are_looked_at() -> None:
    """At one resolution a shape has some tokens fewer than another: 999 of 4:3 and 1014 of 3:2 at 512 pixels."""

    def photo(name: str, size: tuple[int, int], tokens: int) -> Example:
        noise = torch.zeros(tokens, 16)
        return Example(name=f"{name} at 32x32", size=size, mean=noise, std=noise, caption="a TOK")

    tall, squares = ([photo(f"{name}{i}", *shape) for i in range(4)] for name, shape in SHAPES.items())
    seen = {look.example.name for look in examine.looks([*tall[:3], *squares], seed=1)}
    assert len(seen) == 4
    assert {name[0] for name in seen} == {"s"}, "of the commonest shape, though others have fewer tokens"
    seen = {look.example.name for look in examine.looks([*tall[:2], *squares[:3]], seed=1)}
    assert {name[0] for name in seen} == {"s", "t"}


def test_an_example_is_known_by_its_photo_at_any_size(examples: list[Example]) -> None:
    named = [dataclasses.replace(examples[0], name=f"a at b.jpg at {side}x{side}") for side in (512, 768)]
    assert [examine.photo_of(example) for example in named] == ["a at b.jpg"] * 2


def test_the_questions_have_another_word_in_the_triggers_place_and_none_is_among_the_preservation_prompts(
    examples: list[Example],
) -> None:
    captions = dict.fromkeys(["a TOK on grass", "TOK, close-up"], Subject("TOK", "otter"))
    asked = examine.questions(captions, ("captions", "near"), 5)
    assert asked.captions["noun"]["a TOK on grass"] == "a otter on grass"
    for kind in examine.OTHERS:
        for caption, other in asked.captions[kind].items():
            assert "TOK" not in other
            assert other.replace(other.split()[1] if caption.startswith("a") else other.split(",")[0], "") != other
    assert len(asked.apart) == examine.PROMPTS
    assert {*asked.apart, "a TOK"} < {*asked.prompts()}
    assert "a otter on grass" not in asked.prompts()
    grass, other = dataclasses.replace(examples[0], caption="a TOK on grass"), examples[1]
    wanted = [of_kind["a TOK on grass"] for of_kind in asked.captions.values()]
    assert asked.prompts([grass]) == [*asked.prompts(), *wanted]
    many = [dataclasses.replace(other, name=f"{i}.jpg at 32x32", caption="TOK, close-up") for i in range(30)]
    assert len(asked.prompts([grass], many)) == len(asked.prompts()) + (1 + examine.PICTURES) * len(examine.OTHERS)


def test_of_several_subjects_each_picture_is_asked_about_under_its_own_word_and_under_the_others() -> None:
    anna, bob = Subject("ANNA"), Subject("BOB", "otter")
    asked = examine.questions({"ANNA beside BOB": anna, "a BOB": bob}, ("captions",), 5)
    assert asked.captions["other"] == {"ANNA beside BOB": "BOB beside BOB", "a BOB": "a ANNA"}
    assert asked.captions["noun"] == {"ANNA beside BOB": "thing beside BOB", "a BOB": "a otter"}
    assert asked.captions["far"]["ANNA beside BOB"].endswith(" beside BOB")
    assert {*asked.near} == {"ANNA", "BOB"}


def test_a_look_is_the_flow_loss_on_its_noise_and_timestep(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    asked = examine.looks(examples, seed=3)
    assert len(asked) == examine.LOOKS
    larger = [dataclasses.replace(one, mean=torch.cat([one.mean] * 2)) for one in examples]
    again = examine.looks([*larger, *examples, *examples], seed=3)
    assert [look.example for look in again] == [look.example for look in asked], "each at its smallest size, once"
    assert examine.LEAST_NOISE < asked[0].timestep < asked[-1].timestep < 1
    found = examine.losses(tiny_flux, asked, [look.example.caption for look in asked], texts)
    look = asked[5]
    t = torch.tensor([look.timestep])
    noisy = (1 - t) * look.example.mean[None] + t * look.noise[None]
    text = {key: value[None] for key, value in texts[look.example.caption].items()}
    with torch.no_grad():
        predicted = flow.velocity(tiny_flux, noisy, t, 1.0, text, look.example.size)
    wanted = (predicted - (look.noise - look.example.mean)[None]).square().mean().item()
    assert found[5] == pytest.approx(wanted, rel=1e-4)

    first_alone = torch.eye(len(look.example.mean))[0] * len(look.example.mean)
    weighted = dataclasses.replace(look.example, weights=first_alone)
    found = examine.losses(tiny_flux, [dataclasses.replace(look, example=weighted)], [look.example.caption], texts)
    first = (predicted - (look.noise - look.example.mean)[None])[0, 0].square().mean().item()
    assert found == [pytest.approx(first, rel=1e-4)]


def test_a_lora_that_changes_nothing_gains_nothing_and_has_not_moved(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    examination = _examination(tiny_flux, examples, texts)
    before = examination.start()
    adapter.attach(tiny_flux, 4, seed=3)
    glance = examination.glance(unseen=True)
    examination.last_look_at_unseen(glance)
    measured = examination.measure()
    assert glance.loss == pytest.approx(before)
    assert (glance.own, glance.unseen, glance.drift) == pytest.approx((0, 0, 0), abs=1e-5)
    assert measured.unseen is not None
    assert dataclasses.astuple(measured.trained)[:4] == pytest.approx((0, 0, 0, 0), abs=1e-5)
    assert measured.trained.other is None


def test_a_lora_that_changes_something_is_measured_and_held_out_pictures_only_while_they_are(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    examination = _examination(tiny_flux, examples, texts)
    for parameter in adapter.attach(tiny_flux, 4, seed=3):
        parameter.data += 0.1
    assert examination.glance(unseen=False).unseen is None
    glance = examination.glance(unseen=True)
    assert glance.unseen is not None
    assert glance.drift > 0
    assert glance.own != 0
    assert _examination(copy.deepcopy(tiny_flux), examples, texts, unseen=0).glance(unseen=True).unseen is None


def test_looking_takes_nothing_from_the_trainings_randomness(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    examination = _examination(tiny_flux, examples, texts)
    state = torch.get_rng_state()
    assert examination.glance(unseen=True) == examination.glance(unseen=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_words_that_the_text_encoder_hardly_tells_apart_are_named() -> None:
    def text(*pooled: float) -> Text:
        return {"pooled": torch.tensor(pooled), "prompt_embeds": torch.zeros(1, 1)}

    texts = {"a TOK": text(1, 0), "a TEK": text(1, 0.1), "a KIP": text(1, 1.2), "a VEK": text(0.5, 1)}
    asked = dataclasses.replace(_questions(), near={"TOK": ["TEK", "KIP"]})
    assert examine.confusable(asked, texts) == ["TEK"]


def test_held_out_pictures_are_measured_where_they_were_last_held_out_or_at_the_end_where_they_never_joined(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    joined, stopped = (_examination(tiny_flux, examples, texts) for _ in range(2))
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    joined.last_look_at_unseen(joined.glance(unseen=True))
    for parameter in parameters:
        parameter.data += 0.1
    then, now = joined.measure().unseen, stopped.measure().unseen
    assert then is not None
    assert now is not None
    assert then.own == pytest.approx(0, abs=1e-5)
    assert now.own == pytest.approx(stopped.glance(unseen=True).unseen)
    assert abs(now.own) > 1e-3
