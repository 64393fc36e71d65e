from __future__ import annotations

import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from pathline import Draws, Flow, InputError, InputTypeError, PathlineError, backbones, data, interpolants, metrics
from pathline.metrics import features, models
from pathline.metrics.base import Real
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.neighbours import nearest, precision_recall, two_sample_accuracy
from pathline.metrics.report import Judge, table


@pytest.fixture(scope="module")
def judge(real):
    return Judge.of(real)


@pytest.fixture(scope="module")
def real():
    return Real.of("digits")


# --- feature spaces -----------------------------------------------------------------------------------------------


def test_principal_components_against_scikit_learn(real):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = real.images("training").flatten(1).double().numpy()
    theirs = decomposition.PCA(20, svd_solver="full").fit(x).transform(x)
    ours = features.build("pca", training=real.training)(real.images("training")).numpy()
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-8)
    with pytest.raises(InputError, match="got axes 65, expected 1 to 64"):
        features.build("pca", training=real.training, axes=65)


def test_what_is_fitted_does_not_depend_on_the_number_of_threads(real):
    before, found = torch.get_num_threads(), {}
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            axes = features.build("pca", training=real.training)
            classifier = features.build("digits-cnn", training=real.training, epochs=3)
            found[number] = (
                axes.mean,
                axes.axes,
                *(p for m in (classifier.body, classifier.head) for p in m.parameters()),
            )
            assert torch.get_num_threads() == number
            if number == 1:
                manifests = axes.manifest, classifier.manifest
            else:
                assert manifests == (axes.manifest, classifier.manifest)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(found[1], found[2], strict=True))


def test_axes_point_one_way_and_are_told_by_what_they_are_of(real):
    """Their largest entries are above zero; another half, number of axes, seed or number of epochs is another space."""
    space = features.build("pca", training=real.training)
    assert bool((space.axes.gather(1, space.axes.abs().argmax(1, keepdim=True)) > 0).all())
    told = [
        features.build("pca", training=real.held_out).manifest,
        features.build("pca", training=real.training, axes=7).manifest,
        features.build("digits-cnn", training=real.training, epochs=0).manifest,
        features.build("digits-cnn", training=real.training, epochs=0, seed=3).manifest,
        features.build("digits-cnn", training=real.held_out, epochs=0).manifest,
        space.manifest,
    ]
    assert len({json.dumps(manifest, sort_keys=True) for manifest in told}) == 6
    assert space.manifest == features.build("pca", training="digits").manifest
    assert space.manifest["training"]["sha256"] == real.training.manifest["sha256"]


def test_too_many_images_for_axes_are_refused(monkeypatch):
    monkeypatch.setattr(features, "_MOST", 898 * 64 - 1)
    with pytest.raises(InputError, match="got 898 images of 64 values for pca, expected at most 57471 values in all"):
        features.build("pca", training="digits")


def test_the_classifier_reads_digits_and_is_repeatable(judge, real):
    assert judge.accuracy >= 0.96
    truth = real.labels("held_out")
    said = judge.classifier.classify(real.images("held_out"))
    assert judge.accuracy == pytest.approx(float((said == truth).double().mean()))
    assert sum(p.numel() for m in (judge.classifier.body, judge.classifier.head) for p in m.parameters()) == 85_066
    state = torch.random.get_rng_state()
    again = features.build("digits-cnn", training=real.training)
    assert torch.equal(again(real.images("held_out", 20)), judge.classifier(real.images("held_out", 20)))
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's generator is left as it was


