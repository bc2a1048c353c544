"""The captioner on a tiny real Qwen3-VL, and on scripted answers."""

import json
import re
import shutil
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLImageProcessorPil

from bench import captioner as benchmark
from captioner import look, questions, text
from captioner.caption import caption_all, caption_pictures, locate, whether_to_ask
from captioner.model import (
    GRID,
    MAX_PIXELS,
    MIN_PIXELS,
    MODEL,
    Captioner,
    fit_to_model,
    is_at_hand,
    load,
    weights_at_hand,
)
from captioner.text import Rules
from script import caption as command
from tests import hub_server, tiny_qwen

SUBJECT = Rules(
    trigger_word="TOK",
    lora_type="subject",
    prefix="",
    suffix="",
    class_noun=None,
    t5=text.Room(text.estimate_tokens, 512),
    clip=text.Room(text.estimate_tokens, 77),
)
SIZES = [(300, 200), (1, 1), (8000, 200), (64, 900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.build(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Iterator[Captioner]:
    with load(str(folder), "cpu", torch.float32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.linear_gradient("L").resize(size).rotate(90 * i).convert("RGB") for i, size in enumerate(SIZES)]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """Six small pictures, by name."""
    named = {f"{i}.png": tmp_path / "pictures" / f"{i}.png" for i in range(6)}
    (tmp_path / "pictures").mkdir()
    for i, path in enumerate(named.values()):
        picture = Image.new("RGB", (40 + i, 30), (40 * i, 0, 99))
        picture.paste((250, 40 * i, 0), (5 + 4 * i, 5, 15 + 4 * i, 25))  # one colour alone would be a blank picture
        picture.save(path)
    return named


def read(path: Path, pixels: int) -> Image.Image:
    assert pixels == 768**2
    with Image.open(path) as image:
        return image.convert("RGB")


def script(captioner: Captioner, monkeypatch: pytest.MonkeyPatch, answers: Sequence[str]) -> list[str]:
    """Has the model answer these texts, one for each picture asked about; returns what it is asked, as it grows."""
    waiting, asked = list(answers), []
    tokenizer = captioner.processor.tokenizer

    def generate(input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        asked.extend(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        said = [waiting.pop(0) + "<|im_end|>" for _ in input_ids]
        return torch.cat([input_ids, tokenizer(said, padding=True, return_tensors="pt")["input_ids"]], dim=1)

    monkeypatch.setattr(captioner.model, "generate", generate)
    return asked


# --- the model


def tokens(captioner: Captioner, pictures: Sequence[Image.Image], question: str, begin: str) -> list[list[int]]:
    """What the model generates for each picture, to the end of its turn."""
    inputs = captioner.inputs(pictures, question, begin)
    said = captioner.model.generate(**inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = captioner.model.generation_config.eos_token_id
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in said]


@pytest.mark.parametrize("begin", ["", "A photo of <|image_pad|>"])
def test_a_batch_says_token_for_token_what_its_pictures_say_alone(
    captioner: Captioner, pictures: list[Image.Image], begin: str
) -> None:
    question = "What does <|image_pad|> do?"
    together = tokens(captioner, pictures, question, begin)
    assert together == [tokens(captioner, [picture], question, begin)[0] for picture in pictures]
    assert len({tuple(row) for row in together}) == len(pictures)  # they say different things, so this can fail


def test_the_model_runs_without_torchvision(captioner: Captioner, pictures: list[Image.Image]) -> None:
    assert len(captioner.answer(pictures[:1], "What is it?", tokens=2)) == 1
    assert "torchvision" not in sys.modules


def test_answers_are_greedy_whatever_the_hub_says(captioner: Captioner, folder: Path) -> None:
    assert json.loads((folder / "generation_config.json").read_text())["do_sample"]
    used, _ = captioner.model._prepare_generation_config(None)
    assert (used.do_sample, used.num_beams, used.repetition_penalty, used.no_repeat_ngram_size) == (False, 1, 1.0, 0)
    assert captioner.processor.tokenizer.decode(used.eos_token_id) == "<|im_end|><|endoftext|>"


@pytest.mark.parametrize(
    "word", ["<|image_pad|>", "<|im_end|>", '"q"', "🐕‍🦺", "كلب صغير", "小狗", "x" * 60, "\\n{{ 7 }}"]
)
def test_odd_trigger_words_reach_the_model_as_plain_text(
    captioner: Captioner, pictures: list[Image.Image], word: str
) -> None:
    inputs = captioner.inputs(pictures[:2], f"Who is {word}?", f"It is {word}")
    tokenizer = captioner.processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    in_picture = inputs["image_grid_thw"].prod(dim=1) // 4
    assert (inputs["input_ids"] == image).sum(dim=1).tolist() == in_picture.tolist()
    without_pictures = [[token for token in row if token != image] for row in inputs["input_ids"].tolist()]
    for row in tokenizer.batch_decode(without_pictures):
        assert row.endswith(f"<|vision_end|>Who is {word}?<|im_end|>\n<|im_start|>assistant\nIt is {word}")


def test_the_fused_patch_embedding_is_the_convolution_of_the_file(captioner: Captioner, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kernel, bias = (weights[f"model.visual.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    patches = torch.randn(5, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    convolved = torch.nn.functional.conv3d(patches.view(5, 3, 2, 16, 16), kernel, bias, stride=(2, 16, 16))
    torch.testing.assert_close(captioner.model.model.visual.patch_embed(patches), convolved.view(5, -1))


@pytest.mark.parametrize("size", [*SIZES, (4000, 3000), (768, 768), (257, 255), (5000, 1), (1, 300)])
def test_pictures_are_scaled_as_the_models_own_processor_scales_them(folder: Path, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    fitted = fit_to_model(picture)
    assert fitted.width % GRID == fitted.height % GRID == 0
    assert fit_to_model(fitted) is fitted
    if max(size) <= 200 * min(size):
        stock = Qwen2VLImageProcessorPil.from_pretrained(
            folder, size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
        )
        assert stock(picture)["image_grid_thw"].tolist() == [[1, fitted.height // 16, fitted.width // 16]]


def test_a_model_of_the_hub_is_downloaded_with_all_that_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    with hub_server.asked_by_the_library(monkeypatch, tmp_path) as hub:
        hub.private["club/qwen"] = False
        hub.files["club/qwen"] = {file.name: file.read_bytes() for file in folder.iterdir()}
        with load("club/qwen", "cpu", torch.float32) as fetched, load(str(folder), "cpu", torch.float32) as local:
            assert fetched.answer(pictures[:1], "What is it?") == local.answer(pictures[:1], "What is it?")


def test_a_model_with_tied_weights_such_as_the_4b_loads_whole(tmp_path: Path) -> None:
    tiny_qwen.build(tmp_path, tied=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with load(str(tmp_path), "cpu", torch.float32) as captioner:
        assert captioner.model.lm_head.weight is captioner.model.get_input_embeddings().weight


def test_the_memory_is_given_back_also_after_an_error(folder: Path, pictures: list[Image.Image]) -> None:
    held: list[weakref.ref[Any]] = []

    def use(captioner: Captioner) -> None:
        captioner.answer(pictures[:1], "What is it?", tokens=2)
        held.extend(weakref.ref(thing) for thing in (captioner.model, *captioner.model.parameters()))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), load(str(folder), "cpu", torch.float32) as captioner:
        use(captioner)
    assert len(held) > 50
    assert not [ref for ref in held if ref() is not None]
    with pytest.raises(AttributeError):
        captioner.answer(pictures[:1], "What is it?")


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _with_cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _with_a_weight_less(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.visual.patch_embed.proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"] | {"model_type": "qwen3"}))


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_config, "config"),
        (_without_weights, "model.safetensors"),
        (_with_cut_weights, "incomplete|[Mm]etadata"),
        (_with_a_weight_less, "lack 1 weights, model.visual.patch_embed"),
        (_of_another_kind, "qwen3 model, not a qwen3_vl one"),
        (_without_tokenizer, "tokenizer"),
    ],
)
def test_a_model_that_cannot_be_loaded_whole_is_an_error_with_ways_out(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoiled = Path(shutil.copytree(folder, tmp_path / "spoiled"))
    spoil(spoiled)
    with (
        pytest.raises(ValueError, match=rf"(?s)spoiled cannot be loaded: .*({reason})") as error,
        load(str(spoiled), "cpu", torch.float32),
    ):
        pass
    assert "CAPTIONER" in str(error.value)
    assert "captioning=disabled" in str(error.value)


# --- whether it is asked


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with an index of two shards in it; the folder for its files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--Qwen--Qwen3-VL-8B-Instruct"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    return snapshot


def test_a_model_is_at_hand_when_every_file_of_it_is(cached: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model-1.safetensors"):
        (cached / name).touch()
        assert not is_at_hand(MODEL)
        assert weights_at_hand(MODEL) == []
    (cached / "model-2.safetensors").touch()
    assert is_at_hand(MODEL)
    assert weights_at_hand(MODEL) == [cached / "model-1.safetensors", cached / "model-2.safetensors"]
    (tmp_path / "own.safetensors").touch()
    assert weights_at_hand(str(tmp_path)) == [tmp_path / "own.safetensors"]
    assert is_at_hand(str(tmp_path))
    assert not is_at_hand("Qwen/Qwen3-VL-2B-Instruct")
    assert not is_at_hand("/no/such/folder")


@pytest.mark.parametrize(
    ("device", "captioning", "missing", "asking", "reason"),
    [
        ("cuda", "automatic", 0, False, "all 9 pictures have a caption of yours"),
        ("cuda", "disabled", 2, False, "captioning is disabled"),
        ("cuda", "automatic", 2, True, "2 of 9 pictures have no caption; loading"),
        ("cuda", "all", 0, True, "to write new ones for all 9 pictures"),
        (
            "cpu",
            "automatic",
            2,
            False,
            "Qwen/Qwen3-VL-8B-Instruct is not here .without a GPU it is not downloaded., so they get a template",
        ),
        ("cpu", "all", 0, False, "^captioning is all, and the captioning model .* is not here .*, so all keep yours"),
    ],
)
def test_the_model_is_asked_only_where_a_caption_is_missing(
    cached: Path, device: str, captioning: str, missing: int, asking: bool, reason: str
) -> None:
    found = whether_to_ask(MODEL, device, captioning=captioning, missing=missing, of=9)
    assert found[0] is asking
    assert re.search(reason, found[1])


# --- captions


def all_captions(
    paths: dict[str, Path], given: dict[str, str], model: str, **changed: Any
) -> tuple[dict[str, text.Caption], str | None, list[str]]:
    log: list[str] = []
    settings = {"captioning": "automatic", "device": "cpu", "dtype": torch.float32, "read": read} | changed
    rules = dict.fromkeys(paths, SUBJECT)
    captions, nouns, _ = caption_all(paths, given, rules, model=model, log=log.append, **settings)
    return captions, nouns[SUBJECT.trigger_word], log


def test_users_captions_win_and_nothing_is_loaded_where_none_is_missing(paths: dict[str, Path]) -> None:
    given = {name: f"TOK number {name}" for name in paths}
    captions, noun, log = all_captions(paths, given, "/no/such/model", device="cuda")
    assert {name: caption.text for name, caption in captions.items()} == given
    assert noun is None
    assert "not loaded" in log[0]
    assert log[1:] == text.table(captions)


def test_pictures_of_several_subjects_are_captioned_each_by_its_own_rules(
    folder: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(_: Captioner, pictures: list[Image.Image], question: str, *__: object) -> list[str]:
        asked.append(question)
        noun = "woman" if len(pictures) == 2 else "dog"
        return [noun if question == questions.CLASS_NOUN_QUESTION else f"A {noun} stands on sand."] * len(pictures)

    monkeypatch.setattr(Captioner, "answer", answer)
    anna, bob = (text.of_word(SUBJECT, word, None) for word in ("ANNA", "BOB"))
    names = list(paths)[:5]
    captions, nouns, _ = caption_all(
        {name: paths[name] for name in names},
        {},
        {name: anna if i < 2 else bob for i, name in enumerate(names)},
        model=str(folder),
        log=lambda line: None,
        captioning="automatic",
        device="cpu",
        dtype=torch.float32,
        read=read,
    )
    assert nouns == {"ANNA": "woman", "BOB": "dog"}
    assert [captions[name].text for name in names] == [
        *["ANNA woman stands on sand."] * 2,
        *["BOB dog stands on sand."] * 3,
    ]
    assert any("ANNA" in question for question in asked)
    assert not [question for question in asked if "ANNA" in question and "BOB" in question]


def test_captioning_all_writes_new_ones_and_keeps_the_users_beside_them(
    folder: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: Captioner, pictures: list[Image.Image], question: str, *__: object) -> list[str]:
        return ["A dog runs on sand." if len(pictures) == 4 else "I'm sorry."] * len(pictures)

    monkeypatch.setattr(Captioner, "answer", answer)
    given = {"1.png": "TOK mine", "5.png": "TOK also mine"}
    captions, _, log = all_captions(paths, given, str(folder), captioning="all")
    assert captions["1.png"] == text.Caption(text="TOK, a dog runs on sand.", source="model", own="TOK mine")
    assert "1.png: yours was: TOK mine" in log
    kept = captions["5.png"]
    assert (kept.text, kept.source, kept.own) == ("TOK also mine", "yours", None), "a template would say less"
    assert "both answers were rejected" in kept.note
    assert captions["4.png"].source == "template"
    captions, _, _ = all_captions(paths, given, "/no/such/model", captioning="all")
    assert captions["1.png"] == text.Caption(text="TOK mine", source="yours"), "without a model the user's are used"


def test_the_model_is_asked_once_more_where_the_subject_is_and_what_it_says_amiss_is_no_box(
    folder: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = {"0.png": '```json\n[{"bbox_2d": [100, 200, 350, 1000], "label": "dog"}]\n```', "3.png": "[]"}
    asked: list[str] = []

    def answer(_: Captioner, pictures: list[Image.Image], question: str, *__: object) -> list[str]:
        asked.append(question)
        if "bbox" not in question:
            return ["dog" if "common English noun" in question else "A dog runs on sand."] * len(pictures)
        return [boxes.get(f"{picture.getpixel((0, 0))[0] // 40}.png", "the left") for picture in pictures]  # type: ignore[index]

    monkeypatch.setattr(Captioner, "answer", answer)
    settings: Any = {"captioning": "automatic", "device": "cpu", "dtype": torch.float32, "read": read, "log": print}
    _, _, located = caption_all(paths, {}, dict.fromkeys(paths, SUBJECT), model=str(folder), locating=True, **settings)
    assert located == {"0.png": (0.1, 0.2, 0.35, 1.0)}
    assert any("the dog that is the main subject" in question for question in asked)
    asked.clear()
    assert caption_all(paths, {}, dict.fromkeys(paths, SUBJECT), model=str(folder), **settings)[2] == {}
    assert not any("bbox" in question for question in asked)


def test_the_model_itself_is_asked_where_the_subject_is(captioner: Captioner, paths: dict[str, Path]) -> None:
    """Random weights say nothing that is a box: that it is read as none, not as an error, is what is seen here."""
    log: list[str] = []
    assert locate(captioner, paths, "dog", read=read, batch_size=4, log=log.append) == {}
    assert [line.split(",")[0] for line in log] == ["subjects located: 4 of 6", "subjects located: 6 of 6"]


def test_without_gpu_and_model_the_missing_ones_get_a_template_and_it_is_said(paths: dict[str, Path]) -> None:
    captions, _, log = all_captions(paths, {"2.png": "TOK mine"}, "/no/such/model")
    assert list(captions) == list(paths)
    assert [caption.source for caption in captions.values()] == ["template"] * 2 + ["yours"] + ["template"] * 3
    assert captions["0.png"].text == "A photo of TOK"
    assert "5 of 6 pictures have none, and the captioning model /no/such/model is not here" in log[0]


def test_on_a_gpu_a_model_that_cannot_be_loaded_is_an_error(paths: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"(?s)/no/such/model cannot be loaded.*CAPTIONER.*captioning=disabled"):
        all_captions(paths, {}, "/no/such/model", device="cuda")
    assert (
        all_captions(paths, {}, "/no/such/model", device="cuda", captioning="disabled")[0]["0.png"].source == "template"
    )


def test_the_real_model_captions_what_is_missing(paths: dict[str, Path], folder: Path) -> None:
    few = {name: paths[name] for name in ("0.png", "1.png")}
    captions, _, log = all_captions(few, {"0.png": "TOK mine"}, str(folder))
    assert captions["0.png"].text == "TOK mine"
    assert captions["1.png"].source == "template"  # random weights talk nonsense
    assert "both answers were rejected: " in captions["1.png"].note
    assert any(line.startswith("captions: 1 of 1, ") and line.endswith(" pictures/s") for line in log)
    assert log[-3:] == text.table(captions)


def test_every_answer_ends_as_a_sound_caption_with_its_source(
    captioner: Captioner, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = script(
        captioner,
        monkeypatch,
        [
            *("Dog.", "dog", "a dog", "puppy", "Dog", "dog"),
            "I'm sorry, I can't help with that.",
            "A dog on a mat on a mat on a mat on a mat on a mat on a mat.",
            "The image shows a small dog on a red sofa. It looks up. The overall mood is calm.",
            "一只小狗在草地上奔跑。",
            "A dog runs on sand. The sea behind it is calm and",
            "",
            *(
                " runs over grass under trees.",
                "I cannot say.",
                ", seen from above, sleeps.",
                " TOK dog lies on a bed.",
            ),
        ],
    )
    log: list[str] = []
    captions, noun = caption_pictures(captioner, paths, SUBJECT, read=read, batch_size=4, log=log.append)
    assert noun == "dog"
    assert {name: (caption.source, caption.text) for name, caption in captions.items()} == {
        "0.png": ("retried", "TOK dog runs over grass under trees."),
        "1.png": ("template", "A photo of TOK dog"),
        "2.png": ("model", "TOK dog on a red sofa. It looks up."),
        "3.png": ("retried", "TOK dog, seen from above, sleeps."),
        "4.png": ("model", "TOK dog runs on sand."),
        "5.png": ("retried", "TOK dog TOK dog lies on a bed."),
    }
    assert captions["0.png"].note == "the first answer was rejected: a refusal: “I'm sorry”"
    assert captions["1.png"].note == "both answers were rejected: it repeats itself; a refusal: “I cannot”"
    assert [line.split(", ")[0] for line in log] == [
        "subjects named: 4 of 6",
        "subjects named: 6 of 6",
        "captions: the subject is a dog",
        "captions: 4 of 6",
        "captions: 6 of 6",
        "captions written again: 4 of 4",
    ]
    assert all(questions.CLASS_NOUN_QUESTION in chat for chat in asked[:6])
    assert all("picture of TOK dog." in chat for chat in asked[6:12])
    assert all(chat.endswith("assistant\nTOK dog") for chat in asked[12:])


def test_a_style_is_not_asked_what_it_is_and_the_prefix_is_put_into_the_models_mouth(
    captioner: Captioner, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    style = Rules(**(vars(SUBJECT) | {"lora_type": "style", "prefix": "Look: ", "suffix": " (1)"}))
    asked = script(captioner, monkeypatch, ["a cat on a chair. It is a cartoon."] * 6)
    captions, noun = caption_pictures(captioner, paths, style, read=read, batch_size=6, log=print)
    assert noun is None
    assert {caption.text for caption in captions.values()} == {"Look: a cat on a chair, in the style of TOK. (1)"}
    assert all(chat.endswith("assistant\nLook:") for chat in asked)


def test_half_the_pictures_are_asked_about_where_memory_runs_out(
    captioner: Captioner, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script(captioner, monkeypatch, ["A dog runs on sand."] * 6)
    scripted = captioner.model.generate

    def generate(input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scripted(input_ids, **others)

    monkeypatch.setattr(captioner.model, "generate", generate)
    log: list[str] = []
    known = Rules(**(vars(SUBJECT) | {"class_noun": "dog"}))
    captions, _ = caption_pictures(captioner, paths, known, read=read, batch_size=6, log=log.append)
    assert {caption.text for caption in captions.values()} == {"TOK dog runs on sand."}
    assert [line for line in log if "out of memory" in line] == [
        "captions: out of memory, continuing with 3 pictures at once",
        "captions: out of memory, continuing with 2 pictures at once",
    ]


# --- script/caption


@pytest.fixture
def set_of_files(paths: dict[str, Path]) -> Path:
    """A user's folder: his own text, an empty one, two pictures with one stem, and junk."""
    folder = paths["0.png"].parent
    (folder / "0.txt").write_text("my TOK")
    (folder / "1.TXT").write_text(" \n")
    shutil.copy(folder / "2.png", folder / "2.jpg")
    (folder / ".DS_Store").touch()
    return folder


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """script/caption finds the tiny model, and it answers well."""
    monkeypatch.setenv("CAPTIONER", str(folder))
    monkeypatch.setattr(Captioner, "answer", lambda self, pictures, *_: ["A dog runs on sand."] * len(pictures))


def test_the_command_writes_what_is_missing_and_never_over_a_users_text(set_of_files: Path, scripted: None) -> None:
    assert command.main([str(set_of_files), "-i", "trigger_word=TIK", "-i", "autocaption_suffix=, film"]) == 0
    written = {file.name: file.read_text() for file in set_of_files.iterdir() if file.suffix.lower() == ".txt"}
    caption = "TIK, a dog runs on sand, film\n"
    others = {name: caption for name in ("1.TXT", "2.jpg.txt", "2.png.txt", "3.txt", "4.txt", "5.txt")}
    assert written == {"0.txt": "my TOK"} | others
    assert command.main([str(set_of_files), "-i", "trigger_word=TIK"]) == 0  # nothing is missing now
    assert (set_of_files / "3.txt").read_text() == caption


def test_the_command_puts_the_trigger_word_into_prefix_and_suffix(set_of_files: Path, scripted: None) -> None:
    ends = ["-i", "caption_prefix=[Trigger] today:", "-i", "autocaption_suffix=, [TRIGGER] style"]
    assert command.main([str(set_of_files), "-i", "trigger_word=TIK,", *ends]) == 0
    assert (set_of_files / "3.txt").read_text() == "TIK today: A dog runs on sand, TIK style\n"


def test_the_command_names_every_damaged_picture_before_it_loads_the_model(
    set_of_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("captioner.caption.load", lambda *_: pytest.fail("the model is loaded"))
    for name in ("4.png", "5.png"):
        (set_of_files / name).write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert command.main([str(set_of_files)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("script/caption: PICTURES: ")
    assert "4.png" in told
    assert "5.png" in told
    assert "input_images" not in told


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_the_check_says_what_will_train_badly_and_writes_nothing(
    packed: bool,
    set_of_files: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    def answer(_: Captioner, pictures: list[Image.Image], question: str, *__: object) -> list[str]:
        asked.append(question)
        return ["people: 2\nface: clear\nblurred: no\nbackground: a beach\nclothes: none"] * len(pictures)

    monkeypatch.setenv("CAPTIONER", str(folder))
    monkeypatch.setattr(Captioner, "answer", answer)
    source = set_of_files
    if packed:
        source = tmp_path / "dogs.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in set_of_files.iterdir():
                archive.write(file, file.name)
    before = sorted(tmp_path.rglob("*"))
    assert command.main(["--check", str(source), "-i", "mode=character"]) == 0
    told = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert set(asked) == {look.QUESTION}
    assert len(asked) == 2, "seven pictures in batches of four"
    assert "warning: several people, so the word comes to mean any of them: crop to one, or say" in told
    assert "warning: 7 of 7 pictures have the same background (beach)" in told
    assert "look alike" in told, "2.png and 2.jpg"
    assert "enlarged by more than 2" in told
    assert told.splitlines()[-1].startswith("7 pictures, 1 of them with a caption: ")


def test_the_check_goes_by_pixels_where_no_model_is_at_hand(
    set_of_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTIONER", "/no/such/model")
    assert command.main(["--check", str(set_of_files)]) == 0
    told = capsys.readouterr().out
    assert "checked by pixels alone" in told
    assert "look alike" in told
    assert command.main(["--check", str(set_of_files), "-o", "x"]) == 2


def test_the_command_unpacks_an_archive_into_a_new_folder(
    set_of_files: Path, scripted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "dogs.zip", "w") as archive:
        for file in set_of_files.iterdir():
            archive.write(file, f"dogs/{file.name}")
    monkeypatch.chdir(tmp_path)
    assert command.main(["dogs.zip", "-i", "trigger_word=TOK"]) == 0
    assert (tmp_path / "dogs" / "dogs" / "0.txt").read_text() == "my TOK"
    assert (tmp_path / "dogs" / "dogs" / "3.txt").read_text() == "TOK, a dog runs on sand.\n"
    assert command.main(["dogs.zip", "-i", "trigger_word=TOK"]) == 2  # the folder is there now


@pytest.mark.parametrize(
    ("content", "fault"), [(b"\xff\xfe\x00", "'3.txt' is not UTF-8"), (b"x" * 10_001, "'3.txt' is longer than")]
)
def test_the_command_names_a_bad_text_and_writes_nothing(
    set_of_files: Path, scripted: None, content: bytes, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (set_of_files / "3.txt").write_bytes(content)
    before = sorted(set_of_files.iterdir())
    assert command.main([str(set_of_files), "-i", "trigger_word=TOK"]) == 1
    assert fault in capsys.readouterr().err
    assert sorted(set_of_files.iterdir()) == before


def test_the_command_without_a_model_writes_no_templates(
    set_of_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTIONER", "/no/such/model")
    assert command.main([str(set_of_files), "-i", "trigger_word=TOK"]) == 1
    told = capsys.readouterr().err
    assert "nothing was written: the captioning model /no/such/model is not here" in told
    assert "template" not in told
    assert not (set_of_files / "3.txt").exists()


def test_the_command_names_all_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["no-such.zip", "-i", "trigger_word=", "-i", "lora_type=sculpture", "-i", "steps=3"]) == 2
    told = capsys.readouterr().err
    assert command.main([str(Path(__file__).parent), "-i", "captioning=all"]) == 2
    told += capsys.readouterr().err
    for name in ("no-such.zip", "trigger_word", "sculpture", "steps", "captioning: this never writes over"):
        assert name in told


# --- script/bench captioner


def test_the_benchmark_runs_small_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the benchmark builds the captioner at its full size: too large for a test")
    figures = benchmark.measure(tmp_path / "model", tmp_path, count=2, tokens=3)
    assert figures["machine"] == "CPU, tiny model"
    assert min(figures[name] for name in ("load, s", "peak in all, GB", "pictures/s together")) > 0
