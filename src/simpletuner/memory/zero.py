"""DeepSpeed's ZeRO: each rank steps its shard of the trainable parameters. Loaded only with `deepspeed_config`.

DeepSpeed reduces the gradients, shards weights, gradients and fp32 masters, and gathers the weights after the optimizer
step. Losses, clipping, the optimizer and checkpoints are ours: DeepSpeed calls its optimizer once per step, when the
gradients of this rank's shard are complete, and that call runs our update.
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
from simpletuner.memory.row_shards import RankShards
from simpletuner.memory.shard import FlatSplit, mark_sharded
from simpletuner.memory.world import World

T = TypeVar("T")


def engine_settings(zero_optimization: Mapping[str, Any], dtype: torch.dtype, batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: its section `zero_optimization`, and our values for the rest.

    Args:
        dtype: dtype of the trainable weights.
        batch_size: samples per micro-batch.
    """
    is_bf16 = dtype == torch.bfloat16
    zero = dict(zero_optimization)
    zero["sub_group_size"] = 2**62  # one group, so that all gradients are stepped at once
    if zero["stage"] == 1 and is_bf16:
        zero["stage"] = 2  # stage 1 would accumulate bf16 gradients in bf16
    if zero["stage"] == 1:
        zero["overlap_comm"] = False  # not supported if the caller defines the last micro-batch
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # the default would clip at 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": is_bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Stage 3 only supports the mean. Below it, the mean would divide, and round, bf16 gradients before the sum.
        "gradient_allreduce_op": "mean" if zero["stage"] == 3 else "sum",
    }


def landing_device(options: RankOptions, world: World) -> torch.device:
    """Device to load a model to: at stage 3 host memory, from which DeepSpeed shards it tensor by tensor."""
    return torch.device("cpu") if options.zero_stage == 3 and not world.is_alone else world.device


class ZeroShards(RankShards):
    """This rank's shards of the trainable parameters of a model in DeepSpeed's engine.

    The optimizer steps `parameters`: flat views of this rank's part of the engine's fp32 masters; some are empty.

    Call the model through `forward`. At stage 3, calling the model itself would skip the engine's hooks and give wrong
    gradients; with gradients enabled it raises.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], settings: Mapping[str, Any], world: World
    ) -> None:
        """Make the engine for `model`, with its trainable `weights` by name. Stage 3 also shards frozen weights.

        Args:
            settings: return value of `engine_settings`.
        """
        self.world = world
        self.stage: int = settings["zero_optimization"]["stage"]
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._update: Callable[[], None] | None = None
        self._is_in_forward = False
        optimizer = _ForwardingOptimizer(weights.values(), self._step)
        self._engine = _engine(model, list(weights.values()), optimizer, settings, world)
        pieces = {name: _piece(self._engine.optimizer, self.stage, weight, world) for name, weight in weights.items()}
        self.parameters = {name: nn.Parameter(piece) for name, (_, piece) in pieces.items()}
        spans = {name: [start, start + piece.numel()] for name, (start, piece) in pieces.items()}
        self.splits = {
            name: FlatSplit(shapes[name], world.rank, tuple((each[name][0], each[name][1]) for each in all_spans))
            for all_spans in [world.gather_json(spans)]
            for name in weights
        }
        if self.stage == 3:
            mark_sharded(model)
            model.register_forward_pre_hook(self._check_call)

    def forward(self, *inputs: Any) -> Any:
        """The model's forward pass. At stage 3 all ranks must call it equally often, in the same order."""
        self._is_in_forward = True
        try:
            return self._engine(*inputs)
        finally:
            self._is_in_forward = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's `loss`, which `step` sums over the ranks."""
        self._engine.backward(loss * self.world.size if self.stage == 3 else loss)  # stage 3 takes the mean

    def step(self, update: Callable[[], T]) -> T:
        """Sum the gradients of `parameters` over the ranks, call `update`, and copy `parameters` to the weights.

        `update` clips the gradients and steps, or raises an error and changes nothing. If any rank has an infinite or
        NaN gradient, every rank has a NaN one.
        """
        results: list[T] = []
        errors: list[UserError | RuntimeError] = []

        def attempt() -> None:
            try:
                results.append(update())
            except RanksError:  # DeepSpeed could not reach the other ranks either
                raise
            except (UserError, RuntimeError) as error:  # DeepSpeed must finish its step on all ranks
                errors.append(error)

        self._update = attempt
        try:
            self._engine.step()
            if not results and not errors:  # DeepSpeed skips the update if a gradient is not finite
                if self.stage < 3:  # with offloading, the next gradients would be added to these
                    self._engine.optimizer.averaged_gradients.clear()
                self._set_gradients_nan()
                attempt()
        finally:
            self._update = None
            for piece in self.parameters.values():
                piece.grad = None
        if errors:
            raise errors[0]
        return results[0]

    def discard(self) -> None:
        """Discard the gradients. All ranks call it."""
        self.step(lambda: None)

    def description(self) -> str:
        """What this rank steps and holds, as text."""
        stepped = sum(piece.nbytes for piece in self.parameters.values())
        whole = sum(4 * math.prod(split.shape) for split in self.splits.values())
        text = (
            f"DeepSpeed, ZeRO stage {self.stage}: each of {self.world.size} processes steps {format_size(stepped)} of "
            f"{format_size(whole)} of fp32 weights"
        )
        if self.stage < 3:
            return f"{text}."
        held_bytes = sum(weight.ds_tensor.nbytes for weight in self._engine.module.parameters())
        return f"{text}, and holds {format_size(held_bytes)} of the model."

    def take_gradients(self) -> None:
        """Do nothing: `step` sets the gradients."""

    def update_weights(self) -> None:
        if self._update is None:  # during `step`, DeepSpeed does it afterwards
            _show_masters(self._engine.optimizer, self.stage)

    def _step(self, flat: Tensor) -> None:
        """Run the update in DeepSpeed's call of its optimizer; `flat` has this rank's masters and gradients."""
        assert self._update is not None
        assert flat.grad is not None
        flat_offset = flat.storage_offset()
        for piece in self.parameters.values():
            if piece.numel():
                piece.grad = flat.grad.narrow(0, piece.storage_offset() - flat_offset, piece.numel())
            else:
                piece.grad = torch.empty_like(piece)
        self._update()

    def _set_gradients_nan(self) -> None:
        for piece in self.parameters.values():
            piece.grad = torch.full_like(piece, torch.nan)

    def _check_call(self, *_: object) -> None:
        if torch.is_grad_enabled() and not self._is_in_forward:
            raise RuntimeError("the model is called without DeepSpeed's engine: its gradients would be wrong")


