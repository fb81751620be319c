"""The model that generates validation images: the trained model, or another one with the same LoRA."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.config.run import RunConfig
from simpletuner.flux2.components import load_base
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import Adapter, wrap
from simpletuner.flux2.source import Source
from simpletuner.memory import offload
from simpletuner.memory.free import release_memory
from simpletuner.train.placement import stream_blocks


@dataclass(frozen=True)
class TrainedModel:
    """The trained model itself."""

    denoise: Denoiser
    name: None = None
    """Name that an image's file records; None for the trained model."""

    @contextlib.contextmanager
    def ready(self) -> Iterator[Denoiser]:
        """A context with the model in eval mode."""
        with evaluating(self.denoise):
            yield self.denoise


@dataclass(frozen=True)
class PreviewModel:
    """Another model with the same shapes and the same LoRA: its layers share the trained tensors. The transformer is
    loaded for each validation, with the precision and offloading of the run, and freed afterwards. Each rank loads all
    of it.
    """

    config: RunConfig
    source: Source
    adapter: Adapter
    device: torch.device
    offloaded: Callable[[], list[Tensor]]
    """Returns the tensors to move from the accelerator to host memory while this model is loaded."""
    notice: Callable[[str], None]

    @property
    def name(self) -> str:
        return self.source.name

    @contextlib.contextmanager
    def ready(self) -> Iterator[Denoiser]:
        """A context with the model in eval mode. On exit, even after an error, the offloaded tensors are back on the
        accelerator.
        """
        with offload.moved_to_host(self.offloaded(), self.device):
            try:
                yield self._loaded()
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # the frames reference the model
                raise
            finally:
                release_memory(self.device)  # free the model before offloaded tensors return

    def _loaded(self) -> Denoiser:
        """Load the transformer, in eval mode. A LoRA layer that is disabled in the trained model is disabled here."""
        transformer = load_base(self.config, self.config, self.source, self.device, report=self.notice)
        transformer.requires_grad_(False)
        for name, layer in self.adapter.layers.items():
            shared = wrap(transformer, name, layer.a, layer.b, adapted_range=layer.adapted_range, scale=layer.scale)
            shared.a, shared.b, shared.is_enabled = layer.a, layer.b, layer.is_enabled
        stream_blocks(transformer, self.config, self.device)
        return Denoiser(transformer.eval(), self.config.reference_attention)


def tensors_unused_by_preview(
    transformer: torch.nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> list[Tensor]:
    """The tensors that a preview model does not use: frozen weights, optimizer state and moving average."""
    trained = {id(weight) for weight in adapter.weights.values()}
    frozen = [each for each in (*transformer.parameters(), *transformer.buffers()) if id(each) not in trained]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*frozen, *states, *average.values()]


SamplingModel = TrainedModel | PreviewModel
"""A model that generates validation images."""


@contextlib.contextmanager
def evaluating(denoise: Denoiser) -> Iterator[None]:
    """A context with the transformer in eval mode; on exit, even after an error, it is in training mode."""
    denoise.transformer.eval()
    try:
        yield
    finally:
        denoise.transformer.train()
