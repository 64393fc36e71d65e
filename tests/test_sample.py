"""``sample.py``: what it writes, that a sample depends on (seed, number) alone, and what it refuses."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pathline
from pathline import Draws, Flow, backbones, interpolants, solvers
from pathline.evaluate import main as evaluate
from pathline.sample import main
from pathline.train import main as train
from pathline.training.pictures import to_uint8

CONFIGURATION = """
data: digits
backbone: {name: sit, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 2, num_heads: 3,
           num_classes: 10}
objective: velocity
optim: {lr: 1e-2}
ema: {decay: 0.5, lengths: [0.2]}
solver: {name: euler, steps: 3}
train: {steps: 6, global_batch: 5, folder: runs/x, accelerator: cpu}
checkpoint: {every: 3}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "c.yaml").write_text(CONFIGURATION)
    assert train([str(folder / "c.yaml"), f"train.folder={folder / 'run'}"]) == 0
    return folder / "run"


def drawn(run, out, *words):
    assert main([str(run), f"sample.output={out}", *words]) == 0
    with np.load(out, allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def by_hand(run, labels, seed, guidance_scale=None, average="ema"):
    """Heun's method with 2 steps, written out, on the saved averages."""
    network = backbones.build(
        "sit", input_size=8, patch_size=4, in_channels=1, hidden_size=12, depth=2, num_heads=3, num_classes=10
    )
    network.load_state_dict(load_file(run / "checkpoints" / "step-000000006" / f"{average}.safetensors"))

    @torch.no_grad()
    def velocity(x, t):
        given = network(x, torch.full((len(x),), t), label=labels)
        if guidance_scale is None:
            return given
        null = network(x, torch.full((len(x),), t), label=torch.full_like(labels, 10))
        return null + guidance_scale * (given - null)

    x = Draws(seed).normal("initial noise", range(len(labels)), (1, 8, 8))
    for t, t_next in ((1.0, 0.5), (0.5, 0.0)):
        first = velocity(x, t)
        second = velocity(x + (t_next - t) * first, t_next)
        x = x + (t_next - t) * (first + second) / 2
    return x


HEUN = ("solver.name=heun", "solver.steps=2", "sample.count=23", "sample.seed=3")


@pytest.mark.parametrize(("words", "scale"), [((), None), (("guidance.0.scale=2.5",), 2.5)])
def test_samples_are_those_written_out_by_hand(words, scale, run, tmp_path):
    images, labels = drawn(run, tmp_path / "out.npz", *HEUN, *words)
    expected_labels = torch.arange(23) % 10
    x = by_hand(run, expected_labels, 3, scale)
    levels = np.rint(127.5 * x.clamp(-1, 1).double().numpy() + 127.5).transpose(0, 2, 3, 1)
    assert images.dtype == np.uint8 and images.shape == (23, 8, 8, 1)
    assert labels.dtype == np.int64 and labels.tolist() == expected_labels.tolist()
    difference = np.abs(images.astype(float) - levels)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # a level where rounding falls on a half
    assert images.std() > 10


def test_an_average_is_chosen_by_name(run, tmp_path, capsys):
    """Its own weights draw, its name and hash are written down, and the first is the default."""
    labels, drawn_by = torch.arange(23) % 10, {}
    for average, words in (("ema", ()), ("ema", ("sample.average=ema",)), ("ema-0.200", ("sample.average=ema-0.200",))):
        images, _ = drawn(run, tmp_path / "out.npz", *HEUN, *words)
        levels = np.rint(127.5 * by_hand(run, labels, 3, average=average).clamp(-1, 1).double().numpy() + 127.5)
        assert np.abs(images.astype(float) - levels.transpose(0, 2, 3, 1)).max() <= 1
        weights = (run / "checkpoints" / "step-000000006" / f"{average}.safetensors").read_bytes()
        assert json.loads((tmp_path / "out.json").read_text())["checkpoint"] == {
            "name": "step-000000006",
            "average": average,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        drawn_by[average] = images.astype(int)
    assert np.abs(drawn_by["ema"] - drawn_by["ema-0.200"]).max() > 3  # or the name would make no difference
    assert main([str(run), "sample.average=ema-0.2"]) == 2
    assert "sample.average: got 'ema-0.2'; did you mean 'ema-0.200'?" in capsys.readouterr().err


@pytest.mark.parametrize("solver", ["heun", "euler-maruyama"])
def test_sample_i_depends_on_seed_and_i_alone(solver, run, tmp_path):
    """Other batches, another count: the same images, also where the solver draws noise on the way."""
    words = (f"solver.name={solver}", "solver.steps=3")
    many, labels = drawn(run, tmp_path / "a.npz", *words, "sample.count=23", "sample.batch=23")
    for count, batch in ((23, 5), (13, 7), (1, 1)):
        some, theirs = drawn(run, tmp_path / "b.npz", *words, f"sample.count={count}", f"sample.batch={batch}")
        assert np.abs(many[:count].astype(int) - some).max() <= 1
        assert (labels[:count] == theirs).all()
    other, _ = drawn(run, tmp_path / "c.npz", *words, "sample.count=23", "sample.seed=1")
    assert np.abs(many.astype(int) - other).max() > 50


def test_label_laws(run, tmp_path):
    _, balanced = drawn(run, tmp_path / "a.npz", "sample.count=30", "solver.steps=1")
    assert np.bincount(balanced).tolist() == [3] * 10
    _, law = drawn(run, tmp_path / "b.npz", "sample.count=500", "solver.steps=1", "sample.labels=random")
    counts = np.bincount(law, minlength=10)
    assert len(counts) == 10 and counts.std() > 0
    assert ((counts - 50) ** 2 / 50).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    _, again = drawn(run, tmp_path / "c.npz", "sample.count=200", "solver.steps=1", "sample.labels=random")
    assert (again == law[:200]).all()


def test_labels_by_name(run, tmp_path):
    """One class for all, a list repeated, and none: the null label, which no file names."""
    for words, expected in (("7", [7] * 5), ("[3, 1]", [3, 1, 3, 1, 3])):
        images, labels = drawn(run, tmp_path / "a.npz", "sample.count=5", "solver.steps=1", f"sample.labels={words}")
        assert labels.tolist() == expected
    assert main([str(run), *HEUN, "sample.labels=none", f"sample.output={tmp_path / 'b.npz'}"]) == 0
    with np.load(tmp_path / "b.npz") as arrays:
        assert arrays.files == ["arr_0"]
        images = arrays["arr_0"]
    x = by_hand(run, torch.full((23,), 10), 3)
    assert np.abs(images[..., 0] - (127.5 * x.clamp(-1, 1) + 127.5).round()[:, 0].numpy()).max() <= 1
    assert evaluate([str(tmp_path / "b.npz")]) == 0


def test_the_record_says_how_it_was_drawn(run, tmp_path, capsys):
    out = tmp_path / "deep" / "out.npz"
    drawn(run, out, *HEUN, "guidance.0.scale=1.5")
    printed = capsys.readouterr().out
    assert "NFE 4" in printed and "CPU s" in printed and str(out) in printed
    record = json.loads(out.with_suffix(".json").read_text())
    weights = (run / "checkpoints" / "step-000000006" / "ema.safetensors").read_bytes()
    assert record["checkpoint"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["checkpoint"]["name"] == "step-000000006" and record["checkpoint"]["average"] == "ema"
    assert record["solver"]["name"] == "heun" and record["solver"]["steps"] == 2 and record["nfe"] == 4
    assert record["guidance"][0]["scale"] == 1.5 and record["seed"] == 3 and record["count"] == 23
    assert record["label_law"] == "balanced" and record["version"] == pathline.__version__
    assert record["data"] == {"name": "digits", "split": "train"} and "round" in record["rounding"]
    assert record["configuration"]["train"]["steps"] == 6


def test_the_picture_has_a_row_a_class_and_ten_a_row(run, tmp_path):
    out = tmp_path / "out.npz"
    images, labels = drawn(run, out, "sample.count=130", "solver.steps=1")
    picture = np.asarray(Image.open(out.with_suffix(".png")))
    assert picture.shape == (4 * 91, 4 * 91)
    for label, column in ((0, 0), (3, 7), (9, 9)):
        top, left = 4 * (1 + 9 * label), 4 * (1 + 9 * column)
        shown = picture[top : top + 32 : 4, left : left + 32 : 4]
        assert (shown == images[labels == label][column, :, :, 0]).all()


def test_an_older_checkpoint_and_the_default_output(run):
    path = run / "checkpoints" / "step-000000003"
    assert main([str(path), "sample.count=7"]) == 0
    assert main([str(path), "sample.count=7", "sample.seed=4", "guidance.0.scale=1.5", "solver.steps=2"]) == 0
    assert main([str(path), "sample.count=7", "sample.average=ema-0.200"]) == 0
    names = ("samples-euler-3-seed-0", "samples-euler-2-classifier-free-1.5-seed-4", "samples-euler-3-ema-0.200-seed-0")
    for name in names:
        (told,) = run.glob(f"{name}-????????.json")
        assert json.loads(told.read_text())["checkpoint"]["name"] == "step-000000003"
        assert told.with_suffix(".npz").exists()


def test_a_damaged_newest_checkpoint_is_left_aside_aloud(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "step-000000006" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    drawn(copy, tmp_path / "out.npz", "sample.count=7")
    said = capsys.readouterr()
    assert "step-000000006" in said.out + said.err and "ema.safetensors of" in said.out + said.err
    assert json.loads((tmp_path / "out.json").read_text())["checkpoint"]["name"] == "step-000000003"
    assert main([str(copy / "checkpoints" / "step-000000006")]) == 2
    assert "ema.safetensors of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1"], "got 'optim.lr=1' for a trained model"),
        (["backbone.depth=3"], "got 'backbone.depth=3' for a trained model"),
        (["sample.cout=3"], "sample.cout: unknown entry; did you mean 'count'?"),
        (["solver.name=huen"], "solver.name: unknown solver 'huen'; did you mean 'heun'?"),
        (["sample.labels=[0, 10]"], "sample.labels: got [0, 10], expected classes from 0 to 9"),
        (["sample.labels=[]"], "sample.labels: got []"),
        (["sample.count=0"], "sample.count: got 0"),
        (["sample.output=out.png"], "expected a name that ends in .npz"),
    ],
)
def test_wrong_input(words, said, run, capsys):
    assert main([str(run), *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed and "Traceback" not in printed


def test_nothing_there(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert f"got no file or folder at {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_every_byte_comes_back():
    """x = (b - 127.5)/127.5 is the middle of level b: all 256 levels survive; what lies outside is clamped."""
    levels = torch.arange(256, dtype=torch.float64)
    x = ((levels - 127.5) / 127.5).float().reshape(64, 1, 2, 2)
    assert to_uint8(x).reshape(-1).tolist() == list(range(256))
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).reshape(3, 1, 1, 1)).reshape(-1).tolist() == [0, 255, 128]


@pytest.fixture(scope="module")
def small(run, tmp_path_factory):
    """A weaker model: half as deep, trained for three steps."""
    folder = tmp_path_factory.mktemp("weak")
    (folder / "c.yaml").write_text(CONFIGURATION.replace("depth: 2", "depth: 1"))
    words = [f"train.folder={folder / 'run'}", "train.steps=3", "train.seed=5"]
    assert train([str(folder / "c.yaml"), *words]) == 0
    return folder / "run"


def test_autoguidance_by_a_weaker_run(run, small, tmp_path):
    """r + w(m − r) of both runs' averages, by Heun's method written out; a folder and a checkpoint name the same."""
    networks = []
    for folder, depth, step in ((run, 2, 6), (small, 1, 3)):
        sizes = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=12, depth=depth, num_heads=3)
        networks.append(backbones.build("sit", **sizes, num_classes=10))
        networks[-1].load_state_dict(load_file(folder / "checkpoints" / f"step-00000000{step}" / "ema.safetensors"))
    labels = torch.arange(23) % 10

    @torch.no_grad()
    def velocity(x, t):
        m, r = (network(x, torch.full((23,), t), label=labels) for network in networks)
        return r + 2.5 * (m - r)

    x = Draws(3).normal("initial noise", range(23), (1, 8, 8))
    for t, t_next in ((1.0, 0.5), (0.5, 0.0)):
        first = velocity(x, t)
        x = x + (t_next - t) * (first + velocity(x + (t_next - t) * first, t_next)) / 2
    levels = np.rint(127.5 * x.clamp(-1, 1).double().numpy() + 127.5).transpose(0, 2, 3, 1)
    checkpoint = small / "checkpoints" / "step-000000003"
    for weak in (small, checkpoint):
        words = (*HEUN, "guidance.0.name=autoguidance", f"guidance.0.weak={weak}", "guidance.0.scale=2.5")
        images, _ = drawn(run, tmp_path / "out.npz", *words, "sample.batch=7")
        difference = np.abs(images.astype(float) - levels)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["nfe"] == 8 and record["guidance"][0]["weak"] == str(checkpoint)
        weights = (checkpoint / "ema.safetensors").read_bytes()
        assert record["weak_checkpoints"] == [
            {"name": "step-000000003", "average": "ema", "weights_sha256": hashlib.sha256(weights).hexdigest()}
        ]


