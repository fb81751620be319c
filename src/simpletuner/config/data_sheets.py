"""Accelerators' peak FLOP/s from their data sheets, by the name that the driver reports. Plain data."""

from collections.abc import Mapping

DENSE_BF16_FLOP_PER_S: Mapping[str, float] = {
    # Ampere. A100, A30, A40 and A10: data sheets, figure without sparsity. RTX A6000: GA102 whitepaper, table 3.
    # RTX 3090, and the 4090 and 5090 below: RTX Blackwell whitepaper, table 3.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71.2e12,
    # Ada. L4, L40 and L40S: data sheets, figure without sparsity. RTX 6000: RTX PRO Blackwell whitepaper, table 4.
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA RTX 6000 Ada Generation": 364e12,
    # Hopper. Half of the data sheets' figures with sparsity: 1,979 (SXM), 1,671 (NVL), 1,513 (PCIe).
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.5e12,
    # Blackwell. B200: half of an eighth of HGX B200's 36 PFLOP/s with sparsity. RTX PRO 6000: RTX PRO Blackwell
    # whitepaper, table 4; no dense figure is published for the Server Edition.
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
}
"""Dense bf16 tensor-core FLOP/s with fp32 accumulation, without sparsity. Names must match whole: a MIG slice, a laptop
GPU and an export version have other rates."""
