"""What will be trained: every picture of a set with its crop and its captions, and every other file with the
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
from simpletuner.config.datasets import MOST_REFERENCES, ConditioningSet, ImageSet
from simpletuner.config.load import Loaded
from simpletuner.data.captions import LACKS_CAPTION, captions_of
from simpletuner.data.discover import FoundFiles, discover
from simpletuner.data.geometry import Geometry, Size, describe, downsample_is_idle, enlargement, place
from simpletuner.data.index import IndexEntry, count_unknown, read_pictures
from simpletuner.data.pairing import Pairing, pair
from simpletuner.data.pixels import Remark
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Crop, Rejection, Sample
from simpletuner.data.storages import image_storage, latent_storage

ORDER_KEYS = ("repeats", "probability", "train_batch_size")
"""Keys of an image set that decide which samples come together in a batch. Part of its fingerprint."""
LOSS_KEYS = ("is_regularisation_data", "class_prompt", "loss_weight", "timestep_sampling_offset")
"""Keys of an image set that decide how its samples are trained. Part of its fingerprint."""


@dataclass(frozen=True)
class Manifest:
    """One set as it will be trained. A function of its files, its entry in the dataset file, and the seed."""

    image_set: ImageSet
    samples: tuple[Sample, ...]
    """Sorted by name."""
    rejections: tuple[Rejection, ...]
    """Sorted by name."""
    notices: tuple[str, ...]
    """What a person should know: pictures that are enlarged, flattened, captions without a picture."""
    conditions: tuple[ConditioningSet, ...] = ()
    """Where references and masks come from, in the order of `conditioning_data`."""

    @functools.cached_property
    def buckets(self) -> dict[Size, list[int]]:
        """Indices of the samples by (width, height) of their target, in pixels."""
        found: dict[Size, list[int]] = {}
        for index, sample in enumerate(self.samples):
            found.setdefault(sample.geometry.target, []).append(index)
        return dict(sorted(found.items()))

    @property
    def visits_per_epoch(self) -> int:
        """How many pictures an epoch shows with `probability` 1, before incomplete batches are filled."""
        return len(self.samples) * (self.image_set.repeats + 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes what is trained, and with nothing else: not with where the files
        lie."""
        own = self.image_set
        samples = [
            (s.name, s.content, s.geometry.__dict__, s.captions, *self._condition_fingerprint(s)) for s in self.samples
        ]
        loss = own.model_dump(include=set(LOSS_KEYS), exclude_defaults=True)
        return sha256_json(
            [own.id, own.repeats, own.probability, own.train_batch_size, samples, *([loss] if loss else [])]
        )

    def _condition_fingerprint(self, sample: Sample) -> list[Any]:
        """The fingerprint's part for a sample's references and mask: contents and crops. Empty where it has neither."""
        kinds: dict[str, str] = {each.id: each.conditioning_type for each in self.conditions}
        found: list[Any] = [(crop.content, crop.geometry.__dict__) for crop in sample.references]
        mask = sample.mask
        if mask is not None:
            found.append(("mask", kinds.get(mask.dataset, "alpha"), mask.content, mask.geometry.__dict__))
        return found

    def summary(self) -> dict[str, Any]:
        """Counts, buckets and rejections for a JSON reader. Names are relative: no path of this machine is in
        it."""
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
        """All that a scan found, as a JSON value: `of_record` makes the same manifest of it in another process."""
        samples = [
            [_crop_record(s), s.captions, [*map(_crop_record, s.references)], s.mask and _crop_record(s.mask)]
            for s in self.samples
        ]
        return [samples, [[r.name, r.reason, r.detail] for r in self.rejections], list(self.notices)]

    @classmethod
    def of_record(
        cls, image_set: ImageSet, record: list[Any], conditions: tuple[ConditioningSet, ...] = ()
    ) -> "Manifest":
        """The manifest of `image_set` and its `conditions` that `record` was made of. Reads no file."""
        storages = {each.id: image_storage(each) for each in (image_set, *conditions)}

        def crop(row: list[Any]) -> Crop:
            dataset, name, content, width, height, geometry = row
            return Crop(dataset, storages[dataset], name, content, width, height, Geometry(*map(tuple, geometry)))

        rows, rejections, notices = record
        samples = (
            Sample(
                **crop(own).__dict__,
                captions=tuple(captions),
                references=tuple(map(crop, references)),
                mask=None if mask is None else crop(mask),
            )
            for own, captions, references, mask in rows
        )
        rejected = tuple(Rejection(*each) for each in rejections)
        return cls(image_set, tuple(samples), rejected, tuple(notices), conditions)


