"""Which errors say that memory ran out, and of which place."""

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
"""First lines of a RuntimeError where the runtime, the driver or a library failed to allocate. Torch's allocator has an
error of its own. The runtime says the same where pinned host memory ran out. Others, such as
CUBLAS_STATUS_NOT_INITIALIZED, may come of full memory and may not."""

HOST_FAILURES = (
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory (12)",  # a file that cannot be mapped
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)


def exhausted_memory(error: BaseException) -> Literal["accelerator", "ram"] | None:
    """The place of which `error` says that it is full; None if it says something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "accelerator"
    if isinstance(error, MemoryError):
        return "ram"
    # Subclasses say something else, whatever they quote: a NotImplementedError is not about memory.
    if type(error) in (RuntimeError, torch.AcceleratorError):
        told = first_line(error)
        if any(text in told for text in DEVICE_FAILURES):
            return "accelerator"
        if any(text in told for text in HOST_FAILURES):
            return "ram"
    return None


def first_line(error: BaseException) -> str:
    """The first line of what `error` says. A MemoryError often says nothing: then that memory ran out."""
    return next(iter(str(error).splitlines()), "out of memory")
