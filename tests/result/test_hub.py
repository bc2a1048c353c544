"""Publishing: the card, what is asked before a training, and uploads by the real `huggingface_hub` that go wrong."""

import ctypes
import json
import re
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora import job
from lora.file import source, weights
from lora.flux import adapter, base
from lora.request import Secrets, TrainRequest
from lora.result import hub
from tests import hub_server
from tests.hub_server import DROP, FINE_TOKEN, READ_TOKEN, WRITE_TOKEN, Hub
from tests.test_request import a_request

FILES: dict[str, Path | bytes] = {"lora.safetensors": b"weights" * 1000, "README.md": b"---\nlicense: other\n---\n"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server.asked_by_the_library(monkeypatch, tmp_path) as running:
        yield running


def _upload(server: Hub, private: bool = True, token: str = WRITE_TOKEN) -> tuple[str, list[str], list[float]]:
    """The page's address, the log's lines, and the pauses that were made."""
    lines: list[str] = []
    pauses: list[float] = []
    url = hub.upload("me/lora", token, private, FILES, lines.append, pauses.append)
    return url, lines, pauses


# ---------------------------------------------------------------- before the training


@pytest.mark.parametrize("repo", ["me/new", "studio/new", "Me/new"])
def test_a_token_that_may_write_passes(repo: str, server: Hub) -> None:
    hub.check_access(repo, WRITE_TOKEN, private=True)
    assert server.private == {}, "nothing is made before there is something to upload"


@pytest.mark.parametrize(
    ("repo", "token", "told"),
    [
        ("me/new", "hf_unknown", "hf_token: the Hugging Face Hub refuses this token"),
        ("me/new", READ_TOKEN, "hf_token: this token may not write to me/new; make one with the role 'write'"),
        (
            "other/new",
            WRITE_TOKEN,
            "hf_repo_id: hf_token is me's, who may not write to other; the owner may be club or me",
        ),
        ("club/new", WRITE_TOKEN, "hf_repo_id: me may only read in club"),
        ("Club/new", WRITE_TOKEN, "hf_repo_id: me may only read in club"),
        ("me/new", FINE_TOKEN, "hf_token: this token may not write to me/new"),
    ],
)
def test_a_token_that_may_not_write_is_refused(repo: str, token: str, told: str, server: Hub) -> None:
    with pytest.raises(ValueError, match="hf_") as caught:
        hub.check_access(repo, token, private=True)
    assert str(caught.value).startswith(told)
    assert token not in str(caught.value)


@pytest.mark.parametrize("entity", ["me", "me/new"])
def test_a_fine_grained_token_with_the_right_to_write_passes(entity: str, server: Hub) -> None:
    server.fine_scopes = [{"entity": {"type": "user", "name": entity}, "permissions": ["repo.write"]}]
    for repo in ("me/new", "ME/new"):
        hub.check_access(repo, FINE_TOKEN, private=True)


def test_a_repository_that_exists_must_be_writable_and_as_private_as_asked(server: Hub) -> None:
    server.private = {"me/shown": False, "me/hidden": True}
    with pytest.raises(ValueError, match="hf_private: me/shown exists and is public"):
        hub.check_access("me/shown", WRITE_TOKEN, private=True)
    hub.check_access("me/shown", WRITE_TOKEN, private=False)
    hub.check_access("me/hidden", WRITE_TOKEN, private=True)
    server.faults = [("auth-check/write", 403)]
    with pytest.raises(ValueError, match="hf_token: this token may not write to me/hidden, which exists"):
        hub.check_access("me/hidden", WRITE_TOKEN, private=True)


@pytest.mark.parametrize("status", [500, DROP])
def test_a_hub_that_cannot_be_asked_is_told_before_the_training(status: int, server: Hub) -> None:
    server.faults = [("whoami", status)]
    with pytest.raises(ValueError, match=r"hf_repo_id: the Hugging Face Hub could not be asked for me/x .*try again"):
        hub.check_access("me/x", WRITE_TOKEN, private=True)


# ---------------------------------------------------------------- the upload


@pytest.mark.parametrize("private", [True, False])
def test_the_files_arrive_in_a_repository_as_private_as_asked(private: bool, server: Hub) -> None:
    url, lines, pauses = _upload(server, private)
    assert url == f"{server.url}/me/lora"
    assert server.files["me/lora"] == FILES
    assert server.private == {"me/lora": private}
    assert (lines, pauses) == ([], [])


def test_a_second_upload_replaces_the_first(server: Hub) -> None:
    _upload(server)
    hub.upload("me/lora", WRITE_TOKEN, True, {"lora.safetensors": b"new"}, print)
    assert server.files["me/lora"]["lora.safetensors"] == b"new"


@pytest.mark.parametrize("where", ["repos/create", "preupload", "objects/batch", "PUT /store", "commit/main"])
@pytest.mark.parametrize("status", [429, 500, DROP])
def test_what_passes_is_tried_again(where: str, status: int, server: Hub) -> None:
    server.faults = [(where, status)]
    _upload(server)
    assert server.files["me/lora"] == FILES
    assert server.faults == []


def test_a_conflict_with_another_commit_is_tried_again_and_told(server: Hub) -> None:
    server.faults = [("commit/main", 409)]
    _, lines, pauses = _upload(server)
    assert lines == ["the upload to me/lora did not work (the Hub answers 409); again in 2 s"]
    assert pauses == [2.0]
    assert server.files["me/lora"] == FILES


def test_a_server_that_names_a_time_is_believed(server: Hub) -> None:
    server.faults, server.retry_after = [("commit/main", 429)], "17"
    assert _upload(server)[2] == [17.0]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_final(status: int, server: Hub) -> None:
    server.faults = [("commit/main", status)]
    with pytest.raises(
        hub.UploadFailed, match=rf"the upload to me/lora failed: the Hub answers {status}; hf_token may not"
    ):
        _upload(server)
    assert sum(asked.endswith("/commit/main") for asked in server.requests) == 1


@pytest.mark.parametrize("status", [500, DROP])
def test_what_does_not_pass_is_given_up(status: int, server: Hub) -> None:
    server.faults = [("commit/main", status)] * hub.TRIES
    with pytest.raises(hub.UploadFailed, match=r"the upload to me/lora failed: .*from the tar yourself") as caught:
        _upload(server)
    assert server.faults == []
    assert WRITE_TOKEN not in str(caught.value)


def test_a_header_that_is_refused_does_not_show_the_token(server: Hub) -> None:
    lines: list[str] = []
    with pytest.raises(hub.UploadFailed, match=r"Illegal header value b'Bearer …") as caught:
        hub.upload("me/lora", f"{WRITE_TOKEN}\n", True, FILES, lines.append, lambda seconds: None)
    assert len(lines) == hub.TRIES - 1
    assert WRITE_TOKEN not in "".join([str(caught.value), *lines])


def test_an_upload_that_is_given_up_in_a_pause_is_not_tried_again(server: Hub) -> None:
    server.faults = [("commit/main", 409)]
    pauses: list[float] = []
    with pytest.raises(hub.UploadFailed, match="nobody waits"):
        hub.upload("me/lora", WRITE_TOKEN, True, FILES, print, pauses.append, given_up=lambda: bool(pauses))
    assert server.files["me/lora"] == {}
    assert sum(asked.endswith("/commit/main") for asked in server.requests) == 1


def test_weights_of_other_steps_go_into_a_folder_from_which_no_loader_takes_the_lora(
    server: Hub, tmp_path: Path
) -> None:
    for name in ("lora", "step-0500", "step-0600"):
        save_file({"transformer_blocks.0": torch.ones(2, 8)}, tmp_path / f"{name}.safetensors")
    request, others = a_request(tmp_path, hf_repo_id="me/lora"), sorted(tmp_path.glob("step-*"))
    hub.publish(request, WRITE_TOKEN, {"base": "toyflux"}, tmp_path / "lora.safetensors", [], 0, print, others=others)
    names = {name for name in server.files["me/lora"] if name.endswith(".safetensors")}
    assert names == {"lora.safetensors", "checkpoints/step-0500.safetensors", "checkpoints/step-0600.safetensors"}
    taken = source.fetch("me/lora", tmp_path / "fetched", "lora_weights", WRITE_TOKEN)
    assert taken.name == "lora.safetensors"


class Cancelled(BaseException):
    """As cog.CancelationException: no Exception."""


@pytest.mark.parametrize("where", ["repos/create", "PUT /store"])
def test_after_a_cancel_nothing_is_committed(where: str, server: Hub, tmp_path: Path) -> None:
    save_file({"transformer_blocks.0": torch.ones(2, 8)}, tmp_path / "lora.safetensors")
    request = a_request(tmp_path, hf_repo_id="me/lora")
    ends: list[BaseException] = []
    server.hold = where

    def publish() -> None:
        try:
            hub.publish(request, WRITE_TOKEN, {"base": "toyflux"}, tmp_path / "lora.safetensors", [], 0, print)
        except BaseException as error:
            ends.append(error)

    training = threading.Thread(target=publish)
    training.start()
    assert server.held.wait(60)
    [left] = [thread for thread in threading.enumerate() if thread.name == "interruptibly"]
    assert training.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(training.ident), ctypes.py_object(Cancelled))
    training.join(60)
    assert [type(end) for end in ends] == [Cancelled]
    server.go_on.set()
    left.join(60)
    assert not left.is_alive()
    assert server.files["me/lora"] == {}
    assert re.search(where, server.requests[-1]), "nothing more is asked"


