"""Fields of a form, made from a model's schema: Cog's names, descriptions, ranges and order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server import schema
from server.records import Json

COMMON = {
    "trainer": ("trigger_word", "lora_type", "mode", "priority", "training_steps", "captioning"),
    "generator": ("aspect_ratio", "megapixels", "num_inference_steps", "seed", "num_outputs", "guidance_scale"),
}
"""Shown at once; the others are folded."""
LONG = 1000
"""A text of so many characters gets a box of several lines."""


@dataclass(frozen=True)
class Field:
    name: str
    label: str
    description: str
    kind: str
    """choice, switch, number, text, long, secret, file."""
    choices: Sequence[str]
    default: Any
    minimum: float | None
    maximum: float | None
    step: str
    required: bool
    longest: int | None


def fields(document: Json, training: bool) -> dict[str, Field]:
    """Every input that is not deprecated, in the schema's order."""
    called = "TrainingInput" if training else "Input"
    required = document["components"]["schemas"][called].get("required", [])
    ordered = sorted(schema.inputs(document, training).items(), key=lambda item: item[1].get("x-order", 0))
    return {name: _field(document, name, own, name in required) for name, own in ordered if not own.get("deprecated")}


def _field(document: Json, name: str, own: Json, required: bool) -> Field:
    choices = []
    for part in own.get("allOf", []):
        choices = [str(choice) for choice in document["components"]["schemas"][part["$ref"].split("/")[-1]]["enum"]]
    kinds = {"boolean": "switch", "integer": "number", "number": "number"}
    kind = kinds.get(own.get("type", ""), "text")
    if choices:
        kind = "choice"
    elif schema.is_file(own):
        kind = "file"
    elif schema.is_secret(own):
        kind = "secret"
    elif kind == "text" and own.get("maxLength", 0) >= LONG and "prompt" in name:
        kind = "long"
    label = name.replace("_", " ").replace("lora", "LoRA").replace("hf ", "Hugging Face ")
    return Field(
        name=name,
        label=label[0].upper() + label[1:],
        description=own.get("description", ""),
        kind=kind,
        choices=choices,
        default=own.get("default"),
        minimum=own.get("minimum"),
        maximum=own.get("maximum"),
        step="1" if own.get("type") == "integer" else "any",
        required=required,
        longest=own.get("maxLength"),
    )


def parse(fields: Mapping[str, Field], sent: Mapping[str, str], names: Sequence[str] | None = None) -> Json:
    """What the form sent as the model's input. What is empty, or as it is anyway, is left out; what cannot be read as a
    number stays a text, for the schema's check to name. A switch that is not sent is off."""
    values: Json = {}
    for name, field in fields.items():
        if field.kind == "file" or (names is not None and name not in names):
            continue
        text = sent.get(name, "").strip()
        if field.kind == "switch":
            value: Any = name in sent
            if value != field.default:
                values[name] = value
        elif text and field.kind == "number":
            values[name] = parse_number(text, field.step == "1")
        elif text and (field.kind != "choice" or text != field.default):
            values[name] = text
    return values


def parse_number(text: str, whole: bool = False) -> Any:
    """The number, or the text where it is none."""
    try:
        return int(text) if whole else float(text)
    except ValueError:
        return text


def errors(faults: Sequence[tuple[str, str]]) -> dict[str, str]:
    """By field, for the form to show where they are."""
    told: dict[str, str] = {}
    for name, text in faults:
        told[name] = f"{told[name]}; {text}" if name in told else text
    return told
