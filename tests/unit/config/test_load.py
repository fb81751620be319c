import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.config.load import RUN, load
from simpletuner.config.other_keys import OPTION_ALIASES, OPTION_NICKNAMES
from simpletuner.config.run import OPTION_NAMES

# `place` is a working folder whose configuration is right: see conftest.py.


def test_defaults_are_used_where_nothing_is_given(place: Any) -> None:
    loaded = place.load()
    assert loaded.config.lora_rank == 16
    assert loaded.origins["lora_rank"] == "default"
    assert loaded.origins["max_train_steps"] == "file"
    assert loaded.config_file == place.folder / "config" / "config.json"


def test_each_source_wins_over_the_one_before(place: Any) -> None:
    place.config |= {"lora_rank": 4, "learning_rate": 1e-3, "seed": 1}
    environ = {"SIMPLETUNER_LORA_RANK": "8", "SIMPLETUNER_LEARNING_RATE": "2e-3", "HOME": "/home/somebody"}
    loaded = place.load("--lora_rank=32", environ=environ)
    values = loaded.config
    assert (values.lora_rank, values.learning_rate, values.seed) == (32, 2e-3, 1)
    assert [loaded.origins[key] for key in ("lora_rank", "learning_rate", "seed", "lora_alpha")] == [
        "flag",
        "environment",
        "file",
        "default",
    ]


def test_keys_may_carry_dashes(place: Any) -> None:
    place.config["--flux_lora_target"] = "mlp"
    assert place.load().config.flux_lora_target == "mlp"


def test_a_key_with_and_without_dashes_is_two_answers(place: Any) -> None:
    place.config |= {"--lora_rank": 4, "lora_rank": 8}
    (problem,) = place.problems()
    assert problem == "--lora_rank and lora_rank are both given, and mean the same. Keep one of them."


def test_null_means_not_set(place: Any) -> None:
    place.config |= {"lora_rank": None, "lora_alpha": None, "tread_config": None}
    loaded = place.load()
    assert loaded.config.lora_rank == 16
    assert loaded.origins["lora_rank"] == "default"


def test_null_in_the_file_does_not_shadow_the_environment(place: Any) -> None:
    place.config["lora_rank"] = None
    assert place.load(environ={"SIMPLETUNER_LORA_RANK": "8"}).config.lora_rank == 8


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False)])
def test_true_and_false_as_text_are_booleans(place: Any, text: str, value: bool) -> None:
    place.config["gradient_checkpointing"] = text
    assert place.load().config.gradient_checkpointing is value


@pytest.mark.parametrize("value", ["yes", "True", "1", 1, 0, ""], ids=repr)
def test_nothing_else_is_a_boolean(problem_of: Callable[..., str], value: object) -> None:
    assert problem_of(gradient_checkpointing=value).endswith("expected true or false.")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", -1, "learning_rate = -1: expected a number above 0."),
        ("learning_rate", True, "learning_rate = true: expected a number above 0."),
        ("learning_rate", "1e-4", "learning_rate = '1e-4': expected a number above 0. Write it without quotes."),
        ("lora_rank", 1.5, "lora_rank = 1.5: expected a whole number of at least 1."),
        ("lora_rank", False, "lora_rank = false: expected a whole number of at least 1."),
        ("lora_rank", [16], "lora_rank = [16]: expected a whole number of at least 1."),
        ("caption_dropout_probability", 10, "caption_dropout_probability = 10: expected a number from 0 to 1."),
        ("flux_lora_target", "al", "flux_lora_target = 'al': expected all, attention, mlp or tiny."),
        ("mixed_precision", "BF16", "mixed_precision = 'BF16': expected no, bf16 or fp16."),
        ("output_dir", "", "output_dir = '': expected a path."),
        ("seed", -1, "seed = -1: expected a whole number from 0 to 2^63 - 1."),
        ("lora_dropout", 1, "lora_dropout = 1: expected a number of at least 0 and below 1."),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_expected(
    problem_of: Callable[..., str], key: str, value: object, message: str
) -> None:
    assert problem_of(**{key: value}) == message


def test_a_long_enumeration_comes_with_a_suggestion(problem_of: Callable[..., str]) -> None:
    assert problem_of(lr_scheduler="cosine_restarts").endswith("Did you mean cosine_with_restarts?")


def test_nan_is_not_a_number(place: Any) -> None:
    place.config = '{"model_flavour": "tiny", "learning_rate": NaN, "lora_alpha": Infinity}'
    assert place.problems() == [
        "learning_rate = NaN: expected a number above 0.",
        "lora_alpha = Infinity: expected a number above 0.",
    ]


