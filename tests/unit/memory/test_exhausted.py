"""Which errors say that memory ran out, and of which place."""

import pytest
import torch

from simpletuner.memory.exhausted import exhausted_memory, first_line

LINES = [
    (MemoryError(), "ram"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "accelerator"),
    (torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)"), "accelerator"),
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "accelerator"),
    (RuntimeError("CUDA error: out of memory, as torch 2.7 says it"), "accelerator"),
    (RuntimeError("CUDA driver error: out of memory"), "accelerator"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "accelerator"),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ltHandle, ...)`"),
        "accelerator",
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "accelerator"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "accelerator"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), "ram"),
    (
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        "accelerator",
    ),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "accelerator"),
    (RuntimeError("unable to mmap 14164848 bytes from file <a.safetensors>: Cannot allocate memory (12)"), "ram"),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, ...)`"), None),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), None),
    (RuntimeError("CUDA driver error: device not ready"), None),
    (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error\nCuda failure 2 'out of memory'"), None),
    (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"), None),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None),
    (RuntimeError(), None),
    (NotImplementedError("not for this shape"), None),
    (NotImplementedError("CUDA error: out of memory is not handled here"), None),
    (RecursionError("CUDA driver error: out of memory, quoted"), None),
    (ValueError("CUDA error: out of memory"), None),
    (OSError(28, "No space left on device"), None),
]


@pytest.mark.parametrize(("error", "place"), LINES, ids=lambda each: str(each)[:60])
def test_only_failed_allocations_are_out_of_memory(error: Exception, place: str | None) -> None:
    assert exhausted_memory(error) == place


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: bytearray(2**60)], ids=["tensor", "bytes"])
def test_failed_allocations_of_this_machine_are_of_its_ram(allocate) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert exhausted_memory(caught.value) == "ram"


def test_an_error_without_a_text_has_a_first_line() -> None:
    assert first_line(MemoryError()) == "out of memory"
    assert first_line(RuntimeError("one\ntwo")) == "one"
