"""Trainings through the real Cog server. One server serves them all, as it would in a container."""

import base64
import contextlib
import io
import itertools
import json
import math
import shutil
import tarfile
import time
import zipfile

import pytest
from PIL import Image

from lora.flux import base
from script import signature
from script.openapi import document
from tests import cog_server as server
from tests import tiny_qwen

WEIGHTS = "output/flux_train_replicate/lora.safetensors"
QUICK = {
    "training_steps": 2,
    "resolution": "64",
    "preservation": "off",
    "preview_prompts": "a [trigger]",
    "captioning": "disabled",
    "seed": 1,
}
CANCEL_SECONDS = 3 * 2
"""From a cancel to the end of a run with short steps: 2 s, and thrice that where the tests share the cores."""
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


def zipped(pictures: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(pictures):
            picture = io.BytesIO()
            Image.linear_gradient("L").rotate(7 * i).resize((64, 64)).convert("RGB").save(picture, "PNG")
            archive.writestr(f"{i}.png", picture.getvalue())
    return file.getvalue()


def as_uri(data: bytes) -> str:
    return "data:application/zip;base64," + base64.b64encode(data).decode()


FEW = as_uri(zipped(2))


def members(answer: server.Answer) -> dict[str, bytes]:
    """The files in the tar that an answer holds."""
    head, _, data = answer["output"]["weights"].partition(",")
    assert head == "data:application/x-tar;base64"
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(data))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The server's own copies of the base, in `base`, and of a captioning model, in `captioner`."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(base.TOY, folder / "base")
    tiny_qwen.build(folder / "captioner")
    return folder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, models):
    variables = {"FLUX_BASE": str(models / "base"), "CAPTIONER": str(models / "captioner")}
    with server.serve("train", tmp_path_factory.mktemp("train"), variables=variables) as running:
        yield running


@pytest.fixture(scope="module")
def first(trainer):
    """The first training of this server."""
    return trainer.train(input_images=FEW, **QUICK)


@pytest.fixture
def inbox(tmp_path):
    (tmp_path / "few.zip").write_bytes(zipped(2))
    with server.listen(tmp_path) as listening:
        yield listening


def begin(trainer: server.Server, inbox: server.Inbox, run: str, **inputs: object) -> None:
    events = ["start", "output", "logs", "completed"]
    body = {"input": inputs, "webhook": inbox.url, "webhook_events_filter": events}
    assert trainer.ask_when_free("PUT", f"/trainings/{run}", body, asynchronous=True)[0] == 202


def test_predict_does_nothing_and_says_so(tmp_path):
    with server.serve("predict", tmp_path) as predictor:
        status, answer = predictor.ask("POST", "/predictions", {"input": {"txt": "some words"}})
        assert (status, answer["status"]) == (200, "succeeded")
        assert answer["output"] == "predict on this model is a no-op"
        assert predictor.ask("POST", "/predictions", {"input": {}})[0] == 422


def test_the_server_shows_the_schema(trainer):
    predict = signature.read(server.ROOT / "predict.py", "Predictor")
    train = signature.read(server.ROOT / "train.py", "train")
    status, shown = trainer.ask("GET", "/openapi.json")
    assert status == 200
    assert shown == json.loads(json.dumps(document(predict, train)))


def test_a_zip_in_the_request_comes_back_as_a_tar(trainer, first):
    assert first["status"] == "succeeded", first
    files = members(first)
    assert [name for name in files if name.endswith(".safetensors")] == [WEIGHTS]
    assert Image.open(io.BytesIO(files["report/preview.webp"])).width > 64
    assert first["metrics"]["progress"] == 1
    assert math.isfinite(first["metrics"]["loss"])
    lines = first["logs"].splitlines()
    stages = [line for line in lines if line.startswith("== ")]
    assert stages[0] == "== unpacking"
    assert stages[-1] == "== packing"
    assert any(line.startswith("100%|##########| 2/2, loss ") for line in lines)
    assert server.left_by_cog(first["id"]) == []


