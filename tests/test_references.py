"""References by name and place: what they give, against plain computations, and which of them are refused."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pathline import DataError, Draws, InputError, data, metrics
from pathline.metrics import features
from pathline.metrics.evaluation import Evaluation
from pathline.metrics.frechet import frechet_distance
from pathline.metrics.moments import Moments, Statistics
from pathline.metrics.real import Real, Reference
from pathline.metrics.reference import main
from pathline.metrics.samples import Samples
from pathline.metrics.sets import ImageReference, collect
from pathline.metrics.stored import AdmReference, StatisticsReference, write_adm


class Projected(features.Features):
    """Inception's outputs in name and size, by fixed projections of the pixels; small ones unless asked otherwise."""

    name = "inception"

    def __init__(self, sizes=None, sha256="ab" * 32, verified=True):
        self.sizes = sizes or {"features": 6, "spatial": 5, "logits": 4}
        self.manifest = {"name": "inception", "sha256": sha256, "verified": verified, "sizes": self.sizes}
        self.images = 0

    def __call__(self, images):
        return self.outputs(images)["features"]

    def outputs(self, images):
        x = features.as_levels(images).flatten(1).double()
        self.images += len(images)
        axes = [
            Draws(i).normal("axes", range(x.shape[1]), (size,)).double() for i, size in enumerate(self.sizes.values())
        ]
        return {name: (x @ a / 100).float() for name, a in zip(self.sizes, axes, strict=True)}


@pytest.fixture
def space():
    return Projected()


