"""Files that a command cannot read, or that are of another kind: found, remedy, the stage's exit code, no traceback.

What needs a run is in recipes/test_file_faults.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.file_faults import (
    Fault,
    a_file,
    a_folder,
    a_pipe,
    broken_link,
    forbidden,
    foreign,
    link_loop,
    not_entered,
    rights_of_a_user,
)

from simpletuner.cli.main import main

Answer = tuple[int, str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with a configuration, a prompt library, routes, images, and a run that is new."""
    for folder in ("config", "datasets/images", "output/run/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "config/config.json").write_text(
        json.dumps({"model_flavour": "tiny", "output_dir": "output/run", "tread_config": "routes.json"})
    )
    images = {"id": "images", "type": "local", "instance_data_dir": "datasets/images", "cache_dir_vae": "cache"}
    (tmp_path / "config/multidatabackend.json").write_text(json.dumps([images]))
    (tmp_path / "config/user_prompt_library.json").write_text('{"sea": "the sea"}')
    routes = [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]
    (tmp_path / "routes.json").write_text(json.dumps({"routes": routes}))
    (tmp_path / "output/run/config.json").write_text("{}")
    (tmp_path / "output/run/events.jsonl").touch()
    return tmp_path


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def ask(*arguments: str) -> Answer:
        with rights_of_a_user():
            code = main(arguments)
        return code, capsys.readouterr().err

    return ask


@pytest.mark.usefixtures("place")
def test_the_working_folder_itself_is_right(answer: Callable[..., Answer]) -> None:
    assert answer("config", "check")[0] == 0


DOCUMENTS = ("config/config.json", "config/multidatabackend.json", "config/user_prompt_library.json", "routes.json")
FILE_FAULTS: dict[Fault, str] = {
    forbidden: "cannot be read (Permission denied). Give the user",
    foreign: "cannot be read (Permission denied). Give the user",
    a_folder: "this is a folder: expected a file",
    broken_link: "a link to /nonexistent/target, which does not exist. Correct the link.",
    link_loop: "cannot be read (Too many levels of symbolic links)",
    a_pipe: "this is a pipe, a socket or a device: expected a file",
}


@pytest.mark.parametrize("fault", FILE_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_cannot_be_read(answer: Callable[..., Answer], place: Path, name: str, fault: Fault) -> None:
    fault(place / name)
    code, text = answer("config", "check")
    assert code == 2
    assert name in text
    assert FILE_FAULTS[fault] in text


@pytest.mark.parametrize("fault", [forbidden, foreign, not_entered, a_file, broken_link, link_loop])
@pytest.mark.parametrize("name", ["config", "datasets", "datasets/images"])
def test_a_folder_on_the_way_that_cannot_be_entered(
    answer: Callable[..., Answer], place: Path, name: str, fault: Fault
) -> None:
    fault(place / name)
    code, text = answer("dataset", "scan")
    assert code == (3 if name == "datasets/images" and fault in (forbidden, foreign, not_entered) else 2)
    assert "datasets/images" in text or "config/config.json" in text
    assert "Traceback" not in text


COMMANDS = (
    ("run", "show", "output/run"),
    ("run", "stop", "output/run"),
    ("checkpoint", "list", "output/run"),
    ("checkpoint", "verify", "output/run"),
    ("sample", "--run=output/run", "--prompt=x"),
)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("fault", [forbidden, foreign, not_entered, a_file, broken_link, link_loop])
def test_the_folder_of_a_run_that_cannot_be_entered(
    answer: Callable[..., Answer], place: Path, arguments: tuple[str, ...], fault: Fault
) -> None:
    fault(place / "output/run")
    code, text = answer(*arguments)
    assert code in (2, 6, 7)
    assert "output/run" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("fault", [forbidden, foreign, not_entered, a_file, broken_link, link_loop])
def test_a_run_that_cannot_be_entered_hides_no_other(
    place: Path, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "output/other").mkdir()
    (place / "output/other/events.jsonl").touch()
    fault(place / "output/run")
    with rights_of_a_user():
        assert main(["run", "list"]) == 0
    assert "output/other" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("--help",), ("config", "show"), ("config", "check"), ("run", "list")], ids=" ".join
)
def test_what_only_reads_works_where_nothing_may_be_written(
    answer: Callable[..., Answer], place: Path, arguments: tuple[str, ...]
) -> None:
    for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    assert answer(*arguments)[0] == 0


@pytest.mark.parametrize("arguments", [("run", "list"), ("config", "check"), ("train",)], ids=" ".join)
def test_a_working_folder_that_has_been_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["--help"]) == 0
    assert main(arguments) == 7
    assert capsys.readouterr().err == "the working folder has been removed. Change to an existing folder: cd FOLDER.\n"
