"""Files of other trainers are called by their names, and their numbers are said as ours."""

import json
import shlex
from typing import Any

import pytest

from simpletuner.config.load import load

AI_TOOLKIT = """\
job: extension
config:
  name: cats
  process:
    - type: sd_trainer
      network:
        type: lora
        linear: 32  # its rank
        linear_alpha: 16
      datasets:
        - folder_path: "/pictures of cats"
          resolution: [512, 768]
      train:
        batch_size: 2
        steps: 2000
        lr: 1e-4
"""
KOHYA = 'network_module = "networks.lora"\nnetwork_dim = 16\ntrain_data_dir = "/cats"\nlearning_rate = 2e-4\n'
MUSUBI = '[general]\nresolution = [960, 544]\n[[datasets]]\nimage_directory = "/cats"\nnum_repeats = 3\n'
DIFFUSION_PIPE = 'micro_batch_size_per_gpu = 1\nepochs = 5\n[adapter]\ntype = "lora"\nrank = 32\n'
ONE_TRAINER = {
    "training_method": "LORA",
    "concept_file_name": "concepts.json",
    "learning_rate": 0.0003,
    "optimizer": {"optimizer": "ADAMW"},
    "resolution": "512",
}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "job.yaml",
            AI_TOOLKIT,
            "job.yaml: this is an ai-toolkit job file: expected simpletuner's config.json or config.toml. Its values "
            "as flags of this program: --lora_rank=32 --lora_alpha=16 --train_batch_size=2 --max_train_steps=2000 "
            '--learning_rate=0.0001. For an image set in multidatabackend.json: "instance_data_dir": '
            '"/pictures of cats". Begin with simpletuner init.',
        ),
        (
            "kohya.toml",
            KOHYA,
            "kohya.toml: this is a kohya config: expected simpletuner's config.json or config.toml. Its values as "
            "flags of this program: --lora_rank=16 --learning_rate=0.0002. For an image set in multidatabackend.json: "
            '"instance_data_dir": "/cats". Begin with simpletuner init.',
        ),
        (
            "dp.toml",
            DIFFUSION_PIPE,
            "dp.toml: this is a diffusion-pipe config: expected simpletuner's config.json or config.toml. Its values "
            "as flags of this program: --train_batch_size=1 --num_train_epochs=5 --lora_rank=32. Begin with "
            "simpletuner init.",
        ),
        (
            "ot.json",
            ONE_TRAINER,
            "ot.json: this is a OneTrainer config: expected simpletuner's config.json or config.toml. Its values as "
            'flags of this program: --learning_rate=0.0003. For an image set in multidatabackend.json: "resolution": '
            "512.0. Begin with simpletuner init.",
        ),
        (
            "accelerate.yaml",
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 4\n",
            "accelerate.yaml: this is an accelerate config: expected simpletuner's config.json or config.toml. Its "
            "values as flags of this program: --num_machines=1 --num_processes=4. Begin with simpletuner init.",
        ),
        (
            "mine.yml",
            "lora_rank: 8\n",
            "mine.yml: this is YAML: expected simpletuner's config.json or config.toml. Its values as flags of this "
            "program: --lora_rank=8. Begin with simpletuner init.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.count(".") == 1 else "",
)
def test_a_file_of_another_trainer_is_named_as_such(place: Any, name: str, content: object, told: str) -> None:
    place.write(name, content)
    assert place.problems("--config", name) == [told]


def test_the_numbers_that_are_named_can_be_typed(place: Any) -> None:
    place.write("job.yaml", AI_TOOLKIT)
    (problem,) = place.problems("--config=job.yaml")
    flags = shlex.split(problem.partition("flags of this program: ")[2].partition(". For an")[0])
    config = place.load(*flags).config
    assert (config.lora_rank, config.lora_alpha, config.max_train_steps, config.learning_rate) == (32, 16, 2000, 1e-4)


@pytest.mark.parametrize("name", ["config.yaml", "config/config.yml", "config/config.env"])
def test_a_config_in_the_usual_place_is_found_where_no_other_is(place: Any, name: str) -> None:
    place.config = place.datasets = None
    place.write(name, "export LEARNING_RATE=1e-4\n" if name.endswith("env") else "learning_rate: 1e-4\n")
    (problem,) = place.problems()
    assert problem.startswith(f"{name}: this is ")
    assert "--learning_rate=0.0001" in problem
    datasets = place.write("sets.json", [{"id": "cats", "instance_data_dir": "datasets/cats"}])
    flags = [f"--data_backend_config={datasets}", "--model_flavour=tiny"]
    assert load(flags, folder=place.folder, environ={}).config_file is None, "flags say it all"
    place.config, place.datasets = {"model_flavour": "tiny"}, [{"id": "cats", "instance_data_dir": "datasets/cats"}]
    assert place.load().config_file == place.folder / "config" / "config.json"


def test_a_dataset_file_of_another_trainer_is_named_as_such(place: Any) -> None:
    place.write("musubi.toml", MUSUBI)
    place.config["data_backend_config"] = "musubi.toml"
    assert place.problems() == [
        "musubi.toml: this is a musubi-tuner dataset config: expected simpletuner's multidatabackend.json. For an "
        'image set in multidatabackend.json: "instance_data_dir": "/cats". Begin with simpletuner init.'
    ]
    place.write("sets.yaml", "- id: cats\n")
    place.config["data_backend_config"] = "sets.yaml"
    assert place.problems() == ["sets.yaml: this is YAML: expected JSON or TOML."]


def test_a_config_with_one_key_of_another_trainer_is_still_ours(place: Any) -> None:
    place.config |= {"network_dim": 8, "job": "x"}
    assert place.problems() == [
        "network_dim: no such option. Did you mean lora_rank?",
        "job: no such option.",
    ]
    assert json.loads((place.folder / "config/config.json").read_text())["network_dim"] == 8