def test_a_forgotten_minus_is_guessed(problem_of: Callable[..., str]) -> None:
    assert problem_of(learning_rate=1e4) == (
        "learning_rate = 10000: expected at most 1. 1e-5 to 1e-3 is usual: is a minus sign missing?"
    )


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("lora_rnak", "lora_rank"),
        ("learning-rate", "learning_rate"),
        ("Lora_Rank", "lora_rank"),
        ("max_train_step", "max_train_steps"),
        ("validation_step", "validation_step_interval"),
        ("enable_group_ofload", "enable_group_offload"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(problem_of: Callable[..., str], typo: str, meant: str) -> None:
    assert problem_of(**{typo: 1}) == f"{typo}: no such option. Did you mean {meant}?"


@pytest.mark.parametrize(
    ("word", "meant"), [("lr", "learning_rate"), ("rank", "lora_rank"), ("batch_size", "train_batch_size")]
)
def test_what_other_programs_say_is_understood_but_not_accepted(
    problem_of: Callable[..., str], word: str, meant: str
) -> None:
    assert problem_of(**{word: 1}) == f"{word}: no such option. Did you mean {meant}?"


def test_every_nickname_means_something_real() -> None:
    assert set(OPTION_NICKNAMES.values()) | set(OPTION_ALIASES.values()) <= set(OPTION_NAMES)
    assert not set(OPTION_NICKNAMES) & set(RUN.names)


def test_a_key_of_the_other_file_is_sent_there(place: Any) -> None:
    place.config["repeats"] = 1
    place.datasets[0]["lora_rank"] = 8
    place.datasets[1]["repeats"] = 8
    assert place.problems() == [
        "repeats: no such option. It belongs in multidatabackend.json, in each image set.",
        "config/multidatabackend.json, cats: lora_rank: no such key of an image set. It belongs in the config.",
        "config/multidatabackend.json, text: repeats: no such key of a text store. It belongs in an image set.",
    ]


def test_a_decimal_comma_is_seen(place: Any) -> None:
    assert place.problems("--learning_rate=0,001")[0].endswith("Write a decimal point, not a comma.")


def test_a_key_like_no_other_gets_no_guess(problem_of: Callable[..., str]) -> None:
    assert problem_of(zebra=1) == "zebra: no such option."


def test_an_option_is_spelled_as_it_was_typed(place: Any) -> None:
    place.config["--lora_rank"] = 0
    problems = place.problems("--train_batch_size", "0", "--sed=1", environ={"SIMPLETUNER_SEEED": "3"})
    assert problems == [
        "--lora_rank = 0: expected a whole number of at least 1.",
        "SIMPLETUNER_SEEED: no such option. Did you mean SIMPLETUNER_SEED?",
        "--train_batch_size = 0: expected a whole number of at least 1.",
        "--sed: no such option. Did you mean --seed?",
    ]


def test_numbers_from_flags_and_environment_are_exact(place: Any) -> None:
    loaded = place.load("--learning_rate", "5e-5", "--lora_alpha=8", environ={"SIMPLETUNER_SEED": "007"})
    assert (loaded.config.learning_rate, loaded.config.lora_alpha, loaded.config.seed) == (5e-5, 8.0, 7)
    assert place.problems("--seed=1.0", "--lora_rank=1_6", "--learning_rate=1e-4x", "--lora_alpha=nan") == [
        "--seed = '1.0': expected a whole number from 0 to 2^63 - 1.",
        "--lora_rank = '1_6': expected a whole number of at least 1.",
        "--learning_rate = '1e-4x': expected a number above 0.",
        "--lora_alpha = 'nan': expected a number above 0.",
    ]


def test_aliases_are_accepted_with_a_notice(place: Any) -> None:
    place.config |= {"validation_steps": 7, "save_total_limit": 3}
    loaded = place.load("--checkpointing_steps=9")
    values = loaded.config
    assert (values.validation_step_interval, values.checkpoints_total_limit, values.checkpoint_step_interval) == (
        7,
        3,
        9,
    )
    assert "validation_steps is read as validation_step_interval." in loaded.notices
    assert "--checkpointing_steps is read as checkpoint_step_interval." in loaded.notices


def test_an_alias_beside_its_name_is_two_answers(place: Any) -> None:
    place.config |= {"validation_steps": 7, "validation_step_interval": 8}
    assert "validation_steps and validation_step_interval are both given" in place.problems()[0]


def test_a_flavour_wins_over_paths_that_come_before_it(place: Any) -> None:
    place.config |= {"model_flavour": "dev", "pretrained_model_name_or_path": "black-forest-labs/FLUX.2-dev"}
    loaded = place.load("--model_flavour", "tiny")
    assert loaded.config.pretrained_model_name_or_path is None
    assert (
        "--model_flavour tiny overrides pretrained_model_name_or_path, given with lower precedence." in loaded.notices
    )
    both = place.load("--model_flavour", "tiny", "--pretrained_model_name_or_path", "some/model")
    assert both.config.pretrained_model_name_or_path == "some/model"


def test_dev_names_its_license(place: Any) -> None:
    place.config["model_flavour"] = "dev"
    assert any("non-commercial license" in notice for notice in place.load().notices)
    place.config["model_flavour"] = "tiny"
    assert place.load().notices == ()


@pytest.mark.parametrize("flavour", ["klein-4b", "klein-9b", "tiny-klein"])
def test_training_distilled_weights_is_warned_of_and_the_base_named(place: Any, flavour: str) -> None:
    place.config["model_flavour"] = f"{flavour}-distilled"
    (told,) = [notice for notice in place.load().notices if "gray, smooth blobs" in notice]
    assert f"Train --model_flavour {flavour};" in told
    place.config["model_flavour"] = flavour
    assert not any("blobs" in notice for notice in place.load().notices)


def test_paths_are_filled_in_and_joined(place: Any) -> None:
    place.config |= {"output_dir": "runs/{model_family}-{env:NAME}", "cache_dir": "{output_dir}/hub"}
    values = place.load(environ={"NAME": "one"}).config
    assert values.output_dir == str(place.folder / "runs/flux2-one")
    assert values.cache_dir == str(place.folder / "runs/flux2-one/hub")


def test_latest_is_a_word_and_not_a_path(place: Any) -> None:
    place.write("latest/x", "")
    assert place.load("--resume_from_checkpoint=latest").config.resume_from_checkpoint == "latest"
    assert place.load("--resume_from_checkpoint=").config.resume_from_checkpoint == ""
    assert place.load("--output_dir=latest").config.output_dir == str(place.folder / "latest")


def test_paths_stay_as_typed_in_the_working_folder(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place.load()
    monkeypatch.chdir(place.folder)
    loaded = load([], folder=Path(), environ={})
    assert loaded.config.output_dir == "output/flux2"
    assert loaded.datasets.train_sets[0].instance_data_dir == "datasets/cats"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{id}/x", "output_dir = '{id}/x': placeholder {id} is not one of {model_family} or {env:NAME}."),
        ("{env:NOPE}", "output_dir = '{env:NOPE}': the environment variable NOPE is not set."),
    ],
)
def test_an_unknown_placeholder_is_a_problem(problem_of: Callable[..., str], path: str, message: str) -> None:
    assert problem_of(output_dir=path) == message


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("$HOME/x", "--output_dir = '$HOME/x': $HOME is not replaced here: expected a path such as '{env:HOME}/x'."),
        ("a/${USER}",
         "--output_dir = 'a/${USER}': ${USER} is not replaced here: expected a path such as 'a/{env:USER}'."),
        ("x\r", "--output_dir = 'x\\r': expected text without control characters. "
         "Save the script or file it comes from with Unix line endings."),
        ("a\nb", "--output_dir = 'a\\nb': expected text without control characters. Remove them."),
        ("  ", "--output_dir = '  ': expected a path."),
    ],
)  # fmt: skip
def test_a_path_is_one_that_a_person_means(place: Any, typed: str, found: str) -> None:
    assert place.problems("--output_dir", typed) == [found]
    assert place.problems(environ={"SIMPLETUNER_OUTPUT_DIR": typed}) == [
        found.replace("--output_dir", "SIMPLETUNER_OUTPUT_DIR")
    ]
    written = found.partition("such as '")[2].partition("'")[0]
    if written:
        expected = place.folder / written.replace("{env:HOME}", "/home/me").replace("{env:USER}", "me")
        loaded = place.load("--output_dir", written, environ={"HOME": "/home/me", "USER": "me"})
        assert loaded.config.output_dir == str(expected)


