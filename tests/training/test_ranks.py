"""Several processes that train together, on a CPU: what they compute, and how they end."""

import dataclasses
import json
import os
import pickle
import random
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from lora import job
from lora.file import weights
from lora.flux import adapter, base, generate
from lora.flux.encode import Example, Text
from lora.flux.generate import Lora
from lora.flux.hardware import GIB, Gpu, Plan
from lora.result import preview
from lora.result.preview import Preview
from lora.training import decide, fit, prior, ranks, recipe
from lora.training.balance import Balance
from lora.training.checkpoints import Checkpoints
from lora.training.fit import Settings
from lora.training.ranks import Ranks
from tests.test_request import a_request
from tests.tiny_flux import CONFIG
from tests.training import a_rank
from tests.training.a_rank import Lesson
from toyflux import evaluate

EXAMPLES = Path(__file__).parents[2] / "examples" / "subject.zip"
A_GPU = Gpu(name="a GPU", memory=80 * GIB)
SETTINGS = Settings(
    steps=20, batch_size=1, learning_rate=1e-3, caption_dropout_rate=0.3, prior_ratio=0.5, seed=7, prior_every=2
)
KILLED = r"^process 2 of 2 was ended by SIGKILL; the training cannot go on without it\. Start it again; GPUS=1 trains"
SOON = 10
"""Seconds within which everything has ended, whatever happened."""


class Cancelled(BaseException):
    """As cog.CancelationException: no Exception, and from anywhere."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The processes that are started, by their ids; none is left."""
    ids: list[int] = []
    start = Ranks.start

    def watched(self: Ranks) -> None:
        start(self)
        ids.extend(child.pid for child in self._children if child.pid not in ids)

    monkeypatch.setattr(Ranks, "start", watched)
    yield ids
    assert not [pid for pid in ids if Path(f"/proc/{pid}").exists()], "ended and waited for"
    assert not dist.is_initialized()


def _lesson(transformer: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]) -> Lesson:
    scheduler = {"use_dynamic_shifting": False, "shift": 3.0}
    priors = prior.draw(transformer, texts, ["a red house", "a VEK"], [(4, 4)] * 2, scheduler, seed=1, steps=3)
    plan = Plan(device="cpu", dtype=torch.float32, checkpointing=False, reason="for a test")
    return Lesson(
        plan=plan,
        transformer=transformer,
        examples=examples,
        priors=priors,
        texts=texts,
        settings=SETTINGS,
        threads=torch.get_num_threads(),
    )


