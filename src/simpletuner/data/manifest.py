"""Scan a dataset into its manifest: every training image with its crop and captions, every rejected file with the
reason."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from simpletuner.base.draws import draw_seed
from simpletuner.base.errors import DataError, Problem
from simpletuner.base.files import sha256_json
from simpletuner.base.imagefiles import caption_key
from simpletuner.config.datasets import MAX_REFERENCES, ConditioningSet, ImageSet
from simpletuner.config.load import LoadedConfig
from simpletuner.data.captions import LACKS_CAPTION, captions_of
from simpletuner.data.discover import FolderFiles, discover
from simpletuner.data.geometry import Geometry, Size, describe, downsample_is_idle, enlargement, image_geometry
from simpletuner.data.index import IndexEntry, count_unknown, read_images
from simpletuner.data.pairing import Pairing, pair
from simpletuner.data.pixels import Remark
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Crop, Rejection, Sample
from simpletuner.data.storages import image_storage, latent_storage

ORDER_KEYS = ("repeats", "probability", "train_batch_size")
"""Keys of an image dataset that determine which samples share a batch. Part of its fingerprint."""
LOSS_KEYS = ("is_regularisation_data", "class_prompt", "loss_weight", "timestep_sampling_offset")
"""Keys of an image dataset that determine how its samples enter the loss. Part of its fingerprint."""


@dataclass(frozen=True)
class Manifest:
    """The samples and rejections of one dataset: a function of its files, its entry in the dataset file, and the
    seed."""

    image_set: ImageSet
    samples: tuple[Sample, ...]
    """Sorted by name."""
    rejections: tuple[Rejection, ...]
    """Sorted by name."""
    notices: tuple[str, ...]
    """Notices for the user, such as enlarged or flattened images, and captions without an image."""
    conditions: tuple[ConditioningSet, ...] = ()
    """Datasets of the references and masks, in the order of `conditioning_data`."""

    @functools.cached_property
    def buckets(self) -> dict[Size, list[int]]:
        """Indices of the samples by (width, height) of their target, in pixels."""
        members: dict[Size, list[int]] = {}
        for index, sample in enumerate(self.samples):
            members.setdefault(sample.geometry.target, []).append(index)
        return dict(sorted(members.items()))

    @property
    def visits_per_epoch(self) -> int:
        """Number of images that an epoch uses with `probability` 1, before incomplete batches are filled."""
        return len(self.samples) * (self.image_set.repeats + 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the training data, and of nothing else (such as the files' location)."""
        dataset = self.image_set
        samples = [
            (s.name, s.content, s.geometry.__dict__, s.captions, *self._condition_fingerprint(s)) for s in self.samples
        ]
        loss = dataset.model_dump(include=set(LOSS_KEYS), exclude_defaults=True)
        return sha256_json(
            [
                dataset.id,
                dataset.repeats,
                dataset.probability,
                dataset.train_batch_size,
                samples,
                *([loss] if loss else []),
            ]
        )

    def _condition_fingerprint(self, sample: Sample) -> list[Any]:
        """Part of the fingerprint for a sample's references and mask: contents and crops. Empty if it has neither."""
        kinds: dict[str, str] = {each.id: each.conditioning_type for each in self.conditions}
        facts: list[Any] = [(crop.content, crop.geometry.__dict__) for crop in sample.references]
        mask = sample.mask
        if mask is not None:
            facts.append(("mask", kinds.get(mask.dataset, "alpha"), mask.content, mask.geometry.__dict__))
        return facts

    def summary(self) -> dict[str, Any]:
        """Counts, buckets and rejections as JSON. Names are relative: it contains no path of this machine."""
        return {
            "id": self.image_set.id,
            "dataset_type": self.image_set.dataset_type,
            "pictures": len(self.samples),
            "captions": sum(len(sample.captions) for sample in self.samples),
            "repeats": self.image_set.repeats,
            "probability": self.image_set.probability,
            "visits_per_epoch": self.visits_per_epoch,
            "conditioning_data": [each.id for each in self.conditions],
            "references": [{"count": count, "pictures": n} for count, n in reference_counts(self.samples)],
            "masks": sum(sample.mask is not None for sample in self.samples),
            "buckets": [{"width": w, "height": h, "pictures": len(m)} for (w, h), m in self.buckets.items()],
            "rejected": rejection_counts(self.rejections),
            "rejections": [rejection.__dict__ for rejection in self.rejections],
            "notices": list(self.notices),
            "fingerprint": self.fingerprint,
        }

    def record(self) -> list[Any]:
        """The whole manifest as a JSON value, from which `of_record` rebuilds it in another process."""
        samples = [
            [_crop_record(s), s.captions, [*map(_crop_record, s.references)], s.mask and _crop_record(s.mask)]
            for s in self.samples
        ]
        return [samples, [[r.name, r.reason, r.detail] for r in self.rejections], list(self.notices)]

    @classmethod
    def of_record(
        cls, image_set: ImageSet, record: list[Any], conditions: tuple[ConditioningSet, ...] = ()
    ) -> "Manifest":
        """Rebuild the manifest of `image_set` and its `conditions` from `record`. Reads no file."""
        storages = {each.id: image_storage(each) for each in (image_set, *conditions)}

        def crop(row: list[Any]) -> Crop:
            dataset, name, content, width, height, geometry = row
            return Crop(dataset, storages[dataset], name, content, width, height, Geometry(*map(tuple, geometry)))

        rows, rejections, notices = record
        samples = (
            Sample(
                **crop(image).__dict__,
                captions=tuple(captions),
                references=tuple(map(crop, references)),
                mask=None if mask is None else crop(mask),
            )
            for image, captions, references, mask in rows
        )
        rejected = tuple(Rejection(*each) for each in rejections)
        return cls(image_set, tuple(samples), rejected, tuple(notices), conditions)


