"""What several test files share: a FLUX transformer of a few thousand weights, and the project's own toy base."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.flux import base
from lora.flux.base import Base
from lora.flux.encode import Example
from lora.flux.hardware import Plan
from tests.tiny_flux import CONFIG

if not torch.cuda.is_available():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a GPU that torch cannot use is none to the tests

collect_ignore = ["server"]
"""Needs the server's environment; script/test runs it there."""

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
"""Real photographs, beside the repository where it is developed; tests that need them skip where they are not."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def tiny_flux() -> FluxTransformer2DModel:
    """One double and one single block with random weights; every output layer is non-zero, unlike a fresh one's."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(**CONFIG).eval()


@pytest.fixture
def texts() -> dict[str, dict[str, torch.Tensor]]:
    """Embeddings for the captions of `examples`, the empty one, and two prompts more, fitting `tiny_flux`."""
    generator = torch.Generator().manual_seed(1)
    prompts = ("", "a TOK", "a TOK on a table", "a red house", "a VEK")
    return {
        prompt: {
            "prompt_embeds": torch.randn(5, 24, generator=generator),
            "pooled": torch.randn(12, generator=generator),
        }
        for prompt in prompts
    }


@pytest.fixture
def examples() -> list[Example]:
    """Five pictures of two sizes, fitting `tiny_flux`."""
    generator = torch.Generator().manual_seed(2)
    return [
        Example(
            name=f"{i}.jpg at {'32x32' if i % 2 else '48x16'}",
            size=(4, 4) if i % 2 else (2, 6),
            mean=torch.randn(4 if i % 2 else 3, 16, generator=generator),
            std=torch.full((4 if i % 2 else 3, 16), 0.1),
            caption="a TOK" if i % 2 else "a TOK on a table",
        )
        for i in range(5)
    ]


@pytest.fixture
def gradients_alike(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every gradient that reaches an attention's output from now on: whether it lies token after token in memory."""
    found: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        output = plain(*arguments, **options)  # (batch, heads, tokens, width)
        if output.requires_grad:
            output.register_hook(lambda gradient: found.append(gradient.transpose(1, 2).is_contiguous()))
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return found


@pytest.fixture(scope="session")
def cpu() -> Plan:
    return Plan(device="cpu", dtype=torch.float32, checkpointing=False, reason="for a test")


@pytest.fixture(scope="session")
def toy() -> Base:
    return base.find(None, None)


@pytest.fixture(scope="session")
def photographs() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the real photographs are not here: no folder {SHARED.name} of them beside the repository")
    return SHARED
