"""Masks: from a file to the weight of each latent, and the cache of these weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tests.thread_ranks import ALONE, on_ranks
from tests.unit.data.test_pixels import png16, saved

from simpletuner.base.errors import DataError
from simpletuner.base.files import sha256_file
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ConditioningSet, Datasets, ImageSet
from simpletuner.data.cache.latents import latent_key
from simpletuner.data.cache.masks import MaskSource, fill_masks, latent_weights
from simpletuner.data.cache.report import FillReport
from simpletuner.data.cache.store import Store
from simpletuner.data.geometry import Geometry
from simpletuner.data.manifest import Manifest
from simpletuner.data.pixels import MaskKind, render, render_mask
from simpletuner.data.sample import Crop, Sample
from simpletuner.memory.world import World

WHOLE = Geometry((32, 16), (32, 16), (0, 0))


def levels(image: Image.Image | bytes, kind: MaskKind = "mask", geometry: Geometry = WHOLE) -> np.ndarray:
    return render_mask(image if isinstance(image, bytes) else saved(image), geometry, kind)


def test_white_is_one_and_black_is_zero_exactly_after_any_resample() -> None:
    for size in ((32, 16), (37, 19), (1000, 700), (5, 3)):
        geometry = Geometry((64, 32), (71, 45), (3, 9))
        assert torch.equal(latent_weights(levels(Image.new("L", size, 255), geometry=geometry)), torch.ones(2, 4))
        assert torch.equal(latent_weights(levels(Image.new("L", size, 0), geometry=geometry)), torch.zeros(2, 4))


def test_a_weight_is_the_mean_gray_of_its_16_by_16_pixels() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (16, 32), dtype=np.uint8)
    found = latent_weights(levels(Image.fromarray(gray)))
    expected = [[gray[:, :16].mean() / 255, gray[:, 16:].mean() / 255]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_a_mask_is_cropped_as_its_image_is_whatever_its_own_resolution() -> None:
    """The image is black and white itself: its pixels, in the crop, are the mask's levels."""
    geometry = Geometry((64, 32), (96, 48), (16, 8))
    image = Image.new("L", (192, 96))
    image.paste(255, (64, 32, 128, 64))
    for mask in (image, image.resize((96, 48), Image.Resampling.NEAREST)):
        weights = latent_weights(levels(mask, geometry=geometry))
        pixels = render(saved(image.convert("RGB")), geometry)[..., 0]
        torch.testing.assert_close(weights, latent_weights(pixels), rtol=0, atol=0.05)
    assert weights.unique().numel() > 1


def test_a_hard_edge_stays_between_black_and_white() -> None:
    """Lanczos would ring: a black place beside the edge would not be 0."""
    image = Image.new("L", (640, 320))
    image.paste(255, (0, 0, 320, 320))
    weights = latent_weights(levels(image, geometry=Geometry((128, 64), (128, 64), (0, 0))))
    expected = torch.zeros(4, 8)
    expected[:, :4] = 1
    torch.testing.assert_close(weights, expected, rtol=0, atol=0.02)
    assert weights[:, 5:].eq(0).all()
    assert weights[:, :3].eq(1).all()


def test_a_photograph_turned_by_its_camera_is_masked_upright() -> None:
    image = Image.new("L", (16, 32))
    image.paste(255, (0, 0, 16, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right: the upper half is the right one
    assert latent_weights(levels(saved(image, exif=exif))).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (32, 16), 1),
        Image.new("RGB", (32, 16), (0, 0, 1)),
        png16(np.ones((16, 32), dtype=np.uint16), 0),
        Image.new("1", (32, 16), 1),
    ],
    ids=["gray", "blue", "16 bits", "1 bit"],
)
def test_a_segmentation_counts_every_level_above_0(image: Any) -> None:
    assert latent_weights(levels(image, "segmentation")).tolist() == [[1, 1]]
    assert latent_weights(levels(image, "mask")).max() < 0.01 or image.mode == "1"


def test_a_segmentation_is_thresholded_before_it_is_averaged() -> None:
    image = Image.new("L", (32, 16))
    image.paste(3, (0, 0, 8, 16))
    assert latent_weights(levels(image, "segmentation")).tolist() == [[0.5, 0]]


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_in_a_mask_is_black(kind: MaskKind, mode: str) -> None:
    image = Image.new(mode, (32, 16), "white")
    image.putalpha(Image.new("L", (32, 16)))
    assert not levels(image, kind).any()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "1", "L"])
