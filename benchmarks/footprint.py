"""What benchmarks read off a process or a device: the most memory that a call holds, the kernels that it runs."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def kernels(names: Iterable[str]) -> int:
    """Count kernels among what ran on a GPU: copies and fills by the driver are none."""
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def profiled(run: Callable[[], object]) -> int:
    """Count the kernels of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return kernels(e.name for e in found.events() or () if e.device_type == torch.autograd.DeviceType.CUDA)


def peak_memory(device: str, run: Callable[[], object]) -> int:
    """Return the most bytes that a call holds: of tensors on a GPU, else what a forked process grows by."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated()) - before
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before = resident("VmRSS")
            run()
            os.write(writer, struct.pack("q", resident("VmHWM") - before))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        content = file.read()
    os.waitpid(child, 0)
    if not content:
        raise RuntimeError("got no word from the process whose memory was to be measured")
    return int(struct.unpack("q", content)[0])


def resident(entry: str) -> int:
    """Return a size that Linux keeps of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(entry))) * 1024