class _ForwardingOptimizer(torch.optim.Optimizer):
    """The optimizer that DeepSpeed gets: it passes the flat shard to a callback."""

    def __init__(self, weights: Any, step_flat: Callable[[Tensor], None]) -> None:
        super().__init__(list(weights), {"lr": 0.0})
        self._step_flat = step_flat

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """Called by DeepSpeed, which has replaced the weights in the parameter group with the flat shard."""
        ((flat,),) = (group["params"] for group in self.param_groups)
        self._step_flat(flat)


class _AllRanks:
    """The process groups of DeepSpeed (`mpu`): all ranks are data-parallel.

    DeepSpeed's own group would have torch's default timeout.
    """

    def __init__(self, world: World) -> None:
        assert world.heartbeats is not None  # there are several ranks
        self._world = world
        timeout = datetime.timedelta(seconds=world.heartbeats.timeout_s)
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
    model: nn.Module,
    weights: list[nn.Parameter],
    optimizer: _ForwardingOptimizer,
    settings: Mapping[str, Any],
    world: World,
) -> Any:
    """Create DeepSpeed's engine, with its prints and logs suppressed: they would mix with the run's output."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    # DeepSpeed uses names that torch 2.13 deprecates; a user cannot change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with quiet_import(), contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Only inference uses this op. It would be compiled on each machine, and only connects ranks of one machine.
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
            optimizer=optimizer,
            mpu=_AllRanks(world),
            config=dict(settings),
        )
    return engine


def _piece(optimizer: Any, stage: int, weight: Any, world: World) -> tuple[int, Tensor]:
    """This rank's part of a weight's fp32 masters: index of its first element in the weight, and a flat view."""
    if stage < 3:
        mapping = weight._hp_mapping
        if mapping is None:
            return 0, torch.empty(0, device=optimizer.single_partition_of_fp32_groups[0].device)
        return mapping.lp_fragment_address.start, mapping.hp_fragment.detach()
    group, offset, count = optimizer.grad_position[optimizer.get_param_id(weight)]
    start = min(world.rank * count, weight.ds_numel)
    count = min(count, weight.ds_numel - start)  # the last shards are padded
    return start, optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, count)


@torch.no_grad()
def _show_masters(optimizer: Any, stage: int) -> None:
    """Set the weights to the values of the masters, as DeepSpeed does at the end of its step."""
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
