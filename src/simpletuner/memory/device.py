"""Choose the device that a command computes on, and its precision."""

import torch

from simpletuner.memory.cpu_products import multiply_bf16_in_fp32


def choose_device() -> torch.device:
    """The GPU if there is one, otherwise the CPU. Disables TF32, and makes bf16 products on the CPU fast."""
    forbid_tf32()
    multiply_bf16_in_fp32()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forbid_tf32() -> None:
    """Make CUDA compute fp32 products and convolutions in fp32, in this process.

    TF32 keeps 10 of the 23 mantissa bits of each factor. By default torch allows it for cuDNN's convolutions; NVIDIA's
    containers allow it for products too, with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1. This call disables both.
    """
    # torch 2.11 has these flags too. Do not mix them with the newer ones: torch raises when it reads a mixture.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
