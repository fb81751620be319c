"""Tell which errors mean that memory ran out, and whether it was the accelerator's or RAM."""

from typing import Literal

import torch

DEVICE_FAILURES = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""Texts in the first line of a RuntimeError that mean that the runtime, the driver or a library failed to allocate.

Torch's allocator raises its own class instead. The runtime's error is the same if pinned host memory ran out. Errors
such as CUBLAS_STATUS_NOT_INITIALIZED are not listed: they may have other causes than full memory."""

HOST_FAILURES = (
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory (12)",  # a file that cannot be mapped
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)


def exhausted_memory(error: BaseException) -> Literal["accelerator", "ram"] | None:
    """The memory that `error` says is full; None if it says something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "accelerator"
    if isinstance(error, MemoryError):
        return "ram"
    # Not subclasses such as NotImplementedError: they are not about memory, even if they quote such a text.
    if type(error) in (RuntimeError, torch.AcceleratorError):
        message = first_line(error)
        if any(text in message for text in DEVICE_FAILURES):
            return "accelerator"
        if any(text in message for text in HOST_FAILURES):
            return "ram"
    return None


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`. Without a message, as often in a MemoryError, "out of memory"."""
    return next(iter(str(error).splitlines()), "out of memory")