def test_a_bad_request_is_refused_with_everything_that_is_wrong(trainer):
    inputs = {"training_steps": 6001, "lora_type": "person", "trigger_word": "", "lora_rank": "big", "seed": -1}
    status, answer = trainer.ask("POST", "/trainings", {"input": inputs})
    assert status == 422
    assert {fault["loc"][-1] for fault in answer["detail"]} == {*inputs, "input_images"}
    assert all(fault["msg"] for fault in answer["detail"])


def test_the_names_that_other_trainers_have_count_and_are_told(trainer):
    """Cog drops a name that is in no signature without a word to the caller: only its own output tells of it."""
    asked = {"trigger_phrase": '"VEK",', "is_style": True, "autocaption": False, "steps": 1, "rank": 2}
    asked |= {"finetune_type": "full"}
    answer = trainer.train(
        input_images=FEW, **asked, mode="style", priority="speed", preservation="off", no_such_input=1
    )
    assert answer["status"] == "succeeded", answer
    files = members(answer)
    lines = answer["logs"].splitlines()
    for line in (
        "trigger_word: '\"VEK\",', given as trigger_phrase",
        "trigger_word: 'VEK'; quotes or commas left out of '\"VEK\",'",
        "lora_type: 'style', given as is_style",
        "captioning: 'disabled', given as autocaption",
        "training_steps: 1, given as steps",
        "lora_rank: 2, given as rank",
        "resolution: 96, the smallest of the base's, as priority 'speed' has it",
    ):
        assert line in lines
    assert any(line.startswith("the LoRA holds ") for line in lines)
    written = json.loads(files["request.json"])
    assert written["decided"]["steps"] == 1
    assert written["inputs"]["finetune_type"] == "full"
    inputs = written["inputs"]
    given = [inputs[name] for name in ("trigger_word", "lora_type", "mode", "priority", "captioning", "lora_rank")]
    assert given == ["VEK", "style", "style", "speed", "disabled", 2]
    assert inputs["notes"] == lines[:6]
    assert files["output/flux_train_replicate/captions/0.png.txt"] == b"in the style of VEK\n"
    output = trainer.output.read_text(encoding="utf-8")
    assert "Stripped unknown input fields" in output
    assert "no_such_input" in output


def test_a_request_that_contradicts_itself_is_refused_at_once_with_everything_that_is_wrong(trainer):
    contradicting = {
        "training_steps": 2,
        "steps": 3,
        "mode": "style",
        "lora_type": "subject",
        "lora_rank": 16,
        "rank": 8,
    }
    word = "a photo of my dog"
    answer = trainer.train(input_images=FEW, trigger_word=word, trigger_phrase="TOK", preview_every=0, **contradicting)
    assert answer["status"] == "failed"
    for told in (
        "trigger_phrase: it means the same as trigger_word, and they differ",
        "mode: 'style' is for a style, and lora_type is 'subject'",
        "steps: it means the same as training_steps, and they differ: training_steps is 2, steps is 3",
        "rank: it means the same as lora_rank, and they differ: lora_rank is 16, rank is 8",
        "trigger_word: 'a photo of my dog' is a sentence of 5 words",
    ):
        assert told in answer["error"]
    assert "==" not in answer["logs"]


def test_the_form_begins_with_what_everybody_needs_and_ends_with_old_names(trainer):
    properties = trainer.ask("GET", "/openapi.json")[1]["components"]["schemas"]["TrainingInput"]["properties"]
    names = sorted(properties, key=lambda name: properties[name]["x-order"])
    assert names[:3] == ["input_images", "trigger_word", "lora_type"]
    old = [name for name in names if properties[name].get("deprecated")]
    assert old == names[-len(old) :]
    assert {"steps", "rank", "trigger_phrase", "is_style", "caption_prefix", "caption_suffix", "autocaption"} <= set(
        old
    )
    assert properties["finetune_type"]["default"] == "lora"
    common, full, expert = (names.index(name) for name in ("training_steps", "finetune_type", "learning_rate"))
    assert common < full < expert < names.index("wandb_entity")


