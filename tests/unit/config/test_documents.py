from pathlib import Path

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.config.documents import read_document

COMMENT_HINT = 'JSON has no comments: remove this one, or write it as a key, "//": "…".'


@pytest.fixture
def problem_in(tmp_path: Path):
    def problem(text: str | bytes, name: str = "a.json") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as caught:
            read_document(path, name)
        return str(caught.value)

    return problem


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ('{\n  "a": 1,\n}', None, "comma"),
        ("[1, 2,]", None, "comma"),
        ("{'a': 1}", "line 1, column 2", "Use double quotes."),
        (
            '{\n  // note\n  "a": 1}',
            "line 2, column 3",
            COMMENT_HINT,
        ),
        (
            '{"a": 1 # note\n}',
            "line 1, column 9",
            COMMENT_HINT,
        ),
        ('{"a": True}', "line 1, column 7", "JSON writes true, false and null in lowercase."),
        ('{"a": 1\n "b": 2}', "line 2, column 2", "A comma is missing before this."),
        ('{"a": 1', "line 1, column 8", "It ends too early: a closing bracket is missing."),
        ("", "line 1, column 1", "The file is empty."),
        ('{"a": 1e}', None, ""),
    ],
    ids=repr,
)
def test_a_syntax_error_says_where_and_what(problem_in, text: str, place: str | None, hint: str) -> None:
    problem = problem_in(text)
    assert problem.startswith("a.json, line ")
    assert place is None or problem.startswith(f"a.json, {place}: not valid JSON")
    assert hint in problem


def test_toml_says_where_too(problem_in) -> None:
    assert "a.toml: not valid TOML" in problem_in("a = \nb = 1", "a.toml")
    assert "line 1" in problem_in("a = \nb = 1", "a.toml")


def test_a_key_given_twice_is_no_last_word(problem_in) -> None:
    assert problem_in('{"a": 1, "b": 2, "a": 3}') == "a.json: a is given twice. Keep one of them."
    assert problem_in('[{"a": {"x": 1, "x": 2}}]') == "a.json: x is given twice. Keep one of them."


def test_a_key_that_begins_with_slashes_is_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"//": "why", "//a": "because", "a": 1, "//": "twice", "b": [{"//": 2, "c": 3}]}')
    assert read_document(path, "a.json") == {"a": 1, "b": [{"c": 3}]}


def test_other_faults_of_a_file(problem_in, tmp_path: Path) -> None:
    assert problem_in(b'{"a": "\xff"}') == "a.json: byte 7 is not UTF-8. Save it as UTF-8."
    with pytest.raises(ConfigError, match="this is a folder: expected a file"):
        read_document(tmp_path, "here")
    with pytest.raises(ConfigError, match="no such file"):
        read_document(tmp_path / "nope", "nope")


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_document(path, "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "9" * 5000), ("a.json", "[" * 100_000), ("a.toml", "a = " + "9" * 5000)]
)
def test_what_no_config_holds_is_a_problem_and_no_bug(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="too large a value for a config"):
        read_document(tmp_path / name, name)
