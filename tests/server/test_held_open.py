"""What a caller holds open (a stream, a slow download, a slow upload) takes no database connection from the others."""

import socket
import threading
import time
import zipfile
from contextlib import ExitStack

import httpx

from tests.server.conftest import QUICK, ROOT, Served

ALL = 24
"""More than the connections of an API process."""


def is_quick(http: httpx.Client) -> None:
    begun = time.monotonic()
    assert http.get("/models").status_code == 200
    assert time.monotonic() - begun < 10


def test_streams_and_slow_downloads_leave_the_database_to_others(served: Served, http: httpx.Client) -> None:
    images = http.post("/files", files={"content": ("a.zip", (ROOT / "examples" / "subject.zip").read_bytes())}).json()
    inputs = {"input_images": images["urls"]["get"], **QUICK, "training_steps": 6000}
    body = {"destination": "you/streamed", "input": inputs}
    run = http.post("/models/ostris/flux-dev-lora-trainer/versions/" + 64 * "0" + "/trainings", json=body).json()
    large = http.post("/files", files={"content": ("large", bytes(16 * 2**20))}).json()
    link = httpx.URL(large["urls"]["download"])
    asked = f"GET {link.raw_path.decode()} HTTP/1.1\r\nHost: {link.host}:{link.port}\r\n\r\n".encode()
    with ExitStack() as held, httpx.Client(timeout=30, limits=httpx.Limits(max_connections=ALL)) as reader:
        for _ in range(ALL):
            stream = held.enter_context(reader.stream("GET", run["urls"]["stream"]))
            assert stream.status_code == 200
        is_quick(http)
        for _ in range(ALL):
            slow = held.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((link.host, link.port))
            slow.sendall(asked)
            assert slow.recv(12) == b"HTTP/1.1 200"
        is_quick(http)
    http.post(f"/trainings/{run['id']}/cancel")


def test_a_look_at_pictures_holds_no_connection(served: Served) -> None:
    with httpx.Client(base_url=served.url, headers={"Origin": served.url}, timeout=60) as browser:
        browser.post("/sign-in", data={"token": served.token})
        id, answers = "lookedat2345lookedat2345ab", []
        with zipfile.ZipFile(ROOT / "examples" / "subject.zip") as archive:
            browser.post(f"/drafts/{id}/files", files={"file": ("01.png", archive.read("01.png"))})
        sent = {"caption:01.png": "by hand"}
        looking = threading.Thread(target=lambda: answers.append(browser.post(f"/drafts/{id}/look", data=sent).text))
        looking.start()
        held: list[object] = []
        while looking.is_alive():
            held += served.rows(
                "SELECT query FROM pg_stat_activity WHERE state = 'idle in transaction'"
                " AND now() - state_change > interval '0.2 s' AND query LIKE '%%files%%'"
            )
            time.sleep(0.03)
        looking.join()
    assert held == []
    assert "1 picture<" in answers[0]
    assert "by hand" in answers[0]


def test_a_slow_upload_holds_no_connection(served: Served, http: httpx.Client) -> None:
    time.sleep(2.1)  # the API has to look the token up again
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port)) as slow:
        slow.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token}\r\nContent-Length: 100\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode()
        )
        time.sleep(1)
        open_ones = "SELECT query FROM pg_stat_activity WHERE state = 'idle in transaction' AND query LIKE '%%tokens%%'"
        assert served.rows(open_ones) == []
