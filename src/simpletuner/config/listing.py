"""`multidatabackend.json` as `Datasets`, with every fault of every entry."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.text import CAPTION_BYTES, FILE_NAME, does_as_file_name, is_visible, size_in_bytes
from simpletuner.config.datasets import ConditioningSet, Datasets, ImageSet, PictureSet, TextStore
from simpletuner.config.documents import read_document
from simpletuner.config.given import Checked, Given, Known, check_givens, unaliased
from simpletuner.config.options.kinds import Slice
from simpletuner.config.other_keys import OTHER_SET_KEYS, OTHER_STORE_KEYS
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
    OTHER_SET_KEYS,
    noun="key of a conditioning set",
    elsewhere=ImageSet.model_fields,
    other_place="an image set",
)
DATASET_TYPES = ("image", "eval", "conditioning", "text_embeds")

_SIZE_KEYS = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
_LEAST_EDGE, _MOST_AREAS = 16, 64


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
    if isinstance(made, ImageSet):
        faults += _faults(made)
        listing.notices += [where + notice for notice in _notices(made, entry.keys())]
    faults = [replace(fault, found=where + fault.found) for fault in faults]
    if isinstance(made, PictureSet) and not made.disabled and not Path(made.instance_data_dir).is_dir():
        faults.append(_no_folder(where, entry["instance_data_dir"], made.instance_data_dir))
    listing.problems += faults
    return None if faults else made


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


def _faults(image_set: ImageSet) -> Iterator[Problem]:
    """What is wrong between the keys of one set."""
    prompt = image_set.instance_prompt
    if prompt is not None and not is_visible(prompt):
        yield Problem(f"instance_prompt = {shown(prompt)}", "a caption, as text")
    if prompt is not None and size_in_bytes(prompt) > CAPTION_BYTES:
        yield Problem(f"instance_prompt has {size_in_bytes(prompt)} bytes", f"at most {CAPTION_BYTES}")
    for key in _SIZE_KEYS:
        size: float | None = getattr(image_set, key)
        if size is not None:
            yield from _size_faults(key, size, image_set.resolution_type)
    low, high = image_set.minimum_image_size, image_set.maximum_image_size
    if low is not None and high is not None and low > high:
        yield Problem(f"minimum_image_size = {low:g}", f"at most maximum_image_size, {high:g}")
    target = image_set.target_downsample_size
    if target is not None and high is not None and target > high:
        yield Problem(f"target_downsample_size = {target:g}", f"at most maximum_image_size, {high:g}")
    low, high = image_set.minimum_aspect_ratio, image_set.maximum_aspect_ratio
    if low is not None and high is not None and low > high:
        yield Problem(f"minimum_aspect_ratio = {low:g}", f"at most maximum_aspect_ratio, {high:g}")
    if image_set.crop and image_set.crop_aspect in ("closest", "random") and not image_set.crop_aspect_buckets:
        yield Problem(
            f"crop_aspect = {shown(image_set.crop_aspect)} without crop_aspect_buckets",
            "a list of ratios (width / height) such as [0.75, 1.0, 1.33]",
        )
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


def _notices(image_set: ImageSet, typed: Any) -> Iterator[str]:
    """Keys that were typed and have no effect, each with the reason."""
    uses_buckets = image_set.crop and image_set.crop_aspect in ("closest", "random")
    reads_textfiles = image_set.caption_strategy == "textfile" and not image_set.only_instance_prompt
    ignored = [
        (("crop_aspect", "crop_style"), not image_set.crop, "crop is false"),
        (("crop_aspect_buckets",), not uses_buckets, "crop_aspect is neither closest nor random"),
        (("target_downsample_size",), image_set.maximum_image_size is None, "maximum_image_size is not set"),
        (("disable_multiline_split",), not reads_textfiles, "captions do not come from .txt files"),
        (("repeats", "probability"), image_set.dataset_type == "eval", "an eval set is never trained"),
    ]
    for keys, has_no_effect, reason in ignored:
        named = [key for key in keys if has_no_effect and key in typed]
        if named:
            yield no_effect(named, reason)
    edge = image_set.resolution
    if image_set.resolution_type != "area" and edge % 16:
        yield f"resolution = {edge:g} does not divide by 16: sides are rounded to {round(edge / 16) * 16}."


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
    places = {
        "output_dir": joined(around.folder, around.names["output_dir"]),
        **{f"cache_dir_vae of {image_set.id}": image_set.cache_dir_vae for image_set in enabled},
        **{f"cache_dir of {store.id}": store.cache_dir for store in stores},
    }
    listing.problems += [
        Problem(
            f"{label}, {image_set.id}: instance_data_dir is also {place}",
            "a folder for each: what is written there would be read as pictures",
        )
        for image_set in enabled
        for place, path in places.items()
        if Path(path).absolute() == Path(image_set.instance_data_dir).absolute()
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
            conditioning_sets=tuple(each for each in conditions if not each.disabled),
        )
