"""Table of the optimizers: the library of each and the options that it reads. Does not import torch."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

LIBRARIES: dict[str, str] = {
    "torch": "torch.optim",
    "bitsandbytes": "bitsandbytes.optim",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "pytorch_optimizer": "pytorch_optimizer",
}
"""The libraries that `library:name` accepts, each with the module of its optimizers."""

OURS = "simpletuner"
"""The library of the optimizers in this package."""

ADAM = ("optimizer_beta1", "optimizer_beta2", "adam_weight_decay", "adam_epsilon")
"""Adam's options, some of which other optimizers read too."""

DIVERGES_FROM = {"schedulefree": 3e-2, "lion": 3e-3, "adam": 1e-2, "came": 1e-2, "muon": 3e-2}
"""Lowest learning rates at which training a LoRA usually diverges; the first key that the optimizer's name contains
applies (docs/log.md)."""


@dataclass(frozen=True)
class KnownOptimizer:
    """An optimizer of this package or of a library."""

    library: str
    """A key of `LIBRARIES`, or `OURS`."""
    name: str
    """Its class in the library."""
    reads: tuple[str, ...] = ()
    """The options of `ADAM` that it reads."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Its default betas."""
    arguments: tuple[str, ...] | None = None
    """Arguments that `optimizer_config` may set; None if they are known only once the library is loaded."""
    state_bytes: float = 8
    """Approximate bytes of optimizer state per trainable parameter."""
    rounds_stochastically: bool = False
    """Whether it steps bf16 weights with stochastic rounding, so that steps smaller than the spacing of bf16 values are
    not lost."""
    releases_gradients: bool = False
    """Whether it can step each parameter inside the backward pass (`optimizer_release_gradients`)."""
    is_factored: bool = False
    """Whether it stores a factored state: one fp32 row and one fp32 column for each matrix."""
    is_elementwise: bool = False
    """Whether it steps each element by only that element's gradient and state, so that stepping a shard gives the same
    result as stepping the whole tensor. False for `library:name` optimizers, for which it is unknown."""

    def state_size(self, shapes: Iterable[Sequence[int]]) -> int:
        """Approximate bytes of optimizer state for tensors of these `shapes`."""
        if self.is_factored:
            return sum(4 * (sum(shape) if len(shape) == 2 else math.prod(shape)) for shape in shapes)
        return round(self.state_bytes * sum(map(math.prod, shapes)))

    @property
    def estimates_rate(self) -> bool:
        """Whether it estimates the learning rate itself; `learning_rate` is then a factor of the estimate."""
        return "prodigy" in self.name.lower() or "dadapt" in self.name.lower()

    @property
    def diverges_from(self) -> float | None:
        """Lowest learning rate at which training a LoRA usually diverges; None if unknown."""
        if self.estimates_rate:
            return None
        return next((rate for word, rate in DIVERGES_FROM.items() if word in self.name.lower()), None)

    @property
    def is_installed(self) -> bool:
        return self.library in (OURS, "torch") or find_spec(self.library) is not None


