"""The model that draws validation images: the one that is trained, or another with the same LoRA."""

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
    """The model that is trained."""

    denoise: Denoiser
    name: None = None
    """Which an image records of another model."""

    @contextlib.contextmanager
    def ready(self) -> Iterator[Denoiser]:
        """A block in which the model draws."""
        with evaluating(self.denoise):
            yield self.denoise


@dataclass(frozen=True)
class PreviewModel:
    """A model of the same shapes with the same LoRA: its layers share the trained tensors. The transformer is loaded
    anew for each set of images, in the precision and with the offloading of the run, and let go after. Each rank loads
    its own, whole.
    """

    config: RunConfig
    source: Source
    adapter: Adapter
    device: torch.device
    waiting: Callable[[], list[Tensor]]
    """What waits in host memory meanwhile, where it lies on the accelerator."""
    notice: Callable[[str], None]

    @property
    def name(self) -> str:
        return self.source.name

    @contextlib.contextmanager
    def ready(self) -> Iterator[Denoiser]:
        """A block in which the model draws. Afterwards all that trains is as it was, also after an error."""
        with offload.set_aside(self.waiting(), self.device):
            try:
                yield self._loaded()
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold the model
                raise
            finally:
                release_memory(self.device)  # so that there is room for what comes back

    def _loaded(self) -> Denoiser:
        """The transformer in eval mode. A LoRA layer that is off in the trained model is off here."""
        transformer = load_base(self.config, self.config, self.source, self.device, report=self.notice)
        transformer.requires_grad_(False)
        for name, layer in self.adapter.layers.items():
            shared = wrap(transformer, name, layer.a, layer.b, place=layer.place, scale=layer.scale)
            shared.a, shared.b, shared.is_enabled = layer.a, layer.b, layer.is_enabled
        stream_blocks(transformer, self.config, self.device)
        return Denoiser(transformer.eval(), self.config.reference_attention)


def base_tensors(
    transformer: torch.nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> list[Tensor]:
    """The frozen weights, the optimizer's state and the moving average."""
    trained = {id(weight) for weight in adapter.weights.values()}
    frozen = [each for each in (*transformer.parameters(), *transformer.buffers()) if id(each) not in trained]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*frozen, *states, *average.values()]


DrawingModel = TrainedModel | PreviewModel
"""What the validation images are drawn with."""


@contextlib.contextmanager
def evaluating(denoise: Denoiser) -> Iterator[None]:
    """Inside, the transformer is in eval mode; afterwards in training mode, also after an error."""
    denoise.transformer.eval()
    try:
        yield
    finally:
        denoise.transformer.train()
