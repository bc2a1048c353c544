"""Delivers webhooks, signed as Replicate signs them, which is the Standard Webhooks scheme."""

import json
from datetime import UTC, datetime

import procrastinate
import standardwebhooks

from server import jobs, objects
from server.context import Context
from server.outside import Outside
from server.records import Account, Run

WAITS = (2, 10, 60, 300, 1800, 7200)
"""Seconds before each further try to tell of an end. Other events are told once: the next one says more."""


class Delivery:
    """The task `jobs.DELIVER`."""

    def __init__(self, context: Context, outside: Outside) -> None:
        self.context = context
        self.outside = outside

    def register(self, app: procrastinate.App) -> None:
        # Whatever goes wrong here, such as a database that is away for a moment, is no end of the telling.
        again = procrastinate.RetryStrategy(max_attempts=5, linear_wait=2)
        app.task(name=jobs.DELIVER, retry=again)(self.deliver)

    async def deliver(self, run_id: str, event: str, attempt: int) -> None:
        """Tells a run's webhook of an event, with the run as it is now."""
        async with self.context.sessions() as session:
            run = await session.get(Run, run_id)
            account = None if run is None else await session.get(Account, run.account_id)
        if run is None or account is None or run.webhook is None:
            return
        body = json.dumps(objects.run(run, self.context.links(run.base_url)))
        moment = datetime.now(UTC)
        # The end is told under one id however often: who receives it may drop a second one.
        id = f"msg_{run.id}_{event}" + ("" if event == "completed" else f"_{moment.timestamp():.3f}")
        headers = {
            "webhook-id": id,
            "webhook-timestamp": str(int(moment.timestamp())),
            "webhook-signature": standardwebhooks.Webhook(account.webhook_secret).sign(id, moment, body),
        }
        try:
            status = await self.outside.post(run.webhook, headers, body.encode())
            refused = not 200 <= status < 300  # as at Replicate: whoever is not ready yet may answer 404
        except OSError:
            refused = True
        except ValueError:
            return  # not a public address: trying again would not make it one
        if refused and event == "completed" and attempt <= len(WAITS):
            async with self.context.sessions.begin() as session:
                await jobs.put(
                    session,
                    jobs.DELIVER,
                    jobs.WEBHOOKS,
                    lock=run.id,
                    seconds=WAITS[attempt - 1],
                    run_id=run.id,
                    event=event,
                    attempt=attempt + 1,
                )
