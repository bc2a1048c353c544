"""The tables of inputs in README.md and docs/: `script/python -m script.docs` writes them anew.

A table stands between two comments, and is made from the signature that the first one names:

    <!-- inputs: train.py train -->
    <!-- /inputs -->

Names after the function choose inputs and their order, and leave out the column of allowed values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cog._adt import InputField, PrimitiveType, Repetition

from script import cli, signature

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"(<!-- inputs: (\S+) (\S+)((?: \w+)*) -->\n).*?(<!-- /inputs -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The page with every table of inputs as the signatures have it. Raises KeyError for a name that is no input."""

    def table(found: re.Match[str]) -> str:
        head, file, function, names, end = found.groups()
        inputs = signature.read(ROOT / file, function).inputs
        return head + "".join(f"| {' | '.join(row)} |\n" for row in _rows(inputs, names.split())) + end

    return TABLE.sub(table, text)


def _rows(inputs: Mapping[str, InputField], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield ("input", "default", "meaning") if names else ("input", "allowed", "default", "meaning")
    yield ("---",) * (3 if names else 4)
    for name in names or inputs:
        field = inputs[name]
        allowed = () if names else (_cell(_allowed(field)),)
        yield (f"`{name}`", *allowed, _cell(_default(field)), _cell(field.description or ""))


def _allowed(field: InputField) -> str:
    """What a value may be, without how a command line gives a file or a secret."""
    kinds = {PrimitiveType.PATH: "a file or an https address", PrimitiveType.SECRET: "a secret"}
    return kinds.get(field.type.primitive) or cli.describe(field)


def _default(field: InputField) -> str:
    if field.default is None:
        return "empty" if field.type.repetition is Repetition.OPTIONAL else "required"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (made := with_tables(text)) != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: its tables are new")


if __name__ == "__main__":
    main()
