"""The prompts of prior preservation: what the LoRA must leave as the base has it. None has the trigger word.

A LoRA that only ever sees its own pictures makes every prompt look like them. Where it spreads first is what is
nearest: the captions under another word, words near the trigger word, the class noun (Ruiz et al. 2022, DreamBooth,
arXiv:2208.12242), other people and things in ordinary pictures.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from lora.training.words import COLOURS, THINGS, any_whole_word, made_up_word, near_words, whole_word
from lora.trigger import Subject

NEAR = ("changed", "swapped", "added", "part")
"""The ways of being near the trigger word that are held. Not the same word in another case: CLIP reads that as the
trigger word itself."""
NOUNS = ("person", "man", "woman", "child", "dog", "cat", "car", "house", "chair", "bottle")
"""For natural prompts where the class noun is not known, or as another thing beside it."""
NATURAL = (
    *("a photo of a {noun}", "a portrait of a {noun}", "a {noun} in a park", "a close-up of a {noun}"),
    *("a {noun} on a street at night", "a {noun} in soft window light", "a {noun} at the beach at sunset"),
    *("a {noun} beside a {other}", "a {noun} and another {noun}", "two people and a {noun} in a room"),
    *("a crowd of people in front of a {noun}", "a {noun} in the snow", "a {noun} seen from behind"),
    *("a {noun} in a studio with a white background", "a black and white photo of a {noun}"),
    *("a {noun} in a kitchen", "a {noun} in a forest with fog", "a {noun} under a red umbrella"),
    *("an oil painting of a {noun}", "a watercolor of a {noun}", "a pencil drawing of a {noun}"),
    *("a 3D render of a {noun}", "a {noun} in the style of a comic book", "a wooden toy {noun}"),
    *("a {noun} on a magazine cover with the title NEWS", "a vintage film photo of a {noun} from the 1970s"),
    *("a man reading a newspaper in a cafe", "two women laughing at a table", "an old woman with grey hair"),
    *("a boy on a bicycle", "a family of four in a garden", "a bowl of fruit on a wooden table"),
    *("a mountain lake in the morning", "a city street in the rain with neon signs", "a red sports car on a bridge"),
    *("a dog running on grass", "a cat asleep on a sofa", "a bookshelf with plants", "a bedroom with a large window"),
    *("an empty beach with waves", "a plate of pasta with basil", "a sign that reads OPEN"),
)
"""What people ask FLUX for: people, places, things, light, media. {noun} is the class noun, {other} another thing."""

_PLACES = ("", "", "", " on the left", " on the right", " at the top", " at the bottom")
_SIZES = ("", "", "", "small ", "large ")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A preservation prompt."""

    prompt: str
    caption: str | None = None
    """The user's caption that it is, but for the trigger word; None where it is none."""


def apart(captions: Mapping[str, Subject], count: int, seed: int, kinds: Sequence[str]) -> list[Asked]:
    """`count` prompts without a trigger word, of each of `kinds` in turn. `captions` are the user's, each with the
    subject of its picture; several subjects come equally often, and none of their words stands in a prompt.

    "captions" are the user's own with a made-up word where the trigger word stood; "near" with a word near it; "noun"
    with the class noun; "natural" are those of NATURAL; "things" and "made-up words" are in the toy base's language.
    Where an ordinary word is the trigger word, a made-up one stands for it in all of them.
    """
    rng = random.Random(seed)
    subjects = list(dict.fromkeys(captions.values()))
    of = {subject: [caption for caption in captions if captions[caption] == subject] for subject in subjects}
    pattern = any_whole_word([subject.word for subject in subjects])
    near = {subject: near_words(subject.word, rng, count, NEAR) for subject in subjects}

    def one(kind: str) -> Asked:
        subject = rng.choice(subjects) if len(subjects) > 1 else subjects[0]
        class_noun = subject.class_noun
        word = made_up_word(rng, subject.word)
        match kind:
            case "captions":
                return instead(subject, word)
            case "near":
                return instead(subject, rng.choice(near[subject]) if near[subject] else word)
            case "noun":
                return instead(subject, class_noun or rng.choice(THINGS))
            case "natural":
                noun, other = class_noun or rng.choice(NOUNS), rng.choice(NOUNS)
                said = rng.choice(NATURAL).format(noun=noun, other=other)
                for name in (noun, other):
                    said = said.replace(f"a {name}", f"{_article(name)} {name}")
                return Asked(said)
            case "things":
                return Asked(_ordinary(rng))
            case "made-up words":
                thing = rng.random() < 0.6
                return Asked(_ordinary(rng, thing=word) if thing else f"{_ordinary(rng)}, in the style of {word}")
        raise AssertionError(f"no kind of prompt: {kind!r}")

    def instead(subject: Subject, word: str) -> Asked:
        caption = rng.choice(of[subject])
        return Asked(word.join(whole_word(subject.word).split(caption)), caption)

    chosen = [one(kinds[i % len(kinds)]) for i in range(count)]
    return [
        dataclasses.replace(asked, prompt=pattern.sub(lambda _: made_up_word(rng, subjects[0].word), asked.prompt))
        for asked in chosen
    ]


def _ordinary(rng: random.Random, thing: str | None = None) -> str:
    colour, ground = rng.sample(COLOURS, 2)
    noun = thing or f"{colour} {rng.choice(THINGS)}"
    what = f"{rng.choice(_SIZES)}{noun}"
    return f"{_article(what)} {what}{rng.choice(_PLACES)} on {_article(ground)} {ground} background"


def _article(word: str) -> str:
    return "an" if word[0].lower() in "aeiou" else "a"
