"""Generate what of docs/ repeats the code: options.md, events.md, recipes.md, and tables of other pages.

The code is the only source, so no page can drift from it:

    python tools/generate_docs.py --write     write the pages
    python tools/generate_docs.py --check     exit with 1 where a page is stale
    python tools/generate_docs.py --schema    print the JSON Schema of a config file
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpletuner.base.files import write_atomic
from simpletuner.base.sizes import GIB
from simpletuner.config.data_sheets import DENSE_BF16_FLOP_PER_S
from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.flavours import DEV, KLEIN_4B, KLEIN_9B, FlavourName, TransformerSpec
from simpletuner.config.load import ENVIRONMENT_PREFIX
from simpletuner.config.options.kinds import Slice
from simpletuner.config.other_keys import (
    NOT_YET,
    OPTION_ALIASES,
    OTHER_OPTIONS,
    OTHER_SET_KEYS,
    OTHER_STORE_KEYS,
    OtherKey,
    OtherKeys,
)
from simpletuner.config.precisions import NO_CHANGE
from simpletuner.config.recipes import CARDS, LEAST_STEPS, RECIPES, Card, recipe
from simpletuner.config.run import OPTION_NAMES, SLICES, RunConfig
from simpletuner.config.values import kinds
from simpletuner.flux2.arithmetic import training_flop
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.memory.planner import ENGINES, Engine, Machine
from simpletuner.runs.events import EVENTS, Event, Picture

DOCS = Path(__file__).parents[1] / "docs"

# Options

OPTIONS_HEAD = f"""\
<!-- Made by `python tools/generate_docs.py --write`. Change the options in src/simpletuner/config. -->

# Options

What `config.json` (or `config.toml`) and the command line accept. One name everywhere: the key `lora_rank` is the
flag `--lora_rank` and the environment variable `{ENVIRONMENT_PREFIX}LORA_RANK`.

- A flag wins over the environment, that over the file, that over the default. A flag that is absent changes nothing.
- Keys may carry leading dashes. Flags: `--lora_rank 8` or `--lora_rank=8`; a boolean also stands alone.
- A key that begins with `//` is a comment, in `config.json` and in the other JSON files.
- `true` and `false` are booleans, also as text; `null` means "not set".
- Looked for without being named, in this order: `config.json`, `config.toml`, `config/config.json`,
  `config/config.toml`. `--env NAME` reads `config/NAME/`, `--config PATH` a file, `--example NAME` an example that
  comes with the program.
- Relative paths start in the working folder. `{{model_family}}`, `{{output_dir}}`, `{{id}}` (in datasets) and
  `{{env:VAR}}` are filled in.
- Keys of SimpleTuner and other trainers that are none here: [coming-from.md](coming-from.md).
- All problems are reported together, before anything is loaded, with exit code 2. `simpletuner config check` does only
  that; `simpletuner config show` prints every value and where it comes from.
"""

DATASETS_HEAD = """\
# Datasets