OPTIMIZERS: dict[str, KnownOptimizer] = {
    "adamw": KnownOptimizer("torch", "AdamW", ADAM, arguments=("amsgrad", "foreach", "fused"), is_elementwise=True),
    "adamw_bf16": KnownOptimizer(
        OURS,
        "AdamWBf16",
        ADAM,
        arguments=(),
        state_bytes=4,
        rounds_stochastically=True,
        releases_gradients=True,
        is_elementwise=True,
    ),
    "adamw8bit": KnownOptimizer("bitsandbytes", "AdamW8bit", ADAM, arguments=("min_8bit_size",), state_bytes=2.1),
    "adafactor": KnownOptimizer(
        "torch",
        "Adafactor",
        ("adam_weight_decay",),
        arguments=("beta2_decay", "d", "eps", "foreach"),
        state_bytes=0.3,
        releases_gradients=True,
        is_factored=True,
    ),
    "lion": KnownOptimizer(
        "pytorch_optimizer",
        "Lion",
        ("optimizer_beta1", "optimizer_beta2", "adam_weight_decay"),
        betas=(0.9, 0.99),
        arguments=("foreach",),
        state_bytes=4,
        is_elementwise=True,
    ),
    "prodigy": KnownOptimizer(
        "prodigyopt",
        "Prodigy",
        ADAM,
        arguments=(
            "beta3", "d0", "d_coef", "decouple", "growth_rate", "safeguard_warmup", "slice_p", "use_bias_correction",
        ),
        state_bytes=14,
    ),
    "adamw_schedulefree": KnownOptimizer(
        "schedulefree", "AdamWScheduleFree", ADAM, arguments=("foreach", "r", "weight_lr_power")
    ),
    "came": KnownOptimizer(
        "pytorch_optimizer",
        "CAME",
        ("optimizer_beta1", "optimizer_beta2", "adam_weight_decay"),
        betas=(0.9, 0.999, 0.9999),
        arguments=("ams_bound", "clip_threshold", "eps1", "eps2", "foreach"),
        state_bytes=4.5,
    ),
    "muon": KnownOptimizer(
        "torch",
        "Muon",
        ("adam_weight_decay",),
        arguments=("adjust_lr_fn", "eps", "momentum", "nesterov", "ns_coefficients", "ns_steps"),
        state_bytes=4,
    ),
}  # fmt: skip

OPTIMIZER_ALIASES: dict[str, str] = {
    "torch-adamw": "adamw",
    "torch-adafactor": "adafactor",
    "torch-muon": "muon",
    "ao-adamw8bit": "adamw8bit",
    "bnb-adamw8bit": "adamw8bit",
    "optimi-adamw": "adamw",
    "optimi-lion": "lion",
    "optimi-adam": "torch:adam",
    "optimi-radam": "torch:radam",
    "optimi-sgd": "torch:sgd",
    "optimi-adan": "pytorch_optimizer:adan",
    "optimi-ranger": "pytorch_optimizer:ranger",
    "optimi-stableadamw": "pytorch_optimizer:stableadamw",
    "soap": "pytorch_optimizer:soap",
    **{
        f"bnb-{name}": f"bitsandbytes:{name}"
        for name in (
            "adagrad",
            "adagrad8bit",
            "adam",
            "adam8bit",
            "adamw",
            "ademamix",
            "ademamix8bit",
            "lion",
            "lion8bit",
        )
    },
    **{
        f"bnb-{name}-paged": f"bitsandbytes:paged{name}"
        for name in ("adam", "adam8bit", "adamw", "adamw8bit", "ademamix", "ademamix8bit", "lion", "lion8bit")
    },
}
"""SimpleTuner 4.x's names for optimizers."""

_LIBRARY_NAME = re.compile(rf"({'|'.join(LIBRARIES)}):(\w+)")
_LIBRARY_ALIASES = {"bnb": "bitsandbytes", "pytorch-optimizer": "pytorch_optimizer"}


def canonical(text: str) -> str | None:
    """The canonical name of the optimizer `text`: a key of `OPTIMIZERS` or `library:name`; None if there is none."""
    if text in OPTIMIZERS:
        return text
    if text in OPTIMIZER_ALIASES:
        return OPTIMIZER_ALIASES[text]
    library, colon, name = text.lower().partition(":")
    keys = {(known.library, known.name.lower()): key for key, known in OPTIMIZERS.items()}
    library_name = f"{_LIBRARY_ALIASES.get(library, library)}{colon}{name}"
    match = _LIBRARY_NAME.fullmatch(library_name)
    if match is None:
        return None
    return keys.get((match[1], match[2]), library_name)


def known_optimizer(name: str) -> KnownOptimizer:
    """The optimizer with this canonical name."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    library, _, class_name = name.partition(":")
    return KnownOptimizer(library, class_name)