def test_a_failure_tells_the_caller_everything_and_leaves_nothing(trainer):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("broken.png", b"\x89PNG\r\n\x1a\nno more")
        archive.writestr("torn.jpg", b"\xff\xd8\xff\xe0no more")
    answer = trainer.train(input_images=as_uri(file.getvalue()), **QUICK)
    assert answer["status"] == "failed"
    assert "ValueError: " in answer["error"]
    assert "broken.png" in answer["error"]
    assert "torn.jpg" in answer["error"]
    assert "Traceback" not in answer["error"] + answer["logs"]
    assert trainer.leftovers() == []
    assert server.left_by_cog(answer["id"]) == []


def test_no_archive_at_all_is_a_failure_that_says_what_came(trainer):
    answer = trainer.train(input_images="data:text/plain;base64,aGVsbG8=", **QUICK)
    assert answer["status"] == "failed"
    assert "ValueError: input_images: must be a zip, tar or tar.gz of pictures, but" in answer["error"]
    assert trainer.leftovers() == []


def test_secrets_show_nowhere(trainer, inbox):
    """The repository cannot be reached with this token, with or without a network: the run ends by saying so."""
    begin(trainer, inbox, "secret", input_images=FEW, hf_repo_id="nobody-at-all/nothing", hf_token=SECRET, **QUICK)
    end = inbox.wait_for_end()
    assert end["status"] == "failed"
    assert "hf_" in end["error"]
    received = [{**hook, "input": None} for hook in inbox.received]  # Cog repeats the request to the one who sent it
    assert SECRET not in json.dumps(received)
    assert SECRET not in trainer.output.read_text(encoding="utf-8")
    assert trainer.leftovers() == []


@contextlib.contextmanager
def without(pattern, folder):
    """While files of a folder are gone."""
    files = [path for path in folder.glob(pattern) if path.is_file()]
    assert files
    for path in files:
        path.rename(path.with_name(f"{path.name}.away"))
    try:
        yield
    finally:
        for path in files:
            path.with_name(f"{path.name}.away").rename(path)


NO_BASE = "ValueError: FLUX_BASE: base is not a complete FLUX base in diffusers' layout: "


@pytest.mark.parametrize(
    ("stage", "lost", "inputs", "told"),
    [
        (
            "captioning",
            "captioner/*.safetensors",
            {"captioning": "automatic"},
            "ValueError: the captioning model ",
        ),
        ("encoding pictures", "base/vae/*.safetensors", {}, f"{NO_BASE}vae has no"),
        ("encoding prompts", "base/text_encoder_2/*.safetensors", {}, f"{NO_BASE}text_encoder_2 has no"),
        ("loading the transformer", "base/transformer/*.safetensors", {}, f"{NO_BASE}transformer has no"),
    ],
    ids=["captioning", "pictures", "prompts", "transformer"],
)
def test_a_failure_in_any_stage_says_which_file_is_gone_and_leaves_nothing(
    trainer, models, inbox, stage, lost, inputs, told
):
    """Files of the models that are lost while a training runs. The unpacking fails above; the packing, below."""
    run = f"failed-while-{stage.replace(' ', '-')}"
    begin(trainer, inbox, run, input_images=as_uri(zipped(100)), **{**QUICK, "training_steps": 40, **inputs})
    trainer.wait_for_line(run, "base:")  # found whole
    with without(lost, models):
        end = inbox.wait_for_end()
    assert end["status"] == "failed"
    assert [line for line in end["logs"].splitlines() if line.startswith("== ")][-1] == f"== {stage}"
    assert told in end["error"]
    assert trainer.leftovers() == []
    assert server.left_by_cog(run) == []


