"""One training of the lab: which look, which recipe, how many steps, on which base."""

import hashlib
import os
from dataclasses import dataclass

from lora.flux import base
from lora.flux.base import Base
from lora.result import record
from toyflux import judge, world
from toyflux.world import Creature, Style

TRIGGER = "TOK"
LOOKS: dict[str, Creature | Style] = {look.name: look for look in (*world.SUBJECTS, *world.UNSEEN_STYLES)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its scores."""

    look: str
    recipe: str
    steps: int
    seed: int
    pictures: int
    """To train on."""
    draws: int
    """For each score."""
    drawing_steps: int
    base: str
    """`fingerprint()` of the base and the judge: results of one are not those of another."""

    @property
    def kind(self) -> str:
        return "style" if isinstance(LOOKS[self.look], Style) else "subject"


def fingerprint() -> str:
    """Eight digits of the SHA-256 over the weights of the judge and of the base in FLUX_BASE, or else the toy base."""
    hashes = [record.file_hash(file) for file in (*sorted(the_base().folder.rglob("*.safetensors")), judge.WEIGHTS)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:8]


def the_base() -> Base:
    """The base in FLUX_BASE, or else the toy base, on a machine with a GPU too."""
    return base.find(os.environ.get("FLUX_BASE") or str(base.TOY), None)
