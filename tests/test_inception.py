"""Inception's and vision transformers' features, and what is computed from them, against torch-fidelity and by hand."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pathline import MissingPackageError, PathlineError, WeightsError, metrics
from pathline.core.errors import InputError
from pathline.metrics import features, inception
from pathline.metrics.kernel import discrepancies, discrepancy
from pathline.metrics.real import Reference
from pathline.metrics.score import scores
from pathline.metrics.vision import hub_table

# --- the network ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fidelity(torchvision_operators):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """Random weights whose features vary: norms with drawn statistics, as trained ones have."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    generator = torch.Generator().manual_seed(3)
    blank = object.__new__(fidelity.FeatureExtractorInceptionV3)
    state = {}

    def keep(found, *args, **kwargs):
        for key, value in nn.Module.state_dict(found).items():
            draw = torch.rand(value.shape, generator=generator)
            if value.ndim > 1:  # variance 2 an input, for ReLU
                value = (draw - 0.5) * math.sqrt(12 * 2 / value[0].numel())
            elif value.is_floating_point():
                value = draw + 0.5 if key.endswith(("weight", "var")) else 0.2 * (draw - 0.5)
            state[key] = value
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", keep)
        blank.__init__("random", ["2048"])
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return features.build("inception", weights=str(weights), unverified=True)


@pytest.fixture(scope="module")
def theirs(fidelity, weights):
    return fidelity.FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased", "logits"], str(weights))


@pytest.fixture(scope="module")
def images():
    """Smooth pictures of one size that is no square, with contrast."""
    coarse = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(5))
    x = functional.interpolate(coarse, (37, 53), mode="bicubic").clamp(0, 1)
    return (x * 255).round().to(torch.uint8)


def test_features_are_torch_fidelitys(network, theirs, images):
    found, expected = network.outputs(images), theirs(images)
    assert torch.equal(found["features"], expected[0]) and found["features"].shape == (3, 2048)
    assert torch.equal(found["logits"], expected[1]) and found["logits"].shape == (3, 1008)
    assert not torch.allclose(expected[1], expected[2])  # those with the bias
    assert torch.equal(network(images), expected[0])
    assert float(found["features"].std(0).mean()) > 1e-3, "the features do not depend on the image"


def test_features_of_floats_and_of_one_channel(network, images):
    floats = images / 127.5 - 1
    assert torch.equal(network(floats), network(images))
    grey = images[:, :1]
    assert torch.equal(network(grey), network(torch.cat((grey, grey, grey), 1)))


def test_spatial_features_against_a_pass_by_hand(network, theirs, images):
    """The seven first channels of Mixed_6d's 1 × 1 branch by convolution, norm and ReLU, in the order y, x, channel."""
    caught = {}
    handle = theirs.Mixed_6d.register_forward_pre_hook(lambda module, given: caught.update(x=given[0].clone()))
    theirs(images)
    handle.remove()
    branch = theirs.Mixed_6d.branch1x1
    x = functional.conv2d(caught["x"], branch.conv.weight[:7])
    norm = branch.bn
    scale = (norm.weight / (norm.running_var + 0.001).sqrt())[:7]
    x = (x - norm.running_mean[:7, None, None]) * scale[:, None, None] + norm.bias[:7, None, None]
    x = x.clamp(min=0).numpy()
    expected = np.stack([[x[n, c, i, j] for i in range(17) for j in range(17) for c in range(7)] for n in range(3)])
    found = network.outputs(images)["spatial"].numpy()
    assert found.shape == (3, 2023)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.std())
    assert not np.allclose(found, x.reshape(3, -1), atol=0.1 * expected.std())  # the order channel, y, x


