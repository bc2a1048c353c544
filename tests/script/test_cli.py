import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import cog
import pytest
import safetensors.torch
import torch
from PIL import Image

from script import cli, signature

ROOT = Path(__file__).resolve().parents[2]
COMMAND = cli.Command(program="script/example", summary="An example.", output="out.bin", folders=("zip",))
SOURCE = """
from typing import Optional
from cog import Input, Path, Secret

def f(
    zip: Path = Input(description="A zip."),
    word: str = Input(default="TOK", description="A word.", min_length=1, max_length=5),
    kind: str = Input(default="a", description="A kind.", choices=["a", "b"]),
    steps: int = Input(default=10, description="Steps.", ge=1, le=20),
    rate: Optional[float] = Input(default=None, description="A rate.", ge=1e-7, le=1e-2),
    text: Optional[str] = Input(default=None, description="A text."),
    careful: bool = Input(default=True, description="Care."),
    hub_token: Optional[Secret] = Input(default=None, description="A token."),
    word_again: Optional[str] = Input(default=None, description="Word.", min_length=1, max_length=5, deprecated=True),
) -> Path:
    pass
"""


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A signature with an input of every type, in a folder that is the current one and holds pictures.zip."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(SOURCE)
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    return signature.read(tmp_path / "model.py", "f")


def check(example, *pairs, **environ):
    return cli.check(example, ["zip=@pictures.zip", *pairs], environ)


def test_what_is_not_given_has_its_default(example, tmp_path):
    values, faults = check(example)
    assert not faults
    assert values == {
        "zip": cog.Path(tmp_path / "pictures.zip"),
        "word": "TOK",
        "kind": "a",
        "steps": 10,
        "rate": None,
        "text": None,
        "careful": True,
        "hub_token": None,
        "word_again": None,
    }


def test_values_become_their_types(example):
    values, faults = check(example, "steps=7", "rate=1e-3", "careful=False", "word=a=b", "kind=b", "text=")
    assert not faults
    given = [values[name] for name in ("steps", "rate", "careful", "word", "kind", "text")]
    assert given == [7, 1e-3, False, "a=b", "b", ""]
    assert [type(value) for value in given] == [int, float, bool, str, str, str]


def test_an_optional_number_may_be_left_empty(example):
    values, faults = check(example, "rate=")
    assert not faults
    assert values["rate"] is None


def test_a_text_can_come_from_a_file(example, tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffzwei Wörter\r\n".encode())
    values, _ = check(example, "text=@text.txt")
    assert values["text"] == "zwei Wörter"


def test_a_url_is_fetched_into_a_file(example):
    values, faults = cli.check(example, ["zip=data:application/zip;base64,UEs="], {})
    assert not faults
    fetched = cli.fetch(values)["zip"]
    assert Path(str(fetched)).read_bytes() == b"PK"
    Path(str(fetched)).unlink()


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        ("steps=0", "steps: '0' is not a whole number from 1 to 20"),
        ("steps=21", "steps: '21' is not a whole number from 1 to 20"),
        ("steps=2.5", "steps: '2.5' is not a whole number from 1 to 20"),
        ("steps=", "steps: '' is not a whole number from 1 to 20"),
        ("rate=nan", "rate: 'nan' is not a number from 1e-07 to 0.01"),
        ("rate=fast", "rate: 'fast' is not a number from 1e-07 to 0.01"),
        ("word=", "word: '' is not text of 1 to 5 characters"),
        ("word=abcdef", "word: 'abcdef' is not text of 1 to 5 characters"),
        ("kind=c", "kind: 'c' is not a or b"),
        ("careful=maybe", "careful: 'maybe' is not true or false"),
        ("wrod=x", "wrod: no such input; word is meant?"),
        ("hub=x", "hub: no such input; hub_token is meant?"),
        ("steps", "steps: write -i steps=VALUE"),
        ("text=@nowhere.txt", "text: there is no file nowhere.txt in "),
        ("text=@pictures.bin", "text: pictures.bin is not text in UTF-8; where the input takes a path, write it"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(example, tmp_path, pair, fault):
    (tmp_path / "pictures.bin").write_bytes(b"\xff\xfe\xfd")
    _, faults = check(example, pair)
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_a_secret_comes_from_a_file_or_the_environment_and_shows_in_nothing(example, tmp_path):
    (tmp_path / "token").write_text("hf_from_file\n")
    for pair, environ, expected in (
        ("hub_token=@token", {}, "hf_from_file"),
        ("hub_token", {"HUB_TOKEN": "hf_from_environment"}, "hf_from_environment"),
    ):
        values, faults = check(example, pair, **environ)
        assert not faults
        assert values["hub_token"].get_secret_value() == expected
        assert expected not in repr(values)


def test_a_secret_on_the_command_line_is_refused_without_being_repeated(example):
    _, faults = check(example, "hub_token=hf_abc")
    assert len(faults) == 1
    assert "@FILE" in faults[0]
    assert "HUB_TOKEN" in faults[0]
    assert "hf_abc" not in faults[0]


def test_a_secret_in_the_environment_is_not_taken_unasked(example):
    values, _ = check(example, HUB_TOKEN="hf_abc")
    assert values["hub_token"] is None


def test_all_faults_are_named_and_nothing_starts(example, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(COMMAND, example, ["-i", "steps=0", "-i", "wrod=x", "-i", "steps=3", "-o", "nowhere/out.bin"], {})
    assert end.value.code == 2
    said = capsys.readouterr().err
    for fault in ("steps: '0'", "steps: given twice", "wrod: no such", "zip: missing", "-o: "):
        assert fault in said


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["steps=3"], "steps=3: an input is given behind -i: -i steps=3"),
        (["--steps=3"], "--steps=3: an input is given behind -i: -i steps=3"),
        (["-x"], "-x: no such option; inputs are given as -i NAME=VALUE"),
        (["-i", "=3"], "'=3': no such input; write -i NAME=VALUE"),
        (["-o", "nowhere/out.bin"], "-o: there is no folder nowhere; make it first, or name another"),
    ],
)
def test_what_is_written_wrongly_is_told_with_what_to_write(example, capsys, argv, told):
    with pytest.raises(SystemExit) as end:
        cli.parse(COMMAND, example, ["-i", "zip=@pictures.zip", *argv], {})
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[1:-1] == [f"  {told}"]


