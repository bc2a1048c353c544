"""The files that a command line names: what is taken, what is told, and that no secret shows."""

import http.server
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import cog
import pytest

from lora import web
from script import files

WANTED = "@FILE, a folder or a URL"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and the user's own, with a file and a folder of files in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "photos" / "in" / ".cache").mkdir(parents=True)
    for name in ("one.jpg", "one.txt", "in/two.jpg", ".hidden", "in/.cache/x.jpg"):
        (tmp_path / "photos" / name).write_bytes(name.encode())
    os.utime(tmp_path / "photos" / "one.jpg", (0, 0))  # a zip knows no year before 1980
    return tmp_path


class Server(http.server.ThreadingHTTPServer):
    """Gives one body, after as many failures as it is told to; cuts it short where it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures = 0
        self.status = 503
        self.short = False
        self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked += 1
        failing = self.server.failures > 0
        self.server.failures -= failing
        self.send_response(self.server.status if failing and not self.server.short else 200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"PK" if failing and self.server.short else b"PKPK")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)
    with Server() as running:
        threading.Thread(target=lambda: running.serve_forever(0.01), daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("text", ["a.zip", "~/a.zip", "./a.zip", "photos/../a.zip"])
def test_a_path_means_a_file_of_the_user(text: str, here: Path) -> None:
    assert files.meant(text, WANTED, folder=False).resolve() == here / "a.zip"


@pytest.mark.parametrize("text", ["https://x.org/a.zip?sig=1", "HTTPS://x.org/a.zip?sig=1"])
def test_an_address_is_one_in_any_case(text: str, here: Path) -> None:
    found = files.meant(text, WANTED, folder=False)
    assert isinstance(found, cog.URLPath)
    assert found.source == "https://x.org/a.zip?sig=1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty; it must be @FILE, a folder or a URL"),
        ("data:nonsense", "'data:nonsense,...' is no data address, which is data:TYPE;base64,CONTENT"),
        ("data:x;base64," + "§" * 900, "the content of this data address is damaged; copy it whole"),
        ("https://", "names no server"),
        ("https://u:SECRET@[x/a.zip?sig=SECRET", "names no server"),
        ("https://x.org/a b.zip?sig=SECRET", "holds a space"),
        ("s3://u:SECRET@bucket/a.zip?sig=SECRET", "cannot be fetched; give an https address"),
        ("nowhere.zip", "there is no file nowhere.zip in "),
        ("x" * 999, "there is no file xxx"),
        ("/nowhere/a.zip", "no file /nowhere/a.zip"),
        ("photos", "photos is a folder, and a file is wanted"),
    ],
)
def test_anything_else_gets_one_sentence_that_helps(text: str, told: str, here: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        files.meant(text, WANTED, folder=False)
    assert told in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_address_behind_an_at_sign_is_not_taken_for_a_file_of_text() -> None:
    with pytest.raises(ValueError, match=r"^@ takes a file that is here; write an address without the @$"):
        files.local("https://x.org/token?SECRET")


def test_a_folder_becomes_a_zip_of_its_files_without_hidden_ones(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(here))
    made = files.fetched("input_images", files.meant("~/photos", WANTED, folder=True))
    with zipfile.ZipFile(made) as opened:
        assert opened.namelist() == ["in/two.jpg", "one.jpg", "one.txt"]
        assert opened.read("in/two.jpg") == b"in/two.jpg"
    assert made == here / "input_images.zip"


def test_what_a_training_left_in_the_folder_is_not_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b-preview.webp", "mine.tar", "mine-preview.webp", "mine-report.html", "mine-checkpoints/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    with zipfile.ZipFile(files.packed(folder, tmp_path / "made.zip")) as opened:
        assert opened.namelist() == ["a.jpg", "b-preview.webp"]


@pytest.mark.parametrize("short", [False, True], ids=["503", "cut short"])
def test_a_download_that_breaks_is_tried_again(
    short: bool, server: Server, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(here))
    server.failures, server.short = 2, short
    made = files.fetched("input_images", files.meant(f"{server.url}/{quote('a b')}.tar.gz?sig=x", WANTED, folder=True))
    assert (made.name, made.read_bytes(), server.asked) == ("input_images.gz", b"PKPK", 3)


@pytest.mark.parametrize(
    ("status", "short", "asked", "told"),
    [
        (403, False, 1, "answers 403 Forbidden: it asks for a login; add your token to the address"),
        (404, False, 1, "answers 404 Not Found: check the address"),
        (503, False, 3, "answers 503 Service Unavailable: try again later"),
        (200, True, 3, "could not be fetched: it ended after 2 bytes of 4 (3 tries)"),
    ],
)
def test_a_download_that_fails_is_one_sentence_without_the_addresss_secrets(
    status: int, short: bool, asked: int, told: str, server: Server, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(here))
    server.failures, server.status, server.short = 9, status, short
    with pytest.raises(ValueError, match=rf"^input_images: {re.escape(server.url)}/a\.zip ") as caught:
        files.fetched("input_images", files.meant(f"{server.url}/a.zip?X-Amz-Signature=SECRET", WANTED, folder=True))
    assert told in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert server.asked == asked


def test_a_server_that_cannot_be_reached_is_told_with_its_port_in_plain_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.web.time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"^http://127\.0\.0\.1:9/a\.zip could not be fetched: Connection refused \(3"):
        web.download("http://127.0.0.1:9/a.zip?sig=SECRET", tmp_path / "a", 3)


def test_a_download_that_is_too_large_is_given_up(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is larger than"):
        web.download(f"{server.url}/a.zip", tmp_path / "a", 3)