def test_the_classifier_starts_as_torch_would_and_follows_its_seed(real):
    start, other = (features.build("digits-cnn", training=real.training, epochs=0, seed=seed) for seed in (2, 3))
    for ours, theirs in ((start.body[2], nn.Conv2d(32, 64, 3)), (start.head, nn.Linear(64, 10))):
        bound = 1 / math.sqrt(ours.weight[0].numel())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.shape == b.shape and bool((a.abs() <= bound).all()) and bool((b.abs() <= bound).all())
        # a uniform law on ± bound has standard deviation bound/√3; 640 values and more
        assert float(ours.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(start.head.weight, other.head.weight)


def test_the_classifier_refuses_other_data():
    class Wide(type(data.build("digits"))):
        shape = (3, 5, 7)

    with pytest.raises(InputError, match=r"got data of shape \(3, 5, 7\), expected labelled images of shape"):
        features.build("digits-cnn", training=Wide())


# --- neighbours ---------------------------------------------------------------------------------------------------


def test_nearest_against_a_plain_loop():
    points, others = torch.randn(5, 3), torch.randn(11, 3)
    for k in (1, 3):
        distance, index = nearest(points, others, k)
        for i, point in enumerate(points.double().numpy()):
            ordered = sorted((math.dist(point, other), j) for j, other in enumerate(others.double().numpy()))
            assert (float(distance[i]), int(index[i])) == pytest.approx(ordered[k - 1])
    with pytest.raises(InputError, match="got 11 points, expected at least 12"):
        nearest(points, others, 12)


def test_precision_and_recall_against_a_plain_loop():
    generated, real = torch.randn(40, 2).double(), torch.randn(60, 2).double() * 1.5

    def covered(points, centres):
        radii = [sorted(math.dist(c, other) for other in centres)[3] for c in centres]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    g, r = generated.numpy(), real.numpy()
    assert precision_recall(generated, real) == pytest.approx((covered(g, r), covered(r, g)))


@pytest.mark.parametrize("width", [2, 90])
def test_blocks_of_distances_change_nothing(width, monkeypatch):
    """No more than a block of them is in memory; nor does an offset that all points share matter."""
    generated, real = torch.randn(43, width), torch.randn(61, width)
    whole, seen = precision_recall(generated, real), []
    monkeypatch.setattr("pathline.metrics.neighbours._CELLS", 200)
    plain, product = torch.cdist, torch.addmm
    monkeypatch.setattr(torch, "cdist", lambda x, y, **how: seen.append(len(x) * len(y)) or plain(x, y, **how))
    monkeypatch.setattr(torch, "addmm", lambda *a, **how: seen.append(len(a[1]) * len(a[0])) or product(*a, **how))
    assert precision_recall(generated, real) == whole and 0 < max(seen) <= 200
    assert precision_recall(generated.double() + 1e5, real.double() + 1e5) == whole


def test_centres_are_made_ready_once(monkeypatch):
    """However many blocks of points are held against them; distances are those of scipy, far from the origin too."""
    distance = pytest.importorskip("scipy.spatial.distance")
    points, centres = torch.randn(43, 90) + 1e3, torch.randn(61, 90) + 1e3
    apart = distance.cdist(points.double().numpy(), centres.double().numpy())
    monkeypatch.setattr("pathline.metrics.neighbours._CELLS", 5 * 61)
    seen, plain = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: seen.append(len(x)) or plain(x))
    found, index = nearest(points, centres, 4)
    assert sorted(seen) == [3, *[5] * 8, 61]
    assert np.allclose(found.numpy(), np.sort(apart, 1)[:, 3], rtol=1e-9)
    assert np.array_equal(index.numpy(), np.argsort(apart, 1)[:, 3])


def test_a_collapsed_model_has_high_precision_and_low_recall():
    real = torch.randn(500, 4)
    precision, recall = precision_recall(0.05 * torch.randn(500, 4), real)
    assert precision > 0.95 and recall < 0.1
    precision, recall = precision_recall(10 * torch.randn(500, 4), real)
    assert precision < 0.1 and recall > 0.5


def test_two_sample_accuracy_of_like_unlike_and_copied_sets():
    x, y = torch.randn(2, 800, 3)
    assert two_sample_accuracy(x, y) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(1600) + 0.01)
    assert two_sample_accuracy(x, y + 20) == 1.0
    assert two_sample_accuracy(x, x + 1e-6) < 0.01


# --- metrics by name ----------------------------------------------------------------------------------------------


