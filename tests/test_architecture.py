"""The picture of the house in the README, held against the code: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LORA = {
    # file -> the files of lora/ that it may import
    "request": set(),
    "disk": set(),
    "archive": {"disk"},
    "photos": {"archive"},
    "buckets": {"archive"},
    "hardware": set(),
    "wait": set(),
    "base": {"hardware", "layer", "wait"},
    "flow": set(),
    "encode": {"base", "flow", "hardware"},
    "prior": {"encode", "flow"},
    "names": set(),
    "weights": {"archive", "disk", "names"},
    "layer": set(),
    "kernels": set(),
    "rotary": {"kernels"},
    "forward": {"layer", "rotary"},
    "adapter": {"layer", "names", "weights"},
    "graphs": {"encode", "hardware"},
    "fit": {"encode", "flow", "graphs", "prior"},
    "generate": {"adapter", "names", "weights"},
    "report": set(),
    "record": {"photos", "request"},
    "survey": {"buckets"},
    "validation": {"encode", "flow"},
    "watch": {"fit", "report", "tracker", "validation"},
    "learn": {
        *("adapter", "base", "encode", "fit", "forward", "generate", "graphs", "hardware", "names", "prior"),
        *("report", "validation", "watch"),
    },
    "source": {"archive", "disk", "request", "wait", "weights"},
    "resume": {"adapter", "record", "request", "source", "weights"},
    "hub": {"report", "request", "wait"},
    "tracker": set(),
}
"""`job` may import every one of them, and nothing imports `job` but `train.py`."""

WITHOUT_TORCH = ("lora.request", "lora.archive", "lora.photos", "lora.buckets", "lora.report", "captioner.text")


def _imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as `package.module`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def _inside(modules: set[str], package: str) -> set[str]:
    """Of these modules the files of a package."""
    files = {file.stem for file in (ROOT / package).glob("*.py")}
    return {m.split(".")[1] for m in modules if m.startswith(f"{package}.") and m.split(".")[1] in files}


def test_every_file_of_lora_has_its_place_in_the_table() -> None:
    assert {file.stem for file in (ROOT / "lora").glob("*.py")} == {*LORA, "__init__", "job"}


@pytest.mark.parametrize("name", LORA)
def test_a_file_of_lora_imports_only_what_it_may(name: str) -> None:
    assert _inside(_imports(ROOT / "lora" / f"{name}.py"), "lora") <= LORA[name]


def test_the_packages_keep_apart() -> None:
    for file in (*(ROOT / "lora").glob("*.py"), *(ROOT / "captioner").glob("*.py")):
        roots = {module.split(".")[0] for module in _imports(file)}
        assert not roots & {"cog", "toyflux", "tests", "bench", "train", "predict", "generate", "script"}, file
        if file.parent.name == "captioner":
            assert "lora" not in roots, file
        elif file.stem != "job":
            assert "captioner" not in roots, file


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_files_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
