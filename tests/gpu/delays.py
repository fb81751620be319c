"""Random pauses between the kernels and copies of a GPU, where too early or too late a start changes results."""

import random

import pytest
import torch
from torch import Tensor, nn

from simpletuner.flux2.lora import LoraLinear
from simpletuner.memory.offload import Streaming
from simpletuner.memory.recompute import HostInputs

MOST_CYCLES = 400_000
"""0.2 ms at 1.8 GHz: as long as some twenty kernels of a small model take."""


class Delays:
    """Pauses of random lengths on the copy streams and the compute stream.

    Before a copy: whoever does not wait for it computes with what was there before. After a copy, or before a kernel:
    whoever overwrites memory without waiting for its readers is early. Calls of the host are not delayed, so it runs
    ahead of the device as far as the program lets it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device, seed: int = 0) -> None:
        self.count = 0
        """Pauses so far."""
        self._device = device
        self._random = random.Random(seed)
        fill, put, fetch = Streaming._fill, HostInputs._put, HostInputs._fetch

        def filled(streaming: Streaming, *arguments: object) -> None:
            self.pause()
            fill(streaming, *arguments)  # type: ignore[arg-type]
            self.pause()

        def stored(inputs: HostInputs, *arguments: object) -> object:
            self.pause(inputs._copy_stream)
            kept = put(inputs, *arguments)  # type: ignore[arg-type]
            self.pause(inputs._copy_stream)
            return kept

        def fetched(inputs: HostInputs, *arguments: object) -> None:
            self.pause(inputs._copy_stream)
            fetch(inputs, *arguments)  # type: ignore[arg-type]
            self.pause(inputs._copy_stream)

        monkeypatch.setattr(Streaming, "_fill", filled)
        monkeypatch.setattr(HostInputs, "_put", stored)
        monkeypatch.setattr(HostInputs, "_fetch", fetched)

    def pause(self, stream: torch.cuda.Stream | None = None) -> None:
        """Let `stream`, by default the current one, wait for a random time, or, half of the times, not at all."""
        self.count += 1
        cycles = int(self._random.uniform(-MOST_CYCLES, MOST_CYCLES))
        if cycles > 0 and self._device.type == "cuda":
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)

    def between_kernels(self, model: nn.Module) -> None:
        """Pause the compute stream before each adapted Linear, and before its gradient."""

        def before_gradient(_: Tensor) -> None:
            self.pause()

        def before(_module: nn.Module, _inputs: object) -> None:
            self.pause()

        def after(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(before_gradient)

        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)


def ignore_all_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no stream wait for an event: what a race does, and what finds it."""
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda _stream, _event: None)
