from __future__ import annotations

import hashlib
import json
from itertools import islice

import numpy as np
import pytest
import torch

from pathline import InputError, InputTypeError, UnknownNameError, data


@pytest.mark.parametrize("name", ["digits"])  # those that need options have tests of their own
class TestContract:
    def test_batches_by_index(self, name):
        dataset = data.build(name)
        indices = [3, 0, len(dataset) - 1, 3]
        for given in (indices, np.array(indices), torch.tensor(indices)):
            batch = dataset.batch(given)
            assert batch["data"].shape == (4, *dataset.shape) and batch["data"].dtype == torch.float32
            assert batch["label"].dtype == torch.int64 and batch["index"].tolist() == indices
        assert torch.equal(batch["data"][0], batch["data"][3])
        assert bool((batch["data"].abs() <= 1).all())
        assert bool(((batch["label"] >= 0) & (batch["label"] < dataset.num_classes)).all())
        assert dataset.batch(range(2, 5))["index"].tolist() == [2, 3, 4]

    def test_a_batch_is_the_callers_own(self, name):
        dataset = data.build(name)
        dataset.batch([1])["data"].fill_(9)
        assert bool((dataset.batch([1])["data"] <= 1).all())

    def test_every_epoch_is_a_permutation_of_its_own(self, name):
        dataset = data.build(name)
        count = len(dataset)
        epochs = [dataset.indices_at(range(i * count, (i + 1) * count), seed=3) for i in range(3)]
        for epoch in epochs:
            assert np.array_equal(np.sort(epoch), np.arange(count))
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
        assert not np.array_equal(epochs[0], dataset.indices_at(range(count), seed=4))

    def test_the_index_at_a_position_depends_on_seed_and_position_alone(self, name):
        dataset = data.build(name)
        whole = dataset.indices_at(range(0, 3 * len(dataset)), seed=5)
        for start, length in ((0, 7), (len(dataset) - 3, 8), (len(dataset) - 1, len(dataset) + 5), (11, 0)):
            part = data.build(name).indices_at(range(start, start + length), seed=5)
            assert np.array_equal(part, whole[start : start + length])

    def test_batches_follow_the_positions(self, name):
        dataset = data.build(name)
        batches = list(dataset.batches(31, steps=40, seed=2))
        indices = torch.cat([batch["index"] for batch in batches])
        assert np.array_equal(indices.numpy(), dataset.indices_at(range(31 * 40), seed=2))
        late = next(iter(dataset.batches(31, steps=1, seed=2, start=17)))
        assert torch.equal(late["index"], batches[17]["index"]) and torch.equal(late["data"], batches[17]["data"])
        assert list(islice(dataset.batches(31, steps=0, seed=2), 1)) == []

    def test_statistics_and_manifest_are_fit_for_json_and_true(self, name):
        dataset = data.build(name)
        images = dataset.batch(range(len(dataset)))["data"].double()
        statistics = json.loads(json.dumps(dataset.statistics))
        assert statistics["mean"] == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-6)
        assert statistics["std"] == pytest.approx(images.std((0, 2, 3)).tolist(), abs=1e-6)
        assert statistics["range"] == [float(images.min()), float(images.max())]
        manifest = json.loads(json.dumps(dataset.manifest))
        assert manifest["count"] == len(dataset) and tuple(manifest["shape"]) == dataset.shape
        assert manifest["name"] == name and manifest["num_classes"] == dataset.num_classes

    def test_bad_indices(self, name):
        dataset = data.build(name)
        for indices in ([-1], [len(dataset)], [[0, 1]]):
            with pytest.raises(InputError, match=rf"expected \(N,\) numbers from 0 to {len(dataset) - 1}"):
                dataset.batch(indices)
        for indices in ([0.0, 1.0], np.array([True, False, True]), ["one"], [None]):
            with pytest.raises(InputTypeError, match="expected whole numbers"):
                dataset.batch(indices)
        assert dataset.batch([])["data"].shape == (0, *dataset.shape)
        with pytest.raises(InputError, match="expected a run of non-negative ones"):
            dataset.indices_at(range(0, 10, 2), seed=0)
        for arguments in (dict(size=0, steps=1), dict(size=1, steps=-1), dict(size=1, steps=1, start=-1)):
            with pytest.raises(InputError, match="expected size ≥ 1 and no negative step"):
                dataset.batches(seed=0, **arguments)


def test_digits_equal_scikit_learns_copy():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    for split, rows in (("all", slice(None)), ("train", slice(1, None, 2)), ("held-out", slice(0, None, 2))):
        ours = data.build("digits", split=split)
        batch = ours.batch(range(len(ours)))
        assert np.array_equal(batch["data"].numpy().reshape(-1, 64), images[rows] / 8 - 1)
        assert np.array_equal(batch["label"].numpy(), labels[rows])


def test_digits_splits():
    train, held_out = data.build("digits", split="train"), data.build("digits", split="held-out")
    assert (len(train), len(held_out), len(data.build("digits", split="all"))) == (898, 899, 1797)
    assert data.build("digits").split == "train"
    assert train.manifest["sha256"] != held_out.manifest["sha256"]
    pixels = ((train.batch(range(898))["data"] + 1) * 8).to(torch.uint8).numpy().reshape(898, 8, 8)
    labels = train.batch(range(898))["label"].to(torch.uint8).numpy()
    assert train.manifest["sha256"] == hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    for split in ("test", ["train"], None):
        with pytest.raises(InputError, match="got split .*, expected one of 'train', 'held-out', 'all'"):
            data.build("digits", split=split)
    with pytest.raises(UnknownNameError, match="unknown data set 'digit'; did you mean 'digits'"):
        data.build("digit")
