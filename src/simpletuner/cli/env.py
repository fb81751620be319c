"""`simpletuner env`: print versions and devices for a bug report, without paths or names of people or machines."""

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
    """Print the report as text, or with `--json` as JSON.

    Raises:
        ConfigError: a mistake in the arguments.
    """
    command = parse_command(EnvCommand, arguments)
    versions = report()
    if command.json:
        say(json_text(versions))
    else:
        width = max(map(len, versions))
        say("\n".join(f"{name:<{width}}  {value}" for name, value in versions.items()))
    return 0


def report() -> dict[str, str]:
    """The versions of the packages that a run uses, and the devices that torch sees."""
    memory = host_memory()
    versions = {
        "simpletuner": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "memory": "unknown" if memory is None else format_size(memory.total_bytes),
    }
    return versions | {name: installed_version(name) or "not installed" for name in PACKAGES} | _devices()


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # the report must also describe a broken installation
        return {"device": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    devices = {"cuda": str(torch.version.cuda)}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"device {index}"] = f"{properties.name}, {format_size(properties.total_memory)}"
    return devices
