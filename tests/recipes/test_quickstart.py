"""docs/quickstart.md as a newcomer types it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.cli.main import COMMANDS, main
from simpletuner.config.load import load
from simpletuner.examples.pictures import materialize

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
WALK = PAGE.partition("<!-- walk: begin")[2].partition("<!-- walk: end")[0]


def commands(text: str) -> list[list[str]]:
    """The words of each `simpletuner` command in a block of the shell, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["simpletuner"]]


def test_each_command_of_the_page_is_one() -> None:
    words = [each[0] for each in commands(PAGE)]
    assert {"doctor", "init", "dataset", "plan", "train", "sample"} <= set(words) <= set(COMMANDS)


def test_the_files_of_the_page_load_with_nothing_to_say(own_folder: Path) -> None:
    """The prompts' `<subject>` too: validation_subject is in the config."""
    names = ("config.json", "multidatabackend.json", "user_prompt_library.json")
    (own_folder / "config").mkdir()
    (own_folder / "datasets" / "my-dataset").mkdir(parents=True)
    Image.new("RGB", (1024, 1024)).save("datasets/my-dataset/one.png")
    for name, text in zip(names, re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL), strict=True):
        json.loads(text)
        (own_folder / "config" / name).write_text(text)
    loaded = load([], folder=own_folder, environ={})
    assert [notice for notice in loaded.notices if "non-commercial" not in notice] == []
    assert loaded.prompts["winter_subject"].text == "a red barn in the snow, seen from afar"


@pytest.mark.slow
def test_the_klein_path_runs_as_typed_with_the_embedded_klein(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("datasets/my-dataset").mkdir(parents=True)
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save("datasets/my-dataset/one.png")
    walk = PAGE.partition("<!-- klein: begin")[2].partition("<!-- klein: end")[0]
    for words in commands(walk):
        small = ["--model_flavour=tiny-klein"] if words[0] not in ("init", "sample") else []
        if words[0] == "train":
            small += ["--validation_num_inference_steps=2", "--validation_resolution=64", "--max_train_steps=1"]
        more = ["--width=64", "--height=64", "--steps=2"] if words[0] == "sample" else []
        assert main([*words, *small, *more]) == 0, words
    told = capsys.readouterr()
    assert "Note: license of the model: Apache-2.0." in told.out
    assert "Traceback" not in told.err
    assert json.loads((own_folder / "output/klein/config.json").read_text())["model_flavour"] == "tiny-klein"
    assert (own_folder / "output/klein/pytorch_lora_weights.safetensors").exists()
    assert len(list((own_folder / "samples").glob("*.png"))) == 1


@pytest.mark.slow
def test_what_init_wrote_trains_as_the_page_types_it(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    materialize("tiny-lora", Path("datasets/tiny-lora"))  # as `./train.sh` does
    for words in commands(WALK):
        fewer = ["--validation_num_inference_steps=2", "--max_train_steps=3"] if words[0] == "train" else []
        assert main([*words, *fewer]) == 0, words
    assert (own_folder / "output" / "try-tiny" / "pytorch_lora_weights.safetensors").exists()
    assert list((own_folder / "samples").glob("*.png"))
    told = capsys.readouterr().out
    assert "Training can start." in told
    assert "was trained at 128x128" not in told
