"""What masks do to a batch: whose is used, the weights, and what TREAD keeps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.thread_ranks import ALONE
from tests.unit.train.test_batches import assert_same, builder, prepared  # noqa: F401  a fixture
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.base.files import sha256_file
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ConditioningSet
from simpletuner.config.options.conditioning import ConditioningOptions
from simpletuner.data.sample import Crop, Sample
from simpletuner.flow.loss import averaged
from simpletuner.train.caches import PreparedData, fill_mask_weights, loss_masks
from simpletuner.train.masks import MaskEffects, Masking
from simpletuner.train.report import Reporter

Draw = Callable[[Sample], Image.Image]


def masking(**options: Any) -> Masking:
    return Masking(ConditioningOptions(**{f"masked_loss_{name}": value for name, value in options.items()}), seed=3)


def ramp() -> Tensor:
    return torch.linspace(0, 1, 12).reshape(3, 4)


@pytest.mark.parametrize("options", [{}, {"floor": 0.1}, {"floor": 0.7, "prior": 1.0}, {"probability": 0.5}])
def test_masks_of_ones_are_none(options: dict[str, Any]) -> None:
    found = masking(**options).effects([torch.ones(3, 4), None], (3, 4))
    assert (found.weights, found.outside, found.force_keep) == (None, None, None)


def test_black_masks_that_are_inverted_are_none() -> None:
    assert masking(invert=True).effects([torch.zeros(3, 4)], (3, 4)).weights is None


def test_the_options_act_in_their_order() -> None:
    (found,) = masking().effects([ramp()], (3, 4)).weights  # type: ignore[misc]
    assert torch.equal(found, ramp())
    (found,) = masking(invert=True, floor=0.2).effects([ramp()], (3, 4)).weights  # type: ignore[misc]
    torch.testing.assert_close(found, 0.2 + 0.8 * (1 - ramp()))
    assert (found[0, 0].item(), found[2, 3].item()) == (1, pytest.approx(0.2))


def test_a_floor_of_1_weighs_all_alike_and_leaves_the_prior_its_place() -> None:
    found = masking(floor=1.0, prior=0.5).effects([ramp()], (3, 4))
    assert found.weights is None
    assert found.outside is not None
    assert torch.equal(found.outside[0], 1 - ramp())


def test_a_floor_of_1_alone_changes_nothing() -> None:
    """TREAD keeps no more tokens, either."""
    assert masking(floor=1.0).effects([ramp()], (3, 4)) == MaskEffects()
    assert masking(floor=1.0, invert=True).effects([ramp(), None], (3, 4)) == MaskEffects()


def test_the_prior_acts_before_the_floor_and_only_where_a_mask_is_used() -> None:
    found = masking(floor=0.5, prior=0.5).effects([None, ramp()], (3, 4))
    assert found.outside is not None
    assert found.outside[0].eq(0).all()
    assert torch.equal(found.outside[1], 1 - ramp())
    assert masking(floor=0.5).effects([None, ramp()], (3, 4)).outside is None


def test_a_share_of_the_visits_uses_its_mask_the_same_after_a_restart() -> None:
    half = masking(probability=0.5)
    used = [half.used([ramp()] * 4, step, range(4)) for step in range(500)]
    count = sum(mask is not None for masks in used for mask in masks)
    assert abs(count - 1000) < 4 * 2000**0.5 / 2
    assert [mask is None for mask in half.used([ramp()] * 2, 7, range(2, 4))] == [mask is None for mask in used[7][2:]]
    assert masking(probability=0.0).used([ramp(), None], 1, range(2)) == [None, None]
    assert all(mask is not None for mask in masking().used([ramp()] * 8, 1, range(8)))


def test_the_loss_has_the_same_scale_for_small_and_large_masks() -> None:
    """5 % and 95 % of the area, on errors of one distribution."""
    penalties = torch.randn(2, 128, 40, 40, generator=torch.Generator().manual_seed(0)).square()
    masks = torch.zeros(2, 40, 40)
    masks[0].view(-1)[:80], masks[1].view(-1)[:1520] = 1, 1
    small, large = averaged(penalties, masking().effects(list(masks), (40, 40)).weights).tolist()
    assert small == pytest.approx(large, rel=0.01)
    assert averaged(penalties[:1].expand(2, -1, -1, -1) * 0 + 3, masks).tolist() == [3, 3]


def test_tread_keeps_what_is_under_a_mask_and_nothing_more_for_others() -> None:
    found = masking().effects([ramp(), None, torch.ones(3, 4)], (3, 4)).force_keep
    assert found is not None
    assert found.tolist() == [[False] + [True] * 11, [False] * 12, [False] * 12]


@pytest.fixture
def masked(prepared: PreparedData, own_folder: Path) -> Callable[..., PreparedData]:  # noqa: F811
    """The sets of `test_batches` with a mask for each sample, drawn by `draw`, None for no mask; options by name."""

    def make(draw: Callable[[Sample], Image.Image | None], **options: Any) -> PreparedData:
        masks = own_folder / "masks"
        masks.mkdir(exist_ok=True)
        entry = {
            "id": "masks",
            "dataset_type": "conditioning",
            "conditioning_type": "mask",
            "instance_data_dir": "masks",
            "cache_dir_vae": "cache/masks",
        }

        def with_mask(sample: Sample) -> Sample:
            image = draw(sample)
            if image is None:
                return sample
            path = masks / f"{sample.dataset}-{sample.name}"
            image.save(path)
            crop = Crop("masks", LocalStorage(masks), path.name, sha256_file(path), *image.size, sample.geometry)
            return replace(sample, mask=crop)

        loaded = prepared.loaded
        datasets = loaded.datasets.model_copy(update={"conditioning_sets": (ConditioningSet.model_validate(entry),)})
        config = loaded.config.model_copy(update={f"masked_loss_{name}": value for name, value in options.items()})
        train = tuple(replace(manifest, samples=tuple(map(with_mask, manifest.samples))) for manifest in prepared.train)
        return replace(prepared, loaded=replace(loaded, datasets=datasets, config=config), train=train)

    return make


def filled(prepared: PreparedData) -> PreparedData:  # noqa: F811
    fill_mask_weights(prepared, ALONE, Reporter(is_muted=True), verify=False)
    return prepared


def half(sample: Sample) -> Image.Image:
    """White on the left quarter of the crop, on more in later images."""
    image = Image.new("L", (sample.width, sample.height))
    image.paste(255, (0, 0, sample.width // 4 * (1 + int(sample.name[0]) % 3), sample.height))
    return image


def white(sample: Sample) -> Image.Image:
    return Image.new("L", (sample.width, sample.height), 255)


def test_batches_with_masks_of_ones_are_those_without(
    prepared: PreparedData,  # noqa: F811
    masked: Callable[..., PreparedData],
) -> None:
    ones = builder(filled(masked(white, floor=0.3, prior=0.5)), 2, 0, 1)
    none = builder(prepared, 2, 0, 1)
    for step in range(1, 5):
        for found, expected in zip(ones(step).batches, none(step).batches, strict=True):
            assert_same(found, expected)


def test_masks_of_a_held_out_set_weigh_whatever_keys_of_training_it_has(masked: Callable[..., PreparedData]) -> None:
    manifest = masked(white).train[0]
    assert len(loss_masks([manifest])) == len(manifest.samples)
    held = {"is_regularisation_data": True}
    assert loss_masks([replace(manifest, image_set=manifest.image_set.model_copy(update=held))]) == []
    held |= {"dataset_type": "eval"}
    unseen = replace(manifest, image_set=manifest.image_set.model_copy(update=held))
    assert loss_masks([unseen]) == loss_masks([manifest])


def test_batches_carry_masks_and_tread_keeps_them(masked: Callable[..., PreparedData]) -> None:
    ready = filled(masked(lambda sample: half(sample) if int(sample.name[0]) % 2 else None))
    build = builder(ready, 2, 0, 1)
    seen = 0
    for step in range(1, 5):
        for batch in build(step).batches:
            if batch.masks is None:
                continue
            for row, name in enumerate(batch.names):
                under = batch.masks[row].flatten().nonzero().flatten()
                if int(Path(name).stem) % 2:
                    seen += 1
                    assert all(set(under.tolist()) <= set(choice.kept_tokens[row].tolist()) for choice in batch.choices)
                else:
                    assert batch.masks[row].eq(1).all()
    assert seen > 4


def test_tread_keeps_tokens_only_for_masks_that_are_used_and_weigh(masked: Callable[..., PreparedData]) -> None:
    assert min(filled(masked(half)).forced_shares) > 0
    assert filled(masked(half, probability=0.0)).forced_shares == []
    assert filled(masked(half, floor=1.0)).forced_shares == []


def test_two_ranks_draw_masks_as_one_does(masked: Callable[..., PreparedData]) -> None:
    ready = filled(masked(half, probability=0.5, prior=0.1))
    alone = builder(ready, 2, 0, 1)
    ranks = [builder(ready, 2, rank, 2) for rank in range(2)]
    for step in range(1, 5):
        for place, batch in enumerate(alone(step).batches):
            assert_same(ranks[place](step).batches[0], batch)


def test_all_masks_under_which_nothing_counts_are_named_before_an_encoder_loads(
    masked: Callable[..., PreparedData],
) -> None:
    def draw(sample: Sample) -> Image.Image:
        return Image.new("L", (64, 64)) if sample.name in ("1.png", "4.png") else half(sample)

    with pytest.raises(DataError, match="4 masks are all black in the trained crop") as caught:
        filled(masked(draw))
    assert all(f"{name}" in str(caught.value) for name in ("a-1.png", "a-4.png", "b-1.png", "b-4.png"))
    assert "--masked_loss_floor=0.1" in str(caught.value)
    filled(masked(draw, floor=0.1))
    filled(masked(draw, invert=True))
    with pytest.raises(DataError, match="14 masks are all white in the trained crop"):
        filled(masked(white, invert=True))
