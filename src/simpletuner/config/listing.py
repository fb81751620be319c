"""Read `multidatabackend.json` into `Datasets`, or report every problem of every entry."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.text import CAPTION_BYTES, FILE_NAME, is_file_name, is_visible, size_in_bytes
from simpletuner.config.datasets import (
    MAX_REFERENCES,
    CaptionShuffle,
    ConditioningSet,
    Datasets,
    FolderDataset,
    ImageSet,
    TextStore,
)
from simpletuner.config.documents import document_text, read_document
from simpletuner.config.given import CheckedKeys, GivenValue, KnownKeys, by_canonical_name, check_givens
from simpletuner.config.options.kinds import Slice
from simpletuner.config.other_keys import OTHER_CONDITION_KEYS, OTHER_SET_KEYS, OTHER_STORE_KEYS
from simpletuner.config.other_trainers import OUR_DATASETS, other_format, other_trainer_problem
from simpletuner.config.paths import PathRule, allow_any_path, fill_placeholders, join_working_folder
from simpletuner.config.run import OPTION_NAMES
from simpletuner.config.values import join_names, kinds, nearest, no_effect, value_text

IMAGE_SET = KnownKeys(
    ImageSet, OTHER_SET_KEYS, noun="key of an image set", foreign_keys=OPTION_NAMES, other_place="the config"
)
TEXT_STORE = KnownKeys(
    TextStore,
    OTHER_STORE_KEYS,
    noun="key of a text store",
    foreign_keys=ImageSet.model_fields,
    other_place="an image set",
)
CONDITIONING_SET = KnownKeys(
    ConditioningSet,
    OTHER_CONDITION_KEYS,
    noun="key of a conditioning set",
    foreign_keys=ImageSet.model_fields,
    other_place="an image set",
)
CAPTION_SHUFFLE = KnownKeys(CaptionShuffle, noun="key of caption_shuffle")
DATASET_TYPES = ("image", "eval", "conditioning", "text_embeds")

_SIZE_KEYS = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
_SHAPE_KEYS = FolderDataset.model_fields.keys() - {"id", "type", "instance_data_dir", "disabled", "cache_dir_vae"}
_MIN_EDGE_PX, _MAX_AREAS = 16, 64
_REPLACEMENT = re.compile(r"s/.*/.*/")
_PATTERN_SIGNS = re.compile(r"[\\^$*+|\[\]{}]")
_TRAINING_KEYS = (
    "repeats",
    "probability",
    "start_step",
    "end_step",
    "start_epoch",
    "end_epoch",
    "timestep_sampling_offset",
    "caption_shuffle",
    "is_regularisation_data",
    "class_prompt",
    "loss_weight",
)
"""Keys that have no effect in a held-out dataset."""


@dataclass(frozen=True)
class PathContext:
    """Values for resolving the paths in a config or dataset list."""

    folder: Path
    """Start of relative paths."""

    names: Mapping[str, str]
    """Values of the placeholders `model_family` and `output_dir`."""

    environ: Mapping[str, str] | None
    """Values for `{env:NAME}`; None rejects those."""

    rule: PathRule = allow_any_path
    """Check of every resolved path."""

    def resolve(self, prefix: str, key: str, text: str, **names: str) -> str | Problem:
        """`text` as a path that may be read, or the problem with it, which begins with `prefix` and `key`.

        `names` are values of further placeholders.
        """
        try:
            path = join_working_folder(self.folder, fill_placeholders(text, {**self.names, **names}, self.environ))
        except ValueError as error:
            return Problem(f"{prefix}{key} = {value_text(text)}: {error}")
        refused = self.rule(key, path)
        # The key is in the file that `prefix` names, not in the config.
        return path if refused is None else replace(refused, found=prefix + refused.found, key="")


@dataclass
class DatasetListing:
    """Result of reading the file. `datasets` is None if there are problems."""

    datasets: Datasets | None = None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_datasets(path: Path, label: str, path_context: PathContext) -> DatasetListing:
    """Read the datasets listed in `path`, which messages call `label`. Errors are in `problems`; raises nothing."""
    listing = DatasetListing()
    try:
        entries = read_document(path, label)
    except ConfigError as error:
        listing.problems.extend(error.problems)
        return listing
    name = other_format(entries) if isinstance(entries, dict) else None
    if name is not None:
        listing.problems.append(other_trainer_problem(label, name, entries, OUR_DATASETS))
        return listing
    if not isinstance(entries, list):
        listing.problems.append(Problem(f"{label}: {value_text(entries)}", "a list of objects, in [ ]"))
        return listing
    sets: list[ImageSet] = []
    conditions: list[ConditioningSet] = []
    stores: list[TextStore] = []
    names: list[str] = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            listing.problems.append(Problem(f"{label}, entry {number}: {value_text(entry)}", "an object, in { }"))
            continue
        parsed = _entry(entry, f"{label}, {entry.get('id', f'entry {number}')}: ", listing, path_context)
        names.append(str(entry.get("id")))
        if isinstance(parsed, ImageSet):
            sets.append(parsed)
        elif isinstance(parsed, ConditioningSet):
            conditions.append(parsed)
        elif isinstance(parsed, TextStore):
            stores.append(parsed)
    listing.problems += [
        Problem(f"{label}: {names.count(name)} entries have the id {value_text(name)}", "a different id for each")
        for name in dict.fromkeys(names)
        if name != "None" and names.count(name) > 1
    ]
    if not listing.problems:
        _assemble(sets, conditions, stores, label, listing, path_context)
    return listing


def _entry(entry: dict[str, Any], prefix: str, listing: DatasetListing, path_context: PathContext) -> Slice | None:
    """Parse one entry, or return None and add its problems to `listing`. `prefix` begins each message."""
    dataset_type = entry.get("dataset_type") or "image"
    other_key = OTHER_SET_KEYS.of_value("dataset_type", dataset_type)
    if other_key is not None:
        message = f"{prefix}dataset_type = {value_text(dataset_type)}: {other_key.meaning}"
        listing.problems.append(Problem(message, remedy=other_key.remedy))
        return None
    if dataset_type not in DATASET_TYPES:
        message = f"{prefix}dataset_type = {value_text(dataset_type)}"
        listing.problems.append(Problem(message, join_names(DATASET_TYPES)))
        return None
    known_keys = {"text_embeds": TEXT_STORE, "conditioning": CONDITIONING_SET}.get(dataset_type, IMAGE_SET)
    if known_keys.other_keys.of_value("type", entry.get("type")) is not None:
        # Report an unsupported storage once: drop its other keys, which would be reported too.
        entry = {key: entry[key] for key in ("id", "type", "instance_data_dir") if key in entry}
        entry.setdefault("instance_data_dir", ".")
    entry = _with_filter_file(entry, prefix, listing, path_context)
    shuffle = entry.get("caption_shuffle")
    if isinstance(shuffle, dict):
        shuffle_givens = {key: GivenValue(value, "file", key) for key, value in shuffle.items()}
        faulty = check_givens(
            shuffle_givens, CAPTION_SHUFFLE, CheckedKeys(), prefix=f"{prefix}caption_shuffle: "
        ).problems
        if faulty:
            listing.problems += faulty.values()
            entry = {key: value for key, value in entry.items() if key != "caption_shuffle"}
    checked = CheckedKeys()
    givens = by_canonical_name(
        [(key, GivenValue(value, "file", key)) for key, value in entry.items()], known_keys, checked, prefix=prefix
    )
    check_givens(givens, known_keys, checked, prefix=prefix)
    listing.notices += checked.notices
    if not checked.problems:
        checked.valid = _with_paths(checked, known_keys.model, prefix, path_context)
    listing.problems.extend(checked.problems.values())
    if checked.problems:
        return None
    parsed = known_keys.model(**checked.valid)
    name = checked.valid["id"]
    faults = (
        [] if is_file_name(name) else [Problem(f"id = {value_text(name)}", f"{FILE_NAME}: it becomes a folder's name")]
    )
    if isinstance(parsed, FolderDataset):
        faults += _size_and_crop_faults(parsed)
        listing.notices += [prefix + notice for notice in _size_and_crop_notices(parsed, entry.keys())]
    if isinstance(parsed, ImageSet):
        faults += _image_faults(parsed)
        listing.notices += [prefix + notice for notice in _image_notices(parsed, entry.keys())]
    if isinstance(parsed, TextStore):
        faults += _filter_faults(parsed)
        patterns = [text for text in parsed.caption_filter_list or () if _PATTERN_SIGNS.search(text)]
        if patterns:
            listing.notices.append(
                f"{prefix}caption_filter_list: {join_names(map(value_text, patterns), 'and')} are removed literally: "
                "these are texts, not regular expressions."
            )
    faults = [replace(fault, found=prefix + fault.found) for fault in faults]
    if isinstance(parsed, FolderDataset) and not parsed.disabled and not Path(parsed.instance_data_dir).is_dir():
        faults.append(_missing_folder(prefix, entry["instance_data_dir"], parsed.instance_data_dir))
    listing.problems += faults
    return None if faults else parsed


def _with_filter_file(
    entry: dict[str, Any], prefix: str, listing: DatasetListing, path_context: PathContext
) -> dict[str, Any]:
    """`entry` with the file name in `caption_filter_list` replaced by the texts in that file."""
    key = "caption_filter_list"
    typed = entry.get(key)
    if not isinstance(typed, str) or not typed:
        return entry
    without_filter = {name: value for name, value in entry.items() if name != key}
    label = f"{prefix}{key} = {value_text(typed)}"
    try:
        path = path_context.resolve(prefix, key, typed, id=str(entry.get("id")))
        if isinstance(path, Problem):
            listing.problems.append(path)
            return without_filter
        if Path(path).suffix == ".json":
            return entry | {key: read_document(Path(path), label)}
        lines = document_text(Path(path), label).splitlines()
    except ValueError as error:  # a NUL in the path
        listing.problems.append(Problem(f"{label}: {error}"))
        return without_filter
    except ConfigError as error:
        listing.problems += error.problems
        return without_filter
    return entry | {key: [line.strip() for line in lines if line.strip()]}


def _filter_faults(store: TextStore) -> Iterator[Problem]:
    """Reject filters in SimpleTuner's syntax for a replacement, `s/a/b/`."""
    replacing = [text for text in store.caption_filter_list or () if _REPLACEMENT.fullmatch(text)]
    if replacing:
        yield Problem(
            f"caption_filter_list: {join_names(map(value_text, replacing), 'and')}",
            "texts to remove",
            "Replace texts in the caption files: simpletuner dataset captions FOLDER --find TEXT --replace TEXT.",
        )


