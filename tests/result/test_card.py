"""The model card: what it says of the base, the trigger word and the licence, whatever a user typed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lora.result import card
from tests.test_request import a_request

DECIDED = {
    "base": card.FLUX_DEV,
    "learning_rate": 4e-4,
    "prior_ratio": 0.1,
    "resolutions": (512, 1024),
    "seed": 7,
    "weights_of_step": 700,
}


def _front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def _card(tmp_path: Path, word: str = "TOK", decided: dict[str, Any] = DECIDED, **changes: Any) -> str:
    previews = {"images/0.webp": f"a photo of {word}", "images/1.webp": 'a "plain" beach: empty'}
    request = a_request(tmp_path, trigger_word=word, **changes)
    return card.card("me/my_lora", request, decided, 12, previews, word=word, width=card.FLUX_WIDTH)


@pytest.mark.parametrize(
    "word", ["TOK", '"q"', "a: b", "# x", "`tick`", "- y", "猫 {z}", "\\n", "it's", "|pipe|", "🐶"]
)
def test_the_cards_front_says_licence_base_and_trigger_word_whatever_the_word(word: str, tmp_path: Path) -> None:
    text = _card(tmp_path, word)
    front = _front(text)
    assert front["license"] == "other"
    assert front["license_name"] == "flux-1-dev-non-commercial-license"
    assert front["license_link"].startswith("https://huggingface.co/black-forest-labs/FLUX.1-dev/")
    assert front["base_model"] == card.FLUX_DEV
    assert front["instance_prompt"] == word
    assert {"flux", "lora", "diffusers", "text-to-image", "template:sd-lora"} <= set(front["tags"])
    assert front["widget"] == [
        {"text": f"a photo of {word}", "output": {"url": "images/0.webp"}},
        {"text": 'a "plain" beach: empty', "output": {"url": "images/1.webp"}},
    ]
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert word in code.replace("\\\\", "\\").replace('\\"', '"')


def test_the_card_tells_how_to_use_it_and_how_it_was_trained(tmp_path: Path) -> None:
    text = _card(tmp_path, layers_to_optimize_regex="a|b", training_steps=700)
    for part in ('load_lora_weights("me/my_lora"', "models/loras", "huggingface.co/me/my_lora", "# my\\_lora\n"):
        assert part in text
    for row in (
        "| Pictures | 12 |",
        "| Steps | 700 |",
        "| Learning rate | 0.0004 |",
        "| Prior preservation | 0.1 |",
        "| Resolution | 512, 1024 |",
    ):
        assert row in text
    assert r"| Layers | a\|b |" in text


def test_the_card_tells_of_a_full_fine_tuning(tmp_path: Path) -> None:
    row = "| Trained | the layers' weights, and a LoRA of rank 4 made of their change |"
    assert row in _card(tmp_path, finetune_type="full")
    assert "| Trained |" not in _card(tmp_path)


def test_the_card_of_schnell_has_its_licence_and_that_of_a_packed_lora_no_training(tmp_path: Path) -> None:
    front = _front(_card(tmp_path, decided={**DECIDED, "base": card.FLUX_SCHNELL}))
    assert (front["license"], front["base_model"]) == ("apache-2.0", card.FLUX_SCHNELL)
    assert "| Steps |" not in _card(tmp_path, decided={"base": card.FLUX_DEV}, training_steps=0)


@pytest.mark.parametrize("base", [card.FLUX_KREA, "FLUX.1-krea-dev"])
def test_the_card_of_krea_names_it_whether_it_came_from_the_hub_or_a_folder(base: str, tmp_path: Path) -> None:
    text = _card(tmp_path, decided={**DECIDED, "base": base})
    front = _front(text)
    assert (front["base_model"], front["license_name"]) == (card.FLUX_KREA, "flux-1-dev-non-commercial-license")
    assert f'from_pretrained("{card.FLUX_KREA}"' in text
    assert f"A LoRA for {card.FLUX_KREA}." in text


def test_the_licence_that_a_bases_own_files_tell_comes_before_what_is_known_of_its_name(tmp_path: Path) -> None:
    told = {
        "license": "other",
        "license_name": "club: own",
        "license_link": "https://huggingface.co/club/x/blob/main/L",
    }
    text = _card(tmp_path, decided={**DECIDED, "base": "club/x", "guidance_embeds": True, "licence": told})
    front = _front(text)
    assert {key: front[key] for key in told} == told
    assert front["base_model"] == "club/x"
    assert "That of the base, club: own: https://huggingface.co/club/x/blob/main/L" in text


def test_a_base_without_a_guidance_input_is_drawn_as_schnell_is(tmp_path: Path) -> None:
    text = _card(tmp_path, decided={**DECIDED, "base": "mine", "guidance_embeds": False})
    assert "it fits black-forest-labs/FLUX.1-schnell where" in text
    assert ", num_inference_steps=4, guidance_scale=0.0).images[0]" in text
    assert _front(text)["license"] == "apache-2.0"


def test_the_card_does_not_say_that_a_folder_is_flux_dev(tmp_path: Path) -> None:
    assert "A LoRA for black-forest-labs/FLUX.1-dev. Put" in _card(tmp_path)
    text = _card(tmp_path, decided={**DECIDED, "base": "toyflux"})
    assert "A LoRA for the base in the folder `toyflux`: it fits black-forest-labs/FLUX.1-dev where" in text


def test_the_card_of_a_private_repository_says_that_replicate_needs_a_token(tmp_path: Path) -> None:
    assert "give it a token that may read it as `hf_api_token`" in _card(tmp_path, hf_private=True)
    assert "hf_api_token" not in _card(tmp_path, hf_private=False)


@pytest.mark.parametrize(("header", "word"), [({"modelspec.trigger_phrase": "VEK"}, "VEK"), ({}, None)])
def test_a_packed_lora_has_the_trigger_word_of_its_header_alone(
    header: dict[str, str], word: str | None, tmp_path: Path
) -> None:
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, card.FLUX_WIDTH),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(card.FLUX_WIDTH, 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors", header)
    width, found = card.of_file(tmp_path / "lora.safetensors")
    assert (width, found) == (card.FLUX_WIDTH, word)
    decided = {"base": card.FLUX_DEV, "resume_from_sha256": "…"}
    request = a_request(tmp_path, training_steps=0)
    text = card.card("me/lora", request, decided, 0, {}, word=found, width=width)
    assert _front(text).get("instance_prompt") == word
    assert _front(text)["base_model"] == card.FLUX_DEV
    assert ("Put `VEK` in the prompt" in text) == (word is not None)
    assert "TOK " not in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize("word", ["x" * 61, "a\nb", "  "])
def test_a_header_that_names_no_usable_word_names_none(word: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "lora.safetensors", {"modelspec.trigger_phrase": word})
    assert card.of_file(tmp_path / "lora.safetensors") == (0, None)
