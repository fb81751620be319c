"""Resolve the blocks of TREAD's routes in a model. Needs no torch, so that mistakes are reported immediately."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.tread import TreadRoute
from simpletuner.config.run import RunConfig


@dataclass(frozen=True)
class Route:
    """A route through blocks `start` to `end`, inclusive; double blocks are numbered first, then single blocks."""

    start: int
    end: int
    keep_ratio: float
    """Share of the image tokens that these blocks process, above 0 and up to 1."""

    def keeps(self, tokens: int) -> int:
        """The number of image tokens, of `tokens`, that these blocks process: at least 1."""
        return max(1, round(self.keep_ratio * tokens))

    def description(self, tokens: int, blocks: int) -> str:
        """One sentence about the route's effect on an image of `tokens` tokens in a model with `blocks` blocks."""
        blocks_covered = f"block {self.start}" if self.start == self.end else f"blocks {self.start}–{self.end}"
        return f"TREAD keeps {self.keeps(tokens)} of {tokens} image tokens in {blocks_covered} of {blocks}"


def resolve(routes: Sequence[TreadRoute], blocks: int) -> tuple[Route, ...]:
    """`routes` with block numbers for a model with `blocks` blocks, in execution order.

    Raises:
        ConfigError: lists all indices outside the model, all routes that end before they start, and all overlaps.
    """
    problems: list[Problem] = []
    resolved: list[tuple[Route, int]] = []
    for number, route in enumerate(routes, start=1):
        label = f"tread_config, route {number}"
        route_problems = [
            Problem(f"{label}: {key} = {index}", f"{-blocks} to {blocks - 1}: the model has {blocks} blocks")
            for key, index in (("start_layer_idx", route.start_layer_idx), ("end_layer_idx", route.end_layer_idx))
            if not -blocks <= index < blocks
        ]
        start, end = route.start_layer_idx % blocks, route.end_layer_idx % blocks
        if not route_problems and start > end:
            route_problems = [
                Problem(f"{label}: it starts at block {start} and ends at block {end}", "a start at or before the end")
            ]
        problems += route_problems
        if not route_problems:
            resolved.append((Route(start, end, route.selection_ratio), number))
    resolved.sort(key=lambda item: item[0].start)
    for (first, number), (second, second_number) in combinations(resolved, 2):
        if second.start <= first.end:
            message = f"tread_config: routes {number} and {second_number} share block {second.start}"
            problems.append(Problem(message, "routes that share no block"))
    ConfigError.raise_if(problems)
    return tuple(route for route, _ in resolved)


def check(config: RunConfig) -> None:
    """Check the routes for the flavour's own transformer. A replacement's blocks are unknown until it is loaded.

    Raises:
        ConfigError: as `resolve`.
    """
    flavour = FLAVOURS[config.model_flavour]
    replacement = config.pretrained_transformer_model_name_or_path
    if replacement is None and config.pretrained_model_name_or_path in (None, flavour.repo):
        resolve(config.tread_routes, flavour.transformer.blocks)
