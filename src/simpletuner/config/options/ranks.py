"""Options for several GPUs: how many processes train together, where they run, and how they shard the model."""

from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import BeforeValidator, ValidationError

from simpletuner.config.deepspeed import ZeroSettings
from simpletuner.config.options.kinds import Count, Expects, IsJson, Slice, Text, Whole

ZERO_STAGES = ("zero1", "zero2", "zero3")
"""Names of DeepSpeed's ZeRO stages: 1 shards the optimizer state over the processes, 2 also the gradients, 3 also the
weights.
"""


def _settings(value: Any) -> Any:
    """Convert a stage's name to DeepSpeed's settings; drop settings that are "auto", null or turned off."""
    if value in ZERO_STAGES:
        return {"zero_optimization": {"stage": int(value[-1])}}
    if not isinstance(value, dict):
        return value
    if value.get("enabled") is False:
        return {"enabled": False}
    return {key: _settings(inner) for key, inner in value.items() if inner not in (None, "auto")}


class RankOptions(Slice):
    """Several GPUs."""

    num_processes: Count | None = None
    """Number of processes that train together, on all machines, one per GPU. The effective batch is train_batch_size
    × gradient_accumulation_steps × num_processes. By default one per machine; with `fsdp_enable` or `deepspeed_config`,
    one per visible GPU; under torchrun, as many as it started. See [many-gpus.md](many-gpus.md)."""

    num_machines: Count = 1
    """Number of machines that train together, each with the same number of processes. Start the run on each machine
    with the same command and its own `machine_rank`; torchrun and srun set this number. See
    [many-machines.md](many-machines.md)."""

    machine_rank: Whole = 0
    """Rank of this machine, from 0. Machine 0 writes the run directory."""

    main_process_ip: Text = "127.0.0.1"
    """Address on which machine 0 listens if `num_machines` is more than 1. Use it only in a trusted network."""

    main_process_port: Annotated[int, Ge(1), Le(65535)] = 29500
    """Port on which machine 0 accepts the connections of the other machines."""

    distributed_timeout_s: Annotated[int, Ge(5)] = 600
    """Timeout in seconds: a process that waits longer for another one fails and names it."""

    fsdp_enable: bool = False
    """Shard the base model over the processes (FSDP2). Each process holds its shard and gathers one whole block at a
    time."""

    fsdp_reshard_after_forward: bool = True
    """Free each gathered block after its forward pass and gather it again for the backward pass. `false` is faster but
    holds the whole model during a step."""

    fsdp_cpu_offload: bool = False
    """Keep each process's shard of the base model in host memory and copy it to the GPU block by block."""

    deepspeed_config: (
        Annotated[
            dict[str, Any],
            IsJson(),
            BeforeValidator(_settings),
            Expects(f"{', '.join(ZERO_STAGES)}, or DeepSpeed's settings as an object or a JSON file", near=ZERO_STAGES),
        ]
        | None
    ) = None
    """Train with DeepSpeed (ZeRO), which shards the optimizer state over the processes (`zero1`), also the gradients
    (`zero2`), also the weights (`zero3`). An object or a JSON file gives DeepSpeed's own settings."""

    @property
    def may_shard(self) -> bool:
        """Whether FSDP2 shards the base model; True too while `num_processes` is not settled."""
        return self.fsdp_enable and self.num_processes != 1

    @property
    def ranks(self) -> int:
        """Number of processes that train together, once `num_processes` is settled."""
        return self.num_processes or self.num_machines

    @property
    def ranks_per_machine(self) -> int:
        """Number of processes on each machine."""
        return self.ranks // self.num_machines

    @property
    def zero_optimization(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`: its `stage`, 1 to 3, and the other values that are set. Empty without
        DeepSpeed, at stage 0, and if a value is invalid.
        """
        try:
            zero = ZeroSettings.model_validate((self.deepspeed_config or {}).get("zero_optimization", {}))
        except ValidationError:  # `deepspeed_findings` reports the error
            return {}
        return zero.model_dump(exclude_unset=True) if zero.stage else {}

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage; 0 without DeepSpeed or with a single process."""
        return 0 if self.num_processes == 1 else int(self.zero_optimization.get("stage", 0))

    @property
    def takes_every_gpu(self) -> bool:
        """Whether `num_processes` defaults to one process per visible GPU instead of one."""
        return self.fsdp_enable or self.zero_stage > 0

    def offloads(self, key: str) -> bool:
        """Whether DeepSpeed keeps the state that `key` ("offload_optimizer", "offload_param") names in host memory."""
        return bool(self.zero_optimization.get(key, {}).get("device", "none") != "none")
