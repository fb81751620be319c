"""`simpletuner inspect`: describe a LoRA, a model file or a folder of them."""

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

  FILE is a .safetensors or .gguf file, or a folder of them: that of a run, a model or a component. The report on a
  LoRA contains its layout, rank, alpha, target modules, the models that it fits, the norm of its change in each block,
  its training options, and how diffusers and ComfyUI load it. The report on a model contains its components with
  their sizes and formats.
"""
_NAMES_SHOWN = 4
"""Maximum number of Linears or keys that a line names."""


@dataclass(frozen=True)
class InspectCommand:
    """Arguments of `simpletuner inspect`."""

    file: str = Positional().default("")
    json: bool = Flag("print one JSON object").default(False)


FORMS = {"": InspectCommand}


def run(arguments: list[str]) -> int:
    """Print the report as text, or with `--json` as JSON.

    Raises:
        ConfigError: a mistake in the arguments, or ~ cannot be resolved.
        AccessError: the file does not exist, or is damaged.
        CheckpointError: an adapter does not exist, or is damaged.
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
    """`report` as text."""
    shards = f" in {report.files} files" if report.files > 1 else ""
    lines = [report.path, f"  {report.what} ({format_size(report.bytes)}{shards})"]
    rows: dict[str, str] = {}
    if report.base_model is not None:
        rows["trained from"] = f"{report.base_model}, according to its header"
    if report.is_distilled is not None:
        rows["weights"] = f"{'distilled' if report.is_distilled else 'base'}, according to the file's name"
    if report.adapter is not None:
        rows |= dict(_adapter_rows(report.adapter))
    for component in report.components:
        rows |= _component_rows(component)
    if rows:
        lines.append(table(list(rows.items()), "  "))
    if report.adapter is not None:
        lines += _adapter_tables(report.adapter)
    if report.training:
        lines += ["  training", table(list(report.training.items()), "    ")]
    # Names and headers of files are untrusted: no control sequence in them may reach the terminal.
    text = "\n".join(lines)
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _adapter_rows(adapter: "AdapterReport") -> Iterator[tuple[str, str]]:
    if adapter.modules:
        yield "layout", f"{adapter.dialect}; {', '.join(adapter.dtypes)}"
        yield "adapts", f"{adapter.modules} layers ({adapter.target}), {adapter.parameters:,} parameters"
        yield "rank", _counted(adapter.ranks) or "full"
        if adapter.alphas:
            yield "alpha", _counted({f"{alpha:g}": count for alpha, count in adapter.alphas.items()})
        yield "fits", ", ".join(adapter.fits) or "no flavour of FLUX.2"
    for loader, verdict in adapter.loaders.items():
        lost = [
            f"{word} {len(names)} of {adapter.modules}: {_named(names)}"
            for word, names in (("leaves out", verdict.dropped), ("gets wrong", verdict.wrong))
            if names
        ]
        if verdict.unknown:
            yield loader, f"unknown: {verdict.unknown}"
        elif verdict.refusal:
            yield loader, f"loads nothing: {verdict.refusal}"
        else:
            yield loader, "; ".join(lost) or "loads all of it"
    for kind, keys in adapter.unread.items():
        yield "not read", f"{len(keys)} keys ({kind}): {_named(keys)}"


def _adapter_tables(adapter: "AdapterReport") -> list[str]:
    if not adapter.modules:
        return []
    modules = [(each.name, str(each.modules), ", ".join(map(str, each.ranks)) or "full") for each in adapter.places]
    norms = [(name, f"{norm:.4g}") for name, norm in adapter.norms.items()]
    return [
        table([("target modules", "layers", "rank"), *modules], "  "),
        table([("block", "norm of the change"), *norms], "  "),
    ]


def _component_rows(component: "ComponentReport") -> dict[str, str]:
    title = component.component.replace("_", " ")
    sizes = ", ".join(f"{name} {str(value).lower()}" for name, value in component.sizes.items())
    formats = ", ".join(f"{name} {format_size(size)}" for name, size in component.formats.items())
    rows = {
        title: f"{component.layout} names, {component.tensors} tensors, {component.parameters:,} parameters",
        f"{title} sizes": sizes,
        f"{title} formats": formats,
        f"{title} fits": ", ".join(component.flavours) or "no flavour of FLUX.2",
    }
    if component.problem:
        rows[f"{title} problem"] = component.problem
    return {name: text for name, text in rows.items() if text}


def _counted(values: Mapping[int, int] | Mapping[str, int]) -> str:
    """Values with their counts: "16", or "16 (38 times), 32 (5 times)"."""
    if len(values) == 1:
        return str(*values)
    return ", ".join(f"{value} ({count} times)" for value, count in values.items())


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, …" if len(names) > _NAMES_SHOWN else shown