def drawn(count=83, seed=1):
    return torch.randint(0, 256, (count, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_images(path, images, **more):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def plain(space, images, output="features"):
    x = space.outputs(images)[output].double().numpy()
    return x.mean(0), np.cov(x.T)


def matches(statistics, expected):
    assert np.allclose(statistics.mean.numpy(), expected[0], rtol=1e-12)
    assert np.allclose(statistics.covariance.numpy(), expected[1], rtol=1e-9, atol=1e-10)


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_of_a_file_are_streamed_once(space, tmp_path):
    images = drawn()
    reference = Reference.of(write_images(tmp_path / "real.npz", images))
    assert isinstance(reference, ImageReference) and reference.shape == (3, 7, 5)
    for output in ("features", "spatial"):
        matches(reference.statistics(space, output), plain(space, images, output))
    seen = space.images
    vectors = reference.vectors(space, "features", 20)
    assert space.images == seen, "the images were read again"
    order = Draws(0).permutation("reference vectors", 83)[:20]
    assert torch.equal(vectors, space(images[torch.from_numpy(order)]))
    assert len(reference.vectors(space, "features")) == 83
    assert reference.manifest["count"] == 83 and json.dumps(reference.manifest)


def test_more_vectors_than_were_kept(space, monkeypatch, tmp_path):
    monkeypatch.setattr("pathline.metrics.sets.KEPT", 10)
    reference = Reference.of(write_images(tmp_path / "real.npz", drawn()))
    few, many = reference.vectors(space, "features", 7), reference.vectors(space, "features", 30)
    assert len(few) == 7 and len(many) == 30 and torch.equal(many[:7], few)


def test_images_of_a_folder_and_of_data(space, tmp_path):
    images = drawn(11)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    matches(Reference.of(folder).statistics(space, "features"), plain(space, images))
    whole = Reference.of({"name": "digits", "split": "all"})
    digits = data.build("digits", split="all").batch(range(1797))["data"]
    matches(whole.statistics(space, "features"), plain(space, digits))
    halves = Reference.of("digits")
    assert isinstance(halves, Real) and halves.num_classes == 10
    matches(halves.statistics(space, "features"), plain(space, halves.images("held_out")))


def test_a_set_of_another_length(space):
    for count in (4, 6):
        with pytest.raises(DataError, match=f"got {'more' if count == 6 else 4} images, expected 5"):
            collect(space, iter(drawn(count).split(3)), 5, 2)


@pytest.mark.parametrize("source", ["nothing", {"name": "synthetic"}])
def test_what_is_no_reference(source, space):
    with pytest.raises(DataError, match=r"nor a file or folder that is there|without images"):
        Reference.of(source)


def test_samples_of_another_size_are_refused(space, tmp_path):
    reference = Reference.of(write_images(tmp_path / "real.npz", drawn()))
    evaluation = Evaluation([{"name": "fid", "features": space}], reference)
    with pytest.raises(InputError, match=r"got samples of shape \(2, 3, 8, 8\), expected \(N, 3, 7, 5\)"):
        evaluation.update(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


# --- statistics of ours ---------------------------------------------------------------------------------------------


class Registered(Projected):
    def __init__(self, sha256: str = "ab" * 32):
        super().__init__(sha256=sha256)


@pytest.fixture
def registered(monkeypatch):
    entry = features.registry.entry("inception")
    monkeypatch.setitem(features.registry._entries, "inception", type(entry)("inception", Registered))


@pytest.fixture
def written(registered, tmp_path, capsys):
    images = drawn()
    write_images(tmp_path / "real.npz", images)
    assert main([str(tmp_path / "real.npz"), str(tmp_path / "real.safetensors"), "--kept", "20"]) == 0
    return tmp_path / "real.safetensors"


def test_a_file_of_statistics_is_its_images(written, space):
    reference, direct = Reference.of(written), Reference.of(written.with_suffix(".npz"))
    assert isinstance(reference, StatisticsReference) and reference.shape == (3, 7, 5)
    for output in ("features", "spatial"):
        matches(reference.statistics(space, output), plain(space, drawn(), output))
    assert torch.equal(reference.vectors(space, "features"), direct.vectors(space, "features", 20))
    assert reference.statistics(space, "features").count == 83
    assert reference.manifest["count"] == 83 and reference.manifest["path"] == "real.npz"
    names = ["fid", "sfid", "precision-recall", {"name": "kid", "size": 15, "subsets": 3, "references": 20}]
    sets = []
    for one in (reference, direct):
        evaluation = Evaluation([{**({"name": n} if isinstance(n, str) else n), "features": space} for n in names], one)
        evaluation.update(drawn(31, seed=2))
        sets.append(evaluation.compute())
    for ours, theirs in zip(*sets, strict=True):
        if ours.metric.startswith("precision"):
            continue  # of 20 against 83
        assert ours.values == pytest.approx(theirs.values) and ours.reference["kind"] == "statistics"


def test_statistics_of_data_by_name(registered, tmp_path, capsys):
    output = tmp_path / "digits.safetensors"
    assert main(["digits", str(output), "split=train", "--features", "pca"]) == 0
    digits = data.build("digits", split="train")
    space = features.build("pca", training=digits)
    matches(Reference.of(output).statistics(space, "features"), plain(space, digits.batch(range(898))["data"]))
    other = features.build("pca", training=data.build("digits", split="held-out"))
    with pytest.raises(
        DataError, match=r"digits.safetensors with statistics of another .* than pca: training.count 898, exp"
    ):
        Reference.of(output).statistics(other, "features")


def test_statistics_of_other_weights_are_refused(written):
    reference = Reference.of(written)
    for space in (Projected(sha256="cd" * 32), Projected(sizes={"features": 6, "spatial": 5, "logits": 3})):
        for call in (reference.statistics, reference.vectors):
            with pytest.raises(DataError, match=r"real.safetensors with statistics of another feature space"):
                call(space, "features")


def changed(path, **tensors):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        words = file.metadata()
    held = load_file(path)
    save_file({**held, **tensors}, path, {**words, **({} if tensors else {"format": "other"})})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no statistics of format"),
        ({"features.mean": torch.zeros(7, dtype=torch.float64)}, r"got features of shapes .*expected 6 features"),
        ({"features.scatter": torch.zeros(6, 5, dtype=torch.float64)}, r"got features of shapes"),
        ({"features.mean": torch.full((6,), torch.nan, dtype=torch.float64)}, "NaN or infinite values in features"),
        ({"features.scatter": -torch.eye(6, dtype=torch.float64)}, "features of .* with a negative eigenvalue"),
        ({"features.scatter": torch.eye(6, dtype=torch.float64).roll(1, 0)}, "features of .* not symmetric"),
        ({"vectors": torch.zeros(20, 5)}, r"with vectors \(20, 5\)"),
        ({"vectors": torch.full((20, 6), torch.inf)}, "NaN or infinite values in vectors"),
    ],
)
def test_damaged_statistics_are_refused(tensors, message, written, space):
    changed(written, **tensors)
    with pytest.raises(DataError, match=message) as caught:
        reference = Reference.of(written)
        reference.statistics(space, "features")
        reference.vectors(space, "features")
    assert "real.safetensors" in str(caught.value)


def test_truncated_and_forged_statistics_are_refused(written, space):
    whole = written.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    huge = whole[8 : 8 + length].replace(b'"shape":[6,6]', b'"shape":[6,9]')
    for content in (whole[:-40], b"", b"\xff" * 64, whole[:8] + huge + whole[8 + length :]):
        written.write_bytes(content)
        with pytest.raises(DataError, match=r"real.safetensors, which is no safetensors file"):
            Reference.of(written)


# --- which of two it is ---------------------------------------------------------------------------------------------


def records(reference, space):
    evaluation = Evaluation([{"name": name, "features": space} for name in ("fid", "precision-recall")], reference)
    evaluation.update(drawn(31, seed=2))
    return [{k: v for k, v in record.reference.items() if k not in ("path", "file")} for record in evaluation.compute()]


def test_references_are_told_by_what_they_hold(registered, tmp_path, capsys):
    """Two of one name differ in their records, and one under two names does not, whatever kind of file it is."""
    held = {}
    for folder, seed in (("a", 1), ("b", 2), ("c", 1)):
        (tmp_path / folder).mkdir()
        images = write_images(tmp_path / folder / "ref.npz", drawn(seed=seed))
        assert main([str(images), str(tmp_path / folder / "ref.safetensors")]) == 0
        np.savez(tmp_path / folder / "adm.npz", mu=np.full(3, seed), sigma=np.eye(3))
        for name in ("ref.npz", "ref.safetensors"):
            held[folder, name] = records(Reference.of(tmp_path / folder / name), Projected())
        held[folder, "adm.npz"] = [Reference.of(tmp_path / folder / "adm.npz").manifest]
    for name in ("ref.npz", "ref.safetensors", "adm.npz"):
        for one, other, same in zip(held["a", name], held["b", name], held["c", name], strict=True):
            assert one != other and one == same
    levels = drawn(seed=1).numpy().tobytes()
    assert held["a", "ref.npz"][0]["sha256"] == hashlib.sha256(levels).hexdigest()
    assert held["a", "ref.safetensors"][0]["sha256"] == hashlib.sha256(levels).hexdigest()
    whole = (tmp_path / "a" / "adm.npz").read_bytes()
    assert held["a", "adm.npz"][0]["sha256"] == hashlib.sha256(whole).hexdigest()


def test_the_hash_of_images_that_nobody_has_looked_at_yet(space, tmp_path):
    reference = Reference.of(write_images(tmp_path / "real.npz", drawn()))
    assert reference.manifest["sha256"] == hashlib.sha256(drawn().numpy().tobytes()).hexdigest()
    write_images(tmp_path / "real.npz", drawn(seed=2))
    with pytest.raises(DataError, match=r"got other images in real.npz than before"):
        reference.statistics(space, "features")


# --- spaces that are fitted on a reference --------------------------------------------------------------------------


def test_pixels_and_axes_beside_images(tmp_path, capsys):
    """By a plain decomposition of the reference's images; and from the file of statistics the same."""
    images, samples = drawn(90), drawn(150, seed=2)
    place = str(write_images(tmp_path / "real.npz", images))
    x, y = (features.as_floats(z).flatten(1).double().numpy() for z in (images, samples))
    axes = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:20]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, turn in (("pixels", np.eye(105)), ("pca", axes.T)):
            moments = [((z @ turn).mean(0), np.cov((z @ turn).T)) for z in (x, y)]
            exact = [Statistics(*map(torch.from_numpy, pair), None) for pair in moments]
            evaluation = Evaluation([f"frechet:{name}"], Reference.of(place))
            evaluation.update(samples)
            (direct,) = evaluation.compute()
            assert direct.values["distance"] == pytest.approx(frechet_distance(*exact), rel=1e-6)
            output = tmp_path / f"{name}.safetensors"
            assert main([place, str(output), "--features", name]) == 0
            own = {} if name == "pixels" else {"pca": {"training": place}}
            evaluation = Evaluation([f"frechet:{name}"], Reference.of(output), features=own)
            evaluation.update(samples)
            assert evaluation.compute()[0].values == pytest.approx(direct.values)
            assert evaluation.compute()[0].features == direct.features


