"""Locate a base model once on each machine: one process queries the Hub, and downloads or creates the files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpletuner.base.errors import AccessError
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.values import join_names
from simpletuner.flux2.source import Source, Weights
from simpletuner.memory.machines import differing_machine
from simpletuner.memory.world import World


def locate_on_each_machine(world: World, find: Callable[[], Source]) -> Source:
    """The result of `find`, which only the first rank of each machine calls, on all ranks of that machine.

    All ranks use the same files, even if a branch on the Hub moves meanwhile. The other ranks wait for as long as a
    download takes. Their `hashes` are empty and have no ledger, since only the first ranks hash files.

    Raises:
        AccessError: another machine located another model.
    """
    source = world.run_on_each_machine(
        "the files of the base model", find, record=source_record, restore=recorded_source
    )
    if world.machine_world is not None:
        check_same_model(world, {"transformer": source.fingerprint("transformer")})
    return source


def check_same_model(world: World, fingerprints: Mapping[str, str]) -> None:
    """Raise an AccessError, on all ranks, if the `fingerprints` of a machine's files differ from machine 0's."""
    difference = differing_machine(world, dict(fingerprints))
    if difference is not None:
        machine, (ours, theirs) = difference
        parts = [name for name in ours if ours[name] != theirs.get(name)]
        raise AccessError.of(
            f"machine {machine} has another base model than machine 0 (different {join_names(parts, 'and')})",
            "the same files and options on every machine",
            "Copy machine 0's files there, or name a folder that all machines share.",
        )


def source_record(source: Source) -> dict[str, Any]:
    """`source` as a JSON value, without its hashes."""
    return {
        "name": source.name,
        "flavour": source.flavour.name,
        "commit": source.commit,
        "transformer": _weights_record(source.transformer),
        "vae": _weights_record(source.vae),
        "text_encoder": _weights_record(source.text_encoder),
        "tokenizer": str(source.tokenizer),
        "text_layers": source.text_layers,
        "text_length": source.text_length,
        "pipeline": None if source.pipeline is None else str(source.pipeline),
        "is_distilled": source.is_distilled,
    }


def recorded_source(record: dict[str, Any]) -> Source:
    """The source that `source_record` turned into `record`."""
    pipeline = record["pipeline"]
    return Source(
        name=record["name"],
        flavour=FLAVOURS[record["flavour"]],
        commit=record["commit"],
        transformer=_recorded_weights(record["transformer"]),
        vae=_recorded_weights(record["vae"]),
        text_encoder=_recorded_weights(record["text_encoder"]),
        tokenizer=Path(record["tokenizer"]),
        text_layers=tuple(record["text_layers"]),
        text_length=record["text_length"],
        pipeline=None if pipeline is None else Path(pipeline),
        is_distilled=record["is_distilled"],
    )


def _weights_record(weights: Weights) -> dict[str, Any]:
    return {"files": [str(file) for file in weights.files], "config": weights.config}


def _recorded_weights(record: dict[str, Any]) -> Weights:
    return Weights(tuple(map(Path, record["files"])), record["config"])
