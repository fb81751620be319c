"""`multidatabackend.json` as `Datasets`, with every fault of every entry."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.text import CAPTION_BYTES, FILE_NAME, does_as_file_name, is_visible, size_in_bytes
from simpletuner.config.datasets import (
    MOST_REFERENCES,
    CaptionShuffle,
    ConditioningSet,
    Datasets,
    ImageSet,
    PictureSet,
    TextStore,
)
from simpletuner.config.documents import document_text, read_document
from simpletuner.config.given import Checked, Given, Known, check_givens, unaliased
from simpletuner.config.options.kinds import Slice
from simpletuner.config.other_keys import OTHER_CONDITION_KEYS, OTHER_SET_KEYS, OTHER_STORE_KEYS
from simpletuner.config.other_trainers import OUR_DATASETS, of_other_trainer, other_format
from simpletuner.config.paths import PathRule, filled, joined
from simpletuner.config.run import OPTION_NAMES
from simpletuner.config.values import join_names, kinds, nearest, no_effect, shown

IMAGE_SET = Known(
    ImageSet, OTHER_SET_KEYS, noun="key of an image set", elsewhere=OPTION_NAMES, other_place="the config"
)
TEXT_STORE = Known(
    TextStore,
    OTHER_STORE_KEYS,
    noun="key of a text store",
    elsewhere=ImageSet.model_fields,
    other_place="an image set",
)
CONDITIONING_SET = Known(
    ConditioningSet,
    OTHER_CONDITION_KEYS,
    noun="key of a conditioning set",
    elsewhere=ImageSet.model_fields,
    other_place="an image set",
)
CAPTION_SHUFFLE = Known(CaptionShuffle, noun="key of caption_shuffle")
DATASET_TYPES = ("image", "eval", "conditioning", "text_embeds")

_SIZE_KEYS = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
_SHAPE_KEYS = PictureSet.model_fields.keys() - {"id", "type", "instance_data_dir", "disabled", "cache_dir_vae"}
_LEAST_EDGE, _MOST_AREAS = 16, 64
_REPLACEMENT = re.compile(r"s/.*/.*/")
_PATTERN_SIGNS = re.compile(r"[\\^$*+|\[\]{}]")
_OF_TRAINING = (
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
"""Keys that a held-out set has no use for."""


@dataclass(frozen=True)
class Surroundings:
    """What the entries' paths and defaults refer to."""

    folder: Path
    """Relative paths start here."""

    names: Mapping[str, str]
    """Placeholders: `model_family` and `output_dir`."""

    environ: Mapping[str, str] | None
    """For `{env:NAME}`; None refuses those."""

    rule: PathRule | None = None


@dataclass
class Listing:
    """What came of the file. `datasets` is None where there are problems."""

    datasets: Datasets | None = None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_datasets(path: Path, label: str, around: Surroundings) -> Listing:
    """The datasets listed in `path`, which messages call `label`. Raises nothing: see `problems`."""
    listing = Listing()
    try:
        entries = read_document(path, label)
    except ConfigError as error:
        listing.problems.extend(error.problems)
        return listing
    name = other_format(entries) if isinstance(entries, dict) else None
    if name is not None:
        listing.problems.append(of_other_trainer(label, name, entries, OUR_DATASETS))
        return listing
    if not isinstance(entries, list):
        listing.problems.append(Problem(f"{label}: {shown(entries)}", "a list of objects, in [ ]"))
        return listing
    sets: list[ImageSet] = []
    conditions: list[ConditioningSet] = []
    stores: list[TextStore] = []
    names: list[str] = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            listing.problems.append(Problem(f"{label}, entry {number}: {shown(entry)}", "an object, in { }"))
            continue
        made = _entry(entry, f"{label}, {entry.get('id', f'entry {number}')}: ", listing, around)
        names.append(str(entry.get("id")))
        if isinstance(made, ImageSet):
            sets.append(made)
        elif isinstance(made, ConditioningSet):
            conditions.append(made)
        elif isinstance(made, TextStore):
            stores.append(made)
    listing.problems += [
        Problem(f"{label}: {names.count(name)} entries have the id {shown(name)}", "a different id for each")
        for name in dict.fromkeys(names)
        if name != "None" and names.count(name) > 1
    ]
    if not listing.problems:
        _assemble(sets, conditions, stores, label, listing, around)
    return listing