def test_axes_beside_statistics_say_what_to_do(written):
    with pytest.raises(InputError, match=r"nothing to fit the feature space pca on.*--option pca.training="):
        Evaluation(["frechet:pca"], Reference.of(written))
    with pytest.raises(InputError, match="got images without labels for digits-cnn.*set digits-cnn.training"):
        Evaluation(["frechet:digits-cnn"], Reference.of(written.with_suffix(".npz")))
    with pytest.raises(InputError, match="got no shape for pixels.*set pixels.shape"):
        features.build("pixels")
    with pytest.raises(InputError, match="expected images: a data set by name"):
        features.build("pca", training=str(written))


# --- ADM's ----------------------------------------------------------------------------------------------------------


FULL: dict[str, int] = {"features": 2048, "spatial": 2023, "logits": 3}


def adm(path, **changes):
    """A reference as ADM publishes them, of a few images, with low-rank covariances."""
    generator = np.random.default_rng(0)
    arrays = {}
    for mean, covariance, size in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        factor = generator.normal(size=(size, 3))
        arrays |= {mean: generator.normal(size=size), covariance: factor @ factor.T}
    arrays["arr_0"] = drawn(12).permute(0, 2, 3, 1).numpy()
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_adms_reference_gives_its_own_statistics(tmp_path):
    arrays = adm(tmp_path / "adm.npz")
    reference, space = Reference.of(tmp_path / "adm.npz"), Projected(sizes=FULL)
    assert isinstance(reference, AdmReference) and reference.shape == (3, 7, 5)
    for output, mean, covariance in (("features", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        found = reference.statistics(space, output)
        assert np.array_equal(found.mean, arrays[mean]) and np.array_equal(found.covariance, arrays[covariance])
        assert found.count is None
    vectors = reference.vectors(space, "features", 10_000)
    order = torch.from_numpy(Draws(0).permutation("reference vectors", 12))
    assert torch.equal(vectors, space(drawn(12)[order]))
    assert reference.doubts(space) == ()
    assert "published weights" in reference.doubts(Projected(sizes=FULL, verified=False))[0]


def test_adms_reference_refuses_other_spaces(tmp_path):
    adm(tmp_path / "adm.npz", arr_0=None, mu_s=None)
    reference = Reference.of(tmp_path / "adm.npz")
    with pytest.raises(DataError, match="expected features of pca"):
        reference.statistics(features.build("pca", training=data.build("digits")), "features")
    with pytest.raises(DataError, match="with features of inception, expected spatial"):
        reference.statistics(Projected(sizes=FULL), "spatial")
    with pytest.raises(DataError, match="without images arr_0"):
        reference.vectors(Projected(sizes=FULL), "features")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mu=np.zeros(192)), r"mu of shape \(192,\) in .*expected \(2048,\); it is of another feature space"),
        (dict(sigma=np.zeros((2048, 2))), r"sigma of shape \(2048, 2\)"),
        (dict(sigma=np.zeros((2049, 2048))), r"sigma of .* bytes in .*another feature space, or forged"),
        (dict(mu=np.full(2048, np.nan)), "NaN or infinite values in features"),
        (dict(sigma=np.triu(np.ones((2048, 2048)))), "features of .* that is not symmetric"),
        (dict(sigma=np.diag([-1.0] + [1.0] * 2047)), "features of .* with a negative eigenvalue"),
        (dict(mu=np.zeros(2048, np.int64)), "mu of .*of type int64"),
        (dict(mu=np.array([None] * 9)), "mu of .*type object"),
    ],
)
def test_adms_reference_of_another_form(changes, message, tmp_path):
    adm(tmp_path / "adm.npz", **changes)
    with pytest.raises(DataError, match=message) as caught:
        Reference.of(tmp_path / "adm.npz").statistics(Projected(sizes=FULL), "features")
    assert "adm.npz" in str(caught.value)


