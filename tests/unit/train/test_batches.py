"""Global batches: two ranks together see what one process with twice the accumulation steps sees."""

import dataclasses
import threading
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
from simpletuner.data.preserved import PreservedPrompts
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.rollout import RolloutStarts
from simpletuner.flux2.routes import Route
from simpletuner.flux2.text import LeftPaddedCodec
from simpletuner.memory.world import World
from simpletuner.train.batches import BatchBuilder
from simpletuner.train.caches import UNCONDITIONAL_CAPTION, EncoderKeys, PreparedData
from simpletuner.train.loop import batches_of
from simpletuner.train.rollout import Rollout
from simpletuner.train.step import Objective
from simpletuner.train.strata import Strata

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
def prepared(own_folder: Path) -> PreparedData:
    """Two sets with batches of 2 and 3, three captions an image, and caches of random tensors."""
    return prepared_in(own_folder)


def prepared_in(own_folder: Path, options: dict[str, Any] | None = None, **of_b: Any) -> PreparedData:
    """The same with more options, and more keys of set b."""
    place = Workplace(own_folder, CONFIG | OPTIONS | (options or {}))
    sets: dict[str, dict[str, Any]] = {"a": {"repeats": 1}, "b": {"train_batch_size": 3, "probability": 0.5} | of_b}
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
    found = PreparedData(loaded, EncoderKeys(LeftPaddedCodec("text"), "vae"), manifests, ())
    generator = torch.Generator().manual_seed(0)
    for manifest in manifests:
        texts = found.text_store(manifest.image_set)
        for sample in manifest.samples:
            width, height = (side // 16 for side in sample.geometry.target)
            latent = torch.randn(128, height, width, generator=generator)
            found.latent_store(manifest.image_set).write(latent_key(sample, "vae"), {"latent": latent}, {})
        captions = {caption for sample in manifest.samples for caption in sample.captions}
        captions.update(PreservedPrompts(loaded.config).all_of(manifest))
        for caption in sorted(captions | {UNCONDITIONAL_CAPTION}):
            rows, pad = torch.randn(2, WIDTH, generator=generator), torch.zeros(WIDTH)
            tensors = {"rows": rows, "pad": pad, "length": torch.tensor(4)}
            texts.write(context_key(caption, found.encoders.text), tensors, {})
    return found


def builder(prepared: PreparedData, batches_per_step: int, rank: int, size: int) -> BatchBuilder:
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
        routes=(Route(0, 1, 0.5), Route(3, 4, 0.25)),
    )


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a dataclass or tuple, those inside of its fields too, by its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name), f"{name}.{field.name}")


def assert_same(found: Batch, expected: Batch) -> None:
    """Bit for bit, in every field."""
    for (name, mine), (other_name, other) in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert name == other_name
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other), name
    assert (found.names, found.slots) == (expected.names, expected.slots)
    assert found.is_regularization == expected.is_regularization
    places = [[(choice.start, choice.end) for choice in batch.choices] for batch in (found, expected)]
    assert places[0] == places[1]


PRESERVING = {"preservation": "class", "preservation_trigger": "two", "preservation_class": "2"}


@pytest.mark.parametrize(
    ("accumulation", "preserves"),
    [
        (1, False),
        (3, True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, True), (2, False), (2, True), (3, False))),
    ],
)
def test_two_ranks_are_two_accumulation_steps(own_folder: Path, accumulation: int, preserves: bool) -> None:
    prepared = prepared_in(own_folder, PRESERVING if preserves else {}, is_regularisation_data=preserves)
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


def test_the_draws_of_a_global_batch_all_differ(prepared: PreparedData) -> None:
    """So that equal ranks do not merely show equal constants."""
    whole = builder(prepared, 6, rank=0, size=1)(1)
    assert [slot for batch in whole.batches for slot in batch.slots] == list(range(whole.size))
    for draws in ("sigma", "noise"):
        drawn = [tuple(value.flatten().tolist()) for batch in whole.batches for value in getattr(batch, draws)]
        assert len(set(drawn)) == whole.size
    kept = [tuple(row.tolist()) for batch in whole.batches for choice in batch.choices for row in choice.kept_tokens]
    assert len(set(kept)) == 2 * whole.size
    guidance = torch.cat([batch.condition.guidance for batch in whole.batches])
    assert len(guidance.unique()) == whole.size
    assert {len(batch.names) for batch in whole.batches} == {2, 3}
    spans = [batch.rollout.sigma - batch.sigma for batch in whole.batches if batch.rollout is not None]
    assert len(torch.cat(spans).unique()) > 2


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
        rollout=RolloutStarts.at(torch.tensor([0.3, 0.52]), torch.tensor([0.3, 0.5])),
        choices=(TokenChoice(0, 1, torch.tensor([[0, 2], [1, 4]])), TokenChoice(2, 2, torch.tensor([[5], [3]]))),
        masks=torch.rand(2, 3, 4),
        outside_masks=torch.rand(2, 3, 4),
        preserved=TextContext(torch.randn(3, WIDTH), torch.tensor([[0, 1, 1], [2, 1, 1]])),
        preserved_weights=torch.tensor([0.0, 0.3]),
    )


TENSORS = {
    ".latents",
    ".condition.context.rows",
    ".condition.context.index",
    ".condition.guidance",
    ".sigma",
    ".noise",
    ".weights",
    ".rollout.sigma",
    ".rollout.rolled",
    ".choices[0].kept_tokens",
    ".choices[1].kept_tokens",
    ".masks",
    ".outside_masks",
    ".preserved.rows",
    ".preserved.index",
    ".preserved_weights",
}


