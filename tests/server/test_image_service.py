"""The example of a REST service in front of the models, against a real server."""

import asyncio
import importlib.util
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.server.conftest import ROOT, SKETCH, Served


@pytest.fixture
def service(served: Served, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("REPLICATE_BASE_URL", served.url)
    monkeypatch.setenv("REPLICATE_API_TOKEN", served.token)
    monkeypatch.setenv("MODELS", "base=local/flux-lora-generator,gone=you/gone")
    spec = importlib.util.spec_from_file_location("image_service", ROOT / "examples" / "image_service.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def post(service: ModuleType, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=90) as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(ask())


def test_a_picture_comes_back_as_its_bytes_and_counts_for_its_campaign(service: ModuleType, http: httpx.Client) -> None:
    body = {"prompt": "a TOK", "seed": 1, "num_inference_steps": 1, "output_format": "png", "extra_lora": None}
    answer = post(service, "/image/base", body, **{"X-Campaign": "summer"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")
    [run] = http.get("/predictions", params={"tag": "summer"}).json()["results"]
    assert run["input"] == {key: value for key, value in body.items() if value is not None}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/image/none", {}, 404, "there is no model"),
        ("/image/gone", {}, 404, "does not exist"),
        ("/image/base", {"num_outputs": 9}, 422, "num_outputs"),
        ("/image/base", {"prompt": "a forbidden-by-test"}, 403, "a word of the tests"),
    ],
)
def test_an_error_is_an_http_error(
    service: ModuleType, path: str, body: dict[str, object], status: int, word: str
) -> None:
    answer = post(service, path, SKETCH | body)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"]
