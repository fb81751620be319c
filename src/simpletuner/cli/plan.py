"""`simpletuner plan`: the memory that a configuration takes, and with --show-timesteps the density of noise levels that
it really gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, MemoryBudgetError
from simpletuner.base.files import disk_full_is_reported
from simpletuner.base.sizes import GIB, parse_size
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import json_text
from simpletuner.cli.spread import Resolution, Spread, picture, terminal
from simpletuner.config.flags import help_text, wants_help
from simpletuner.config.load import Loaded
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.config.values import join_names
from simpletuner.data.manifest import scan
from simpletuner.data.order import Order
from simpletuner.train.timesteps import Timesteps

USAGE = """simpletuner plan [--vram GIB] [--ram GIB] [--json] [options of `simpletuner train`]
simpletuner plan --show-timesteps [--json] [--out FOLDER] [options of `simpletuner train`]

  Without --show-timesteps: what each phase takes of GPU, RAM and disk, and whether that is there; if not, the smallest
  change that would fit, and exit code 5. Nothing is loaded or downloaded.

  --vram GIB         plan for a card of this size instead of this machine's; 0 is a machine without one
  --ram GIB          plan for a machine with so much memory
  --show-timesteps   draw where between data (σ 0) and noise (σ 1) the run will train
  --out FOLDER       where timesteps.png is put; by default output_dir
  --json             print one JSON object instead"""

PICTURE = "timesteps.png"
EVERY_SIZE = "every size"


@dataclass(frozen=True)
class Request:
    """What was typed after `simpletuner plan`."""

    shows_timesteps: bool
    as_json: bool
    out: Path | None
    vram_gib: float | None
    """None for what this machine has."""
    ram_gib: float | None
    rest: tuple[str, ...]
    """For the configuration."""


def run(arguments: list[str]) -> int:
    """Print the memory plan, or draw the density in the terminal and as a picture. 5 where memory is too small.

    Raises:
        ConfigError: a mistake in the configuration, or in the flags.
        AccessError: a local model is no FLUX.2.
        DataError: where the density depends on the pictures' sizes: a set is missing or empty.
        DiskError: no space for the picture.
    """
    if wants_help(arguments):
        print(help_text(USAGE))
        return 0
    request = _parsed(arguments)
    loaded = load_here(request.rest)
    return _draw(loaded, request) if request.shows_timesteps else _plan(loaded, request)


def _plan(loaded: Loaded, request: Request) -> int:
    # torch, which the other word and all mistakes do without.
    import torch

    from simpletuner.memory.planner import Machine
    from simpletuner.memory.precision import DTYPES
    from simpletuner.memory.rate import matmul_rate
    from simpletuner.train.budget import Budget, looked_at, this_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = this_machine(device, Path(loaded.config.output_dir))
    other = Machine.of_size(
        None if request.vram_gib is None else request.vram_gib * GIB, (request.ram_gib or 0.0) * GIB
    )
    if request.vram_gib is not None:
        machine = replace(machine, accelerator=other.accelerator)
    if request.ram_gib is not None:
        machine = replace(machine, ram=other.ram)
    if request.vram_gib is not None or request.ram_gib is not None:
        machine = replace(machine, disk=None)
    budget = Budget(loaded.config, looked_at(loaded), machine)
    is_this_one = request.vram_gib is None
    rate = matmul_rate(device, DTYPES[loaded.config.base_dtype]) if is_this_one else None
    if request.as_json:
        print(json_text(budget.summary(rate) | {"notices": list(loaded.notices)}))
    else:
        print("\n".join((*loaded.notices, *budget.table(rate))))
    return 0 if budget.plan.fits else MemoryBudgetError.exit_code


def _draw(loaded: Loaded, request: Request) -> int:
    spread = _spread(loaded)
    folder = Path(loaded.config.output_dir) if request.out is None else request.out
    path = folder / PICTURE
    with disk_full_is_reported(path):
        folder.mkdir(parents=True, exist_ok=True)
        picture(spread).save(path)
    if request.as_json:
        found: dict[str, Any] = {"timesteps": spread.summary() | {"path": str(path)}, "notices": list(loaded.notices)}
        print(json_text(found))
    else:
        print("\n".join((*loaded.notices, terminal(spread), "", f"Picture: {path}")))
    return 0


def _parsed(arguments: Sequence[str]) -> Request:
    kept: list[str] = []
    found = {"--show-timesteps": False, "--json": False}
    values: dict[str, str | None] = {"--out": None, "--vram": None, "--ram": None}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, has_value, value = flag.partition("=")
        if flag in found:
            found[flag] = True
        elif name in values:
            if not has_value and (not rest or rest[0].startswith("--")):
                raise ConfigError.of(f"{name}: nothing follows it", "a folder" if name == "--out" else "a size in GiB")
            values[name] = value if has_value else rest.pop(0)
        else:
            kept.append(flag)
    out = values["--out"]
    vram, ram = (_gib(name, values[name]) for name in ("--vram", "--ram"))
    if ram == 0:
        raise ConfigError.of("--ram = 0", "a size in GiB above 0")
    return Request(
        found["--show-timesteps"], found["--json"], None if out is None else Path(out), vram, ram, tuple(kept)
    )


def _gib(name: str, text: str | None) -> float | None:
    """ "24", "24GB" or "24 GiB" in GiB."""
    if text is None:
        return None
    try:
        plain = text.replace(".", "", 1).isdecimal()
        return float(text) if plain else parse_size(text) / GIB
    except ValueError:
        raise ConfigError.of(f"{name} = {text!r}", "a size in GiB such as 24") from None


def _spread(loaded: Loaded) -> Spread:
    """The density, resolution by resolution. The pictures are looked at only where something depends on them."""
    config = loaded.config
    timesteps = Timesteps.of(config)
    visits: dict[str, int] = {}
    tokens: dict[str, int] = {}
    if timesteps.shift is None or config.timestep_strata:
        manifests = [
            scan(image_set, seed=config.seed, workers=config.workers) for image_set in loaded.datasets.train_sets
        ]
        order = Order(manifests, seed=config.seed, batch_size=config.train_batch_size)
        for micro_batch, count in order.epoch(0).by_bucket():
            width, height = micro_batch.bucket
            name = f"{width}x{height}"
            visits[name] = visits.get(name, 0) + count * len(micro_batch.visits)
            tokens[name] = width * height // 256
    samples = sum(visits.values())
    shares = (
        {EVERY_SIZE: 1.0}
        if timesteps.shift is not None
        else {name: count / samples for name, count in sorted(visits.items(), key=lambda item: tokens[item[0]])}
    )
    resolutions = [
        Resolution(
            name, tokens.get(name) if timesteps.shift is None else None, share, timesteps.shift_of(tokens.get(name, 0))
        )
        for name, share in shares.items()
    ]
    values = config.flow_custom_timesteps
    return Spread.of(
        timesteps.density,
        _named(config),
        tuple(resolutions),
        listed_values=None if values is None else len(values),
        strata=samples if config.timestep_strata else None,
    )


def _named(config: ScheduleOptions) -> str:
    """The density in words, and what moves it."""
    if config.flow_custom_timesteps is not None:
        timesteps = [f"{value:g}" for value in sorted(config.flow_custom_timesteps)]
        return f"the listed timesteps {join_names(timesteps, 'and')}"
    if config.flow_use_uniform_schedule:
        name = "uniform"
    elif config.flow_use_beta_schedule:
        name = f"Beta({config.flow_beta_schedule_alpha:g}, {config.flow_beta_schedule_beta:g})"
    else:
        name = f"sigmoid({config.flow_sigmoid_scale:g} × normal)"
    shift = "each size's own shift" if config.flow_schedule_auto_shift else f"shift {config.flow_schedule_shift:g}"
    return f"{name}, {shift}"
