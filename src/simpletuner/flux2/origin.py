"""Extract a weight file's origin from its header: training program, base model and training details."""

import json
import re
from collections.abc import Mapping
from typing import Any

from simpletuner.config.flavours import flavour_of_base

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "title": ("modelspec.title", "ss_output_name", "name"),
    "author": ("modelspec.author",),
    "date": ("modelspec.date",),
    "trigger words": ("modelspec.trigger_phrase", "ss_trigger_word", "trigger_word"),
    "license": ("modelspec.license", "simpletuner.licence"),
    "comment": ("simpletuner.comment", "modelspec.description", "ss_training_comment"),
    "architecture": ("modelspec.architecture",),
    "step": ("simpletuner.step", "training_info.step", "ss_steps"),
    "epoch": ("training_info.epoch", "ss_epoch"),
    "rank": ("ss_network_dim", "ot_config.lora_rank"),
    "alpha": ("simpletuner.alpha", "ss_network_alpha", "ot_config.lora_alpha"),
    "target": ("simpletuner.target",),
    "learning rate": ("ss_learning_rate", "ot_config.learning_rate"),
    "optimizer": ("ss_optimizer", "ot_config.optimizer.optimizer"),
    "resolution": ("modelspec.resolution", "ss_resolution", "ot_config.resolution"),
    "images": ("ss_num_train_images",),
    "batch size": ("ss_total_batch_size", "ss_batch_size_per_device", "ot_config.batch_size"),
    "precision": ("ss_mixed_precision", "ot_config.train_dtype"),
    "seed": ("ss_seed",),
    "dataset fingerprint": ("simpletuner.datasets",),
    "merged from": ("simpletuner.merged",),
}
"""Header fields that provide each row of the report: ours, sai_model_spec's, kohya's, ai-toolkit's and OneTrainer's.

A dot after a field's name selects a key of the JSON object in that field.
"""
_BASES = ("simpletuner.base_model", "ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
"""Header fields that name the base model, in order of preference."""
_FREE_NAMES = ("simpletuner.base_model", "ss_sd_model_name")
"""Fields of `_BASES` that hold a Hub id or the name of a folder or file, which may be arbitrary."""
_LENGTH_LIMIT = 300
_FLUX2 = re.compile(r"flux[-_. ]?2(?P<rest>.*)")


def training_of(header: Mapping[str, str]) -> dict[str, str]:
    """The training details of a file, in report order, without those that the header lacks."""
    details = {"program": program} if (program := _program(header)) else {}
    for title, names in _FIELDS.items():
        value = next((text for name in names if (text := _value(header, name))), "")
        if value and value != "None":
            details[title] = value
    return details


def base_model_of(header: Mapping[str, str]) -> str | None:
    """The base model of a file: a flavour's name if the header identifies one, else the text of the header."""
    for name in _BASES:
        text = _value(header, name)
        if not text:
            continue
        flavour = flavour_of_base(text)
        if flavour is not None:
            return flavour.name
        if name in _FREE_NAMES:
            return text
        if match := _FLUX2.search(text.lower()):
            size = re.search(r"klein.*?(4b|9b)", match["rest"])
            return "dev" if "klein" not in match["rest"] else f"klein-{size[1]}" if size else text
        if name != "modelspec.architecture":
            return text
    return None


def _program(header: Mapping[str, str]) -> str:
    if version := _value(header, "simpletuner.version"):
        return f"simpletuner {version}"
    if software := _value(header, "software.name"):
        return f"{software} {_value(header, 'software.version')}".strip()
    if "ot_branch" in header or "ot_revision" in header:
        return f"OneTrainer {_value(header, 'ot_revision')[:8]}".strip()
    if network := _value(header, "ss_network_module"):
        return f"a trainer of kohya's family ({network})"
    return _value(header, "modelspec.implementation")


def _value(header: Mapping[str, str], name: str) -> str:
    """The text of a field, or of a value inside a field's JSON object; empty if there is none."""
    if name in header:
        return _one_line(_decoded(header[name]))
    field, *path = name.split(".")
    value: Any = _decoded(header.get(field, ""))
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None or not path else _one_line(value)


def _decoded(text: str) -> Any:
    """The JSON value in `text`, with numbers as strings in their original spelling; `text` itself if it is not JSON."""
    try:
        return json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return text


def _one_line(value: object) -> str:
    """`value` as one line without control characters, truncated to `_LENGTH_LIMIT` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = "".join(character if character.isprintable() else " " for character in text).strip()
    return line if len(line) <= _LENGTH_LIMIT else line[: _LENGTH_LIMIT - 1] + "…"
