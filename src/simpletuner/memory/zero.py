"""DeepSpeed's ZeRO: each rank steps its share of the trained numbers. Loaded only where `deepspeed_config` asks for it.

DeepSpeed reduces the gradients, shares out weights, gradients and fp32 masters, and gathers the weights that the
optimizer has stepped. Losses, clipping, the optimizer and checkpoints are this program's: DeepSpeed calls its optimizer
once a step, when the gradients of this rank's share are there, and whoever trains steps them then.
"""

import contextlib
import datetime
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from simpletuner.base.errors import RanksError, UserError
from simpletuner.base.quiet import quiet_import
from simpletuner.base.sizes import format_size
from simpletuner.config.options.ranks import RankOptions
from simpletuner.memory.row_shards import Shards
from simpletuner.memory.shard import FlatSplit, mark_sharded
from simpletuner.memory.world import World

T = TypeVar("T")


def engine_settings(zero_optimization: Mapping[str, Any], dtype: torch.dtype, batch_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, of its `zero_optimization` and what this program decides.

    Args:
        dtype: of the trained weights.
        batch_size: samples of a micro-batch.
    """
    is_bf16 = dtype == torch.bfloat16
    zero = dict(zero_optimization)
    zero["sub_group_size"] = 2**62  # one group: its gradients are there, and are stepped, all at once
    if zero["stage"] == 1 and is_bf16:
        zero["stage"] = 2  # stage 1 would accumulate bf16 gradients in bf16
    if zero["stage"] == 1:
        zero["overlap_comm"] = False  # DeepSpeed cannot do so where the caller says which micro-batch is the last
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # by default it would clip at 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": is_bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Stage 3 knows the mean alone. Below it, bf16 gradients would be divided, and rounded, before they are summed.
        "gradient_allreduce_op": "mean" if zero["stage"] == 3 else "sum",
    }


def landing_device(options: RankOptions, world: World) -> torch.device:
    """Where a model is loaded: at stage 3 into host memory, from which DeepSpeed takes tensor by tensor."""
    return torch.device("cpu") if options.zero_stage == 3 and not world.is_alone else world.device


class ZeroShards(Shards):
    """This rank's share of the trained numbers of a model that DeepSpeed's engine trains. The optimizer steps on
    `parameters`: pieces of the engine's fp32 masters, flat, which hold what lies in this rank's share; some are empty.

    Call the model through `forward`. At stage 3 a call of the model itself would leave the engine's hooks out, and
    gradients would be wrong; one with gradients raises.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], settings: Mapping[str, Any], world: World
    ) -> None:
        """Give `model` to DeepSpeed, with its trained `weights` by name. Those that are frozen are sharded at stage 3.

        Args:
            settings: as `engine_settings` makes them.
        """
        self.world = world
        self.stage: int = settings["zero_optimization"]["stage"]
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._update: Callable[[], None] | None = None
        self._is_inside = False
        handover = _Handover(weights.values(), self._step)
        self._engine = _engine(model, list(weights.values()), handover, settings, world)
        pieces = {name: _piece(self._engine.optimizer, self.stage, weight, world) for name, weight in weights.items()}
        self.parameters = {name: nn.Parameter(piece) for name, (_, piece) in pieces.items()}
        spans = {name: [start, start + piece.numel()] for name, (start, piece) in pieces.items()}
        self.splits = {
            name: FlatSplit(shapes[name], world.rank, tuple((each[name][0], each[name][1]) for each in told))
            for told in [world.gather_json(spans)]
            for name in weights
        }
        if self.stage == 3:
            mark_sharded(model)
            model.register_forward_pre_hook(self._check_call)

    def forward(self, *inputs: Any) -> Any:
        """The model's forward pass. At stage 3 all ranks call it equally often, in the same order."""
        self._is_inside = True
        try:
            return self._engine(*inputs)
        finally:
            self._is_inside = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's `loss`, which `step` sums over the ranks."""
        self._engine.backward(loss * self.world.size if self.stage == 3 else loss)  # there DeepSpeed takes the mean

    def step(self, update: Callable[[], T]) -> T:
        """Call `update` when the gradients of `parameters` are there, summed over the ranks: it clips them and steps on
        them, or raises an error, after which nothing is changed. Then give the weights the values of `parameters`.
        Where a gradient is infinite or NaN on any rank, one is NaN on each.
        """
        results: list[T] = []
        errors: list[UserError | RuntimeError] = []

        def attempt() -> None:
            try:
                results.append(update())
            except RanksError:  # neither does DeepSpeed reach the others
                raise
            except (UserError, RuntimeError) as error:  # DeepSpeed must come to the end of its step on all ranks
                errors.append(error)

        self._update = attempt
        try:
            self._engine.step()
            if not results and not errors:  # DeepSpeed has found a gradient that is not finite
                if self.stage < 3:  # where it offloads, it would add the next gradients to these
                    self._engine.optimizer.averaged_gradients.clear()
                self._spoil()
                attempt()
        finally:
            self._update = None
            for piece in self.parameters.values():
                piece.grad = None
        if errors:
            raise errors[0]
        return results[0]

    def discard(self) -> None:
        """Forget the gradients. All ranks call it."""
        self.step(lambda: None)

    def told(self) -> str:
        """What this rank holds, for people."""
        stepped = sum(piece.nbytes for piece in self.parameters.values())
        whole = sum(4 * math.prod(split.shape) for split in self.splits.values())
        text = (
            f"DeepSpeed, ZeRO stage {self.stage}: each of {self.world.size} processes steps {format_size(stepped)} of "
            f"{format_size(whole)} of fp32 weights"
        )
        if self.stage < 3:
            return f"{text}."
        held = sum(weight.ds_tensor.nbytes for weight in self._engine.module.parameters())
        return f"{text}, and holds {format_size(held)} of the model."

    def collect(self) -> None:
        """Nothing: the gradients come in `step`."""

    def settle(self) -> None:
        if self._update is None:  # else DeepSpeed is about to
            _show_masters(self._engine.optimizer, self.stage)

    def _step(self, flat: Tensor) -> None:
        """DeepSpeed's call of its optimizer: `flat` has the share's masters and their gradients."""
        assert self._update is not None
        assert flat.grad is not None
        first = flat.storage_offset()
        for piece in self.parameters.values():
            if piece.numel():
                piece.grad = flat.grad.narrow(0, piece.storage_offset() - first, piece.numel())
            else:
                piece.grad = torch.empty_like(piece)
        self._update()

    def _spoil(self) -> None:
        for piece in self.parameters.values():
            piece.grad = torch.full_like(piece, torch.nan)

    def _check_call(self, *_: object) -> None:
        if torch.is_grad_enabled() and not self._is_inside:
            raise RuntimeError("the model is called past DeepSpeed's engine: its gradients would be wrong")