def _entry(entry: dict[str, Any], where: str, listing: Listing, around: Surroundings) -> Slice | None:
    """One entry as what it is, or None with its problems added to `listing`."""
    dataset_type = entry.get("dataset_type") or "image"
    other = OTHER_SET_KEYS.of_value("dataset_type", dataset_type)
    if other is not None:
        found = f"{where}dataset_type = {shown(dataset_type)}: {other.meaning}"
        listing.problems.append(Problem(found, remedy=other.remedy))
        return None
    if dataset_type not in DATASET_TYPES:
        found = f"{where}dataset_type = {shown(dataset_type)}"
        listing.problems.append(Problem(found, join_names(DATASET_TYPES)))
        return None
    known = {"text_embeds": TEXT_STORE, "conditioning": CONDITIONING_SET}.get(dataset_type, IMAGE_SET)
    if known.others.of_value("type", entry.get("type")) is not None:
        # The keys that go with another place come with the work that reads it: one message is enough.
        entry = {key: entry[key] for key in ("id", "type", "instance_data_dir") if key in entry}
        entry.setdefault("instance_data_dir", ".")
    entry = _with_filter_file(entry, where, listing, around)
    shuffle = entry.get("caption_shuffle")
    if isinstance(shuffle, dict):
        parts = {key: Given(value, "file", key) for key, value in shuffle.items()}
        faulty = check_givens(parts, CAPTION_SHUFFLE, Checked(), where=f"{where}caption_shuffle: ").problems
        if faulty:
            listing.problems += faulty.values()
            entry = {key: value for key, value in entry.items() if key != "caption_shuffle"}
    checked = Checked()
    givens = unaliased([(key, Given(value, "file", key)) for key, value in entry.items()], known, checked, where=where)
    check_givens(givens, known, checked, where=where)
    listing.notices += checked.notices
    if not checked.problems:
        checked.valid = _with_paths(checked, known.model, where, around)
    listing.problems.extend(checked.problems.values())
    if checked.problems:
        return None
    made = known.model(**checked.valid)
    name = checked.valid["id"]
    faults = [] if does_as_file_name(name) else [Problem(f"id = {shown(name)}", f"{FILE_NAME}: it becomes a folder's")]
    if isinstance(made, PictureSet):
        faults += _picture_faults(made)
        listing.notices += [where + notice for notice in _picture_notices(made, entry.keys())]
    if isinstance(made, ImageSet):
        faults += _image_faults(made)
        listing.notices += [where + notice for notice in _image_notices(made, entry.keys())]
    if isinstance(made, TextStore):
        faults += _filter_faults(made)
        signs = [text for text in made.caption_filter_list or () if _PATTERN_SIGNS.search(text)]
        if signs:
            listing.notices.append(
                f"{where}caption_filter_list: {join_names(map(shown, signs), 'and')} are taken out as they are "
                "written: these are texts, not regular expressions."
            )
    faults = [replace(fault, found=where + fault.found) for fault in faults]
    if isinstance(made, PictureSet) and not made.disabled and not Path(made.instance_data_dir).is_dir():
        faults.append(_no_folder(where, entry["instance_data_dir"], made.instance_data_dir))
    listing.problems += faults
    return None if faults else made