def test_adms_references_that_are_forged(tmp_path):
    """A header that tells more than the archive holds; nothing of that size is made."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    path = tmp_path / "adm.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(DataError, match="truncated or forged"):
        Reference.of(path).statistics(Projected(sizes=FULL), "features")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"adm.npz, which is no .npz of plain arrays"):
        Reference.of(path)


class Large(Projected):
    def __init__(self, unverified: bool = False):
        super().__init__(sizes=FULL)


def test_adms_form_is_written_as_adm_reads_it(monkeypatch, tmp_path, capsys):
    """With numpy alone, as ADM's evaluator does: moments of all images, and some of them as uint8 NHWC."""
    entry = features.registry.entry("inception")
    monkeypatch.setitem(features.registry._entries, "inception", type(entry)("inception", Large))
    images, space = drawn(23), Projected(sizes=FULL)
    write_images(tmp_path / "real.npz", images)
    assert main([str(tmp_path / "real.npz"), str(tmp_path / "adm.npz"), "--adm", "--kept", "9"]) == 0
    with np.load(tmp_path / "adm.npz", allow_pickle=False) as arrays:
        for output, mean, covariance in (("features", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            expected = plain(space, images, output)
            assert np.allclose(arrays[mean], expected[0]) and np.allclose(arrays[covariance], expected[1])
        kept = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
    order = sorted(Draws(0).permutation("reference vectors", 23)[:9])
    assert torch.equal(kept, images[torch.tensor(order)])
    with zipfile.ZipFile(tmp_path / "adm.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert Samples.of(tmp_path / "adm.npz").count == 9
    with pytest.raises(InputError, match="expected those of inception"):
        write_adm(tmp_path / "x.npz", collect(Projected(), iter([images]), 23, 1), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "OUT.npz"], "expected a file .safetensors in a folder that is there"),
        (["digits", "none/OUT.safetensors"], "in a folder that is there"),
        (["digits", "OUT.safetensors", "split"], "got 'split', expected entry=value"),
        (["digits", "OUT.safetensors", "split=[1"], "whose value is no YAML"),
        (["digits", "OUT.safetensors", "half=train"], "has no option 'half'"),
        (["nothing", "OUT.safetensors"], "neither a data set"),
        (["digits", "OUT.safetensors", "--features", "digits-cnn", "--weights", "x"], "has no option 'weights'"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_command_leaves_no_file(registered, monkeypatch, tmp_path, capsys):
    write_images(tmp_path / "real.npz", drawn())
    monkeypatch.setattr(Moments, "state", lambda self: {"count": torch.tensor(0), "mean": 3})
    with pytest.raises(Exception):  # noqa: B017  # whatever safetensors raises
        main([str(tmp_path / "real.npz"), str(tmp_path / "out.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


def test_references_that_do_not_suffice_are_refused_before_any_sample(written, tmp_path):
    """Nothing of what is refused here is an image run through a network."""
    adm(tmp_path / "adm.npz", arr_0=None, mu_s=None)
    images = Reference.of(write_images(tmp_path / "few.npz", drawn(4)))
    ours, adms = Reference.of(written), Reference.of(tmp_path / "adm.npz")
    full, other = Projected(sizes=FULL), Projected(sha256="cd" * 32)
    small = {"name": "kid", "size": 21, "references": 21}
    for reference, space, asked, message in (
        (ours, other, "fid", "real.safetensors with statistics of another feature space"),
        (ours, other, "precision-recall", "real.safetensors with statistics of another feature space"),
        (ours, Projected(), small, "real.safetensors with fewer than 21 vectors"),
        (adms, Projected(), "fid", r"adm.npz, .*another feature space|mu of .* in .*adm.npz"),
        (adms, full, "sfid", "adm.npz with features of inception, expected spatial"),
        (adms, full, "precision-recall", "adm.npz without images arr_0"),
        (images, Projected(), small, "got a reference of 4 images, expected at least 21"),
    ):
        named = {"name": asked} if isinstance(asked, str) else asked
        with pytest.raises(DataError, match=message):
            Evaluation([{**named, "features": space}], reference).expects(50, labelled=False)
        assert not space.images
    Evaluation([{"name": name, "features": full} for name in ("fid",)], adms).expects(50, labelled=False)
    names = ("fid", "sfid", "precision-recall")
    Evaluation([{"name": name, "features": Projected()} for name in names], ours).expects(50, labelled=False)


def test_references_of_metrics_that_need_halves(space, tmp_path):
    reference = Reference.of(write_images(tmp_path / "real.npz", drawn()))
    with pytest.raises(InputError, match="which needs the halves train and held-out"):
        metrics.build("memorisation", real=reference)


def test_images_that_are_cropped_and_prepared_ones(space, tmp_path, capsys):
    """A folder of images of many sizes by the data set that crops them, and the same packed as pixels."""
    from pathline.data.crop import centre_crop
    from pathline.data.prepare.command import main as prepare

    source = tmp_path / "source"
    levels = []
    for i in range(5):
        image = Image.fromarray(drawn(1, i)[0].permute(1, 2, 0).numpy()).resize((20 + i, 30))
        (source / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        image.save(source / f"class-{i % 2}" / f"{i}.png")
        levels.append(torch.from_numpy(np.array(centre_crop(image, 16))).permute(2, 0, 1))
    expected = plain(space, torch.stack(levels))
    packed = tmp_path / "packed"
    assert prepare([str(source), str(packed), "--resolution", "16", "--accelerator", "cpu"]) == 0
    for named in ({"name": "images", "path": str(source), "resolution": 16}, packed):
        reference = Reference.of(named)
        assert reference.shape == (3, 16, 16) and reference.num_classes == 2
        matches(reference.statistics(space, "features"), expected)
    with pytest.raises(DataError, match=r"expected one size|of one size"):
        Reference.of(source).statistics(space, "features")