def test_masks_of_every_mode_are_read(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    white = Image.new("RGB", (32, 16), "white").convert(mode)
    assert latent_weights(levels(saved(white, kind))).tolist() == [[1, 1]]


def test_the_color_profile_of_a_mask_is_passed_over() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    gray = Image.new("L", (32, 16), 128)
    assert levels(saved(gray, icc_profile=profile)).tolist() == levels(gray).tolist()


def cut_out() -> Image.Image:
    """Red, the left half of it opaque."""
    image = Image.new("RGBA", (32, 16), (200, 30, 40, 0))
    image.paste((200, 30, 40, 255), (0, 0, 16, 16))
    return image


def test_alpha_is_a_mask_and_its_image_is_not_laid_on_white() -> None:
    assert latent_weights(levels(cut_out(), "alpha")).tolist() == [[1, 0]]
    assert latent_weights(levels(Image.new("RGB", (32, 16)), "alpha")).tolist() == [[1, 1]]
    kept = render(saved(cut_out()), WHOLE, is_flattened=False)
    assert kept.reshape(-1, 3).tolist() == [[200, 30, 40]] * (32 * 16)
    assert render(saved(cut_out()), WHOLE)[0, -1].tolist() == [255, 255, 255]


def with_mask(sample: Sample, mask: Crop) -> Sample:
    return replace(sample, mask=mask)


def of_file(path: Path, dataset: str, geometry: Geometry) -> Crop:
    with Image.open(path) as image:
        width, height = image.size
    return Crop(dataset, LocalStorage(path.parent), path.name, sha256_file(path), width, height, geometry)


def test_only_an_image_with_its_own_alpha_as_mask_has_another_latent(
    save: Callable[..., Path], scanned: Callable[..., Manifest], folder: Path
) -> None:
    save("a.png")
    (sample,) = scanned().samples
    own = with_mask(sample, Crop("photos", sample.images, sample.name, sample.content, 80, 64, sample.geometry))
    other = with_mask(sample, of_file(folder / "a.png", "masks", sample.geometry))
    assert (own.is_flattened, other.is_flattened, sample.is_flattened) == (False, True, True)
    assert latent_key(other, "vae") == latent_key(sample, "vae") != latent_key(own, "vae")


@pytest.fixture
def sources(tmp_path: Path, make_set: Callable[..., ImageSet]) -> dict[str, MaskSource]:
    """A set of masks, a set of segmentations and one with alpha."""

    def conditioning(name: str, kind: str) -> ConditioningSet:
        return ConditioningSet.model_validate(
            {
                "id": name,
                "dataset_type": "conditioning",
                "conditioning_type": kind,
                "instance_data_dir": str(tmp_path / name),
                "cache_dir_vae": str(tmp_path / "cache" / name),
            }
        )

    sets = (
        conditioning("masks", "mask"),
        conditioning("parts", "segmentation"),
        conditioning("looks", "reference_loose"),
    )
    alpha = make_set(id="alpha", mask_source="alpha")
    return MaskSource.all_of(
        Datasets(train_sets=(make_set(), alpha), eval_sets=(), text_stores=(), conditioning_sets=sets)
    )


def test_each_set_has_its_own_kind_of_mask(sources: dict[str, MaskSource]) -> None:
    assert {name: source.kind for name, source in sources.items()} == {
        "masks": "mask",
        "parts": "segmentation",
        "alpha": "alpha",
    }


@pytest.fixture
def masks(folder: Path) -> list[Crop]:
    """Five masks, two of them alike, and one of them a segmentation too."""
    found = []
    for number in (0, 1, 2, 3, 3):
        path = folder / f"{len(found)}.png"
        Image.new("L", (32, 16), 60 * number).save(path)
        found.append(of_file(path, "masks", WHOLE))
    return [*found, of_file(folder / "1.png", "parts", WHOLE)]


def filled(masks: list[Crop], sources: dict[str, MaskSource], world: World = ALONE) -> FillReport:
    return fill_masks(masks, sources, workers=2, report=lambda _done, _total: None, world=world)


def test_the_cache_holds_each_mask_once_and_makes_what_it_lacks(
    masks: list[Crop], sources: dict[str, MaskSource]
) -> None:
    first = filled(masks, sources)
    assert (first.encoded, first.existing, first.damaged) == (5, 0, 0)
    for mask in masks:
        source = sources[mask.dataset]
        assert torch.equal(source.read(mask), source.make(mask))
    assert sources["masks"].read(masks[1]).tolist() == [[torch.tensor(60 / 255).item()] * 2]
    assert sources["parts"].read(masks[5]).tolist() == [[1, 1]]
    assert filled(masks, sources).existing == 5
    store = sources["masks"].store
    damaged = store.storage.local_path(store.name(sources["masks"].key(masks[0])))
    assert damaged is not None
    damaged.write_bytes(b"damaged")
    again = filled(masks, sources)
    assert (again.encoded, again.existing, again.damaged) == (1, 4, 1)


def test_what_a_killed_process_left_half_written_is_removed(masks: list[Crop], sources: dict[str, MaskSource]) -> None:
    filled(masks, sources)
    store = sources["masks"].store
    path = store.storage.local_path(store.name(sources["masks"].key(masks[0])))
    assert path is not None
    part = path.with_name(f".{path.name}.1.part")
    part.write_bytes(b"half")
    filled(masks, sources)
    assert not part.exists()


def test_ranks_share_the_work_and_write_the_same(
    masks: list[Crop], sources: dict[str, MaskSource], tmp_path: Path
) -> None:
    filled(masks, sources)
    apart = {
        name: replace(source, store=Store(LocalStorage(tmp_path / "ranks" / name))) for name, source in sources.items()
    }
    reports = on_ranks(2, lambda world: filled(masks, apart, world))
    assert [report.encoded for report in reports] == [5, 5]
    for mask in masks:
        assert torch.equal(apart[mask.dataset].read(mask), sources[mask.dataset].read(mask))


def test_a_mask_that_changed_since_the_scan_is_named(
    masks: list[Crop], sources: dict[str, MaskSource], folder: Path
) -> None:
    Image.new("L", (32, 16), 7).save(folder / "2.png")
    with pytest.raises(DataError, match=r"2\.png changed while this was running"):
        filled(masks, sources)
