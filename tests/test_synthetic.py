"""Made-up samples: their law, and that sample i is a function of (seed, i) alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pathline import Draws, InputError, data


def test_values_and_labels_have_the_law_they_say():
    dataset = data.build("synthetic", shape=[2, 3, 5], num_classes=7, count=3000)
    batch = dataset.batch(range(3000))
    assert batch["data"].shape == (3000, 2, 3, 5) and batch["data"].dtype == torch.float32
    said = json.loads(json.dumps(dataset.statistics))
    assert torch.allclose(batch["data"].mean((0, 2, 3)), torch.tensor(said["mean"]), atol=4 / 45000**0.5)
    assert torch.allclose(batch["data"].std((0, 2, 3)), torch.tensor(said["std"]), atol=4 / 90000**0.5)
    assert said["range"][0] < float(batch["data"].min()) and float(batch["data"].max()) < said["range"][1]
    counts = np.bincount(batch["label"], minlength=7)
    assert len(counts) == 7 and ((counts - 3000 / 7) ** 2 / (3000 / 7)).sum() < 22.5  # p = 0.001
    manifest = json.loads(json.dumps(dataset.manifest))
    assert (manifest["shape"], manifest["count"], manifest["num_classes"]) == ([2, 3, 5], 3000, 7)


def test_a_sample_depends_on_seed_and_index_alone():
    dataset = data.build("synthetic", shape=(2, 3, 5), num_classes=7, seed=3)
    batch = dataset.batch([5, 0, 1023, 5])
    assert batch["index"].tolist() == [5, 0, 1023, 5] and batch["label"].dtype == torch.int64
    assert torch.equal(batch["data"], Draws(3).normal("synthetic data", [5, 0, 1023, 5], (2, 3, 5)))
    for row, index in enumerate((5, 0, 1023)):
        alone = data.build("synthetic", shape=(2, 3, 5), num_classes=7, seed=3, count=2000).batch([index])
        assert torch.equal(alone["data"][0], batch["data"][row]) and alone["label"][0] == batch["label"][row]
    assert not torch.equal(data.build("synthetic", shape=(2, 3, 5), seed=4).batch([5])["data"][0], batch["data"][0])
    assert data.build("synthetic", num_classes=0).batch([1, 2])["label"].tolist() == [0, 0]
    assert len({label for label in batch["label"].tolist()}) > 1


@pytest.mark.parametrize("options", [dict(shape=(3, 5)), dict(shape=(0, 3, 5)), dict(count=0), dict(num_classes=-1)])
def test_sizes_that_are_none(options):
    with pytest.raises(InputError, match="expected three sizes"):
        data.build("synthetic", **options)
    with pytest.raises(InputError, match="expected \\(N,\\) numbers from 0 to 2"):
        data.build("synthetic", count=3).batch([3])