def test_dollars_that_no_shell_would_replace_stay(place: Any) -> None:
    assert place.load("--output_dir", "C$/x").config.output_dir == str(place.folder / "C$/x")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_train_steps", "10\r"), ("mixed_precision", "bf16\r"), ("validation_prompt", "a cat\r"), ("config", "x\r")],
)
def test_a_carriage_return_at_the_end_of_any_value_is_seen(place: Any, flag: str, value: str) -> None:
    problem = place.problems(f"--{flag}", value)[0]
    assert problem.startswith(f"--{flag} = {value!r}: expected text without control characters.")


def test_lines_and_tabs_inside_a_prompt_are_text(place: Any) -> None:
    assert place.load("--validation_prompt", "a cat,\n\ta dog").config.validation_prompt == "a cat,\n\ta dog"


def test_a_model_is_a_path_only_where_it_looks_like_one_or_is_there(place: Any) -> None:
    place.write("models/mine/model_index.json", {})
    options = {"models/mine": True, "some/model": False, "./x": True, "a.safetensors": True}
    for text, is_path in options.items():
        place.config["pretrained_model_name_or_path"] = text
        found = place.load().config.pretrained_model_name_or_path
        assert found == (str(place.folder / text) if is_path else text)


@pytest.mark.parametrize("name", ["config.json", "config.toml", "config/config.json", "config/config.toml"])
def test_a_config_is_found_without_being_named(place: Any, name: str) -> None:
    place.config = None
    text = 'model_flavour = "tiny"\nseed = 3\n' if name.endswith("toml") else '{"model_flavour": "tiny", "seed": 3}'
    path = place.write(name, text)
    place.write(str(Path(name).with_name("multidatabackend.json")), place.datasets)
    loaded = place.load()
    assert loaded.config.seed == 3
    assert loaded.config_file == path


