"""The previews of a training: the same prompts and noise each time, drawn with the LoRA and without it. Where several
ranks train, each draws its share."""

from collections.abc import Callable, Mapping, Sequence

from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from lora.flux import forward, generate, schnell
from lora.flux.base import Base
from lora.flux.encode import Text
from lora.flux.hardware import Plan
from lora.training.ranks import ALONE, World
from lora.training.watch import WARNING

STEPS = 20
"""Of a drawing: enough to see what was learned; the 28 that people draw with take two fifths more time."""
MOST_SIDE = 768
"""Pixels: as much as a preview shows, in half the time of 1024."""


class Sketcher:
    """Draws a picture for each preview's prompt with the transformer as it is then."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        flux: Base,
        plan: Plan,
        texts: Mapping[str, Text],
        asked: Sequence[str],
        largest: int,
        seed: int,
        log: Callable[[str], None],
    ) -> None:
        """`asked` are the prompts, the first with the noise of `seed`, the second of `seed` + 1, and so on; `largest`
        is the largest resolution trained on."""
        self._transformer, self._flux, self._plan = transformer, flux, plan
        self._texts, self._seed, self._log = [texts[prompt] for prompt in asked], seed, log
        self._side = min(largest, MOST_SIDE)

    def at_the_end(self, parameters: Sequence[Tensor], world: World) -> list[list[Image.Image]]:
        """With the LoRA and without it, as `draw`, after every rank has been given rank 0's weights: those that are
        returned. Where a rank is lost, rank 0 draws all: the training is over. The LoRA stays off."""
        try:
            world.copy(parameters)
            return self.draw([True, False], world)
        except Exception as error:
            if world.rank or world.size == 1:
                raise
            lost = str(error).partition(";")[0]
            self._log(f"{WARNING}{lost}; the training was over, and the previews are drawn without it")
            return self.draw([True, False], ALONE)

    def draw(self, ways: Sequence[bool], world: World) -> list[list[Image.Image]]:
        """For each of `ways`, with the LoRA (True) or without it, a picture for each prompt. To be called by every rank
        of `world`, whose weights must be the same; all get the same pictures.

        Where a drawing fails, whatever it is, there are no pictures, and rank 0's log says why: none is worth the
        training. Raises what `World.gather` does where a rank is lost.
        """
        wanted = [(way, number) for way in ways for number in range(len(self._texts))]
        try:
            own: list[tuple[bool, int, Image.Image] | str] = [*self._drawn(wanted[world.rank :: world.size])]
        except Exception as error:
            own = [f"{type(error).__name__}: {error}".splitlines()[0]]
        found = world.gather(own)
        if reasons := [one for one in found if isinstance(one, str)]:
            self._log(
                f"{WARNING}previews could not be drawn and are left out; the training is not touched ({reasons[0]})"
            )
            return [[] for _ in ways]
        by_task = {one[:2]: one[2] for one in found if not isinstance(one, str)}
        return [[by_task[way, number] for number in range(len(self._texts))] for way in ways]

    def _drawn(self, wanted: Sequence[tuple[bool, int]]) -> list[tuple[bool, int, Image.Image]]:
        """The autoencoder is on the device only while it draws."""
        found: list[tuple[bool, int, Image.Image]] = []
        if not wanted:
            return found
        with self._flux.vae(self._plan) as vae, forward.of_diffusers(self._transformer):
            pipeline = generate.pipeline_of(self._transformer, vae, self._flux.scheduler)
            for way in dict.fromkeys(way for way, _ in wanted):
                if not way:
                    self._transformer.disable_adapters()
                numbers = [number for of_way, number in wanted if of_way is way]
                pictures = generate.draw_all(
                    pipeline,
                    [self._texts[number] for number in numbers],
                    (self._side, self._side),
                    [self._seed + number for number in numbers],
                    STEPS if self._flux.guided else schnell.STEPS,
                )
                found += [(way, number, picture) for number, picture in zip(numbers, pictures, strict=True)]
        return found
