"""Read and check the JSON files of a model folder. Errors name a bad file before any weight is loaded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from simpletuner.base.errors import AccessError, Problem
from simpletuner.base.files import file_errors_reported, read_json

Component = Literal["transformer", "vae", "text_encoder"]
Config = dict[str, Any]

SIZE_LIMIT = 2**24
"""Larger than every width, vocabulary and length of an existing model."""
LAYER_LIMIT = 1000


def _integer(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 16 and all(map(_integer(1, SIZE_LIMIT), value))


_EXPECTED: Mapping[str, Callable[[object], bool]] = {
    f"a whole number from 1 to {SIZE_LIMIT:,}": _integer(1, SIZE_LIMIT),
    f"a whole number from 1 to {LAYER_LIMIT:,}": _integer(1, LAYER_LIMIT),
    "a number of 0 or more": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "a string": lambda value: isinstance(value, str),
    "a list of whole numbers from 1": _are_sizes,
    "a list of strings": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "an object": lambda value: isinstance(value, dict),
}
"""Check of a field's value, by the expectation that an error message names."""
_SIZE, _LAYERS, _NUMBER, _FLAG, _TEXT, _SIZES, _TEXTS, _OBJECT = _EXPECTED

_FIELDS: Mapping[Component, Mapping[str, str]] = {
    "transformer": {
        **dict.fromkeys(("patch_size", "in_channels", "attention_head_dim", "num_attention_heads"), _SIZE),
        **dict.fromkeys(("joint_attention_dim", "timestep_guidance_channels"), _SIZE),
        **dict.fromkeys(("num_layers", "num_single_layers"), _LAYERS),
        **dict.fromkeys(("mlp_ratio", "rope_theta", "eps"), _NUMBER),
        "axes_dims_rope": _SIZES,
        "guidance_embeds": _FLAG,
    },
    "vae": {
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size"), _SIZE),
        **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), _FLAG),
        **dict.fromkeys(("batch_norm_eps", "batch_norm_momentum"), _NUMBER),
        **dict.fromkeys(("block_out_channels", "decoder_block_out_channels", "patch_size"), _SIZES),
        **dict.fromkeys(("down_block_types", "up_block_types"), _TEXTS),
        "layers_per_block": _LAYERS,
        "act_fn": _TEXT,
    },
    "text_encoder": {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), _SIZE),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), _SIZE),
        **dict.fromkeys(("rms_norm_eps", "rope_theta", "attention_dropout"), _NUMBER),
        "num_hidden_layers": _LAYERS,
        "hidden_act": _TEXT,
        "rope_parameters": _OBJECT,
        "tie_word_embeddings": _FLAG,
    },
}
"""Expected values of the fields that determine a component's architecture. Other fields are not checked here."""
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Required fields of a text encoder. Other components have defaults."""
_KNOWN_TEXT_ENCODERS = ("mistral3", "mistral", "qwen3")
_MAY_BE_NULL = ("rope_theta", "head_dim", "decoder_block_out_channels")


def read_object(path: Path) -> Config:
    """The JSON object in `path`.

    Raises:
        AccessError: the file cannot be read, or is not a JSON object.
    """
    with file_errors_reported(path, AccessError, doing="read"):
        try:
            value = read_json(path)
        except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
            reason = f", line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
            finding = f"{path} is not JSON{reason}" if path.stat().st_size else f"{path} is empty"
            raise AccessError.of(finding, "a JSON object", _GET_AGAIN) from None
    if not isinstance(value, dict):
        raise AccessError.of(f"{path} holds {_excerpt(value)}", "a JSON object", _GET_AGAIN)
    return value


def read_component_config(component: Component, path: Path) -> Config:
    """The checked `config.json` of a component.

    Raises:
        AccessError: it cannot be read, or values have the wrong type or size; the error lists all of them.
    """
    config = read_object(path)
    fields = config
    problems: list[Problem] = []
    # Other text encoders have other fields; `locate` rejects them by their model_type.
    required = _REQUIRED if component == "text_encoder" and config.get("model_type") in _KNOWN_TEXT_ENCODERS else ()
    if component == "text_encoder" and "text_config" in config:
        fields = config["text_config"] if isinstance(config["text_config"], dict) else {}
        if not isinstance(config["text_config"], dict):
            problems.append(_value_problem(path, "text_config", config["text_config"], _OBJECT))
    if "quantization_config" in config:
        problems.append(
            Problem(
                f"{path} describes quantized weights (quantization_config)",
                "weights in bf16, fp16 or fp32",
                "Name the model that is not quantized: base_model_precision and text_encoder_1_precision quantize "
                "it while it is loaded.",
            )
        )
    for name, expected in _FIELDS[component].items():
        if name in fields:
            is_null = fields[name] is None and component != "transformer" and name in _MAY_BE_NULL
            if not is_null and not _EXPECTED[expected](fields[name]):
                problems.append(_value_problem(path, name, fields[name], expected))
        elif name in required:
            problems.append(Problem(f"{path} has no {name}", expected, _GET_AGAIN))
    AccessError.raise_if(problems)
    return config


def read_index(path: Path) -> dict[str, str]:
    """The file name of each tensor's shard, from an `….safetensors.index.json`.

    Raises:
        AccessError: the index cannot be read, or names anything but a safetensors file in its folder.
    """
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise AccessError.of(
            f"{path} has weight_map = {_excerpt(shards)}", "an object that maps tensors to files", _GET_AGAIN
        )
    for tensor, shard in shards.items():
        is_file_name = isinstance(shard, str) and PurePosixPath(shard).name == shard and "\\" not in shard
        if not is_file_name or "\0" in shard or not shard.endswith(".safetensors"):
            raise AccessError.of(
                f"{path} maps {tensor} to {_excerpt(shard)}", "a .safetensors file in the same folder", _GET_AGAIN
            )
    return shards


def check_tokenizer(folder: Path, names: tuple[str, ...]) -> None:
    """Raise an AccessError unless the `names` in `folder` are JSON objects (.json) or UTF-8 text (others)."""
    for name in names:
        path = folder / name
        if name.endswith(".json"):
            model = read_object(path).get("model")
            vocabulary = model.get("vocab") if isinstance(model, dict) else None
            if name == "tokenizer.json" and not (isinstance(vocabulary, dict | list) and vocabulary):
                raise AccessError.of(f"{path} has no vocabulary (model.vocab)", "a fast tokenizer", _GET_AGAIN)
        else:
            with file_errors_reported(path, AccessError, doing="read"):
                try:
                    path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    raise AccessError.of(f"{path} is not UTF-8 text", "a chat template", _GET_AGAIN) from None


_GET_AGAIN = "It may be damaged or written by another program: get the file again."


def _value_problem(path: Path, name: str, value: object, expected: str) -> Problem:
    return Problem(f"{path} has {name} = {_excerpt(value)}", expected, _GET_AGAIN)


def _excerpt(value: object) -> str:
    """`value` as JSON, at most 60 characters, for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
