"""Whole trainings on the toy base: what comes out, what is left behind, and what a user is told."""

import dataclasses
import json
import multiprocessing
import re
import resource
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load

from captioner import model as captioner_model
from lora import job
from lora.flux import base, generate, hardware, schnell
from lora.flux.hardware import Gpu, Plan
from lora.pictures import photos
from lora.pictures.archive import unpack
from lora.request import NO_SECRETS
from lora.result import preview, verdict
from lora.training import examine, fit, graphs, learn, prompts, recipe
from lora.training.examine import Examination, Glance
from lora.training.tracker import Tracker
from lora.training.watch import Audience, Remembering, Stages
from tests import hub_server, tiny_dino, tiny_qwen, toy_schnell
from tests.test_request import a_request

FAST = {"training_steps": 3, "preservation": "off", "preview_prompts": "a [trigger]"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three pictures, one of them with a caption."""
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i, colour in enumerate(("red", "green", "blue")):
            data = BytesIO()
            picture = Image.new("RGB", (96 + 32 * i, 96), colour)
            picture.paste("white", (8, 8, 24, 24))  # or it is blank, and refused
            picture.save(data, "PNG")
            out.writestr(f"{i}.png", data.getvalue())
        out.writestr("1.txt", "a green wall")
    return path


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """As many pictures as it takes to hold one out, none of them nearly a copy of another."""
    path = tmp_path / "eight.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i in range(8):
            data = BytesIO()
            picture = Image.new("RGB", (96, 96), (30 * i, 0, 90))
            left, top = 48 * (i % 2), 24 * (i // 2)
            picture.paste("white", (left, top, left + 40, top + 22))
            picture.save(data, "PNG")
            out.writestr(f"{i}.png", data.getvalue())
    return path


def _run(
    archive: Path,
    output: Path,
    log: Callable[[str], None] = lambda line: None,
    flux_base: str | None = None,
    settings: Mapping[str, Any] | None = None,
    eye: str | None = None,
    **changes: Any,
) -> Path:
    return job.run(
        a_request(archive, **{**FAST, **changes}),
        output=output,
        flux_base=flux_base,
        captioner=None,
        log=log,
        metric=lambda name, value: None,
        changes=settings,
        eye=eye,
    )


def test_a_distilled_base_trains_with_a_warning_and_is_drawn_in_its_few_steps(
    archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "FLUX.1-schnell"
    shutil.copytree(base.TOY, folder)
    toy_schnell.write(folder)
    drawn, draw_all = [], generate.draw_all
    monkeypatch.setattr(generate, "draw_all", lambda *of: (drawn.append(of[-1]), draw_all(*of))[1])
    lines: list[str] = []
    tar = _run(archive, tmp_path / "out", lines.append, str(folder))
    assert any(line.startswith("warning: base: FLUX.1-schnell has no guidance input") for line in lines)
    assert drawn == [schnell.STEPS] * 2
    with tarfile.open(tar) as opened:
        request = opened.extractfile("request.json")
        assert request is not None
        decided = json.load(request)["decided"]
    assert (decided["guidance_embeds"], decided["prior_guidance"]) == (False, decided["guidance"])


def test_two_subjects_have_captions_prompts_and_previews_of_their_own(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, apart = tmp_path / "two.zip", list[list[prompts.Asked]]()
    with zipfile.ZipFile(path, "w") as out:
        for i, folder in enumerate(("2_ANNA woman", "BOB")):
            data = BytesIO()
            picture = Image.new("RGB", (96, 96), (90 * i, 0, 90))
            picture.paste("white", (8, 8, 24, 24))
            picture.save(data, "PNG")
            out.writestr(f"{folder}/a.png", data.getvalue())
        out.writestr("BOB/a.txt", "[trigger] beside ANNA")
    asked = prompts.apart
    monkeypatch.setattr(prompts, "apart", lambda *of: (apart.append(found := asked(*of)), found)[1])
    lines: list[str] = []
    settings = {"trigger_word": "ANNA, BOB", "autocaption_suffix": "like [trigger]", "preview_prompts": ""}
    with tarfile.open(_run(path, tmp_path / "out", lines.append, **settings)) as opened:
        read = {member.name: opened.extractfile(member) for member in opened if member.isfile()}
        text = {name: file.read() for name, file in read.items() if file}
    captions = {name.partition("captions/")[2]: said.decode() for name, said in text.items() if "captions/" in name}
    assert captions == {"2_ANNA woman/a.png.txt": "like ANNA\n", "BOB/a.png.txt": "BOB beside ANNA\n"}
    assert any(line.endswith("subjects by folders' names, with their pictures: ANNA 1, BOB 1") for line in lines)
    page = text["report/index.html"].decode()
    assert "a ANNA woman on the left and a BOB on the right" in page
    verdict_questions = [one.prompt for of in apart for one in of]
    assert len(verdict_questions) == examine.PROMPTS
    assert not [prompt for prompt in verdict_questions if "ANNA" in prompt or "BOB" in prompt]
    told = json.loads(text["request.json"])["verdict"]["measured"]["trained"]
    assert told["other"] is not None
    weights = next(said for name, said in text.items() if name.endswith(".safetensors"))
    assert b"ANNA, BOB" in weights[:4000]


def test_folders_that_are_not_called_as_the_words_are_named(archive: Path, work: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'ANNA', 'BOB', and each picture must lie in a folder") as told:
        _run(archive, tmp_path / "out", trigger_word="ANNA, BOB")
    assert "pictures lie in folders of other names: '(no folder)'" in str(told.value)
    assert list(work.iterdir()) == []


def test_the_tar_holds_the_weights_captions_and_the_record_and_nothing_is_left(
    archive: Path, work: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    prompts = "a red [TRIGGER]"
    tar = _run(archive, tmp_path / "out", lines.append, autocaption_prefix="one [Trigger],", preview_prompts=prompts)
    with tarfile.open(tar) as opened:
        names = opened.getnames()
        for picture, said in (("1", "TOK, a green wall\n"), ("2", "one TOK,\n")):
            caption = opened.extractfile(f"output/flux_train_replicate/captions/{picture}.png.txt")
            assert caption is not None
            assert caption.read().decode() == said
        page = opened.extractfile("report/index.html")
        assert page is not None
        assert "a red TOK" in page.read().decode()
    assert [name for name in names if name.endswith(".safetensors")] == [job.WEIGHTS_MEMBER]
    assert {"request.json", "report/preview.webp"} <= set(names)
    assert tar == tmp_path / "out" / "trained_model.tar"
    assert list(tar.parent.iterdir()) == [tar]
    assert list(work.iterdir()) == []
    assert "TOY BASE" in lines[2]
    assert any(line.startswith("100%|##########| 3/3") for line in lines)
    assert any(line.startswith("seconds: ") for line in lines)


def test_pictures_of_a_folder_with_repeats_come_as_often_and_it_is_said(
    archive: Path, work: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(tmp_path / "kohya.zip", "w") as out:
        for name, folder in (("0.png", "6_ANNA woman"), ("1.png", "2_ANNA woman in red"), ("2.png", "reg/1_woman")):
            out.writestr(f"{folder}/{name}", given.read(name))
    _run(tmp_path / "kohya.zip", tmp_path / "out", lines.append)
    assert any(line.endswith("each size counted: 4") for line in lines)
    told = "\n".join(lines)
    assert "trained in the ratio '2_ANNA woman in red' 1, '6_ANNA woman' 3" in told
    assert "1 file of regularisation pictures left out" in told


def test_a_mask_in_the_archive_weighs_its_picture_and_the_others_train_as_they_are(
    archive: Path, work: Path, tmp_path: Path
) -> None:
    def losses(name: str) -> list[str]:
        lines: list[str] = []
        _run(tmp_path / name, tmp_path / "out", lines.append, seed=1)
        weighed = "96x96, weighted by their masks: 0.png" in lines
        assert weighed == (masks[name] is not None)
        return [line for line in lines if "on fixed noise" in line]

    masks = {"none": None, "black": 0, "half": 255}
    for name, white in masks.items():
        with zipfile.ZipFile(archive) as given, zipfile.ZipFile(tmp_path / name, "w") as out:
            out.writestr("0.png", given.read("0.png"))
            out.writestr("1.png", given.read("1.png"))
            if white is not None:
                mask, data = Image.new("L", (96, 96)), BytesIO()
                mask.paste(white, (0, 0, 96, 48))
                mask.save(data, "PNG")
                out.writestr("0.mask.png", data.getvalue())
    assert losses("black") == losses("none") != losses("half")


@pytest.mark.parametrize("subject_crop", [True, False])
def test_small_subjects_train_as_close_ups_too_and_are_held_out_with_their_pictures(
    subject_crop: bool, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pictures, the subject small in half of them; the model is a tiny real one, and its answers are given."""
    with zipfile.ZipFile(tmp_path / "eight.zip", "w") as out:
        for i in range(8):
            picture, data = Image.new("RGB", (400, 300), (30 * i, 0, 90)), BytesIO()
            picture.paste("white", (200, 100, 280, 180))
            picture.save(data, "PNG")
            out.writestr(f"{i}.png", data.getvalue())

    def answer(_: captioner_model.Captioner, pictures: list[Image.Image], question: str, *__: object) -> list[str]:
        if "bbox" not in question:
            return ["A dog runs on sand."] * len(pictures)
        small = [round(picture.getpixel((0, 0))[0] / 30) % 2 for picture in pictures]  # type: ignore[index]
        return [f'{{"bbox_2d": [{500 if one else 0}, 333, 700, 600]}}' if one else "none" for one in small]

    monkeypatch.setattr(captioner_model.Captioner, "answer", answer)
    lines: list[str] = []
    desk = _desk(tmp_path / "eight.zip", work, lines, captioning="automatic", subject_crop=subject_crop)
    desk = dataclasses.replace(desk, captioner=str(tiny_qwen.build(tmp_path / "qwen")))
    gathered = job.gather(desk, {})
    captioned = job.caption_all(desk, gathered)
    encoded = job.encode_all(desk, gathered, captioned)
    every = [*encoded.material.learned, *encoded.material.unseen]
    close = {example.name.partition("//")[0] for example in every if "//" in example.name}
    assert close == ({"1.png", "3.png", "5.png", "7.png"} if subject_crop else set())
    assert all(("close-up" in example.caption) == ("//" in example.name) for example in every)
    assert {example.caption for example in every} <= encoded.material.texts.keys()
    assert {examine.photo_of(example) for example in encoded.material.unseen} == {*encoded.decided.held_out}
    assert not {examine.photo_of(example) for example in encoded.material.learned} & {*encoded.decided.held_out}
    assert {example.size for example in every} == {example.size for example in every if "//" not in example.name}
    told = "subject_crop: the subject was found in 4 of 8 pictures, and is small in 4 of them, which train as close-ups"
    assert any(line.startswith(told) for line in lines) is subject_crop


def test_previews_of_a_subject_are_looked_at_by_eye_where_there_is_one(
    archive: Path, work: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    _run(archive, tmp_path / "out", lines.append, eye=str(tiny_dino.write(tmp_path / "dino")))
    assert any(line.startswith("likeness: dino") for line in lines)
    lines.clear()
    _run(archive, tmp_path / "out", lines.append, lora_type="style", eye="/no/such/eye")
    assert not any("likeness" in line for line in lines)


def test_the_attentions_gradients_come_in_one_layout(
    gradients_alike: list[bool], archive: Path, work: Path, tmp_path: Path
) -> None:
    _run(archive, tmp_path / "out")
    assert set(gradients_alike) == {True}


def test_a_base_of_the_hub_is_fetched_in_a_stage_of_its_own(
    archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with hub_server.asked_by_the_library(monkeypatch, tmp_path) as hub:
        hub.private["club/base"] = False
        hub.files["club/base"] = {
            file.relative_to(base.TOY).as_posix(): file.read_bytes() for file in base.TOY.rglob("*.*")
        }
        _run(archive, tmp_path / "out", lines.append, "club/base")
    assert lines[0] == "== unpacking"
    assert lines[2] == "== fetching the base"
    assert lines[3].startswith("club/base, from the Hugging Face Hub: on first use")
    assert lines[4] == "base: club/base (from the Hugging Face Hub)"
    assert any(re.match(r"seconds: unpacking [\d.]+, fetching the base ", line) for line in lines)


def test_previews_that_fail_cost_nobody_the_lora(
    archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    whole = _run(archive, tmp_path / "whole")
    monkeypatch.setattr(generate, "draw_all", fails)
    lines: list[str] = []
    tar = _run(archive, tmp_path / "out", lines.append)
    with tarfile.open(tar) as opened, tarfile.open(whole) as other:
        assert {*other.getnames()} - {*opened.getnames()} == {"report/preview.webp"}
        lora, wanted = (tar.extractfile(job.WEIGHTS_MEMBER) for tar in (opened, other))
        assert lora
        assert wanted
        assert lora.read() == wanted.read()
        page = opened.extractfile("report/index.html")
        assert page is not None
        text = page.read().decode()
    assert "previews could not be drawn" in text
    assert "Before and after" not in text
    assert sum(line.startswith("100%|##########| 3/3") for line in lines) == 1, "trained once"
    assert [line for line in lines if "CUDA out of memory." in line]
    assert list(work.iterdir()) == []


def test_a_checkpoint_that_was_better_is_the_one_that_is_returned_drawn_and_recorded(
    eight: Path, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real looks, but one of them is told to be better than the last."""
    glance, seen = Examination.glance, list[Glance]()

    def better_at_six(self: Examination, unseen: bool, moved: bool = True) -> Glance:
        seen.append(glance(self, unseen, moved))
        return dataclasses.replace(seen[-1], own=0.9 if len(seen) == 6 else 0.5, unseen=None)

    monkeypatch.setattr(Examination, "glance", better_at_six)
    shown: list[dict[int, list[Image.Image]]] = []
    pair_up = preview.pair_up

    def remembered(prompts: list[str], without: list[Image.Image], drawn: dict[int, list[Image.Image]]) -> Any:
        shown.append(drawn)
        return pair_up(prompts, without, drawn)

    monkeypatch.setattr(preview, "pair_up", remembered)
    lines: list[str] = []
    tar = _run(eight, tmp_path / "out", lines.append, training_steps=10, preview_every=4, resolution="64")
    assert any("checkpoint: step 6 of 10 is returned" in line for line in lines)
    assert [list(drawn) for drawn in shown] == [[4, 6]], "that of step 8 is of weights that are not in the tar"
    with tarfile.open(tar) as opened:
        written, page = (opened.extractfile(name) for name in ("request.json", "report/index.html"))
        assert written is not None
        told = json.load(written)
        assert page is not None
        text = page.read().decode()
    assert "held out of the first part" in text
    assert "Verdict" in text
    assert told["decided"]["weights_of_step"] == 6
    assert set(told["decided"]["held_out"]) < {f"{i}.png" for i in range(8)}
    assert told["verdict"]["findings"]["learned"]["word"] in ("clear", "weak", "none")


def test_the_log_ends_with_the_verdict(eight: Path, work: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    _run(eight, tmp_path / "out", lines.append, resolution="64")
    last = next(i for i, line in enumerate(lines) if line.startswith("seconds: "))
    assert lines[last + 1].startswith("Verdict: ")
    assert [line.split(":")[0] for line in lines[last + 2 :]] == ["Learned", "Not memorised"], "nothing was learned"


def test_a_training_that_breaks_down_past_half_returns_its_last_sound_weights(
    archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is no number from step 13 of 20 on, in the production loop."""
    real, calls = fit.picture_loss, []

    def breaking(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        return real(*arguments) * (float("nan") if len(calls) > 12 else 1.0)

    monkeypatch.setattr(fit, "picture_loss", breaking)
    lines: list[str] = []
    tar = _run(archive, tmp_path / "out", lines.append, training_steps=20, resolution="64")
    [said] = [line for line in lines if "broke down" in line]
    assert "the loss at step 13 is nan" in said
    assert "weights of step" in said
    with tarfile.open(tar) as opened:
        weights = opened.extractfile(job.WEIGHTS_MEMBER)
        assert weights is not None
        assert all(tensor.isfinite().all() for tensor in load(weights.read()).values())


def test_the_same_request_gives_the_same_tar_byte_for_byte(archive: Path, work: Path, tmp_path: Path) -> None:
    few = {"prior_prompts": 8}  # one batch of the base's own drawings, as many as it takes to be held to them
    changes: dict[str, Any] = {"preservation": "1", "batch_size": 2, "resolution": "64", "settings": few}
    once = _run(archive, tmp_path / "a", **changes).read_bytes()
    assert once == _run(archive, tmp_path / "b", **changes).read_bytes()
    assert once != _run(archive, tmp_path / "c", **changes, seed=2).read_bytes()
    for name in ("fresh", "fresh too"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert once == pool.submit(_run, archive, tmp_path / name, print, **changes).result().read_bytes(), name


def test_a_full_fine_tuning_gives_a_tar_like_any_other_and_tells_how_much_of_the_change_it_holds(
    eight: Path, work: Path, tmp_path: Path
) -> None:
    """With preservation, previews meanwhile, all checkpoints, and the recipe's own rate."""
    lines: list[str] = []
    changes: dict[str, Any] = {
        "finetune_type": "full",
        "training_steps": 6,
        "preservation": "1",
        "resolution": "64",
        "preview_every": 2,
        "checkpoints": "all",
        "layers_to_optimize_regex": "single_transformer_blocks",
        "settings": {"prior_prompts": 8},
    }
    tar = _run(eight, tmp_path / "a", lines.append, **changes)
    assert tar.read_bytes() == _run(eight, tmp_path / "b", **changes).read_bytes()
    with tarfile.open(tar) as opened:
        members = {name: opened.extractfile(name).read() for name in opened.getnames()}  # type: ignore[union-attr]
    record = json.loads(members["request.json"])
    layers = record["held"]["layers"]
    assert len(layers) == 15
    assert all(0 < share <= 1 for share in layers.values())
    assert min(layers.values()) <= record["held"]["share"] <= max(layers.values())
    assert (record["inputs"]["finetune_type"], record["decided"]["full"]) == ("full", True)
    rate, _, why = recipe.of_full(recipe.TOY["subject"], 128)
    assert (record["decided"]["learning_rate"], record["decided"]["reasons"]["learning_rate"]) == (rate, why)
    assert "What the LoRA holds of the change" in members["report/index.html"].decode()
    [told] = [line for line in lines if line.startswith("the LoRA holds ")]
    share = record["held"]["share"]
    assert told.startswith(f"the LoRA holds {share:.0%} of the change of 15 layers (by its norm; from ")
    steps = [line.split(":")[0] for line in lines if line.startswith("step ")]
    assert steps == [f"step {step}/6" for step in range(1, 7)]
    others = sorted((tmp_path / "a").rglob("step-*.safetensors"))
    assert [path.name for path in others] == ["step-0003.safetensors", "step-0004.safetensors", "step-0005.safetensors"]
    last = load(members[job.WEIGHTS_MEMBER])
    assert len(last) == 30
    for other in others:
        assert load(other.read_bytes()).keys() == last.keys()
    pipeline = FluxPipeline.from_pretrained(base.TOY)
    layer = pipeline.transformer.get_submodule("single_transformer_blocks.0.proj_out")
    before = layer.weight.detach().clone()
    (tmp_path / "lora.safetensors").write_bytes(members[job.WEIGHTS_MEMBER])
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.fuse_lora()
    halves = (last[f"transformer.single_transformer_blocks.0.proj_out.lora_{half}.weight"].float() for half in "BA")
    torch.testing.assert_close(layer.weight.detach() - before, torch.mm(*halves), rtol=1e-3, atol=1e-6)


def test_what_a_full_fine_tuning_leaves_empty_is_flux_pro_trainers_and_what_is_given_counts(
    archive: Path, work: Path
) -> None:
    lines: list[str] = []
    empty = {"training_steps": None, "finetune_type": "full"}
    settings = job.gather(_desk(archive, work, lines, **empty), {}).decided.settings
    assert (settings.steps, settings.full) == (recipe.TOY["subject"].full_steps, True)
    assert f"training steps: {settings.steps}, what finetune_type full takes for any number of pictures" in lines
    (work / "again").mkdir()
    given = {"training_steps": 7, "learning_rate": 3e-5, "finetune_type": "full"}
    settings = job.gather(_desk(archive, work / "again", lines, **given), {}).decided.settings
    assert (settings.steps, settings.learning_rate) == (7, 3e-5)


def test_seed_zero_is_zero_and_a_seed_left_empty_is_recorded(archive: Path, work: Path, tmp_path: Path) -> None:
    def seed_of(tar: Path) -> int:
        with tarfile.open(tar) as opened:
            record = opened.extractfile("request.json")
            assert record is not None
            return json.load(record)["decided"]["seed"]

    assert seed_of(_run(archive, tmp_path / "a", seed=0)) == 0
    chosen = _run(archive, tmp_path / "b", seed=None)
    again = _run(archive, tmp_path / "c", seed=seed_of(chosen))
    with tarfile.open(chosen) as one, tarfile.open(again) as other:
        weights = [opened.extractfile(job.WEIGHTS_MEMBER) for opened in (one, other)]
        assert weights[0] is not None
        assert weights[1] is not None
        assert weights[0].read() == weights[1].read()


def _resident(archive: Path, output: Path, runs: int) -> list[int]:
    """Bytes of memory that this process holds after each of so many trainings."""
    held = []
    for _ in range(runs):
        _run(archive, output, resolution="64")
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    return held


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells it there")
def test_memory_does_not_creep_over_ten_trainings(archive: Path, tmp_path: Path) -> None:
    """In a process of its own, after two to warm up. A transformer that stays behind would be 4 MB each time."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        held = pool.submit(_resident, archive, tmp_path / "out", 12).result()
    print("MiB held:", ", ".join(f"{size / 2**20:.1f}" for size in held))
    assert max(held[2:]) - held[1] < 10 * 2**20


@pytest.mark.parametrize("name", ["backpack-nested.zip", "dog6.zip", "monster-toy.tar.gz", "red-cartoon-style.zip"])
def test_real_photographs_train(name: str, photographs: Path, work: Path, tmp_path: Path) -> None:
    kind = "style" if "style" in name else "subject"
    assert _run(photographs / name, tmp_path / "out", lora_type=kind).is_file()
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("stage", ["unpacking", "captioning", "encoding", "loading", "drawing", "training", "packing"])
def test_whatever_stops_a_run_at_whatever_stage_leaves_nothing(
    stage: str, archive: Path, work: Path, tmp_path: Path
) -> None:
    class Cancelled(BaseException):
        """As cog.CancelationException: no Exception, and from anywhere."""

    def stop(line: str) -> None:
        if line.startswith(f"== {stage}"):
            raise Cancelled

    with pytest.raises(Cancelled):
        _run(archive, tmp_path / "out", stop)
    assert list(work.iterdir()) == []
    assert not (tmp_path / "out" / "trained_model.tar").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(archive: Path, work: Path, tmp_path: Path) -> None:
    """The first such step, though it is looked for only where a line is due."""
    with pytest.raises(ValueError, match=r"step 2 is nan.*learning_rate"):
        _run(archive, tmp_path / "out", learning_rate=1e30, training_steps=60)
    assert list(work.iterdir()) == []


def test_a_bad_request_is_refused_before_anything_is_loaded(tmp_path: Path, work: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="input_images"):
        _run(tmp_path / "no.zip", tmp_path / "out", lines.append)
    assert not [line for line in lines if line.startswith("==")]


@pytest.mark.parametrize(
    ("lora_type", "told"),
    [
        ("subject", "timesteps: logit-normal with mean 0"),
        ("style", "timesteps: logit-normal with mean 3, 25% of them evenly from all"),
    ],
    ids=["subject", "style"],
)
def test_the_type_decides_the_recipe(
    lora_type: str, told: str, archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = prompts.apart
    monkeypatch.setattr(prompts, "apart", lambda *asked: apart(*asked)[:2])
    lines: list[str] = []
    changes = {"lora_type": lora_type, "resolution": "64", "preservation": ""}
    with tarfile.open(_run(archive, tmp_path / "out", lines.append, **changes)) as opened:
        written = opened.extractfile("request.json")
        assert written is not None
        decided = json.loads(written.read())["decided"]
    row = recipe.TOY[lora_type]
    assert decided["learning_rate"] == recipe.learning_rate_for(row, 128, 16)[0]
    for name in ("prior_ratio", "prior_every", "held", "timestep_mean", "uniform_share", "prior_prompts"):
        assert decided[name] == getattr(row, name), name
    assert tuple(decided["prior_kinds"]) == row.prior_kinds
    assert {"seed", "learning_rate", "base", "plan", "recipe"} <= decided["reasons"].keys()
    assert told in lines


def test_pictures_are_refused_before_the_base_is_fetched(tmp_path: Path, work: Path) -> None:
    broken = tmp_path / "pictures.zip"
    with zipfile.ZipFile(broken, "w") as out:
        out.writestr("a.png", b"no picture")
    with pytest.raises(ValueError, match=r"input_images: .*\n.*'a\.png' is damaged"):
        _run(broken, tmp_path / "out", flux_base=str(tmp_path / "no base"))
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("quantised", "checkpointing", "finetune_type"),
    [
        (False, False, "lora"),
        (False, True, "lora"),
        (True, True, "lora"),
        (False, True, "full"),
        (True, True, "full"),
    ],
)
def test_a_gpus_plan_trains_whole_in_bf16(
    quantised: bool,
    checkpointing: bool,
    finetune_type: str,
    archive: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU, but in a GPU's types: what meets what in which type is the same."""
    plan = Plan(
        device="cpu", dtype=torch.bfloat16, checkpointing=checkpointing, quantised=quantised, reason="as on a GPU"
    )
    monkeypatch.setattr(hardware, "plan", lambda *_, **__: plan)
    apart = prompts.apart
    monkeypatch.setattr(prompts, "apart", lambda *asked: apart(*asked)[:2])
    lines: list[str] = []
    tar = _run(archive, tmp_path / "out", lines.append, preservation="1", finetune_type=finetune_type)
    assert any("plan: as on a GPU" in line for line in lines)
    with tarfile.open(tar) as opened:
        weights = opened.extractfile(job.WEIGHTS_MEMBER)
        assert weights is not None
        trained = load(weights.read())
        assert "report/preview.webp" in opened.getnames()
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)


def test_when_memory_runs_out_the_training_begins_once_more_with_a_safer_plan(
    archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's own error, raised on the way where there is no GPU to run out of."""
    real, tries = fit.fit, []

    def short_of_memory(*arguments: Any) -> Iterator[fit.StepReport]:
        tries.append(arguments[0].is_gradient_checkpointing)
        for at in real(*arguments):
            if at.step == 2 and len(tries) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield at

    monkeypatch.setattr(fit, "fit", short_of_memory)
    lines: list[str] = []
    assert _run(archive, tmp_path / "out", lines.append).is_file()
    assert tries == [False, True]
    assert [line for line in lines if "memory ran out" in line]

    def recording_breaks_off(*arguments: Any) -> Iterator[fit.StepReport]:
        tries.append(arguments[6])
        if len(tries) < 3:
            raise graphs.NoRoomToRecord("operation failed due to a previous error during capture")
        yield from real(*arguments[:6], False, *arguments[7:])

    tries.clear()
    monkeypatch.setattr(fit, "fit", recording_breaks_off)
    plan = hardware.plan
    monkeypatch.setattr(
        hardware, "plan", lambda *given, **named: dataclasses.replace(plan(*given, **named), recorded=True)
    )
    assert _run(archive, tmp_path / "recorded", lines.append).is_file()
    assert tries == [True, True, False], "recomputing makes room; where that is not it, nothing is recorded"

    def always(*arguments: Any) -> Iterator[fit.StepReport]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit, "fit", always)
    with pytest.raises(ValueError, match=r"memory ran out.*set a lower resolution, batch_size or lora_rank"):
        _run(archive, tmp_path / "none", batch_size=2)
    assert list(work.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU nothing can be recorded")
def test_where_steps_cannot_be_recorded_the_training_runs_them_as_they_are_and_says_so(
    archive: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lora(tar: Path) -> bytes:
        with tarfile.open(tar) as opened:
            weights = opened.extractfile(job.WEIGHTS_MEMBER)
            assert weights
            return weights.read()

    wanted = lora(_run(archive, tmp_path / "wanted"))
    plan = hardware.plan(None, 1, (64,), batch_size=1, rank=4)
    monkeypatch.setattr(hardware, "plan", lambda *_, **__: dataclasses.replace(plan, recorded=True))
    lines: list[str] = []
    assert lora(_run(archive, tmp_path / "out", lines.append)) == wanted
    said = "warning: the steps cannot be recorded on this GPU and are run as they are, which is slower (RuntimeError: "
    assert [line for line in lines if line.startswith(said)]


def _desk(archive: Path, work: Path, lines: list[str], **changes: Any) -> job.Desk:
    log = Remembering(lines.append)
    return job.Desk(
        request=a_request(archive, **{**FAST, "resolution": "64", **changes}),
        secrets=NO_SECRETS,
        flux_base=None,
        captioner=None,
        gpu=None,
        work=work,
        log=log,
        metric=lambda name, value: None,
        stage=Stages(log),
    )


@pytest.mark.parametrize(("captioning", "fetched"), [("automatic", True), ("disabled", False)])
def test_the_captioning_model_is_fetched_beside_the_base_where_pictures_need_it(
    captioning: str, fetched: bool, archive: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take minutes; here the base is only there when the other has come, or was not asked for."""
    desk = dataclasses.replace(
        _desk(archive, work, [], captioning=captioning),
        flux_base="club/base",
        captioner="club/qwen",
        gpu=Gpu(name="a GPU", memory=80 * hardware.GIB),
    )
    asked, come = list[str](), threading.Event()
    monkeypatch.setattr(captioner_model, "download", lambda name: (asked.append(name), come.set()))
    monkeypatch.setattr(base, "find", lambda *_: come.wait(20 if fetched else 0) is fetched and base.TOY)
    found, _ = photos.pair(work / "pictures", unpack(archive, work / "pictures"))
    assert job._base(desk, found) is base.TOY
    assert asked == (["club/qwen"] if fetched else [])


def test_each_step_of_a_job_hands_the_next_what_it_needs(archive: Path, work: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    desk = _desk(archive, work, lines, preservation="")
    gathered = job.gather(desk, {"prior_prompts": 3})
    assert [photo.name for photo in gathered.found] == ["0.png", "1.png", "2.png"]
    assert (gathered.decided.settings.prior_prompts, gathered.decided.resolutions) == (3, (64,))
    assert gathered.start is None
    captioned = job.caption_all(desk, gathered)
    assert captioned.captions["1.png"].text == "TOK, a green wall"
    encoded = job.encode_all(desk, gathered, captioned)
    assert [example.name for example in encoded.material.learned] == [
        "0.png at 64x64",
        "1.png at 80x48",
        "2.png at 80x48",
    ]
    assert len(encoded.material.apart) == 3
    assert {"", "a TOK", "TOK, a green wall", *(one.prompt for one in encoded.material.apart)} <= set(
        encoded.material.texts
    )
    assert set(encoded.thumbnails) == set(captioned.captions)
    assert encoded.decided.text_tokens == gathered.flux.t5_tokens
    assert "picture sizes: 2" in lines
    assert f"text: {gathered.flux.t5_tokens} tokens, {encoded.decided.reasons['text_tokens']}" in lines
    told = Audience(log=desk.log, metric=desk.metric, stage=desk.stage, tracked=Tracker(None, desk.log))
    learned = learn.learn(encoded.material, gathered.flux, gathered.decided.plan, gathered.decided.settings, told)
    assert (learned.step, learned.curve.losses) != (0, [])
    found = verdict.of(learned.measured, "TOK", "subject", 0.5, True)
    tar = job.pack(desk, gathered, captioned, encoded, learned, found, tmp_path / "out")
    with tarfile.open(tar) as opened:
        weights = opened.extractfile(job.WEIGHTS_MEMBER)
        assert weights is not None
        trained = load(weights.read())
    layer, (a, _) = next(iter(learned.pairs.items()))
    assert torch.equal(trained[f"transformer.{layer}.lora_A.weight"], a)


def test_what_is_left_empty_is_decided_by_the_pictures_and_the_priority_and_told(archive: Path, work: Path) -> None:
    lines: list[str] = []
    open_ones = {"training_steps": None, "resolution": None, "priority": "speed", "mode": "character"}
    desk = _desk(archive, work, lines, **open_ones, preview_every=2)
    decided = job.gather(desk, {}).decided
    assert (decided.settings.steps, decided.resolutions, decided.preview_every) == (300, (96,), 5)
    assert "resolution: 96, the smallest of the base's, as priority 'speed' has it" in lines
    assert (
        "training steps: 300, 27 for each of 3 pictures of a character, but at least 300; times 0.5 as priority 'speed'"
        " has it, at least 300" in lines
    )
    assert "preview_every: 5 in place of 2: no more than 60 times in 300 steps" in lines
    assert {"steps", "resolutions"} <= set(decided.record()["reasons"])


@pytest.mark.parametrize("lora_type", ["subject", "style"])
def test_one_background_for_all_pictures_of_a_subject_is_a_warning(lora_type: str, work: Path, tmp_path: Path) -> None:
    path = tmp_path / "wall.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i in range(5):
            data, picture = BytesIO(), Image.new("RGB", (128, 128), (200, 190, 180))
            picture.paste((40 * i, 20, 90), (40, 40 + 4 * i, 90, 128))
            picture.save(data, "PNG")
            out.writestr(f"{i}.png", data.getvalue())
    lines: list[str] = []
    job.gather(_desk(path, work, lines, lora_type=lora_type), {})
    told = any(line.startswith("warning: nearly all pictures have the same background") for line in lines)
    assert told == (lora_type == "subject")


def test_the_check_tells_what_was_made_of_the_inputs_and_warns_of_what_has_no_effect(archive: Path) -> None:
    lines: list[str] = []
    request = a_request(archive, notes=("lora_rank: 8, given as rank",), wandb_project="p")
    job.check(request, NO_SECRETS, lines.append)
    assert lines[0] == "lora_rank: 8, given as rank"
    assert lines[1].startswith("warning: wandb_project: without wandb_api_key")


def test_the_check_comes_before_anything_is_opened(tmp_path: Path) -> None:
    request = a_request(tmp_path / "no.zip", resolution="7")
    with pytest.raises(ValueError, match=r"(?s)input_images.*resolution"):
        job.check(request, NO_SECRETS, print)
