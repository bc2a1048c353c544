"""The previews of a training; that several ranks draw what one draws is in `test_ranks`."""

import contextlib

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.flux import adapter, base, encode, forward
from lora.flux.hardware import Plan
from lora.training import ranks
from lora.training.ranks import ALONE, World
from lora.training.sketch import Sketcher

PLAN = Plan(device="cpu", dtype=torch.float32, checkpointing=False, reason="for a test")
PROMPTS = ["a TOK", "a red house"]


def test_where_a_rank_is_lost_at_the_end_the_first_draws_all_previews(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody else is there, so each call to the others fails, as where they are lost."""

    def lost() -> None:
        raise ranks.Lost("process 2 of 2 was ended by SIGKILL; the training cannot go on without it")

    flux, lines = base.find(None, None), list[str]()
    texts = encode.encode_texts(flux, PLAN, PROMPTS, 32)
    with contextlib.ExitStack() as lent:
        transformer: FluxTransformer2DModel = lent.enter_context(flux.transformer(PLAN))
        lent.enter_context(forward.for_training(transformer))
        parameters = adapter.attach(transformer, 4, 1, adapter.target_modules(transformer), None)
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.05)
        sketcher = Sketcher(transformer, flux, PLAN, texts, PROMPTS, 32, 7, lines.append)
        after, without = sketcher.at_the_end(parameters, World(0, 2, lost))
        transformer.enable_adapters()
        wanted = sketcher.at_the_end(parameters, ALONE)
        with pytest.raises(ranks.Lost):
            sketcher.draw([True], World(0, 2, lost))
    assert [[one.tobytes() for one in way] for way in (after, without)] == [
        [one.tobytes() for one in way] for way in wanted
    ]
    assert {one.size for one in (*after, *without)} == {(32, 32)}
    assert len({one.tobytes() for one in (*after, *without)}) == 4
    told = "process 2 of 2 was ended by SIGKILL; the training was over, and the previews are drawn without it"
    assert lines == [f"warning: {told}"]
