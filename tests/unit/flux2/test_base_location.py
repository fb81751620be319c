"""What rank 0 found of a base model, on the other ranks."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tests.loopback_hub import LoopbackHub
from tests.thread_ranks import on_ranks

from simpletuner.base.errors import AccessError
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.base_location import locate_on_each_machine, recorded_source, source_record
from simpletuner.flux2.source import Source, Weights, locate
from simpletuner.memory.world import World


def test_a_record_makes_the_same_source(embedded_source: Source) -> None:
    single = replace(
        embedded_source,
        commit="abc",
        transformer=Weights(embedded_source.transformer.files, None),
        pipeline=None,
        is_distilled=True,
    )
    for source in (embedded_source, single):
        other = recorded_source(json.loads(json.dumps(source_record(source))))
        assert other == source
        assert other.fingerprint("text_encoder") == source.fingerprint("text_encoder")


def test_one_rank_asks_the_hub_and_downloads(hub: LoopbackHub, tmp_path: Path) -> None:
    told: list[str] = []

    def find(world: World, cache: str) -> Source:
        options = ModelOptions(
            model_flavour="tiny", pretrained_model_name_or_path="acme/flux2", cache_dir=str(tmp_path / cache)
        )
        return locate_on_each_machine(
            world, lambda: locate(options, report=told.append, environ={"HF_ENDPOINT": hub.url})
        )

    (alone,) = on_ranks(1, lambda world: find(world, "alone"))
    requests, listings, lines = Counter(hub.requests), Counter(hub.listings), len(told)
    for heard in (hub.requests, hub.listings, told):
        heard.clear()
    first, *others = on_ranks(3, lambda world: find(world, "three"))
    assert others == [first, first]
    assert all(file.is_file() for file in first.transformer.files)
    assert Counter(hub.requests) == requests
    assert hub.listings == listings
    assert len(told) == lines
    assert first.commit == alone.commit


def test_what_cannot_be_found_is_raised_on_rank_0(tmp_path: Path) -> None:
    options = ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tmp_path))
    with pytest.raises(AccessError, match=r"lacks transformer/config\.json"):
        on_ranks(2, lambda world: locate_on_each_machine(world, lambda: locate(options, report=print)))
