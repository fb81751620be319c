"""The work of `simpletuner dataset scan|show|cache`, on the sets of a configuration."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from simpletuner.base.console import complain, is_terminal, say_on_standard_error, work_goes_on
from simpletuner.base.errors import ConfigError, DataError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.cli.dataset import DatasetCommand
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import table
from simpletuner.config.load import Loaded
from simpletuner.data.manifest import Manifest, rejection_counts, scan_of
from simpletuner.data.sample import Crop, Sample
from simpletuner.data.sheet import contact_sheet
from simpletuner.runs.events import Event, ProgressEvent

CROP_COLUMNS = 6
"""Of a sheet."""
T = TypeVar("T")

TELL_EVERY_S = 0.1
"""Progress of a scan."""


def work(verb: str, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    """Scan, show or cache: the answer as JSON and for people, each with the configuration's notices.

    Raises:
        ConfigError: a mistake in the configuration.
        DataError: a set is missing or nothing in it can be trained.
    """
    loaded = load_here(command.train_options)
    result, text = {"scan": _scan, "show": _show, "cache": _cache}[verb](loaded, command)
    return result | {"notices": list(loaded.notices)}, "\n".join((*loaded.notices, text))


def _scan(loaded: Loaded, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    manifests = _scanned(loaded, command)
    sets = [manifest.summary() for manifest in manifests]
    if command.pictures:
        for told, manifest in zip(sets, manifests, strict=True):
            told["samples"] = [_as_json(sample) for sample in manifest.samples]
    return {"sets": sets}, "\n\n".join(map(_described, manifests))


def _as_json(sample: Sample) -> dict[str, Any]:
    """A picture as it will be trained, with its references and its mask."""
    return {
        **_crop_as_json(sample),
        "captions": list(sample.captions),
        "references": [_crop_as_json(reference) for reference in sample.references],
        "mask": None if sample.mask is None else _crop_as_json(sample.mask),
    }


def _crop_as_json(crop: Crop) -> dict[str, Any]:
    """Sizes in pixels; the crop is the left and top of `target` inside `resize`."""
    return {
        "set": crop.dataset,
        "name": crop.name,
        "path": crop.shown,
        "width": crop.width,
        "height": crop.height,
        "target": list(crop.geometry.target),
        "resize": list(crop.geometry.resize),
        "crop": list(crop.geometry.crop),
    }


def _tell_progress(what: str, done: int, total: int) -> None:
    complain(json.dumps({"what": what, "done": done, "total": total}))


def _show(loaded: Loaded, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    folder = Path(command.out or loaded.config.output_dir)
    sheets = []
    for manifest in _scanned(loaded, command):
        safe_id = re.sub(r"[^\w.-]", "_", manifest.image_set.id)
        path = folder / f"dataset-{safe_id}.png"
        shown = _spread(len(manifest.samples), command.count)
        with file_errors_reported(path):
            folder.mkdir(parents=True, exist_ok=True)
            _sheet(manifest, shown).save(path)
        sheets.append({"id": manifest.image_set.id, "path": str(path), "pictures": len(shown)})
    text = "\n".join(f"{sheet['id']}: {sheet['pictures']} crops in {sheet['path']}" for sheet in sheets)
    return {"sheets": sheets}, text


def _cache(loaded: Loaded, command: DatasetCommand) -> tuple[dict[str, Any], str]:
    if command.set:
        raise ConfigError.of("--set with dataset cache", "scan or show", "A run needs the caches of all its sets.")
    # torch, which the other words do without.
    from simpletuner.flux2.components import check_precisions
    from simpletuner.flux2.source import locate
    from simpletuner.memory.world import World
    from simpletuner.train.caches import prepare
    from simpletuner.train.report import Reporter

    world = World.single()
    check_precisions(loaded.config, world.device)
    # JSON has standard output to itself.
    with work_goes_on(), say_on_standard_error() if command.json else contextlib.nullcontext():
        reporter = Reporter()
        if command.progress:
            # Lines in place of the bar.
            reporter.is_terminal = False
            reporter.listeners.append(_tell_event)
        source = locate(loaded.config, report=reporter.say)
        prepared = prepare(loaded, source, world, reporter, verify=command.verify)
    manifests = (*prepared.train, *prepared.held_out)
    return {"sets": [manifest.summary() for manifest in manifests]}, "The caches are filled."


def _scanned(loaded: Loaded, command: DatasetCommand) -> list[Manifest]:
    """Every set that is asked for; the problems of all of them together."""
    sets = (*loaded.datasets.train_sets, *loaded.datasets.eval_sets)
    asked = [image_set for image_set in sets if command.set in ("", image_set.id)]
    if not asked:
        known = ", ".join(image_set.id for image_set in sets)
        raise ConfigError.of(f"--set = {command.set!r}: no such set", f"one of {known}")
    manifests, problems = [], list[Problem]()
    for image_set in asked:
        with _lines(image_set.id) if command.progress else _bar(image_set.id) as report:
            try:
                manifests.append(scan_of(loaded, image_set, report=report))
            except DataError as error:
                problems += error.problems
    DataError.raise_if(problems)
    return manifests


def _tell_event(event: Event) -> None:
    if isinstance(event, ProgressEvent):
        _tell_progress(event.phase, event.done, event.total)


@contextlib.contextmanager
def _lines(what: str) -> Iterator[Callable[[int, int], None]]:
    """JSON lines on standard error, at most ten a second, and one at the end."""
    told = -TELL_EVERY_S

    def report(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_EVERY_S or done == total:
            told = now
            _tell_progress(what, done, total)

    yield report


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal, silence elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=" pictures", leave=False, disable=not is_terminal()) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _described(manifest: Manifest) -> str:
    """A set for people: one line of counts, its sizes, what was left out, what to know."""
    own = manifest.image_set
    count = len(manifest.samples)
    lines = [f"{own.id} ({own.dataset_type}, {own.instance_data_dir})"]
    times = "once" if own.repeats == 0 else f"{own.repeats + 1} times (repeats = {own.repeats})"
    lines.append(f"  {count} pictures, each seen {times}: {manifest.visits_per_epoch} visits an epoch")
    if own.probability < 1:
        lines.append(f"  of which an epoch sees {own.probability:.0%}, chosen anew each time")
    sizes = [(f"{w}x{h}", str(len(members))) for (w, h), members in manifest.buckets.items()]
    lines.append(table([("size", "pictures"), *sizes], indent="    "))
    if manifest.rejections:
        counts = ", ".join(f"{n} {reason}" for reason, n in rejection_counts(manifest.rejections).items())
        lines.append(f"  left out: {counts}")
        rows = [(rejected.name, rejected.reason, rejected.detail) for rejected in manifest.rejections]
        lines.append(table([("file", "why", "what was found"), *rows], indent="    "))
    lines += [f"  {notice}" for notice in manifest.notices]
    return "\n".join(lines)


def _spread(total: int, most: int) -> list[int]:
    """At most `most` of `total` places, evenly apart."""
    shown = min(total, most)
    return [turn * total // shown for turn in range(shown)]


def _sheet(manifest: Manifest, shown: Sequence[int]) -> Image.Image:
    """The crops of samples in rows; where any has references or a mask a row for each: its image, its references, then
    its mask as the loss takes it.
    """
    # numpy, which scan does without when nothing is new.
    from simpletuner.data.pixels import MaskKind, render, render_mask

    kinds: dict[str, MaskKind] = {
        each.id: each.conditioning_type
        for each in manifest.conditions
        if each.conditioning_type in {"mask", "segmentation"}
    }
    groups: list[list[Image.Image]] = []
    texts: list[list[str]] = []
    for sample in (manifest.samples[index] for index in shown):
        crops = (sample, *sample.references)
        pixels = [render(crop.read(), crop.geometry, is_flattened=crop.is_flattened) for crop in crops]
        more = f" (and {len(sample.captions) - 1} more)" if len(sample.captions) > 1 else ""
        own = f"{_shape(sample)}\n{sample.captions[0]}{more}"
        texts.append([own, *(f"{_shape(crop)}\n{crop.dataset}" for crop in crops[1:])])
        if sample.mask is not None:
            kind = kinds.get(sample.mask.dataset, "alpha")
            pixels.append(render_mask(sample.mask.read(), sample.mask.geometry, kind))
            texts[-1].append(f"{_shape(sample.mask)}\n{'its alpha' if kind == 'alpha' else sample.mask.dataset}")
        groups.append([Image.fromarray(each) for each in pixels])
    columns = max(map(len, groups))
    if columns == 1:
        columns = min(CROP_COLUMNS, len(groups))
        groups, texts = _in_rows(groups, columns), _in_rows(texts, columns)
    return contact_sheet(groups, [""] * len(groups), [""] * columns, captions=texts)


def _shape(crop: Crop) -> str:
    width, height = crop.geometry.target
    return f"{crop.name}, {width}x{height}"


def _in_rows(groups: Sequence[Sequence[T]], columns: int) -> list[list[T]]:
    """The first of each group, in rows of `columns`."""
    firsts = [group[0] for group in groups]
    return [firsts[start : start + columns] for start in range(0, len(firsts), columns)]
