import os
import signal
import threading
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, Stopped
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.process import Requests, ask, interruptible, stop_if_asked


def test_a_request_is_taken_once_and_a_stop_stays(tmp_path: Path) -> None:
    with Requests(tmp_path) as requests, requests.between_steps():
        assert not requests.take("save")
        (tmp_path / "save").touch()
        (tmp_path / "stop").touch()
        assert requests.take("save")
        assert not requests.take("save")
        assert requests.take("stop")
        assert requests.take("stop")
        assert list(tmp_path.iterdir()) == []


def test_requests_of_an_earlier_attempt_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    with Requests(tmp_path) as requests:
        assert not requests.take("stop")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_between_steps_is_a_request_to_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    with Requests(tmp_path) as requests, requests.between_steps():
        signal.raise_signal(number)
        requests.poll()
        stop_if_asked()
        assert requests.take("stop")
    assert "Stopping after this step; a second SIGINT (Ctrl-C) or SIGTERM exits at once" in capfd.readouterr().err


def test_a_signal_before_the_training_stops_at_the_next_safe_point(tmp_path: Path) -> None:
    with Requests(tmp_path) as requests:
        stop_if_asked()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="same command again"):
            requests.poll()
        with pytest.raises(Stopped, match="same command again"):
            stop_if_asked()


def test_a_download_is_left_behind_when_a_signal_arrives(tmp_path: Path) -> None:
    is_left = threading.Event()

    def download() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        is_left.wait()

    with Requests(tmp_path), pytest.raises(Stopped):
        interruptible(download)
    is_left.set()


def test_a_download_that_ends_is_the_download() -> None:
    def fail() -> None:
        raise TimeoutError("of the server")

    assert interruptible(lambda: 3) == 3
    with pytest.raises(TimeoutError, match="of the server"):
        interruptible(fail)


def test_a_stop_file_before_the_training_stops_at_the_next_progress(tmp_path: Path) -> None:
    with Requests(tmp_path) as requests:
        requests.poll()
        (tmp_path / "stop").touch()
        with pytest.raises(Stopped):
            requests.poll()


def test_the_handlers_of_before_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Requests(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_asking_needs_a_process_that_holds_the_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    with pytest.raises(CheckpointError, match="no process trains here"):
        ask(run, "save")
    with run.lock(), Requests(run.control) as requests, requests.between_steps():
        ask(run, "save")
        assert requests.take("save")
