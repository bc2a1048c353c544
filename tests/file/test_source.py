"""Fetching a LoRA from the Hub and from web addresses: whose it is, which revision, and what is told when it fails.

Files, folders, tars and redirects are in `test_generate.py`, a cancel in `test_wait.py`.
"""

import base64
import resource
import socketserver
import tarfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora.disk import DiskError
from lora.file import source
from lora.web import TRIES
from tests import hub_server
from tests.hub_server import WRITE_TOKEN, Hub

LORA = b"a LoRA"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.asked_by_the_library(monkeypatch, tmp_path) as running:
        running.private = {"me/lora": True}
        running.files = {
            "me/lora": {"lora.safetensors": LORA, "old/b.safetensors": b"old", "b.bin": b""},
            "me/lora@v2": {"lora.safetensors": b"of v2", "b.safetensors": b"b"},
            "me/lora@refs/pr/1": {"in/a folder/lora.safetensors": b"of a proposal"},
        }
        yield running


class Web(socketserver.ThreadingTCPServer):
    """Gives its answers as they are, one a connection, the last of them for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answers: list[bytes] = []
        self.asked: list[bytes] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Web)
        self.server.asked.append(self.rfile.readline().strip())
        while self.rfile.readline().strip():
            pass
        answers = self.server.answers
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr("lora.web.time.sleep", lambda seconds: None)
    with Web() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def _answer(content: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers])
    return f"{head}\r\n\r\n".encode() + content


def _fetched(origin: str, folder: Path, token: str | None = None) -> bytes:
    return source.fetch(origin, folder, "resume_from", token).read_bytes()


def _refusal(origin: str, folder: Path, token: str | None = None) -> str:
    """What is told, which begins with the input's name; nothing that a traceback would show holds the secret."""
    with pytest.raises(ValueError, match=r"^resume_from: ") as caught:
        source.fetch(origin, folder, "resume_from", token)
    assert "secret" not in "".join(traceback.format_exception(caught.value, limit=0))
    return str(caught.value)


# ---------------------------------------------------------------- the Hub


@pytest.mark.parametrize(
    "origin",
    [
        "me/lora",
        "me/lora/lora.safetensors",
        "huggingface.co/me/lora",
        "www.huggingface.co/me/lora/blob/main/lora.safetensors",
        "https://huggingface.co/me/lora/blob/main/lora.safetensors",
    ],
)
@pytest.mark.parametrize("other", ["hf_secret_of_another", None])
def test_what_one_token_may_read_is_not_given_to_the_next_user(
    origin: str, other: str | None, hub: Hub, tmp_path: Path
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    assert _fetched(origin, mine, WRITE_TOKEN) == LORA
    assert "or the token may not read it" in _refusal(origin, theirs, other)
    assert not (tmp_path / "cache").exists(), "the library's cache is everybody's"


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("", LORA),
        ("/tree/main", LORA),
        ("/resolve/main/lora.safetensors?download=true", LORA),
        ("/resolve/v2/lora.safetensors", b"of v2"),
        ("/blob/v2/b.safetensors", b"b"),
        ("/tree/v2", b"of v2"),
        ("/blob/refs%2Fpr%2F1/in/a%20folder/lora.safetensors", b"of a proposal"),
        ("/tree/refs%2Fpr%2F1", b"of a proposal"),
    ],
)
def test_an_address_of_the_hub_means_its_revision(path: str, content: bytes, hub: Hub, tmp_path: Path) -> None:
    assert _fetched(f"https://huggingface.co/me/lora{path}", tmp_path, WRITE_TOKEN) == content


def test_a_token_that_the_hub_refuses_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [("me/lora", 401)] * 9
    assert "the Hugging Face Hub refuses the token for me/lora; give one" in _refusal("me/lora", tmp_path, "hf_old")


def test_an_id_may_name_a_file_in_a_folder(hub: Hub, tmp_path: Path) -> None:
    assert _fetched("me/lora/old/b.safetensors", tmp_path, WRITE_TOKEN) == b"old"


