"""Operations against counts by hand, peaks against published tables, utilisation by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from pathline import Draws, backbones, interpolants, objectives
from pathline.backbones.layers import math_attention
from pathline.core.config import resolve
from pathline.training import Trainer, loop, speed
from pathline.training.log import read_rows
from pathline.training.speed import forward_flops, memory_bytes, peak_flops, row_entries, utilisation


def test_linear_layers_take_two_operations_a_multiply_accumulate():
    network = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2, bias=False))
    assert forward_flops(lambda: network(torch.ones(7, 3))) == 2 * 7 * (3 * 5 + 5 * 2)
    assert forward_flops(lambda: network(torch.ones(2, 11, 3))) == 2 * 2 * 11 * (3 * 5 + 5 * 2)


def test_convolution():
    network = nn.Conv2d(3, 5, 2, stride=2)
    assert forward_flops(lambda: network(torch.ones(7, 3, 4, 6))) == 2 * 7 * (2 * 3) * 5 * (3 * 2 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_counts_alike_in_a_fused_kernel_and_in_plain_products(dtype):
    """Queries on keys and weights on values: 2·N·h·T·M·d operations each."""
    query, key = torch.ones(2, 3, 5, 8, dtype=dtype), torch.ones(2, 3, 7, 8, dtype=dtype)
    by_hand = 2 * (2 * 2 * 3 * 5 * 7 * 8)

    def run():
        return functional.scaled_dot_product_attention(query, key, key)

    assert forward_flops(run) == by_hand
    with math_attention():
        assert forward_flops(run) == by_hand


def sit_by_hand(n, side, patch, channels, width, depth, ratio=4):
    """Operations of a forward pass of SiT, layer by layer."""
    tokens = (side // patch) ** 2
    patches = tokens * width * channels * patch**2
    time = 256 * width + width**2
    block = 6 * width**2 + tokens * (3 + 1 + 2 * ratio) * width**2 + 2 * tokens**2 * width
    head = 2 * width**2 + tokens * width * channels * patch**2
    return 2 * n * (patches + time + depth * block + head)


@pytest.mark.parametrize("n, channels, depth", [(3, 2, 5), (7, 4, 2)])
def test_sit(n, channels, depth):
    sizes = dict(hidden_size=24, num_heads=3, depth=depth, input_size=6, patch_size=2, in_channels=channels)
    network = backbones.build("sit", **sizes, num_classes=11)
    x, t, label = torch.ones(n, channels, 6, 6), torch.full((n,), 0.5), torch.zeros(n, dtype=torch.long)
    assert forward_flops(lambda: network(x, t, label=label)) == sit_by_hand(n, 6, 2, channels, 24, depth)


def test_the_published_size_of_xl():
    """DiT-XL/2 (arXiv:2212.09748): 118.64 Gflops, one a multiply-accumulate, at 256 × 256.

    It has twice the output channels, 256·1152·16 more, and its authors' tool counts norms as well, less than 3e-4.
    """
    doubled_head = 256 * 1152 * 16
    assert sit_by_hand(1, 32, 2, 4, 1152, 28) / 2 + doubled_head == pytest.approx(118.64e9, rel=3e-4)


def test_a_loss_counts_as_its_network_and_leaves_no_gradient():
    network = backbones.build("sit", hidden_size=8, num_heads=2, depth=1, input_size=4, in_channels=1, num_classes=3)
    objective = objectives.build("velocity", interpolant=interpolants.build("linear"))
    data, label = torch.zeros(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)
    counted = forward_flops(lambda: objective(network, data, Draws(0).at(range(5)), label=label))
    assert counted == sit_by_hand(5, 4, 2, 1, 8, 1)
    assert torch.is_grad_enabled() and all(p.grad is None for p in network.parameters())


PUBLISHED = [  # name, then fp32, tf32, fp16, bf16 in 10¹²; those that are printed with sparsity are halved here
    ("Tesla V100-SXM2-32GB", 15.7, None, 125, None),
    ("NVIDIA A100-SXM4-80GB", 19.5, 156, 312, 312),
    ("A100-SXM4-40GB", 19.5, 156, 312, 312),
    ("NVIDIA A100 80GB PCIe", 19.5, 156, 312, 312),
    ("NVIDIA RTX A6000", 38.7, 77.4, 154.8, 154.8),
    ("NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2, 165.2),
    ("NVIDIA L40S", 91.6, 183, 362.05, 362.05),
    ("NVIDIA H100 80GB HBM3", 66.9, 494.7, 989.4, 989.4),
    ("NVIDIA H100 PCIe", 51.2, 378, 756, 756),
    ("NVIDIA H100 NVL", 60, 417.5, 835.5, 835.5),
    ("NVIDIA H200", 67, 494.5, 989.5, 989.5),
    ("NVIDIA GH200 480GB", 67, 494.5, 989.5, 989.5),
    ("NVIDIA B200", 75, 1125, 2250, 2250),
    ("NVIDIA GB200", 80, 1250, 2500, 2500),
]


@pytest.mark.parametrize("name, fp32, tf32, fp16, bf16", PUBLISHED)
def test_published_peaks(name, fp32, tf32, fp16, bf16):
    expected = [fp32, fp32 if tf32 is None else tf32, fp16, bf16]
    asked = [("fp32", False), ("fp32", True), ("fp16", True), ("bf16", False)]
    found = [peak_flops(name, precision, allowed) for precision, allowed in asked]
    assert found == [None if value is None else pytest.approx(value * 1e12, rel=1e-12) for value in expected]


def test_the_table_is_of_dense_products():
    """Tensor cores do TF32 at half of the speed of 16 bits, rounding of the tables aside; sparsity would double it."""
    for name, peak in speed.PEAKS.items():
        if peak.tf32 is not None:
            assert peak.bf16 == peak.fp16 and peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.02), name
            assert peak.tf32 >= peak.fp32 > 0


ELSEWHERE = """
cpu
NVIDIA A100-SXM4-80GB MIG 1g.10gb
NVIDIA A100-SXM-64GB
NVIDIA GeForce RTX 4090 Laptop GPU
NVIDIA H100
NVIDIA A10G
AMD Instinct MI300X
h200
"""


@pytest.mark.parametrize("name", ["", *ELSEWHERE.strip().splitlines()])
def test_off_the_table_there_is_no_guess(name):
    assert peak_flops(name, "bf16", False) is None and peak_flops(name, "fp32", True) is None
    assert utilisation(3e12, 0.5, 2, peak_flops(name, "bf16", False)) is None


def test_utilisation_by_hand():
    """SiT-XL/2: 3 × 237.28e9 operations an image; 256 of them in 0.7 s on three devices of 989.5e12 a second."""
    assert utilisation(256 * 3 * 237.28e9, 0.7, 3, 989.5e12) == pytest.approx(0.0876975, rel=1e-6)
    assert utilisation(6e12, 2.0, 3, 5e12) == pytest.approx(0.2)
    assert utilisation(6e12, 0.0, 3, 5e12) is None


def test_row_entries():
    device = torch.device("cpu")
    known = row_entries(device, 6e12, 2.0, 3, 5e12)
    assert known["model_flops_utilisation"] == pytest.approx(0.2)
    assert known["memory_gib"] * 2**30 == pytest.approx(memory_bytes(device), rel=0.01)
    assert set(row_entries(device, 6e12, 2.0, 3, None)) == {"memory_gib"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_the_peak_of_the_process_in_bytes():
    """Against the kernel's own account, also when memory has been given back."""

    def kernel(entry):
        return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    big = torch.ones(25_000_000)
    held = kernel("VmRSS")
    del big
    assert memory_bytes(torch.device("cpu")) == pytest.approx(kernel("VmHWM"), rel=0.02)
    assert memory_bytes(torch.device("cpu")) >= 0.98 * held > 98e6


