"""README.md and docs/ tell the truth: inputs, files, commands, links, messages."""

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from script import docs, signature

ROOT = Path(__file__).parent.parent
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in docs.PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_inputs_are_those_of_the_signatures(page: str) -> None:
    assert docs.with_tables(PAGES[page]) == PAGES[page], "run script/python -m script.docs"


def test_every_input_has_a_row_and_the_readme_has_ten() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/inputs.md"], re.MULTILINE)
    assert rows[: len(inputs := signature.read(ROOT / "train.py", "train").inputs)] == list(inputs)
    assert len(re.findall(r"^\| `(\w+)` \|", PAGES["README.md"], re.MULTILINE)) == 10


def test_the_readme_can_be_read_at_once() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def _files() -> set[str]:
    """Every file of the project but those in git's own, tests, pages, data, and empty packages."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    whole = (
        "tests/",
        "docs/",
        "examples/",
        "toyflux/base/",
        "server/migrations/",
        "deploy/",
        ".ci/",
        "server/page/static/",
        "server/page/templates/",
    )
    aside = {"README.md", "LICENSE", ".gitignore"}
    return {
        file
        for file in listed.stdout.splitlines()
        if (ROOT / file).is_file() and not file.startswith(whole) and not file.endswith("__init__.py")
    } - aside


def _tree() -> Iterator[str]:
    """The paths in the tree of docs/development.md: "name, name  purpose", folders with a slash, two spaces deeper."""
    block = PAGES["docs/development.md"].partition("```\n")[2].partition("```")[0]
    above: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names, gap, purpose = line.strip().partition("  ")
        assert gap, line
        assert purpose.strip(), line
        above = [*above[:depth], names]
        yield from ("".join([*above[:depth], name]) for name in names.split(", "))


def test_the_tree_is_the_files() -> None:
    tree = list(_tree())
    assert len(tree) == len(set(tree))
    files = {path for path in tree if not path.endswith("/")}
    assert files == _files(), "docs/development.md has the tree"
    assert all((ROOT / path).is_dir() for path in tree if path.endswith("/"))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_is_there_and_runs(page: str) -> None:
    for command in set(re.findall(r"(?<![\w/])script/([a-z_-]+)(?![\w./])", PAGES[page])):
        assert os.access(ROOT / "script" / command, os.X_OK), command


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    named = set(
        re.findall(r"(?<![\w/.])((?:lora|captioner|toyflux|bench|tests|script|examples|docs)/[\w./-]*\w)", PAGES[page])
    )
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_repository_leads_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", PAGES[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}, anchor


def _texts() -> list[str]:
    """Every text in the code, with … in the place of its values."""
    texts = []
    for folder in ("lora", "captioner", "script", "."):
        for file in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def test_every_message_in_troubleshooting_is_in_the_code() -> None:
    texts = _texts()
    tables = re.findall(r"^\| message \|.*?\n\n", PAGES["docs/troubleshooting.md"] + "\n", re.MULTILINE | re.DOTALL)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()[2:]]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 50
    assert [message for message in messages if not any(message.strip("…") in text for text in texts)] == []
