"""The rules that a machine can hold: doors, light rooms, no attic, and code that knows what it holds."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "simpletuner"
ATTICS = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
HEAVY = ("torch", "numpy", "diffusers", "transformers", "safetensors", "huggingface_hub", "fsspec", "peft", "PIL")
EVERYTHING = ("Exception", "BaseException")
MODEL_LIBRARIES = ("diffusers", "transformers", "peft", "wandb", "tensorboard")


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every source file, with a place to look."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield name, node


def imported_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh Python has imported after `code`."""
    report = f"import sys; {code}; print(*sorted(set({names!r}) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-P", "-c", report], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


def test_doors_open_one_way() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-P", "-c", code, "--no-logo", "--no-cache"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_list_of_rooms_is_exhaustive() -> None:
    """Otherwise a new folder would be no error, and the doors would say nothing about it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    assert [contract["exhaustive"] for contract in contracts if contract["type"] == "layers"] == [True]


@pytest.mark.parametrize(
    "code",
    [
        "import simpletuner.base.errors, simpletuner.base.files, simpletuner.base.draws, simpletuner.base.storage",
        "import simpletuner.config.load, simpletuner.config.form",
        "import simpletuner.runs.layout, simpletuner.runs.events",
        "import simpletuner.cli.main",
    ],
)
def test_what_answers_at_once_imports_nothing_heavy(code: str) -> None:
    assert imported_by(code, HEAVY) == []


def test_a_warm_start_imports_no_model_library() -> None:
    """diffusers alone takes seconds, and a run whose caches are filled uses none of them."""
    rooms = "train.loop", "train.job", "train.validate", "flux2.load", "data.batch", "cli.train"
    assert imported_by(f"import {', '.join(f'simpletuner.{room}' for room in rooms)}", MODEL_LIBRARIES) == []


def test_code_knows_what_it_holds() -> None:
    guesses = [
        f"{name}:{node.lineno}"
        for name, node in nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2))
    ]
    assert guesses == []


def test_everything_is_swallowed_in_two_places_only() -> None:
    """The command's outermost line, and the fence around trackers. Raising again is not swallowing."""
    swallows_all = {
        name
        for name, node in nodes()
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in EVERYTHING))
        and not isinstance(node.body[-1], ast.Raise)
    }
    assert swallows_all <= {"cli/main.py", "train/trackers.py"}


def test_every_file_says_what_is_in_it() -> None:
    silent = [name for name, node in nodes() if isinstance(node, ast.Module) and not ast.get_docstring(node)]
    assert silent == []


def test_there_is_no_attic() -> None:
    parts = {part.removesuffix(".py") for path in SOURCE.rglob("*") for part in path.relative_to(SOURCE).parts}
    assert not parts & ATTICS


def test_weight_files_are_written_and_read_in_one_place() -> None:
    """`memory/tensors.py`. The caches still read and write bytes in memory through the library itself."""
    importers = {
        name
        for name, node in nodes()
        if (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "safetensors")
        or (isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "safetensors" for alias in node.names))
    }
    assert importers <= {"memory/tensors.py", "data/cache/store.py"}