class Several(features.Features):
    """A feature space of three outputs, as Inception's, by fixed projections of the pixels."""

    name = "several"
    sizes: ClassVar = {"features": 6, "spatial": 7, "logits": 5}
    manifest: ClassVar = {"name": "several", "sizes": sizes, "sha256": "ab" * 32}

    def __call__(self, images):
        return self.outputs(images)["features"]

    def outputs(self, images):
        x = features.as_floats(images).flatten(1).double()
        return {
            name: (x @ Draws(i).normal("axes", range(64), (size,)).double()).float()
            for i, (name, size) in enumerate(self.sizes.items())
        }


def built(judge):
    """Every metric, with what it needs."""
    return {
        "fid": dict(features=Several()),
        "sfid": dict(features=Several(), groups=3),
        "frechet": dict(features=judge.classifier),
        "label-agreement": dict(classifier=judge.classifier),
        "inception-score": dict(features=Several()),
        "kid": dict(features=Several(), subsets=3, size=40),
        "memorisation": {},
        "precision-recall": dict(features=judge.classifier),
    }


def build(name, real, options):
    return metrics.build(name, **options, **({} if name == "inception-score" else {"real": real}))


@pytest.mark.parametrize("name", metrics.names())
def test_parts_merged_equal_the_whole(name, judge, real):
    options = built(judge)[name]
    batch = data.build("digits", split="all").batch(range(300))
    noise = 0.2 * Draws(0).normal("noise", range(300), (1, 8, 8))
    batch = {"data": (batch["data"] + noise).clamp(-1, 1), "label": batch["label"]}
    whole, first, second = (build(name, real, options) for _ in range(3))
    whole.update(batch)
    for metric, rows in ((first, slice(0, 120)), (second, slice(120, 200)), (second, slice(200, 300))):
        metric.update({key: value[rows] for key, value in batch.items()})
    first.merge(second)
    one, other = whole.compute(), first.compute()
    assert one.values == pytest.approx(other.values) and one.real == pytest.approx(other.real) and one.count == 300
    assert set(one.values) == set(one.about) and set(one.real) == (
        set() if name == "inception-score" else set(one.values)
    )
    assert json.loads(json.dumps(one.to_json()))["count"] == 300


@pytest.mark.parametrize("name", metrics.names())
def test_metrics_refuse_what_does_not_fit(name, judge, real):
    if name == "inception-score":
        pytest.skip("compares with nothing, and so takes images of any data")
    metric = build(name, real, built(judge)[name])
    good = {"data": torch.zeros(2, 1, 8, 8), "label": torch.tensor([0, 9])}
    for error, change, message in (
        (InputError, {"data": torch.zeros(2, 3, 8, 8)}, r"samples of shape \(2, 3, 8, 8\), expected \(N, 1, 8, 8\)"),
        (InputError, {"data": torch.zeros(1, 8, 8)}, r"samples of shape \(1, 8, 8\), expected \(N, 1, 8, 8\)"),
        (InputError, {"data": torch.full((2, 1, 8, 8), math.nan)}, "NaN or infinite values in samples"),
        (InputError, {"data": torch.full((2, 1, 8, 8), -1.5)}, r"got samples up to ±1.5, expected \[-1, 1\]"),
        (InputTypeError, {"data": torch.zeros(2, 1, 8, 8, dtype=torch.int32)}, "samples of type torch.int32"),
        (InputError, {"label": torch.tensor([0, 10])}, "got label 10, expected 0 to 9"),
        (InputError, {"label": torch.tensor([1])}, "got labels of shape"),
    ):
        with pytest.raises(error, match=message):
            metric.update({**good, **change})
    with pytest.raises(InputError, match="got 0 samples, expected at least"):
        metric.compute()


def test_labels_are_needed_where_they_matter(judge, real):
    metric = metrics.build("label-agreement", real=real, classifier=judge.classifier)
    metric.update({"data": real.images("held_out", 5)})
    with pytest.raises(InputError, match="got 0 labels for 5 samples"):
        metric.compute()


