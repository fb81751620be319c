import getpass
import json
import platform
import socket
from pathlib import Path

import pytest

from simpletuner import __version__
from simpletuner.base.errors import ConfigError
from simpletuner.cli import env


def test_the_report_names_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.run(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["simpletuner"] == __version__
    assert report["python"] == platform.python_version()
    assert all(name in report for name in env.PACKAGES)
    assert any(name.startswith("device") for name in report)


def test_as_text_it_is_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.run([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(env.report())


def test_it_names_no_person_and_no_place() -> None:
    text = " ".join(env.report().values())
    private = {str(Path.home()), str(Path.cwd()), socket.gethostname(), getpass.getuser()} - {"root", "/"}
    assert [name for name in private if name in text] == []


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--jsn: no such flag\. Did you mean --json"):
        env.run(["--jsn"])
