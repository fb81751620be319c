"""Runs that meet a full disk: exit code 7 with the way out, and once there is room the bits of a run that never did."""

from collections.abc import Callable, Iterator

import pytest
from tests.file_faults import files_of_at_most
from tests.recipes.conftest import Workplace
from tests.small_disk import CannotMountError, SmallDisk, half_written, restarted_until_it_fits, small_disk

from simpletuner.base.errors import DataError, DiskError
from simpletuner.cli.main import main

pytestmark = pytest.mark.slow

SameBytes = Callable[[Workplace], None]
WITHOUT_RESERVE = "--disk_low_threshold=0B"


@pytest.fixture
def disk_at(request: pytest.FixtureRequest, own_folder: Workplace) -> Iterator[SmallDisk]:
    """A small disk at the folder that the test names."""
    try:
        with small_disk(own_folder / request.param, kib=64) as disk:
            yield disk
    except CannotMountError as error:
        pytest.skip(f"no disk can be mounted here: {error}")


def answers(place: Workplace, capsys: pytest.CaptureFixture[str]) -> Callable[[], int]:
    """`train`, which says on a full disk what is to be done, and never that it is a bug."""
    place.write()

    def train() -> int:
        code = main(["train", WITHOUT_RESERVE])
        text = capsys.readouterr().err
        assert "Traceback" not in text
        if code == DiskError.exit_code:
            assert "No space left on device" in text or "are free for" in text, text
            assert "Free some space" in text, text
        return code

    return train


@pytest.mark.timeout(1200)  # some ten attempts, each of which loads the model
@pytest.mark.parametrize(("disk_at", "kib", "more_kib"), [("output", 64, 800), ("cache", 64, 48)], indirect=["disk_at"])
def test_a_run_on_a_disk_that_fills_up_again_and_again_has_the_bits_of_one_that_had_room(
    workplace: Workplace,
    disk_at: SmallDisk,
    kib: int,
    more_kib: int,
    same_bytes: SameBytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = restarted_until_it_fits(answers(workplace, capsys), disk_at, kib=kib, more_kib=more_kib)
    assert codes[-1] == 0
    assert codes.count(DiskError.exit_code) >= 3, codes
    same_bytes(workplace)
    assert half_written(workplace.folder) == []


@pytest.mark.parametrize("size", [2_000, 20_000, 150_000, 400_000, 700_000])
def test_a_file_that_cannot_grow_ends_the_run_and_leaves_no_half(
    workplace: Workplace, size: int, same_bytes: SameBytes, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.write()
    with files_of_at_most(size):
        code = main(["train"])
    text = capsys.readouterr().err
    assert code == DiskError.exit_code, text
    assert "File too large" in text
    assert "Free some space" in text
    assert half_written(workplace.folder) == []
    assert workplace.train() == 0
    same_bytes(workplace)


def test_the_error_that_ends_a_run_is_told_although_its_event_does_not_fit(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.datasets[0]["minimum_image_size"] = 4000
    assert workplace.train() == DataError.exit_code
    events = workplace.run().events
    *before_the_error, error, _end = events.read_bytes().splitlines(keepends=True)
    assert b'"type": "error"' in error
    while events.stat().st_size < workplace.run().config.stat().st_size:  # which is written again, and must fit
        assert main(["train"]) == DataError.exit_code
    # The lines of the next attempt are as long, but for a few digits.
    room = events.stat().st_size + sum(map(len, before_the_error)) + len(error) // 2
    capsys.readouterr()
    with files_of_at_most(room):
        assert main(["train"]) == DataError.exit_code
    assert "minimum_image_size" in capsys.readouterr().err
    assert events.read_bytes().endswith(b"\n")