def test_precision_of_training_leaves_features_alone(network, images):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        seen = []
        hook = network.network.Mixed_5b.register_forward_hook(
            lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        )
        network(images[:1])
        hook.remove()
        assert seen == [("highest", False)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --- its weights ----------------------------------------------------------------------------------------------------


def test_weights_are_those_that_were_published(network, weights, fidelity):
    assert fidelity.URL_INCEPTION_V3.endswith(f"-{inception.SHA256[:8]}.pth")
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network.manifest["sha256"] == sha256 and network.manifest["verified"] is False
    with pytest.raises(WeightsError, match=f"with the SHA-256 {sha256}, expected {inception.SHA256}, .*unverified"):
        features.build("inception", weights=str(weights))
    with pytest.raises(WeightsError, match="got no file"):
        features.build("inception", weights=str(weights.with_name("none.pth")))


def test_building_leaves_torchs_generator_alone(weights, fidelity):
    state = torch.random.get_rng_state()
    features.build("inception", weights=str(weights), unverified=True)
    assert torch.equal(torch.random.get_rng_state(), state)


class Trap:
    def __reduce__(self):
        return os.mkdir, (self.place,)

    def __init__(self, place):
        self.place = place


def test_nothing_in_a_file_of_weights_is_executed(fidelity, tmp_path):
    place = tmp_path / "executed"
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Trap(str(place))}, path)
    with pytest.raises(WeightsError, match="cannot be read as weights alone"):
        features.build("inception", weights=str(path), unverified=True)
    path.write_bytes(pickle.dumps(Trap(str(place))))
    with pytest.raises(WeightsError, match="cannot be read as weights alone"):
        features.build("inception", weights=str(path), unverified=True)
    assert not place.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds no dictionary of tensors"),
        ({"fc.weight": 3}, "holds no dictionary of tensors"),
        ({"fc.weight": torch.zeros(2, 3)}, "of another network than Inception"),
    ],
)
def test_other_weights_are_refused(content, message, fidelity, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=f"weights.pth.*{message}"):
        features.build("inception", weights=str(path), unverified=True)