def _accumulated(lesson: Lesson) -> tuple[list[Tensor], list[float]]:
    """The same training by one process that goes through both ranks' pictures, one after the other, by hand."""
    settings, texts, transformer = lesson.settings, lesson.texts, lesson.transformer
    parameters, rng = adapter.attach(transformer, 4, seed=3), random.Random(settings.seed)
    noises = [torch.Generator().manual_seed(settings.seed + rank) for rank in range(2)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, eps=settings.adam_epsilon, fused=True)
    balance = Balance(settings.prior_ratio, settings.prior_weight, torch.device("cpu"))
    shares = [fit.flow.share_of_timesteps(p.until, p.timestep, 0.0, uniform_share=0.5) for p in lesson.priors]
    source, losses = fit.batches(lesson.examples, 2, rng), []

    def mean(found: list[Tensor]) -> list[Tensor]:
        """Of the gradients of both losses."""
        both = zip(*(torch.autograd.grad(loss, parameters) for loss in found), strict=True)
        return [(one + other) / 2 for one, other in both]

    def columns(rows: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    for step in range(1, settings.steps + 1):
        batch = next(source)
        captions = ["" if rng.random() < settings.caption_dropout_rate else example.caption for example in batch]
        of_pictures = [
            fit.picture_loss(
                transformer, example.size, noise, settings, *columns(fit.rows_of_examples([example], [caption], texts))
            )
            for example, caption, noise in zip(batch, captions, noises, strict=True)
        ]
        losses.append(sum(loss.item() for loss in of_pictures) / 2)
        gradients = mean(of_pictures)
        if step % settings.prior_every == 0:
            drawn = fit.of_one_size(lesson.priors, shares, 2, rng)
            given = [columns(fit.rows_of_priors([one], texts)) for one in drawn]
            of_priors = [fit.prior_loss(transformer, drawn[0].size, settings.guidance, *one) for one in given]
            balance.add(gradients, mean(of_priors))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = fit.learning_rate_at(step, settings.steps, settings.learning_rate, 0.0)
        if torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            optimizer.step()
    return [p.detach() for p in parameters], losses


def test_two_ranks_learn_what_one_process_learns_that_adds_up_the_gradients_of_both(
    examples: list[Example],
    texts: dict[str, Text],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[int],
) -> None:
    """Bit by bit: a mean gradient, and the weights after 20 steps with preservation, dropped captions, and a picture
    that gives no finite gradient: where it comes on one rank both skip the step. Then one is killed in the loop."""

    def lesson() -> Lesson:
        torch.manual_seed(0)
        return _lesson(FluxTransformer2DModel(**CONFIG).eval(), [*examples, broken], texts)

    broken = dataclasses.replace(examples[0], name="broken", mean=torch.full_like(examples[0].mean, float("nan")))

    monkeypatch.setattr(ranks, "PROGRAM", ("-m", "tests.training.a_rank", "learns"))
    found: list[tuple[list[Tensor], list[list[Tensor]]]] = []
    killed: list[float] = []

    def train() -> None:
        with Ranks(2, "cpu", tmp_path, print).together(ours := lesson()) as join:
            world = join()
            found.append(a_rank.learned(ours, lambda: world))
            os.kill(started[-1], signal.SIGTERM)  # as a whole group of processes gets it
            time.sleep(0.1)
            os.kill(started[-1], signal.SIGKILL)
            killed.append(time.monotonic())
            for _ in range(3):
                world.average(torch.ones(1))

    with pytest.raises(ranks.Lost, match=KILLED):
        train()
    assert time.monotonic() - killed[0] < SOON
    [(gradients, (here, there))] = found
    assert len(started) == 1
    assert list(tmp_path.iterdir()) == []
    alone = lesson()
    parameters = adapter.attach(alone.transformer, 4, seed=3)
    wanted = (a_rank.gradient(alone, parameters, 0) + a_rank.gradient(alone, parameters, 1)) / 2
    assert all(torch.equal(gradient, wanted) for gradient in gradients)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(here, there, strict=True))
    *weights, losses, skipped = here
    by_hand, their_losses = _accumulated(lesson())
    assert 0 < skipped < 10
    assert skipped == losses.isnan().sum()
    assert all(torch.equal(weight, wanted) for weight, wanted in zip(weights, by_hand, strict=True))
    torch.testing.assert_close(losses, torch.tensor(their_losses), equal_nan=True)


def test_what_is_gathered_is_sent_once_though_it_lies_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the states of the base's drawings do. Of the network there is only its sending here."""
    batch = torch.randn(8, 1000)
    own = [prior.Prior(prompt="", size=(2, 2), noisy=x, timestep=0.5, since=0.5, until=0, velocity=-x) for x in batch]
    sent: list[int] = []

    def all_gather(parts: list[Any], mine: Any) -> None:
        sent.append(len(pickle.dumps(mine)))
        parts[:] = [mine, mine]

    monkeypatch.setattr(dist, "all_gather_object", all_gather)
    found = ranks.World(1, 2).gather(own)
    assert [one.noisy.tolist() for one in found] == 2 * batch.tolist()
    assert [one.velocity.tolist() for one in found] == 2 * (-batch).tolist()
    assert sent[0] < 1.5 * 2 * batch.nbytes


def test_the_connection_of_a_lost_rank_is_closed_once_though_two_threads_are_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, whose connection takes a while to close. Of NCCL there is nothing here."""
    together = Ranks(2, "cuda", tmp_path, print)
    together._folder = tmp_path
    together._children = [subprocess.Popen(["true"], stdin=subprocess.PIPE)]
    together._children[0].wait()
    connected, closed = True, list[str]()

    def leave(device: str) -> None:
        nonlocal connected
        closed.append(threading.current_thread().name)
        time.sleep(0.2)
        connected = False

    monkeypatch.setattr(dist, "is_initialized", lambda: connected)
    monkeypatch.setattr(ranks, "leave", leave)
    threading.Thread(target=together._watch, args=(together._ended,), name="watching").start()
    while not closed:
        time.sleep(0.01)
    together.stop()
    assert closed == ["watching"]
    assert not connected


def test_a_connection_that_does_not_close_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL's has done. The training is over by then, or told why not."""
    lines, released = list[str](), threading.Event()
    together = Ranks(2, "cuda", tmp_path, lines.append)
    together._folder = tmp_path
    together._children = [subprocess.Popen(["true"], stdin=subprocess.PIPE)]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "leave", lambda device: released.wait(SOON))
    monkeypatch.setattr(ranks, "LEAVING", 0.1)
    together.stop()
    released.set()
    assert lines == ["the connection with the other GPUs did not close within 0.1 s and is left as it is"]


