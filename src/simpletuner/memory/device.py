"""The device that a command computes on, and how exactly it computes there."""

import torch

from simpletuner.memory.cpu_products import multiply_bf16_in_fp32


def choose_device() -> torch.device:
    """The GPU if there is one, with TF32 forbidden; else the CPU. Products of bf16 on the CPU are fast from here on."""
    forbid_tf32()
    multiply_bf16_in_fp32()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forbid_tf32() -> None:
    """Make CUDA compute products and convolutions of fp32 numbers in fp32, for this process.

    TF32 keeps 10 bits of each factor's mantissa, not 23. torch allows it to cuDNN's convolutions, and to products where
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1, as NVIDIA's containers set it; after this call neither has it.
    """
    # The flags that torch 2.11 has as well. Both kinds together, or the newer ones alone; a mixture cannot be read.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
