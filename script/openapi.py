"""The document that `cog build` leaves in a container as `.cog/openapi_schema.json`, made without `cog build`.

Cog's server takes from it what a request may hold (`components.schemas`, `TrainingInput` in train mode and `Input` in
predict mode) and serves it at /openapi.json; without it nothing is checked. The parts are Cog's own: the types come
from `cog._adt`. The frame follows what `cog build` of the pinned version writes.
"""

import json
import sys
from pathlib import Path

from cog import __version__
from cog._adt import InputField, PredictorInfo, PrimitiveType, Repetition

from script import signature

ROOT = Path(__file__).resolve().parent.parent

OK = {"200": {"description": "Successful Response"}}


def main() -> None:
    """Prints what a server needs to know of the repository's two Cog models, as JSON."""
    trainer = document(signature.read(ROOT / "predict.py", "Predictor"), signature.read(ROOT / "train.py", "train"))
    generator = document(signature.read(ROOT / "generate.py", "Predictor"))
    json.dump({"cog": __version__, "trainer": trainer, "generator": generator}, sys.stdout)


def document(predict: PredictorInfo, train: PredictorInfo | None = None) -> dict[str, object]:
    """The OpenAPI 3.0.2 document of a model that predicts, and trains where it can."""
    paths = _paths("/predictions", "Predict", "prediction")
    schemas = _schemas(predict, "", "Prediction")
    if train is not None:
        paths |= _paths("/trainings", "Train", "training")
        schemas |= _schemas(train, "Training", "Training")
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {
            "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": OK}},
            "/health-check": {"get": {"summary": "Healthcheck", "responses": OK}},
            **paths,
        },
        "components": {"schemas": schemas},
    }


def _paths(route: str, summary: str, noun: str) -> dict[str, object]:
    request = {"$ref": f"#/components/schemas/{noun.title()}Request"}
    response = {"$ref": f"#/components/schemas/{noun.title()}Response"}
    return {
        route: {
            "post": {
                "summary": summary,
                "requestBody": {"content": {"application/json": {"schema": request}}},
                "responses": {"200": {**OK["200"], "content": {"application/json": {"schema": response}}}},
            }
        },
        f"{route}/{{{noun}_id}}/cancel": {
            "post": {
                "summary": "Cancel",
                "parameters": [{"name": f"{noun}_id", "in": "path", "required": True, "schema": {"type": "string"}}],
                "responses": OK,
            }
        },
    }


def _schemas(info: PredictorInfo, prefix: str, noun: str) -> dict[str, object]:
    fields = info.inputs.values()
    inputs: dict[str, object] = {
        "title": f"{prefix}Input",
        "type": "object",
        "properties": {field.name: _property(field) for field in fields},
    }
    required = [field.name for field in fields if field.default is None and not _is_optional(field)]
    if required:
        inputs["required"] = required
    whole = {"input": {"$ref": f"#/components/schemas/{prefix}Input"}, "id": {"type": "string"}}
    output = {"$ref": f"#/components/schemas/{prefix}Output"}
    return {
        f"{prefix}Input": inputs,
        f"{prefix}Output": info.output.json_type(),
        f"{noun}Request": {"type": "object", "properties": whole},
        f"{noun}Response": {"type": "object", "properties": {**whole, "output": output}},
        **{field.name: _enumeration(field) for field in fields if field.choices},
    }


def _property(field: InputField) -> dict[str, object]:
    if field.choices:
        schema: dict[str, object] = {"allOf": [{"$ref": f"#/components/schemas/{field.name}"}]}
    else:
        schema = {"title": field.name.replace("_", " ").title(), **field.type.json_type()}
    if field.default is not None or _is_optional(field):
        schema["default"] = field.default
    if _is_optional(field):
        schema["nullable"] = True
    limits = {
        "description": field.description,
        "minimum": _number(field.ge),
        "maximum": _number(field.le),
        "minLength": field.min_length,
        "maxLength": field.max_length,
        "pattern": field.regex,
        "deprecated": field.deprecated,
    }
    return {**schema, "x-order": field.order, **{name: limit for name, limit in limits.items() if limit is not None}}


def _enumeration(field: InputField) -> dict[str, object]:
    kind = field.type.primitive.json_type()["type"]
    assert field.type.primitive in (PrimitiveType.STRING, PrimitiveType.INTEGER)
    return {"title": field.name, "description": "An enumeration.", "enum": field.choices, "type": kind}


def _number(limit: float | None) -> float | None:
    """Cog's package keeps every limit as a float; a message that names one should say 1, not 1.0."""
    return int(limit) if limit is not None and limit.is_integer() else limit


def _is_optional(field: InputField) -> bool:
    return field.type.repetition in (Repetition.OPTIONAL, Repetition.OPTIONAL_REPEATED)


if __name__ == "__main__":
    main()
