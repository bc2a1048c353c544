"""The recipe: which row a base gets, and the learning rate at another width or rank."""

import pytest

from lora.training import prompts, recipe
from lora.trigger import Subject


@pytest.mark.parametrize("lora_type", ["subject", "style"])
def test_a_small_base_gets_the_toys_row_and_a_real_one_that_of_flux(lora_type: str) -> None:
    row, why = recipe.choose(1024, lora_type)
    assert row is recipe.FLUX_DEV[lora_type]
    assert "1024 pixels" in why
    assert recipe.choose(96, lora_type)[0] is recipe.TOY[lora_type]


def test_a_style_on_flux_is_not_trained_hotter_than_the_field_does() -> None:
    assert recipe.FLUX_DEV["style"].learning_rate == 4e-4


def test_the_rate_is_the_rows_on_flux_and_grows_for_narrow_models() -> None:
    subject, style = recipe.FLUX_DEV["subject"], recipe.TOY["style"]
    assert recipe.learning_rate_for(subject, 3072, 16)[0] == subject.learning_rate
    assert recipe.learning_rate_for(subject, 3072, 1)[0] == subject.learning_rate
    rate, why = recipe.learning_rate_for(style, 128, 16)
    assert rate == pytest.approx(style.learning_rate * 24**0.75)
    assert "(3072/128)^0.75" in why


def test_the_rate_falls_with_the_root_of_a_rank_above_16_and_says_so() -> None:
    row = recipe.FLUX_DEV["style"]
    rate, why = recipe.learning_rate_for(row, 3072, 64)
    assert rate == pytest.approx(row.learning_rate / 2)
    assert why.endswith("times (16/64)^0.5 for the rank")


@pytest.mark.parametrize("lora_type", ["subject", "style"])
def test_whole_weights_are_trained_as_long_and_as_hot_as_flux_pro_trainer_does(lora_type: str) -> None:
    rate, (steps, _), why = recipe.of_full(recipe.FLUX_DEV[lora_type], 3072)
    assert (rate, steps) == (1e-5, 300)
    assert why == "1e-05 for finetune_type full at FLUX.1-dev's width"
    row = recipe.TOY[lora_type]
    rate, _, why = recipe.of_full(row, 128)
    assert rate == pytest.approx(row.full_learning_rate * 24**0.75)
    assert "(3072/128)^0.75" in why


@pytest.mark.parametrize("row", [*recipe.FLUX_DEV.values(), *recipe.TOY.values()])
def test_every_row_asks_for_kinds_of_prompts_that_exist(row: recipe.Recipe) -> None:
    assert len(prompts.apart({"a TOK": Subject("TOK")}, row.prior_prompts, 1, row.prior_kinds)) == row.prior_prompts
