"""What a run shows of itself: the same prompts and seeds drawn without and with what it learned."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_PLAIN = ("a red house on a white background", "a cat on a blue background")


def preview_prompts(trigger_word: str, lora_type: str, class_noun: str | None) -> list[str]:
    """Three prompts that call up what was learned, in settings of their own, and one that must stay as it was."""
    if lora_type == "style":
        things = ("a red house on a white background", "a cat on a blue background", "a tree on a yellow background")
        return [*(f"{thing}, in the style of {trigger_word}" for thing in things), _PLAIN[0]]
    name = f"{trigger_word} {class_noun}" if class_noun else trigger_word
    return [
        f"a {name} on a white background",
        f"a {name} on a red background",
        f"a small {name} on a blue background",
        _PLAIN[0],
    ]


def preview_sheet(previews: Sequence[tuple[str, Image.Image, Image.Image]]) -> Image.Image:
    """(prompt, picture without, picture with) as one picture: a row each, under the prompt.

    Small pictures are enlarged so that a person sees them: the sheet is some 800 pixels wide.
    """
    size = previews[0][1].size
    scale = max(1, 384 // max(size))
    width, height = scale * size[0], scale * size[1]
    margin, line = 12, 26
    sheet = Image.new("RGB", (2 * width + 3 * margin, line + len(previews) * (line + height + margin)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((margin, 5), "without the LoRA", "gray", font=font)
    pen.text((width + 2 * margin, 5), "with it", "gray", font=font)
    for row, (prompt, *pictures) in enumerate(previews):
        top = line + row * (line + height + margin)
        pen.text((margin, top + 3), _fitting(prompt, pen, font, sheet.width - 2 * margin), "black", font=font)
        for column, picture in enumerate(pictures):
            shown = picture.resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(shown, (margin + column * (width + margin), top + line))
    return sheet


def _fitting(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text, cut where it is wider than `width` pixels."""
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"