def test_the_working_folder_comes_before_config(place: Any) -> None:
    place.write(
        "config.json", {"model_flavour": "tiny", "seed": 1, "data_backend_config": "config/multidatabackend.json"}
    )
    assert place.load().config.seed == 1


def test_an_env_is_a_folder_in_config(place: Any) -> None:
    place.write("config/cats/config.json", {"model_flavour": "tiny", "seed": 9})
    place.write("config/cats/multidatabackend.json", place.datasets)
    assert place.load("--env", "cats").config.seed == 9
    assert place.problems("--env", "cat") == ["--env cat: there is no cat: expected cats."]


def test_a_config_may_be_named(place: Any) -> None:
    place.write("elsewhere/my.json", {"model_flavour": "tiny", "seed": 5})
    place.write("elsewhere/multidatabackend.json", place.datasets)
    assert place.load("--config", "elsewhere/my.json").config.seed == 5
    assert place.problems("--config=elsewhere") == [
        "--config elsewhere: this is a folder: expected the config file in it."
    ]
    assert place.problems("--config=nope.json", "--lora_rnak=1") == [
        "--config nope.json: no such file.",
        "--lora_rnak: no such option. Did you mean --lora_rank?",
    ]


def test_two_configs_are_one_too_many(place: Any) -> None:
    assert place.problems("--config=a.json", "--env=b") == [
        "--config and --env are given: expected one of them, since each selects the config."
    ]


def test_without_a_config_the_example_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--example tiny-lora"):
        load([], folder=tmp_path, environ={})


def test_flags_alone_may_say_everything(place: Any) -> None:
    place.config = None
    place.write("sets.json", place.datasets)
    place.datasets = None
    loaded = place.load("--data_backend_config", "sets.json", "--model_flavour", "tiny")
    assert loaded.config_file is None
    assert loaded.datasets.train_sets[0].id == "cats"


def test_the_example_is_right(tmp_path: Path) -> None:
    for part in ("train", "prior", "held-out"):
        (tmp_path / "datasets" / "tiny-lora" / part).mkdir(parents=True)
    loaded = load(["--example", "tiny-lora"], folder=tmp_path, environ={})
    assert loaded.config.model_flavour == "tiny"
    assert loaded.prompts
    assert loaded.notices == ()
    with pytest.raises(ConfigError, match=r"--example tiny: there is no tiny: expected tiny-lora\."):
        load(["--example", "tiny"], folder=tmp_path, environ={})


def test_all_files_are_reported_on_together(place: Any) -> None:
    place.config["lora_rnak"] = 1
    place.datasets[0] |= {"resolution": -1}
    place.write("config/user_prompt_library.json", {"a/b": "x"})
    problems = place.problems("--learning_rate=0")
    assert len(problems) == 4
    assert any(text.startswith("config/multidatabackend.json, cats: resolution = -1") for text in problems)
    assert any(text.startswith("config/user_prompt_library.json: the name 'a/b'") for text in problems)


def test_a_broken_config_does_not_hide_the_rest(place: Any) -> None:
    place.config = '{"lora_rank": 8,}'
    place.datasets = "[\n  {'id': 1}\n]"
    problems = place.problems("--learning_rate=0")
    assert problems[0].startswith("config/config.json, line 1, column ")
    assert problems[1] == "--learning_rate = 0.0: expected a number above 0."
    assert problems[2].startswith("config/multidatabackend.json, line 2, column ")


