"""Pictures to latents and back. What leaves here is always patchified and batch-norm-normalized."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from simpletuner.flux2 import tokens


class Autoencoder:
    """FLUX.2's autoencoder around diffusers' `AutoencoderKLFlux2`, which runs in its own type, on `device`.

    The statistics of the batch norm are taken as they are in the file and applied in fp32: in bf16, as diffusers'
    pipeline has it with a bf16 model, they would move every latent.
    """

    def __init__(self, vae: Any, device: torch.device | str) -> None:
        self._vae = vae.eval()
        self.dtype: torch.dtype = vae.dtype
        self.device = torch.device(device)
        self._mean: Tensor = rearrange(vae.bn.running_mean.float(), "c -> c 1 1").to(device)
        # Not `vae.bn` itself: run in training mode it would overwrite what it normalizes by.
        self._deviation: Tensor = rearrange((vae.bn.running_var.float() + vae.bn.eps).sqrt(), "c -> c 1 1").to(device)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 128 h w"]:
        """Latents, fp32, of `pixels` in [-1, 1] with sides that are multiples of 16; h = H/16.

        The mean of the posterior, never a sample: so do the reference and every trainer.
        """
        posterior = self._vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return (tokens.patchify(posterior.mode().float()) - self._mean) / self._deviation

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b 128 h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pixels, fp32, in [-1, 1]; the inverse of `encode`, as far as the autoencoder goes."""
        plain = tokens.unpatchify(latents.to(self.device, torch.float32) * self._deviation + self._mean)
        pixels: Tensor = self._vae.decode(plain.to(self.dtype)).sample
        return pixels.float().clamp(-1, 1)
