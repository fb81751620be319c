"""How many processes train together, where they run, and what they share."""

from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import BeforeValidator, ValidationError

from simpletuner.config.deepspeed import ZeroSettings
from simpletuner.config.options.kinds import Count, IsJson, Says, Slice, Text, Whole

ZERO_STAGES = ("zero1", "zero2", "zero3")
"""Names of DeepSpeed's stages: what each process holds only its share of. 1 is optimizer state, 2 gradients too, 3
weights too.
"""


def _settings(value: Any) -> Any:
    """DeepSpeed's settings, for the name of a stage too, without those that are left open ("auto") or turned off."""
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
    """Processes that train together, on all machines, one on each GPU. The effective batch is train_batch_size ×
    gradient_accumulation_steps × num_processes. By default one on each machine; with `fsdp_enable` or
    `deepspeed_config`, one on each GPU that is visible; under torchrun, as many as it started.
    [many-gpus.md](many-gpus.md) explains it."""

    num_machines: Count = 1
    """Machines that train together, each with the same number of processes. The same command starts the run on each,
    with another `machine_rank`; under torchrun and srun it is their number. [many-machines.md](many-machines.md)
    explains it."""

    machine_rank: Whole = 0
    """Number of this machine, from 0. Machine 0 writes the run."""

    main_process_ip: Text = "127.0.0.1"
    """Address of machine 0, on which it listens where `num_machines` is more than 1. The network must be trusted."""

    main_process_port: Annotated[int, Ge(1), Le(65535)] = 29500
    """Port of machine 0 on which the machines find each other."""

    distributed_timeout_s: Annotated[int, Ge(5)] = 600
    """Seconds after which a process that waits for another gives up, and names it."""

    fsdp_enable: bool = False
    """Shard the base model over the processes (FSDP2): each holds its share, and one block at a time as a whole."""

    fsdp_reshard_after_forward: bool = True
    """Free each whole block after its forward pass, and gather it again for the backward pass. `false` is faster and
    holds the whole model during a step."""

    fsdp_cpu_offload: bool = False
    """Keep each process's share of the base model in host memory; it comes to the GPU block by block."""

    deepspeed_config: (
        Annotated[
            dict[str, Any],
            IsJson(),
            BeforeValidator(_settings),
            Says(f"{', '.join(ZERO_STAGES)}, or DeepSpeed's settings as an object or a JSON file", near=ZERO_STAGES),
        ]
        | None
    ) = None
    """Train with DeepSpeed (ZeRO): each process holds its share of the optimizer state (`zero1`), of the gradients too
    (`zero2`), of the weights too (`zero3`). An object or a JSON file has DeepSpeed's own settings."""

    @property
    def may_shard(self) -> bool:
        """Whether the base model is sharded by FSDP2, as far as is known before the processes are counted."""
        return self.fsdp_enable and self.num_processes != 1

    @property
    def ranks(self) -> int:
        """Processes that train together, where `num_processes` is settled."""
        return self.num_processes or self.num_machines

    @property
    def ranks_per_machine(self) -> int:
        """Those of them on each machine."""
        return self.ranks // self.num_machines

    @property
    def zero_optimization(self) -> dict[str, Any]:
        """What DeepSpeed is given under this name: its `stage`, 1 to 3, and what is set beside it. Empty without
        DeepSpeed, which stage 0 asks for too, and where a value is wrong.
        """
        try:
            zero = ZeroSettings.model_validate((self.deepspeed_config or {}).get("zero_optimization", {}))
        except ValidationError:  # `deepspeed_findings` says what is wrong
            return {}
        return zero.model_dump(exclude_unset=True) if zero.stage else {}

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage; 0 without DeepSpeed, and where one process trains."""
        return 0 if self.num_processes == 1 else int(self.zero_optimization.get("stage", 0))

    @property
    def takes_every_gpu(self) -> bool:
        """Whether the default is a process for each visible GPU, and not one."""
        return self.fsdp_enable or self.zero_stage > 0

    def offloads(self, what: str) -> bool:
        """Whether DeepSpeed keeps "offload_optimizer" or "offload_param" in host memory."""
        return bool(self.zero_optimization.get(what, {}).get("device", "none") != "none")