def test_a_download_that_fails_says_what_to_do(fidelity, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def shut(url, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", shut)
    with pytest.raises(WeightsError, match="got no weights of Inception .*no route to host.*give weights: PATH"):
        features.build("inception")


def test_a_file_in_the_cache_of_torchs_hub_is_verified(fidelity, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / fidelity.URL_INCEPTION_V3.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"forged")
    with pytest.raises(WeightsError, match="expected 6726825d"):
        features.build("inception")


def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pathline\[inception\]'"):
        features.build("inception", weights="any.pth")


# --- what is computed from features ---------------------------------------------------------------------------------


class Given(features.Features):
    """Rows that the test knows, by the first pixel of an image."""

    name = "given"
    sizes: ClassVar = {"features": 7, "logits": 5}
    manifest: ClassVar = {"name": "given", "sizes": sizes}

    def __init__(self, **rows):
        self.rows = rows

    def __call__(self, images):
        return self.outputs(images)["features"]

    def outputs(self, images):
        index = images[:, 0, 0, 0].long()
        return {name: rows[index] for name, rows in self.rows.items()}


class Known(Reference):
    """A reference of given rows."""

    manifest: ClassVar = {"kind": "known"}

    def __init__(self, rows):
        self.rows = rows

    def statistics(self, space, output):
        raise NotImplementedError

    def vectors(self, space, output, count=None):
        return self.rows[:count]


def numbered(count):
    """Images that name their number."""
    x = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(count)
    return x


def test_scores_against_torch_fidelity(fidelity):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(103, 11)
    for splits, shuffle in ((10, True), (3, False), (1, True)):
        found = scores(logits, splits, shuffle=shuffle)
        expected = isc_features_to_metric(logits, splits, shuffle)
        assert float(found.mean()) == pytest.approx(expected["inception_score_mean"], rel=1e-12)
        assert float(found.std(correction=0)) == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_scores_of_blocks_by_hand(monkeypatch):
    """Blocks of ADM's evaluator, the last of which is smaller, by a plain sum over each."""
    monkeypatch.setattr("pathline.metrics.score.BLOCK", 30)
    logits = 2 * torch.randn(70, 5)
    expected = []
    for part in (logits[:30], logits[30:60], logits[60:]):
        p = np.exp(part.double().numpy())
        p /= p.sum(1, keepdims=True)
        q = p.mean(0)
        expected.append(math.exp((p * np.log(p / q)).sum() / len(p)))
    assert scores(logits).tolist() == pytest.approx(expected)


def test_the_score_of_certain_and_of_blind_classifiers():
    certain = 1e4 * torch.eye(7).repeat(11, 1)
    assert float(scores(certain)) == pytest.approx(7)
    assert float(scores(torch.zeros(13, 7))) == pytest.approx(1)
    one = torch.zeros(20, 5)
    one[:, 0] = 1000  # the probabilities of all other classes underflow
    assert scores(one, 2).tolist() == [1, 1]


def test_the_score_by_name_and_its_words():
    space = Given(features=torch.randn(60, 7), logits=2 * torch.randn(60, 5))
    for options, law in (
        ({}, "over 1 splits"),
        ({"splits": 4, "shuffle": True}, "standard deviation over 4 splits; no standard error"),
    ):
        metric = metrics.build("inception-score", features=space, **options)
        metric.update({"data": numbered(60), "label": torch.arange(60) // 6})
        record = metric.compute()
        assert record.values["score"] == pytest.approx(float(scores(space.rows["logits"], **options).mean()))
        assert law in record.uncertainty_law and bool(record.warnings) == (not options)
        assert set(record.uncertainty) == ({"score"} if options else set())
    with pytest.raises(InputError, match="got splits 0"):
        metrics.build("inception-score", features=space, splits=0)


def test_discrepancy_by_its_definition():
    x, y = torch.randn(6, 3).double(), torch.randn(8, 3).double() + 0.5

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    own = [sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (x, y)]
    cross = sum(k(a, b) for a in x for b in y)
    assert discrepancy(x, y) == pytest.approx(own[0] / 30 + own[1] / 56 - 2 * cross / 48)


def test_discrepancies_against_torch_fidelity(fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = torch.randn(300, 16).double(), 1.1 * torch.randn(250, 16).double() + 0.2
    expected = kid_features_to_metric(x, y, kid_subsets=13, kid_subset_size=100, verbose=False)
    found = discrepancies(x, y, subsets=13, size=100, seed=2020)
    assert float(found.mean()) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert float(found.std(correction=0)) == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-8)


def test_the_kernel_distance_is_unbiased_and_can_be_negative():
    """Of one law the mean over many draws is zero within its error, with estimates on both sides."""
    found = torch.tensor([discrepancy(*torch.randn(2, 20, 4)) for _ in range(400)])
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20
    assert float((found < 0).double().mean()) > 0.3


def test_the_kernel_distance_by_name():
    rows, real = torch.randn(60, 7), torch.randn(50, 7) + 0.3
    options = dict(features=Given(features=rows), subsets=5, size=20, references=40)
    metric = metrics.build("kid", real=Known(real), **options)
    metric.update({"data": numbered(60)})
    record = metric.compute()
    expected = discrepancies(rows, real[:40], subsets=5, size=20, seed=2020)
    assert record.values["distance"] == pytest.approx(float(expected.mean()))
    assert record.uncertainty["distance"] == pytest.approx(float(expected.std(correction=0)))
    assert "no standard error" in record.uncertainty_law and record.reference["vectors"] == 40
    small = metrics.build("kid", real=Known(real), **{**options, "size": 40, "references": 60})
    small.update({"data": numbered(30)})
    with pytest.raises(InputError, match="got 30 samples, expected at least 40"):
        small.compute()
    with pytest.raises(InputError, match="got subsets 0 of size 1000"):
        metrics.build("kid", real=Known(real), features=Given(features=rows), subsets=0)


def test_precision_and_recall_against_torch_fidelity(fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real = torch.randn(211, 96)
    for generated in (torch.randn(150, 96) * 0.9, 0.2 * torch.randn(170, 96) + real[:1]):
        for space, others in ((generated, real), (generated[:, :8], real[:, :8])):  # multiplied out, and differences
            expected = prc_features_to_metric(
                space, others, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
            )
            found = metrics.neighbours.precision_recall(space, others)
            assert found == pytest.approx((expected["precision"], expected["recall"]))


# --- vision transformers --------------------------------------------------------------------------------------------


def test_fd_dinov2_as_edm2_defines_it(torchvision_operators, tmp_path):
    """Resized antialiased to 224, ImageNet's colours, the normalised class token, and the authors' position table."""
    timm = pytest.importorskip("timm")
    model = "vit_small_patch14_dinov2.lvd142m"
    network = timm.create_model(model, pretrained=False, num_classes=0).eval()  # of its own 518 pixels
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter) + (parameter.ndim == 1))
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    images = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    space = features.build("timm", model=model, weights=str(path))
    x = functional.interpolate(images.float() / 255, (224, 224), mode="bicubic", antialias=True)
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        tokens = network.patch_embed.proj(x).flatten(2).transpose(1, 2)
        table = network.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
        table = functional.interpolate(table, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
        first = (network.cls_token + network.pos_embed[:, :1]).expand(2, -1, -1)
        tokens = torch.cat((first, tokens + table.flatten(2).transpose(1, 2)), 1)
        for block in network.blocks:
            tokens = block(tokens)
        expected = functional.layer_norm(tokens[:, 0], (384,), network.norm.weight, network.norm.bias, 1e-6)
        assert torch.allclose(space(images), expected, atol=1e-4)
        assert torch.equal(space(images / 127.5 - 1), space(images))
    assert space.manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert space.sizes == {"features": 384} and space.manifest["position_table"] == "DINOv2's"


def test_the_table_of_dinov2_by_its_interpolation():
    """Cubic convolution of a = −0.75 at (i + ½)·g/(n + 0.1) − ½, with edges repeated."""

    def weight(d):
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def matrix(n, g):
        found = np.zeros((n, g))
        for i in range(n):
            place = (i + 0.5) * g / (n + 0.1) - 0.5
            for j in range(math.floor(place) - 1, math.floor(place) + 3):
                found[i, min(max(j, 0), g - 1)] += weight(place - j)
        return found

    table = torch.randn(1, 1 + 81, 3, dtype=torch.float64)
    found = hub_table(table, (4, 5))
    patches = table[0, 1:].reshape(9, 9, 3).numpy()
    expected = np.einsum("ia,jb,abd->ijd", matrix(4, 9), matrix(5, 9), patches).reshape(20, 3)
    assert np.allclose(found[0, 1:].numpy(), expected, atol=1e-6)
    assert torch.equal(found[:, 0], table[:, 0]) and hub_table(table, (9, 9)) is table


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_other_models_are_timms_own(model, torchvision_operators, tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model(model, pretrained=False, num_classes=0, img_size=224).eval()
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    space = features.build("timm", model=model, weights=str(path))
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(space(images), network((images / 255 - mean) / std), atol=1e-5)
    assert space.manifest["position_table"] == "timm's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model="vit_tiny_patch15"), "has no model 'vit_tiny_patch15'; did you mean"),
        (dict(model="resnet18", weights="x"), "name (one|a ViT)"),
        (dict(model="vit_tiny_patch16_224", weights="none.pth"), "got no file none.pth"),
        (dict(model="vit_tiny_patch16_224", size=0), "got size 0"),
    ],
)
def test_what_a_vision_transformer_refuses(options, message, torchvision_operators):
    pytest.importorskip("timm")
    with pytest.raises(PathlineError, match=message):
        features.build("timm", **options)
