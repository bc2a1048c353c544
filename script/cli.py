"""The command line of a Cog function: `-i name=value`, checked as Cog's server checks a request, and a clean end.

`parse` takes the inputs from what `script.signature` read, so a new input of `train.py` is here without a word more.
`run` gives the work a folder of its own which is gone afterwards, however the work ends.
"""

import argparse
import contextlib
import difflib
import gc
import math
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import cog
from cog._adt import InputField, PredictorInfo, PrimitiveType, Repetition
from cog._inspector import check_input

from lora import disk
from script import files

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Command:
    """What `--help` says of a command besides its inputs."""

    program: str
    """As it is called: script/train."""
    summary: str
    """One sentence."""
    output: str
    """The file that is written where -o is not given."""
    folders: tuple[str, ...] = ()
    """Inputs of files that a folder may stand for: it is packed."""


def parse(
    command: Command,
    signature: PredictorInfo,
    argv: Sequence[str],
    environ: Mapping[str, str],
    contradictions: Callable[[Mapping[str, object]], Sequence[str]] = lambda values: (),
) -> tuple[dict[str, object], Path]:
    """Every input of the signature with its value or default, and the file to write.

    `contradictions` says what is wrong with values that are right one by one: before anything is fetched.

    Exits with 0 after --help, and with 2 after naming everything that is wrong.
    """
    parser = argparse.ArgumentParser(prog=command.program, add_help=False, allow_abbrev=False)
    parser.add_argument("-i", "--input", action="append", default=[], dest="inputs", metavar="NAME=VALUE")
    parser.add_argument("-o", "--output", default=command.output, metavar="FILE")
    parser.add_argument("-h", "--help", action="store_true")
    arguments, others = parser.parse_known_args(argv)
    if arguments.help:
        say(help_text(command, signature))
        raise SystemExit(0)

    output = Path(arguments.output)
    values, faults = check(signature, arguments.inputs, environ, command.folders)
    faults = [*map(_stray, others), *faults, *contradictions(values)]
    if output.is_dir():
        faults.append(f"-o: {output} is a folder; name a file")
    elif not output.absolute().parent.is_dir():
        faults.append(f"-o: there is no folder {output.parent}; make it first, or name another")
    else:
        try:  # before an hour of work: what permissions promise is not what a disk does
            with disk.writing(output.absolute()), tempfile.TemporaryFile(dir=output.absolute().parent) as probe:
                probe.write(b"\0")
        except OSError as error:
            faults.append(f"-o: {error}")
    if faults:
        print(f"{command.program}: nothing was started:", *faults, sep="\n  ", file=sys.stderr)
        print(f"{command.program} --help shows every input", file=sys.stderr)
        raise SystemExit(2)
    return values, output


def _stray(argument: str) -> str:
    """What to write in place of an argument that is neither -i nor -o."""
    if "=" in argument:
        return f"{files.cut(argument)}: an input is given behind -i: -i {files.cut(argument.lstrip('-'))}"
    return f"{files.cut(argument)}: no such option; inputs are given as -i NAME=VALUE"


def check(
    signature: PredictorInfo, pairs: Sequence[str], environ: Mapping[str, str], folders: Collection[str] = ()
) -> tuple[dict[str, object], list[str]]:
    """The values of all inputs, defaults included, from texts `name=value`; and all that is wrong, a line each.

    A name without `=` is a secret's, and takes the environment variable of that name in capitals. `folders` names the
    inputs that a folder may stand for.
    """
    values: dict[str, object] = {}
    faults: list[str] = []
    given: set[str] = set()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        field = signature.inputs.get(name)
        if field is None:
            close = difflib.get_close_matches(name, signature.inputs, n=1) or [
                known for known in signature.inputs if name and known.startswith(name)
            ]
            meant = f"; {close[0]} is meant?" if close else "; write -i NAME=VALUE" if not name else ""
            faults.append(f"{name or repr(pair)}: no such input{meant}")
            continue
        if name in given:
            faults.append(f"{name}: given twice")
        given.add(name)
        try:
            if field.type.primitive is PrimitiveType.SECRET:
                values[name] = _secret(field, text if equals else None, environ)
            elif not equals:
                faults.append(f"{name}: write -i {name}=VALUE")
            else:
                values[name] = _value(field, text, name in folders)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    for name, field in signature.inputs.items():
        if name in given:
            continue
        try:
            values |= check_input({name: field}, {})
        except ValueError:
            faults.append(f"{name}: missing; it must be {describe(field, name in folders)}")
    return values, faults


def _value(field: InputField, text: str, folder: bool) -> object:
    """The text as the field's type, within its limits. Raises ValueError that says what is allowed."""
    if field.type.primitive is PrimitiveType.PATH:
        return files.meant(text.removeprefix("@").strip(), describe(field, folder), folder)
    if text.startswith("@"):
        text = _read(text[1:])
    if not text and field.type.repetition is Repetition.OPTIONAL and field.type.primitive is not PrimitiveType.STRING:
        return None  # "leave it empty"
    try:
        value = _convert(field.type.primitive, text)
        return check_input({field.name: field}, {field.name: value})[field.name]
    except ValueError as error:
        raise ValueError(f"{files.cut(text)!r} is not {describe(field)}") from error


def _convert(primitive: PrimitiveType, text: str) -> object:
    if primitive is PrimitiveType.BOOL:
        if text.lower() not in ("true", "false"):
            raise ValueError("neither true nor false")
        return text.lower() == "true"
    if primitive is PrimitiveType.INTEGER:
        return int(text)
    if primitive is PrimitiveType.FLOAT:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError("not a finite number")
        return number
    return text


