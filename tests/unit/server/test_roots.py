"""Which paths count."""

from pathlib import Path

import pytest

from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots


def test_paths_are_shown_as_they_can_be_given_back(workspace: Path, tmp_path: Path) -> None:
    other = (tmp_path / "other").resolve()
    other.mkdir()
    roots = Roots(workspace, (other,))
    for path in (workspace, workspace / "a" / "b.png", other, other / "c.png"):
        assert roots.resolve(roots.display_path(path)) == path
    assert roots.display_path(workspace / "a") == "a"
    assert roots.display_path(other / "a") == str(other / "a")


def test_a_name_that_begins_like_a_root_is_outside(workspace: Path) -> None:
    with pytest.raises(Fault) as told:
        Roots(workspace).resolve(f"{workspace}-other/a.png")
    assert told.value.status == 403


def test_names_of_bytes_that_are_no_text_can_be_sent(workspace: Path) -> None:
    shown = Roots(workspace).display_path(workspace / "a\udcff.png")
    assert shown.encode() == b"a\\udcff.png"