def _with_filter_file(entry: dict[str, Any], where: str, listing: Listing, around: Surroundings) -> dict[str, Any]:
    """`entry`, with what the file of its `caption_filter_list` lists in place of the file's name."""
    key = "caption_filter_list"
    typed = entry.get(key)
    if not isinstance(typed, str) or not typed:
        return entry
    others = {name: value for name, value in entry.items() if name != key}
    label = f"{where}{key} = {shown(typed)}"
    try:
        names = {**around.names, "id": str(entry.get("id"))}
        path = joined(around.folder, filled(typed, names, around.environ))
        refused = None if around.rule is None else around.rule(key, path)
        if refused is not None:
            listing.problems.append(replace(refused, found=where + refused.found, key=""))
            return others
        if Path(path).suffix == ".json":
            return entry | {key: read_document(Path(path), label)}
        lines = document_text(Path(path), label).splitlines()
    except ValueError as error:
        listing.problems.append(Problem(f"{label}: {error}"))
        return others
    except ConfigError as error:
        listing.problems += error.problems
        return others
    return entry | {key: [line.strip() for line in lines if line.strip()]}


def _filter_faults(store: TextStore) -> Iterator[Problem]:
    """SimpleTuner's way of writing a replacement."""
    replacing = [text for text in store.caption_filter_list or () if _REPLACEMENT.fullmatch(text)]
    if replacing:
        yield Problem(
            f"caption_filter_list: {join_names(map(shown, replacing), 'and')}",
            "texts to take out",
            "Replace texts in the caption files: simpletuner dataset captions FOLDER --find TEXT --replace TEXT.",
        )


def _with_paths(checked: Checked, model: type[Slice], where: str, around: Surroundings) -> dict[str, Any]:
    """The valid values, defaults of paths included, with every path filled in."""
    values = dict(checked.valid)
    names = {**around.names, "id": values["id"]}
    for key, kind in kinds(model).items():
        if kind.is_path:
            text = values.get(key, model.model_fields[key].default)
            try:
                values[key] = joined(around.folder, filled(text, names, around.environ))
            except ValueError as error:
                checked.problems[key] = Problem(f"{where}{key} = {shown(text)}: {error}")
                continue
            refused = None if around.rule is None else around.rule(key, values[key])
            if refused is not None:
                # Its key stands in another file than the config.
                checked.problems[key] = replace(refused, found=where + refused.found, key="")
    return values


def _no_folder(where: str, typed: str, path: str) -> Problem:
    found = f"{where}instance_data_dir = {shown(typed)}"
    if Path(path).exists():
        return Problem(f"{found}: this is a file", "a folder of pictures")
    parent = Path(path).parent
    siblings = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    near = nearest(Path(path).name, siblings)
    if near is not None:
        return Problem(f"{found}: no such folder", remedy=f"Did you mean {parent / near}?")
    remedy = "" if Path(typed).is_absolute() else f"It is looked for in {Path(path).absolute().parent}."
    return Problem(f"{found}: no such folder", remedy=remedy)


def _picture_faults(picture_set: PictureSet) -> Iterator[Problem]:
    """What is wrong between the keys about size and crop."""
    for key in _SIZE_KEYS:
        size: float | None = getattr(picture_set, key)
        if size is not None:
            yield from _size_faults(key, size, picture_set.resolution_type)
    low, high = picture_set.minimum_image_size, picture_set.maximum_image_size
    if low is not None and high is not None and low > high:
        yield Problem(f"minimum_image_size = {low:g}", f"at most maximum_image_size, {high:g}")
    target = picture_set.target_downsample_size
    if target is not None and high is not None and target > high:
        yield Problem(f"target_downsample_size = {target:g}", f"at most maximum_image_size, {high:g}")
    low, high = picture_set.minimum_aspect_ratio, picture_set.maximum_aspect_ratio
    if low is not None and high is not None and low > high:
        yield Problem(f"minimum_aspect_ratio = {low:g}", f"at most maximum_aspect_ratio, {high:g}")
    if picture_set.crop and picture_set.crop_aspect in ("closest", "random") and not picture_set.crop_aspect_buckets:
        yield Problem(
            f"crop_aspect = {shown(picture_set.crop_aspect)} without crop_aspect_buckets",
            "a list of ratios (width / height) such as [0.75, 1.0, 1.33]",
        )


def _image_faults(image_set: ImageSet) -> Iterator[Problem]:
    """What is wrong between the keys about captions and conditions."""
    prompt = image_set.instance_prompt
    if prompt is not None and not is_visible(prompt):
        yield Problem(f"instance_prompt = {shown(prompt)}", "a caption, as text")
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
        for found, needs_a_prompt in reasons.items():
            if needs_a_prompt:
                yield Problem(f"{found} without instance_prompt", "the caption as instance_prompt")