def test_one_scale_a_sample_has_a_name_of_its_own(run):
    words = ("sample.count=3", "solver.steps=2", "guidance.0.scale=[1.5, 4, 2]")
    assert main([str(run), *words]) == 0
    assert len(list(run.glob("samples-euler-2-classifier-free-1.5-to-4-seed-0-????????.npz"))) == 1


def test_weak_models_that_do_not_fit(run, small, tmp_path, capsys):
    auto = ("guidance.0.name=autoguidance", "guidance.0.scale=2")
    (tmp_path / "c.yaml").write_text(
        CONFIGURATION.replace("objective: velocity", "interpolant: cosine\nobjective: velocity")
    )
    assert train([str(tmp_path / "c.yaml"), f"train.folder={tmp_path / 'run'}", "train.steps=1"]) == 0
    for words, said in (
        (auto, "guidance.0.weak: missing, 'autoguidance' needs it"),
        ((*auto, f"guidance.0.weak={tmp_path / 'nowhere'}"), "guidance.0.weak: got"),
        ((*auto, f"guidance.0.weak={tmp_path / 'run'}"), "the Trigonometric path beside one on the Linear path"),
    ):
        assert main([str(run), *words]) == 2
        printed = capsys.readouterr().err
        assert said in printed and "Traceback" not in printed


def test_the_network_is_that_of_the_library(run):
    """A user can load the weights without the scripts."""
    network = backbones.build(
        "sit", input_size=8, patch_size=4, in_channels=1, hidden_size=12, depth=2, num_heads=3, num_classes=10
    )
    network.load_state_dict(load_file(run / "checkpoints" / "step-000000006" / "ema.safetensors"))
    labels = torch.tensor([1, 7, 4])
    noise = Draws(3).normal("initial noise", range(3), (1, 8, 8))
    x = solvers.build("heun", steps=2)(Flow(network, interpolants.build("linear")), noise, label=labels, seed=0)
    assert torch.allclose(x, by_hand(run, labels, 3), atol=1e-5)
