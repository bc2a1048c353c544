"""The floors of the house, held against the code: a room of `lora` may import the rooms below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    {"request", "presets", "trigger", "disk", "cancel", "wait", "web"},
    {"pictures"},
    {"file", "result"},
    {"flux"},
    {"training"},
    {"desk"},
    {"repack"},
    {"job"},
)
"""From the ground up: the rooms of `lora`, and the files that stand beside them."""

GROUND = ["request", "presets", "trigger", "disk", "cancel", "wait", "web"]
ROOMS = ("pictures", "file", "result", "flux", "training")
WITHOUT_TORCH = (
    *(f"lora.{name}" for name in GROUND),
    *(f"lora.pictures.{file.stem}" for file in sorted((ROOT / "lora" / "pictures").glob("[!_]*.py"))),
    *("lora.result.report", "lora.result.preview", "lora.result.curve", "lora.result.tarball"),
    *("lora.training.words", "lora.training.prompts", "captioner.text", "captioner.questions"),
)

FILES = sorted(file for file in (ROOT / "lora").rglob("*.py") if file != ROOT / "lora" / "__init__.py")


def _imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as `package.module`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def _room(file: Path) -> str:
    """The room of a file, or the file itself where it stands beside the rooms."""
    return file.relative_to(ROOT / "lora").parts[0].removesuffix(".py")


def _floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_file_of_lora_stands_on_a_floor() -> None:
    assert {_room(file) for file in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(file: Path) -> None:
    own = _room(file)
    imported = {module.split(".")[1] for module in _imports(file) if module.startswith("lora.")}
    above = {room for room in imported - {own} if room in set().union(*FLOORS) and _floor(room) >= _floor(own)}
    if own in FLOORS[0]:
        above -= FLOORS[0]  # the files beside the rooms may use one another
    assert not above, f"{file.name} imports {above}"


def test_the_packages_keep_apart() -> None:
    for file in (*FILES, *(ROOT / "captioner").glob("*.py")):
        roots = {module.split(".")[0] for module in _imports(file)}
        apart = {"cog", "toyflux", "tests", "bench", "server", "train", "predict", "generate", "script"}
        assert not roots & apart, file
        if file.parent.name == "captioner":
            assert "lora" not in roots, file
        elif file.name not in ("job.py", "desk.py"):
            assert "captioner" not in roots, file


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_files_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "lora" / room / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    assert 3 <= len(text.splitlines()) <= 6


# ---------------------------------------------------------------- long things

LONGEST_FILE, LONGEST_FUNCTION = 400, 80
"""Lines. A file that is longer is more than one noun, a function more than one story."""
STILL_LONG: set[str] = set()
STILL_LONG_FUNCTIONS: set[tuple[str, str]] = set()
"""What is yet to be split. The lists only shrink: whoever shortens something strikes it out."""
SIGNATURES = {("train.py", "train"), ("generate.py", "predict")}
"""Cog reads its inputs from these two: they are as long as there are inputs."""
CODE = [
    file
    for file in sorted(ROOT.rglob("*.py"))
    if not {part for part in file.relative_to(ROOT).parts[:-1] if part.startswith(".")}
    and not {"tests", "migrations"} & {*file.parts}  # a migration is one list of statements
]


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_no_file_is_longer_than_one_noun() -> None:
    lengths = {_name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in CODE}
    long = {name for name, length in lengths.items() if length > LONGEST_FILE and not name.startswith("toyflux/")}
    assert long - STILL_LONG == set(), "split them"
    assert STILL_LONG - long == set(), "these are short now: strike them out of STILL_LONG"


def test_no_function_is_longer_than_one_story() -> None:
    long = set()
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    long.add((_name(file), node.name))
    assert long - SIGNATURES - STILL_LONG_FUNCTIONS == set(), "name their parts"
    assert STILL_LONG_FUNCTIONS - long == set(), "these are short now: strike them out of STILL_LONG_FUNCTIONS"
