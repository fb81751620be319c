"""Batches with reference images: what of which sample is in them, what drops them, and what the plan counts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.recipes.conftest import CONFIG, PICTURES, TEXT, Workplace
from tests.unit.train.test_batches import assert_same, builder

from simpletuner.config.load import load
from simpletuner.data.batch import Batch
from simpletuner.data.cache.contexts import context_key
from simpletuner.data.cache.latents import latent_key
from simpletuner.data.manifest import scan
from simpletuner.data.order import Order
from simpletuner.data.sample import Sample
from simpletuner.flux2.text import LeftPaddedCodec
from simpletuner.flux2.tokens import pack_latents, reference_ids
from simpletuner.train.budget import configured_workload, scanned_workload
from simpletuner.train.caches import UNCONDITIONAL_CAPTION, EncoderKeys, PreparedData
from simpletuner.train.job import largest_micro_batch

SIZES = {"0": (64, 64), "2.1": (96, 64), "2.2": (64, 64)}
"""Of references, by name: the first image has one, the third has two, the others have none."""


@pytest.fixture
def prepared(own_folder: Path) -> PreparedData:
    """Five images of 64 × 64, and caches of random tensors."""
    place = Workplace(own_folder, CONFIG | {"train_batch_size": 2, "caption_dropout_probability": 0.0})
    for folder, sizes in (("images", dict.fromkeys("01234", (64, 64))), ("references", SIZES)):
        (own_folder / folder).mkdir()
        for name, size in sizes.items():
            Image.new("RGB", size, (len(name), size[0], 0)).save(own_folder / folder / f"{name}.png")
    images = PICTURES | {"instance_data_dir": "images", "caption_strategy": "filename"}
    references: dict[str, Any] = {
        "id": "references",
        "type": "local",
        "dataset_type": "conditioning",
        "conditioning_type": "reference_loose",
        "instance_data_dir": "references",
        "resolution": 128,
        "cache_dir_vae": "cache/references",
    }
    place.datasets = [images | {"conditioning_data": "references"}, references, dict(TEXT)]
    place.write()
    loaded = load([], folder=own_folder, environ={})
    (image_set,) = loaded.datasets.train_sets
    manifest = scan(image_set, loaded.datasets.conditions_of(image_set), seed=0, workers=1)
    found = PreparedData(loaded, EncoderKeys(LeftPaddedCodec("text"), "vae"), (manifest,), ())
    generator = torch.Generator().manual_seed(0)
    sets = {each.id: each for each in (image_set, *loaded.datasets.conditioning_sets)}
    for sample in manifest.samples:
        for crop in (sample, *sample.references):
            width, height = (side // 16 for side in crop.geometry.target)
            latent = torch.randn(128, height, width, generator=generator)
            found.latent_store(sets[crop.dataset]).write(latent_key(crop, "vae"), {"latent": latent}, {})
    for caption in {UNCONDITIONAL_CAPTION, *(text for sample in manifest.samples for text in sample.captions)}:
        tensors = {"rows": torch.randn(2, 6), "pad": torch.zeros(6), "length": torch.tensor(4)}
        found.text_store(image_set).write(context_key(caption, found.encoders.text), tensors, {})
    return found


def with_options(prepared: PreparedData, **options: Any) -> PreparedData:
    config = prepared.loaded.config.model_copy(update=options)
    return dataclasses.replace(prepared, loaded=dataclasses.replace(prepared.loaded, config=config))


def batches(prepared: PreparedData, steps: int = 12) -> list[Batch]:
    build = builder(prepared, 1, rank=0, size=1)
    return [batch for step in range(1, steps + 1) for batch in build(step).batches]


def sample_of(prepared: PreparedData, name: str) -> Sample:
    return next(sample for sample in prepared.train[0].samples if f"{sample.dataset}/{sample.name}" == name)


def test_a_sample_has_its_references_in_their_order_and_others_are_padding(prepared: PreparedData) -> None:
    counts = set()
    for batch in batches(prepared):
        references = batch.condition.references
        samples = [sample_of(prepared, name) for name in batch.names]
        assert (references is None) == (not any(sample.references for sample in samples))
        if references is None:
            continue
        for index, (sample, images) in enumerate(zip(samples, prepared.references(samples), strict=True)):
            tokens = [pack_latents(image[None])[0] for image in images]
            length = sum(map(len, tokens))
            counts.add(length)
            assert references.token_mask[index].tolist() == [True] * length + [False] * (
                references.tokens.shape[1] - length
            )
            if images:
                assert torch.equal(references.tokens[index, :length], torch.cat(tokens))
                ids = [reference_ids(place, *image.shape[1:]) for place, image in enumerate(images)]
                assert torch.equal(references.ids[index, :length], torch.cat(ids))
                assert ids[0][0].tolist() == [10, 0, 0, 0]
            assert len(sample.references) == len(images)
    assert counts == {0, 16, 40}


def test_dropped_by_chance_they_are_not_there(prepared: PreparedData) -> None:
    """All that else is in a batch stays the same, whether references are dropped or not."""
    plain = batches(prepared, 40)
    none = batches(with_options(prepared, reference_dropout_probability=1.0), 40)
    some = batches(with_options(prepared, reference_dropout_probability=0.5), 40)
    for batch, dropped, mixed in zip(plain, none, some, strict=True):
        assert dropped.condition.references is None
        bare, other = (dataclasses.replace(each, condition=dropped.condition) for each in (batch, mixed))
        assert_same(bare, dropped)
        assert_same(other, dropped)
    kept = [
        sum(int(batch.condition.references.token_mask.any(1).sum()) for batch in each if batch.condition.references)
        for each in (plain, some)
    ]
    assert 0.25 * kept[0] < kept[1] < 0.75 * kept[0]


def test_ranks_share_the_draws(prepared: PreparedData) -> None:
    dropping = with_options(prepared, reference_dropout_probability=0.5)
    alone, other = builder(dropping, 2, rank=0, size=1), builder(dropping, 2, rank=1, size=2)
    for step in range(1, 9):
        assert_same(other(step).batches[0], alone(step).batches[1])


def test_held_out_samples_keep_theirs(prepared: PreparedData) -> None:
    build = builder(with_options(prepared, reference_dropout_probability=1.0), 1, rank=0, size=1)
    manifest = prepared.train[0]
    for sample in manifest.samples:
        for batch in build.held_out(manifest.image_set, sample).values():
            assert (batch.condition.references is not None) == bool(sample.references)


def test_the_trial_and_the_plan_have_the_most_references(prepared: PreparedData) -> None:
    loaded = prepared.loaded
    order = Order(prepared.train, seed=0, batch_size=2)
    names = [prepared.train[0].samples[visit.sample_index].name for visit in largest_micro_batch(order).visits]
    assert names[0] == "2.png"
    seen = scanned_workload(loaded, prepared.train)
    assert (seen.bucket, seen.batch, seen.references, seen.largest_encoded_size) == ((64, 64), 2, 24 + 16, (96, 64))
    assert seen.cached_images == 5 + 3
    assumed = configured_workload(loaded)
    assert (assumed.bucket, assumed.references, assumed.largest_encoded_size) == ((64, 64), 64, (128, 128))