class _Handover(torch.optim.Optimizer):
    """The optimizer that DeepSpeed knows: it hands the flat share on."""

    def __init__(self, weights: Any, take: Callable[[Tensor], None]) -> None:
        super().__init__(list(weights), {"lr": 0.0})
        self._take = take

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """Called by DeepSpeed, which has put the flat share in the place of the weights."""
        ((flat,),) = (group["params"] for group in self.param_groups)
        self._take(flat)


class _AllRanks:
    """What DeepSpeed asks for its groups (`mpu`): all ranks share one model out. Left to itself it makes a group that
    waits for as long as torch does by default.
    """

    def __init__(self, world: World) -> None:
        assert world.signs is not None  # of several ranks
        self._world = world
        timeout = datetime.timedelta(seconds=world.signs.timeout_s)
        self._group: torch.distributed.ProcessGroup = torch.distributed.new_group(timeout=timeout)

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._group

    def get_data_parallel_rank(self) -> int:
        return self._world.rank

    def get_data_parallel_world_size(self) -> int:
        return self._world.size

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def _engine(
    model: nn.Module, weights: list[nn.Parameter], handover: _Handover, settings: Mapping[str, Any], world: World
) -> Any:
    """DeepSpeed's engine. It says nothing: what it prints and logs would be the run's own words."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    # Names that torch 2.13 is about to replace: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with quiet_import(), contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Only inference uses it. It would be compiled on each machine, and joins ranks of one machine alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        if settings["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=dict(settings))
            for buffer in model.buffers():
                buffer.data = buffer.data.to(world.device)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=weights,
            optimizer=handover,
            mpu=_AllRanks(world),
            config=dict(settings),
        )
    return engine


def _piece(optimizer: Any, stage: int, weight: Any, world: World) -> tuple[int, Tensor]:
    """What this rank has of a weight's fp32 masters: its first number's place in the weight, and a flat view."""
    if stage < 3:
        mapping = weight._hp_mapping
        if mapping is None:
            return 0, torch.empty(0, device=optimizer.single_partition_of_fp32_groups[0].device)
        return mapping.lp_fragment_address.start, mapping.hp_fragment.detach()
    group, offset, count = optimizer.grad_position[optimizer.get_param_id(weight)]
    start = min(world.rank * count, weight.ds_numel)
    count = min(count, weight.ds_numel - start)  # the last ones are padded
    return start, optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, count)


@torch.no_grad()
def _show_masters(optimizer: Any, stage: int) -> None:
    """Give the weights the values of the masters, as DeepSpeed does at the end of its step."""
    if stage < 3:
        optimizer.update_lp_params()
        for group in range(len(optimizer.bit16_groups)):
            optimizer._update_model_bit16_weights(group)
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