`multidatabackend.json` beside the config (or what `data_backend_config` names) is a list of objects: the picture sets,
and the stores for text caches. If no store is listed, one is made under `output_dir`. [dataloader.md](dataloader.md)
explains how pictures become crops and captions.
"""


def options_page() -> str:
    """The text of docs/options.md."""
    return "\n".join(_options_lines())


def _options_lines() -> Iterator[str]:
    yield OPTIONS_HEAD
    for group in SLICES:
        yield f"## {_title(group)}\n"
        yield from _options_table(group, "")
    yield "## Other names\n\nAccepted, with a notice.\n\n| key | read as |\n|---|---|"
    yield from (f"| `{alias}` | [`{name}`](#{name}) |" for alias, name in OPTION_ALIASES.items())
    yield "\n## Not built yet\n\nKnown, and refused as such until the work lands.\n"
    yield from _later(OTHER_OPTIONS)
    yield DATASETS_HEAD
    yield "## An image set\n"
    yield from _options_table(ImageSet, "set-")
    yield "## A conditioning set\n"
    yield from _options_table(ConditioningSet, "condition-")
    yield "## A text store\n"
    yield from _options_table(TextStore, "store-")
    yield "## Not built yet in datasets\n"
    yield from _later(OtherKeys({**OTHER_SET_KEYS.keys, **OTHER_STORE_KEYS.keys}, values=OTHER_SET_KEYS.values))


def _title(group: type[Slice]) -> str:
    return str(group.__doc__).rstrip(".")


def _options_table(model: type[Slice], prefix: str) -> Iterator[str]:
    """One row for each field. `prefix` keeps the anchors of tables with equal names apart."""
    texts = model.documentation()
    yield "| key | default | expects | meaning |\n|---|---|---|---|"
    for name, kind in kinds(model).items():
        field = model.model_fields[name]
        default = "required" if field.is_required() else _default(field.default)
        meaning = " ".join(texts[name].split())
        yield f'| <a id="{prefix}{name}"></a>`{name}` | {default} | {kind.expects} | {meaning} |'
    yield ""


def _default(value: object) -> str:
    if value is None:
        return ""
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _later(others: OtherKeys) -> Iterator[str]:
    yield "| key or value | comes with |\n|---|---|"
    for names, other in _grouped(others.keys, _is_later):
        yield f"| {names} | {other.meaning.removeprefix(NOT_YET)} |"
    for key, values in others.values.items():
        for names, other in _grouped(values, _is_later):
            yield f"| `{key}`: {names} | {other.meaning.removeprefix(NOT_YET)} |"
    yield ""


def _grouped(others: Mapping[str, OtherKey], is_wanted: Callable[[OtherKey], bool]) -> Iterator[tuple[str, OtherKey]]:
    """The wanted names of which the same is known, as code, and what that is."""
    rows: dict[str, list[str]] = {}
    for name, other in others.items():
        if is_wanted(other):
            rows.setdefault(repr(other), []).append(name)
    yield from ((", ".join(f"`{name}`" for name in names), others[names[0]]) for names in rows.values())


def _is_later(other: OtherKey) -> bool:
    return other.meaning.startswith(NOT_YET)


def _is_refused(other: OtherKey) -> bool:
    return not other.is_ignored and not _is_later(other)


def _is_ignored(other: OtherKey) -> bool:
    return other.is_ignored


def schema() -> dict[str, Any]:
    """The JSON Schema of a config file, with the meaning of each option."""
    found = RunConfig.model_json_schema()
    found["properties"] = {name: found["properties"][name] for name in OPTION_NAMES}
    for group in SLICES:
        for name, text in group.documentation().items():
            found["properties"][name] |= {"description": " ".join(text.split()), "group": _title(group)}
    return found


# Coming from


def other_keys_tables() -> str:
    """What the tables of other keys say, for who has a config with them."""
    return "\n".join(_other_keys_lines())


def _other_keys_lines() -> Iterator[str]:
    yield "\n## Options that are refused\n"
    yield "Unless their value asks for nothing; so are those [to come](options.md#not-built-yet)."
    yield from _refused_table(OTHER_OPTIONS.keys)
    yield "\n## Options without effect\n\n| key | why |\n|---|---|"
    prefixes = {f"{prefix}…": other for prefix, other in OTHER_OPTIONS.prefixes.items()}
    for names, other in _grouped({**OTHER_OPTIONS.keys, **prefixes}, _is_ignored):
        yield f"| {names} | {other.meaning} |"
    yield "\n## Values that have another name here\n\n| key | value | instead |\n|---|---|---|"
    for key, values in OTHER_OPTIONS.values.items():
        for names, other in _grouped(values, _is_refused):
            yield f"| `{key}` | {names} | {other.remedy} |"
    of_datasets = {**OTHER_SET_KEYS.keys, **OTHER_STORE_KEYS.keys}
    yield "\n## Dataset keys that are refused"
    yield from _refused_table(of_datasets)
    yield "\n## Dataset keys without effect\n\n| key | why |\n|---|---|"
    yield from (f"| {names} | {other.meaning} |" for names, other in _grouped(of_datasets, _is_ignored))
    yield "\n## Words of other trainers\n\n| there | here |\n|---|---|"
    yield from (f"| `{word}` | [`{name}`](options.md#{name}) |" for word, name in OTHER_OPTIONS.nicknames.items())
    yield from (f"| `{word}` | [`{name}`](options.md#set-{name}) |" for word, name in OTHER_SET_KEYS.nicknames.items())
    yield ""


def _refused_table(others: Mapping[str, OtherKey]) -> Iterator[str]:
    yield "\n| key | passes at | why | instead |\n|---|---|---|---|"
    for names, other in _grouped(others, _is_refused):
        off = ", ".join(f"`{json.dumps(value)}`" for value in other.off)
        yield f"| {names} | {off} | {other.meaning} | {other.remedy} |"


# Events

EVENTS_HEAD = """# Events of a run

