"""Seeds of random draws by key. The same key gives the same draw on any machine, in any order, after any restart."""

import hashlib
from typing import Literal

Purpose = Literal[
    "noise",
    "sigma",
    "strata",
    "guidance",
    "caption",
    "caption_shuffle",
    "dropout",
    "lora_dropout",
    "rollout",
    "crop",
    "order",
    "init",
    "eval",
    "rounding",
    "validation",
    "tread",
    "reference_dropout",
    "mask",
    "optimizer",
]


def draw_seed(seed: int, purpose: Purpose, *position: int | str) -> int:
    """A seed in [0, 2**63) for one draw. `position` is (step, slot) in training, a name elsewhere.

    A slot is the sample's index in the global batch, so the same batch gets the same draws with any number of ranks and
    accumulation steps.
    """
    key = "/".join(("simpletuner", str(seed), purpose, *map(str, position)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
