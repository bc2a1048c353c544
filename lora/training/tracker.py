"""The training shown at Weights & Biases while it runs, by its own client, where the user gives a key."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

PROJECT = "flux-lora"
"""Where the user names none."""
STEP = "step"
"""The training's own, against which all else is plotted: the client's own may not go down, and drops what does."""
PATIENCE = 60
"""Seconds that Weights & Biases is waited for, at the start and at the end."""


class Tracker:
    """A run at Weights & Biases, or nothing where `run` is None. Never a reason for a training to fail."""

    def __init__(self, run: Any, log: Callable[[str], None]) -> None:
        self._run, self._log = run, log

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Values by their names at a step; where a training began again, its steps come twice."""
        self._send(step, lambda: dict(values))

    def pictures(self, prompts: Sequence[str], step: int, drawn: Sequence[Image.Image]) -> None:
        """The previews of a step, a picture for each prompt; nothing where none could be drawn."""
        if not drawn:
            return

        def images() -> dict[str, Any]:
            import wandb

            return {"previews": [wandb.Image(p, caption=prompt) for prompt, p in zip(prompts, drawn, strict=True)]}

        self._send(step, images)

    def close(self, failed: bool) -> None:
        """Waits until everything is sent, PATIENCE seconds at most."""
        self._guard(lambda: self._run.finish(exit_code=int(failed)))
        self._run = None

    def _send(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        self._guard(lambda: self._run.log({STEP: step, **values()}))

    def _guard(self, act: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # whatever it is, the answer is the same: the training goes on without it
            self._log(f"warning: Weights & Biases is given up: {type(error).__name__}: {error}")
            self._run = None


@contextlib.contextmanager
def tracking(
    key: str | None,
    *,
    project: str | None,
    name: str,
    entity: str | None,
    settings: Mapping[str, Any],
    folder: Path,
    log: Callable[[str], None],
) -> Iterator[Tracker]:
    """A run for the length of a `with`; without a key nothing is imported and nothing happens.

    `settings` are shown beside the run; its files lie in `folder`. The key is handed to the client alone, which keeps
    it in memory. Raises ValueError where the run cannot be started: nothing has been trained by then.
    """
    if key is None:
        yield Tracker(None, log)
        return
    import wandb  # only here: it takes seconds

    try:
        run = wandb.init(
            project=project or PROJECT,
            name=name,
            entity=entity,
            config=dict(settings),
            dir=folder,
            settings=wandb.Settings(
                api_key=key,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # or it sends the command line, with what presigned addresses carry
                silent=True,
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
            ),
        )
    except (wandb.Error, ValueError, OSError) as error:
        wandb.teardown()
        reason = str(error).replace(key, "…").strip().partition("\n")[0]
        raise ValueError(
            f"wandb_api_key: Weights & Biases does not start a run ({reason}); check the key, project and entity, or"
            " leave them empty"
        ) from error
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    log(f"Weights & Biases: {f'run {run.id}, offline' if run.offline else run.url}")
    tracker = Tracker(run, log)
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    else:
        tracker.close(failed=False)
    finally:
        wandb.teardown()  # ends the client's own process, which knows the key
