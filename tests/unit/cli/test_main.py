import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner import __version__
from simpletuner.base.errors import DataError
from simpletuner.cli import env, main


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, what was printed, and what was complained about."""

    def of(*arguments: str) -> tuple[int, str, str]:
        code = main.main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return of


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_command(answer: Callable[..., tuple[int, str, str]], word: str) -> None:
    code, out, _ = answer(word)
    assert code == 0
    assert all(f"\n  {name} " in out for name in main.COMMANDS)


def test_nothing_typed_is_a_mistake_with_help(answer: Callable[..., tuple[int, str, str]]) -> None:
    assert answer()[0] == 2


def test_the_version(answer: Callable[..., tuple[int, str, str]]) -> None:
    assert answer("--version") == (0, f"simpletuner {__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "simpletuner trian: no such command. Did you mean simpletuner train?\n"),
        ("--verison", "simpletuner --verison: no such command. Did you mean simpletuner --version?\n"),
        ("zebra", "simpletuner zebra: no such command. `simpletuner --help` lists the commands.\n"),
    ],
)
def test_another_word_is_a_mistake(answer: Callable[..., tuple[int, str, str]], word: str, message: str) -> None:
    assert answer(word) == (2, "", message)


@pytest.mark.parametrize("word", main.COMMANDS)
def test_every_command_is_there(word: str) -> None:
    path = Path(main.__file__).with_name(f"{word}.py")
    assert "\ndef run(arguments: list[str]) -> int:" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [None, *main.ALLOCATOR_SETTINGS])
def test_segments_grow_unless_the_user_has_set_the_allocator(
    answer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    for name in main.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    assert answer("train", "--help")[0] == 0
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if given is None else {given: "max_split_size_mb:512"}
    assert {name: os.environ[name] for name in main.ALLOCATOR_SETTINGS if name in os.environ} == expected


def test_a_users_error_gives_its_code_and_no_traceback(
    answer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: list[str]) -> int:
        raise DataError.of("nothing here", "pictures")

    monkeypatch.setattr(env, "run", fail)
    assert answer("env") == (3, "", "nothing here: expected pictures.\n")


def test_a_bug_keeps_its_traceback(
    answer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: list[str]) -> int:
        raise ValueError("oh no")

    monkeypatch.setattr(env, "run", fail)
    code, _, complaint = answer("env")
    assert code == 1
    assert complaint.startswith("Traceback")
    assert "ValueError: oh no" in complaint
    assert "simpletuner env" in complaint.splitlines()[-1]


def test_an_interruption_is_no_bug(
    answer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", stop)
    assert answer("env") == (130, "", "Interrupted.\n")


def test_python_dash_m_is_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-m", "simpletuner", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"simpletuner {__version__}\n"


def test_the_installed_command_is_the_same() -> None:
    settings = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = settings["project"]["scripts"]["simpletuner"].partition(":")
    code = f"import sys; from {module} import {function}; sys.argv[1:] = ['trian']; sys.exit({function}())"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.partition(":")[0]) == (2, "simpletuner trian")


def test_an_interruption_that_a_library_hid_is_no_bug(
    answer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy does so while it is imported."""

    def stop(_: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("a long message") from error

    monkeypatch.setattr(env, "run", stop)
    assert answer("env") == (130, "", "Interrupted.\n")


def ended_writing_to(stdout: int, *arguments: str) -> tuple[int, str]:
    """Exit code and complaints of a command."""
    command = [sys.executable, "-P", "-m", "simpletuner", *arguments]
    ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return ended.returncode, ended.stderr


def test_output_that_nobody_reads_is_no_bug() -> None:
    """`simpletuner --help | head -0`: no traceback, and the code of a command that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    assert ended_writing_to(writer, "--help") == (141, "")
    os.close(writer)


def test_output_that_cannot_be_written_is_told() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    code, complaint = ended_writing_to(full, "--help")
    os.close(full)
    assert code == 7
    assert complaint == "cannot write to standard output: No space left on device. Redirect it elsewhere.\n"
