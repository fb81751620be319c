"""What a run says of its steps, on a terminal and off one."""

import os
import pty
import sys
import termios

import pytest

from simpletuner.runs.events import StepEvent
from simpletuner.train.report import Reporter, TrainingBar

STEP = StepEvent(
    step=999, epoch=0, loss=0.5123, lr=1e-4, grad_norm=1.0, seconds=1.64, memory_gib=2.0,
    images_per_s=0.6098, tflop_per_s=212.3, mfu=0.2146, hfu=0.31,
)  # fmt: skip


def shown_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bar after one step, as it stands last."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = TrainingBar(Reporter(), done=998, total=2000)
        bar.step(STEP)
        bar.close()
        shown = b""
        while not shown.endswith(b"\n"):  # what is written arrives in pieces
            shown += screen.read(4096)
    last = shown.decode().rstrip().rsplit("\r", 1)[-1]
    assert len(last) <= columns
    return last


def test_the_rates_fit_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ", average loss 0.5123, 0.61 img/s, 212 TFLOP/s (21%)" in shown_on_a_terminal(80, monkeypatch)


def test_a_wider_terminal_has_the_learning_rate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ", average loss 0.5123, lr 1.00e-04, 0.61 img/s, 212 TFLOP/s (21%)" in shown_on_a_terminal(100, monkeypatch)


def test_the_loss_is_an_average_that_says_so_and_goes_on_over_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingBar(Reporter(), done=998, total=999).step(STEP)
    assert "step 999/999, loss 0.5123 (average of 1 step), " in capsys.readouterr().out
    TrainingBar(Reporter(), done=998, total=999, losses=[0.1, 0.2]).step(STEP)
    assert f"loss {(0.1 + 0.2 + 0.5123) / 3:.4f} (average of 3 steps), " in capsys.readouterr().out
    TrainingBar(Reporter(), done=998, total=999, losses=[9.0, 9.0, *[0.1] * 19]).step(STEP)
    assert f"loss {(19 * 0.1 + 0.5123) / 20:.4f} (average of 20 steps), " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "rates"),
    [
        (STEP, "1.64 s/step, 0.61 img/s, 212 TFLOP/s (21%), "),
        (STEP.model_copy(update={"mfu": None}), "1.64 s/step, 0.61 img/s, 212 TFLOP/s, "),
    ],
    ids=["known card", "unknown card"],
)
def test_without_a_terminal_a_line_tells_the_rates(
    step: StepEvent, rates: str, capsys: pytest.CaptureFixture[str]
) -> None:
    TrainingBar(Reporter(), done=998, total=999).step(step)
    assert rates in capsys.readouterr().out