def _crop_record(crop: Crop) -> list[Any]:
    geometry = crop.geometry
    place = [geometry.target, geometry.resize, geometry.crop]
    return [crop.dataset, crop.name, crop.content, crop.width, crop.height, place]


def rejection_counts(rejections: Iterable[Rejection]) -> dict[str, int]:
    """How many files left for which reason, the most frequent first."""
    return dict(Counter(rejection.reason for rejection in rejections).most_common())


def reference_counts(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """(references, how many pictures have so many), sorted."""
    return sorted(Counter(len(sample.references) for sample in samples).items())


def scan_of(
    loaded: Loaded, image_set: ImageSet, *, report: Callable[[int, int], None] = lambda _done, _total: None
) -> Manifest:
    """`scan` of one of the image sets of `loaded`, with everything that the configuration says of it.

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
    """Look at every file of the set's folder and those of its conditioning sets, decode the pictures that are new, and
    decide what is trained.

    What was learned about a file is kept beside the latents, so that a second scan reads only what changed;
    captions are read every time. With `max_num_samples`, a draw by the seed and the pictures' contents
    chooses: it stays the same when the folder is scanned again, and one new picture displaces at most one
    other.

    An image whose reference or mask cannot be used is rejected; one that has none is trained without, or rejected with
    `conditioning_required`.

    Args:
        conditions: those of `conditioning_data`, in its order.
        workers: threads that decode.
        caption_filter: texts that are taken out of captions.
        report: called with (pictures looked at, pictures in all) of one folder after the other.

    Raises:
        DataError: no such folder, nothing in it can be trained (then with the counts of what was rejected), or a
            conditioning set that belongs to none of the images.
    """
    images = image_storage(image_set)
    found = discover(images)
    entries = read_pictures(found.pictures, images, latent_storage(image_set), workers=workers, report=report)
    pairings = [pair(each, found.pictures, workers=workers, report=report) for each in conditions]
    _check_pairings(image_set, found, pairings)
    samples: list[Sample] = []
    rejections = list(found.rejections)
    for name in found.pictures:
        entry = entries[name]
        try:
            if isinstance(entry, Rejected):
                raise entry
            captions = captions_of(name, image_set, images, found.captions, seed=seed, caption_filter=caption_filter)
            geometry = place((entry.width, entry.height), image_set, seed=seed, content=entry.content)
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
        *_notices(image_set, samples, entries, found),
        *_condition_notices(image_set, samples, pairings),
    )
    return Manifest(image_set, tuple(samples), tuple(rejections), notices, tuple(conditions))


def count_new(image_set: ImageSet, conditions: Sequence[ConditioningSet] = ()) -> int:
    """How many pictures of the set and its conditioning sets `scan` would have to decode.

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
    if len(references) > MOST_REFERENCES:
        raise Rejected("too many references", f"{len(references)}, the most is {MOST_REFERENCES}")
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


def _check_pairings(image_set: ImageSet, found: FoundFiles, pairings: Sequence[Pairing]) -> None:
    """Raise a DataError if a conditioning set has no partner of any image."""
    problems = []
    for pairing in pairings:
        if found.pictures and not pairing.partners:
            own, image = pairing.conditioning_set, next(iter(found.pictures))
            has = f"it has {_named(pairing.unpaired, 3)}" if pairing.unpaired else "it has no pictures"
            expected = f"files of the same names, such as {PurePosixPath(image).with_suffix('.png')} for {image}"
            problems.append(Problem(f"{image_set.id}: no image has a partner in {own.id}: {has}", expected))
    DataError.raise_if(problems)


def _condition_notices(image_set: ImageSet, samples: Sequence[Sample], pairings: Sequence[Pairing]) -> Iterator[str]:
    """How many images have how many references, which have no partner, and which partners have no image."""
    if any(pairing.conditioning_set.is_reference for pairing in pairings):
        told = ", ".join(f"{images} with {count or 'none'}" for count, images in reference_counts(samples))
        yield f"{image_set.id}: references: {told}."
    for pairing in pairings:
        own = pairing.conditioning_set
        without = [sample.name for sample in samples if caption_key(sample.name) not in pairing.partners]
        if without:
            count = f"{len(without)} of {len(samples)} pictures"
            yield f"{image_set.id}: {count} have no partner in {own.id} and are trained without ({_named(without)})."
        if pairing.unpaired:
            count = f"{len(pairing.unpaired)} of {len(pairing.entries)} files"
            yield f"{own.id}: {count} belong to no image of {image_set.id} ({_named(pairing.unpaired)})."


def _limited(samples: list[Sample], most: int | None, seed: int) -> tuple[list[Sample], list[Rejection]]:
    if most is None or len(samples) <= most:
        return samples, []
    drawn = sorted(samples, key=lambda s: (draw_seed(seed, "order", "max_num_samples", s.content), s.name))
    surplus = [Rejection(s.name, "beyond max_num_samples", f"{most} others were drawn") for s in drawn[most:]]
    return sorted(drawn[:most], key=lambda sample: sample.name), surplus


def _nothing_left(image_set: ImageSet, rejections: Sequence[Rejection]) -> DataError:
    folder = image_set.instance_data_dir
    if not rejections:
        return DataError.of(f"{image_set.id}: {folder} holds no pictures", "at least one")
    counts = "; ".join(
        f"{count} {reason} ({_named([r.name for r in rejections if r.reason == reason], 3)})"
        for reason, count in rejection_counts(rejections).items()
    )
    first = rejections[0]
    nothing = Problem(
        f"{image_set.id}: nothing in {folder} can be trained. Rejected: {counts}",
        remedy=f"For example, {first.name}: {first.detail}. `simpletuner dataset scan` lists all.",
    )
    return DataError(nothing, *map(Problem, _uncaptioned(image_set, rejections)))


def _uncaptioned(image_set: ImageSet, rejections: Sequence[Rejection]) -> list[str]:
    """How many pictures are left out for want of a caption, which, and what to write where."""
    names = [rejection.name for rejection in rejections if rejection.reason in LACKS_CAPTION]
    if not names:
        return []
    lack = "1 picture has no caption and is" if len(names) == 1 else f"{len(names)} pictures have no caption and are"
    text_file = PurePosixPath(names[0]).with_suffix(".txt")
    own = f"Write each into a file of its own ({text_file} for {names[0]}), or have them share one"
    return [
        f"{image_set.id}: {lack} left out ({_named(names)}). {own}: put the line "
        f'"instance_prompt": "what they show", into the entry {json.dumps(image_set.id)} of the dataset file.'
    ]


def _named(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _notices(
    image_set: ImageSet, samples: Sequence[Sample], entries: dict[str, IndexEntry | Rejected], found: FoundFiles
) -> tuple[str, ...]:
    notices = []

    def add(names: Sequence[str], text: str) -> None:
        if names:
            notices.append(f"{image_set.id}: {len(names)} of {len(samples)} pictures {text} ({_named(names)}).")

    def remarks_of(sample: Sample) -> tuple[Remark, ...]:
        entry = entries[sample.name]
        return entry.remarks if isinstance(entry, IndexEntry) else ()

    remarks: tuple[tuple[Remark, str], ...] = (
        ("transparent", "have transparency, which is laid on white"),
        ("animated", "have more than one frame; the first is used"),
        ("odd profile", "have a color profile that cannot be used; they are taken for sRGB"),
    )
    for remark, text in remarks:
        if not (remark == "transparent" and image_set.mask_source == "alpha"):
            add([s.name for s in samples if remark in remarks_of(s)], text)

    enlarged = {sample.name: enlargement((sample.width, sample.height), sample.geometry.target) for sample in samples}
    by_factor = sorted((name for name, factor in enlarged.items() if factor > 1), key=lambda n: (-enlarged[n], n))
    if by_factor:
        factor = float(enlarged[by_factor[0]])
        add(by_factor, f"are enlarged to reach `resolution`, by up to ×{factor:.2f}")

    idle = [s.name for s in samples if downsample_is_idle((s.width, s.height), s.geometry, image_set)]
    if idle:
        key = "target_downsample_size" if image_set.maximum_image_size is None else "maximum_image_size"
        limit = image_set.target_downsample_size or image_set.maximum_image_size or 0
        size = describe(limit, image_set.resolution_type)
        add(idle, f"are above {key}, which changes nothing: {size} would not cover what is trained of them")

    if image_set.caption_shuffle is not None and image_set.caption_shuffle.enable:
        count = len({caption for sample in samples for caption in sample.captions})
        notices.append(
            f"{image_set.id}: with caption_shuffle, {len(samples)} pictures have {count} different captions, each of "
            "which is encoded and cached."
        )

    if image_set.caption_strategy == "textfile" and not image_set.only_instance_prompt:
        uncaptioned = [s.name for s in samples if s.captions == (image_set.instance_prompt,)]
        add(
            uncaptioned,
            f"have no caption of their own and use instance_prompt, {image_set.instance_prompt!r}",
        )
        if found.unused_captions:
            count = len(found.unused_captions)
            named = _named(found.unused_captions)
            notices.append(f"{image_set.id}: {count} .caption files are not read, for the .txt beside them ({named}).")
        orphans = sorted(set(found.captions) - {caption_key(name) for name in found.pictures})
        if orphans:
            files = [found.captions[key] for key in orphans]
            notices.append(f"{image_set.id}: {len(files)} caption files have no picture ({_named(files)}).")
    return tuple(notices)