<!-- Made from src/simpletuner/runs/events.py by `python tools/generate_docs.py --write`. -->

`RUN/events.jsonl` is append-only: one JSON object a line, UTF-8. Every line carries

| key | type | meaning |
|---|---|---|
| v | integer | version of this schema, 1 |
| id | integer | counts from 1 without gaps, over restarts too |
| time | string | UTC, ISO 8601, to the millisecond |
| attempt | integer | 1 at the first start, one more after each restart that was not refused |
| start | integer | one more at each start |
| type | string | one of the sections below |

A start that ends with an error before the phase `train` begins is refused. It is no attempt, and the next start has its
number. Lines of older releases lack `start`, and have an attempt for each start.

After a resume some steps come twice: keep the line of the last attempt. A line without its newline is still being
written; pass over one that is no JSON, or no event, as a power cut may leave it. New keys may be added under the
same `v`; readers ignore what they do not know.
"""


def type_name(schema: dict[str, Any]) -> str:
    """A JSON Schema's type in words."""
    if "anyOf" in schema:
        return " or ".join(map(type_name, schema["anyOf"]))
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return "string"
    if "$ref" in schema:
        return f"[{str(schema['$ref']).rpartition('/')[2].lower()}](#picture)"
    if schema.get("type") == "array":
        return f"list of {type_name(schema['items'])}"
    if schema.get("type") == "object":
        return "object"
    return str(schema["type"])


def event_section(event: type[Event]) -> str:
    """The section of one event."""
    rows = ["| key | type | meaning |", "|---|---|---|"]
    for name, field in event.model_json_schema()["properties"].items():
        if name != "type":
            rows.append(f"| {name} | {type_name(field)} | {' '.join(field['description'].split())} |")
    return f"{event.__doc__}\n\n" + "\n".join(rows) + "\n"


def events_page() -> str:
    """The text of docs/events.md."""
    sections = [f"## {name}\n\n{event_section(event)}" for name, event in EVENTS.items()]
    return "\n".join([EVENTS_HEAD, *sections, f"## picture\n\n{event_section(Picture)}"])


# Plan

TABLE_BEGIN, TABLE_END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
PUBLISHED: Mapping[str, TransformerSpec] = {"dev": DEV, "klein-9b": KLEIN_9B, "klein-4b": KLEIN_4B}
ANY_SIZE = Machine(1 << 62, 1 << 62, None)
KLEIN_CARDS_GIB = 24.0
"""The largest card of docs/klein.md."""


def plan_row(name: str, spec: TransformerSpec, precision: str, size: tuple[int, int]) -> str:
    """Training a LoRA of rank 16 on all Linears: resident, streamed, streamed with activations offloaded."""
    cells = [name, precision, f"{size[0]}x{size[1]}"]
    streamed = {
        "enable_group_offload": True,
        "group_offload_use_stream": True,
        "group_offload_resident_blocks": 0,
    }
    for options in ({}, streamed, {**streamed, "activation_offload": True}):
        config = RunConfig.model_validate({"base_model_precision": precision, **options})
        architecture = replace(Architecture.of(config), transformer=spec)
        found = Footprint(config, architecture, Workload(size, 1, draws=False), ANY_SIZE).train()
        cells += [f"{found.total(place) / GIB:.1f}" for place in ("accelerator", "ram")]
    return f"| {' | '.join(cells)} |"


