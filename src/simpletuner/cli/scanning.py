"""`simpletuner dataset scan|show|cache`: scan, show or cache a configuration's datasets."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from simpletuner.base.console import complain, is_terminal, output_failures_ignored, say_on_standard_error
from simpletuner.base.errors import ConfigError, DataError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.cli.dataset import DatasetCommand
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import table
from simpletuner.config.load import LoadedConfig
from simpletuner.data.manifest import Manifest, rejection_counts, scan_of
from simpletuner.data.sample import Crop, Sample
from simpletuner.data.sheet import contact_sheet
from simpletuner.runs.events import Event, ProgressEvent

CROP_COLUMNS = 6
"""Columns of a contact sheet whose images have neither references nor masks."""
T = TypeVar("T")

PROGRESS_EVERY_S = 0.1
"""Minimum time between two progress lines."""


def execute(verb: str, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    """Scan, show or cache the datasets; returns the result as a JSON object and as text, each with the notices.

    Raises:
        ConfigError: a mistake in the configuration.
        DataError: a dataset is missing, or contains no image that can be trained on.
    """
    loaded = load_here(command.train_options)
    result, text = {"scan": _scan, "show": _show, "cache": _cache}[verb](loaded, command)
    return result | {"notices": list(loaded.notices)}, "\n".join((*loaded.notices, text))


def _scan(loaded: LoadedConfig, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    manifests = _scanned(loaded, command)
    sets = [manifest.summary() for manifest in manifests]
    if command.pictures:
        for summary, manifest in zip(sets, manifests, strict=True):
            summary["samples"] = [_as_json(sample) for sample in manifest.samples]
    return {"sets": sets}, "\n\n".join(map(_described, manifests))


def _as_json(sample: Sample) -> dict[str, Any]:
    """A training image with its crop, references and mask, as JSON."""
    return {
        **_crop_as_json(sample),
        "captions": list(sample.captions),
        "references": [_crop_as_json(reference) for reference in sample.references],
        "mask": None if sample.mask is None else _crop_as_json(sample.mask),
    }


def _crop_as_json(crop: Crop) -> dict[str, Any]:
    """An image's sizes in pixels, as JSON. `crop` is the left and top edge of `target` within `resize`."""
    return {
        "set": crop.dataset,
        "name": crop.name,
        "path": crop.location,
        "width": crop.width,
        "height": crop.height,
        "target": list(crop.geometry.target),
        "resize": list(crop.geometry.resize),
        "crop": list(crop.geometry.crop),
    }


def _print_progress(phase: str, done: int, total: int) -> None:
    complain(json.dumps({"what": phase, "done": done, "total": total}))


