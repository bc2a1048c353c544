"""Cog's schemas of the repository's two models: what a request may hold, told from them alone."""

import asyncio
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import jsonschema

from server.records import Json
from server.settings import ROOT

MODEL_FILES = ("train.py", "predict.py", "generate.py", "requirements.txt", "lora/**/*.py", "captioner/**/*.py")


@dataclass(frozen=True)
class Cog:
    """The Cog models that a checkout holds."""

    version: str
    """Of Cog itself."""
    documents: dict[str, Json]
    """OpenAPI, by model: trainer, generator."""
    digest: str
    """SHA-256 of all that they are made of."""


@functools.cache
def read() -> Cog:
    """Asks the trainer's environment, where Cog is installed. Raises RuntimeError where it cannot tell."""
    # A container of the API alone has an environment of another machine's making, which is not to be made anew there.
    made = ROOT / ".venv" / "bin" / "python"
    python = made if made.exists() else ROOT / "script" / "python"
    asked = subprocess.run([str(python), "-m", "script.openapi"], capture_output=True, text=True, cwd=ROOT, check=False)
    if asked.returncode:
        raise RuntimeError(f"the Cog models cannot be read:\n{asked.stderr[-2000:]}")
    told = json.loads(asked.stdout)
    digest = hashlib.sha256()
    for pattern in MODEL_FILES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return Cog(told.pop("cog"), told, digest.hexdigest())


async def read_soon() -> Cog:
    return await asyncio.to_thread(read)


def inputs(document: Json, training: bool) -> Json:
    """The properties of an input, by name."""
    properties = document["components"]["schemas"]["TrainingInput" if training else "Input"]["properties"]
    assert isinstance(properties, dict)
    return properties


def is_file(field: Json) -> bool:
    return "uri" in (field.get("format"), field.get("items", {}).get("format"))


def is_secret(field: Json) -> bool:
    return bool(field.get("x-cog-secret"))


def is_weights(name: str, field: Json) -> bool:
    """Whether an input names a LoRA: a text whose name says so, as lora_weights, extra_lora, resume_from."""
    texts = "string" in (field.get("type"), field.get("items", {}).get("type"))
    return texts and bool(re.search(r"(^|_)loras?$|weights|^resume_from$|^finetune_id$", name))


def faults(document: Json, training: bool, values: Json) -> list[tuple[str, str]]:
    """What is wrong with an input: the field's name and what is allowed, one for each fault."""
    called = "TrainingInput" if training else "Input"
    schema = {"$ref": f"#/components/schemas/{called}", "components": document["components"]}
    return [fault for error in jsonschema.Draft202012Validator(schema).iter_errors(values) for fault in _told(error)]


def _told(error: jsonschema.ValidationError) -> Iterator[tuple[str, str]]:
    limit, seen = error.validator_value, error.instance
    if error.validator == "required":
        missing = [name for name in limit if name not in seen]
        yield from ((name, "is required") for name in missing if error.message.startswith(repr(name)))
        return
    name = str(error.absolute_path[0]) if error.absolute_path else "input"
    shown = f", not {json.dumps(seen)[:100]}"
    match error.validator:
        case "type":
            yield name, f"must be of type {limit}, not {_type(seen)}"
        case "enum":
            yield name, f"must be one of {', '.join(map(str, limit))}{shown}"
        case "minimum":
            yield name, f"must be {limit} or more{shown}"
        case "maximum":
            yield name, f"must be {limit} or less{shown}"
        case "minLength":
            yield name, f"must have {limit} characters or more"
        case "maxLength":
            yield name, f"must have {limit} characters or fewer, not {len(seen)}"
        case _:
            yield name, f"does not fit: {error.validator} {str(limit)[:100]}"


def _type(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
