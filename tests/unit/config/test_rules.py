import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.rules import layer_findings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_train_steps": 0, "num_train_epochs": 0},
            "num_train_epochs = 0 without max_train_steps: the run would have no steps: expected one of them to be "
            "at least 1.",
        ),
        (
            {"num_processes": 5, "num_machines": 2},
            "num_processes = 5 with num_machines = 2: expected the same number on each machine. Give "
            "--num_processes=6, 3 on each.",
        ),
        ({"num_machines": 2, "machine_rank": 2}, "machine_rank = 2 with num_machines = 2: expected a number below 2."),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
            "flow_use_uniform_schedule and flow_use_beta_schedule are both on: expected one at most.",
        ),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True, "flow_custom_timesteps": "500"},
            "flow_use_uniform_schedule, flow_use_beta_schedule and flow_custom_timesteps are all on: "
            "expected one at most.",
        ),
        (
            {"flux_guidance_mode": "random-range", "flux_guidance_min": 5},
            "flux_guidance_min = 5: expected at most flux_guidance_max, 4.",
        ),
        (
            {
                "scheduled_sampling_max_step_offset": 5,
                "scheduled_sampling_reflexflow_beta1": 0,
                "scheduled_sampling_reflexflow_beta2": 0,
            },
            "scheduled_sampling_reflexflow_beta1 and scheduled_sampling_reflexflow_beta2 are both 0: rollouts "
            "would train nothing: expected one of them above 0. To train rollouts without ReflexFlow, "
            "give --scheduled_sampling_reflexflow=false.",
        ),
        (
            {"scheduled_sampling_sampler": "rk4"},
            "scheduled_sampling_sampler = 'rk4': expected euler, heun, unipc or dpm.",
        ),
        ({"scheduled_sampling_max_step_offset": 1001}, "expected a whole number from 0 to 1000."),
        ({"scheduled_sampling_probability": 1.5}, "expected a number from 0 to 1."),
        ({"scheduled_sampling_reflexflow_alpha": -1}, "expected a number of at least 0."),
        ({"lr_scheduler": "cosine", "lr_end": 0.1}, "lr_end = 0.1: expected at most learning_rate, 0.0001."),
        (
            {"eval_dataset_id": "held"},
            "eval_dataset_id = 'held': expected a dataset with dataset_type eval in the list.",
        ),
        ({"output_dir": "config/config.json"}, "this is a file: expected a folder."),
        ({"init_lora": "nope.safetensors"}, "no such file: expected a .safetensors file or a run's folder."),
        (
            {"model_type": "full", "enable_group_offload": True},
            "enable_group_offload with model_type = full, whose weights all change with each step. Offloaded weights "
            "are read-only: remove enable_group_offload, or train a LoRA.",
        ),
        (
            {"model_type": "full", "optimizer": "adamw_bf16", "mixed_precision": "fp16"},
            "optimizer = 'adamw_bf16' with model_type = full and fp16 weights, which it cannot step. Give "
            "--base_model_default_dtype=bf16, or take adamw.",
        ),
        (
            {"optimizer_release_gradients": True},
            "optimizer_release_gradients with model_type = lora, whose gradients are small: expected full. Give "
            "--optimizer_release_gradients=false.",
        ),
        (
            {"enable_group_offload": True, "dynamo_backend": "inductor", "group_offload_type": "leaf_level"},
            "enable_group_offload with dynamo_backend = inductor and group_offload_type = 'leaf_level': a compiled "
            "block is one graph, and single layers cannot be loaded inside it. Give "
            "--group_offload_type=block_level, or give --dynamo_backend=no to train uncompiled.",
        ),
        (
            {"enable_group_offload": True, "dynamo_backend": "inductor", "gradient_checkpointing": False},
            "enable_group_offload with dynamo_backend = inductor and gradient_checkpointing = false: a compiled block "
            "that is not recomputed may keep copies of its weights on the accelerator. Give "
            "--gradient_checkpointing=true, or give --dynamo_backend=no to train uncompiled.",
        ),
        (
            {"enable_group_offload": True, "dynamo_backend": "inductor", "gradient_checkpointing_interval": 2},
            "Remove gradient_checkpointing_interval, or give --dynamo_backend=no to train uncompiled.",
        ),
        (
            {"group_offload_text_encoder": True, "text_encoder_mode": "resident"},
            "group_offload_text_encoder with text_encoder_mode = resident, which loads it whole. Remove one of "
            "the two.",
        ),
        (
            {"enable_group_offload": True, "group_offload_to_disk_path": "config/config.json"},
            "this is a file: expected a folder.",
        ),
        (
            {"resume_from_checkpoint": "nope"},
            "no such folder: expected latest, a checkpoint's folder, or an empty string.",
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_options_are_held_against_each_other(place: Any, changes: dict[str, object], message: str) -> None:
    place.config |= changes
    (problem,) = place.problems()
    assert problem.endswith(message)


def test_a_checkpoint_need_only_be_on_machine_0(place: Any) -> None:
    flags = ("--num_machines=2", "--main_process_ip=10.0.0.1", "--resume_from_checkpoint=nope")
    assert place.load(*flags, "--machine_rank=1").config.resume_from_checkpoint.endswith("nope")
    (problem,) = place.problems(*flags, "--machine_rank=0")
    assert "no such folder" in problem


def test_a_rule_is_silent_about_a_value_that_is_refused_anyway(place: Any) -> None:
    place.config |= {"flux_guidance_mode": "random-range", "flux_guidance_min": 5, "flux_guidance_max": "x"}
    assert place.problems() == ["flux_guidance_max = 'x': expected a number of at least 0."]


def test_a_rule_spells_the_option_as_typed(place: Any) -> None:
    assert place.problems("--learning_rate=3")[0].startswith("--learning_rate = 3: expected at most 1.")


@pytest.fixture
def installed(place: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes it look as if these trackers, and nothing else, were installed."""

    def install(*names: str) -> None:
        folder = place.folder / "site-packages"
        for name in names:
            place.write(f"site-packages/{name}/__init__.py", "")
        for name in ("tensorboard", "wandb"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "path", [str(folder)])

    return install


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_must_be_installed(place: Any, tracker: str, installed: Callable[..., None]) -> None:
    installed()
    place.config["report_to"] = tracker
    assert place.problems() == [f"report_to = '{tracker}': {tracker} is not installed. pip install -e '.[{tracker}]'"]


def test_a_folder_named_like_a_tracker_is_none(place: Any, installed: Callable[..., None]) -> None:
    installed()
    (place.folder / "site-packages" / "wandb").mkdir(parents=True)
    place.config["report_to"] = "wandb"
    assert "wandb is not installed" in place.problems()[0]


@pytest.mark.parametrize("value", ["none", "tensorboard", "tensorboard,wandb", "wandb, tensorboard"])
def test_trackers_are_a_comma_list(place: Any, value: str, installed: Callable[..., None]) -> None:
    installed("tensorboard", "wandb")
    place.config["report_to"] = value
    expected = () if value == "none" else tuple(part.strip() for part in value.split(","))
    assert place.load().config.trackers == expected


@pytest.mark.parametrize("value", ["", "3", "0:2", "3:2", "-1:2", "1:2:3", "a:b"], ids=repr)
def test_what_are_no_two_steps_is_refused(place: Any, value: str) -> None:
    place.config["profile_steps"] = value
    assert "expected FIRST:LAST, two steps counted from 1" in place.problems()[0]


def test_profiled_steps_lie_in_the_run(place: Any) -> None:
    place.config |= {"profile_steps": "2:4", "max_train_steps": 4}
    assert place.load().config.profiled == range(2, 5)
    place.config["max_train_steps"] = 3
    assert place.problems() == ["profile_steps = 2:4 in a run of 3 steps: expected steps from 1 to 3."]


@pytest.mark.parametrize("value", ["", "mlflow", "none,wandb", "wandb,wandb"], ids=repr)
def test_other_trackers_are_refused(place: Any, value: str) -> None:
    place.config["report_to"] = value
    assert "expected none, tensorboard, wandb, or a comma list of these" in place.problems()[0]


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"flux_guidance_min": 2}, "flux_guidance_min has no effect: flux_guidance_mode is constant."),
        (
            {"flux_guidance_mode": "random-range", "flux_guidance_value": 2},
            "flux_guidance_value has no effect: flux_guidance_mode is random-range.",
        ),
        ({"flow_beta_schedule_alpha": 3}, "flow_beta_schedule_alpha has no effect: flow_use_beta_schedule is false."),
        (
            {"flow_schedule_shift": 2, "flow_schedule_auto_shift": True},
            "flow_schedule_shift has no effect: flow_schedule_auto_shift is true.",
        ),
        (
            {"flow_custom_timesteps": [500], "flow_schedule_auto_shift": True},
            "flow_schedule_auto_shift has no effect: flow_custom_timesteps overrides it.",
        ),
        (
            {"dynamo_mode": "max-autotune-no-cudagraphs", "dynamo_backend": "no"},
            "dynamo_mode has no effect: dynamo_backend is no.",
        ),
        (
            {"group_offload_blocks_per_group": 2},
            "group_offload_blocks_per_group has no effect: enable_group_offload is false.",
        ),
        (
            {"group_offload_resident_blocks": 3},
            "group_offload_resident_blocks has no effect: enable_group_offload is false.",
        ),
        (
            {"group_offload_to_disk_path": "blocks"},
            "group_offload_to_disk_path has no effect: enable_group_offload is false.",
        ),
        (
            {"enable_group_offload": True, "group_offload_type": "leaf_level", "group_offload_blocks_per_group": 2},
            "group_offload_blocks_per_group has no effect: group_offload_type is leaf_level.",
        ),
        (
            {"group_offload_use_stream": True},
            "group_offload_use_stream has no effect: nothing that it applies to is offloaded.",
        ),
        (
            {"group_offload_text_encoder": True, "text_encoder_mode": "streamed"},
            "group_offload_text_encoder has no effect: text_encoder_mode is streamed already.",
        ),
        (
            {"activation_offload": True, "gradient_checkpointing": False},
            "activation_offload has no effect: gradient_checkpointing is false: no block is recomputed.",
        ),
        (
            {"offload_during_startup": True, "validation_disable": True},
            "offload_during_startup has no effect: no validation images are generated, and models that prepare data "
            "are always freed after their phase.",
        ),
        (
            {"flow_use_uniform_schedule": True, "flow_sigmoid_scale": 2},
            "flow_sigmoid_scale has no effect: another distribution is used.",
        ),
        (
            {"scheduled_sampling_probability": 0.5},
            "scheduled_sampling_probability has no effect: scheduled_sampling_max_step_offset is 0.",
        ),
        (
            {"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_prob_end": 0.5},
            "scheduled_sampling_prob_end has no effect: scheduled_sampling_ramp_steps is 0.",
        ),
        (
            {
                "scheduled_sampling_max_step_offset": 5,
                "scheduled_sampling_ramp_steps": 9,
                "scheduled_sampling_probability": 0.5,
            },
            "scheduled_sampling_probability has no effect: scheduled_sampling_ramp_steps is above 0: the ramp is used.",
        ),
        (
            {
                "scheduled_sampling_max_step_offset": 5,
                "scheduled_sampling_reflexflow": False,
                "scheduled_sampling_reflexflow_alpha": 2,
            },
            "scheduled_sampling_reflexflow_alpha has no effect: scheduled_sampling_reflexflow is false.",
        ),
        ({"huber_c": 0.2}, "huber_c has no effect: loss_type is l2."),
        (
            {"lr_scheduler": "constant", "lr_warmup_steps": 3},
            "lr_warmup_steps has no effect: lr_scheduler is constant; constant_with_warmup has a warm-up.",
        ),
        ({"lr_power": 1}, "lr_power has no effect: lr_scheduler is constant_with_warmup."),
        ({"num_train_epochs": 3}, "num_train_epochs has no effect: max_train_steps overrides it."),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_interval": 2},
            "gradient_checkpointing_interval has no effect: gradient_checkpointing is false.",
        ),
        (
            {"peft_lora_target_modules": ["to_q"], "flux_lora_target": "mlp"},
            "flux_lora_target has no effect: peft_lora_target_modules overrides it.",
        ),
        (
            {"validation_disable": True, "validation_prompt": "x"},
            "validation_prompt has no effect: validation_disable is true.",
        ),
        (
            {"validation_negative_prompt": "x"},
            "validation_negative_prompt has no effect: validation_guidance_real is 1.",
        ),
        ({"tracker_run_name": "x"}, "tracker_run_name has no effect: report_to is none."),
        ({"revision": "main"}, "revision has no effect: the model does not come from the Hub."),
        ({"num_eval_images": 3}, "num_eval_images has no effect: no dataset has dataset_type eval."),
        ({"max_grad_norm": 0, "grad_clip_method": "value"}, "grad_clip_method has no effect: max_grad_norm is 0."),
        (
            {"lr_warmup_steps": 10},
            "lr_warmup_steps = 10 is the whole run of 10 steps: the learning rate never reaches its peak.",
        ),
        (
            {"lora_alpha": 1, "lora_rank": 32},
            "lora_alpha = 1 at rank 32 scales the adapter by 0.0312: its effect may be too weak to see. Without "
            "lora_alpha the scale is 1.",
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_what_has_no_effect_is_named(place: Any, changes: dict[str, object], notice: str) -> None:
    place.config |= changes
    assert place.load().notices == (notice,)


def test_an_init_lora_decides_rank_and_alpha(place: Any) -> None:
    place.write("start.safetensors", "")
    place.config |= {"init_lora": "start.safetensors", "lora_rank": 8}
    assert place.load().notices == ("lora_rank has no effect: init_lora is given: the values of its file apply.",)


def test_every_fault_of_the_routes_is_told_at_once(place: Any) -> None:
    route = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}
    place.config["tread_config"] = {
        "routes": [
            route,
            route | {"selection_ratio": 0, "end_layer_idx": 2.5},
            {"selection_ratoi": 0.5, "start_layer_idx": 2},
            "2-4",
        ],
        "seed": 3,
    }
    assert place.problems() == [
        "tread_config: no such key: 'seed': expected only routes.",
        "tread_config, route 2: selection_ratio = 0: expected a number above 0 and up to 1.",
        "tread_config, route 2: end_layer_idx = 2.5: expected a whole number.",
        "tread_config, route 3: selection_ratoi: no such key of a route. Did you mean selection_ratio?",
        "tread_config, route 3: selection_ratio is missing: expected a number above 0 and up to 1.",
        "tread_config, route 3: end_layer_idx is missing: expected a whole number.",
        "tread_config, route 4: '2-4': expected an object, in { }.",
    ]


@pytest.mark.parametrize("routes", [[], {}, None, 3], ids=repr)
def test_routes_are_a_list_with_something_in_it(place: Any, routes: object) -> None:
    place.config["tread_config"] = {"routes": routes}
    (problem,) = place.problems()
    assert problem.startswith("tread_config: routes = ")
    assert problem.endswith(": expected a list of at least one route, in [ ].")


def test_routes_come_as_an_object_as_text_and_as_a_file(place: Any) -> None:
    routes = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}
    place.config["tread_config"] = routes
    place.write("tread.json", routes)
    as_object = place.load()
    assert as_object.notices == ()
    for flag in (f"--tread_config={json.dumps(routes)}", "--tread_config=tread.json"):
        assert place.load(flag).config == as_object.config
    assert place.problems("--tread_config=2-4") == [
        "--tread_config = '2-4': expected an object {\"routes\": [...]}, or the path of a JSON file with one."
    ]
    spoilt = json.dumps(routes).replace("0.5", "2")
    assert place.problems("--tread_config", spoilt) == [
        "--tread_config, route 1: selection_ratio = 2: expected a number above 0 and up to 1."
    ]


def test_a_ratio_other_than_half_is_put_into_words(place: Any) -> None:
    route = {"selection_ratio": 0.25, "start_layer_idx": 2, "end_layer_idx": -2}
    place.config["tread_config"] = {"routes": [route]}
    assert place.load().notices == (
        "selection_ratio = 0.25 is the share of image tokens that is kept. Programs that set the share that is "
        "dropped would have 0.75.",
    )


def test_two_faults_of_one_option_are_both_told(place: Any) -> None:
    place.config["optimizer_config"] = {"one": 1, "two": 2}
    assert [problem.split(" takes")[0] for problem in place.problems()] == ["optimizer_config: adamw"] * 2


def test_a_full_run_has_no_use_for_a_lora_option(place: Any) -> None:
    place.config |= {"model_type": "full", "learning_rate": 1e-5}
    assert place.load().notices == ()
    place.config |= {
        "lora_rank": 8,
        "lora_alpha": 0.5,
        "flux_lora_target": "tiny",
        "peft_lora_target_modules": ["to_q"],
    }
    assert place.load().notices == (
        "lora_rank, lora_alpha, flux_lora_target and peft_lora_target_modules have no effect: "
        "model_type is full, which trains no adapter.",
    )
    del place.config["learning_rate"]
    assert place.load().notices[-1].startswith("learning_rate is 0.0001, which suits a LoRA")


def test_a_full_run_does_not_start_from_a_lora(problem_of: Callable[..., str]) -> None:
    expected = "init_lora with model_type = full, which trains no adapter. Remove one of the two."
    assert problem_of(model_type="full", init_lora="some.safetensors") == expected


def test_a_lora_run_has_a_precision_of_its_own_for_the_file(place: Any) -> None:
    place.config["model_save_dtype"] = "bf16"
    assert place.load().notices == ("model_save_dtype has no effect: model_type is lora, which uses lora_save_dtype.",)


# --- guidance of flavours without an embedder

KLEIN = {"model_flavour": "tiny-klein", "caption_dropout_probability": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flux_guidance_value": 3.0}, "flux_guidance_value has no effect: tiny-klein takes no guidance as an input."),
        (
            {"flux_guidance_mode": "random-range", "flux_guidance_max": 3},
            "flux_guidance_mode and flux_guidance_max have no effect: tiny-klein takes no guidance as an input.",
        ),
        (
            {"tokenizer_fix_regex": True},
            "tokenizer_fix_regex has no effect: it corrects Mistral's tokenizer, and tiny-klein has Qwen's.",
        ),
        (
            {"validation_guidance": 1, "validation_negative_prompt": "x"},
            "validation_negative_prompt has no effect: validation_guidance is 1.",
        ),
        (
            {"model_flavour": "tiny-klein-distilled", "validation_guidance": 4, "validation_negative_prompt": "x"},
            "validation_guidance and validation_negative_prompt have no effect: tiny-klein-distilled is distilled: "
            "guidance is built into its weights.",
        ),
        (
            {"caption_dropout_probability": 0},
            "caption_dropout_probability = 0: guidance steers tiny-klein away from the empty prompt, which this run "
            "then never trains. Images may get worse: give --caption_dropout_probability=0.1.",
        ),
    ],
)
def test_what_guidance_does_not_do_on_klein_is_said(place: Any, options: dict[str, Any], message: str) -> None:
    place.config |= KLEIN | options
    assert message in place.load().notices


def test_a_plain_klein_config_gets_no_word_of_guidance(place: Any) -> None:
    place.config |= KLEIN | {"validation_negative_prompt": "x"}
    assert not [text for text in place.load().notices if "guidance" in text or "dropout" in text]
    del place.config["validation_negative_prompt"]
    place.config |= {"model_flavour": "tiny", "caption_dropout_probability": 0}
    assert not [text for text in place.load().notices if "guidance" in text or "dropout" in text]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"validation_guidance_real": 3},
            "validation_guidance_real = 3: only for models that take guidance as an input, such as dev: expected 1. "
            "Give --validation_guidance=3 instead, which is true guidance on tiny-klein.",
        ),
        (
            {"model_flavour": "tiny-klein-distilled", "validation_guidance_real": 3},
            "validation_guidance_real = 3: only for models that take guidance as an input, such as dev: expected 1. "
            "Remove it: tiny-klein-distilled is distilled and needs no guidance.",
        ),
        (
            {"validation_guidance": 0.5},
            "validation_guidance = 0.5: on tiny-klein it is true guidance: expected at least 1, which turns it off.",
        ),
        (
            {"model_flavour": "klein-4b", "custom_text_encoder_intermediary_layers": "10,20,30"},
            "custom_text_encoder_intermediary_layers = 10,20,30: FLUX.2-klein-base-4B was trained with other layers: "
            "expected 9,18,27. Remove it.",
        ),
        (
            {"model_flavour": "dev", "custom_text_encoder_intermediary_layers": [9, 18, 27]},
            "custom_text_encoder_intermediary_layers = 9,18,27: FLUX.2-dev was trained with other layers: expected "
            "10,20,30. Remove it.",
        ),
    ],
)
def test_guidance_and_layers_that_a_flavour_does_not_have_are_refused(
    place: Any, options: dict[str, Any], problem: str
) -> None:
    place.config |= KLEIN | options
    assert place.problems() == [problem]


@pytest.mark.parametrize(
    ("flavour", "context_dim", "is_refused"),
    [
        ("dev", 15360, True),
        ("dev", 12288, False),
        ("klein-9b", 12288, True),
        ("klein-9b", None, False),
        ("tiny-klein", 144, False),
    ],
)
def test_a_local_model_of_a_published_width_takes_the_published_layers(
    flavour: Any, context_dim: int | None, is_refused: bool
) -> None:
    options = ModelOptions(
        model_flavour=flavour,
        pretrained_model_name_or_path="models/mine",
        custom_text_encoder_intermediary_layers=(5, 10, 15),
    )
    assert bool(list(layer_findings(options, context_dim))) == is_refused


@pytest.mark.parametrize(
    ("flavour", "defaults"),
    [("dev", (20, 4.0)), ("klein-9b", (50, 4.0)), ("klein-4b-distilled", (4, 1.0)), ("tiny-klein", (20, 4.0))],
)
def test_validation_steps_and_guidance_default_to_the_flavours(
    place: Any, flavour: str, defaults: tuple[int, float]
) -> None:
    place.config["model_flavour"] = flavour
    config = place.load().config
    assert (config.validation_num_inference_steps, config.validation_guidance) == defaults


def test_a_flavours_own_layers_may_be_written_down(place: Any) -> None:
    place.config |= {"model_flavour": "klein-4b", "custom_text_encoder_intermediary_layers": "9,18,27"}
    place.load()


@pytest.mark.parametrize(
    ("flavour", "scales"),
    [("dev", (4.0, 3.0)), ("klein-9b", (1.0, 4.0)), ("klein-9b-distilled", (1.0, 1.0)), ("tiny-klein", (1.0, 4.0))],
)
def test_guidance_is_an_input_or_a_second_prediction_or_nothing(flavour: Any, scales: tuple[float, float]) -> None:
    assert FLAVOURS[flavour].guidance_scales(4.0, 3.0) == scales


RELEASING = {"model_type": "full", "optimizer_release_gradients": True}


def test_all_that_forbids_releasing_gradients_is_said_at_once_and_the_remedies_work(place: Any) -> None:
    place.config |= RELEASING | {"optimizer": "lion", "mixed_precision": "fp16", "gradient_accumulation_steps": 2}
    place.config["base_model_default_dtype"] = "fp32"
    found = place.problems()
    remedies = [word.strip(".,;") for line in found for word in line.split() if word.startswith("--")]
    assert remedies == [
        "--optimizer=adafactor",
        "--optimizer_release_gradients=false",
        "--mixed_precision=bf16",
        "--base_model_default_dtype=bf16",
        "--max_grad_norm=0",
        "--grad_clip_method=value",
        "--gradient_accumulation_steps=1",
    ]
    remedies.remove("--optimizer_release_gradients=false")
    for clipping in ("--max_grad_norm=0", "--grad_clip_method=value"):
        assert place.load(*(each for each in remedies if each != clipping)).config.optimizer == "adafactor"


@pytest.mark.parametrize("options", [{"mixed_precision": "no"}, {"mixed_precision": "fp16"}])
def test_released_gradients_want_bf16_weights(place: Any, options: dict[str, str]) -> None:
    place.config |= RELEASING | {"optimizer": "adamw_bf16", "max_grad_norm": 0} | options
    assert place.problems() == [
        f"optimizer_release_gradients with mixed_precision = {options['mixed_precision']}: expected bf16 weights that "
        "compute in bf16. Give --mixed_precision=bf16."
    ]
    assert place.load("--mixed_precision=bf16")


def test_all_that_cannot_be_sharded_is_said_at_once_and_the_remedies_work(place: Any) -> None:
    place.config |= {"fsdp_enable": True, "enable_group_offload": True, "validation_preview_model": "some/model"}
    assert place.problems() == [
        "enable_group_offload with fsdp_enable, which places the blocks itself. Remove enable_group_offload; "
        "--fsdp_cpu_offload keeps the shards in host memory.",
        "validation_preview_model = 'some/model' with fsdp_enable: each process would hold that whole model. "
        "Remove validation_preview_model: validation images then use the sharded model itself.",
    ]
    del place.config["validation_preview_model"]
    assert place.load("--enable_group_offload=false", "--fsdp_cpu_offload").config.may_shard
    # One process shards nothing, and says so.
    assert place.load("--num_processes=1").notices == ("fsdp_enable has no effect: num_processes is 1.",)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "torch:adam", "pytorch_optimizer:soap"])
def test_a_sharded_model_is_trained_by_elementwise_optimizers(place: Any, optimizer: str) -> None:
    place.config |= {"model_type": "full", "fsdp_enable": True, "optimizer": optimizer, "learning_rate": 1e-5}
    said = (
        f"optimizer = '{optimizer}' with model_type = full and fsdp_enable, where each process steps a shard: "
        "expected adamw, adamw_bf16 or lion."
    )
    if optimizer in ("adamw", "adamw_bf16", "lion"):
        assert place.load().config.optimizer == optimizer
    else:
        assert said in place.problems()
    # An adapter is whole in each process, and so is a model that is not sharded.
    for flag in ("--model_type=lora", "--num_processes=1", "--fsdp_enable=false"):
        place.load(flag)


@pytest.mark.parametrize("flag", ["--num_processes=2", "--fsdp_enable"])
def test_gradients_are_not_released_where_several_processes_add_them_up(place: Any, flag: str) -> None:
    place.config |= RELEASING | {"optimizer": "adamw_bf16", "max_grad_norm": 0}
    (problem,) = place.problems(flag)
    assert problem.startswith(f"optimizer_release_gradients with {flag[2:].partition('=')[0]} = ")
    assert place.load(flag, "--optimizer_release_gradients=false")
    assert place.load("--fsdp_enable", "--num_processes=1").config.optimizer_release_gradients


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fsdp_reshard_after_forward": True, "fsdp_cpu_offload": False}, "fsdp_enable is false"),
        ({"fsdp_enable": True, "fsdp_cpu_offload": True, "num_processes": 1}, "num_processes is 1"),
        ({"distributed_timeout_s": 60}, "one process trains"),
    ],
)
def test_options_of_processes_that_are_not_there_have_no_effect(place: Any, options: dict[str, Any], said: str) -> None:
    place.config |= options
    (notice,) = place.load().notices
    assert notice.endswith(f"no effect: {said}.")
    del place.config[next(iter(options))]
    place.config |= {"num_processes": 2, "fsdp_enable": True}
    assert place.load().notices == ()


def test_processes_count_in_the_effective_batch(place: Any) -> None:
    place.config |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scale": True, "num_processes": 4}
    loaded = place.load()
    assert loaded.config.effective_batch == 16
    assert "learning_rate 0.0001 × 16 for the effective batch of 16: 0.0016." in loaded.notices
    assert place.load("--num_processes=1").config.rate_scale == 4
    assert "learning_rate = 0.1, 1.6 scaled by the effective batch" in place.problems("--learning_rate=0.1")[0]


def test_the_processes_that_were_started_count(place: Any) -> None:
    place.config |= {"lr_scale": True, "fsdp_enable": True}
    environ = {"RANK": "1", "WORLD_SIZE": "4"}
    loaded = place.load(environ=environ)
    assert (loaded.config.num_processes, loaded.origins["num_processes"]) == (4, "default")
    assert "learning_rate 0.0001 × 4 for the effective batch of 4: 0.0004." in loaded.notices
    assert place.load("--num_processes=4", environ=environ).config.ranks == 4
    assert place.problems("--num_processes=2", environ=environ) == [
        "--num_processes = 2, and torchrun started 4 processes: expected 4. Remove it, or start simpletuner train "
        "without torchrun: it starts the processes itself."
    ]
    # Some machines set it to something else.
    for other in ({"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "four"}):
        assert place.load(environ=other).config.num_processes is None


@pytest.mark.parametrize(
    ("options", "windows", "messages"),
    [
        ({}, [{}], []),
        ({}, [{"end_step": 4}, {"start_step": 5}], []),
        ({}, [{"end_step": 4}, {"start_step": 4, "end_step": 10}], []),
        ({"max_train_steps": 4}, [{"end_step": 4}, {"start_step": 9}], []),
        ({}, [{"end_step": 10, "end_epoch": 1}], []),
        (
            {},
            [{"start_step": 3, "end_step": 4}, {"start_step": 6, "end_step": 8}],
            [
                "no image set is active in steps 1 to 2: expected at least one set in each step. Change start_step, "
                "end_step, start_epoch or end_epoch of an image set in the dataset list.",
                "no image set is active in step 5: expected at least one set in each step. Change start_step, "
                "end_step, start_epoch or end_epoch of an image set in the dataset list.",
                "no image set is active in steps 9 to 10: expected at least one set in each step. Change start_step, "
                "end_step, start_epoch or end_epoch of an image set in the dataset list, or give --max_train_steps=8.",
            ],
        ),
        (
            {"max_train_steps": None, "num_train_epochs": 3},
            [{"end_epoch": 2, "end_step": 1}],
            [
                "no image set is active in epoch 3: expected at least one set in each epoch. Change start_step, "
                "end_step, start_epoch or end_epoch of an image set in the dataset list, or give --num_train_epochs=2."
            ],
        ),
    ],
)
def test_each_step_has_a_set(
    place: Any, options: dict[str, object], windows: list[dict[str, int]], messages: list[str]
) -> None:
    place.config |= options
    cats, text = place.datasets
    place.datasets = [*({**cats, "id": f"cats-{at}"} | window for at, window in enumerate(windows)), text]
    if messages:
        assert place.problems() == messages
    else:
        place.load()


# --- losses toward the base model

FULL = {"model_type": "full", "learning_rate": 1e-5}
WHY = "with model_type = full, which changes the base model: its original predictions are lost."
TRAIN_LORA = "Train a LoRA (--model_type=lora), or give"


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        (
            FULL | {"preservation": "blank", "masked_loss_prior": 0.5},
            [
                f"preservation = blank {WHY} {TRAIN_LORA} --preservation=none.",
                f"masked_loss_prior = 0.5 {WHY} {TRAIN_LORA} --masked_loss_prior=0.",
            ],
        ),
        (
            {"preservation": "class"},
            [
                "preservation = class without preservation_trigger: expected the trigger word in captions. "
                "Give --preservation_trigger, such as the instance_prompt's rare word, or "
                "--preservation=blank.",
                "preservation = class without preservation_class, and no class_prompt in cats: expected the word that "
                "replaces the trigger. Give --preservation_class, such as dog, or --preservation=blank.",
            ],
        ),
        (
            {"preservation": "class", "preservation_trigger": "zwx", "preservation_class": "a zwx"},
            [
                "preservation_class = 'a zwx' contains preservation_trigger, 'zwx': "
                "expected a class without the trigger."
            ],
        ),
    ],
)
def test_preservation_that_cannot_be(place: Any, options: dict[str, Any], problems: list[str]) -> None:
    place.config |= options
    assert sorted(place.problems()) == sorted(problems)


def test_a_weight_of_0_asks_for_nothing(place: Any) -> None:
    place.config |= FULL | {"preservation": "class", "preservation_weight": 0}
    assert not place.load().config.preserves


def test_preservation_keys_without_effect_are_named(place: Any) -> None:
    place.config |= {"preservation_weight": 0.5, "preservation_trigger": "zwx", "preservation_class": "cat"}
    place.datasets[0]["class_prompt"] = "cat"
    assert place.load().notices == (
        "preservation_weight has no effect: preservation is none.",
        "preservation_trigger and preservation_class have no effect: preservation is none.",
        "class_prompt in cats has no effect: preservation class is off.",
    )


def test_a_regularization_set_is_for_a_lora_beside_another_set(place: Any) -> None:
    place.datasets[0]["is_regularisation_data"] = True
    (problem,) = place.problems()
    assert problem.endswith(
        "every image set has is_regularisation_data, so nothing would be learned: "
        "expected an enabled image set without it."
    )
    place.datasets.insert(0, place.datasets[0] | {"id": "dogs", "is_regularisation_data": False})
    assert len(place.load().datasets.train_sets) == 2
    place.config |= FULL
    assert place.problems() == [f"is_regularisation_data in cats {WHY} {TRAIN_LORA} no set is_regularisation_data."]
