"""`simpletuner inspect`: what a LoRA, a model's file or a folder of them is."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.base.console import say
from simpletuner.base.errors import ConfigError
from simpletuner.base.files import with_home
from simpletuner.base.sizes import format_size
from simpletuner.cli.arguments import Flag, Positional, parse_command
from simpletuner.cli.printing import json_text, table

if TYPE_CHECKING:
    from simpletuner.flux2.inspection import AdapterReport, ComponentReport, FileReport

USAGE = """usage: simpletuner inspect FILE [--json]

  FILE is a .safetensors or .gguf file, or a folder of them: a run's, a model's, a component's. Of a LoRA you see
  layout, rank, alpha, what it adapts, the model that it fits, the size of its effect block by block, how it was
  trained, and what diffusers and ComfyUI make of it; of a model, its components, their sizes and formats.
"""
_NAMED_AT_MOST = 4
"""Linears and keys that a line names."""


@dataclass(frozen=True)
class InspectCommand:
    """Arguments of `simpletuner inspect`."""

    file: str = Positional().default("")
    json: bool = Flag("print one JSON object").default(False)


FORMS = {"": InspectCommand}


def run(arguments: list[str]) -> int:
    """Print the report, as text or with `--json`.

    Raises:
        ConfigError: no file is named, too much is typed, or no home folder is known for ~.
        AccessError: the file is not there, or damaged.
        CheckpointError: the same of an adapter.
    """
    command = parse_command(InspectCommand, arguments)
    if not command.file:
        raise ConfigError.of(
            "simpletuner inspect: no file is named", "a file or a folder", "See `simpletuner inspect --help`."
        )
    # Imported late: mistakes and help need no torch.
    from simpletuner.flux2.inspection import inspect_files

    reports = inspect_files(Path(with_home(command.file)))
    if command.json:
        say(json_text({"path": command.file, "files": [dataclasses.asdict(report) for report in reports]}))
    else:
        say("\n\n".join(report_text(report) for report in reports))
    return 0


def report_text(report: "FileReport") -> str:
    """A report for people."""
    shards = f" in {report.files} files" if report.files > 1 else ""
    lines = [report.path, f"  {report.what} ({format_size(report.bytes)}{shards})"]
    rows: dict[str, str] = {}
    if report.base_model is not None:
        rows["trained from"] = f"{report.base_model}, by its header"
    if report.is_distilled is not None:
        rows["weights"] = f"{'distilled' if report.is_distilled else 'base'}, by the file's name"
    if report.adapter is not None:
        rows |= dict(_adapter_rows(report.adapter))
    for component in report.components:
        rows |= _component_rows(component)
    if rows:
        lines.append(table(list(rows.items()), "  "))
    if report.adapter is not None:
        lines += _adapter_tables(report.adapter)
    if report.training:
        lines += ["  how it was made", table(list(report.training.items()), "    ")]
    # Names and headers of files come from anyone: no control sequence of theirs reaches the terminal.
    text = "\n".join(lines)
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _adapter_rows(adapter: "AdapterReport") -> Iterator[tuple[str, str]]:
    if adapter.modules:
        yield "layout", f"{adapter.dialect}; {', '.join(adapter.dtypes)}"
        yield "adapts", f"{adapter.modules} layers ({adapter.target}), {adapter.parameters:,} numbers"
        yield "rank", _counted(adapter.ranks) or "full"
        if adapter.alphas:
            yield "alpha", _counted({f"{alpha:g}": count for alpha, count in adapter.alphas.items()})
        yield "fits", ", ".join(adapter.fits) or "no flavour of FLUX.2"
    for loader, verdict in adapter.loaders.items():
        lost = [
            f"{word} {len(names)} of {adapter.modules}: {_named(names)}"
            for word, names in (("drops", verdict.dropped), ("gets wrong", verdict.wrong))
            if names
        ]
        if verdict.unknown:
            yield loader, f"cannot be said: {verdict.unknown}"
        elif verdict.refusal:
            yield loader, f"loads nothing: {verdict.refusal}"
        else:
            yield loader, "; ".join(lost) or "loads all of it"
    for kind, keys in adapter.unread.items():
        yield "not read", f"{len(keys)} keys ({kind}): {_named(keys)}"


def _adapter_tables(adapter: "AdapterReport") -> list[str]:
    if not adapter.modules:
        return []
    places = [(one.name, str(one.modules), ", ".join(map(str, one.ranks)) or "full") for one in adapter.places]
    norms = [(name, f"{norm:.4g}") for name, norm in adapter.norms.items()]
    return [
        table([("what it adapts", "layers", "rank"), *places], "  "),
        table([("where", "norm of its change"), *norms], "  "),
    ]


def _component_rows(component: "ComponentReport") -> dict[str, str]:
    title = component.component.replace("_", " ")
    sizes = ", ".join(f"{name} {str(value).lower()}" for name, value in component.sizes.items())
    formats = ", ".join(f"{name} {format_size(size)}" for name, size in component.formats.items())
    rows = {
        title: f"{component.layout} names, {component.tensors} tensors, {component.parameters:,} numbers",
        f"{title} sizes": sizes,
        f"{title} holds": formats,
        f"{title} fits": ", ".join(component.flavours) or "no flavour of FLUX.2",
    }
    if component.problem:
        rows[f"{title} problem"] = component.problem
    return {name: text for name, text in rows.items() if text}


def _counted(values: Mapping[int, int] | Mapping[str, int]) -> str:
    """ "16", or "16 (38 times), 32 (5 times)"."""
    if len(values) == 1:
        return str(*values)
    return ", ".join(f"{value} ({count} times)" for value, count in values.items())


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED_AT_MOST])
    return f"{shown}, …" if len(names) > _NAMED_AT_MOST else shown
