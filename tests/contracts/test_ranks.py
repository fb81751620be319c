"""Ranks exchange tensors and JSON bytes, nothing pickled; one process needs none of what several do."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "simpletuner"

PICKLING_CALLS = re.compile(
    r"^_?(all_gather|gather|broadcast|scatter|send|recv|reduce|all_to_all)_object(_list)?$"
    r"|^_object_to_tensor$|^_tensor_to_object$"
)
"""Collectives that unpickle what another rank sent, and their parts."""

PICKLING_MODULES = (
    "pickle",
    "cloudpickle",
    "dill",
    "multiprocessing",
    "torch.multiprocessing",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic",
    "torch.distributed.rpc",
)
"""Modules that pickle what they send to another process or write for it."""

ONE_PROCESS = "train.loop", "train.job", "train.validate", "flux2.load", "data.batch", "cli.train"


def pickled(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What in `tree` pickles objects between processes, by name, and its line."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            names = [module, *(alias.name for alias in node.names), *(f"{module}.{a.name}" for a in node.names)]
        for name in names:
            module = next((m for m in PICKLING_MODULES if name == m or name.startswith(f"{m}.")), None)
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            if PICKLING_CALLS.match(name) or (is_import and module is not None):
                yield name, node.lineno
    for node in ast.walk(tree):  # torch.distributed.rpc as an expression
        if isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLING_MODULES:
            yield ast.unparse(node), node.lineno


def test_what_pickles_is_found() -> None:
    text = """
import torch.distributed as dist
import pickle
from torch.distributed import all_gather_object as gather
from torch.distributed import checkpoint
dist.broadcast_object_list([1])
torch.distributed.rpc.init_rpc("one")
dist.all_gather(parts, part)
gathered_object = read_object(value)
"""
    assert sorted(pickled(ast.parse(text)), key=lambda place: place[1]) == [
        ("pickle", 3),
        ("all_gather_object", 4),
        ("torch.distributed.checkpoint", 5),
        ("broadcast_object_list", 6),
        ("torch.distributed.rpc", 7),
    ]


def test_nothing_pickled_travels_between_ranks() -> None:
    found = [
        f"{path.relative_to(SOURCE).as_posix()}:{line}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for name, line in pickled(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"send tensors, or JSON as bytes: {', '.join(found)}"


def after(code: str) -> set[str]:
    """Modules of torch.distributed that `code` imports in a fresh Python, beyond those that `import torch` does, and
    `joined` if the process is in a process group then.
    """
    script = f"""
import sys
import torch
before = set(sys.modules)
{code}
print(*sorted(name for name in set(sys.modules) - before if name.startswith("torch.distributed")))
print("joined" if torch.distributed.is_initialized() else "")
"""
    answer = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split())


def test_one_process_imports_nothing_of_torch_distributed() -> None:
    rooms = ", ".join(f"simpletuner.{room}" for room in ONE_PROCESS)
    assert after(f"import {rooms}") == set()


@pytest.mark.slow
def test_a_run_of_one_process_joins_no_process_group(example_folder: Path, own_folder: Path) -> None:
    """What it imports of torch.distributed says nothing: transformers and diffusers import much of it."""
    for name in ("datasets", "cache"):
        shutil.copytree(example_folder / name, own_folder / name)
    flags = ["--example", "tiny-lora", "--max_train_steps=1", "--validation_disable", "--train_batch_size=1"]
    run = f"from simpletuner.cli.main import main; assert main({['train', *flags]!r}) == 0"
    found = after(f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {run}")
    assert "joined" not in found
