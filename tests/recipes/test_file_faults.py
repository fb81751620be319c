"""Files and folders of a run that cannot be read or written, or are of another kind: each ends with the exit code of
its stage, its name and a remedy, or does not matter. Never with a traceback.
"""

import fcntl
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.file_faults import (
    Fault,
    a_file,
    a_folder,
    broken_link,
    forbidden,
    foreign,
    link_loop,
    not_entered,
    read_only,
    rights_of_a_user,
)
from tests.recipes.conftest import Workplace

from simpletuner.base.errors import AccessError, CheckpointError, ConfigError, DataError, DiskError
from simpletuner.base.storage import LocalStorage
from simpletuner.cli.main import main
from simpletuner.data import index

pytestmark = pytest.mark.slow

CONFIG, DATA, MODEL, CHECKPOINT, DISK = (
    error.exit_code for error in (ConfigError, DataError, AccessError, CheckpointError, DiskError)
)
UNREADABLE: Sequence[Fault] = (forbidden, foreign)
ANOTHER_KIND: Sequence[Fault] = (a_folder, broken_link, link_loop)
CLOSED: Sequence[Fault] = (forbidden, foreign, not_entered)
NO_FOLDER: Sequence[Fault] = (a_file, broken_link, link_loop)

RUN, STEP = "output/run", "output/run/checkpoints/step-000003"
OF_A_MODEL = ("--pretrained_model_name_or_path=model", "--output_dir=output/new")
STARTED_FROM = ("--init_lora=start.safetensors", "--output_dir=output/new")

ENDS: Sequence[tuple[int, Sequence[Fault], Sequence[str], Sequence[str]]] = (
    (DATA, CLOSED, ("datasets/pictures",), ()),
    (CONFIG, NO_FOLDER, ("datasets/pictures",), ()),
    (DISK, [*CLOSED, *NO_FOLDER], ("cache/vae", "cache/text", "cache/vae/??", "cache/text/??"), ()),
    (DISK, [*UNREADABLE, a_folder, link_loop], ("cache/vae/*/*.safetensors", "cache/text/*/*.safetensors"), ()),
    (MODEL, [*CLOSED, *NO_FOLDER], ("model", "model/transformer", "model/vae", "model/tokenizer"), OF_A_MODEL),
    (MODEL, [*UNREADABLE, *ANOTHER_KIND], ("model/*/config.json", "model/*/*.safetensors"), OF_A_MODEL),
    (MODEL, [*UNREADABLE, *ANOTHER_KIND], ("model/tokenizer/tokenizer.json",), OF_A_MODEL),
    (CHECKPOINT, UNREADABLE, ("start.safetensors",), STARTED_FROM),
    (CONFIG, ANOTHER_KIND, ("start.safetensors",), STARTED_FROM),
    (CHECKPOINT, CLOSED, (STEP,), ()),
    (CHECKPOINT, UNREADABLE, (f"{STEP}/manifest.json", f"{STEP}/state.json", f"{STEP}/*.safetensors"), ()),
    (CONFIG, [*CLOSED, *NO_FOLDER], ("output",), ()),
    (CONFIG, NO_FOLDER, (RUN, f"{RUN}/control", f"{RUN}/checkpoints"), ()),
    (DISK, [read_only], (RUN, f"{RUN}/checkpoints"), ()),
    (DISK, [a_folder], (f"{RUN}/config.json", f"{RUN}/datasets.json", f"{RUN}/lock"), ()),
    (DISK, [*UNREADABLE, read_only, *ANOTHER_KIND], (f"{RUN}/events.jsonl",), ()),
    (DISK, [*UNREADABLE, read_only], (f"{RUN}/lock",), ()),
)
"""Exit code; faults; the paths that have them; flags."""

GOES_ON: Sequence[tuple[Sequence[Fault], Sequence[str]]] = (
    ([read_only], ("cache/vae", "cache/text", "datasets/pictures", "config")),
    ([*UNREADABLE, *ANOTHER_KIND], ("cache/vae/scan-*.json", "cache/vae/verified.json", "cache/text/verified.json")),
    ([*UNREADABLE, *ANOTHER_KIND], (f"{RUN}/checkpoints/step-000001/state.json",)),
)
"""What is read, and need not be written; what spares work; what lies behind the newest checkpoint."""


def cases(rows: Sequence[tuple[Sequence[Fault], Sequence[str]]]) -> list[tuple[str, Fault]]:
    return [(pattern, fault) for faults, patterns in rows for pattern in patterns for fault in faults]


@pytest.fixture(scope="module")
def trained(shared_folder: Path, uninterrupted: Workplace, tiny_folder: Path) -> Path:
    """A working folder with a run of three steps, full caches, its LoRA, and the folder of a model. One for all
    workers.
    """
    folder = shared_folder / "trained"
    with (shared_folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.copytree(uninterrupted.folder, folder)
            shutil.copy(Workplace(folder).run().lora, folder / "start.safetensors")
            shutil.copytree(tiny_folder, folder / "model")
            for cache in ("vae", "text"):
                (folder / "cache" / cache / "verified.json").write_text("{}")
    return folder


def broken(trained: Path, place: Workplace, pattern: str, fault: Fault) -> str:
    """Copy `trained`, put `fault` on what `pattern` finds first, and return its path in the working folder."""
    shutil.copytree(trained, place.folder, dirs_exist_ok=True)
    place.write()
    # The index is named after the path of its images.
    (scanned,) = place.folder.glob("cache/vae/scan-*.json")
    scanned.rename(scanned.with_name(index._index_name(LocalStorage(place.folder / "datasets/pictures"))))
    found = sorted(place.folder.glob(pattern))
    path = found[0] if found else place.folder / pattern
    fault(path)
    return str(path.relative_to(place.folder))


@pytest.mark.parametrize(
    ("code", "pattern", "fault", "flags"),
    [(code, *case, flags) for code, faults, patterns, flags in ENDS for case in cases([(faults, patterns)])],
    ids=lambda value: value.__name__ if callable(value) else "" if isinstance(value, tuple) else str(value),
)
def test_a_file_fault_ends_with_the_code_of_its_stage(
    trained: Path,
    own_folder: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    pattern: str,
    fault: Fault,
    flags: Sequence[str],
) -> None:
    place = Workplace(own_folder)
    name = broken(trained, place, pattern, fault)
    with rights_of_a_user():
        found = main(["train", "--max_train_steps=4", *flags])
    text = capsys.readouterr().err
    assert found == code, text
    assert name.removeprefix("model/") in text
    assert "Traceback" not in text
    assert "This is a bug" not in text
    assert text.count(". ") or "expected" in text, "no remedy"


@pytest.mark.parametrize(
    ("pattern", "fault"), cases(GOES_ON), ids=lambda value: value.__name__ if callable(value) else str(value)
)
def test_a_file_fault_that_does_not_matter_ends_no_run(
    trained: Path, own_folder: Path, capsys: pytest.CaptureFixture[str], pattern: str, fault: Fault
) -> None:
    place = Workplace(own_folder)
    broken(trained, place, pattern, fault)
    with rights_of_a_user():
        assert main(["train", "--max_train_steps=4"]) == 0, capsys.readouterr().err
    assert place.run().lora.is_file()
