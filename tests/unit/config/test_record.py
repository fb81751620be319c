import json
from typing import Any

import pytest

from simpletuner.config.options.kinds import Slice
from simpletuner.config.record import MAY_CHANGE, RECORDED_TEXTS, differences, resolved
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.values import kinds


def test_paths_stay_out(place: Any) -> None:
    place.write("start.safetensors", "")
    place.write("models/mine/model_index.json", {})
    place.config |= {
        "init_lora": "start.safetensors",
        "cache_dir": "hub",
        "pretrained_model_name_or_path": "models/mine",
        "user_prompt_library": "config/user_prompt_library.json",
    }
    place.write("config/user_prompt_library.json", {})
    kept = resolved(place.load().config)
    assert str(place.folder) not in json.dumps(kept)
    for key in ("init_lora", "cache_dir", "output_dir", "pretrained_model_name_or_path", "user_prompt_library"):
        assert key not in kept


def test_a_hub_id_is_kept(place: Any) -> None:
    place.config["pretrained_model_name_or_path"] = "black-forest-labs/FLUX.2-dev"
    assert resolved(place.load().config)["pretrained_model_name_or_path"] == "black-forest-labs/FLUX.2-dev"


def test_a_path_to_nothing_is_not_taken_for_a_hub_id(place: Any) -> None:
    place.config["pretrained_model_name_or_path"] = "/a/b"
    assert "pretrained_model_name_or_path" not in resolved(place.load().config)


def test_what_is_kept_is_json_in_the_order_of_the_docs() -> None:
    kept = resolved(RunConfig())
    assert json.loads(json.dumps(kept)) == kept
    assert list(kept) == [name for name in OPTION_NAMES if name in kept]
    assert kept["lora_rank"] == 16


def test_every_free_text_was_thought_about() -> None:
    """A new option that holds free text is left out until it is put on the list."""
    free = {
        name
        for name, kind in kinds(RunConfig).items()
        if not kind.choices and kind.base not in (bool, int, float) and not kind.is_path and not kind.is_model
    }
    assert free == RECORDED_TEXTS


def test_equal_configs_differ_in_nothing() -> None:
    old = json.loads(json.dumps(resolved(RunConfig(peft_lora_target_modules=("to_q",)))))
    assert differences(old, resolved(RunConfig(peft_lora_target_modules=("to_q",)))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_train_steps": 5},
        {"num_train_epochs": 5},
        {"validation_resolution": "512"},
        {"checkpoint_step_interval": 7},
        {"report_to": "wandb"},
        {"eval_steps_interval": 3},
        {"disk_low_threshold": "1GB"},
        {"max_workers": 1},
        {"dataloader_prefetch": False},
        {"write_batch_size": 1},
        {"disable_benchmark": True},
        {"resume_from_checkpoint": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_resumed_run_may_change_this(change: dict[str, object]) -> None:
    assert differences(resolved(RunConfig()), resolved(RunConfig.model_validate(change))) == []


def test_a_resumed_run_must_keep_the_rest() -> None:
    changed = RunConfig(seed=1, lora_rank=8, train_batch_size=2, max_train_steps=9)
    assert differences(resolved(RunConfig()), resolved(changed)) == ["lora_rank", "seed", "train_batch_size"]
    assert "learning_rate" not in MAY_CHANGE


def test_a_resumed_run_must_keep_its_routes() -> None:
    first, other = ({"routes": [{"selection_ratio": share}]} for share in (0.5, 0.25))
    old = json.loads(json.dumps(resolved(RunConfig(tread_config=first))))
    assert differences(old, resolved(RunConfig(tread_config=first))) == []
    assert differences(old, resolved(RunConfig(tread_config=other))) == ["tread_config"]


def test_an_option_that_came_or_went_is_a_difference() -> None:
    kept = resolved(RunConfig())
    assert differences({**kept, "old": 1}, kept) == ["old"]
    assert differences({name: kept[name] for name in kept if name != "seed"}, kept) == ["seed"]


def test_a_slice_is_frozen_and_exact() -> None:
    assert Slice.model_config["frozen"]
    with pytest.raises(ValueError, match="extra"):
        RunConfig.model_validate({"x": 1})
