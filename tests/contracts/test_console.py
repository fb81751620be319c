"""One module writes to standard output and standard error, and asks at the terminal."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "simpletuner"
STREAMS = {"stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"}
CALLS = {"print", "input"}


def uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and line of whatever reads or writes the standard streams by itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS:
            yield node.id, node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "sys" and node.attr in STREAMS:
                yield f"sys.{node.attr}", node.lineno
            if node.value.id == "tqdm" and node.attr == "write":
                yield "tqdm.write", node.lineno


def test_uses_are_found() -> None:
    code = "print(1)\nreport = print\nsys.stderr.write('x')\ntqdm.write('x')\nfile.write('x')\ninput()"
    assert sorted(uses(ast.parse(code))) == [
        ("input", 6), ("print", 1), ("print", 2), ("sys.stderr", 3), ("tqdm.write", 4),
    ]  # fmt: skip


def test_one_module_writes_to_the_console() -> None:
    found = {
        f"{name}:{line}: {what}"
        for path in sorted(SOURCE.rglob("*.py"))
        for name in [path.relative_to(SOURCE).as_posix()]
        for what, line in uses(ast.parse(path.read_text(encoding="utf-8")))
        if name != "base/console.py"
    }
    assert not found, f"use base.console in place of: {', '.join(sorted(found))}"
