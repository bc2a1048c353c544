"""The README tells the truth: every input with its default, every file with its purpose, every command there."""

import os
import re
from pathlib import Path

from script import signature

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_has_every_input_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", README, re.MULTILINE))
    inputs = signature.read(ROOT / "train.py", "train").inputs
    assert list(rows) == list(inputs)
    for name, field in inputs.items():
        default = field.default
        if default is None:
            wanted = "required" if name == "input_images" else "empty"
        else:
            wanted = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        assert rows[name].strip() == wanted, name


def test_the_tree_names_every_file_that_people_read() -> None:
    tree = README.partition("## The house")[2]
    for folder in ("lora", "captioner", "toyflux", "bench", "script"):
        for file in (ROOT / folder).iterdir():
            if file.is_file() and not file.name.startswith(("__init__", ".")):
                assert file.name in tree, f"{folder}/{file.name}"
    for name in ("cog.yaml", "cog.generate.yaml", "train.py", "predict.py", "generate.py", "requirements.txt"):
        assert name in tree


def test_every_command_that_it_names_is_there_and_runs() -> None:
    for command in set(re.findall(r"\bscript/([a-z_-]+)\b", README)):
        assert os.access(ROOT / "script" / command, os.X_OK), command


def test_every_picture_and_link_inside_the_repository_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"@(examples/[\w./-]+)", README):
        assert (ROOT / target).exists(), target