def _secret(field: InputField, text: str | None, environ: Mapping[str, str]) -> cog.Secret:
    """The secret from a file or the environment: what stands on a command line is seen by all users of a machine."""
    variable = field.name.upper()
    if text is None:
        if not environ.get(variable):
            raise ValueError(f"the environment variable {variable} is not set")
        return cog.Secret(environ[variable])
    if not text.startswith("@"):
        raise ValueError(f"write -i {field.name}=@FILE, or -i {field.name} for {variable} from the environment")
    return cog.Secret(_read(text[1:]))


def _read(name: str) -> str:
    try:
        return files.local(name).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8; where the input takes a path, write it without @") from error


def describe(field: InputField, folder: bool = False) -> str:
    """What a value of the field must be: `a whole number from 1 to 6000`. `folder`: it may be a folder too."""
    if field.choices:
        return " or ".join(str(choice) for choice in field.choices)
    match field.type.primitive:
        case PrimitiveType.PATH:
            return "@FILE, a folder or a URL" if folder else "@FILE or a URL"
        case PrimitiveType.SECRET:
            return "@FILE, or from the environment"
        case PrimitiveType.BOOL:
            return "true or false"
        case PrimitiveType.INTEGER:
            return "a whole number" + _limits(field.ge, field.le)
        case PrimitiveType.FLOAT:
            return "a number" + _limits(field.ge, field.le)
    return "text" + _limits(field.min_length, field.max_length, " characters")


def _limits(low: float | None, high: float | None, unit: str = "") -> str:
    if low is None and high is None:
        return ""
    if low is None:
        return f" of at most {high:g}{unit}" if unit else f" up to {high:.10g}"
    if high is None:
        return f" of at least {low:.10g}{unit}"
    return f" {'of' if unit else 'from'} {low:.10g} to {high:.10g}{unit}"


def help_text(command: Command, signature: PredictorInfo) -> str:
    """The command, and each input with its type, limits, default and description."""
    usage = f"""\
usage: {command.program} -i NAME=VALUE [-i NAME=VALUE …] [-o FILE]

{command.summary}

  -i NAME=VALUE     an input; NAME=@FILE takes a file, or the text in it
  -o FILE           what to write: {command.output}
  -h, --help        this text

inputs:"""
    lines = [usage]
    for field in signature.inputs.values():
        optional = field.type.repetition is Repetition.OPTIONAL
        kind = describe(field, field.name in command.folders)
        if field.type.primitive is PrimitiveType.SECRET:
            kind += f": {field.name}=@FILE, or {field.name} alone for ${field.name.upper()}"
        if field.default is not None:
            default = str(field.default).lower() if isinstance(field.default, bool) else field.default
            kind += f"; {default} if not given"
        elif not optional:
            kind += "; required"
        if field.deprecated:
            kind += "; an old name"
        lines.append(f"  {field.name}: {kind}")
        if field.description:
            lines.append(textwrap.fill(field.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def say(text: str) -> None:
    """Prints. That nobody reads any more, as after `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _say_no_more()


def _say_no_more() -> None:
    """Python flushes what is left at its end, and would complain (the signal module's note on SIGPIPE)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(command: Command, work: Callable[[], None]) -> int:
    """Does the work and returns the exit status: 0, 1 after an error whose text is printed, 130 after Ctrl-C, 141 where
    nobody reads the output any more. What no user can mend is printed with the way there.

    All temporary files that the work makes lie in one folder, which is removed at the end, also when the terminal
    closes or the process is asked to end (status 128 + signal).
    """
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, _exit)
    hush()
    try:
        with disk.work_folder(f"{Path(command.program).name}-") as folder:
            os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
            try:
                work()
            finally:
                tempfile.tempdir = None
    except KeyboardInterrupt:
        print(f"\n{command.program}: interrupted; no output was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _say_no_more()
        print(f"{command.program}: nobody reads its output any more; nothing was kept", file=sys.stderr)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        print(f"{command.program}: {error}", file=sys.stderr)
        return 1
    return 0


def hush() -> None:
    """To be called before transformers is imported: it hints at packages then, which nobody here lacks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the import of large packages: what they make stays, so Python looks for no garbage in it, neither now,
    which takes a tenth of the time, nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def fetch(values: Mapping[str, object]) -> dict[str, object]:
    """The values with every address downloaded to a temporary file, and every folder packed into one.

    Raises ValueError that begins with the input's name where one cannot be had.
    """
    return {name: files.fetched(name, value) if isinstance(value, Path) else value for name, value in values.items()}


def move_into_place(made: Mapping[Path, bytes | Path]) -> None:
    """Puts a file, or bytes, at each path: whoever looks sees an old file or a whole new one, and the old ones where
    one cannot be written. Raises DiskError then."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in made}
    try:
        for path, content in made.items():
            with disk.writing(path), partials[path].open("wb") as target:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, target, 1 << 20)
                else:
                    target.write(content)
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink()


def move_out(made: Path) -> Path:
    """Takes a file out of the work folder, which is about to go, to beside it: what cost an hour must not be lost to a
    full disk elsewhere. Returns where it is now."""
    kept = Path(tempfile.gettempdir()).with_name(made.name)
    kept = kept.with_name(f"{kept.stem}-{os.getpid()}{kept.suffix}")
    made.replace(kept)
    return kept
