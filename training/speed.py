"""How fast a run is: floating-point operations of a step, a device's published peak, and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["forward_flops", "memory_bytes", "peak_flops", "row_entries", "utilisation"]

GIB = 2**30
TERA = 1e12


class Peak(NamedTuple):
    """A device's dense peaks in 10¹² operations a second; None for what it does not compute in.

    Those of products that are summed in float32, as torch sums them; never those with sparsity.
    """

    fp32: float
    tf32: float | None
    fp16: float | None
    bf16: float | None


# by the name that CUDA gives, without its first word; whole names alone, as a slice or a mobile part is slower
_V100 = Peak(15.7, None, 125, None)  # NVIDIA V100 datasheet, 2020: SXM2
_V100_PCIE = Peak(14, None, 112, None)  # the same: PCIe
_A100 = Peak(19.5, 156, 312, 312)  # NVIDIA A100 datasheet, 2021: PCIe and SXM alike
_GH200 = Peak(67, 989 / 2, 1979 / 2, 1979 / 2)  # NVIDIA GH200 datasheet, 2024: half of the figures with sparsity
PEAKS: dict[str, Peak] = {
    "T4": Peak(8.1, None, 65, None),  # NVIDIA T4 datasheet, 2019
    "V100-SXM2-16GB": _V100,
    "V100-SXM2-32GB": _V100,
    "V100-PCIE-16GB": _V100_PCIE,
    "V100-PCIE-32GB": _V100_PCIE,
    "V100S-PCIE-32GB": Peak(16.4, None, 130, None),  # NVIDIA V100 datasheet, 2020
    "A10": Peak(31.2, 62.5, 125, 125),  # NVIDIA A10 datasheet, 2021
    "A30": Peak(10.3, 82, 165, 165),  # NVIDIA A30 datasheet, 2021
    "A40": Peak(37.4, 74.8, 149.7, 149.7),  # NVIDIA A40 datasheet, 2021
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "RTX A6000": Peak(38.7, 77.4, 154.8, 154.8),  # NVIDIA GA102 whitepaper v2, 2021
    "GeForce RTX 3090": Peak(35.6, 35.6, 71, 71),  # NVIDIA GA102 whitepaper v2, 2021
    "GeForce RTX 4090": Peak(82.6, 82.6, 165.2, 165.2),  # NVIDIA Ada whitepaper v2.1, 2023
    "GeForce RTX 5090": Peak(104.8, 104.8, 209.5, 209.5),  # NVIDIA RTX Blackwell whitepaper v1.1, 2025
    "RTX 6000 Ada Generation": Peak(91.1, 182.1, 364.2, 364.2),  # NVIDIA Ada professional whitepaper, 2022
    "L4": Peak(30.3, 120 / 2, 242 / 2, 242 / 2),  # NVIDIA L4 datasheet, 2023: half of those with sparsity
    "L40": Peak(90.5, 90.5, 181.05, 181.05),  # NVIDIA L40 datasheet, 2023
    "L40S": Peak(91.6, 183, 362.05, 362.05),  # NVIDIA L40S datasheet, 2023
    "H100 80GB HBM3": Peak(66.9, 494.7, 989.4, 989.4),  # NVIDIA H100 whitepaper v1.04, 2023: SXM5
    "H100 PCIe": Peak(51.2, 378, 756, 756),  # NVIDIA H100 whitepaper v1.04, 2023
    "H100 NVL": Peak(60, 835 / 2, 1671 / 2, 1671 / 2),  # NVIDIA H100 datasheet, 2024: half of those with sparsity
    "H200": Peak(67, 989 / 2, 1979 / 2, 1979 / 2),  # NVIDIA H200 datasheet, 2024: SXM; half of those with sparsity
    "H200 NVL": Peak(60, 835 / 2, 1671 / 2, 1671 / 2),  # the same: NVL
    "GH200 96GB HBM3": _GH200,
    "GH200 120GB": _GH200,
    "GH200 480GB": _GH200,
    "GH200 144G HBM3e": _GH200,
    "B200": Peak(600 / 8, 18e3 / 16, 36e3 / 16, 36e3 / 16),  # NVIDIA HGX B200, 2025: eight GPUs, with sparsity
    "GB200": Peak(160 / 2, 5e3 / 4, 10e3 / 4, 10e3 / 4),  # NVIDIA GB200 NVL72, 2025: superchip of two, with sparsity
}


def forward_flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of a call: two for each multiply-accumulate of a matrix product.

    Products, convolutions and attention count, whole also where it is masked; what goes element by element does not.

    Args:
        run: called once, without gradients; eager, for what is compiled cannot be counted.

    Returns:
        The count. A training step is three times that of its forward pass (arXiv:2204.02311, appendix B), whatever
        is computed a second time.
    """
    # torch counts no attention of its kernel for the CPU
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch's own


def peak_flops(device_name: str, precision: Literal["fp32", "bf16", "fp16"], tf32: bool) -> float | None:
    """Return a device's published dense peak in operations a second, or None where the table has none.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` gives it.
        precision: in which products are computed.
        tf32: whether those of float32 matrices run in TF32, on devices that have it.
    """
    peak = PEAKS.get(device_name.removeprefix("NVIDIA ").removeprefix("Tesla "))
    if peak is None:
        return None
    value: float | None = getattr(peak, precision)
    if precision == "fp32" and tf32 and peak.tf32 is not None:
        value = peak.tf32
    return None if value is None else value * TERA


def utilisation(flops_per_step: float, seconds_per_step: float, devices: int, peak: float | None) -> float | None:
    """Return the model FLOPs utilisation (arXiv:2204.02311), a fraction of 1, or None without a peak or a time.

    Args:
        flops_per_step: of the model over all devices: three times those of the forward pass.
        seconds_per_step: time of a step.
        devices: number of devices.
        peak: of one device, in operations a second.
    """
    if peak is None or seconds_per_step <= 0:
        return None
    return flops_per_step / (seconds_per_step * devices * peak)


def memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: tensors' on a CUDA device, on any other the whole process's on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def row_entries(
    device: torch.device, flops_per_step: float, seconds_per_step: float, devices: int, peak: float | None
) -> dict[str, float]:
    """Return a log row's ``memory_gib`` and, where the peak is known, ``model_flops_utilisation``."""
    entries = {"memory_gib": memory_bytes(device) / GIB}
    fraction = utilisation(flops_per_step, seconds_per_step, devices, peak)
    return entries if fraction is None else {**entries, "model_flops_utilisation": fraction}
