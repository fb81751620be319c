"""Signals at any moment of a start, and a terminal that goes away: the run ends like one that was left alone."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from tests.recipes.conftest import HERE, Workplace

from simpletuner.base.errors import Stopped
from simpletuner.runs.status import status_of

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
IMPORTS = (
    "simpletuner.cli.main",
    "simpletuner.cli.train",
    "pydantic",
    "torch",
    "numpy",
    "numpy._core._multiarray_umath",
    "datetime",
    "safetensors",
    "PIL.Image",
    "diffusers",
    "transformers",
    "torch._dynamo",
)
PLACES = ("scan:1", "text:2", "latents:2", "step:1")
"""In the order in which a start comes by; each attempt goes on from the one before."""


def interrupted(workplace: Workplace, name: str, moment: str) -> subprocess.CompletedProcess[str]:
    """An attempt that gets the signal `name` at `moment`."""
    workplace.write()
    ended = workplace.apart(sys.executable, str(HERE / "interrupted.py"), name, moment)
    assert "Traceback" not in ended.stderr
    return ended


@pytest.mark.slow
@pytest.mark.parametrize(("turn", "module"), list(enumerate(IMPORTS)))
def test_a_signal_while_a_library_is_imported_stops_the_run(workplace: Workplace, turn: int, module: str) -> None:
    ended = interrupted(workplace, SIGNALS[turn % len(SIGNALS)], f"import:{module}")
    assert ended.returncode == Stopped.exit_code, ended.stderr
    assert ended.stderr.endswith("stopped before the training began. Run the same command again to resume.\n")
    assert workplace.events("step") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signalled_again_and_again_a_run_ends_the_same(
    workplace: Workplace, same_bytes: Callable[[Workplace], None]
) -> None:
    for turn, moment in enumerate(PLACES):
        ended = interrupted(workplace, SIGNALS[turn % len(SIGNALS)], moment)
        assert ended.returncode == Stopped.exit_code, f"{moment}: {ended.stderr}"
        assert ended.stderr.endswith("Run the same command again to resume.\n"), moment
    # While the last but one checkpoint is written: the last step is finished, and what comes after it.
    done = interrupted(workplace, "SIGTERM", "checkpoint:2")
    assert done.returncode == 0, done.stderr
    same_bytes(workplace)


@pytest.mark.slow
def test_telling_never_ends_the_work(workplace: Workplace, same_bytes: Callable[[Workplace], None]) -> None:
    """`PYTHONIOENCODING=ascii simpletuner train | head -0`, with a full disk below standard error and `run.log`."""
    workplace.write()
    workplace.run().create()
    workplace.run().log.symlink_to("/dev/full")
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "simpletuner", "train"],
        cwd=workplace.folder,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=writer,
        stderr=full,
        timeout=240,
        check=False,
    )
    os.close(writer)
    os.close(full)
    assert ended.returncode == 0
    assert status_of(workplace.run()).state == "done"
    assert ["run.log cannot be written" in event["text"] for event in workplace.events("notice")].count(True) == 1
    same_bytes(workplace)