@pytest.mark.parametrize("content", [[], 3, "text"])
def test_a_config_is_an_object(place: Any, content: object) -> None:
    place.config = json.dumps(content)
    assert place.problems()[0].startswith(f"config/config.json: {content!r}: expected an object")


def test_a_missing_list_of_datasets_is_named(place: Any) -> None:
    place.datasets = None
    assert place.problems() == [
        "config/multidatabackend.json: no such file: expected the dataset list. "
        "Write it, or name another with data_backend_config."
    ]
    assert place.problems("--data_backend_config=sets.json") == ["--data_backend_config = 'sets.json': no such file."]


def test_a_json_valued_option_takes_a_value_inline_text_or_a_file(place: Any) -> None:
    place.write("targets.json", ["to_q", "to_k"])
    place.config["peft_lora_target_modules"] = ["to_q", "to_k"]
    expected = ("to_q", "to_k")
    assert place.load().config.peft_lora_target_modules == expected
    assert place.load('--peft_lora_target_modules=["to_q", "to_k"]').config.peft_lora_target_modules == expected
    assert place.load("--peft_lora_target_modules", "targets.json").config.peft_lora_target_modules == expected
    assert place.load("--peft_lora_target_modules", r".*\.to_q").config.peft_lora_target_modules == r".*\.to_q"
    assert place.problems("--peft_lora_target_modules=nope.json") == [
        "--peft_lora_target_modules = 'nope.json': no such file."
    ]
    assert place.problems("--peft_lora_target_modules=(") == [
        "--peft_lora_target_modules = '(': expected a list of module names, such as to_q,to_k or "
        '["to_q", "to_k"], or a regular expression.'
    ]


def test_optimizer_arguments_are_pairs_or_an_object(place: Any) -> None:
    assert place.load("--optimizer_config=amsgrad=true,fused=false").config.optimizer_config == {
        "amsgrad": True,
        "fused": False,
    }
    place.config["optimizer_config"] = {"amsgrad": True}
    assert place.load().config.optimizer_config == {"amsgrad": True}
    place.config["optimizer_config"] = {"amsgard": True}
    assert place.problems() == ["optimizer_config: adamw takes no 'amsgard' here: expected amsgrad, foreach or fused."]
    place.config["optimizer_config"] = "amsgrad"
    assert "expected k=v,k=v or an object" in place.problems()[0]


@pytest.mark.parametrize("text", ["to_q,to_k", "to_q, to_k", '["to_q", "to_k"]'])
def test_a_list_in_a_flag_is_a_list(place: Any, text: str) -> None:
    expected = ("to_q", "to_k")
    assert place.load("--peft_lora_target_modules", text).config.peft_lora_target_modules == expected
    environ = {"SIMPLETUNER_PEFT_LORA_TARGET_MODULES": text}
    assert place.load(environ=environ).config.peft_lora_target_modules == expected
    place.config["peft_lora_target_modules"] = text
    assert place.load().config.peft_lora_target_modules == expected


def test_a_single_name_is_a_list_of_one_and_a_pattern_stays_one(place: Any) -> None:
    assert place.load("--peft_lora_target_modules=to_q").config.peft_lora_target_modules == ("to_q",)
    assert place.load("--peft_lora_target_modules=attn.to_q").config.peft_lora_target_modules == ("attn.to_q",)
    pattern = r".*attn\.(to_q|to_k){1,2}"
    assert place.load("--peft_lora_target_modules", pattern).config.peft_lora_target_modules == pattern


@pytest.mark.parametrize("text", ["to_q,,to_k", "[to_q,to_k]", "", "("])
def test_a_broken_list_of_modules_names_both_forms(place: Any, text: str) -> None:
    (problem,) = place.problems(f"--peft_lora_target_modules={text}")
    assert problem.endswith(
        'expected a list of module names, such as to_q,to_k or ["to_q", "to_k"], or a regular expression.'
    )


@pytest.mark.parametrize("text", ["338,548", "[338, 548]"])
def test_numbers_in_a_flag_are_a_list_too(place: Any, text: str) -> None:
    assert place.load(f"--flow_custom_timesteps={text}").config.flow_custom_timesteps == (338.0, 548.0)
    layers = place.load(f"--custom_text_encoder_intermediary_layers={text}").config
    assert layers.custom_text_encoder_intermediary_layers == (338, 548)