# ---------------------------------------------------------------- in a job


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainRequest:
    """A request that only packs a LoRA of the toy base, which is all of a job but the training."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    transformer = base.find(None, None).skeleton().to_empty(device="cpu")
    parameters = adapter.attach(transformer, 4, seed=1)
    for parameter in parameters:
        parameter.data.normal_()
    weights.write(tmp_path / "earlier.safetensors", adapter.trained(transformer), {"modelspec.title": "earlier"})
    (tmp_path / "a.zip").write_bytes(b"")
    return a_request(
        tmp_path / "a.zip", training_steps=0, resume_from=str(tmp_path / "earlier.safetensors"), hf_repo_id="me/lora"
    )


def _run(
    request: TrainRequest, tmp_path: Path, token: str = WRITE_TOKEN, flux_base: str | None = None
) -> tuple[Path, list[str], dict[str, float]]:
    lines: list[str] = []
    metrics: dict[str, float] = {}
    tar = job.run(
        request,
        secrets=Secrets(hf_token=token),
        output=tmp_path / "out",
        flux_base=flux_base,
        captioner=None,
        log=lines.append,
        metric=metrics.__setitem__,
    )
    return tar, lines, metrics


def _read(tar: Path, name: str) -> bytes:
    with tarfile.open(tar) as opened:
        member = opened.extractfile(name)
        assert member is not None
        return member.read()


def test_a_job_uploads_the_tars_own_weights_and_a_later_one_goes_on_from_the_repository(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    tar, lines, metrics = _run(packing, tmp_path)
    assert server.files["me/lora"].keys() == {"lora.safetensors", "README.md"}
    assert _read(tar, job.WEIGHTS_MEMBER) == server.files["me/lora"]["lora.safetensors"]
    assert json.loads(_read(tar, "request.json"))["upload"] == {"repository": "me/lora", "url": f"{server.url}/me/lora"}
    assert lines[-1] == f"uploaded: {server.url}/me/lora"
    assert metrics["upload_failed"] == 0

    again = a_request(packing.input_images, training_steps=0, resume_from="me/lora")
    second, _, _ = _run(again, tmp_path / "second")
    assert _read(second, job.WEIGHTS_MEMBER) == server.files["me/lora"]["lora.safetensors"]


def test_the_card_of_a_toy_lora_names_no_flux_and_no_word_that_nobody_trained(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    _run(packing, tmp_path)
    card = server.files["me/lora"]["README.md"]
    assert isinstance(card, bytes)
    assert "FLUX.1-dev" not in card.decode()
    assert "from_pretrained" not in card.decode()
    assert "replicate.com" not in card.decode()
    assert "`toyflux`" in card.decode()
    assert "script/generate -i lora_weights=me/lora -i prompt='a red circle'" in card.decode()
    assert "TOK" not in card.decode(), "the default of an input is no word that this LoRA was trained with"


def test_nothing_of_a_base_is_fetched_for_packing_but_its_layers_sizes(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    """FLUX.1-dev's files are 33 GB; and no GPU is needed to pack."""
    server.private["club/base"] = False
    config = (base.TOY / "transformer" / "config.json").read_bytes()
    server.files["club/base"] = {"transformer/config.json": config}
    tar, lines, _ = _run(packing, tmp_path, flux_base="club/base")
    assert weights.read(_extracted(tar, tmp_path)).ranks == [4]
    decided = json.loads(_read(tar, "request.json"))["decided"]
    assert decided.keys() == {"base", "guidance_embeds", "resume_from_sha256"}
    assert decided["base"] == "club/base"
    assert "base: club/base; a LoRA is packed by the names and sizes of its layers alone" in lines
    wide = json.loads(config) | {"num_attention_heads": 8}
    server.private["club/wide"] = False
    server.files["club/wide"] = {"transformer/config.json": json.dumps(wide).encode()}
    with pytest.raises(ValueError, match="resume_from: this LoRA does not fit"):
        _run(packing, tmp_path, flux_base="club/wide")


