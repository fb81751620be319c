"""One name per thing: no two modules of the package define the same public name."""

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "simpletuner"

MODULE_QUALIFIED = {"main", "run", "router", "FORMS", "USAGE"}
"""Entry points, the routers of the page, what commands take and how their help begins: used only with their module's
name."""

Places = dict[str, set[str]]
"""`file:line` of each definition, by name."""


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def assigned_names(statement: ast.stmt) -> list[str]:
    """Constants and type aliases that a statement defines. A type variable is neither."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("TypeVar", "ParamSpec"):
        return []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Assign):
        targets = [
            element
            for target in statement.targets
            for element in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    else:
        targets = []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements of a module, those in its `if` and `try` blocks included."""
    found: list[ast.stmt] = []
    waiting = list(tree.body)
    while waiting:
        statement = waiting.pop(0)
        found.append(statement)
        if isinstance(statement, ast.If | ast.Try):
            waiting += [inner for inner in ast.iter_child_nodes(statement) if isinstance(inner, ast.stmt)]
    return found


def repeated_names(sources: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Names that more than one module defines, with their places.

    A function counts only if some module imports that name by itself (`from simpletuner.x import f`). One that is
    always called as `module.name` has its noun in front of it.
    """
    defined: Places = defaultdict(set)
    functions: Places = defaultdict(set)
    imported_alone: set[str] = set()
    for module, tree in sources.items():
        for statement in module_level(tree):
            place = f"{module}:{statement.lineno}"
            if isinstance(statement, ast.ClassDef):
                defined[statement.name].add(place)
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[statement.name].add(place)
            for name in assigned_names(statement):
                defined[name].add(place)
        imported_alone |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "simpletuner"
            for alias in node.names
            if f"{node.module}.{alias.name}" not in sources
        }
    for name in functions:
        if name in imported_alone or name in defined:
            defined[name] |= functions[name]
    return {
        name: sorted(places)
        for name, places in sorted(defined.items())
        if not name.startswith("_")
        and name not in MODULE_QUALIFIED
        and len({place.partition(":")[0] for place in places}) > 1
    }


def parsed(**modules: str) -> dict[str, ast.Module]:
    return {f"simpletuner.{name}": ast.parse(text) for name, text in modules.items()}


def test_a_repeated_class_constant_or_alias_is_found() -> None:
    repeated = repeated_names(
        parsed(
            a="class Entry: ...\nLIMIT, OTHER = 1, 2\nRow = dict[str, int]",
            b="class Entry: ...\nLIMIT: int = 3\nif True:\n    Row = list[int]\n_Row = 1",
            c="_Row = 2\nrouter = 1\nT = TypeVar('T')",
            d="router = 2\nT = TypeVar('T')",
        )
    )
    assert repeated == {
        "Entry": ["simpletuner.a:1", "simpletuner.b:1"],
        "LIMIT": ["simpletuner.a:2", "simpletuner.b:2"],
        "Row": ["simpletuner.a:3", "simpletuner.b:4"],
    }


def test_a_repeated_function_counts_where_it_is_imported_alone() -> None:
    two = {"a": "def load(): ...", "b": "def load(): ..."}
    assert repeated_names(parsed(**two, c="from simpletuner import a\na.load()")) == {}
    expected = {"load": ["simpletuner.a:1", "simpletuner.b:1"]}
    assert repeated_names(parsed(**two, c="from simpletuner.a import load")) == expected
    # A module of that name is no function of it.
    assert repeated_names(parsed(**two, load="x = 1", c="from simpletuner import load")) == {}


def test_no_public_name_is_defined_twice() -> None:
    sources = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    repeated = repeated_names(sources)
    report = "\n".join(f"  {name}: {', '.join(places)}" for name, places in repeated.items())
    assert not repeated, f"{len(repeated)} names are defined in more than one module; rename all but one:\n{report}"
