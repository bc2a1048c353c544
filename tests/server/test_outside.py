"""What a caller's address may lead to: public machines, whatever it redirects to and whatever its name means."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from server import outside
from server.outside import Forbidden, Outside


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "255.255.255.255", "::"),
    ],
)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not outside.is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses_are(address: str) -> None:
    assert outside.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("ftp://example.com/a", "file:///etc/passwd", "http://", "http://user:word@example.com/", "http://[::1", "x"),
        *(
            "http://localhost/",
            "http://127.1.1.1:80/",
            "https://metadata.google.internal/",
            "http://[::1]/",
            "http://a:99999/",
        ),
    ],
)
def test_addresses_that_cannot_be_asked_are_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be|not a public|cannot be read|may not hold"):
        outside.check(address, allow_private=False)


class Site(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        port = self.server.server_address[1]
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b".")
                    time.sleep(0.1)
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://{self.path[4:]}:{port}/secret")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"ten bytes." * (1000 if self.path == "/large" else 1))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A site under a name that is looked up as public.test, on loopback, which the check takes for a public address."""
    Site.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        plain = socket.getaddrinfo
        names = {"public.test": "127.0.0.1", "inside.test": "127.0.0.2"}
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *rest, **more: plain(names.get(host, host), *rest, **more)
        )
        honest = outside.is_public
        monkeypatch.setattr(outside, "is_public", lambda address: address == "127.0.0.1" or honest(address))
        yield f"http://public.test:{server.server_address[1]}"
        server.shutdown()


def fetch(address: str, path: Path, limit: int = 100) -> str:
    async def run() -> str:
        async with Outside(allow_private=False) as client:
            return await client.fetch(address, path, limit)

    return asyncio.run(run())


def test_a_public_file_is_fetched(site: str, tmp_path: Path) -> None:
    assert fetch(f"{site}/file", tmp_path / "file") == "text/plain"
    assert (tmp_path / "file").read_bytes() == b"ten bytes."


def test_an_address_in_any_letters_is_asked_as_browsers_ask_it(site: str, tmp_path: Path) -> None:
    fetch(f"{site}/ä b/%2F+?q=ü&X-Amz-Signature=a%2Fb%3D", tmp_path / "file")
    assert Site.asked == ["/%C3%A4%20b/%2F+?q=%C3%BC&X-Amz-Signature=a%2Fb%3D"]


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "FETCH_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"public\.test sent no whole file in"):
        fetch(f"{site}/slow", tmp_path / "file")


def test_a_name_that_means_a_private_address_is_not_asked(site: str, tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match=r"inside\.test is not a public address"):
        fetch(site.replace("public", "inside") + "/secret", tmp_path / "file")
    assert Site.asked == []


def test_a_redirect_to_a_private_address_is_not_followed(site: str, tmp_path: Path) -> None:
    with pytest.raises(Forbidden):
        fetch(f"{site}/to/inside.test", tmp_path / "file")
    with pytest.raises(Forbidden):
        fetch(f"{site}/to/127.0.0.3", tmp_path / "file")
    assert Site.asked == ["/to/inside.test", "/to/127.0.0.3"]


def test_more_than_the_limit_is_not_read(site: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="larger than"):
        fetch(f"{site}/large", tmp_path / "file")


def test_webhooks_go_to_public_addresses_alone(site: str) -> None:
    async def run(address: str) -> int:
        async with Outside(allow_private=False) as client:
            return await client.post(address, {}, b"{}")

    with pytest.raises(Forbidden):
        asyncio.run(run(site.replace("public", "inside")))
    assert asyncio.run(run(f"{site}/hook")) == 501, "this site takes no POST, but it was asked"
