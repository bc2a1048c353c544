"""LoRAs fetched once: what is kept, for whom, and what a file says of itself."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora.file import cache
from lora.file.cache import Cache


def _write(path: Path, value: float = 1.0, **header: str) -> Path:
    save_file({"transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.full((1, 2), value)}, path, header)
    return path


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of LoRAs, any name; and the paths that it was asked for."""
    asked: list[str] = []
    data = _write(tmp_path / "served.safetensors").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_what_was_fetched_before_is_fetched_no_more_as_long_as_it_is_kept(
    web: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = web
    (tmp_path / "cache").mkdir()
    kept = Cache(tmp_path / "cache", kept=2)
    for name, was_here in (("a", False), ("a", True), ("b", False), ("c", False), ("a", True), ("d", False)):
        assert kept.get(f"{url}/{name}", "lora_weights")[1] == was_here
        kept.forget(in_use=1)
    assert asked == ["/a", "/b", "/c", "/d"]
    assert kept.get(f"{url}/b", "lora_weights")[1] is False, "it was asked for longest ago"
    kept.forget(in_use=1)
    assert len(kept) == len(list((tmp_path / "cache").iterdir())) == 3


def test_a_file_fetched_with_a_token_is_given_to_its_owner_alone(web: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = web
    kept = Cache(tmp_path)
    for token, was_here in (("mine", False), ("mine", True), ("yours", False), (None, False)):
        assert kept.get(f"{url}/a", "lora_weights", hf_token=token)[1] == was_here
    assert len(asked) == 3


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.safetensors", 1.0)
    kept = Cache(tmp_path)
    first, _ = kept.get(str(file), "lora_weights")
    assert kept.get(str(file), "lora_weights") == (first, True)
    _write(file, 2.0, **{"modelspec.title": "longer now"})
    again, was_here = kept.get(str(file), "lora_weights")
    assert not was_here
    assert again.sha256 != first.sha256


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    kept = Cache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^extra_lora: "):
        kept.get(str(tmp_path / "none.tar"), "extra_lora")
    assert len(kept) == len(list((tmp_path / "cache").iterdir())) == 0


def test_a_lora_says_its_name_its_trigger_word_and_the_hash_of_its_tensors(tmp_path: Path) -> None:
    header = {"modelspec.title": 'My <LoRA>: "one"', "modelspec.trigger_phrase": " TOK,  a\nperson "}
    found = cache.about(_write(tmp_path / "a.safetensors", **header))
    assert (found.name, found.trigger) == ("My LoRA one", "TOK, a person")
    renamed = cache.about(_write(tmp_path / "b.safetensors", ss_output_name="b_v2"))
    assert renamed.sha256 == found.sha256 == hashlib.sha256(torch.full((1, 2), 1.0).numpy().tobytes()).hexdigest()
    assert renamed.name == "b_v2"
    assert cache.about(_write(tmp_path / "my lora.safetensors")).name == "my lora"


def test_of_a_file_that_is_none_at_least_the_name_is_known(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    assert cache.about(tmp_path / "broken.safetensors").name == "broken"


@pytest.mark.parametrize(
    ("origin", "asked"),
    [
        ("https://civitai.com/api/download/models/1", "https://civitai.com/api/download/models/1?token=a%26b"),
        ("https://www.civitai.com/x?type=Model", "https://www.civitai.com/x?type=Model&token=a%26b"),
        ("civitai.com/models/1?modelVersionId=2", "https://civitai.com/models/1?modelVersionId=2&token=a%26b"),
        ("https://civitai.com/x?token=other", "https://civitai.com/x?token=other"),
        ("http://civitai.com/x", "http://civitai.com/x"),
        ("https://civitai.com.evil.org/x", "https://civitai.com.evil.org/x"),
        ("https://evil.org/civitai.com", "https://evil.org/civitai.com"),
        ("owner/name", "owner/name"),
        ("https://[civitai.com/x", "https://[civitai.com/x"),
    ],
)
def test_the_token_for_civitai_goes_nowhere_else(
    origin: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    file = _write(tmp_path / "a.safetensors")
    monkeypatch.setattr(cache.source, "fetch", lambda url, *rest: seen.append(url) or file)
    Cache(tmp_path).get(origin, "lora_weights", civitai_token="a&b")
    assert seen == [asked]
