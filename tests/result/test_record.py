"""What a run says of itself: the hash of its data, request.json, and the header of the weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora.pictures.photos import Photo
from lora.result import record
from tests.test_request import a_request

DECIDED: dict[str, Any] = {
    "base": "toyflux",
    "guidance_embeds": True,
    "learning_rate": 2e-3,
    "resolutions": (64, 96),
    "seed": 5,
    "plan": "CPU",
    "weights_of_step": 3,
    "steps": 900,
}


def _photos(folder: Path, **captions: str | None) -> list[Photo]:
    found = []
    for name, caption in captions.items():
        (folder / name).write_bytes(name.encode())
        found.append(Photo(name=name, path=folder / name, caption=caption))
    return found


def test_the_datas_hash_sees_names_bytes_and_captions_and_not_where_they_lie(tmp_path: Path) -> None:
    photos = _photos(tmp_path, a="one", b=None)
    (tmp_path / "elsewhere").mkdir()
    assert record.data_hash(photos) == record.data_hash(_photos(tmp_path / "elsewhere", a="one", b=None))
    others = [_photos(tmp_path, a="one"), _photos(tmp_path, a="two", b=None), _photos(tmp_path, a="on", b="e")]
    hashes = {record.data_hash(other) for other in (photos, *others)}
    (tmp_path / "a").write_bytes(b"another picture")
    assert len(hashes | {record.data_hash(photos)}) == 5


def test_request_json_holds_every_input_what_was_decided_versions_and_the_data(tmp_path: Path) -> None:
    request = a_request(tmp_path / "secret name.zip", seed=None)
    told = json.loads(record.request_json(request, DECIDED, "ab" * 32))
    assert told["inputs"].keys() == vars(request).keys() - {"faults"}
    assert told["inputs"]["input_images"] == ".zip"
    assert told["inputs"]["seed"] is None
    assert told["decided"] == {**DECIDED, "resolutions": [64, 96]}
    assert told["data_sha256"] == "ab" * 32
    assert set(told["versions"]) == set(record.PACKAGES)
    assert "upload" not in told


def test_equal_runs_have_equal_ids_and_an_upload_does_not_change_them(tmp_path: Path) -> None:
    def run_id(upload: dict[str, str] | None = None, **changes: Any) -> str:
        told = json.loads(record.request_json(a_request(tmp_path / "a.zip", **changes), DECIDED, "x", upload))
        assert told.get("upload") == upload
        return told["run_id"]

    assert run_id() == run_id() == run_id({"repository": "me/x", "failed": "no"})
    assert run_id() != run_id(lora_rank=8)


def test_the_signature_in_an_earlier_loras_address_is_not_kept(tmp_path: Path) -> None:
    request = a_request(
        tmp_path / "a.zip", resume_from="https://me:secret@x.org/lora.tar?X-Amz-Signature=secret#secret"
    )
    told = record.request_json(request, DECIDED, "x")
    assert "https://x.org/lora.tar" in told
    assert "secret" not in told


def test_the_content_of_an_earlier_lora_that_is_its_own_address_is_not_kept(tmp_path: Path) -> None:
    request = a_request(tmp_path / "a.zip", resume_from="data:application/x-tar;base64," + "QUJD" * 10_000)
    told = record.request_json(request, DECIDED, "x")
    assert '"data:application/x-tar;base64,..."' in told
    assert "QUJD" not in told


def test_the_header_is_read_by_comfyui_and_by_the_web_sites_that_share_loras(tmp_path: Path) -> None:
    request = a_request(tmp_path / "a.zip", trigger_word="TOK", lora_rank=16, training_steps=900)
    header = record.header(request, DECIDED, ["a TOK", "TOK, a wall", "a wall"])
    assert header["modelspec.architecture"] == "flux-1-dev/lora"
    assert header["ss_sd_model_name"] == DECIDED["base"]
    assert header["modelspec.trigger_phrase"] == header["modelspec.title"] == "TOK"
    assert header["modelspec.resolution"] == "96x96"
    assert header["ss_base_model_version"] == "flux1"
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "16"
    assert (header["ss_learning_rate"], header["ss_max_train_steps"], header["ss_seed"]) == ("0.002", "900", "5")
    assert header["ss_steps"] == "3", "the step whose weights these are"
    assert all(isinstance(value, str) for value in header.values()), "safetensors takes nothing else"


def test_the_header_counts_the_trigger_word_and_shows_no_caption(tmp_path: Path) -> None:
    captions = ["a TOK on Anna's sofa", "TOK", "an empty room"]
    header = record.header(a_request(tmp_path / "a.zip"), DECIDED, captions)
    assert json.loads(header["ss_tag_frequency"]) == {"pictures": {"TOK": 2}}
    assert "Anna" not in json.dumps(header)


@pytest.mark.parametrize("content", [b"", b"x" * 100_000])
def test_a_files_hash_is_sha_256(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    assert record.file_hash(tmp_path / "f") == hashlib.sha256(content).hexdigest()
