"""`simpletuner dataset scan|show|cache`: the pictures before a run. What will be trained, what it looks like,
and its caches."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.base.errors import ConfigError, DataError, Problem
from simpletuner.base.files import disk_full_is_reported
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import json_text, table
from simpletuner.config.flags import help_text, wants_help
from simpletuner.config.load import Loaded
from simpletuner.data.manifest import Manifest, rejection_counts, scan
from simpletuner.data.sample import Sample
from simpletuner.data.sheet import contact_sheet
from simpletuner.runs.events import Event, ProgressEvent

USAGE = """simpletuner dataset scan|show|cache [--json] [--set ID] [--verify] [options of `simpletuner train`]

  scan    count the pictures, their sizes, and what is left out and why
  show    draw the crops that will be trained, with their captions, on one sheet a set
  cache   encode the captions and pictures now, so that a run starts at once

  --json          print one JSON object instead of a table
  --pictures      in it, each picture with its size, crop and captions (scan)
  --progress      a JSON line on standard error as the work goes on: what, done and total (scan and cache)
  --set ID        this set only (scan and show)
  --verify        read every cached file, instead of only those that changed since they were last read (cache)
  --out FOLDER    where show puts its sheets; by default output_dir
  --count N       how many crops a sheet shows, 24 by default, spread evenly over the set"""

COLUMNS = 6
"""Of a sheet."""
TELL_EVERY_S = 0.1
"""Progress of a scan."""


@dataclass(frozen=True)
class Request:
    """What was typed after `simpletuner dataset`."""

    word: str
    as_json: bool
    set_id: str | None
    out: Path | None
    count: int
    verify: bool
    has_pictures: bool
    tells_progress: bool
    rest: tuple[str, ...]
    """For the configuration."""


def run(arguments: list[str]) -> int:
    """Scan, show or cache the sets of the configuration.

    Raises:
        ConfigError: a mistake in the configuration, or nothing to do.
        DataError: a set is missing or nothing in it can be trained.
    """
    if wants_help(arguments):
        print(help_text(USAGE))
        return 0
    request = _parsed(arguments)
    loaded = load_here(request.rest)
    work = {"scan": _scan, "show": _show, "cache": _cache}[request.word]
    result, text = work(loaded, request)
    if request.as_json:
        print(json_text(result | {"notices": list(loaded.notices)}))
    else:
        print("\n".join((*loaded.notices, text)))
    return 0


def _parsed(arguments: Sequence[str]) -> Request:
    word = arguments[0] if arguments else ""
    if word not in ("scan", "show", "cache"):
        raise ConfigError.of(f"simpletuner dataset {word}".rstrip() + ": nothing to do", "scan, show or cache")
    own = {"set": "", "out": "", "count": "24"}
    switches = dict.fromkeys(("json", "verify", "pictures", "progress"), False)
    kept: list[str] = []
    rest = list(arguments[1:])
    while rest:
        flag = rest.pop(0)
        name, has_value, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and flag[2:] in switches:
            switches[flag[2:]] = True
        elif flag.startswith("--") and name in own:
            if not has_value and (not rest or rest[0].startswith("--")):
                raise ConfigError.of(f"--{name}: nothing follows it", "a value")
            own[name] = value if has_value else rest.pop(0)
        else:
            kept.append(flag)
    if not own["count"].isdecimal() or int(own["count"]) == 0:
        raise ConfigError.of(f"--count = {own['count']!r}", "a whole number above 0")
    for flag, words in {"verify": ("cache",), "pictures": ("scan",), "progress": ("scan", "cache")}.items():
        if switches[flag] and word not in words:
            raise ConfigError.of(f"--{flag} with dataset {word}", f"dataset {' or '.join(words)}")
    if switches["pictures"] and not switches["json"]:
        raise ConfigError.of("--pictures without --json", "both", "`simpletuner dataset show` draws the pictures.")
    return Request(
        word=word,
        as_json=switches["json"],
        set_id=own["set"] or None,
        out=Path(own["out"]) if own["out"] else None,
        count=int(own["count"]),
        verify=switches["verify"],
        has_pictures=switches["pictures"],
        tells_progress=switches["progress"],
        rest=tuple(kept),
    )


def _scan(loaded: Loaded, request: Request) -> tuple[dict[str, Any], str]:
    manifests = _scanned(loaded, request)
    sets = [manifest.summary() for manifest in manifests]
    if request.has_pictures:
        for told, manifest in zip(sets, manifests, strict=True):
            told["samples"] = [_as_json(sample) for sample in manifest.samples]
    return {"sets": sets}, "\n\n".join(map(_described, manifests))


def _as_json(sample: Sample) -> dict[str, Any]:
    """A picture as it will be trained. Sizes in pixels; the crop is the left and top of `target` inside `resize`."""
    return {
        "name": sample.name,
        "path": sample.shown,
        "width": sample.width,
        "height": sample.height,
        "target": list(sample.geometry.target),
        "resize": list(sample.geometry.resize),
        "crop": list(sample.geometry.crop),
        "captions": list(sample.captions),
    }


def _tell_progress(what: str, done: int, total: int) -> None:
    print(json.dumps({"what": what, "done": done, "total": total}), file=sys.stderr, flush=True)


def _show(loaded: Loaded, request: Request) -> tuple[dict[str, Any], str]:
    folder = Path(loaded.config.output_dir) if request.out is None else request.out
    sheets = []
    for manifest in _scanned(loaded, request):
        safe_id = re.sub(r"[^\w.-]", "_", manifest.image_set.id)
        path = folder / f"dataset-{safe_id}.png"
        shown = _spread(len(manifest.samples), request.count)
        with disk_full_is_reported(path):
            folder.mkdir(parents=True, exist_ok=True)
            _sheet(manifest, shown).save(path)
        sheets.append({"id": manifest.image_set.id, "path": str(path), "pictures": len(shown)})
    text = "\n".join(f"{sheet['id']}: {sheet['pictures']} crops in {sheet['path']}" for sheet in sheets)
    return {"sheets": sheets}, text


def _cache(loaded: Loaded, request: Request) -> tuple[dict[str, Any], str]:
    if request.set_id is not None:
        raise ConfigError.of("--set with dataset cache", "scan or show", "A run needs the caches of all its sets.")
    # torch, which the other words do without.
    import torch

    from simpletuner.flux2.components import check_precisions
    from simpletuner.flux2.source import locate
    from simpletuner.train.caches import prepare
    from simpletuner.train.report import Reporter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precisions(loaded.config, device)
    # JSON has standard output to itself.
    with contextlib.redirect_stdout(sys.stderr) if request.as_json else contextlib.nullcontext():
        reporter = Reporter()
        if request.tells_progress:
            # Lines in place of the bar.
            reporter.is_terminal = False
            reporter.listeners.append(_tell_event)
        source = locate(loaded.config, report=reporter.say)
        prepared = prepare(loaded, source, device, reporter, verify=request.verify)
    manifests = (*prepared.train, *prepared.held_out)
    return {"sets": [manifest.summary() for manifest in manifests]}, "The caches are filled."


def _scanned(loaded: Loaded, request: Request) -> list[Manifest]:
    """Every set that is asked for; the problems of all of them together."""
    set_id = request.set_id
    sets = (*loaded.datasets.train_sets, *loaded.datasets.eval_sets)
    asked = [image_set for image_set in sets if set_id in (None, image_set.id)]
    if not asked:
        known = ", ".join(image_set.id for image_set in sets)
        raise ConfigError.of(f"--set = {set_id!r}: no such set", f"one of {known}")
    manifests, problems = [], list[Problem]()
    for image_set in asked:
        with _lines(image_set.id) if request.tells_progress else _bar(image_set.id) as report:
            try:
                manifests.append(scan(image_set, seed=loaded.config.seed, workers=loaded.config.workers, report=report))
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

    with tqdm(desc=title, unit=" pictures", leave=False, disable=not sys.stderr.isatty()) as bar:

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
    # numpy, which scan does without when nothing is new.
    from simpletuner.data.pixels import render

    cells = []
    captions = []
    for sample in (manifest.samples[index] for index in shown):
        cells.append(Image.fromarray(render(sample.read(), sample.geometry)))
        width, height = sample.geometry.target
        more = f" (and {len(sample.captions) - 1} more)" if len(sample.captions) > 1 else ""
        captions.append(f"{sample.name}, {width}x{height}\n{sample.captions[0]}{more}")
    columns = min(COLUMNS, len(cells))
    starts = range(0, len(cells), columns)
    rows = [cells[start : start + columns] for start in starts]
    texts = [captions[start : start + columns] for start in starts]
    return contact_sheet(rows, [""] * len(rows), [""] * columns, captions=texts)
