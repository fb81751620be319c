import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.base.parts import locked_part, remove_abandoned_parts

PATTERN = ".*.part"


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_living_process_writes_stays_and_is_gone_once_it_is_killed_and_swept(
    tmp_path: Path, is_folder: bool
) -> None:
    code = f"""
import sys
from pathlib import Path
from simpletuner.base.parts import locked_part
with locked_part(Path({str(tmp_path / "base")!r}), is_folder={is_folder}) as part:
    (part / "file" if {is_folder} else part).write_bytes(b"half")
    print(part.name, flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        part = tmp_path / process.stdout.readline().strip()
        remove_abandoned_parts(tmp_path, PATTERN)
        assert part.exists()
        process.send_signal(signal.SIGKILL)
    assert part.exists()
    remove_abandoned_parts(tmp_path, PATTERN)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_renamed_or_removed(tmp_path: Path) -> None:
    with locked_part(tmp_path / "file") as part:
        part.write_bytes(b"whole")
        os.replace(part, tmp_path / "file")
    with pytest.raises(ValueError, match="odd"), locked_part(tmp_path / "other") as part:
        raise ValueError("odd")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_part_that_took_the_name_after_the_rename_is_not_removed(tmp_path: Path) -> None:
    with locked_part(tmp_path / "file") as part:
        os.replace(part, tmp_path / "file")
        part.write_bytes(b"of another process with this number")
    assert part.read_bytes() == b"of another process with this number"


def test_sweeping_leaves_links_and_other_names_and_never_waits(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / ".link.1.part").symlink_to(tmp_path / "target")
    (tmp_path / "film.part").touch()
    os.mkfifo(tmp_path / ".pipe.1.part")
    began = time.monotonic()
    remove_abandoned_parts(tmp_path, PATTERN)
    remove_abandoned_parts(tmp_path / "none", PATTERN)
    assert time.monotonic() - began < 5
    assert {path.name for path in tmp_path.iterdir()} == {"target", ".link.1.part", "film.part"}
