"""The note of a run: kept through a resume, never lost to another writer, and no way to read another file."""

from pathlib import Path

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.note import LONGEST_NOTE, NoteChanged, read_note, write_note
from simpletuner.runs.status import status_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


def test_a_note_is_kept_and_an_empty_one_removed(run: RunDirectory) -> None:
    write_note(run, " rate too high\n")
    assert run.note.read_text() == "rate too high\n"
    run.sweep()  # as a resume does
    assert status_of(run).note == "rate too high"
    write_note(run, "")
    assert not run.note.exists()


def test_of_two_writers_the_second_is_told(run: RunDirectory) -> None:
    write_note(run, "first", expected_note="")
    with pytest.raises(NoteChanged, match="changed meanwhile, to: first"):
        write_note(run, "second", expected_note="")
    assert read_note(run) == "first"
    write_note(run, "first", expected_note="")  # the same words are no conflict
    write_note(run, "both", expected_note="first")
    assert read_note(run) == "both"


def test_a_note_has_a_length(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match=f"at most {LONGEST_NOTE}"):
        write_note(run, "x" * (LONGEST_NOTE + 1))


def test_a_link_in_its_place_is_not_followed(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hidden")
    run.note.symlink_to(tmp_path / "secret")
    assert read_note(run) == ""
    write_note(run, "mine")
    assert (tmp_path / "secret").read_text() == "hidden"
