"""A worker's own parts, without a server."""

import asyncio

from server import worker


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