def _run(output: Path, log: Callable[[str], None], **changes: Any) -> Path:
    asked = {"training_steps": 6, "preview_prompts": "a [trigger]", "preservation": "1", "resolution": "64", "seed": 1}
    return job.run(
        a_request(EXAMPLES, **{**asked, **changes}),
        output=output,
        flux_base=None,
        captioner=None,
        log=log,
        metric=lambda name, value: None,
        changes={"prior_prompts": 9, "prior_every": 1},
        gpus="cpu:2",
    )


def test_a_rank_that_is_killed_ends_the_training_soon_and_the_next_one_succeeds_though_memory_runs_out_on_a_rank(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[int]
) -> None:
    lines: list[str] = []
    killed = 0.0

    def kill(line: str) -> None:
        nonlocal killed
        lines.append(line)
        if line == "== loading the transformer":
            os.kill(started[-1], signal.SIGKILL)
            killed = time.monotonic()

    with pytest.raises(ranks.Lost, match=KILLED):
        _run(tmp_path / "out", kill)
    assert time.monotonic() - killed < SOON
    assert list(work.iterdir()) == []

    monkeypatch.setattr(ranks, "PROGRAM", ("-m", "tests.training.a_rank", "runs out"))
    monkeypatch.setattr(Checkpoints, "choose", lambda self: (self.kept[0], "the test wants the one before the last"))
    previews: list[Preview] = []
    pair_up = preview.pair_up
    monkeypatch.setattr(preview, "pair_up", lambda *given: previews.extend(pair_up(*given)) or previews)
    lines.clear()
    tar = _run(tmp_path / "out", lines.append, preview_every=2)
    assert len(started) == 3
    assert [line for line in lines if line.startswith("warning: the GPU")] == [
        "warning: the GPU's memory ran out: each block is recomputed in the backward pass, since the memory ran out;"
        " once more from the start of the training"
    ]
    assert "GPUs: none, but 2 processes train on the CPU, as GPUS asks for" in lines
    told = [line for line in lines if line.startswith("2 pictures in a step, 1 a GPU: 3 steps in place of 6")]
    assert len(told) == 1
    assert any("| 3/3" in line for line in lines)
    assert list(work.iterdir()) == []
    with tarfile.open(tar) as opened:
        written = opened.extractfile("request.json")
        assert written is not None
        decided = json.load(written)["decided"]
        assert {job.WEIGHTS_MEMBER, "report/preview.webp"} <= set(opened.getnames())
    assert (decided["gpus"], decided["steps"], decided["batch_size"]) == (2, 3, 1)
    assert decided["learning_rate"] == pytest.approx(
        recipe.learning_rate_for(recipe.TOY["subject"], 128, 16)[0] * 2**0.5
    )
    assert decided["reasons"]["gpus"] in told[0]
    assert decided["weights_of_step"] == 2
    assert not any("previews could not be drawn" in line for line in lines)
    _drawn_by_one_process(previews, tar, tmp_path)


def _drawn_by_one_process(previews: list[Preview], tar: Path, folder: Path) -> None:
    """Whether the previews, of which each rank drew some, are what one process draws with the file that was returned:
    rank 1 had trained further."""
    pipeline, tokens = evaluate.load(base.TOY), base.find(None, None).t5_tokens
    prompts = [one.prompt for one in previews]
    assert prompts == ["a TOK", "a red house on a white background"]
    assert [[step for step, _ in one.drawn] for one in previews] == [[1, 2]] * 2

    def drawn() -> list[Image.Image]:
        return [
            generate.draw(pipeline, prompt, (64, 64), seed, 20, tokens=tokens) for seed, prompt in enumerate(prompts, 1)
        ]

    assert [one.without.tobytes() for one in previews] == [picture.tobytes() for picture in drawn()]
    lora = Lora(name="TOK", file=weights.take_out(tar, folder), scale=1.0)
    generate.put_on(pipeline, [lora], lambda line: None)
    assert [one.after.tobytes() for one in previews] == [picture.tobytes() for picture in drawn()]
    assert all(one.after.tobytes() not in (one.without.tobytes(), one.drawn[0][1].tobytes()) for one in previews)