def test_a_failed_upload_costs_nobody_the_weights_and_is_told_last(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    server.faults = [("commit/main", 403)]
    tar, lines, metrics = _run(packing, tmp_path)
    assert weights.read(_extracted(tar, tmp_path)).ranks == [4]
    assert lines[-1].startswith("ERROR: the upload to me/lora failed: the Hub answers 403")
    assert json.loads(_read(tar, "request.json"))["upload"]["failed"] in lines[-1]
    assert metrics["upload_failed"] == 1
    assert WRITE_TOKEN.encode() not in tar.read_bytes()
    assert not any(WRITE_TOKEN in line for line in lines)


def test_an_answer_that_nobody_foresaw_costs_nobody_the_weights(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    server.faults = [("commit/main", 200)]  # without the commitUrl that the library takes for granted
    tar, lines, metrics = _run(packing, tmp_path)
    assert weights.read(_extracted(tar, tmp_path)).ranks == [4]
    assert lines[-1].startswith("ERROR: the upload to me/lora failed: KeyError: 'commitUrl'; upload lora.safetensors")
    assert metrics["upload_failed"] == 1


def test_a_token_that_may_not_write_ends_the_job_before_anything_is_loaded(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="hf_token: this token may not write"):
        _run(packing, tmp_path, READ_TOKEN)


def test_the_hub_is_not_asked_about_a_request_that_is_wrong_itself(
    packing: TrainRequest, server: Hub, tmp_path: Path
) -> None:
    wrong = a_request(tmp_path / "gone.zip", hf_repo_id="me/lora", trigger_word=" ")
    with pytest.raises(ValueError, match="input_images"):
        _run(wrong, tmp_path)
    assert server.requests == []


def _extracted(tar: Path, folder: Path) -> Path:
    (folder / "taken").mkdir()
    return weights.take_out(tar, folder / "taken")
