"""The safety checker, with a real classifier, small and taught in a moment, loaded as a large one is."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lora.flux import safety
from tests import tiny_vit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safety") / "checker"
    tiny_vit.write(folder)
    return folder


def test_it_withholds_what_its_model_calls_unsafe_and_nothing_else(model: Path) -> None:
    checker, line = safety.find(str(model))
    assert checker is not None
    assert line == f"safety checker: {model}"
    green, red = Image.new("RGB", (96, 64), (0, 255, 0)), Image.new("RGB", (96, 64), (255, 0, 0))
    assert checker.withholds(green)
    assert not checker.withholds(red)
    assert 0 <= checker.score(red) < 0.5 < checker.score(green) <= 1


def test_its_score_is_the_probability_that_transformers_own_pipeline_gives(model: Path) -> None:
    from transformers import pipeline

    checker, _ = safety.find(str(model))
    assert checker is not None
    picture = Image.linear_gradient("L").resize((80, 60)).convert("RGB")
    theirs = {answer["label"]: answer["score"] for answer in pipeline("image-classification", str(model))(picture)}
    assert checker.score(picture) == pytest.approx(theirs["nsfw"], abs=1e-6)


def test_where_none_is_named_and_none_is_here_a_line_says_that_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(safety, "USUAL", "nobody/has-this-one")
    checker, line = safety.find(None)
    assert checker is None
    assert "pictures are not checked" in line
    assert safety.find("none")[0] is safety.find("")[0] is None


def test_the_usual_one_is_taken_where_it_is_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "USUAL", str(model))
    assert safety.find(None)[0] is not None


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1"), ("cat", "not_nsfw"), ("porn", "nsfw")])
def test_a_classifier_of_other_things_is_refused(labels: tuple[str, str], tmp_path: Path) -> None:
    tiny_vit.write(tmp_path, labels)
    with pytest.raises(ValueError, match=rf"^SAFETY: .*\({labels[0]}, {labels[1]}\) do not tell safe from unsafe"):
        safety.find(str(tmp_path))


def test_one_that_is_named_and_cannot_be_loaded_is_an_error_and_no_pickle_is_opened(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^SAFETY: '.*' cannot be loaded as an image classifier"):
        safety.find(str(tmp_path))
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^SAFETY: "):
        safety.find(str(tmp_path))
