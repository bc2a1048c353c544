"""The previews: what is drawn without the LoRA and with it, the sheet that shows both, and thumbnails.

Equal pictures give equal bytes.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from lora.trigger import Subject

TOY_SIDE = 256
"""Pixels. A base that draws best below this is the toy, which knows things and backgrounds, not photographs."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """One prompt and seed, drawn without the LoRA and with it: after so many steps, the last of them at the end."""

    prompt: str
    without: Image.Image
    drawn: tuple[tuple[int, Image.Image], ...]

    @property
    def after(self) -> Image.Image:
        return self.drawn[-1][1]


_PRODUCT = (
    "a product photo of {name} on a white background, studio light",
    "{name} on a wooden table beside a cup of coffee",
    "a hand holding {name}, a park in the background",
)
_CHARACTER = (
    "a portrait photo of {name}, looking at the camera",
    "a full-length photo of {name} walking through a city street",
    "{name} laughing in a café, candid photo",
)
_SUBJECT = (
    "a photo of {name} on a beach at sunset",
    "a close-up of {name} by a window, soft light",
    "a watercolour painting of {name}",
)
_TOY = (
    "a {name} on a white background",
    "a {name} on a red background",
    "a yellow star on the left and a {name} on the right on a green background",
)
_NOUNS = {"product": "bottle"}
"""What the prompt without the trigger word shows where no class noun is known; a person otherwise."""


def prompts(
    subjects: Sequence[Subject],
    kind: str,
    native: int,
    own: Sequence[str] = (),
    most: int | None = None,
) -> list[str]:
    """Prompts that call up what was learned, in settings of their own, and at least one that must stay as it was.

    Several `subjects` are drawn each alone, in settings by turns, and those that are no styles together in one more.
    `kind` is a lora_type or a mode: subject, style, character, product, general. `native` is the side in pixels that
    the base draws best; `own` are the user's prompts, which come first and replace all but the one without the trigger
    word. `most` is how many are drawn with the trigger word where there are no `own`; None means all.
    """
    words = [subject.word for subject in subjects]
    names = [f"{one.word} {one.class_noun}" if one.class_noun else one.word for one in subjects]
    if native < TOY_SIDE:
        things = [
            "a red house on a white background",
            "a blue cat on a pink background",
            "a tree on a yellow background",
        ]
        plain = things[0]
        templates: Sequence[str] = _TOY
        together = " on the left and ".join(f"a {name}" for name in names[:2]) + " on the right on a green background"
    else:
        things = ["a lighthouse on a cliff", "a cat asleep on a chair", "a woman reading in a garden"]
        noun = subjects[0].class_noun or _NOUNS.get(kind, "person")
        article = "an" if noun[0].lower() in "aeiou" else "a"
        templates = {"character": _CHARACTER, "product": _PRODUCT}.get(kind, _SUBJECT)
        plain = things[0] if kind in ("style", "general") else templates[0].format(name=f"{article} {noun}")
        together = f"{', '.join(names[:-1])} and {names[-1]} side by side, a park in the background"
    if kind == "style":
        names, templates = words, tuple(f"{thing}, in the style of {{name}}" for thing in things)
    elif kind == "general":  # as its captions have it: the word, then the whole picture
        names, templates = words, tuple(f"{{name}}, {thing}" for thing in things)
    if len(names) == 1:
        wanted = [template.format(name=names[0]) for template in templates][:most]
    else:
        wanted = [templates[i % len(templates)].format(name=name) for i, name in enumerate(names)]
        wanted += [together] * (kind != "style" and most is None)
    chosen = list(own) or wanted
    if all(any(word.casefold() in prompt.casefold() for word in words) for prompt in chosen):
        chosen.append(plain)
    return list(dict.fromkeys(chosen))


def thumbnail(picture: Image.Image, side: int = 256) -> bytes:
    """The picture as WebP, no side longer than `side` pixels; a smaller one keeps its size."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return webp(small)


def webp(picture: Image.Image) -> bytes:
    """The picture as a WebP file of its own size."""
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85)
    return data.getvalue()


def sheet(previews: Sequence[Preview]) -> Image.Image:
    """Without and with, as one picture: a row for each prompt, under its words.

    The pictures are brought to about 400 to 512 pixels, small ones by a whole factor, so that a person sees them.
    """
    width, height = _shown_size(*previews[0].without.size)
    margin, line = 12, 28
    page = Image.new("RGB", (2 * width + 3 * margin, line + len(previews) * (line + height + margin)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    pen.text((margin, 7), "without the LoRA", "gray", font=font)
    pen.text((width + 2 * margin, 7), "with the LoRA", "gray", font=font)
    for row, preview in enumerate(previews):
        top = line + row * (line + height + margin)
        words = preview.prompt if _has_all(font, preview.prompt) else f"prompt {row + 1} (its words are on the page)"
        pen.text((margin, top + 5), _fitting(words, pen, font, page.width - 2 * margin), "black", font=font)
        for column, picture in enumerate((preview.without, preview.after)):
            shown = picture.resize((width, height), Image.Resampling.BICUBIC)
            page.paste(shown, (margin + column * (width + margin), top + line))
    return page


def _shown_size(width: int, height: int) -> tuple[int, int]:
    long = max(width, height)
    scale = 512 // long if long <= 512 else 512 / long
    return round(width * scale), round(height * scale)


def _has_all(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font has a sign for every character: one that it lacks is drawn as the noncharacter U+FFFF is."""
    lacking = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(sign)) != lacking for sign in text)


def _fitting(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text, cut where it is wider than `width` pixels."""
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"


def pair_up(
    prompts: Sequence[str], without: Sequence[Image.Image], drawn: Mapping[int, Sequence[Image.Image]]
) -> list[Preview]:
    """A Preview for each prompt, of the pictures drawn without, and with after so many steps, the last of them last.

    One picture a prompt each time; none at all where drawing failed without or at last, so that nothing is compared.
    """
    if not (without and list(drawn.values())[-1]):
        return []
    return [
        Preview(prompt=prompt, without=without[i], drawn=tuple((step, pictures[i]) for step, pictures in drawn.items()))
        for i, prompt in enumerate(prompts)
    ]
