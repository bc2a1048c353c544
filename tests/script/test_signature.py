import ast
import importlib
import json
from pathlib import Path

import pytest
from cog._adt import PrimitiveType, Repetition
from cog._inspector import create_predictor

from script import signature
from script.openapi import document

ROOT = Path(__file__).resolve().parents[2]
HEAD = "from typing import Optional\nfrom cog import BaseModel, Input, Path, Secret\nfrom somewhere import ELSEWHERE\n"
FUNCTIONS = [("train.py", "train"), ("predict.py", "Predictor"), ("generate.py", "Predictor")]


def read(tmp_path: Path, inputs: str, head: str = HEAD, returns: str = " -> str"):
    source = tmp_path / "model.py"
    source.write_text(f"{head}\ndef f({inputs}){returns}:\n    return missing_name\n", encoding="utf-8")
    return signature.read(source, "f").inputs


@pytest.mark.parametrize(("file", "name"), FUNCTIONS)
def test_what_is_read_from_the_source_is_what_cog_sees_when_it_imports_the_file(file, name):
    assert signature.read(ROOT / file, name) == create_predictor(file.removesuffix(".py"), name)


@pytest.mark.parametrize(("file", "name"), FUNCTIONS)
def test_every_input_is_described(file, name):
    for field in signature.read(ROOT / file, name).inputs.values():
        assert field.description, field.name


def test_the_inputs_are_read_without_running_the_file(tmp_path):
    inputs = read(tmp_path, "x: int = Input(default=3)", head=HEAD + "raise RuntimeError\nimport torch_is_not_here\n")
    assert inputs["x"].default == 3


def test_everything_that_cog_build_understands_is_taken(tmp_path):
    head = HEAD + 'WORD = "two"\nSIZES = ("s", "m")\n'
    inputs = read(
        tmp_path,
        "zip: Path = Input(description='''a\nzip'''), word: str = Input(default=WORD, min_length=1, max_length=60),"
        " size: str = Input(default='s', choices=SIZES), low: int = Input(default=-1, ge=-5, le=1000),"
        " rate: Optional[float] = Input(default=None, ge=1e-7), plain: bool = True, more: int | None = None,"
        " key: Optional[Secret] = Input(default=None)",
        head,
    )
    assert inputs["zip"].description == "a\nzip"
    assert inputs["zip"].type.primitive is PrimitiveType.PATH
    assert (inputs["word"].default, inputs["word"].min_length, inputs["word"].max_length) == ("two", 1, 60)
    assert inputs["size"].choices == ["s", "m"]
    assert (inputs["low"].default, inputs["low"].ge, inputs["low"].le) == (-1, -5, 1000)
    assert (inputs["rate"].default, inputs["rate"].ge) == (None, 1e-7)
    assert inputs["plain"].default is True
    assert inputs["more"].type.repetition is inputs["key"].type.repetition is Repetition.OPTIONAL


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        ("x: int = Input(default=ELSEWHERE)", "x: default: ELSEWHERE is not a literal constant"),
        ("x: int = Input(default=10 + 5)", "x: default: only a literal"),
        ("x: int = Input(default=int('3'))", "x: default: only a literal"),
        ("x: int = Input(5)", "x: Input(…) takes keywords only"),
        ("x: int = ELSEWHERE", "x: the default must be a literal or Input"),
        ("x: int = cog.Input(default=3)", "x: the default must be a literal or Input"),
        ("x: int = Input(default=None)", "x: a default of None leaves it required"),
        ("x: Secret = Input(default=None)", "x: a default of None leaves it required"),
        ("x: Optional[int] = Input(ge=1)", "x: it is Optional"),
        ("x: int = Input(default=3, ge=NUMBER)", "x: ge: a name here is dropped"),
        ("x: int = Input(default=3, le=1_000)", "x: le: write the number without underscores"),
        ("x: str = Input(description='a' 'b')", "x: description: write one plain string"),
        ("x: str = Input(description=('a'))", "x: description: the brackets"),
        ("x: str = Input(description=f'a{1}')", "x: description: only a literal"),
        ("x: str = Input(description='it\\'s')", "x: description: write one plain string"),
        ("x: str = Input(description=r'a')", "x: description: write one plain string"),
        ("x: str = Input(default='a\\n')", "x: default: write one plain string"),
        ("x: str = Input(default='a', choices=('a', 'b'))", "x: choices: write a literal list"),
        ("x: str = Input(default='a', choices=sorted(['a', 'b']))", "x: choices: write a literal list"),
        ("x: str = Input(default='a', choices=['a'])", "choices=['a'] must have >= 2"),
        ("x: str = Input(default_factory=str)", "x: default_factory: unknown"),
        ("x: int = Input(**ELSEWHERE)", "x: **: unknown"),
        ("x: int = Input(default=9, le=5)", "invalid default"),
        ("x: ELSEWHERE = Input()", "ELSEWHERE"),
        ("x: Literal['a'] = Input()", "Literal"),
        ("x = Input(default=3)", "x"),
        ("*x: int", "no *args"),
        ("**x: int", "no *args"),
    ],
)
def test_what_cog_build_would_misread_is_refused(tmp_path, inputs, fault):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(tmp_path, inputs, HEAD + "import cog\nNUMBER = 3\nif ELSEWHERE:\n    HIDDEN = 3\n")
    assert fault in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)x: ge.*y: description.*z: default"):
        read(
            tmp_path,
            "x: int = Input(ge=ELSEWHERE), y: str = Input(description='a' 'b'), z: int = Input(default=ELSEWHERE)",
        )


def test_a_missing_return_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="return type"):
        read(tmp_path, "x: int = 3", returns="")


def test_the_schema_agrees_with_the_signatures():
    """Field by field against `Input(…)` as Python itself evaluates it, not against what the schema was made from."""
    info = signature.read(ROOT / "train.py", "train")
    schemas = document(signature.read(ROOT / "predict.py", "Predictor"), info)["components"]["schemas"]
    schema = json.loads(json.dumps(schemas))["TrainingInput"]
    function = importlib.import_module("train").train
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    assert list(schema["properties"]) == list(names)
    assert len(function.__defaults__) == len(names)
    for order, (name, written) in enumerate(zip(names, function.__defaults__, strict=True)):
        seen = schema["properties"][name]
        optional = str(function.__annotations__[name]).startswith("typing.Optional")
        assert seen["x-order"] == order
        assert seen["description"] == written.description
        assert seen.get("nullable", False) is optional
        assert (name in schema.get("required", [])) is (written.default is None and not optional)
        assert seen.get("default") == written.default
        limits = written.ge, written.le, written.min_length, written.max_length
        assert (seen.get("minimum"), seen.get("maximum"), seen.get("minLength"), seen.get("maxLength")) == limits
        if written.choices:
            assert seen["allOf"] == [{"$ref": f"#/components/schemas/{name}"}]
            assert schemas[name]["enum"] == written.choices
    assert schemas["TrainingOutput"]["properties"]["weights"]["format"] == "uri"
    assert schemas["Input"]["required"] == ["txt"]
    assert schemas["Input"]["properties"]["txt"]["description"] == "some words"


def test_the_text_of_a_node_is_what_python_says_it_is():
    text = (ROOT / "train.py").read_text(encoding="utf-8") + 'x = f("größer\x0c als", y=(1,\n  "ü" ),  z=3)\n'
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.expr | ast.keyword)]
    lines = text.encode().splitlines(keepends=True)
    assert [signature._written(lines, node) for node in nodes] == [ast.get_source_segment(text, n) for n in nodes]
    assert len(nodes) > 300
