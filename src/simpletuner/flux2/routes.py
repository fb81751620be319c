"""The blocks that TREAD's routes cover in a model. Works without torch, so that a mistake is answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.tread import TreadRoute
from simpletuner.config.run import RunConfig


@dataclass(frozen=True)
class Route:
    """Blocks `start` to `end`, both included, in one count over double and then single blocks."""

    start: int
    end: int
    keep_ratio: float
    """Share of the image tokens that these blocks process, above 0 and up to 1."""

    def keeps(self, tokens: int) -> int:
        """How many of `tokens` image tokens these blocks process: at least one."""
        return max(1, round(self.keep_ratio * tokens))

    def told(self, tokens: int, blocks: int) -> str:
        """What it does to a picture of `tokens` image tokens in a model of `blocks`."""
        place = f"block {self.start}" if self.start == self.end else f"blocks {self.start}–{self.end}"
        return f"TREAD keeps {self.keeps(tokens)} of {tokens} image tokens in {place} of {blocks}"


def resolve(routes: Sequence[TreadRoute], blocks: int) -> tuple[Route, ...]:
    """`routes` in a model of `blocks`, in the order in which they are met.

    Raises:
        ConfigError: every index that is no block, every route that ends before it starts, and every overlap.
    """
    problems: list[Problem] = []
    found: list[tuple[Route, int]] = []
    for number, route in enumerate(routes, start=1):
        where = f"tread_config, route {number}"
        outside = [
            Problem(f"{where}: {key} = {index}", f"{-blocks} to {blocks - 1}: the model has {blocks} blocks")
            for key, index in (("start_layer_idx", route.start_layer_idx), ("end_layer_idx", route.end_layer_idx))
            if not -blocks <= index < blocks
        ]
        start, end = route.start_layer_idx % blocks, route.end_layer_idx % blocks
        if not outside and start > end:
            outside = [
                Problem(f"{where}: it starts at block {start} and ends at block {end}", "a start before the end")
            ]
        problems += outside
        if not outside:
            found.append((Route(start, end, route.selection_ratio), number))
    found.sort(key=lambda item: item[0].start)
    for (one, number), (other, other_number) in combinations(found, 2):
        if other.start <= one.end:
            shared = f"tread_config: routes {number} and {other_number} share block {other.start}"
            problems.append(Problem(shared, "routes that share no block"))
    ConfigError.raise_if(problems)
    return tuple(route for route, _ in found)


def check(config: RunConfig) -> None:
    """Hold the routes against the flavour's own transformer; another one is known only once it is found.

    Raises:
        ConfigError: as `resolve` does.
    """
    flavour = FLAVOURS[config.model_flavour]
    replaced = config.pretrained_transformer_model_name_or_path
    if replaced is None and config.pretrained_model_name_or_path in (None, flavour.repo):
        resolve(config.tread_routes, flavour.transformer.blocks)