def test_previews_that_fail_while_it_trains_and_afterwards_leave_the_lora(trainer, models, inbox):
    begin(trainer, inbox, "no-previews", input_images=FEW, **{**QUICK, "training_steps": 40, "preview_every": 20})
    trainer.wait_for_line("no-previews", "== training")
    with without("base/vae/*.safetensors", models):
        end = inbox.wait_for_end()
    assert end["status"] == "succeeded"
    assert end["output"]["weights"]
    told = [line for line in end["logs"].splitlines() if "previews could not be drawn" in line]
    assert len(told) == 2, "at step 20 and at the end"
    assert all(f"({NO_BASE}vae has no" in line for line in told)


def test_a_failure_while_packing_says_what_is_gone_and_leaves_nothing(trainer, inbox):
    """As where something sweeps temporary files away."""
    begin(trainer, inbox, "failed-while-packing", input_images=FEW, **QUICK)
    trainer.wait_for_line("failed-while-packing", "== previews")
    for folder in trainer.temporary.glob("flux-lora-*"):
        shutil.rmtree(folder)
    end = inbox.wait_for_end()
    assert end["status"] == "failed"
    assert "flux-lora-" in end["error"]
    assert trainer.leftovers() == []
    assert server.left_by_cog("failed-while-packing") == []


@pytest.mark.parametrize(
    ("stage", "pictures", "inputs"),
    [
        ("unpacking", 300, {}),
        ("captioning", 300, {}),
        ("encoding pictures", 300, {}),
        ("encoding prompts", 2, {"preservation": "1"}),
        ("drawing for prior preservation", 2, {"preservation": "1"}),
        ("training", 2, {"training_steps": 5000}),
        ("previews", 2, {"preview_prompts": "\n".join(["a [trigger]", "a house", "a tree", "a car"])}),
        ("packing", 2, {}),
    ],
)
def test_a_cancel_in_any_stage_ends_the_run_and_leaves_nothing(trainer, inbox, stage, pictures, inputs):
    run = f"cancelled-while-{stage.replace(' ', '-')}"
    begin(trainer, inbox, run, input_images=as_uri(zipped(pictures)), **{**QUICK, **inputs})
    trainer.wait_for_line(run, f"== {stage}")
    cancelled = time.monotonic()
    trainer.ask("POST", f"/trainings/{run}/cancel")
    end = inbox.wait_for_end()
    seconds = time.monotonic() - cancelled
    print(f"cancelled while {stage}: the end came after {seconds:.2f} s")
    # Packing two pictures' LoRA takes some milliseconds: the cancel may come after it.
    assert end["status"] == "canceled" or (stage == "packing" and end["status"] == "succeeded")
    assert seconds < CANCEL_SECONDS
    assert [name for name in trainer.leftovers() if not name.endswith("trained_model.tar")] == []
    assert trainer.leftovers() == [] or end["status"] == "succeeded"
    assert server.left_by_cog(run) == []


def test_after_all_that_a_zip_by_url_gives_the_first_trainings_weights_with_webhooks_in_order(trainer, inbox, first):
    begin(trainer, inbox, "by-url", input_images=f"{inbox.url}/few.zip", **QUICK)
    trainer.wait_for_line("by-url", "== ")
    assert trainer.ask("POST", "/trainings", {"input": {"input_images": FEW, **QUICK}})[0] == 409
    end = inbox.wait_for_end()
    assert end["status"] == "succeeded", end
    assert members(end)[WEIGHTS] == members(first)[WEIGHTS]

    logs = [str(hook.get("logs", "")) for hook in inbox.received]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(logs))
    progress = [hook["metrics"]["progress"] for hook in inbox.received if "progress" in hook.get("metrics", {})]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    assert [hook["status"] for hook in inbox.received[:-1]] == ["processing"] * (len(inbox.received) - 1)
    assert server.left_by_cog("by-url") == []
