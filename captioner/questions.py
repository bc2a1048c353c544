"""What the captioning model is asked: for a caption, once more where it gave none, and for the class noun."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from captioner.clean import normalised, until_stable
from captioner.text import Rules, is_carried

_OF_A_SUBJECT = {
    "subject": (
        "the setting, the pose or action, clothes and things carried, the light, the framing and the angle, what else "
        "is there",
        "its face, body, hair, fur, colours, markings, shape or brand",
    ),
    "character": (
        "the setting, the pose and what is done, the expression, the clothes, glasses, hat and things carried, the "
        "light, the framing and the angle, who and what else is there",
        "the face, age, skin, eyes, hair or build",
    ),
    "product": (
        "the surroundings, what it stands or lies on, who uses or holds it, whether it is open or in parts, the light, "
        "the framing and the angle, what else is there",
        "its shape, colours, material, pattern, label, lettering or brand",
    ),
}
"""What a caption tells of a subject, for it differs from picture to picture, and what it leaves to the trigger word."""


def question(rules: Rules) -> str:
    """What the model is asked about every picture. The prefix is put into its mouth and needs no asking."""
    if rules.kind == "general":
        task = (
            "Write a caption of the whole picture: who and what is there and what each looks like, what they do, where "
            "everything stands, the setting, the light, the framing, and whether it is a photograph, a painting or a "
            "drawing of some kind."
        )
    elif rules.kind == "style":
        task = (
            "Write a caption of what is drawn here: who and what is there, what they do, where everything stands, the "
            "setting, the time of day, the framing. Leave out how it is made: no medium, technique, art style, artist, "
            "brushwork, line or palette, and no word such as illustration, painting or photo."
        )
    else:
        name = subject_name(rules)
        differs, same = _OF_A_SUBJECT.get(rules.kind, _OF_A_SUBJECT["subject"])
        task = (
            f"Write a caption of this picture of {name}. Call the subject {name} and nothing else. Say what could be "
            f"different in another picture of the same subject: {differs}. Never say who or what it is, and never "
            f"describe what stays the same from picture to picture, such as {same}: {name} already stands for all of "
            "that."
        )
    task += (
        " 30 to 50 words of plain English in two or three complete sentences. Begin at once with what is seen, not "
        "with “The image shows”. No list, no mood, no opinion. Answer with the caption alone."
    )
    return task + (f" These words will be put behind it, so do not repeat them: {rules.suffix}" if rules.suffix else "")


def plainer_question(rules: Rules) -> str:
    """What is asked where the first answer was no caption."""
    match rules.kind:
        case "general":
            who = "all that is to be seen in it"
        case "style":
            who = "what is drawn in it"
        case _:
            who = f"it, calling its subject {subject_name(rules)}"
    return f"This is my own picture. Describe {who}, in one plain English sentence of about 20 words."


def retry_opening(rules: Rules) -> str:
    """What is put into the model's mouth behind the prefix with the plainer question: it makes refusals less likely."""
    return "" if rules.kind in ("style", "general") or is_carried(rules) else subject_name(rules)


def continued(opening: str, answer: str) -> str:
    """The opening and what the model went on with."""
    return opening + answer if answer[:1] in tuple(" ,.;:'’") else f"{opening} {answer}"


def subject_name(rules: Rules) -> str:
    """ "TOK dog", or "TOK" where the class noun is not known."""
    return f"{rules.trigger_word} {rules.class_noun}" if rules.class_noun else rules.trigger_word


CLASS_NOUN_QUESTION = (
    "What kind of thing is the main subject of this picture? Answer with one common English noun in the singular, such "
    "as dog, woman, backpack or car, and nothing else."
)


def class_noun(answers: Sequence[str]) -> str | None:
    """The noun that more than half of the answers give, None where there is none: a lower-case word or two."""
    nouns = Counter(_noun(answer) for answer in answers)
    for noun, count in nouns.most_common(1):
        return noun if count > len(answers) / 2 else None
    return None


def _noun(answer: str) -> str | None:
    text = until_stable(normalised, answer).casefold().strip(" .!")
    found = re.fullmatch(r"(?:an? |the )?([a-z]+(?:[ -][a-z]+)?)", text)
    vague = {"image", "picture", "photo", "photograph", "subject", "object", "thing", "none", "unknown"}
    return found[1] if found and found[1] not in vague and len(found[1]) <= 30 else None