def _with_paths(checked: CheckedKeys, model: type[Slice], prefix: str, path_context: PathContext) -> dict[str, Any]:
    """The valid values, and the defaults of paths, with every path resolved."""
    values = dict(checked.valid)
    for key, kind in kinds(model).items():
        if kind.is_path:
            text = values.get(key, model.model_fields[key].default)
            resolved = path_context.resolve(prefix, key, text, id=values["id"])
            if isinstance(resolved, Problem):
                checked.problems[key] = resolved
            else:
                values[key] = resolved
    return values


def _missing_folder(prefix: str, typed: str, path: str) -> Problem:
    setting = f"{prefix}instance_data_dir = {value_text(typed)}"
    if Path(path).exists():
        return Problem(f"{setting}: this is a file", "a folder of images")
    parent = Path(path).parent
    siblings = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    near = nearest(Path(path).name, siblings)
    if near is not None:
        return Problem(f"{setting}: no such folder", remedy=f"Did you mean {parent / near}?")
    remedy = "" if Path(typed).is_absolute() else f"The path is relative to {Path(path).absolute().parent}."
    return Problem(f"{setting}: no such folder", remedy=remedy)


def _size_and_crop_faults(folder_dataset: FolderDataset) -> Iterator[Problem]:
    """Contradictions between the keys for size and crop."""
    for key in _SIZE_KEYS:
        size: float | None = getattr(folder_dataset, key)
        if size is not None:
            yield from _size_faults(key, size, folder_dataset.resolution_type)
    low, high = folder_dataset.minimum_image_size, folder_dataset.maximum_image_size
    if low is not None and high is not None and low > high:
        yield Problem(f"minimum_image_size = {low:g}", f"at most maximum_image_size, {high:g}")
    target = folder_dataset.target_downsample_size
    if target is not None and high is not None and target > high:
        yield Problem(f"target_downsample_size = {target:g}", f"at most maximum_image_size, {high:g}")
    low, high = folder_dataset.minimum_aspect_ratio, folder_dataset.maximum_aspect_ratio
    if low is not None and high is not None and low > high:
        yield Problem(f"minimum_aspect_ratio = {low:g}", f"at most maximum_aspect_ratio, {high:g}")
    if (
        folder_dataset.crop
        and folder_dataset.crop_aspect in ("closest", "random")
        and not folder_dataset.crop_aspect_buckets
    ):
        yield Problem(
            f"crop_aspect = {value_text(folder_dataset.crop_aspect)} without crop_aspect_buckets",
            "a list of ratios (width / height) such as [0.75, 1.0, 1.33]",
        )


