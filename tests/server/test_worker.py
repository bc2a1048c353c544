"""A worker's own parts, without a server."""

import asyncio

import procrastinate
import pytest
from procrastinate.testing import InMemoryConnector
from sqlalchemy.exc import OperationalError

from server import jobs, webhooks, worker


def test_a_cancel_does_not_interrupt_the_freeing_of_the_gpu() -> None:
    freed: list[str] = []

    async def let_go() -> None:
        await asyncio.sleep(0.1)
        freed.append("the GPU")

    async def canceled_meanwhile() -> None:
        task = asyncio.create_task(worker._to_its_end(let_go()))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(canceled_meanwhile())
    assert freed == ["the GPU"]


def test_a_webhook_is_told_though_the_database_was_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    async def deliver(self: webhooks.Delivery, run_id: str, event: str, attempt: int) -> None:
        tries.append(attempt)
        if len(tries) == 1:
            raise OperationalError("SELECT", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(webhooks.Delivery, "deliver", deliver)

    async def run() -> None:
        app = procrastinate.App(connector=InMemoryConnector())
        webhooks.Delivery(None, None).register(app)  # type: ignore[arg-type]
        async with app.open_async():
            await app.configure_task(jobs.DELIVER).defer_async(run_id="x", event="completed", attempt=1)
            await app.run_worker_async(wait=False, install_signal_handlers=False, listen_notify=False)

    asyncio.run(run())
    assert tries == [1, 1]


def test_a_fault_within_the_queue_is_no_end_of_taking_jobs() -> None:
    begun: list[jobs.Taker] = []

    def register(app: procrastinate.App) -> None:
        begun.append(taker)
        if len(begun) == 2:
            taker.stop()
        raise AssertionError("such as the queue's library has")

    taker = jobs.Taker("postgresql://nobody@127.0.0.1:9/nothing", register, [jobs.WEBHOOKS], 1)
    asyncio.run(asyncio.wait_for(taker.run(), 20))
    assert len(begun) == 2
