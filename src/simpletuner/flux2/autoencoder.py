"""Encode images to latents and decode them. Latents are always patchified and normalized by the batch norm."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from simpletuner.flux2 import tokens


class Autoencoder:
    """FLUX.2's autoencoder: wraps diffusers' `AutoencoderKLFlux2`, which runs in its own dtype, on `device`.

    The batch norm's statistics keep the precision of the file and are applied in fp32. In bf16, which diffusers'
    pipeline uses with a bf16 model, they would shift every latent.
    """

    def __init__(self, vae: Any, device: torch.device | str) -> None:
        self._vae = vae.eval()
        self.dtype: torch.dtype = vae.dtype
        self.device = torch.device(device)
        self._mean: Tensor = rearrange(vae.bn.running_mean.float(), "c -> c 1 1").to(device)
        # `vae.bn` itself is not called: in training mode it would overwrite its statistics.
        self._deviation: Tensor = rearrange((vae.bn.running_var.float() + vae.bn.eps).sqrt(), "c -> c 1 1").to(device)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 128 h w"]:
        """Encode `pixels` in [-1, 1], with sides that are multiples of 16, to fp32 latents; h = H/16.

        Returns the mean of the posterior, not a sample, as the reference and all trainers do.
        """
        posterior = self._vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return (tokens.patchify(posterior.mode().float()) - self._mean) / self._deviation

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b 128 h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode latents to fp32 pixels in [-1, 1]; the inverse of `encode`, up to the autoencoder's error."""
        plain = tokens.unpatchify(latents.to(self.device, torch.float32) * self._deviation + self._mean)
        pixels: Tensor = self._vae.decode(plain.to(self.dtype)).sample
        return pixels.float().clamp(-1, 1)
