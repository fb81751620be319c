"""Data between the caches and the loss has types, and the interface of a denoiser is defined once."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "simpletuner"

CACHE_TO_LOSS = (
    "data/**/*.py",
    "flow/*.py",
    *(
        f"flux2/{name}.py"
        for name in ("denoiser", "generate", "text", "text_stream", "tread", "tokens", "rotary", "transformer")
    ),
    *(f"train/{name}.py" for name in ("batches", "step", "rollout", "validate", "loop")),
)
"""Every file that a sample passes on its way from the cache to the loss. A pattern may match nothing."""

JSON_DOCUMENTS = {
    ("data/index.py", "IndexRow"),
    ("data/manifest.py", "summary"),
}
"""File and end of the name of each definition that holds a JSON document: a row of the scan index on disk, and what
`dataset scan --json` prints."""


def untyped_dicts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name of the enclosing definition, and line, of each `dict[str, Any]` (or `Mapping`, or a bare `dict`)."""
    for statement in tree.body:
        yield from _untyped_dicts(statement, _defined_name(statement))


def _untyped_dicts(node: ast.AST, owner: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Subscript) and _is_untyped(node):
        yield owner, node.lineno
    for annotation in _annotations(node):
        if isinstance(annotation, ast.Name) and annotation.id == "dict":
            yield owner, annotation.lineno
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _untyped_dicts(child, child.name if named else owner)


def _is_untyped(node: ast.Subscript) -> bool:
    mapping = node.value.id if isinstance(node.value, ast.Name) else ""
    if mapping not in ("dict", "Mapping", "MutableMapping") or not isinstance(node.slice, ast.Tuple):
        return False
    value = node.slice.elts[-1]
    return isinstance(value, ast.Name) and value.id in ("Any", "object")


def _annotations(node: ast.AST) -> list[ast.expr | None]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.returns]
    if isinstance(node, ast.arg | ast.AnnAssign):
        return [node.annotation]
    return []


def _defined_name(statement: ast.stmt) -> str:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id
    return ""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_untyped_dicts_are_found() -> None:
    text = """
Row = dict[str, Any]
class Index:
    def summary(self) -> dict[str, Any]:
        found: dict = {}
        known: dict[str, int] = {}
        return found
def load(stored: Mapping[str, object]) -> list[dict[str, Any]]: ...
"""
    expected = [("Row", 2), ("summary", 4), ("summary", 5), ("load", 8), ("load", 8)]
    assert sorted(untyped_dicts(ast.parse(text)), key=lambda place: place[1]) == expected


def test_no_untyped_dict_between_the_caches_and_the_loss() -> None:
    files = sorted({path for pattern in CACHE_TO_LOSS for path in SOURCE.glob(pattern)})
    assert len(files) > 20, "the patterns no longer match the package"
    found = [
        f"{name}:{line} (in {owner or 'the module'})"
        for path in files
        for name in [path.relative_to(SOURCE).as_posix()]
        for owner, line in untyped_dicts(parsed(path))
        if not any(name == file and owner.endswith(end) for file, end in JSON_DOCUMENTS)
    ]
    assert not found, f"give these a dataclass: {', '.join(found)}"


def test_a_denoiser_has_one_interface() -> None:
    found = [
        f"{path.relative_to(SOURCE).as_posix()}:{statement.lineno}"
        for path in sorted(SOURCE.rglob("*.py"))
        for statement in ast.walk(parsed(path))
        if isinstance(statement, ast.stmt) and _defined_name(statement) == "Denoise"
    ]
    assert len(found) == 1, f"Denoise is defined in {', '.join(found) or 'no module'}: expected one definition"
