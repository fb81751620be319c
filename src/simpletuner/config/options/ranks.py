"""How many processes train together, and what they share."""

from typing import Annotated

from annotated_types import Ge

from simpletuner.config.options.kinds import Count, Slice


class RankOptions(Slice):
    """Several GPUs."""

    num_processes: Count | None = None
    """Processes that train together, one on each GPU. The effective batch is train_batch_size ×
    gradient_accumulation_steps × num_processes. By default one; with `fsdp_enable`, one on each GPU that is visible;
    under torchrun, as many as it started. [many-gpus.md](many-gpus.md) explains it."""

    distributed_timeout_s: Annotated[int, Ge(5)] = 600
    """Seconds after which a process that waits for another gives up, and names it."""

    fsdp_enable: bool = False
    """Shard the base model over the processes (FSDP2): each holds its share, and one block at a time as a whole."""

    fsdp_reshard_after_forward: bool = True
    """Free each whole block after its forward pass, and gather it again for the backward pass. `false` is faster and
    holds the whole model during a step."""

    fsdp_cpu_offload: bool = False
    """Keep each process's share of the base model in host memory; it comes to the GPU block by block."""

    @property
    def may_shard(self) -> bool:
        """Whether the base model is sharded, as far as is known before the processes are counted."""
        return self.fsdp_enable and self.num_processes != 1

    @property
    def ranks(self) -> int:
        """Processes that train together, where `num_processes` is settled."""
        return self.num_processes or 1