def test_real_images_score_as_their_reference(judge, real):
    """As many held-out-like images as there are: the training half in the place of samples gives the real column."""
    records = judge.report(real.images("training"), real.labels("training"))
    by_name = {
        f"{record.metric}, {key}": (record.values[key], record.real[key]) for record in records for key in record.values
    }
    for name in ("frechet, pixels, distance", "frechet, pca, distance", "frechet, digits-cnn, distance"):
        assert by_name[name][0] == pytest.approx(by_name[name][1])
    assert by_name["frechet, pixels, distance"][1] == pytest.approx(0.28, abs=0.03)
    assert by_name["label agreement, neighbour"][1] > 0.97
    copies = by_name["memorisation, pixels, smallest distance"]
    assert copies[0] == 0 and copies[1] > 0.5
    assert by_name["memorisation, pixels, nearer to training"][0] == 1.0
    assert by_name["memorisation, pixels, nearer to training"][1] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(898))
    assert by_name["memorisation, pixels, below real 5 %"][1] == pytest.approx(0.05, abs=0.005)
    text = table(records)
    assert len(text.splitlines()) == 1 + len(by_name) and "ideal 0.05" in text


def test_memorisation_against_a_plain_count(real):
    """Real figures are measured on as many held-out images; the image itself is not its own neighbour."""
    metric = metrics.build("memorisation", real=real)
    metric.update({"data": 0.5 * real.images("held_out", 30)})
    training, held_out = (real.images(half).flatten(1).double().numpy() for half in ("training", "held_out"))
    to_training = np.array([np.linalg.norm(training - image, axis=1).min() for image in held_out])
    to_others = np.array(
        [np.linalg.norm(np.delete(held_out, i, axis=0) - held_out[i], axis=1).min() for i in range(30)]
    )
    record = metric.compute()
    assert (record.count, record.real_count) == (30, 30)
    assert record.real["smallest distance"] == pytest.approx(to_training[:30].min())
    assert record.real["nearer to training"] == pytest.approx((to_training[:30] < to_others).mean())
    assert record.real["below real 5 %"] == pytest.approx((to_training[:30] < np.quantile(to_training, 0.05)).mean())
    halved = 0.5 * held_out[:30]
    near, far = (np.array([np.linalg.norm(half - x, axis=1).min() for x in halved]) for half in (training, held_out))
    assert record.values["nearer to training"] == pytest.approx((near < far).mean())


def test_each_metric_notices_its_fault(judge, real):
    images, labels = real.images("held_out"), real.labels("held_out")

    def figures(x, y):
        return {f"{r.metric}, {k}": v for r in judge.report(x, y) for k, v in r.values.items()}

    half = torch.arange(len(images)) % 2 == 0
    good, noisy = figures(images, labels), figures((images + 0.5 * torch.randn_like(images)).clamp(-1, 1), labels)
    assert noisy["frechet, pixels, distance"] > 5 * good["frechet, pixels, distance"] + 0.5
    wrong = figures(images, torch.where(half, (labels + 1) % 10, labels))
    assert wrong["label agreement, classifier"] < 0.55 and good["label agreement, classifier"] > 0.95
    few = labels < 5
    collapsed = figures(images[few].repeat(3, 1, 1, 1), labels[few].repeat(3))
    assert collapsed["precision-recall, digits-cnn, k=3, recall"] < 0.7


# --- several together ---------------------------------------------------------------------------------------------


def digits(count):
    batch = data.build("digits", split="all").batch(range(count))
    noise = 0.2 * Draws(0).normal("noise", range(count), (1, 8, 8))
    return (batch["data"] + noise).clamp(-1, 1), batch["label"]


def figures_of(records):
    return {f"{r.metric}, {key}": (r.values[key], r.real.get(key)) for r in records for key in r.values}


def test_an_evaluation_is_its_metrics_one_by_one(judge, real):
    images, labels = digits(120)
    own = {"features": judge.classifier}
    asked = ["frechet:pca", {"name": "frechet", **own}, {"name": "precision-recall", **own}, "memorisation"]
    whole = Evaluation([*asked, {"name": "label-agreement", "classifier": judge.classifier}], real)
    first, second = whole.fresh(), whole.fresh()
    for part in (slice(0, 50), slice(50, 120)):
        whole.update(images[part], labels[part])
    for evaluation, part in ((first, slice(70, 120)), (second, slice(0, 70))):
        evaluation.update(images[part], labels[part], torch.arange(120)[part])
    first.merge_state(second.state())
    expected = {}
    for name, options in (
        ("frechet", dict(features=features.build("pca", training=real.training))),
        ("frechet", dict(features=judge.classifier)),
        ("precision-recall", dict(features=judge.classifier)),
        ("memorisation", {}),
        ("label-agreement", dict(classifier=judge.classifier)),
    ):
        metric = metrics.build(name, real=real, **options)
        metric.update({"data": images, "label": labels})
        expected |= figures_of([metric.compute()])
    for evaluation in (whole, first):
        found = figures_of(evaluation.compute())
        assert found.keys() == expected.keys()
        for key, pair in expected.items():
            assert found[key] == pytest.approx(pair, rel=1e-6)  # the classifier is of float32


