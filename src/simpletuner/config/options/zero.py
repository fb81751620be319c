"""What `deepspeed_config` hands on to DeepSpeed: its `zero_optimization`. DeepSpeed's own defaults hold for the rest.

Source of the names: `DeepSpeedZeroConfig` of DeepSpeed 0.19, deepspeed/runtime/zero/config.py.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BeforeValidator

from simpletuner.config.options.kinds import Count, NotNegative, Says, Slice

OFFLOADS = ("offload_optimizer", "offload_param")
"""Keys of DeepSpeed under which a share may lie elsewhere."""
AUTO_VALUE = "auto"
"""Leaves a setting to the trainer, in a config of DeepSpeed: to the option that it is here, else to DeepSpeed."""


def _whole(value: object) -> object:
    """A float without a fraction as an integer, since people write 5e8; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Numbers = Annotated[int, Ge(0), BeforeValidator(_whole), Says("a whole number of at least 0")]
"""How many numbers (elements, not bytes) a buffer holds."""
Settings = Annotated[dict[str, Any], Says("an object, in { }")]


class ZeroOffload(Slice):
    """Where a share lies."""

    device: Literal["none", "cpu"] = "none"
    """`cpu` is host memory."""

    pin_memory: bool = True
    """Whether that memory is pinned."""


class ZeroSettings(Slice):
    """`zero_optimization` of a config of DeepSpeed."""

    stage: Annotated[int, Ge(0), Le(3)] = 0
    """What each process holds only its share of: 1 the optimizer state, 2 the gradients too, 3 the weights too."""

    offload_optimizer: Settings | None = None
    """A `ZeroOffload` of the optimizer state, which is then stepped on the CPU."""

    offload_param: Settings | None = None
    """A `ZeroOffload` of the weights. Stage 3."""

    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on. Stages 2 and 3."""

    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come."""

    reduce_scatter: bool = True
    """Reduce gradients to their owner alone, and not to everyone."""

    reduce_bucket_size: Numbers = 500_000_000
    """Gradients that are reduced at once."""

    use_multi_rank_bucket_allreduce: bool = True
    """Reduce the buckets of several owners at once. Stages 1 and 2."""

    allgather_partitions: bool = True
    """Gather the stepped weights with all-gather, and not with broadcasts. Stages 1 and 2."""

    allgather_bucket_size: Numbers = 500_000_000
    """Weights that are gathered at once. Stages 1 and 2."""

    stage3_prefetch_bucket_size: Numbers = 50_000_000
    """Weights that are gathered ahead of their use."""

    stage3_param_persistence_threshold: Numbers = 100_000
    """Weights with fewer numbers stay whole on each process."""

    stage3_model_persistence_threshold: Numbers | None = None
    """How many numbers may stay whole in all."""

    stage3_max_live_parameters: Numbers = 1_000_000_000
    """Gathered weights that may be held at a time."""

    stage3_max_reuse_distance: Numbers = 1_000_000_000
    """A weight that is used again within so many is not released."""

    stage3_module_granularity_threshold: Numbers = 0
    """Modules with fewer numbers a child are gathered as one."""

    stage3_use_all_reduce_for_fetch_params: bool = False
    """Gather weights by an all-reduce."""

    stage3_allgather_sequential: bool = False
    """Gather weights one by one, without a buffer for several."""


class DeepSpeedDocument(Slice):
    """A config of DeepSpeed: what is handed on, and what options of this program decide."""

    zero_optimization: Settings | None = None
    """A `ZeroSettings`."""

    train_batch_size: Count | None = None
    """The effective batch."""

    train_micro_batch_size_per_gpu: Count | None = None
    """`train_batch_size` of this program."""

    gradient_accumulation_steps: Count | None = None
    """The option of that name."""

    gradient_clipping: NotNegative | None = None
    """`max_grad_norm`."""

    bf16: Settings | None = None
    """Its `enabled` is `mixed_precision`."""

    fp16: Settings | None = None
    """The same."""

    optimizer: Settings | None = None
    """`type` is `optimizer`; `params` are options of their own."""

    scheduler: Settings | None = None
    """`type` is `lr_scheduler`; `params` are options of their own."""


def without_auto(value: Any) -> Any:
    """`value` of a JSON document without the keys, at any depth, that leave the choice to the trainer."""
    if not isinstance(value, dict):
        return value
    return {key: without_auto(inner) for key, inner in value.items() if inner is not None and inner != AUTO_VALUE}


def handed_on(document: dict[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` that DeepSpeed is given for its config `document`: a stage above 0 and what is set
    beside it, without what is not handed on. Empty without a stage.

    Raises:
        ValidationError: a value is not of its kind.
    """

    def known(values: dict[str, Any], model: type[Slice]) -> dict[str, Any]:
        held = {name: values[name] for name in model.model_fields if name in values}
        return model.model_validate(held).model_dump(exclude_unset=True)

    zero = without_auto(document).get("zero_optimization")
    if not isinstance(zero, dict):
        return {}
    settings = known(zero, ZeroSettings)
    for name in OFFLOADS:
        if name in settings:
            settings[name] = known(settings[name], ZeroOffload)
    return settings if settings.get("stage") else {}
