"""The project's language: the field's words in prose, nouns in identifiers, American spelling in both."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "simpletuner"

PHRASES = {
    r"what learns|what does not learn|what is trained": "trainable parameters, frozen base",
    r"the machine's memory": "host memory, RAM",
    r"locked memory": "pinned memory",
    r"round(s|ed|ing)? by chance": "stochastic rounding",
    r"keeps? notes?": "stores",
    r"\bartefacts?\b": "compiled graph, file",
    r"sheet of contacts|pictures? of the set": "contact sheet; training image",
    r"\bgo(es)? on (from|where|with)\b": "resume, continue",
    r"\b(is|are|was|were) (told|brought)\b": "the verb for what happens: receives, loads",
    r"\bits like\b|\bfrom its like\b": "another one of the same kind",
    r"whose turn|when its turn comes": "a sentence with a subject",
    r"as (they|those|he|she) sees? (it|them)": "who uses it, and for what",
    r"\bhands? out\b|\banswers? with\b": "returns, yields",
    r"\banew\b": "again, from scratch",
    r"copy ahead|copies ahead": "prefetch",
}
"""Regular expression → what to write. From the glossary in CONTRIBUTING.md."""
SPELLING = (
    r"\w*(optimis|quantis|colour|normalis|materialis|tokenis|neighbour|centre|learnt|labelled|artefact|honour|favour"
    r"|behaviour|initialis|regularis|licence|grey|vectoris|serialis|synchronis|recognis|organis|summaris|minimis)\w*"
)
INHERITED = {
    "is_regularisation_data", "vae_cache_scan_behaviour", "lora_initialisation_style", "centre", "licence", "optimiser"
}  # fmt: skip
"""Keys that others' files and configurations spell so."""
GENERIC = {"found", "place", "there", "own", "kept", "made", "told", "said", "seen", "asked", "brought", "here", "what"}
"""Names that say nothing of what they hold."""
JSON_FIELDS = {
    "Problem.found", "ProblemAnswer.found", "MachineCheck.found", "FileReport.what", "UndoRequest.what",
    "NoteEdit.seen", "JobProgress.what", "PhasePlan.what", "MemoryPart.place", "Shortage.place", "Shortage.there",
    "Remedy.place",
}  # fmt: skip
"""Fields whose names are keys of answers, events and `--json`."""
SHORT_LIFE = 3
"""Lines over which a generic local name may live."""


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each comment, docstring and paragraph."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        is_glossary = path.name == "CONTRIBUTING.md"  # its tables quote what not to write
        yield from (row for row in enumerate(text.splitlines(), 1) if not (is_glossary and row[1].startswith("|")))
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def pages() -> list[Path]:
    """Python of the package, and the pages. The log keeps its dated entries as they were written."""
    markdown = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(SOURCE.rglob("*.py")) + [path for path in markdown if path.name not in ("log.md", "CHANGELOG.md")]


def generic_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each generic parameter, attribute, function, and local name that lives long."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in GENERIC:
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name in GENERIC:
                yield node.lineno, node.name
            if isinstance(node, ast.ClassDef):
                fields = [statement.target for statement in node.body if isinstance(statement, ast.AnnAssign)]
                yield from (
                    (field.lineno, field.id)
                    for field in fields
                    if isinstance(field, ast.Name)
                    and field.id in GENERIC
                    and f"{node.name}.{field.id}" not in JSON_FIELDS
                )
            else:
                yield from _long_lived(node)


def _long_lived(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    lines: dict[str, list[int]] = {}
    stored: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in GENERIC:
            lines.setdefault(node.id, []).append(node.lineno)
            if isinstance(node.ctx, ast.Store):
                stored.add(node.id)
    for name in sorted(stored):
        if max(lines[name]) - min(lines[name]) >= SHORT_LIFE:
            yield min(lines[name]), name


def test_the_checks_find_what_they_look_for() -> None:
    long = "def load():\n    found = 1\n    a = 2\n    b = 3\n    return found\n"
    assert list(generic_names(ast.parse(long))) == [(2, "found")]
    assert list(generic_names(ast.parse("def load():\n    found = 1\n    return found\n"))) == []
    assert sorted(generic_names(ast.parse("def load(told): ...\nclass A:\n    own: int\n"))) == [
        (1, "told"),
        (3, "own"),
    ]
    assert re.search("|".join(PHRASES), "What is trained goes on from there", re.IGNORECASE)
    assert re.fullmatch(SPELLING, "optimisers")
    assert not re.fullmatch(SPELLING, "optimizers")


def test_prose_has_no_banned_phrase() -> None:
    banned = re.compile("|".join(PHRASES), re.IGNORECASE)
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {hit[0]!r}"
        for path in pages()
        for line, text in prose(path)
        for hit in banned.finditer(text)
    ]
    assert not hits, f"{len(hits)} phrases; the table PHRASES says what to write:\n" + "\n".join(hits)


def test_no_name_is_generic() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, name in generic_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not hits, f"{len(hits)} names say nothing of what they hold; give each its noun:\n" + "\n".join(hits)


def test_spelling_is_american() -> None:
    words = re.compile(rf"\b{SPELLING}\b", re.IGNORECASE)
    hits = [
        f"{path.relative_to(ROOT)}: {hit[0]}"
        for path in pages()
        for hit in words.finditer(path.read_text(encoding="utf-8"))
        if hit[0] not in INHERITED and path.name not in ("vocabulary.py", "CONTRIBUTING.md")
    ]
    assert not hits, "\n".join(hits)