def test_memory_of_a_cuda_device_is_what_its_allocator_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {1: 7 * 2**30}[device.index])
    assert memory_bytes(torch.device("cuda", 1)) == 7 * 2**30
    assert row_entries(torch.device("cuda", 1), 1.0, 1.0, 1, None) == {"memory_gib": 7.0}


def test_the_share_of_the_peak_is_in_the_row_where_it_is_known(tmp_path, monkeypatch):
    """On a device of a known peak, of 3 × the forward operations of every image; never for mean-flow."""
    shape = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 1, "num_heads": 3}
    entries = {
        "data": "digits",
        "backbone": {"name": "sit", **shape, "num_classes": 10},
        "objective": "velocity",
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 2, "global_batch": 5, "folder": str(tmp_path / "a"), "accelerator": "cpu"},
    }
    monkeypatch.setattr(loop, "peak_flops", lambda *_: 1e9)
    trainer = Trainer(resolve(entries))
    trainer.run()
    (row,) = read_rows(tmp_path / "a")
    batch = trainer.parts.dataset.batch([0])
    network, x, t = trainer.state.network, batch["data"], torch.tensor([0.5])
    forward = forward_flops(lambda: network(x, t, label=batch["label"]))
    assert row["model_flops_utilisation"] == pytest.approx(3 * forward * row["images_per_second"] / 1e9, rel=1e-9)
    entries["backbone"]["takes_gap"], entries["objective"] = True, "mean-flow"
    entries["train"]["folder"] = str(tmp_path / "b")
    Trainer(resolve(entries)).run()
    assert "model_flops_utilisation" not in read_rows(tmp_path / "b")[0]