def _image_faults(image_set: ImageSet) -> Iterator[Problem]:
    """Contradictions between the keys for captions, conditioning sets and windows."""
    prompt = image_set.instance_prompt
    if prompt is not None and not is_visible(prompt):
        yield Problem(f"instance_prompt = {value_text(prompt)}", "a caption, as text")
    if prompt is not None and size_in_bytes(prompt) > CAPTION_BYTES:
        yield Problem(f"instance_prompt has {size_in_bytes(prompt)} bytes", f"at most {CAPTION_BYTES}")
    repeated = [name for name, count in Counter(image_set.conditioning_data).items() if count > 1]
    if repeated:
        yield Problem(f"conditioning_data names {join_names(repeated, 'and')} more than once", "each set once")
    for noun, (first, last) in image_set.windows.items():
        if last is not None and last < first:
            yield Problem(f"end_{noun} = {last}", f"at least start_{noun}, {first}")
    if image_set.instance_prompt is None:
        reasons = {
            "caption_strategy = 'instanceprompt'": image_set.caption_strategy == "instanceprompt",
            "prepend_instance_prompt = true": image_set.prepend_instance_prompt,
            "only_instance_prompt = true": image_set.only_instance_prompt,
        }
        for setting, needs_a_prompt in reasons.items():
            if needs_a_prompt:
                yield Problem(f"{setting} without instance_prompt", "the caption as instance_prompt")


