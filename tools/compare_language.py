"""Draws docstrings and messages at random and prints them at two commits, for a reader to judge.

    python tools/compare_language.py BEFORE AFTER [--docstrings 30] [--messages 10] [--seed 20]

Both are paired by their order in a file; renamed files are followed. Files with a definition more or less are left out.
"""

import argparse
import ast
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MESSAGE_WORDS = 5
"""A string constant with at least this many words counts as a message."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--docstrings", type=int, default=30)
    parser.add_argument("--messages", type=int, default=10)
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    pairs: dict[str, list[tuple[str, str, str]]] = {"docstrings": [], "messages": []}
    for old_path, path in paired_files(options.before, options.after):
        old, new = (
            ast.parse(git("show", f"{commit}:{file}"))
            for commit, file in ((options.before, old_path), (options.after, path))
        )
        for kind, texts in (("docstrings", docstrings), ("messages", messages)):
            olds, news = list(texts(old)), list(texts(new))
            if len(olds) == len(news):
                pairs[kind] += [
                    (f"{path}: {name}", text, changed) for (_, text), (name, changed) in zip(olds, news, strict=True)
                ]
    generator = random.Random(options.seed)
    for kind, count in (("docstrings", options.docstrings), ("messages", options.messages)):
        print(f"# {count} of {len(pairs[kind])} {kind}\n")
        for place, text, changed in generator.sample(pairs[kind], count):
            print(f"## {place}\n- {text}\n+ {changed}\n")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def paired_files(before: str, after: str) -> Iterator[tuple[str, str]]:
    """Paths of each module of `src` at both commits."""
    listing = git("diff", "--find-renames=30%", "--name-status", before, after, "--", "src/**/*.py")
    for line in listing.splitlines():
        status, *paths = line.split("\t")
        if status[0] in "MR":
            yield paths[0], paths[-1]


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and docstring of the module, and of each class and function that has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield "module" if isinstance(node, ast.Module) else node.name, text


def messages(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Line and text of each string that is neither a docstring nor a name."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            text = ast.unparse(node)
            if id(node) not in bare and len(text.split()) >= MESSAGE_WORDS:
                yield str(node.lineno), text


if __name__ == "__main__":
    main()
