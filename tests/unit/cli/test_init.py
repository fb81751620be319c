"""`simpletuner init`, by flags and by what is typed at its questions."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.base.errors import ConfigError, DataError
from simpletuner.cli.init import run
from simpletuner.cli.main import INTERRUPTED, main
from simpletuner.config.load import LoadedConfig, load

FILES = ("config.json", "multidatabackend.json", "user_prompt_library.json")


@pytest.fixture
def project(own_folder: Path) -> Path:
    """Six images of 160x160 in datasets/zorblat, five with a caption."""
    folder = own_folder / "datasets" / "zorblat"
    folder.mkdir(parents=True)
    for index in range(6):
        Image.new("RGB", (160, 160), (40 * index, 0, 0)).save(folder / f"{index}.png")
        if index:
            (folder / f"{index}.txt").write_text("a zorblat on grass" if index > 2 else "on grass")
    return own_folder


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Types these lines at a terminal, and then Ctrl-D."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def type_lines(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))

    return type_lines


def loaded(folder: Path, *arguments: str) -> LoadedConfig:
    return load(arguments, folder=folder, environ={})


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("config/**/*") if path.is_file())


def test_flags_alone_write_files_that_load(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--images=datasets/zorblat", "--card", "24 GB", "--recipe", "subject", "--yes"]) == 0
    found = loaded(project)
    config = found.config
    assert (config.model_flavour, config.base_model_precision, config.enable_group_offload) == (
        "dev",
        "int8-quanto",
        True,
    )
    assert (config.lora_rank, config.num_train_epochs, config.flow_schedule_auto_shift) == (16, 100, True)
    assert found.prompts["outdoors"].text.startswith("zorblat on a hillside")
    (image_set,) = found.datasets.train_sets
    assert (image_set.instance_prompt, image_set.caption_strategy) == ("zorblat", "textfile")
    assert not image_set.prepend_instance_prompt
    assert [notice for notice in found.notices if "license" not in notice] == []
    told = capsys.readouterr().out
    assert "6 images in datasets/zorblat, 5 with a caption; resolution 512." in told
    assert "Trains a rank-16 LoRA of FLUX.2-dev on 6 images, 600 steps (each image seen 100 times); needs " in told
    assert "are enlarged to reach `resolution`" in told


@pytest.mark.parametrize(
    ("model", "card", "license_terms"),
    [("klein-4b", "12 GB", "Apache-2.0"), ("klein-9b", "24 GB", "FLUX non-commercial license")],
)
def test_klein_loads_without_a_warning_fits_its_card_and_names_its_license(
    project: Path, capsys: pytest.CaptureFixture[str], model: str, card: str, license_terms: str
) -> None:
    assert run(["--images=datasets/zorblat", "--card", card, "--model", model, "--recipe=subject", "--yes"]) == 0
    found = loaded(project)
    assert [notice for notice in found.notices if "license" not in notice] == []
    assert (found.config.model_flavour, found.config.lora_rank) == (model, 32)
    told = capsys.readouterr().out
    assert f"Note: license of the model: {license_terms}" in told
    assert "does not fit" not in told
    needed, usable = re.findall(r"needs ([\d.]+) GiB of ([\d.]+) GiB usable VRAM", told)[0]
    assert float(needed) < float(usable)
    assert license_terms in (project / "config" / "config.json").read_text()


def test_where_dev_is_streamed_the_model_that_stays_on_the_card_is_offered(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--card=16", "--recipe=subject", "--yes"]) == 0
    (typed,) = re.findall(r"fits on this GPU without streaming .* add (--model \S+)\. Its", capsys.readouterr().out)
    assert run(["--card=16", "--recipe=subject", "--yes", *typed.split()]) == 0
    assert loaded(project).config.model_flavour == "klein-9b"
    assert not loaded(project).config.enable_group_offload
    assert "without streaming" not in capsys.readouterr().out


@pytest.mark.parametrize(("model", "card"), [("klein-4b", "none"), ("tiny-klein", "8"), ("klein-4b-distilled", "8")])
def test_a_model_that_is_not_for_training_there_is_refused(project: Path, model: str, card: str) -> None:
    with pytest.raises(ConfigError, match="--model"):
        run(["--card", card, "--model", model, "--recipe=subject", "--yes"])
    assert written(project) == []


def test_every_value_says_why(project: Path) -> None:
    assert run(["--card=none", "--recipe=subject", "--yes"]) == 0
    for name in FILES:
        assert "init" in name or '"//' in (project / "config" / name).read_text()
    text = json.loads((project / "config" / "config.json").read_text())
    unsaid = {key for key in text if not key.startswith("//") and f"// {key}" not in text}
    assert unsaid == {"model_family"}
    assert "Untested" not in text["//"]
    assert run(["--card=8", "--recipe=subject", "--yes"]) == 0
    assert "Untested on real weights" in json.loads((project / "config" / "config.json").read_text())["//"]


def test_three_questions_and_the_word(project: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    typed("nowhere", "", "none", "stile", "style", "ink wash", "y")
    assert run([]) == 0
    asked = capsys.readouterr()
    assert "1. Where are the images [datasets/zorblat]: " in asked.err
    assert "'nowhere' is not understood: expected a folder." in asked.out
    assert "'stile' is not understood: expected subject or style." in asked.out
    found = loaded(project)
    assert found.config.model_flavour == "tiny"
    assert found.prompts["large"].text == "a large ink wash on a green background, middle"
    assert found.config.validation_resolution == "128x128"
    (image_set,) = found.datasets.train_sets
    assert image_set.prepend_instance_prompt, "no caption says it"


def test_flags_answer_their_questions(project: Path, typed: Any) -> None:
    typed("", "", "y")
    assert run(["--card=8", "--recipe=style"]) == 0
    assert loaded(project).config.base_model_precision == "int4-quanto"


@pytest.mark.parametrize("lines", [(), ("datasets/zorblat",), ("", "24 GB", "subject"), ("", "none", "", "", "n")])
def test_an_end_of_input_or_a_no_writes_nothing(project: Path, typed: Any, lines: tuple[str, ...]) -> None:
    typed(*lines)
    if lines[-1:] == ("n",):
        assert run([]) == 0
    else:
        with pytest.raises(ConfigError, match="Nothing was written"):
            run([])
    assert written(project) == []


@pytest.mark.parametrize("answered", range(5))
def test_ctrl_c_at_any_question_writes_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, answered: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Impatient(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, _size: int | None = -1) -> str:
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(sys, "stdin", Impatient("".join(["\n", "none\n", "\n", "\n"][:answered])))
    assert main(["init"]) == INTERRUPTED
    assert "Interrupted." in capsys.readouterr().err
    assert written(project) == []


@pytest.mark.usefixtures("project")
def test_without_a_terminal_it_says_what_to_type() -> None:
    with pytest.raises(ConfigError) as caught:
        run([])
    assert "--images FOLDER, --card SIZE and --recipe NAME: not given" in str(caught.value)
    assert 'simpletuner init --images FOLDER --card "24 GB" --recipe subject --yes' in str(caught.value)


def test_what_is_there_is_replaced_only_if_told(project: Path, typed: Any) -> None:
    (project / "config").mkdir()
    (project / "config" / "config.json").write_text("{}")
    typed("", "none", "", "", "")
    assert run([]) == 0
    assert (project / "config" / "config.json").read_text() == "{}"
    assert written(project) == ["config.json"]
    typed("", "none", "", "", "y")
    assert run([]) == 0
    assert written(project) == sorted(FILES)
    assert loaded(project).config.model_flavour == "tiny"


def test_a_config_that_would_be_read_instead_is_named(project: Path) -> None:
    (project / "config.toml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.toml is read before config/config\.json"):
        run(["--card=none", "--yes"])
    assert run(["--card=none", "--yes", "--env=mine"]) == 0
    found = loaded(project, "--env", "mine")
    assert found.config.output_dir.endswith("output/mine-tiny")


def test_images_without_captions_get_the_word(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (2000, 1000)).save("photos/a.png")
    assert run(["--images=photos", "--card=80GB", "--trigger=zorblat dog", "--yes"]) == 0
    found = loaded(own_folder)
    (image_set,) = found.datasets.train_sets
    assert (image_set.caption_strategy, image_set.instance_prompt) == ("instanceprompt", "zorblat dog")
    assert (image_set.resolution, found.config.num_train_epochs) == (1024, 500)
    assert "1 image without a caption gets the caption “zorblat dog”" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--card=6"], "--card = '6': expected 8 GB, 12 GB"),
        (["--card=big"], "--card = 'big': expected 8 GB, 12 GB"),
        (["--recipe=edit"], "--recipe = 'edit': expected subject or style"),
        (["--images=nowhere"], "--images = 'nowhere': expected an existing folder"),
        (["--images=~no-such-user/a"], "--images = '~no-such-user/a': expected an existing folder"),
        (["--env=a/b"], "--env = 'a/b': expected a valid folder name"),
        (["--trigger="], "--trigger = ''"),
        (["--recipes=style"], "--recipes=style: no such flag. Did you mean --recipe?"),
        (["--yes"], "--images FOLDER: not given"),
    ],
)
@pytest.mark.usefixtures("own_folder")
def test_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(flags)
    assert message in str(caught.value)


def test_a_folder_without_images_is_named(own_folder: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match="empty contains no images"):
        run(["--images=empty", "--card=none", "--yes"])
    assert written(own_folder) == []
