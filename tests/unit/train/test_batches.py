"""Global batches: two ranks together see what one process with twice the accumulation steps sees."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.recipes.conftest import CONFIG, PICTURES, TEXT, Workplace
from torch import Tensor

from simpletuner.config.load import load
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.data.cache.contexts import context_key
from simpletuner.data.cache.latents import latent_key
from simpletuner.data.manifest import scan
from simpletuner.data.order import Order
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.text import LeftPaddedCodec
from simpletuner.train.batches import BatchBuilder
from simpletuner.train.caches import UNCONDITIONAL_CAPTION, Encoders, Prepared
from simpletuner.train.rollout import Rollout
from simpletuner.train.step import Objective
from simpletuner.train.strata import Strata
from simpletuner.train.world import World

OPTIONS: dict[str, Any] = {
    "train_batch_size": 2,
    "caption_dropout_probability": 0.4,
    "flux_guidance_mode": "random-range",
    "flux_guidance_min": 1.0,
    "flux_guidance_max": 4.0,
    "timestep_strata": True,
    "scheduled_sampling_max_step_offset": 500,
    "scheduled_sampling_probability": 0.5,
}
WIDTH = 6
"""Of a context's rows."""


@pytest.fixture
def prepared(own_folder: Path) -> Prepared:
    """Two sets with batches of 2 and 3, three captions an image, and caches of random tensors."""
    place = Workplace(own_folder, CONFIG | OPTIONS)
    sets: dict[str, dict[str, Any]] = {"a": {"repeats": 1}, "b": {"train_batch_size": 3, "probability": 0.5}}
    place.datasets = [dict(TEXT)]
    for name, keys in sets.items():
        folder = own_folder / name
        folder.mkdir()
        for index in range(7):
            Image.new("RGB", ((64, 64), (96, 64))[index % 2], (index, 0, 0)).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(
                "\n".join(f"{name} {index} {word}" for word in ("one", "two", "three"))
            )
        place.datasets.append(
            PICTURES | keys | {"id": name, "instance_data_dir": name, "cache_dir_vae": f"cache/{name}"}
        )
    place.write()
    loaded = load([], folder=own_folder, environ={})
    manifests = tuple(scan(image_set, seed=0, workers=1) for image_set in loaded.datasets.train_sets)
    found = Prepared(loaded, Encoders(LeftPaddedCodec("text"), "vae"), manifests, ())
    generator = torch.Generator().manual_seed(0)
    for manifest in manifests:
        texts = found.text_store(manifest.image_set)
        for sample in manifest.samples:
            width, height = (side // 16 for side in sample.geometry.target)
            latent = torch.randn(128, height, width, generator=generator)
            found.latent_store(manifest.image_set).write(latent_key(sample, "vae"), {"latent": latent}, {})
        captions = {caption for sample in manifest.samples for caption in sample.captions}
        for caption in sorted(captions | {UNCONDITIONAL_CAPTION}):
            rows, pad = torch.randn(2, WIDTH, generator=generator), torch.zeros(WIDTH)
            tensors = {"rows": rows, "pad": pad, "length": torch.tensor(4)}
            texts.write(context_key(caption, found.encoders.text), tensors, {})
    return found


def builder(prepared: Prepared, batches_per_step: int, rank: int, size: int) -> BatchBuilder:
    config = prepared.loaded.config
    order = Order(prepared.train, seed=config.seed, batch_size=config.train_batch_size)
    strata = Strata(order, seed=config.seed, batches_per_step=batches_per_step)
    return BatchBuilder(
        config,
        prepared,
        order,
        Objective.of(config, config, config.seed, strata),
        Rollout.of(config, config.seed),
        batches_per_step=batches_per_step,
        world=World(rank, size, torch.device("cpu")),
    )


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a dataclass, those inside of its fields too, by its path."""
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        inner, path = getattr(value, field.name), f"{name}.{field.name}"
        if isinstance(inner, Tensor):
            yield path, inner
        elif dataclasses.is_dataclass(inner):
            yield from tensors_of(inner, path)


def assert_same(found: Batch, expected: Batch) -> None:
    """Bit for bit, in every field."""
    for (name, mine), (other_name, other) in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert name == other_name
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other), name
    for name in ("names", "slots", "rollout_lengths"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_two_ranks_are_two_accumulation_steps(prepared: Prepared, accumulation: int) -> None:
    alone = builder(prepared, 2 * accumulation, rank=0, size=1)
    ranks = [builder(prepared, 2 * accumulation, rank=rank, size=2) for rank in range(2)]
    epochs = set()
    for step in range(1, 9):
        whole = alone(step)
        shares = [rank(step) for rank in ranks]
        assert len(whole.batches) == 2 * accumulation
        for place, batch in enumerate(whole.batches):
            assert_same(shares[place % 2].batches[place // 2], batch)
        for share in shares:
            assert len(share.batches) == accumulation
            assert (share.step, share.epoch, share.size) == (step, whole.epoch, whole.size)
        assert whole.size == sum(len(batch.names) for batch in whole.batches)
        epochs.add(whole.epoch)
    assert len(epochs) > 1, "steps of several epochs"


def test_the_draws_of_a_global_batch_all_differ(prepared: Prepared) -> None:
    """So that equal ranks do not merely show equal constants."""
    whole = builder(prepared, 6, rank=0, size=1)(1)
    assert [slot for batch in whole.batches for slot in batch.slots] == list(range(whole.size))
    for draws in ("sigma", "noise"):
        drawn = [tuple(value.flatten().tolist()) for batch in whole.batches for value in getattr(batch, draws)]
        assert len(set(drawn)) == whole.size
    guidance = torch.cat([batch.condition.guidance for batch in whole.batches])
    assert len(guidance.unique()) == whole.size
    assert {len(batch.names) for batch in whole.batches} == {2, 3}
    assert len({length for batch in whole.batches for length in batch.rollout_lengths}) > 2


@pytest.fixture
def batch() -> Batch:
    """A batch with a value in every field."""
    context = TextContext(torch.randn(5, WIDTH), torch.tensor([[0, 1, 2], [3, 3, 4]]))
    return Batch(
        latents=torch.randn(2, 128, 3, 4),
        condition=Condition(context, torch.tensor([1.0, 3.5])),
        sigma=torch.rand(2),
        noise=torch.randn(2, 128, 3, 4),
        names=("a/1.png", "a/2.png"),
        weights=torch.tensor([1.0, 0.5]),
        slots=range(4, 6),
        rollout_lengths=(0, 20),
        masks=torch.rand(2, 3, 4),
    )


TENSORS = {
    ".latents",
    ".condition.context.rows",
    ".condition.context.index",
    ".condition.guidance",
    ".sigma",
    ".noise",
    ".weights",
    ".masks",
}


def test_a_batch_moves_with_all_of_its_fields(batch: Batch) -> None:
    assert_same(batch.to(torch.device("cpu"), non_blocking=True), batch)
    moved = batch.to(torch.device("meta"))
    assert {name for name, tensor in tensors_of(moved) if tensor.is_meta} == TENSORS
    for (_, found), (_, expected) in zip(tensors_of(moved), tensors_of(batch), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert (moved.names, moved.slots, moved.rollout_lengths) == (batch.names, batch.slots, batch.rollout_lengths)
    unmasked = dataclasses.replace(batch, masks=None)
    assert unmasked.to(torch.device("meta")).masks is None


def test_a_batch_is_pinned_with_all_of_its_fields(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch pins nothing without an accelerator, so a copy stands for the pinned tensor."""
    copies: list[Tensor] = []

    def pinned(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    whole = GlobalBatch(3, 1, (batch,), 2).pin_memory()
    assert (whole.step, whole.epoch, whole.size) == (3, 1, 2)
    assert_same(whole.batches[0], batch)
    is_copy = {name: any(tensor is copy for copy in copies) for name, tensor in tensors_of(whole.batches[0])}
    assert is_copy == dict.fromkeys(TENSORS, True)
