"""Options for TREAD token routing: in training, some blocks process only a part of each image's tokens."""

from typing import Annotated, Any

from annotated_types import Gt, Le

from simpletuner.config.options.kinds import Expects, IsJson, Slice


class TreadRoute(Slice):
    """A range of blocks and the share of an image's tokens that they process."""

    selection_ratio: Annotated[float, Gt(0), Le(1)]
    """Share of the image tokens that the blocks process."""

    start_layer_idx: int
    """The first block of the range, counted over double and then single blocks; negative counts from the end."""

    end_layer_idx: int
    """The last block of the range, inclusive; counted like `start_layer_idx`."""


class TreadOptions(Slice):
    """Token routing (TREAD)."""

    tread_config: (
        Annotated[dict[str, Any], IsJson(), Expects('an object {"routes": [...]}, or the path of a JSON file with one')]
        | None
    ) = None
    """Routes for TREAD, which trains some blocks on only a part of each image's tokens, as an object, inline JSON or
    the path of a JSON file: `{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}`.
    `selection_ratio` is the share of the image tokens that the route's blocks process; the tokens are drawn for each
    image and step. Layers are counted over double and then single blocks; negative counts from the end; `end_layer_idx`
    is included. Routes must not overlap. See [tread.md](tread.md)."""

    @property
    def tread_routes(self) -> tuple[TreadRoute, ...]:
        """The routes in `tread_config`, in its order."""
        return tuple(TreadRoute(**route) for route in (self.tread_config or {"routes": []})["routes"])