def _size_faults(key: str, size: float, unit: str) -> Iterator[Problem]:
    if unit == "area" and size > _MAX_AREAS:
        yield Problem(
            f"{key} = {size:g} with resolution_type = 'area'",
            f"at most {_MAX_AREAS}, since it counts areas of 1024x1024 pixels",
            "For an edge in pixels set resolution_type to pixel_area.",
        )
    elif unit != "area" and (size < _MIN_EDGE_PX or not size.is_integer()):
        yield Problem(
            f"{key} = {size:g} with resolution_type = {value_text(unit)}",
            f"a whole number of pixels, at least {_MIN_EDGE_PX}",
            "For areas of 1024x1024 pixels set resolution_type to area." if size <= _MAX_AREAS else "",
        )


def _size_and_crop_notices(folder_dataset: FolderDataset, typed: Any) -> Iterator[str]:
    """Notices about given keys for size and crop that have no effect, each with the reason."""
    if isinstance(folder_dataset, ConditioningSet) and folder_dataset.conditioning_type != "reference_loose":
        named = [key for key in typed if key in _SHAPE_KEYS]
        if named:
            yield no_effect(
                named, f"with {folder_dataset.conditioning_type} a file is resized and cropped like its image"
            )
        return
    is_cropped = folder_dataset.crop
    uses_buckets = is_cropped and folder_dataset.crop_aspect in ("closest", "random")
    keeps_shape = isinstance(folder_dataset, ConditioningSet) and not is_cropped
    ignored = [
        (("crop_aspect", "crop_style"), not is_cropped, "crop is false"),
        (("crop_aspect_buckets",), not uses_buckets, "crop_aspect is neither closest nor random"),
        (("target_downsample_size",), folder_dataset.maximum_image_size is None, "maximum_image_size is not set"),
        (
            ("maximum_image_size", "max_upscale_threshold"),
            keeps_shape,
            "references without crop are downsampled to resolution, and never enlarged",
        ),
    ]
    yield from _ignored(ignored, typed)
    edge = folder_dataset.resolution
    if folder_dataset.resolution_type != "area" and edge % 16 and not keeps_shape:
        yield f"resolution = {edge:g} is not divisible by 16: sides are rounded to {round(edge / 16) * 16}."