def test_a_feature_space_sees_a_batch_once(real):
    class Counted(Several):
        calls = 0

        def outputs(self, images):
            Counted.calls += 1
            return super().outputs(images)

    space = Counted()
    evaluation = Evaluation([{"name": name, "features": space} for name in ("fid", "sfid", "precision-recall")], real)
    evaluation.update(digits(11)[0])
    assert Counted.calls == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "got no metrics"),
        (["fod"], "unknown metric 'fod'; did you mean 'fid'"),
        (["memorisation:pca"], "has no option 'features'"),
        ([{"features": "pca"}], "got a metric without a name"),
        ([{"name": "frechet", "group": 3}], "has no option 'group'; did you mean 'groups'"),
        (["sfid:pca"], "got the feature space pca, which gives features, for SpatialFrechet, which is of spatial"),
        ([{"name": "frechet", "features": "pixels", "groups": 1}], "got groups 1, expected 0, or 2 and more"),
    ],
)
def test_what_an_evaluation_refuses(names, message, real):
    with pytest.raises(PathlineError, match=message):
        Evaluation(names, real)


def test_what_needs_a_reference_says_so(real):
    with pytest.raises(InputError, match="got no reference for the metric frechet, which compares with one"):
        Evaluation(["frechet:pixels"])
    with pytest.raises(InputError, match="got no reference for Frechet"):
        metric = metrics.build("frechet", real=None, features=Several())
        metric.update({"data": digits(5)[0]})
        metric.compute()