def plan_table() -> str:
    """Peak GiB of training, by model, precision and resolution."""
    head = (
        "| model | precision | size | resident: GPU | RAM | streamed: GPU | RAM | activations too: GPU | RAM |\n"
        "|---|---|---|---:|---:|---:|---:|---:|---:|\n"
    )
    rows = [
        plan_row(name, spec, precision, (side, side))
        for name, spec in PUBLISHED.items()
        for precision in (NO_CHANGE, "int8-quanto", "int4-quanto")
        for side in (512, 768, 1024)
    ]
    return head + "\n".join(rows) + "\n"


def many_gpus_table() -> str:
    """Peak GiB of training on each of several GPUs, and what each of eight processes sends in a step."""
    head = (
        "| model | trains | base | DDP | FSDP2 on 2 | on 4 | on 8 | sent, DDP on 8 | sent, FSDP2 on 8 |\n"
        "|---|---|---|---:|---:|---:|---:|---:|---:|\n"
    )
    kinds = (("lora", NO_CHANGE), ("lora", "int8-quanto"), ("full", NO_CHANGE))
    rows = [_many_gpus_row(name, spec, kind, base) for name, spec in PUBLISHED.items() for kind, base in kinds]
    return head + "\n".join(rows) + "\n"


def _many_gpus_row(name: str, spec: TransformerSpec, kind: str, base: str) -> str:
    def footprint(processes: int, *, shards: bool) -> Footprint:
        options = {"model_type": kind, "base_model_precision": base, "num_processes": processes, "fsdp_enable": shards}
        config = RunConfig.model_validate(options)
        architecture = replace(Architecture.of(config), transformer=spec)
        return Footprint(config, architecture, Workload((1024, 1024), 1, draws=False), ANY_SIZE)

    found = [footprint(8, shards=False), *(footprint(count, shards=True) for count in (2, 4, 8))]
    sizes = [f"{each.train().total('accelerator') / GIB:.1f}" for each in found]
    sent = [each.wire.total / 1e9 for each in (found[0], found[-1]) if each.wire is not None]
    trains = "all weights" if kind == "full" else "a LoRA"
    return f"| {' | '.join((name, trains, base, *sizes, *(f'{size:.1f} GB' for size in sent)))} |"


ESTIMATE_FLOP_PER_S = 0.4 * DENSE_BF16_FLOP_PER_S["NVIDIA H100 80GB HBM3"]
"""Assumed of each GPU: two fifths of the data sheet's rate. Not measured."""
ESTIMATE_GPUS_PER_MACHINE = 8
ESTIMATED_SIZES: Sequence[tuple[int, str]] = (
    (8, "NVLink"),
    (64, "100 Gbit/s Ethernet"),
    (64, "400 Gbit/s InfiniBand"),
    (512, "400 Gbit/s InfiniBand"),
)
"""GPUs, and the link that decides: of one machine, else of the network."""


def images_per_second(processes: int, batch: int, flop: int, sent_s: float) -> tuple[float, float]:
    """Estimated images a second of all processes, where nothing of the transfers hides behind the compute, and where
    all that can does: processes × batch / (c + t) and processes × batch / max(c, t).

    Args:
        batch: images of a process's step.
        flop: what a process computes in a step; c is their time at `ESTIMATE_FLOP_PER_S`.
        sent_s: t, the time of a step's transfers.
    """
    computed_s = flop / ESTIMATE_FLOP_PER_S
    images = processes * batch
    return images / (computed_s + sent_s), images / max(computed_s, sent_s)


def many_machines_table() -> str:
    """Peak GiB of training on 8 and on 512 GPUs, what a process sends there in a step, and images a second."""
    sizes = [f"{gpus} GPUs, {link}" for gpus, link in ESTIMATED_SIZES]
    head = (
        f"| model | trains | engine | on 8 | on 512 | sent | {' | '.join(sizes)} |\n"
        f"|---|---|---|---:|---:|---:|{'---:|' * len(sizes)}\n"
    )
    engines: Mapping[str, Sequence[Engine]] = {
        "lora": ("ddp", "fsdp2", "zero3"),
        "full": ("fsdp2", "zero1", "zero2", "zero3"),
    }
    rows = [
        _many_machines_row(name, spec, kind, engine)
        for name, spec in PUBLISHED.items()
        for kind, chosen in engines.items()
        for engine in chosen
    ]
    return head + "\n".join(rows) + "\n"