def _image_notices(image_set: ImageSet, typed: Any) -> Iterator[str]:
    """Notices about the other given keys of an image set that have no effect, each with the reason."""
    has_one_caption = image_set.only_instance_prompt or image_set.caption_strategy == "instanceprompt"
    reads_textfiles = image_set.caption_strategy == "textfile" and not image_set.only_instance_prompt
    ignored = [
        (("disable_multiline_split",), not reads_textfiles, "captions do not come from .txt files"),
        (("caption_shuffle",), has_one_caption, "every caption is instance_prompt"),
        (_TRAINING_KEYS, image_set.dataset_type == "eval", "an eval set is never trained"),
        (("conditioning_required",), not image_set.conditioning_data, "conditioning_data names no set"),
        (
            ("class_prompt",),
            image_set.is_regularisation_data,
            "a regularization set is preserved with its captions unchanged",
        ),
    ]
    yield from _ignored(ignored, typed)


def _ignored(ignored: Sequence[tuple[tuple[str, ...], bool, str]], typed: Any) -> Iterator[str]:
    for keys, has_no_effect, reason in ignored:
        named = [key for key in keys if has_no_effect and key in typed]
        if named:
            yield no_effect(named, reason)


def _assemble(
    sets: list[ImageSet],
    conditions: list[ConditioningSet],
    stores: list[TextStore],
    label: str,
    listing: DatasetListing,
    path_context: PathContext,
) -> None:
    """Check the entries against each other, and set `listing.datasets` if there are no problems."""
    enabled = [image_set for image_set in sets if not image_set.disabled]
    train_sets = tuple(image_set for image_set in enabled if image_set.dataset_type == "image")
    if not train_sets:
        listing.problems.append(Problem(f"{label}: no images to train on", "an enabled image set"))
    elif all(image_set.is_regularisation_data for image_set in train_sets):
        message = f"{label}: every image set has is_regularisation_data, so nothing would be learned"
        listing.problems.append(Problem(message, "an enabled image set without it"))
    if not stores:
        folder = join_working_folder(path_context.folder, f"{path_context.names['output_dir']}/cache/text")
        stores = [TextStore(id="text-embeds", default=True, cache_dir=folder)]
    elif len(stores) == 1 and not stores[0].default:
        listing.notices.append(f"{label}: {stores[0].id} is the only text store, so it is the default.")
        stores = [stores[0].model_copy(update={"default": True})]
    defaults = [store.id for store in stores if store.default]
    if len(defaults) != 1:
        message = f"{label}: {join_names(defaults, 'and')} are" if defaults else f"{label}: no text store is"
        listing.problems.append(Problem(f"{message} marked as default", "default = true for exactly one"))
    ids = [store.id for store in stores]
    for image_set in enabled:
        if image_set.text_embeds is not None and image_set.text_embeds not in ids:
            message = f"{label}, {image_set.id}: text_embeds = {value_text(image_set.text_embeds)}"
            listing.problems.append(Problem(message, f"the id of a text store: {join_names(ids)}"))
    listing.problems += _condition_problems(sets, conditions, label)
    used = [each for each in conditions if not each.disabled]
    output_folders = {
        "output_dir": join_working_folder(path_context.folder, path_context.names["output_dir"]),
        **{f"cache_dir_vae of {each.id}": each.cache_dir_vae for each in (*enabled, *used)},
        **{f"cache_dir of {store.id}": store.cache_dir for store in stores},
    }
    listing.problems += [
        Problem(
            f"{label}, {each.id}: instance_data_dir is also {key}",
            "a folder for each: files written there would be read as images",
        )
        for each in (*enabled, *used)
        for key, path in output_folders.items()
        if Path(path).absolute() == Path(each.instance_data_dir).absolute()
    ]
    eval_sets = tuple(image_set for image_set in enabled if image_set.dataset_type == "eval")
    trained = {image_set.instance_data_dir: image_set.id for image_set in train_sets}
    listing.notices += [
        f"{label}: {eval_set.id} has the same images as {trained[eval_set.instance_data_dir]}: "
        "its loss is not a held-out loss."
        for eval_set in eval_sets
        if eval_set.instance_data_dir in trained
    ]
    if not listing.problems:
        listing.datasets = Datasets(
            train_sets=train_sets,
            eval_sets=eval_sets,
            text_stores=tuple(stores),
            conditioning_sets=tuple(used),
        )