@pytest.mark.parametrize(
    ("asked", "count", "labelled", "message"),
    [
        ({"name": "kid", "size": 40}, 39, True, "got 39 samples, expected at least 40; draw more, or set kid.size to"),
        ({"name": "kid", "size": 901, "references": 901}, 950, True, "got 899 held-out images, expected at least 901"),
        ({"name": "precision-recall", "k": 5}, 5, True, "got 5 samples, expected at least 6; draw more"),
        ({"name": "inception-score", "splits": 3}, 2, True, "got 2 samples, expected at least 3"),
        ({"name": "fid"}, 1, True, "got 1 samples, expected at least 2"),
        ("memorisation", 1, True, "got 1 samples, expected at least 2"),
        ({"name": "label-agreement"}, 9, False, "got samples without labels for LabelAgreement"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_sample(asked, count, labelled, message, real, judge):
    name = asked if isinstance(asked, str) else asked["name"]
    needs = {"memorisation": {}, "label-agreement": {"classifier": judge.classifier}}
    named = {"name": name} if isinstance(asked, str) else asked
    evaluation = Evaluation(["memorisation", {**named, **needs.get(name, {"features": Several()})}], real)
    with pytest.raises(PathlineError, match=message):
        evaluation.expects(count, labelled=labelled)
    enough = Evaluation(
        [{**named, **needs.get(name, {"features": Several()}), **({"size": 40} if name == "kid" else {})}], real
    )
    enough.expects(50, labelled=True)


def test_samples_by_number_come_once_and_all_have_one(real):
    evaluation = Evaluation(["memorisation"], real)
    images, labels = digits(6)
    evaluation.update(images[:3], labels[:3], torch.tensor([4, 0, 2]))
    with pytest.raises(InputError, match="got numbers of samples for some batches and none for others"):
        evaluation.update(images[3:], labels[3:])
    evaluation = Evaluation(["memorisation"], real)
    evaluation.update(images[:3], labels[:3], torch.tensor([4, 0, 2]))
    evaluation.update(images[3:], labels[3:], torch.tensor([3, 2, 1]))
    with pytest.raises(InputError, match="got sample 2 twice"):
        evaluation.compute()


def test_levels_and_floats_are_one(real, monkeypatch):
    monkeypatch.setattr(features.DigitsCNN, "_train", lambda *_: None)  # random weights will do
    levels = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    floats = levels / 127.5 - 1
    assert torch.equal(features.as_levels(floats), levels) and torch.equal(features.as_levels(levels), levels)
    assert torch.equal(features.as_floats(levels), floats)
    assert features.as_levels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    first = Evaluation(["frechet:pixels", "frechet"], real)
    assert [space.name for space in first._spaces.values()] == ["pixels", "digits-cnn"]
    pair = [first, first.fresh()]
    for evaluation, images in zip(pair, (levels, floats), strict=True):
        evaluation.update(images)
    assert figures_of(pair[0].compute()) == figures_of(pair[1].compute())


# --- bits per dimension -------------------------------------------------------------------------------------------


def bits(flow, x, **options):
    metric = models.build("bits-per-dimension", solver={"name": "dopri5", "rtol": 1e-7, "atol": 1e-7}, **options)
    for first, last in ((0, 4), (4, len(x))):
        metric.update(flow, {"data": x[first:last]}, Draws(5).at(range(first, last)))
    return metric


def log_density(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x.double()).flatten(1).mean(1)


@pytest.mark.parametrize("exact", [True, False])
def test_bits_of_a_gaussian(exact, gaussian):
    """Continuous data: −log₂ p(x)/D of the normal law itself; with one probe too, as its divergence is the same."""
    truth = gaussian(mean=0.3, std=0.5)
    x = 0.3 + 0.5 * torch.randn(11, 2, 3)
    metric = bits(truth.flow(), x, levels=None, exact=exact)
    row = metric.compute().row("bits per dimension")
    expected = -log_density(x, 0.3, 0.5) / math.log(2)
    assert row.mean == pytest.approx(float(expected.mean()), abs=1e-4)
    assert row.error == pytest.approx(float(expected.std() / math.sqrt(11)), rel=1e-3)
    assert metric.compute().row("network calls").mean >= 6
    assert ("exact divergence" in metric.metric) == exact


def test_bits_of_levels(gaussian):
    """Each value gets uniform noise over its bin of width 2/16, and its density times that width is a probability."""
    truth = gaussian(mean=0.1, std=0.4)
    x = (((0.1 + 0.4 * torch.randn(9, 2, 3)).clamp(-1, 1) + 1) * 8).round() / 8 - 1
    found = bits(truth.flow(), x, levels=17).compute().row("bits per dimension").mean
    noised = x + (Draws(5).uniform("dequantization", range(9), (2, 3)) - 0.5) / 8
    expected = -(log_density(noised, 0.1, 0.4) + math.log(1 / 8)) / math.log(2)
    assert found == pytest.approx(float(expected.mean()), abs=1e-4)
    with pytest.raises(InputError, match="expected one of 256 levels"):
        bits(truth.flow(), x)


def test_bits_by_name_and_what_they_refuse(gaussian):
    said = models.build("bits-per-dimension").metric
    assert said == "bits-per-dimension, 256 levels, uniformly dequantised, dopri5, 1 Rademacher probe"
    for options in ({"levels": 1}, {"interval": (1.0, -1.0)}, {"probes": 0}):
        with pytest.raises(InputError, match=f"got {next(iter(options))}"):
            models.build("bits-per-dimension", **options)
    bridge = Flow(backbones.wrap(lambda x, t: x), interpolants.build("bridge"))
    with pytest.raises(InputError, match="got a flow on the .* path, which has no likelihood here"):
        bits(bridge, torch.zeros(5, 3), levels=None)
    pyplot = pytest.importorskip("matplotlib.figure")
    axes = pyplot.Figure().subplots()
    metric = bits(gaussian().flow(), torch.randn(7, 3), levels=None)
    metric.plot(axes)
    drawn = axes.lines[0].get_ydata()
    assert drawn[0] == metric.compute().row("bits per dimension").mean