def _many_machines_row(name: str, spec: TransformerSpec, kind: str, engine: Engine) -> str:
    def footprint(processes: int) -> Footprint:
        options = {
            "model_type": kind,
            "num_processes": processes,
            "num_machines": processes // ESTIMATE_GPUS_PER_MACHINE,
            "fsdp_enable": engine == "fsdp2",
            "deepspeed_config": engine if engine.startswith("zero") else None,
        }
        config = RunConfig.model_validate(options)
        architecture = replace(Architecture.of(config), transformer=spec)
        return Footprint(config, architecture, Workload((1024, 1024), 1, draws=False), ANY_SIZE)

    found = {gpus: footprint(gpus) for gpus in (8, 64, 512)}
    cells = [f"{found[gpus].train().total('accelerator') / GIB:.1f}" for gpus in (8, 512)]
    flop = training_flop(found[8].passing((1024, 1024), 1)).hardware
    wires = {gpus: each.wire for gpus, each in found.items() if each.wire is not None}
    cells.append(f"{wires[512].total / 1e9:.1f} GB")
    for gpus, link in ESTIMATED_SIZES:
        least, most = images_per_second(gpus, 1, flop, wires[gpus].seconds()[link])
        cells.append(" to ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (least, most)))
    trains = "all weights" if kind == "full" else "a LoRA"
    return f"| {' | '.join((name, trains, ENGINES[engine], *cells))} |"


def klein_table() -> str:
    """Which model fits which card, with the peak of GPU memory and the arithmetic of a step."""
    head = "| card | model | with | GPU | PFLOP |\n|---|---|---|---:|---:|\n"
    rows = [
        _fit_row(card, flavour)
        for card in CARDS
        if card.vram_gib <= KLEIN_CARDS_GIB
        for flavour in ("klein-4b", "klein-9b", "dev")
    ]
    return head + "\n".join(rows) + "\n"


def _fit_row(card: Card, flavour: FlavourName) -> str:
    footprint = _footprint(card, flavour)
    flop = training_flop(footprint.passing((1024, 1024), 1)).hardware
    peak = footprint.plan().peak("accelerator") / GIB
    cells = (card.name, flavour, card.fits[flavour].summary, f"{peak:.1f} GiB")
    return f"| {' | '.join(cells)} | {flop / 1e15:.2f} |"


def _footprint(card: Card, flavour: FlavourName) -> Footprint:
    """What a recipe takes on a card, an image of 1024x1024 at a time."""
    options = {"model_flavour": flavour, **recipe("subject", flavour).options}
    config = RunConfig.model_validate(options | dict(card.fits[flavour].options))
    machine = Machine.of_size(card.vram_gib * GIB, card.ram_gib * GIB)
    return Footprint(config, Architecture.of(config), Workload((1024, 1024), 1), machine)


def with_table(page: Path, table: str) -> str:
    """The text of `page` with `table` between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_BEGIN}{table}{TABLE_END}{after}"


# Recipes

RECIPES_HEAD = f"""\
<!-- Made from src/simpletuner/config/recipes.py by `python tools/generate_docs.py --write`. -->

# Recipes

Numbers to start from, with where each comes from. `simpletuner init` writes them into a configuration, with the source
as a comment beside each value, and the page offers them under Configure. Watch the validation images, and take the
checkpoint that you like best.

**Untested on real weights.** Nobody has judged a LoRA of FLUX.2-dev that this program trained. The numbers for dev and
klein come from the quickstart and from others' published runs, most of them on klein. Only the recipe for the embedded
model is measured here ([log.md](log.md)).

`num_train_epochs` says how often each image is seen. Where that would be fewer than {LEAST_STEPS} steps, `simpletuner
init` raises it.

| recipe | what it is for |
|---|---|
"""

CARDS_HEAD = """\
## Cards

Options with which the recipes fit at 1024x1024, by the [memory plan](plan.md), which a test computes; nothing is
measured on a card. GPU and RAM are the plan's peaks; 32 GB of RAM are enough for each. Quantized weights need
`pip install -e '.[quantization]'`. Streaming from RAM costs time in each step: a model whose weights stay on the GPU
trains faster. Other choices: [precision.md](precision.md), [offload.md](offload.md).

| card | model | options | what they do | GPU | RAM |
|---|---|---|---|---:|---:|
"""


def recipes_page() -> str:
    """The text of docs/recipes.md."""
    flavours = list(dict.fromkeys(each.flavour for each in RECIPES))
    titles = {each.title: each.summary for each in RECIPES}
    purposes = "\n".join(f"| {title.lower()} | {summary} |" for title, summary in titles.items()) + "\n"
    cards = CARDS_HEAD + "\n".join(_card_row(card, flavour) for card in CARDS for flavour in card.fits) + "\n"
    return "\n".join([RECIPES_HEAD + purposes, *map(_flavour_section, flavours), cards])


def _flavour_section(flavour: str) -> str:
    """The recipes of a flavour in one table: a row an option, or a row a recipe where they differ."""
    recipes = [each for each in RECIPES if each.flavour == flavour]
    lacking: dict[str, list[str]] = {}
    for each in recipes:
        if not each.is_ready:
            lacking.setdefault(each.needs, []).append(each.title.lower())
    needs = [f"Not ready: {', '.join(titles)}, for want of {lacks}." for lacks, titles in lacking.items()]
    rows = ["| option | value | source |", "|---|---|---|"]
    for option in recipes[0].options:
        choices: dict[str, list[str]] = {}
        for each in recipes:
            text = f"`{json.dumps(each.options[option])}` | {each.sources[option]}"
            choices.setdefault(text, []).append(each.title.lower())
        for text, titles in choices.items():
            rows.append(f"| `{option}`{'' if len(choices) == 1 else ', ' + ', '.join(titles)} | {text} |")
    return "\n".join([f"## {flavour}\n", *([" ".join(needs), ""] if needs else []), *rows, ""])


def _card_row(card: Card, flavour: FlavourName) -> str:
    fit = card.fits[flavour]
    plan = _footprint(card, flavour).plan()
    typed = ", ".join(
        f"`{key}` `{value if isinstance(value, str) else json.dumps(value)}`" for key, value in fit.options.items()
    )
    peaks = (f"{plan.peak(place) / GIB:.1f} GiB" for place in ("accelerator", "ram"))
    return f"| {' | '.join((card.name, flavour, typed or 'none', fit.summary, *peaks))} |"


def stale_pages(folder: Path) -> dict[Path, str]:
    """Each page in `folder` that is missing or not what the code says, with the text that belongs there."""
    pages = {
        "options.md": options_page(),
        "events.md": events_page(),
        "recipes.md": recipes_page(),
        "plan.md": with_table(folder / "plan.md", plan_table()),
        "many-gpus.md": with_table(folder / "many-gpus.md", many_gpus_table()),
        "many-machines.md": with_table(folder / "many-machines.md", many_machines_table()),
        "klein.md": with_table(folder / "klein.md", klein_table()),
        "coming-from.md": with_table(folder / "coming-from.md", other_keys_tables()),
    }
    return {
        path: text
        for path, text in ((folder / name, text) for name, text in pages.items())
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


def main(arguments: Sequence[str], folder: Path = DOCS) -> int:
    """Write or check the pages in `folder`, or print the schema. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    for name in ("write", "check", "schema"):
        action.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(arguments)
    if given.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    stale = stale_pages(folder)
    for path, text in stale.items():
        if given.write:
            write_atomic(path, text.encode())
        else:
            print(f"{path} is stale: run `python tools/generate_docs.py --write`.", file=sys.stderr)
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