def test_a_batch_moves_with_all_of_its_fields(batch: Batch) -> None:
    assert_same(batch.to(torch.device("cpu"), non_blocking=True), batch)
    moved = batch.to(torch.device("meta"))
    assert {name for name, tensor in tensors_of(moved) if tensor.is_meta} == TENSORS
    for (_, found), (_, expected) in zip(tensors_of(moved), tensors_of(batch), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert (moved.names, moved.slots) == (batch.names, batch.slots)
    bare = dataclasses.replace(batch, masks=None, rollout=None, choices=()).to(torch.device("meta"))
    assert (bare.masks, bare.rollout, bare.choices) == (None, None, ())


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were pinned. torch pins nothing without an accelerator, so a copy stands for each."""
    copies: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return copies


def test_a_batch_is_pinned_with_all_of_its_fields(batch: Batch, pinned: list[Tensor]) -> None:
    whole = GlobalBatch(3, 1, (batch,), 2).pin_memory()
    assert (whole.step, whole.epoch, whole.size) == (3, 1, 2)
    assert_same(whole.batches[0], batch)
    is_copy = {name: any(tensor is copy for copy in pinned) for name, tensor in tensors_of(whole.batches[0])}
    assert is_copy == dict.fromkeys(TENSORS, True)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_accelerators_batches_are_drawn_and_pinned_in_another_thread(
    prepared: PreparedData, pinned: list[Tensor], device: str, prefetch: bool
) -> None:
    build = builder(prepared, 2, rank=0, size=1)
    threads = []

    def watched(step: int) -> GlobalBatch:
        threads.append(threading.get_ident())
        return build(step)

    found = list(batches_of(range(3, 6), watched, torch.device(device), prefetch=prefetch))
    is_ahead = device == "meta" and prefetch
    assert [thread != threading.get_ident() for thread in threads] == [is_ahead] * 3
    assert [whole.step for whole in found] == [3, 4, 5]
    for whole in found:
        for batch, expected in zip(whole.batches, build(whole.step).batches, strict=True):
            assert_same(batch, expected)
            assert batch.choices
            is_pinned = {any(tensor is copy for copy in pinned) for _, tensor in tensors_of(batch)}
            assert is_pinned == {device == "meta"}


def test_a_rank_knows_whether_any_of_them_rolls_out(prepared: PreparedData) -> None:
    seen = set()
    for step in range(1, 5):
        ranks = [builder(prepared, 4, rank, 2)(step).batches for rank in range(2)]
        for turn in zip(*ranks, strict=True):
            rolls = [batch.rollout is not None for batch in turn]
            seen.add(tuple(rolls))
            assert [batch.other_ranks_roll_out for batch in turn] == [any(rolls)] * 2
        assert not any(batch.other_ranks_roll_out for batch in builder(prepared, 4, 0, 1)(step).batches)
    assert (True, False) in seen or (False, True) in seen


def test_a_regularization_set_is_not_rolled_out_and_has_its_own_weight(own_folder: Path) -> None:
    prepared = prepared_in(own_folder, PRESERVING, is_regularisation_data=True, loss_weight=0.25)
    seen = set()
    for step in range(1, 7):
        ranks = [builder(prepared, 4, rank, 2)(step).batches for rank in range(2)]
        for turn in zip(*ranks, strict=True):
            for batch in turn:
                is_b = batch.names[0].startswith("b/")
                assert batch.is_regularization == is_b
                assert batch.weights.unique().tolist() == ([0.25] if is_b else [1.0])
                assert not (is_b and (batch.rollout is not None or batch.preserved is not None))
            assert [batch.other_ranks_distill for batch in turn] == [any(each.is_regularization for each in turn)] * 2
            assert [batch.other_ranks_roll_out for batch in turn] == [
                any(each.rollout is not None for each in turn)
            ] * 2
            seen.add(tuple(batch.is_regularization for batch in turn))
    assert seen >= {(True, False), (False, False)} or seen >= {(False, True), (False, False)}


def test_a_caption_with_the_trigger_is_preserved_with_its_class(own_folder: Path) -> None:
    prepared = prepared_in(own_folder, PRESERVING | {"preservation_weight": 0.5}, class_prompt="both")
    build = builder(prepared, 8, 0, 1)
    weights = set()
    for batch in build(1).batches:
        image_set = next(each.image_set for each in prepared.train if each.image_set.id == batch.names[0][0])
        samples = [sample for each in prepared.train for sample in each.samples]
        found = {f"{sample.dataset}/{sample.name}": sample for sample in samples}
        prompts = [build._prompt(found[name], 1, slot) for name, slot in zip(batch.names, batch.slots, strict=True)]
        name = "both" if image_set.id == "b" else "2"
        expected = [prompt.replace("two", name) if "two" in prompt else "" for prompt in prompts]
        if not any(expected):
            assert (batch.preserved, batch.preserved_weights) == (None, None)
            continue
        assert batch.preserved is not None
        assert batch.preserved_weights is not None
        contexts = prepared.contexts(expected, image_set)
        assert torch.equal(batch.preserved.expanded(), contexts.expanded())
        assert batch.preserved_weights.tolist() == [0.5 if text else 0.0 for text in expected]
        weights.update(batch.preserved_weights.tolist())
    assert weights == {0.0, 0.5}


@pytest.mark.parametrize("kind", ["class", "blank"])
def test_a_weight_of_0_is_no_preservation_bit_for_bit(own_folder: Path, kind: str) -> None:
    off = prepared_in(own_folder)
    (own_folder / "zero").mkdir()
    zero = prepared_in(own_folder / "zero", PRESERVING | {"preservation": kind, "preservation_weight": 0.0})
    for step in range(1, 4):
        ours, theirs = (builder(each, 2, 0, 1)(step) for each in (zero, off))
        for batch, expected in zip(ours.batches, theirs.batches, strict=True):
            assert_same(batch, expected)