def test_a_revision_that_is_not_there_is_told(hub: Hub, tmp_path: Path) -> None:
    told = _refusal("https://huggingface.co/me/lora/resolve/v9/lora.safetensors?secret=1", tmp_path, WRITE_TOKEN)
    assert "me/lora/lora.safetensors at v9 could not be fetched from the Hub (RevisionNotFoundError: 404" in told


def test_a_file_of_the_hub_that_does_not_fit_on_the_disk_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/lora"] = {"lora.safetensors": bytes(2_000_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskError, match="cannot be written: a file may not be that large"):
            _fetched("me/lora", tmp_path / "mine", WRITE_TOKEN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------- the web


def test_an_address_in_capitals_is_one(web: Web, tmp_path: Path) -> None:
    web.answers = [_answer(LORA)]
    assert _fetched(web.url.replace("http", "HTTP") + "/lora.safetensors", tmp_path) == LORA


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nLoR", "IncompleteRead"),
        (b"GET /?key=secret answers nothing\r\n\r\n", "could not be fetched: GET / answers nothing"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "got more than 100 headers"),
    ],
)
def test_an_answer_that_is_no_whole_http_is_asked_for_again_and_then_told(
    broken: bytes, says: str, web: Web, tmp_path: Path
) -> None:
    web.answers = [broken, _answer(LORA)]
    assert _fetched(f"{web.url}/lora.safetensors?key=secret", tmp_path) == LORA
    web.answers, web.asked = [broken], []
    told = _refusal(f"{web.url}/lora.safetensors?key=secret", tmp_path)
    assert says in told
    assert f"{web.url}/lora.safetensors could not be fetched" in told
    assert len(web.asked) == TRIES


@pytest.mark.parametrize(
    "rest", ["/my lora.safetensors?key=secret", "/müll.safetensors?key=secret", "x/lora.safetensors?key=secret"]
)
def test_an_address_that_is_none_is_told_at_once_without_its_secrets(rest: str, web: Web, tmp_path: Path) -> None:
    web.answers = [_answer(LORA)]
    assert "is no address that can be asked" in _refusal(web.url + rest, tmp_path)
    assert web.asked == []


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        ("http://me:secret@localhost/lora.safetensors", "http://localhost/lora.safetensors is no address"),
        ("http://me:secret@[::1/lora.safetensors", "this address cannot be read"),
        ("http://me:secret@x\u2100y/lora.safetensors", "this address cannot be read"),
        ("ftp://me:secret@localhost/lora.tar?key=secret#secret", "'ftp://localhost/lora.tar' is no file"),
        ("https:/localhost/lora.tar?key=secret", "could not be fetched"),
    ],
)
def test_an_address_of_no_use_is_shown_without_its_secrets(origin: str, says: str, web: Web, tmp_path: Path) -> None:
    assert says in _refusal(origin, tmp_path)


def test_a_redirect_elsewhere_is_told_without_its_secrets(web: Web, tmp_path: Path) -> None:
    web.answers = [_answer(b"", "302 Found", "Location: gopher://me:secret@localhost/lora.tar?key=secret")]
    assert "Redirection to url 'gopher://localhost/lora.tar' is not" in _refusal(f"{web.url}/lora.tar", tmp_path)


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><title>Log in</title>", b"\xef\xbb\xbf\n <html>", b"<?xml version='1.0'?><Error/>"]
)
def test_a_web_page_in_place_of_the_file_is_told(page: bytes, web: Web, tmp_path: Path) -> None:
    web.answers = [_answer(page)]
    told = _refusal(f"{web.url}/lora.safetensors?key=secret", tmp_path)
    assert f"{web.url}/lora.safetensors answers with a web page: give the address of the file itself" in told
    assert len(web.asked) == 1


