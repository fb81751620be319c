import json
from dataclasses import replace
from typing import Any

import pytest

from simpletuner.config import record
from simpletuner.config.options.kinds import Slice
from simpletuner.config.options.ranks import RankOptions
from simpletuner.config.record import (
    CHANGE_THE_CURVE,
    FINGERPRINTED_IF_SET,
    MAY_CHANGE,
    RECORDED_TEXTS,
    SPLIT,
    OptionChange,
    RecordComparison,
    compare,
    recorded_options,
    weight_options,
    with_recorded,
)
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.values import kinds

EQUAL = RecordComparison({}, {}, {})


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
    kept = recorded_options(place.load().config)
    assert str(place.folder) not in json.dumps(kept)
    for key in ("init_lora", "cache_dir", "output_dir", "pretrained_model_name_or_path", "user_prompt_library"):
        assert key not in kept


def test_a_hub_id_is_kept(place: Any) -> None:
    place.config["pretrained_model_name_or_path"] = "black-forest-labs/FLUX.2-dev"
    assert recorded_options(place.load().config)["pretrained_model_name_or_path"] == "black-forest-labs/FLUX.2-dev"


def test_a_path_to_nothing_is_not_taken_for_a_hub_id(place: Any) -> None:
    place.config["pretrained_model_name_or_path"] = "/a/b"
    assert "pretrained_model_name_or_path" not in recorded_options(place.load().config)


def test_what_is_kept_is_json_in_the_order_of_the_docs() -> None:
    kept = recorded_options(RunConfig())
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
    left_out = {"deepspeed_config", "main_process_ip"}  # it may name folders; an address of a private network
    assert free == RECORDED_TEXTS | left_out


def test_equal_configs_differ_in_nothing() -> None:
    old = json.loads(json.dumps(recorded_options(RunConfig(peft_lora_target_modules=("to_q",)))))
    assert compare(old, RunConfig(peft_lora_target_modules=("to_q",)), OPTION_NAMES) == EQUAL


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
        {"ema_device": "cpu"},
        {"disable_benchmark": True},
        {"resume_from_checkpoint": "x"},
        {"fsdp_enable": True},
        {"distributed_timeout_s": 60},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_resumed_run_may_change_this(change: dict[str, object]) -> None:
    found = compare(recorded_options(RunConfig()), RunConfig.model_validate(change), OPTION_NAMES)
    assert replace(found, permitted_changes={}) == EQUAL
    recorded = {name for name in change if name in recorded_options(RunConfig())}
    assert set(found.permitted_changes) == recorded


def test_a_resumed_run_must_keep_the_rest() -> None:
    changed = RunConfig(seed=1, lora_rank=8, train_batch_size=2, max_train_steps=9)
    found = compare(recorded_options(RunConfig()), changed, OPTION_NAMES)
    assert found.refused_changes == {
        "lora_rank": OptionChange(16, 8),
        "seed": OptionChange(42, 1),
        "train_batch_size": OptionChange(1, 2),
    }
    assert found.permitted_changes == {"max_train_steps": OptionChange(None, 9)}


def test_a_resumed_run_may_change_the_curve_and_that_is_told_apart() -> None:
    changed = RunConfig(learning_rate=1e-3, max_grad_norm=0.5, seed=1)
    found = compare(recorded_options(RunConfig()), changed, ["learning_rate", "seed"])
    assert found.curve_changes == {"learning_rate": OptionChange(1e-4, 1e-3)}
    assert found.record_values == {"max_grad_norm": 2.0}, "what is not given stays"
    assert found.refused_changes == {"seed": OptionChange(42, 1)}
    assert not CHANGE_THE_CURVE & MAY_CHANGE
    assert {*OPTION_NAMES} >= CHANGE_THE_CURVE | MAY_CHANGE