@pytest.mark.parametrize("stage", ["encoding prompts", "loading"])
def test_a_cancel_ends_every_process_at_once(stage: str, work: Path, tmp_path: Path, started: list[int]) -> None:
    cancelled = 0.0

    def cancel(line: str) -> None:
        nonlocal cancelled
        if line.startswith(f"== {stage}"):
            cancelled = time.monotonic()
            raise Cancelled

    with pytest.raises(Cancelled):
        _run(tmp_path / "out", cancel)
    assert time.monotonic() - cancelled < SOON
    assert len(started) == 1
    assert list(work.iterdir()) == []


def test_the_number_of_gpus_is_what_is_asked_for_or_all_and_without_one_there_is_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["a GPU"] * 4 + ["another GPU"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=kinds[i], total_memory=80 * GIB)
    )
    lines: list[str] = []
    assert ranks.how_many("1", A_GPU, lines.append) == 1
    assert ranks.how_many("", None, lines.append) == 1
    assert lines == []
    assert ranks.how_many("2", None, lines.append) == 1
    assert lines == ["GPUS asks for 2 GPUs, but none is visible here"]
    lines.clear()
    assert ranks.how_many(None, A_GPU, lines.append) == 4
    assert ranks.how_many(" 2", A_GPU, lines.append) == 2
    assert ranks.how_many("cpu:2", None, lines.append) == 2
    assert lines == [
        "GPUs: all 4 train; GPUS=1 would take one",
        "GPUs: 2 of 4, as GPUS asks for",
        "GPUs: none, but 2 processes train on the CPU, as GPUS asks for",
    ]
    lines.clear()
    why = "finetune_type full trains on one GPU"
    assert [ranks.how_many(asked, A_GPU, lines.append, why) for asked in (None, "3", "1")] == [1, 1, 1]
    assert ranks.how_many("cpu:2", None, lines.append, why) == 1
    assert lines == [f"GPUs: one of 4 trains: {why}"] * 2
    for asked, message in (
        ("5", "GPUS: 5 are asked for, and of a GPU there are 4 in a row"),
        ("0", "GPUS: '0' is not a number"),
        ("all", "GPUS: 'all' is not a number"),
        ("cpu:2", "GPUS: 'cpu:2' is for machines without a GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            ranks.how_many(asked, A_GPU, lines.append)


def test_a_larger_batch_sees_as_many_pictures_at_a_higher_rate_and_one_that_was_asked_for_is_shared_out(
    work: Path,
) -> None:
    assert recipe.for_larger_batch(1000, 4e-4, 8)[:2] == (125, pytest.approx(4e-4 * 2**0.5))
    assert recipe.for_larger_batch(1001, 4e-4, 1.5)[:2] == (668, pytest.approx(4e-4 * 1.5**0.5))
    flux = base.find(None, None)

    def decided(batch_size: int, ranks: int, preview_every: int = 100) -> tuple[int, int, int, float]:
        asked = a_request(
            EXAMPLES, training_steps=1000, batch_size=batch_size, preview_every=preview_every, learning_rate=1e-3
        )
        found = decide.decide(asked, [(96, 96)] * 20, flux, None, {}, lambda line: None, ranks)
        return found.settings.batch_size, found.settings.steps, found.preview_every, found.settings.learning_rate

    assert decided(1, 1) == (1, 1000, 100, 1e-3)
    assert decided(8, 2) == (4, 1000, 100, 1e-3)
    assert decided(1, 4) == (1, 250, 25, pytest.approx(1e-3 * 2**0.5))
    assert decided(4, 8) == (1, 500, 50, pytest.approx(1e-3 * 2**0.5))
    assert decided(1, 8, preview_every=0)[2] == 0


def test_a_rank_has_its_own_rows_of_a_batch() -> None:
    assert [ranks.World(rank, 2).rows("abcdef") for rank in range(2)] == ["abc", "def"]
    assert ranks.ALONE.rows("abc") == "abc"


def test_drawings_are_shared_out_and_look_as_if_one_process_drew_them(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    def drawn(**share: int) -> list[prior.Prior]:
        wanted, sizes = ["a red house", "a VEK", "a TOK"], [(4, 4), (4, 4), (2, 6)]
        scheduler = {"use_dynamic_shifting": False, "shift": 3.0}
        return prior.draw(tiny_flux, texts, wanted, sizes, scheduler, seed=1, steps=2, batch_size=1, **share)

    every, parts = drawn(), [drawn(rank=rank, ranks=2) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 2]
    shown = {(one.prompt, one.timestep): one for part in parts for one in part}
    assert len(shown) == len(every)
    for one in every:
        assert torch.equal(shown[one.prompt, one.timestep].velocity, one.velocity)
        assert dataclasses.astuple(shown[one.prompt, one.timestep])[1] == one.size
