"""DreamBooth's benchmark, run small: a subject of the toy base, a tiny DINO and a tiny CLIP."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bench import dreambooth
from lora.flux.base import Base
from tests import tiny_dino

PROMPTS = """Classes

subject_name,class
can,can
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a chef outfit'.format(unique_token, class_token)
]
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "can").mkdir(parents=True)
    (folder / "prompts_and_classes.txt").write_text(PROMPTS)
    for i in range(3):
        picture = Image.new("RGB", (96, 96), (60 * i, 90, 0))
        picture.paste("white", (20, 20, 60, 70))
        picture.save(folder / "can" / f"0{i}.jpg")
    return folder


@pytest.fixture
def clip(tmp_path: Path, toy: Base) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(toy.folder / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=tower | ends | {"vocab_size": len(tokenizer)},
        vision_config=tower | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_a_subject_is_trained_drawn_and_scored_and_a_second_run_goes_on(
    dataset: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLUX_BASE", raising=False)
    monkeypatch.delenv("CAPTIONER", raising=False)
    arguments = [
        str(dataset),
        "--folder",
        str(tmp_path / "out"),
        "--subjects",
        "can",
        "--parts",
        "without preservation",
    ]
    arguments += ["--training-steps", "2", "--drawing-steps", "1", "--clip", str(clip)]
    arguments += ["--dino", str(tiny_dino.write(tmp_path / "dino"))]
    dreambooth.main(arguments)
    [line] = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["subject"], result["part"], result["prompts"]) == ("can", "without preservation", 2)
    assert all(-1 <= result[name] <= 1 and result[name] for name in ("dino", "clip_i", "clip_t"))
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| without preservation | 1 | {result['dino']:.4f} | {result['clip_i']:.4f} |" in table
    assert "| 30 | 0.7324 | 0.8146 | 0.3173 |" in table
    monkeypatch.setattr(dreambooth, "train", lambda *_: pytest.fail("it is trained already"))
    dreambooth.main(arguments)


def test_the_set_is_read_as_it_is_published_and_another_folder_is_refused(dataset: Path, tmp_path: Path) -> None:
    classes, things, live = dreambooth.read_set(dataset)
    assert classes == {"can": "can", "bear_plushie": "stuffed animal"}
    assert things == ["a {0} {1} in the snow", "a red {0} {1}"]
    assert live == ["a {0} {1} in a chef outfit"]
    with pytest.raises(ValueError, match=r"holds no prompts_and_classes\.txt"):
        dreambooth.read_set(tmp_path)


def test_the_table_has_the_mean_over_subjects() -> None:
    one = {"part": "defaults", "dino": 0.5, "clip_i": 0.6, "clip_t": 0.2}
    assert "| defaults | 2 | 0.6000 | 0.6000 | 0.2000 |" in dreambooth.table([one, {**one, "dino": 0.7}])