def test_help_shows_every_input_with_its_type_limits_default_and_description(example, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(COMMAND, example, ["--help"], {})
    assert end.value.code == 0
    said = capsys.readouterr().out
    for field in example.inputs.values():
        assert f"  {field.name}: " in said
        assert field.description in said
    assert "zip: @FILE, a folder or a URL; required" in said
    assert "word_again: text of 1 to 5 characters; an old name" in said
    assert "steps: a whole number from 1 to 20; 10 if not given" in said
    assert "word: text of 1 to 5 characters; TOK if not given" in said
    assert "careful: true or false; true if not given" in said


def test_the_output_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "out.bin"
    output.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        cli.move_into_place({output: b"new", tmp_path / "other": tmp_path / "missing"})
    assert output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]
    cli.move_into_place({output: b"new"})
    assert output.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """script/train's Python in `folder`, with a temporary folder below it."""
    (folder / "tmp").mkdir(exist_ok=True)
    # As script/python starts it: the project comes first, the folder that the user is in does not count.
    environment = {name: value for name, value in os.environ.items() if name not in ("FLUX_BASE", "CAPTIONER")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(
        [sys.executable, "-m", "script.train", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A shell starts what it puts into the background deaf to SIGINT, and what that starts is deaf too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def pictures(tmp_path):
    """Two small pictures in a zip; and a train.py beside it, which is not ours."""
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for colour in ("red", "blue"):
            file = BytesIO()
            picture = Image.new("RGB", (64, 64), colour)
            picture.paste("white", (8, 8, 24, 24))  # or it is blank, and refused
            picture.save(file, "PNG")
            archive.writestr(f"{colour}.png", file.getvalue())
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train.py')\n")
    return tmp_path


SMALL = [
    word
    for pair in ("training_steps=2", "resolution=64", "preservation=off", "preview_prompts=a [trigger]")
    for word in ("-i", pair)
]


def test_a_training_from_the_users_own_folder_leaves_the_tar_the_picture_and_the_report(pictures):
    process = start(pictures, "-i", "input_images=@pictures.zip", *SMALL, "-i", "checkpoints=all", "-o", "mine.tar")
    said, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, complaints
    *_, weights, picture, report, others = said.splitlines()
    assert re.fullmatch(r"The LoRA: +mine\.tar \([\d.]+ MB\)", weights)
    assert re.fullmatch(r"Before and after: +mine-preview\.webp", picture)
    assert re.fullmatch(r"The report: +mine-report\.html", report)
    assert re.fullmatch(r"Other checkpoints: +mine-checkpoints \(step-0001\)", others)
    [other] = (pictures / "mine-checkpoints").iterdir()
    with tarfile.open(pictures / "mine.tar") as tar:
        names = tar.getnames()
        best = tar.extractfile("output/flux_train_replicate/lora.safetensors")
        best = safetensors.torch.load(best.read())
    earlier = safetensors.torch.load_file(other)
    assert {name: weight.shape for name, weight in earlier.items()} == {name: w.shape for name, w in best.items()}
    assert any(not torch.equal(weight, best[name]) for name, weight in earlier.items())
    with safetensors.safe_open(other, "pt") as opened:
        assert opened.metadata()["ss_steps"] == "1"
    assert [name for name in names if name.endswith(".safetensors")] == ["output/flux_train_replicate/lora.safetensors"]
    assert Image.open(pictures / "mine-preview.webp").width > 64
    assert sorted(path.name for path in pictures.iterdir() if path.is_file()) == [
        "mine-preview.webp",
        "mine-report.html",
        "mine.tar",
        "pictures.zip",
        "train.py",
    ]
    assert list((pictures / "tmp").iterdir()) == []


def test_a_failing_training_says_why_and_leaves_nothing(pictures):
    (pictures / "pictures.zip").write_text("not a zip")
    (pictures / "trained_model.tar").write_text("earlier")
    process = start(pictures, "-i", "input_images=@pictures.zip", *SMALL)
    told, complaints = process.communicate(timeout=600)
    assert process.returncode == 1
    assert told.startswith("trained_model.tar is there already, and is replaced when the training is done; -o FILE")
    assert complaints.startswith("script/train: input_images: must be a zip, tar or tar.gz"), complaints
    files = ["pictures.zip", "train.py", "trained_model.tar"]
    assert sorted(path.name for path in pictures.iterdir() if path.is_file()) == files
    assert (pictures / "trained_model.tar").read_text() == "earlier"
    assert list((pictures / "tmp").iterdir()) == []


def test_inputs_that_contradict_each_other_are_refused_before_the_pictures_are_fetched(pictures):
    asked = ["input_images=http://127.0.0.1:9/x.zip", "steps=2", "training_steps=3", "trigger_word=a b c d e", "mask=1"]
    asked += ["resolution=100", "preservation=hard"]
    process = start(pictures, *(word for pair in asked for word in ("-i", pair)))
    _, complaints = process.communicate(timeout=600)
    assert process.returncode == 2
    for told in ("mask: no such input", "steps: it means the same as training_steps", "is a sentence of 5 words"):
        assert told in complaints
    for told in ("resolution: '100' is not a multiple of 16", "preservation: 'hard' is neither off, light nor firm"):
        assert told in complaints
    assert "could not be fetched" not in complaints


def test_a_training_that_is_interrupted_leaves_nothing(pictures):
    process = start(pictures, "-i", "input_images=@pictures.zip", *SMALL[2:], "-i", "training_steps=5000")
    assert process.stdout is not None
    for line in process.stdout:
        if "| 1/" in line:
            process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert sorted(path.name for path in pictures.iterdir() if path.is_file()) == ["pictures.zip", "train.py"]
    assert list((pictures / "tmp").iterdir()) == []


def ended(work: str, folder: Path, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    """`cli.run` in a process of its own, with `work` as the body of its work."""
    code = (
        f"import sys\nfrom script import cli\ndef work():\n    {work}\n"
        "sys.exit(cli.run(cli.Command(program='script/example', summary='', output=''), work))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=300
    )


def test_a_users_mistake_is_one_line_and_a_fault_of_ours_shows_the_way_there(tmp_path):
    mistake = ended("raise ValueError('rank: too high')", tmp_path)
    assert (mistake.returncode, mistake.stderr) == (1, "script/example: rank: too high\n")
    fault = ended("raise KeyError('rank')", tmp_path)
    assert fault.returncode == 1
    assert fault.stderr.startswith("Traceback (most recent call last):")
    assert fault.stderr.endswith("script/example: 'rank'\n")
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_ends_the_work_without_a_traceback(tmp_path):
    for work, status in (("print('a line', flush=True)", 141), ("cli.say('x' * 99999)", 0)):
        reading, writing = os.pipe()
        os.close(reading)
        done = ended(work, tmp_path, stdout=writing)
        os.close(writing)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
        assert ("nobody reads" in done.stderr) == (status != 0)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda x: str(int(x))
)
def test_work_that_is_stopped_leaves_no_temporary_file(tmp_path, number, status):
    work = """if True:
        import sys, tempfile, time
        from pathlib import Path
        from script import cli
        def work():
            Path(tempfile.mkstemp()[1]).write_text("half done")
            print("working", flush=True)
            time.sleep(60)
        sys.exit(cli.run(cli.Command(program="script/example", summary="", output=""), work))
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", work]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        assert len(list(tmp_path.rglob("*"))) == 2
        process.send_signal(number)
    assert process.returncode == status
    assert list(tmp_path.iterdir()) == []
