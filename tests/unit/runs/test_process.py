import os
import signal
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, Stopped
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.process import Requests, ask


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


def test_a_signal_between_steps_is_a_request_to_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Requests(tmp_path) as requests, requests.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.take("stop")
    assert "once more to leave at once" in capfd.readouterr().err


def test_a_signal_before_the_training_stops_there(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="same command again"), Requests(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)


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