def _size_faults(key: str, size: float, unit: str) -> Iterator[Problem]:
    if unit == "area" and size > _MOST_AREAS:
        yield Problem(
            f"{key} = {size:g} with resolution_type = 'area'",
            f"at most {_MOST_AREAS}, since it counts areas of 1024x1024 pixels",
            "For an edge in pixels set resolution_type to pixel_area.",
        )
    elif unit != "area" and (size < _LEAST_EDGE or not size.is_integer()):
        yield Problem(
            f"{key} = {size:g} with resolution_type = {shown(unit)}",
            f"a whole number of pixels, at least {_LEAST_EDGE}",
            "For areas of 1024x1024 pixels set resolution_type to area." if size <= _MOST_AREAS else "",
        )


def _picture_notices(picture_set: PictureSet, typed: Any) -> Iterator[str]:
    """Keys about size and crop that were typed and have no effect, each with the reason."""
    if isinstance(picture_set, ConditioningSet) and picture_set.conditioning_type != "reference_loose":
        named = [key for key in typed if key in _SHAPE_KEYS]
        if named:
            yield no_effect(
                named, f"with {picture_set.conditioning_type} a file is resized and cropped as its image is"
            )
        return
    is_cropped = picture_set.crop
    uses_buckets = is_cropped and picture_set.crop_aspect in ("closest", "random")
    keeps_shape = isinstance(picture_set, ConditioningSet) and not is_cropped
    ignored = [
        (("crop_aspect", "crop_style"), not is_cropped, "crop is false"),
        (("crop_aspect_buckets",), not uses_buckets, "crop_aspect is neither closest nor random"),
        (("target_downsample_size",), picture_set.maximum_image_size is None, "maximum_image_size is not set"),
        (
            ("maximum_image_size", "max_upscale_threshold"),
            keeps_shape,
            "references without crop are brought down to resolution, and never enlarged",
        ),
    ]
    yield from _ignored(ignored, typed)
    edge = picture_set.resolution
    if picture_set.resolution_type != "area" and edge % 16 and not keeps_shape:
        yield f"resolution = {edge:g} does not divide by 16: sides are rounded to {round(edge / 16) * 16}."