def _show(loaded: LoadedConfig, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    folder = Path(command.out or loaded.config.output_dir)
    sheets = []
    for manifest in _scanned(loaded, command):
        safe_id = re.sub(r"[^\w.-]", "_", manifest.image_set.id)
        path = folder / f"dataset-{safe_id}.png"
        indices = _evenly_spaced(len(manifest.samples), command.count)
        with file_errors_reported(path):
            folder.mkdir(parents=True, exist_ok=True)
            _sheet(manifest, indices).save(path)
        sheets.append({"id": manifest.image_set.id, "path": str(path), "pictures": len(indices)})
    text = "\n".join(f"{sheet['id']}: {sheet['pictures']} crops in {sheet['path']}" for sheet in sheets)
    return {"sheets": sheets}, text


def _cache(loaded: LoadedConfig, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    if command.set:
        raise ConfigError.of("--set with dataset cache", "scan or show", "A run needs the caches of all its datasets.")
    # Imported late, because it loads torch, which the other verbs do not need.
    from simpletuner.flux2.components import check_precisions
    from simpletuner.flux2.source import locate
    from simpletuner.memory.world import World
    from simpletuner.train.caches import prepare
    from simpletuner.train.report import Reporter

    world = World.single()
    check_precisions(loaded.config, world.device)
    # Standard output is reserved for the JSON object.
    with output_failures_ignored(), say_on_standard_error() if command.json else contextlib.nullcontext():
        reporter = Reporter()
        if command.progress:
            # JSON lines replace the progress bar.
            reporter.is_terminal = False
            reporter.listeners.append(_print_event)
        source = locate(loaded.config, report=reporter.say)
        prepared = prepare(loaded, source, world, reporter, verify=command.verify)
    manifests = (*prepared.train, *prepared.held_out)
    return {"sets": [manifest.summary() for manifest in manifests]}, "The caches are complete."


def _scanned(loaded: LoadedConfig, command: DatasetCommand) -> list[Manifest]:
    """Scan the selected datasets; raises the problems of all of them together."""
    sets = (*loaded.datasets.train_sets, *loaded.datasets.eval_sets)
    selected = [image_set for image_set in sets if command.set in ("", image_set.id)]
    if not selected:
        ids = ", ".join(image_set.id for image_set in sets)
        raise ConfigError.of(f"--set = {command.set!r}: no such dataset", f"one of {ids}")
    manifests, problems = [], list[Problem]()
    for image_set in selected:
        with _json_progress(image_set.id) if command.progress else _progress_bar(image_set.id) as report:
            try:
                manifests.append(scan_of(loaded, image_set, report=report))
            except DataError as error:
                problems += error.problems
    DataError.raise_if(problems)
    return manifests


def _print_event(event: Event) -> None:
    if isinstance(event, ProgressEvent):
        _print_progress(event.phase, event.done, event.total)


@contextlib.contextmanager
def _json_progress(phase: str) -> Iterator[Callable[[int, int], None]]:
    """Progress as JSON lines on standard error: at most ten per second, and one at the end."""
    printed_at = -PROGRESS_EVERY_S

    def report(done: int, total: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at >= PROGRESS_EVERY_S or done == total:
            printed_at = now
            _print_progress(phase, done, total)

    yield report


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; no output elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=" images", leave=False, disable=not is_terminal()) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _described(manifest: Manifest) -> str:
    """A dataset as text: counts, sizes, the files that are left out, and notices."""
    image_set = manifest.image_set
    count = len(manifest.samples)
    lines = [f"{image_set.id} ({image_set.dataset_type}, {image_set.instance_data_dir})"]
    times = "once" if image_set.repeats == 0 else f"{image_set.repeats + 1} times (repeats = {image_set.repeats})"
    lines.append(f"  {count} images, each used {times}: {manifest.visits_per_epoch} samples per epoch")
    if image_set.probability < 1:
        lines.append(f"  an epoch uses {image_set.probability:.0%} of them, chosen at random for each epoch")
    sizes = [(f"{w}x{h}", str(len(members))) for (w, h), members in manifest.buckets.items()]
    lines.append(table([("size", "images"), *sizes], indent="    "))
    if manifest.rejections:
        counts = ", ".join(f"{n} {reason}" for reason, n in rejection_counts(manifest.rejections).items())
        lines.append(f"  left out: {counts}")
        rows = [(rejected.name, rejected.reason, rejected.detail) for rejected in manifest.rejections]
        lines.append(table([("file", "reason", "detail"), *rows], indent="    "))
    lines += [f"  {notice}" for notice in manifest.notices]
    return "\n".join(lines)


def _evenly_spaced(total: int, limit: int) -> list[int]:
    """At most `limit` of the indices 0 to `total` - 1, evenly spaced."""
    count = min(total, limit)
    return [i * total // count for i in range(count)]


def _sheet(manifest: Manifest, indices: Sequence[int]) -> Image.Image:
    """The contact sheet of the samples at `indices`: their crops in rows. If any sample has references or a mask, each
    sample has its own row: its image, its references, then its mask as the loss uses it."""
    # Imported late, because it loads numpy, which a scan without new images does not need.
    from simpletuner.data.pixels import MaskKind, render, render_mask

    kinds: dict[str, MaskKind] = {
        each.id: each.conditioning_type
        for each in manifest.conditions
        if each.conditioning_type in {"mask", "segmentation"}
    }
    groups: list[list[Image.Image]] = []
    texts: list[list[str]] = []
    for sample in (manifest.samples[index] for index in indices):
        crops = (sample, *sample.references)
        pixels = [render(crop.read(), crop.geometry, is_flattened=crop.is_flattened) for crop in crops]
        further = f" (and {len(sample.captions) - 1} more)" if len(sample.captions) > 1 else ""
        text = f"{_name_and_size(sample)}\n{sample.captions[0]}{further}"
        texts.append([text, *(f"{_name_and_size(crop)}\n{crop.dataset}" for crop in crops[1:])])
        if sample.mask is not None:
            kind = kinds.get(sample.mask.dataset, "alpha")
            pixels.append(render_mask(sample.mask.read(), sample.mask.geometry, kind))
            source = "alpha channel" if kind == "alpha" else sample.mask.dataset
            texts[-1].append(f"{_name_and_size(sample.mask)}\n{source}")
        groups.append([Image.fromarray(each) for each in pixels])
    columns = max(map(len, groups))
    if columns == 1:
        columns = min(CROP_COLUMNS, len(groups))
        groups, texts = _in_rows(groups, columns), _in_rows(texts, columns)
    return contact_sheet(groups, [""] * len(groups), [""] * columns, captions=texts)


def _name_and_size(crop: Crop) -> str:
    width, height = crop.geometry.target
    return f"{crop.name}, {width}x{height}"


def _in_rows(groups: Sequence[Sequence[T]], columns: int) -> list[list[T]]:
    """The first item of each group, in rows of `columns` items."""
    firsts = [group[0] for group in groups]
    return [firsts[start : start + columns] for start in range(0, len(firsts), columns)]
