"""`simpletuner env`: versions and devices for a bug report. No paths, no names of people or machines."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from simpletuner import __version__
from simpletuner.base.console import say
from simpletuner.base.machine import host_memory
from simpletuner.base.sizes import format_size
from simpletuner.cli.arguments import Flag, parse_command
from simpletuner.cli.printing import json_text

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "tokenizers",
    "pydantic",
    "pillow",
    "einops",
    "jaxtyping",
    "optimum-quanto",
    "torchao",
    "bitsandbytes",
    "tensorboard",
    "wandb",
)


@dataclass(frozen=True)
class EnvCommand:
    """Arguments of `simpletuner env`."""

    json: bool = Flag("print one JSON object").default(False)


USAGE = "usage: simpletuner env [--json]"
FORMS = {"": EnvCommand}


def run(arguments: list[str]) -> int:
    """Print the report, as text or with `--json`.

    Raises:
        ConfigError: any other argument.
    """
    command = parse_command(EnvCommand, arguments)
    found = report()
    if command.json:
        say(json_text(found))
    else:
        width = max(map(len, found))
        say("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
    return 0


def report() -> dict[str, str]:
    """Versions of what takes part in a run, and the devices that torch sees."""
    memory = host_memory()
    found = {
        "simpletuner": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "memory": "unknown" if memory is None else format_size(memory.total_bytes),
    }
    return found | {name: installed_version(name) or "not installed" for name in PACKAGES} | _devices()


def installed_version(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what this report is for
        return {"device": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    found = {"cuda": str(torch.version.cuda)}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"device {index}"] = f"{properties.name}, {format_size(properties.total_memory)}"
    return found
