"""script/python in a copy of the project, with an environment that is there already: nothing is installed here."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path):
    """A copy with requirements and commands, whose bootstrap says what it is asked for and makes nothing."""
    root = tmp_path / "a copy"
    (root / "script").mkdir(parents=True)
    for name in ("script/python", "script/train", "script/bench", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, root / name)
    (root / "script" / "__init__.py").touch()
    (root / "script" / "train.py").write_text("import os, sys\nprint('trains', os.getcwd(), sys.argv[1:])\n")
    (root / "script" / "bootstrap.py").write_text("import sys\nprint('makes', sys.argv[1], len(sys.stdin.read()))\n")
    return root


def install(root: Path) -> None:
    """What bootstrap.py leaves on this machine."""
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    wanted = (root / "requirements-dev.txt").read_text()
    if Path("/dev/nvidiactl").exists() or Path("/usr/lib/wsl/lib/nvidia-smi").exists():
        torch = next(
            line for line in (root / "requirements.txt").read_text().splitlines() if line.startswith("torch==")
        )
        rest = [line for line in wanted.splitlines() if not line.startswith("torch==")]
        wanted = "\n".join([torch, *rest]) + "\n"
    (root / ".venv" / "installed.txt").write_text(wanted)


def run(*command: object, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_with_the_environment_there_it_runs_at_once_in_the_users_own_folder(copy, tmp_path):
    install(copy)
    (tmp_path / "script").mkdir()  # the user's own folder of that name does not hide the project's
    (tmp_path / "script" / "train.py").write_text("raise SystemExit('the wrong one')")
    done = run(copy / "script" / "train", "-i", "word=two words", folder=tmp_path)
    assert done.stdout == f"trains {tmp_path} ['-i', 'word=two words']\n", done.stderr
    assert done.stderr == ""


def test_without_an_environment_or_with_other_requirements_it_is_made(copy, tmp_path):
    done = run(copy / "script" / "python", "-V", folder=tmp_path, PYTHON=sys.executable)
    assert done.stdout.startswith(f"makes {copy / '.venv'}")
    install(copy)
    assert run(copy / "script" / "python", "-V", folder=tmp_path).stdout.startswith("Python 3.")
    with (copy / "requirements-dev.txt").open("a") as file:
        file.write("one-more==1.0\n")
    done = run(copy / "script" / "python", "-V", folder=tmp_path, PYTHON=sys.executable)
    assert done.stdout.startswith(f"makes {copy / '.venv'}")


def test_an_environment_of_another_users_is_taken_as_it_is(copy):
    """As in the server's image, where the requirements of a machine without a GPU are others than those it has."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is shut to others
        root = Path(folder) / "copy"
        shutil.copytree(copy, root)
        (root / ".venv" / "bin").mkdir(parents=True)
        (root / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho runs\n")
        for path in (Path(folder), root / ".venv" / "bin" / "python"):
            path.chmod(0o755)
        (root / ".venv").chmod(0o555)
        other = {"user": 65534} if os.geteuid() == 0 else {}  # to root nothing is read-only
        command = [str(root / "script" / "python"), "-V"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **other)
        (root / ".venv").chmod(0o755)
    assert done.stdout == "runs\n", done.stderr


def test_threads_wait_with_a_short_spin_unless_the_user_says_otherwise(copy, tmp_path):
    install(copy)
    shown = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    others = {"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": ""}
    for chosen, spins in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")):
        done = run(copy / "script" / "python", "-c", shown, folder=tmp_path, **(others | chosen))
        assert done.stdout == f"{spins}\n", (chosen, done.stderr)


def test_a_python_that_is_too_old_is_refused_by_its_version(copy, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9.1 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = run(copy / "script" / "python", "-V", folder=tmp_path, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.startswith("script/python: Python 3.11 to 3.14 is needed; found: 3.9.1.")
    assert not (copy / ".venv").exists()


def test_a_python_that_is_too_new_is_refused_by_its_version(copy, tmp_path):
    new = tmp_path / "python3"
    new.write_text(f'#!/bin/sh\nexec {sys.executable} "$1" "import sys; sys.version_info = (3, 15, 0); $2"\n')
    new.chmod(0o755)
    done = run(copy / "script" / "python", "-V", folder=tmp_path, PYTHON=str(new))
    assert done.returncode == 1
    assert done.stderr.startswith("script/python: Python 3.11 to 3.14 is needed; found: 3.15.0.")


def test_bench_runs_what_is_there_and_lists_it_otherwise(copy, tmp_path):
    install(copy)
    (copy / "bench").mkdir()
    (copy / "bench" / "crops.py").write_text("import sys\nprint('crops', sys.argv[1:])\n")
    assert run(copy / "script" / "bench", "crops", "4", folder=tmp_path).stdout == "crops ['4']\n"
    for wrong in ([], ["nothing"], ["../script/train"]):
        done = run(copy / "script" / "bench", *wrong, folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[1:] == ["crops"]
