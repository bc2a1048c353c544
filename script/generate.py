"""Draws from the command line: the Python behind script/generate."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from script import cli, signature

ROOT = Path(__file__).resolve().parent.parent
COMMAND = cli.Command(
    program="script/generate",
    summary="Draws pictures with a FLUX LoRA, as the model of cog.generate.yaml would, without Docker. extra_lora, and"
    " extra_lora_scale after it, may be given several times.",
    output="picture.webp",
)


def main(argv: Sequence[str]) -> int:
    first, more = split_extras(argv)
    inputs = signature.read(ROOT / "generate.py", "Predictor")
    values, output = cli.parse(COMMAND, inputs, first, os.environ)
    extras: list[tuple[str, str, float]] = []
    faults: list[str] = []
    for number, pairs in enumerate(more, 2):
        extra, wrong = cli.check(inputs, ["prompt=", *pairs], os.environ)
        faults += wrong
        if not wrong:
            extras.append((f"extra_lora {number}", str(extra["extra_lora"]), float(str(extra["extra_lora_scale"]))))
    suffix = output.suffix.removeprefix(".").lower()
    formats = [str(choice) for choice in inputs.inputs["output_format"].choices or []]
    if any(pair.startswith("output_format=") for pair in first):
        output = output.with_suffix(f".{values['output_format']}")
    elif suffix in formats:
        values["output_format"] = suffix
    else:
        faults.append(f"-o: {output.name} must end in .{' or .'.join(formats)}")
    if faults:
        print(f"{COMMAND.program}: nothing was started:", *faults, sep="\n  ", file=sys.stderr)
        return 2
    return cli.run(COMMAND, lambda: _draw(values, extras, output))


def _draw(values: dict[str, object], extras: list[tuple[str, str, float]], output: Path) -> None:
    with cli.importing():
        from generate import Predictor  # only now: it loads torch

    predictor = Predictor()
    predictor.setup()
    predictor.more = extras
    for number, drawn in enumerate(predictor.predict(**cli.fetch(values)), 1):  # type: ignore[arg-type]
        path = output if number == 1 else output.with_stem(f"{output.stem}-{number}")
        cli.move_into_place({path: Path(drawn)})
        print(path)


def split_extras(argv: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The arguments without every extra LoRA after the first, and these: `extra_lora=…`, `extra_lora_scale=…` each."""
    kept: list[str] = []
    extras: list[list[str]] = []
    for flag, pair in _inputs(argv):
        if pair is None:
            kept.append(flag)
        elif pair.startswith("extra_lora="):
            extras.append([pair])
        elif pair.startswith("extra_lora_scale=") and extras:
            extras[-1].append(pair)
        else:
            kept += [flag, pair]
    first = extras[0] if extras else []
    return [*kept, *(part for pair in first for part in ("-i", pair))], extras[1:]


def _inputs(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each argument, with what follows it where it is -i or --input."""
    rest = iter(argv)
    for argument in rest:
        if argument in ("-i", "--input"):
            yield "-i", next(rest, "")
        elif joined := re.fullmatch(r"(?:--input=|-i)(.+)", argument, re.DOTALL):
            yield "-i", joined[1]
        else:
            yield argument, None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