def divided(size: int, accumulation: int, processes: int | None = None) -> RunConfig:
    return RunConfig(train_batch_size=size, gradient_accumulation_steps=accumulation, num_processes=processes)


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ((1, 4, None), (1, 2, 2), {"gradient_accumulation_steps": (4, 2), "num_processes": (1, 2)}),
        ((1, 4, 1), (1, 1, 4), {"gradient_accumulation_steps": (4, 1), "num_processes": (1, 4)}),
        ((2, 1, 4), (2, 4, None), {"gradient_accumulation_steps": (1, 4), "num_processes": (4, 1)}),
        ((2, 2, None), (4, 1, None), {"train_batch_size": (2, 4), "gradient_accumulation_steps": (2, 1)}),
        ((1, 1, 8), (2, 2, 2), {
            "train_batch_size": (1, 2), "gradient_accumulation_steps": (1, 2), "num_processes": (8, 2),
        }),
        ((1, 4, None), (1, 4, 1), {}),
    ],
)  # fmt: skip
def test_a_resumed_run_may_divide_the_effective_batch_otherwise(
    before: tuple[int, int, int | None], now: tuple[int, int, int | None], changed: dict[str, tuple[int, int]]
) -> None:
    found = compare(recorded_options(divided(*before)), divided(*now), OPTION_NAMES)
    assert found == replace(EQUAL, split_changes={name: OptionChange(*values) for name, values in changed.items()})


@pytest.mark.parametrize(
    ("before", "now", "restoring"),
    [
        # The processes are there: accumulation makes up for them where it can.
        ((1, 4, None), (1, 4, 2), {"gradient_accumulation_steps": 2}),
        ((1, 2, 2), (1, 2, None), {"gradient_accumulation_steps": 4}),
        ((1, 4, None), (2, 4, None), {"gradient_accumulation_steps": 2}),
        ((1, 4, None), (1, 4, 3), {"num_processes": 1}),
        ((1, 1, None), (2, 1, None), {"train_batch_size": 1}),
        ((1, 4, None), (3, 2, 3), {"train_batch_size": 1, "gradient_accumulation_steps": 4, "num_processes": 1}),
    ],
)
def test_another_effective_batch_is_refused_with_what_restores_it(
    before: tuple[int, int, int | None], now: tuple[int, int, int | None], restoring: dict[str, int]
) -> None:
    old = recorded_options(divided(*before))
    found = compare(old, divided(*now), OPTION_NAMES)
    assert found.refused_changes
    assert found.refused_changes.keys() <= {*SPLIT}
    assert (found.restoring_values, found.split_changes, found.adapted_values) == (restoring, {}, {})
    again = divided(*now).model_copy(update=restoring)
    assert not compare(old, again, OPTION_NAMES).refused_changes, "the remedy works"


def test_accumulation_that_is_not_given_makes_up_for_processes() -> None:
    old = recorded_options(divided(1, 4))
    found = compare(old, divided(1, 1, 2), ["num_processes"])
    assert found == replace(
        EQUAL,
        split_changes={"gradient_accumulation_steps": OptionChange(4, 2), "num_processes": OptionChange(1, 2)},
        adapted_values={"gradient_accumulation_steps": 2},
    )
    assert with_recorded(divided(1, 1, 2), found.adapted_values) == divided(1, 2, 2)
    # torchrun's processes are not given as an option, and are there all the same
    assert compare(old, divided(1, 1, 4), []).adapted_values == {}
    assert compare(old, divided(1, 1, 4), []).split_changes.keys() == {"gradient_accumulation_steps", "num_processes"}
    back = compare(recorded_options(divided(1, 2, 2)), divided(1, 1), [])
    assert back.adapted_values == {"gradient_accumulation_steps": 4}
    # A batch size that is not given stays: with it the order of the images would change.
    found = compare(recorded_options(divided(2, 4)), divided(1, 1, 2), ["num_processes"])
    assert (found.record_values, found.adapted_values) == ({"train_batch_size": 2}, {"gradient_accumulation_steps": 2})
    # Nothing makes up for three.
    found = compare(old, divided(1, 1, 3), ["num_processes"])
    assert found.refused_changes == {"num_processes": OptionChange(1, 3)}
    assert found.restoring_values == {"num_processes": 1}


