"""docs/options.md and the JSON Schema, made from the options themselves, so that neither can drift.

`python -m simpletuner.config.reference --write` makes the page, `--check` fails where it is out of date,
`--schema` prints the JSON Schema.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simpletuner.base.files import write_atomic
from simpletuner.config import later
from simpletuner.config.datasets import ImageSet, TextStore
from simpletuner.config.later import Later
from simpletuner.config.load import ENVIRONMENT_PREFIX, OPTION_ALIASES
from simpletuner.config.options.kinds import Slice
from simpletuner.config.run import OPTION_NAMES, SLICES, RunConfig
from simpletuner.config.values import kinds

PAGE = Path(__file__).parents[3] / "docs" / "options.md"

_INTRODUCTION = f"""\
<!-- Made by `python -m simpletuner.config.reference --write`. Change the options in src/simpletuner/config. -->

# Options

What `config.json` (or `config.toml`) and the command line accept. One name everywhere: the key `lora_rank` is the
flag `--lora_rank` and the environment variable `{ENVIRONMENT_PREFIX}LORA_RANK`.

- A flag wins over the environment, that over the file, that over the default. A flag that is absent changes nothing.
- Keys may carry leading dashes. Flags: `--lora_rank 8` or `--lora_rank=8`; a boolean also stands alone.
- `true` and `false` are booleans, also as text; `null` means "not set".
- Looked for without being named, in this order: `config.json`, `config.toml`, `config/config.json`,
  `config/config.toml`. `--env NAME` reads `config/NAME/`, `--config PATH` a file, `--example NAME` an example that
  comes with the program.
- Relative paths start in the working folder. `{{model_family}}`, `{{output_dir}}`, `{{id}}` (in datasets) and
  `{{env:VAR}}` are filled in.
- All problems are reported together, before anything is loaded, with exit code 2. `simpletuner config check` does only
  that; `simpletuner config show` prints every value and where it comes from.
"""

_DATASETS = """\
# Datasets

`multidatabackend.json` beside the config (or what `data_backend_config` names) is a list of objects: the picture sets,
and the stores for text caches. If no store is listed, one is made under `output_dir`. [dataloader.md](dataloader.md)
explains how pictures become crops and captions.
"""


def page() -> str:
    """The text of docs/options.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    for group in SLICES:
        yield f"## {_title(group)}\n"
        yield from _table(group, "")
    yield "## Other names\n\nAccepted, with a notice.\n\n| key | read as |\n|---|---|"
    yield from (f"| `{alias}` | [`{name}`](#{name}) |" for alias, name in OPTION_ALIASES.items())
    yield "\n## Not built yet\n\nKnown, and refused as such until the work lands.\n"
    yield from _later(later.LATER_OPTIONS, later.OPTION_VALUES)
    yield _DATASETS
    yield "## An image set\n"
    yield from _table(ImageSet, "set-")
    yield "## A text store\n"
    yield from _table(TextStore, "store-")
    yield "## Not built yet in datasets\n"
    types = {"dataset_type": later.LATER_DATASET_TYPES}
    yield from _later({**later.SET_KEYS, **later.STORE_KEYS}, types | later.SET_VALUES)


def _title(group: type[Slice]) -> str:
    return str(group.__doc__).rstrip(".")


def _table(model: type[Slice], prefix: str) -> Iterator[str]:
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


def _later(options: Mapping[str, Later], values: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    yield "| key or value | comes with |\n|---|---|"
    yield from (f"| `{name}` | {option.work} |" for name, option in options.items())
    for name, works in values.items():
        for work in dict.fromkeys(works.values()):
            listed_values = ", ".join(f"`{value}`" for value, its_work in works.items() if its_work == work)
            yield f"| `{name}`: {listed_values} | {work} |"
    yield ""


def schema() -> dict[str, Any]:
    """The JSON Schema of a config file, with the meaning of each option."""
    found = RunConfig.model_json_schema()
    found["properties"] = {name: found["properties"][name] for name in OPTION_NAMES}
    for group in SLICES:
        for name, text in group.documentation().items():
            found["properties"][name] |= {"description": " ".join(text.split()), "group": _title(group)}
    return found


def main(arguments: list[str]) -> int:
    """Write or check the page, or print the schema. Returns the exit code."""
    if arguments == ["--write"]:
        write_atomic(PAGE, page().encode())
        return 0
    if arguments == ["--schema"]:
        print(json.dumps(schema(), indent=2))
        return 0
    if arguments != ["--check"]:
        print("usage: python -m simpletuner.config.reference --write | --check | --schema", file=sys.stderr)
        return 2
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.name} is out of date: python -m simpletuner.config.reference --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