@pytest.mark.parametrize("name", ["n" * 300, "folder/" + "n" * 300 + "/lora.safetensors.gz"])
def test_a_name_that_no_disk_takes_is_told(name: str, tmp_path: Path) -> None:
    assert "is no file or folder here" in _refusal(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["../trained_model.tar", "./x.safetensors", "out/trained_model.tar", "loras/x.safetensors", "/no/x", "~/x"]
)
def test_a_path_where_nothing_lies_is_no_id_of_the_hub(name: str, tmp_path: Path) -> None:
    assert f"there is no file {name!r} where this runs; check its path" in _refusal(name, tmp_path)


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_file_behind_a_login_asks_for_the_token_in_the_address(status: str, web: Web, tmp_path: Path) -> None:
    web.answers = [_answer(b"", status)]
    told = _refusal(f"{web.url}/api/download/models/7?key=secret", tmp_path)
    assert f"answers {status}: it asks for a login" in told
    assert "add your token to the address (?token=" in told
    assert len(web.asked) == 1


# ---------------------------------------------------------------- other ways to name a LoRA


@pytest.mark.parametrize(
    "head", ["data:application/x-tar;base64,", "DATA:;base64,", "data:text/plain;charset=x;BASE64,"]
)
def test_a_data_address_holds_the_file_itself(head: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 3000
    assert _fetched(head + base64.b64encode(content).decode(), tmp_path) == content


def test_a_data_address_may_be_percent_encoded_and_hold_a_trainers_tar(tmp_path: Path) -> None:
    assert _fetched("data:,a%20LoRA%00", tmp_path / "a") == b"a LoRA\0"
    assert _fetched("data:;base64,YSBMb1JBLg%3D%3D", tmp_path / "b") == b"a LoRA."
    (tmp_path / "x").write_bytes(LORA)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", "output/flux_train_replicate/lora.safetensors")
    packed = base64.b64encode((tmp_path / "x.tar").read_bytes()).decode()
    assert _fetched(f"data:application/x-tar;base64,{packed}", tmp_path / "c") == LORA


@pytest.mark.parametrize("content", ["base64" * 200_000 + "!", "nothing"])
def test_a_damaged_data_address_is_told_without_its_content(content: str, tmp_path: Path) -> None:
    address = f"data:;base64,{content}" if content != "nothing" else "data:" + "x" * 900_000
    told = _refusal(address, tmp_path)
    assert f"this data: address of {len(address):,} characters is damaged" in told
    assert len(told) < 300


def test_a_data_address_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_BYTES", 50)
    assert "holds more than" in _refusal(f"data:;base64,{'AAAA' * 20}", tmp_path)


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        (
            "https://civitai.com/models/12345/a-style?token=secret",
            "is a page of Civitai: give the address of its Download",
        ),
        ("civitai.com/models/12345", "https://civitai.com/api/download/models/<version's number>"),
        ("https://replicate.com/me/my-lora/versions/5c7d", "is a page of Replicate: give the address of the weights"),
        (f"me/my-lora/{'5c' * 32}", "is no file here, and a version of a model on Replicate cannot"),
        (f"me/my-lora:{'5c' * 32}", "is no file here, and a version of a model on Replicate cannot"),
        ("me/my-lora/folder", "a file on the Hub is owner/name/file.safetensors"),
    ],
)
def test_a_page_or_a_version_is_told_with_what_to_give_instead(origin: str, says: str, tmp_path: Path) -> None:
    assert says in _refusal(origin, tmp_path)


def test_a_page_of_civitai_that_names_its_version_means_that_file() -> None:
    page = "https://www.civitai.com/models/12345/a-style?modelVersionId=678&token=mine"
    assert source._file_of_page(page) == "https://civitai.com/api/download/models/678?token=mine"
    other = "https://example.com/models/1?modelVersionId=678"
    assert source._file_of_page(other) == other


@pytest.mark.parametrize("start", ["", "/", "https://127.0.0.1:1/", "owner/", "ftp://", "https://[", "C:\\"])
def test_no_message_shows_more_than_200_characters_of_an_input(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.web.time.sleep", lambda seconds: None)
    assert "n" * 201 not in _refusal(start + "n" * 100_000, tmp_path)
