"""The inputs of a Cog function, read as `cog build` reads them: from the source, which is never run.

`cog build` makes a model's inputs from the text of `train.py` and `predict.py`, and where it cannot follow the text it
often says nothing: a default is lost and the input becomes required, a limit is dropped, a description arrives mangled.
`read` refuses every such text, then has Cog's own package (`cog._inspector`, of the version that the requirements pin)
read what is left of the file: the signature, what it imports from cog and typing, its constants and output classes.
So the command line knows the inputs in a moment, without loading a model's libraries.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cog import _inspector
from cog._adt import PredictorInfo, Repetition

IMPORTS_KEPT = frozenset({"__future__", "cog", "typing", "typing_extensions"})
KEYWORDS = frozenset(
    {"default", "description", "choices", "ge", "le", "min_length", "max_length", "regex", "accept", "deprecated"}
)
MAY_NAME_A_CONSTANT = frozenset({"default", "description", "choices"})


def read(source: Path, name: str) -> PredictorInfo:
    """The inputs and output of function `name`, or of the class `name` with a `run` or `predict`, in `source`.

    Raises ValueError that lists everything in the signature that `cog build` would misread or refuse.
    """
    text = source.read_text(encoding="utf-8")
    module = ast.parse(text, filename=str(source))
    constants = dict(_constants(module))
    target, function = _find(module, name)
    _refuse(source, name, list(_faults(text.encode().splitlines(keepends=True), function, constants)))

    defaults = _defaults(function)
    names: dict[str, object] = {"__name__": source.stem}
    try:
        exec(compile(_signature_alone(module, target, function, constants), str(source), "exec"), names)
        owner = names[name]
        is_class = isinstance(owner, type)
        cut = getattr(owner, function.name) if is_class else owner
        info = _inspector._create_predictor_info(source.stem, name, cut, function.name, is_class)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"{source.name}: cog build cannot read {name}: {error}") from error
    _refuse(source, name, list(_none_faults(info, defaults)))
    return info


def _refuse(source: Path, name: str, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"{source.name}: cog build would misread {name}:\n" + "\n".join(faults))


def _find(module: ast.Module, name: str) -> tuple[ast.FunctionDef | ast.ClassDef, ast.FunctionDef]:
    """The top-level function or class `name`, and the function whose signature counts."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node, node
        if isinstance(node, ast.ClassDef) and node.name == name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in ("run", "predict"):
                    return node, method
    raise ValueError(f"no function {name}, and no class {name} with a run or predict, at the top level")


def _constants(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_literal(value, tuple_too=True):
                yield name, value


def _faults(lines: Sequence[bytes], function: ast.FunctionDef, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    arguments = function.args
    if arguments.vararg or arguments.kwarg or arguments.posonlyargs or arguments.kwonlyargs:
        yield "  the inputs must be plain parameters: no *args, **kwargs, / or *"
    if function.returns is None:
        yield "  the return type is missing"
    for name, default in _defaults(function).items():
        if default is None or _is_literal(default):
            continue
        if not (isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "Input"):
            yield f"  {name}: the default must be a literal or Input(…), imported from cog by that name"
            continue
        if default.args:
            yield f"  {name}: Input(…) takes keywords only; the first argument is lost"
        for keyword in default.keywords:
            for fault in _keyword_faults(lines, keyword, constants):
                yield f"  {name}: {keyword.arg or '**'}: {fault}"


def _keyword_faults(lines: Sequence[bytes], keyword: ast.keyword, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    if keyword.arg not in KEYWORDS:
        yield f"unknown; Input(…) takes {', '.join(sorted(KEYWORDS))}"
        return
    value = keyword.value
    if isinstance(value, ast.Name):
        if keyword.arg not in MAY_NAME_A_CONSTANT:
            yield "a name here is dropped: write the literal"
        elif value.id not in constants:
            yield f"{value.id} is not a literal constant at the top level of the same file"
        return
    if keyword.arg == "choices" and not (isinstance(value, ast.List) and _is_literal(value)):
        yield "write a literal list"
    elif not _is_literal(value):
        yield "only a literal is understood"
    elif keyword.arg == "description" and not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        yield "write one string"
    else:
        written = _written(lines, keyword)
        if written.partition("=")[2].strip() != _written(lines, value):
            yield "the brackets around it make it unreadable"
        for node in ast.walk(value):
            if not isinstance(node, ast.Constant):
                continue
            literal = _written(lines, node)
            # Cog takes what stands between the quotes: no escapes, no prefixes, no joining of neighbours.
            if isinstance(node.value, str) and node.value not in (literal[1:-1], literal[3:-3]):
                yield "write one plain string, without escapes, prefixes or a second string after it"
            if not isinstance(node.value, str) and "_" in literal and keyword.arg != "default":
                yield "write the number without underscores"


def _written(lines: Sequence[bytes], node: ast.keyword | ast.expr) -> str:
    """The text of a node; what `ast.get_source_segment` gives, which looks for the file's lines anew each time and took
    a third of a second over `train.py`."""
    last = node.end_lineno or node.lineno
    text = b"".join(lines[node.lineno - 1 : last])
    cut = len(lines[last - 1]) - (node.end_col_offset or 0)
    return text[node.col_offset : len(text) - cut].decode()


def _none_faults(info: PredictorInfo, defaults: Mapping[str, ast.expr | None]) -> Iterator[str]:
    for field in info.inputs.values():
        optional = field.type.repetition in (Repetition.OPTIONAL, Repetition.OPTIONAL_REPEATED)
        if optional and not _is_none(defaults[field.name]):
            yield f"  {field.name}: it is Optional: write Input(default=None, …)"
        if not optional and _is_none(defaults[field.name]):
            yield f"  {field.name}: a default of None leaves it required: annotate it Optional[…]"


def _signature_alone(
    module: ast.Module, target: ast.stmt, function: ast.FunctionDef, constants: Mapping[str, ast.expr]
) -> ast.Module:
    """The module with nothing in it but what the signature needs, and the function without its body."""
    function.body, function.decorator_list = [ast.Pass()], []
    if isinstance(target, ast.ClassDef):
        target.body, target.bases, target.decorator_list = [function], [], []

    def is_needed(node: ast.stmt) -> bool:
        match node:
            case ast.ImportFrom(module=imported):
                return imported in IMPORTS_KEPT
            case ast.Assign(targets=[ast.Name(id=constant)]):
                return constant in constants
            case ast.ClassDef(bases=[ast.Name(id="BaseModel")]):
                return True
        return node is target

    return ast.fix_missing_locations(ast.Module(body=[n for n in module.body if is_needed(n)], type_ignores=[]))


def _defaults(function: ast.FunctionDef) -> dict[str, ast.expr | None]:
    """Each parameter but self, with the expression after its = sign."""
    names = [argument.arg for argument in function.args.args]
    missing: list[ast.expr | None] = [None] * (len(names) - len(function.args.defaults))
    pairs = dict(zip(names, missing + list(function.args.defaults), strict=True))
    pairs.pop("self", None)
    return pairs


def _is_none(default: ast.expr | None) -> bool:
    """Whether the default is None: `= None` or `= Input(default=None)`."""
    if isinstance(default, ast.Call):
        default = next((keyword.value for keyword in default.keywords if keyword.arg == "default"), None)
    return isinstance(default, ast.Constant) and default.value is None


def _is_literal(node: ast.expr, tuple_too: bool = False) -> bool:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return False
    return isinstance(value, str | int | float | list | dict | None) or (tuple_too and isinstance(value, tuple))
