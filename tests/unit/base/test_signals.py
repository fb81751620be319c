"""Requests to end: recorded, never raised, and obeyed at once only when they are repeated on purpose."""

import signal
import subprocess
import sys
from itertools import chain

import pytest

from simpletuner.base import signals
from simpletuner.base.signals import EXIT_SIGNALS, STOP_FROM_OTHER_MACHINE, STOPPED, WARNING_SIGNALS, DeferredSignals

ALL = (*EXIT_SIGNALS, *WARNING_SIGNALS, STOP_FROM_OTHER_MACHINE)


def ended_with(code: str) -> int:
    """Exit code of a fresh Python after `code`, inside which signals are deferred."""
    start = "import signal; from simpletuner.base import signals; signals.deferred_signals.__enter__(); "
    return subprocess.run([sys.executable, "-P", "-c", start + code], check=False).returncode


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_recorded_and_raises_nothing(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in ALL]
    with DeferredSignals() as deferred:
        assert deferred.first is None
        signal.raise_signal(number)
        assert deferred.first == number
    assert [signal.getsignal(each) for each in ALL] == before


def test_what_warns_is_never_the_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_S", 0.0)
    with DeferredSignals() as deferred:
        for number in (signal.SIGINT, *WARNING_SIGNALS, *WARNING_SIGNALS):
            signal.raise_signal(number)
        assert deferred.first == signal.SIGINT


def test_what_another_machine_was_asked_is_never_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_S", 0.0)
    with DeferredSignals() as deferred:
        for number in (STOP_FROM_OTHER_MACHINE, STOP_FROM_OTHER_MACHINE, signal.SIGTERM):
            signal.raise_signal(number)
        assert deferred.first == signal.SIGTERM


def test_a_repeat_within_a_second_counts_as_one() -> None:
    with DeferredSignals() as deferred:
        for number in chain(EXIT_SIGNALS, EXIT_SIGNALS):
            signal.raise_signal(number)
        assert deferred.first == signal.SIGINT


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_later_one_leaves_at_once(second: str) -> None:
    code = f"signals.REPEAT_S = 0; signal.raise_signal(signal.SIGUSR1); signal.raise_signal(signal.{second})"
    assert ended_with(f"{code}; print('still there')") == STOPPED


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """`nohup simpletuner train`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with DeferredSignals() as deferred:
            signal.raise_signal(signal.SIGHUP)
            assert deferred.first is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_inside_another_it_is_the_same_one() -> None:
    with DeferredSignals() as deferred:
        with deferred:
            signal.raise_signal(signal.SIGTERM)
        assert deferred.first == signal.SIGTERM
    assert deferred.first is None


def test_given_up_the_signal_does_what_it_did_before() -> None:
    assert ended_with("signal.raise_signal(signal.SIGTERM); signals.deferred_signals.give_up()") == -signal.SIGTERM
    with DeferredSignals() as deferred:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            deferred.give_up()


def test_what_comes_before_the_first_signal_can_be_recorded_is_little() -> None:
    """All that the command imports until then is interrupted as Python does it, with a traceback."""
    code = (
        "import sys; import simpletuner.base.signals; print(*sorted(n for n in sys.modules if n.startswith('simple')))"
    )
    loaded = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["simpletuner", "simpletuner.base", "simpletuner.base.signals"]