def _image_notices(image_set: ImageSet, typed: Any) -> Iterator[str]:
    """Other keys of an image set that were typed and have no effect, each with the reason."""
    has_one_caption = image_set.only_instance_prompt or image_set.caption_strategy == "instanceprompt"
    reads_textfiles = image_set.caption_strategy == "textfile" and not image_set.only_instance_prompt
    ignored = [
        (("disable_multiline_split",), not reads_textfiles, "captions do not come from .txt files"),
        (("caption_shuffle",), has_one_caption, "every caption is instance_prompt"),
        (_OF_TRAINING, image_set.dataset_type == "eval", "an eval set is never trained"),
        (("conditioning_required",), not image_set.conditioning_data, "conditioning_data names no set"),
        (
            ("class_prompt",),
            image_set.is_regularisation_data,
            "a regularization set is held at the base model as it is",
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
    listing: Listing,
    around: Surroundings,
) -> None:
    """Check across entries, and set `listing.datasets` where nothing is wrong."""
    enabled = [image_set for image_set in sets if not image_set.disabled]
    train_sets = tuple(image_set for image_set in enabled if image_set.dataset_type == "image")
    if not train_sets:
        listing.problems.append(Problem(f"{label}: there is nothing to train on", "an enabled image set"))
    elif all(image_set.is_regularisation_data for image_set in train_sets):
        found = f"{label}: every image set has is_regularisation_data: nothing would be learned"
        listing.problems.append(Problem(found, "an enabled image set without it"))
    if not stores:
        folder = joined(around.folder, f"{around.names['output_dir']}/cache/text")
        stores = [TextStore(id="text-embeds", default=True, cache_dir=folder)]
    elif len(stores) == 1 and not stores[0].default:
        listing.notices.append(f"{label}: {stores[0].id} is the default text store, as the only one.")
        stores = [stores[0].model_copy(update={"default": True})]
    defaults = [store.id for store in stores if store.default]
    if len(defaults) != 1:
        found = f"{label}: {join_names(defaults, 'and')} are" if defaults else f"{label}: no text store is"
        listing.problems.append(Problem(f"{found} marked as default", "default = true for exactly one"))
    ids = [store.id for store in stores]
    for image_set in enabled:
        if image_set.text_embeds is not None and image_set.text_embeds not in ids:
            found = f"{label}, {image_set.id}: text_embeds = {shown(image_set.text_embeds)}"
            listing.problems.append(Problem(found, f"the id of a text store: {join_names(ids)}"))
    listing.problems += _condition_problems(sets, conditions, label)
    used = [each for each in conditions if not each.disabled]
    places = {
        "output_dir": joined(around.folder, around.names["output_dir"]),
        **{f"cache_dir_vae of {each.id}": each.cache_dir_vae for each in (*enabled, *used)},
        **{f"cache_dir of {store.id}": store.cache_dir for store in stores},
    }
    listing.problems += [
        Problem(
            f"{label}, {each.id}: instance_data_dir is also {place}",
            "a folder for each: what is written there would be read as pictures",
        )
        for each in (*enabled, *used)
        for place, path in places.items()
        if Path(path).absolute() == Path(each.instance_data_dir).absolute()
    ]
    eval_sets = tuple(image_set for image_set in enabled if image_set.dataset_type == "eval")
    trained = {image_set.instance_data_dir: image_set.id for image_set in train_sets}
    listing.notices += [
        f"{label}: {held.id} has the pictures of {trained[held.instance_data_dir]}: "
        "its loss says nothing about pictures that were not trained."
        for held in eval_sets
        if held.instance_data_dir in trained
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
    """What is wrong between image sets and the conditioning sets that they name."""
    by_id = {each.id: each for each in conditions}
    for image_set in sets:
        if image_set.disabled:
            continue
        where = f"{label}, {image_set.id}: conditioning_data"
        for name in image_set.conditioning_data:
            if name not in by_id:
                ids = f": {join_names(list(by_id))}" if by_id else "; there is none"
                yield Problem(f"{where} = {shown(name)}", f"the id of a conditioning set{ids}")
            elif by_id[name].disabled:
                yield Problem(f"{where} = {shown(name)}, which is disabled", "an enabled conditioning set")
        named = [by_id[name] for name in dict.fromkeys(image_set.conditioning_data) if name in by_id]
        references = [each for each in named if each.is_reference]
        masks = [each.id for each in named if not each.is_reference]
        if len(references) > MOST_REFERENCES:
            yield Problem(f"{where} names {len(references)} sets of references", f"at most {MOST_REFERENCES}")
        if len(masks) > 1:
            yield Problem(f"{where} names {join_names(masks, 'and')}", "one set of masks")
        if masks and image_set.mask_source == "alpha":
            yield Problem(
                f"{label}, {image_set.id}: mask_source = 'alpha' beside the mask set {masks[0]}",
                "one source of masks",
                f"Leave {masks[0]} out of conditioning_data, or set mask_source to set.",
            )
        folder = Path(image_set.instance_data_dir).absolute()
        for each in named:
            own = Path(each.instance_data_dir).absolute()
            if folder == own or folder in own.parents:
                yield Problem(
                    f"{label}, {each.id}: instance_data_dir {'is' if folder == own else 'lies in'} that of "
                    f"{image_set.id}, which would train its files as images",
                    "a folder beside it",
                )
    wanted = {name for image_set in sets for name in image_set.conditioning_data}
    for each in conditions:
        if each.id not in wanted and not each.disabled:
            yield Problem(
                f"{label}, {each.id}: no set names it in conditioning_data",
                "a set that it belongs to",
                f'Put "conditioning_data": "{each.id}" into the set of its images, or "disabled": true here.',
            )