def test_beside_a_set_with_its_own_batch_size_the_runs_may_not_change() -> None:
    old = recorded_options(divided(2, 2))
    found = compare(old, divided(1, 2, 2), OPTION_NAMES, has_own_sizes=True)
    assert found.refused_changes.keys() == {"train_batch_size", "num_processes"}
    assert found.restoring_values == {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert not compare(old, divided(2, 1, 2), OPTION_NAMES, has_own_sizes=True).refused_changes


def test_a_record_from_before_there_were_processes_counts_as_one() -> None:
    old = recorded_options(divided(1, 4))
    for name in RankOptions.model_fields:
        old.pop(name, None)
    assert compare(old, divided(1, 4), OPTION_NAMES) == EQUAL
    assert compare(old, divided(1, 2, 2), OPTION_NAMES).split_changes["num_processes"] == OptionChange(1, 2)


def test_a_header_names_what_one_process_would_have_to_do_for_the_same_weights() -> None:
    alone = weight_options(recorded_options(divided(2, 4)))
    assert alone["gradient_accumulation_steps"] == 4
    assert not alone.keys() & RankOptions.model_fields.keys()
    sharded = RunConfig(fsdp_enable=True, train_batch_size=2, gradient_accumulation_steps=2, num_processes=2)
    assert weight_options(recorded_options(sharded)) == weight_options(recorded_options(divided(2, 1, 4))) == alone
    assert weight_options(recorded_options(divided(1, 8))) != alone, "other images in other steps"


def test_a_resumed_run_must_keep_its_routes() -> None:
    first, other = ({"routes": [{"selection_ratio": share}]} for share in (0.5, 0.25))
    old = json.loads(json.dumps(recorded_options(RunConfig(tread_config=first))))
    assert compare(old, RunConfig(tread_config=first), OPTION_NAMES) == EQUAL
    assert compare(old, RunConfig(tread_config=other), OPTION_NAMES).refused_changes.keys() == {"tread_config"}


def test_a_record_counts_where_nothing_is_given() -> None:
    """Whether the default is another by now, or was given when the run began."""
    config = RunConfig(lora_rank=8)
    first = RunConfig(seed=3, lora_rank=8, flow_custom_timesteps=(100.0, 200.0), mixed_precision="no")
    old = json.loads(json.dumps(recorded_options(first)))
    found = compare(old, config, ["lora_rank"])
    assert found.record_values == {"flow_custom_timesteps": [100.0, 200.0], "mixed_precision": "no", "seed": 3}
    assert (found.refused_changes, found.unavailable) == ({}, {})
    assert with_recorded(config, found.record_values) == first
    assert compare(old, config, ["lora_rank", "seed"]).refused_changes.keys() == {"seed"}


def test_a_hub_id_counts_where_none_is_given() -> None:
    old = recorded_options(RunConfig(pretrained_model_name_or_path="some/model"))
    assert compare(old, RunConfig(), []).record_values == {"pretrained_model_name_or_path": "some/model"}
    here = RunConfig(pretrained_model_name_or_path="/a/folder")
    assert compare(old, here, ["pretrained_model_name_or_path"]).refused_changes.keys() == {
        "pretrained_model_name_or_path"
    }
    # Of a folder nothing is recorded: its weights are compared by their fingerprint.
    assert compare(recorded_options(here), RunConfig(), []) == EQUAL


def test_what_was_left_to_the_run_stays_as_it_chose_unless_another_value_is_given() -> None:
    for before, other in (("no", "inductor"), ("inductor", "no")):
        old = recorded_options(RunConfig(dynamo_backend=before))
        kept = RecordComparison({"dynamo_backend": before}, {}, {})
        assert compare(old, RunConfig(), []) == kept
        assert compare(old, RunConfig(dynamo_backend="auto"), ["dynamo_backend"]) == kept
        # Such as `no`, where a compiled run no longer compiles.
        assert compare(old, RunConfig(dynamo_backend=other), ["dynamo_backend"]) == EQUAL
    del old["dynamo_backend"]  # a record from before there was the option
    assert compare(old, RunConfig(), []).record_values == {"dynamo_backend": "no"}


def test_a_new_option_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    old = recorded_options(RunConfig())
    del old["seed"]
    assert compare(old, RunConfig(), OPTION_NAMES) == EQUAL
    assert compare(old, RunConfig(seed=1), ["seed"]).refused_changes == {"seed": OptionChange(42, 1)}
    monkeypatch.setitem(record.INTRODUCED, "seed", 7)
    assert compare(old, RunConfig(), []) == RecordComparison({"seed": 7}, {}, {})
    assert compare(old, RunConfig(seed=7), ["seed"]) == EQUAL
    assert compare(old, RunConfig(), ["seed"]).refused_changes == {"seed": OptionChange(7, 42)}


def test_an_option_that_is_gone_is_no_difference_where_it_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    old = recorded_options(RunConfig())
    assert compare({**old, "gone": None}, RunConfig(), []) == EQUAL
    assert compare({**old, "gone": False}, RunConfig(), []) == RecordComparison({}, {}, {"gone": False})
    monkeypatch.setitem(record.REMOVED, "gone", (False,))
    assert compare({**old, "gone": False}, RunConfig(), []) == EQUAL
    assert compare({**old, "gone": True}, RunConfig(), []) == RecordComparison({}, {}, {"gone": True})


def test_a_renamed_option_is_read_under_its_new_name() -> None:
    old = recorded_options(RunConfig())
    old["flow_use_beta_schedule_alpha"] = old.pop("flow_beta_schedule_alpha") + 1
    assert compare(old, RunConfig(), []).record_values == {
        "flow_beta_schedule_alpha": old["flow_use_beta_schedule_alpha"]
    }


def test_a_value_that_is_gone_is_named() -> None:
    old = {**recorded_options(RunConfig()), "lr_scheduler": "staircase", "seed": 5}
    assert compare(old, RunConfig(), []) == RecordComparison({"seed": 5}, {}, {"lr_scheduler": "staircase"})


def test_a_slice_is_frozen_and_exact() -> None:
    assert Slice.model_config["frozen"]
    with pytest.raises(ValueError, match="extra"):
        RunConfig.model_validate({"x": 1})


def test_an_option_that_is_younger_than_the_fingerprints_is_named_only_where_it_is_chosen() -> None:
    usual = recorded_options(RunConfig())
    named = weight_options(usual)
    assert named.keys() == usual.keys() - MAY_CHANGE - FINGERPRINTED_IF_SET.keys()
    chosen = weight_options(usual | {"optimizer_release_gradients": True})
    assert chosen == named | {"optimizer_release_gradients": True}


def test_an_elastic_run_keeps_its_effective_batch_or_comes_near_it() -> None:
    """Whatever accumulation the command gives, which stays the same while processes come and go."""

    def restarted(before: tuple[int, int, int], now: tuple[int, int, int]) -> tuple[int, RecordComparison]:
        config = divided(*now)
        found = compare(recorded_options(divided(*before)), config, OPTION_NAMES, is_elastic=True)
        return with_recorded(config, found.adapted_values).effective_batch, found

    effective, found = restarted((2, 1, 4), (2, 1, 2))
    assert (effective, found.adapted_values, found.record_values, found.refused_changes) == (
        8,
        {"gradient_accumulation_steps": 2},
        {},
        {},
    )
    effective, found = restarted((2, 2, 2), (2, 1, 2))  # once more with as many
    assert (effective, found.adapted_values, found.record_values, found.split_changes) == (
        8,
        {"gradient_accumulation_steps": 2},
        {},
        {},
    )
    effective, found = restarted((2, 2, 2), (2, 1, 4))
    assert (effective, found.adapted_values) == (8, {})
    assert restarted((1, 1, 4), (1, 1, 3))[0] == 3
    assert restarted((1, 1, 3), (1, 1, 2))[0] == 4
    assert restarted((1, 1, 2), (1, 1, 8))[0] == 8, "at least one micro-batch each"
    _, found = restarted((1, 1, 4), (2, 1, 4))
    assert found.refused_changes.keys() == {"train_batch_size"}, "that is a change of the command"
    assert restarted((2, 2, 2), (2, 2, 2))[1] == EQUAL