def _crop_record(crop: Crop) -> list[Any]:
    geometry = crop.geometry
    boxes = [geometry.target, geometry.resize, geometry.crop]
    return [crop.dataset, crop.name, crop.content, crop.width, crop.height, boxes]


def rejection_counts(rejections: Iterable[Rejection]) -> dict[str, int]:
    """Number of rejected files by reason, the most frequent reason first."""
    return dict(Counter(rejection.reason for rejection in rejections).most_common())


def reference_counts(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Pairs (number of references, number of images with that many), sorted."""
    return sorted(Counter(len(sample.references) for sample in samples).items())


def scan_of(
    loaded: LoadedConfig, image_set: ImageSet, *, report: Callable[[int, int], None] = lambda _done, _total: None
) -> Manifest:
    """Scan one of the image datasets of `loaded`, with its settings in the configuration.

    Raises:
        DataError: as `scan`.
    """
    return scan(
        image_set,
        loaded.datasets.conditions_of(image_set),
        seed=loaded.config.seed,
        workers=loaded.config.workers,
        caption_filter=loaded.datasets.caption_filter_of(image_set),
        report=report,
    )


def scan(
    image_set: ImageSet,
    conditions: Sequence[ConditioningSet] = (),
    *,
    seed: int,
    workers: int,
    caption_filter: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> Manifest:
    """Scan the folders of a dataset and of its conditioning sets, decode new images, and select the training images.

    Facts about each file are saved beside the latents, so a second scan decodes only new and changed files; captions
    are read every time. With `max_num_samples`, the images are drawn by the seed and their contents: the selection is
    the same when the folder is scanned again, and a new image displaces at most one other image.

    An image is rejected if its reference or mask cannot be used. An image without one is used without it, or
    rejected if `conditioning_required` is set.

    Args:
        conditions: the datasets of `conditioning_data`, in its order.
        workers: threads that decode.
        caption_filter: texts to remove from captions.
        report: called with (images done, all images) of one folder after the other.

    Raises:
        DataError: a folder does not exist, no image can be used (the message counts the rejections), or a
            conditioning set has no partner for any image.
    """
    images = image_storage(image_set)
    files = discover(images)
    entries = read_images(files.pictures, images, latent_storage(image_set), workers=workers, report=report)
    pairings = [pair(each, files.pictures, workers=workers, report=report) for each in conditions]
    _check_pairings(image_set, files, pairings)
    samples: list[Sample] = []
    rejections = list(files.rejections)
    for name in files.pictures:
        entry = entries[name]
        try:
            if isinstance(entry, Rejected):
                raise entry
            captions = captions_of(name, image_set, images, files.captions, seed=seed, caption_filter=caption_filter)
            geometry = image_geometry((entry.width, entry.height), image_set, seed=seed, content=entry.content)
            image = Crop(image_set.id, images, name, entry.content, entry.width, entry.height, geometry)
            references = _references(image, image_set, pairings, seed)
            mask = _mask(image, entry, image_set, pairings, seed)
            samples.append(Sample(**image.__dict__, captions=captions, references=references, mask=mask))
        except Rejected as rejected:
            rejections.append(Rejection(name, rejected.reason, rejected.detail))
    samples, surplus = _limited(samples, image_set.max_num_samples, seed)
    rejections = sorted(rejections + surplus, key=lambda rejection: rejection.name)
    if not samples:
        raise _nothing_left(image_set, rejections)
    notices = (
        *_uncaptioned(image_set, rejections),
        *_notices(image_set, samples, entries, files),
        *_condition_notices(image_set, samples, pairings),
    )
    return Manifest(image_set, tuple(samples), tuple(rejections), notices, tuple(conditions))


def count_new(image_set: ImageSet, conditions: Sequence[ConditioningSet] = ()) -> int:
    """Number of images of the dataset and its conditioning sets that `scan` would have to decode.

    Raises:
        DataError: no such folder.
    """
    return sum(
        count_unknown(discover(images).pictures, images, latent_storage(each))
        for each, images in ((each, image_storage(each)) for each in (image_set, *conditions))
    )


def _references(image: Crop, image_set: ImageSet, pairings: Sequence[Pairing], seed: int) -> tuple[Crop, ...]:
    references: list[Crop] = []
    for pairing in pairings:
        if pairing.conditioning_set.is_reference:
            references += _partners(image, image_set, pairing, seed)
    if len(references) > MAX_REFERENCES:
        raise Rejected("too many references", f"{len(references)}, the maximum is {MAX_REFERENCES}")
    return tuple(references)


def _mask(image: Crop, entry: IndexEntry, image_set: ImageSet, pairings: Sequence[Pairing], seed: int) -> Crop | None:
    if image_set.mask_source == "alpha":
        return image if "transparent" in entry.remarks else None
    masks = [pairing for pairing in pairings if not pairing.conditioning_set.is_reference]
    partners = [mask for pairing in masks for mask in _partners(image, image_set, pairing, seed)]
    return partners[0] if partners else None


def _partners(image: Crop, image_set: ImageSet, pairing: Pairing, seed: int) -> list[Crop]:
    crops = pairing.crops(image, seed)
    if not crops and image_set.conditioning_required:
        raise Rejected(f"no partner in {pairing.conditioning_set.id}", "conditioning_required is true")
    return crops


def _check_pairings(image_set: ImageSet, files: FolderFiles, pairings: Sequence[Pairing]) -> None:
    """Raise a DataError if a conditioning set has no partner for any image in the dataset."""
    problems = []
    for pairing in pairings:
        if files.pictures and not pairing.partners:
            partner_set, image = pairing.conditioning_set, next(iter(files.pictures))
            has = f"it has {_name_list(pairing.unpaired, 3)}" if pairing.unpaired else "it has no images"
            expected = f"files of the same names, such as {PurePosixPath(image).with_suffix('.png')} for {image}"
            problems.append(Problem(f"{image_set.id}: no image has a partner in {partner_set.id}: {has}", expected))
    DataError.raise_if(problems)


def _condition_notices(image_set: ImageSet, samples: Sequence[Sample], pairings: Sequence[Pairing]) -> Iterator[str]:
    """Notices: the number of images by their number of references, images without a partner, partners without an
    image."""
    if any(pairing.conditioning_set.is_reference for pairing in pairings):
        counts = ", ".join(f"{images} with {count or 'none'}" for count, images in reference_counts(samples))
        yield f"{image_set.id}: references: {counts}."
    for pairing in pairings:
        partner_set = pairing.conditioning_set
        unpartnered = [sample.name for sample in samples if caption_key(sample.name) not in pairing.partners]
        if unpartnered:
            count = f"{len(unpartnered)} of {len(samples)} images"
            named = _name_list(unpartnered)
            yield f"{image_set.id}: {count} have no partner in {partner_set.id} and are trained without one ({named})."
        if pairing.unpaired:
            count = f"{len(pairing.unpaired)} of {len(pairing.entries)} files"
            yield f"{partner_set.id}: {count} belong to no image of {image_set.id} ({_name_list(pairing.unpaired)})."


def _limited(samples: list[Sample], limit: int | None, seed: int) -> tuple[list[Sample], list[Rejection]]:
    if limit is None or len(samples) <= limit:
        return samples, []
    drawn = sorted(samples, key=lambda s: (draw_seed(seed, "order", "max_num_samples", s.content), s.name))
    surplus = [Rejection(s.name, "beyond max_num_samples", f"{limit} other images were drawn") for s in drawn[limit:]]
    return sorted(drawn[:limit], key=lambda sample: sample.name), surplus


def _nothing_left(image_set: ImageSet, rejections: Sequence[Rejection]) -> DataError:
    folder = image_set.instance_data_dir
    if not rejections:
        return DataError.of(f"{image_set.id}: {folder} contains no images", "at least one")
    counts = "; ".join(
        f"{count} {reason} ({_name_list([r.name for r in rejections if r.reason == reason], 3)})"
        for reason, count in rejection_counts(rejections).items()
    )
    first = rejections[0]
    nothing = Problem(
        f"{image_set.id}: no image in {folder} can be trained on. Rejected: {counts}",
        remedy=f"For example, {first.name}: {first.detail}. `simpletuner dataset scan` lists all.",
    )
    return DataError(nothing, *map(Problem, _uncaptioned(image_set, rejections)))


def _uncaptioned(image_set: ImageSet, rejections: Sequence[Rejection]) -> list[str]:
    """The notice that images are left out because they have no caption, with the remedy; empty if all have one."""
    names = [rejection.name for rejection in rejections if rejection.reason in LACKS_CAPTION]
    if not names:
        return []
    lack = "1 image has no caption and is" if len(names) == 1 else f"{len(names)} images have no caption and are"
    text_file = PurePosixPath(names[0]).with_suffix(".txt")
    remedy = f"Write one caption file per image ({text_file} for {names[0]}), or one caption for all images"
    return [
        f"{image_set.id}: {lack} left out ({_name_list(names)}). {remedy}: put the line "
        f'"instance_prompt": "what they show", into the entry {json.dumps(image_set.id)} of the dataset file.'
    ]


def _name_list(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _notices(
    image_set: ImageSet, samples: Sequence[Sample], entries: dict[str, IndexEntry | Rejected], folder_files: FolderFiles
) -> tuple[str, ...]:
    notices = []

    def add(names: Sequence[str], text: str) -> None:
        if names:
            notices.append(f"{image_set.id}: {len(names)} of {len(samples)} images {text} ({_name_list(names)}).")

    def remarks_of(sample: Sample) -> tuple[Remark, ...]:
        entry = entries[sample.name]
        return entry.remarks if isinstance(entry, IndexEntry) else ()

    remarks: tuple[tuple[Remark, str], ...] = (
        ("transparent", "have transparency, which is composited on white"),
        ("animated", "have more than one frame; the first is used"),
        ("odd profile", "have a color profile that cannot be used; they are read as sRGB"),
    )
    for remark, text in remarks:
        if not (remark == "transparent" and image_set.mask_source == "alpha"):
            add([s.name for s in samples if remark in remarks_of(s)], text)

    enlarged = {sample.name: enlargement((sample.width, sample.height), sample.geometry.target) for sample in samples}
    by_factor = sorted((name for name, factor in enlarged.items() if factor > 1), key=lambda n: (-enlarged[n], n))
    if by_factor:
        factor = float(enlarged[by_factor[0]])
        add(by_factor, f"are enlarged to reach `resolution`, by up to ×{factor:.2f}")

    unaffected = [s.name for s in samples if downsample_is_idle((s.width, s.height), s.geometry, image_set)]
    if unaffected:
        key = "target_downsample_size" if image_set.maximum_image_size is None else "maximum_image_size"
        limit = image_set.target_downsample_size or image_set.maximum_image_size or 0
        size = describe(limit, image_set.resolution_type)
        add(unaffected, f"are above {key}, which has no effect: {size} would not cover their training size")

    if image_set.caption_shuffle is not None and image_set.caption_shuffle.enable:
        count = len({caption for sample in samples for caption in sample.captions})
        notices.append(
            f"{image_set.id}: with caption_shuffle, {len(samples)} images have {count} different captions, each of "
            "which is encoded and cached."
        )

    if image_set.caption_strategy == "textfile" and not image_set.only_instance_prompt:
        uncaptioned = [s.name for s in samples if s.captions == (image_set.instance_prompt,)]
        add(
            uncaptioned,
            f"have no caption of their own and use instance_prompt, {image_set.instance_prompt!r}",
        )
        if folder_files.unused_captions:
            count = len(folder_files.unused_captions)
            named = _name_list(folder_files.unused_captions)
            notices.append(
                f"{image_set.id}: {count} .caption files are not read, since .txt files replace them ({named})."
            )
        orphans = sorted(set(folder_files.captions) - {caption_key(name) for name in folder_files.pictures})
        if orphans:
            files = [folder_files.captions[key] for key in orphans]
            notices.append(f"{image_set.id}: {len(files)} caption files have no image ({_name_list(files)}).")
    return tuple(notices)