def _condition_problems(
    sets: Sequence[ImageSet], conditions: Sequence[ConditioningSet], label: str
) -> Iterator[Problem]:
    """Contradictions between image sets and the conditioning sets that they name."""
    by_id = {each.id: each for each in conditions}
    for image_set in sets:
        if image_set.disabled:
            continue
        key = f"{label}, {image_set.id}: conditioning_data"
        for name in image_set.conditioning_data:
            if name not in by_id:
                ids = f": {join_names(list(by_id))}" if by_id else "; there is none"
                yield Problem(f"{key} = {value_text(name)}", f"the id of a conditioning set{ids}")
            elif by_id[name].disabled:
                yield Problem(f"{key} = {value_text(name)}, which is disabled", "an enabled conditioning set")
        named = [by_id[name] for name in dict.fromkeys(image_set.conditioning_data) if name in by_id]
        references = [each for each in named if each.is_reference]
        masks = [each.id for each in named if not each.is_reference]
        if len(references) > MAX_REFERENCES:
            yield Problem(f"{key} names {len(references)} sets of references", f"at most {MAX_REFERENCES}")
        if len(masks) > 1:
            yield Problem(f"{key} names {join_names(masks, 'and')}", "one set of masks")
        if masks and image_set.mask_source == "alpha":
            yield Problem(
                f"{label}, {image_set.id}: mask_source = 'alpha' beside the mask set {masks[0]}",
                "one source of masks",
                f"Leave {masks[0]} out of conditioning_data, or set mask_source to set.",
            )
        folder = Path(image_set.instance_data_dir).absolute()
        for each in named:
            condition_folder = Path(each.instance_data_dir).absolute()
            if folder == condition_folder or folder in condition_folder.parents:
                yield Problem(
                    f"{label}, {each.id}: instance_data_dir {'is' if folder == condition_folder else 'is inside'} that "
                    f"of {image_set.id}, which would train its files as images",
                    "a folder beside it",
                )
    named_ids = {name for image_set in sets for name in image_set.conditioning_data}
    for each in conditions:
        if each.id not in named_ids and not each.disabled:
            yield Problem(
                f"{label}, {each.id}: no image set names it in conditioning_data",
                "an image set that it belongs to",
                f'Put "conditioning_data": "{each.id}" into the image set, or "disabled": true into this entry.',
            )
