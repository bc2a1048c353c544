"""Other words than the trigger word, by class: under which of them does what was learned show too?

A mean over made-up words says little: most look like nothing, and those that look like the trigger word call the
subject nearly always (bench/NOTES.md).
"""

import random
from collections.abc import Sequence

from lora.training.words import POPULAR, near_words
from toyflux import world
from toyflux.world import Creature, Style

CLASSES = ("near", "capitals", "syllables", "popular", "noun", "none")
"""Near the trigger word (`lora.training.words.near_words`); made-up words of three or four capitals, and of syllables;
trigger words that people really use; the noun of the class, which the base knows; no word in its place at all."""
_MANNERS = ("photo", "picture", "image", "drawing")


def is_capitals(word: str) -> bool:
    """Whether a made-up word (`world.made_up_word`) is one of capitals rather than of syllables."""
    return word.isupper()


def of_class(kind: str, trigger_word: str, look: Creature | Style, count: int, seed: int) -> list[str]:
    """`count` words of a class, by the seed: they differ where there are as many, and else come again."""
    rng = random.Random(f"{kind} {trigger_word} {seed}")
    match kind:
        case "near":
            words: Sequence[str] = near_words(trigger_word, rng, count)
        case "capitals" | "syllables":
            made_up = world.unknown_words(10 * count, seed)
            words = [word for word in made_up if is_capitals(word) is (kind == "capitals")]
        case "popular":
            words = [word for word in POPULAR if word.casefold() != trigger_word.casefold()]
        case "noun":
            words = rng.sample(world.SHAPES, len(world.SHAPES)) if isinstance(look, Creature) else _MANNERS
        case _:
            raise AssertionError(f"no words of class {kind!r}")
    return [words[i % len(words)] for i in range(count)]
