"""TREAD: blocks that process only some of a picture's tokens while training."""

from typing import Annotated, Any

from annotated_types import Gt, Le

from simpletuner.config.options.kinds import IsJson, Says, Slice


class TreadRoute(Slice):
    """A stretch of blocks, and how much of a picture it processes."""

    selection_ratio: Annotated[float, Gt(0), Le(1)]
    """Share of the image tokens that is kept."""

    start_layer_idx: int
    """The first block, in one count over double and then single blocks; negative from the end."""

    end_layer_idx: int
    """The last block, included; counted like the first."""


class TreadOptions(Slice):
    """Token routing (TREAD)."""

    tread_config: (
        Annotated[dict[str, Any], IsJson(), Says('an object {"routes": [...]}, or the path of a JSON file with one')]
        | None
    ) = None
    """`{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}`, also as inline JSON or
    as the path of a JSON file. While training, the blocks of a route process only this share of the image tokens,
    drawn anew for each picture and step: `selection_ratio` is the share that is kept. Layers are counted over
    double and then single blocks, negative from the end, the last one included; routes share no block.
    [tread.md](tread.md) explains it."""

    @property
    def tread_routes(self) -> tuple[TreadRoute, ...]:
        """The routes, as typed."""
        return tuple(TreadRoute(**route) for route in (self.tread_config or {"routes": []})["routes"])
