"""``sample.py`` on files that other programs released: whose clock, which weights, what is asked, what is written."""

from __future__ import annotations

import argparse
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pathline import Draws, backbones, weights
from pathline.evaluate import main as evaluate
from pathline.sample import main

HEUN = ("solver.name=heun", "solver.steps=3", "sample.count=5", "sample.seed=3")


@pytest.fixture
def released(parity, tmp_path):
    """Write a stored case as its authors' training program would: the average beside the model and its arguments."""

    def write(name, prefix="module."):
        state = parity(name).state
        content = {
            "model": {f"{prefix}{key}": value * 1.01 for key, value in state.items()},
            "ema": {f"{prefix}{key}": value for key, value in state.items()},
            "args": argparse.Namespace(model="XL"),
        }
        torch.save(content, tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt"

    return write


def drawn(path, out, *words):
    assert main([str(path), f"sample.output={out}", *words]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    with np.load(out, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["arr_0"]), arrays["arr_1"].tolist(), record


@torch.no_grad()
def by_hand(velocity, labels, shape, steps, seed):
    """Heun's method written out."""
    x = Draws(seed).normal("initial noise", range(len(labels)), shape)
    for i in range(steps):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        first = velocity(x, torch.full((len(x),), t))
        second = velocity(x + (t_next - t) * first, torch.full((len(x),), t_next))
        x = x + (t_next - t) * (first + second) / 2
    return x


def network(state, name="sit", **options):
    """The network alone, on its authors' clock."""
    sizes = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, num_heads=4, num_classes=10)
    made = backbones.build(name, **sizes, **options)
    made.load_state_dict(weights.convert(state, "sit" if name == "sit" else name))
    return made


@pytest.mark.parametrize("scale", [1, 2.5])
def test_sit_from_its_file(scale, released, parity, tmp_path):
    """Latents as they are, on SiT's clock turned round, sigma channels dropped, guided on all channels."""
    case, labels = parity("sit_sigma"), torch.arange(5)
    net = network(case.state, depth=case.description["config"]["depth"])
    path = released("sit_sigma")
    words = ("weights.family=sit", "backbone.num_heads=4", f"guidance.0.scale={scale}")
    x, said, record = drawn(path, tmp_path / "out.npz", *HEUN, *words)

    def velocity(x, t):
        given, null = (-net(x, 1 - t, label=label) for label in (labels, torch.full_like(labels, 10)))
        return null + scale * (given - null)

    assert x.dtype == torch.float32 and said == labels.tolist()
    assert torch.allclose(x, by_hand(velocity, labels, (4, 8, 8), 3, 3), atol=2e-5, rtol=0)
    assert not (tmp_path / "out.png").exists() and record["values"] == "latents, float32 (N, C, H, W)"
    assert record["checkpoint"] == {
        "family": "sit",
        "key": "ema",
        "defects": [],
        "latent_scale": None,
        "file": "sit_sigma.pt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert record["data"] == {"name": "synthetic", "shape": [4, 8, 8], "num_classes": 10, "count": 1024, "seed": 0}
    assert record["configuration"]["backbone"]["name"] == "reversed-clock" and record["nfe"] == 6


def test_repa_and_the_other_weights_of_a_file(released, parity, tmp_path):
    """REPA's clock is ours; ``weights.key`` reads what was not averaged."""
    case, labels = parity("sit"), torch.arange(5)
    path, drawn_by = released("sit", prefix="_orig_mod.module."), {}
    for key, factor in ((None, 1.0), ("ema", 1.0), ("model", 1.01)):
        state = {name: value * factor for name, value in case.state.items()}
        net = network(state, depth=case.description["config"]["depth"])
        words = ("weights.family=repa", "backbone.num_heads=4", *([f"weights.key={key}"] if key else []))
        if key == "model":  # its table of positions is 1 % off, as no program's is
            assert main([str(path), *words]) == 2
            continue
        x, _, record = drawn(path, tmp_path / "out.npz", *HEUN, *words)
        wanted = by_hand(lambda x, t, net=net: net(x, t, label=labels), labels, (4, 8, 8), 3, 3)
        assert torch.allclose(x, wanted, atol=2e-5, rtol=0) and record["checkpoint"]["key"] == "ema"
        drawn_by[key] = x
    torch.save({"model": case.state, "state_dict": {k: v.half() for k, v in case.state.items()}}, tmp_path / "b.pt")
    words = ("weights.family=repa", "backbone.num_heads=4", "weights.key=model")
    x, _, record = drawn(tmp_path / "b.pt", tmp_path / "out.npz", *HEUN, *words)
    assert torch.equal(x, drawn_by["ema"]) and record["checkpoint"]["key"] == "model"


def test_dit_from_its_file(released, parity, tmp_path):
    """Euler's method on ``vp``, the noise asked at the step that is as noisy."""
    case, labels = parity("sit_sigma"), torch.arange(5)
    net = network(case.state, depth=case.description["config"]["depth"])
    words = ("weights.family=dit", "backbone.num_heads=4", "solver.name=euler", *HEUN[1:])
    x, _, record = drawn(released("sit_sigma"), tmp_path / "out.npz", *words)
    level = -np.log(1 - np.linspace(1e-4, 0.02, 1000)).cumsum()
    wanted = Draws(3).normal("initial noise", range(5), (4, 8, 8)).double()
    for t, t_next in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        total, beta = 0.1 * t + 19.9 / 2 * t**2, 0.1 + 19.9 * t
        step = torch.full((5,), float(np.interp(total, level, np.arange(1000))))
        with torch.no_grad():
            noise = net(wanted.float(), step, label=labels).double()
        sigma = (1 - np.exp(-total)) ** 0.5
        velocity = -0.5 * beta * wanted + 0.5 * beta / sigma * noise  # of the probability flow: f·x − ½β·score
        wanted = wanted + (t_next - t) * velocity
    assert torch.allclose(x.double(), wanted, atol=1e-3 * float(wanted.std()), rtol=0)
    assert record["configuration"]["interpolant"]["name"] == "vp"
    assert record["configuration"]["objective"]["name"] == "noise"


def test_deepflow_from_its_file(released, parity, tmp_path):
    """What the weights do not tell is given; the clamp is one of what its authors depend on by name."""
    path, labels, results = released("deepflow_2t_ssl"), torch.arange(5), []
    config = parity("deepflow_2t_ssl").description["config"]
    for words, clamp in (
        (("backbone.clamp_gap=true",), True),
        (("weights.defects=[clamped-gap]",), True),
        (("backbone.clamp_gap=false",), False),
    ):
        net = network(
            parity("deepflow_2t_ssl").state,
            "deepflow",
            depth=config["depth"],
            cuts=config["df_idxs"],
            acceleration_width=40,
            align_dims=config["z_dims"],
            align_width=40,
            clamp_gap=clamp,
        )
        x, _, record = drawn(path, tmp_path / "out.npz", *HEUN, "backbone.num_heads=4", *words)
        wanted = by_hand(lambda x, t, net=net: net(x, t, label=labels), labels, (4, 8, 8), 3, 3)
        assert torch.allclose(x, wanted, atol=2e-5, rtol=0)
        assert record["configuration"]["backbone"]["clamp_gap"] is clamp
        results.append(x)
    assert torch.equal(results[0], results[1])
    clamp, cuts = "backbone.clamp_gap=false", "backbone.cuts=[1]"
    moved, _, record = drawn(path, tmp_path / "out.npz", *HEUN, "backbone.num_heads=4", clamp, cuts)
    assert record["configuration"]["backbone"]["cuts"] == [1] and not torch.allclose(moved, results[2], atol=0.01)


def test_defects_by_name(released, parity, tmp_path):
    """Guidance of three channels leaves the fourth to the conditional model; labels at random; none unless named."""
    path = released("sit")
    words = ("weights.family=sit", "backbone.num_heads=4", "solver.name=euler", "solver.steps=1", "sample.count=40")
    scale = "guidance.0.scale=3"
    plain, labels, record = drawn(path, tmp_path / "a.npz", *words, scale)
    unguided, _, _ = drawn(path, tmp_path / "b.npz", *words)
    three, same, told = drawn(path, tmp_path / "c.npz", *words, scale, "weights.defects=[three-channel-guidance]")
    assert same == labels == [i % 10 for i in range(40)] and record["guidance"][0]["channels"] is None
    assert torch.allclose(three[:, :3], plain[:, :3], atol=1e-5)
    assert torch.allclose(three[:, 3], unguided[:, 3], atol=1e-5)
    assert float((plain[:, 3] - unguided[:, 3]).abs().max()) > 0.1
    assert told["guidance"][0]["channels"] == 3 and told["checkpoint"]["defects"] == ["three-channel-guidance"]
    _, random, told = drawn(path, tmp_path / "d.npz", *words, "weights.defects=[random-labels]")
    assert random != labels and told["label_law"] == "random"
    assert main([str(path), *words, scale, "weights.defects=[null-label-1000]"]) == 2  # there are ten classes


def test_a_null_label_of_1000_is_a_class_of_more(tmp_path, parity):
    """With 1,200 classes the authors' null label is class 1000: the defect guides by that."""
    case = parity("sit")
    state = {**case.state, "y_embedder.embedding_table.weight": torch.randn(1201, 48)}
    torch.save(state, tmp_path / "a.pt")
    words = ("weights.family=repa", "backbone.num_heads=4", *HEUN, "solver.steps=1", "guidance.0.scale=3")
    x, _, _ = drawn(tmp_path / "a.pt", tmp_path / "b.npz", *words, "weights.defects=[null-label-1000]")
    named, _, _ = drawn(tmp_path / "a.pt", tmp_path / "b.npz", *words, "guidance.0.null=1000")
    usual, _, _ = drawn(tmp_path / "a.pt", tmp_path / "b.npz", *words)
    assert torch.equal(x, named) and not torch.allclose(x, usual, atol=0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_written_as_pixels(channels, tmp_path):
    made = backbones.build(
        "sit", input_size=6, patch_size=2, in_channels=channels, hidden_size=12, depth=1, num_heads=3, num_classes=2
    )
    torch.save(weights.convert(made.state_dict(), to="sit"), tmp_path / "a.pt")
    words = ("weights.family=sit", "backbone.num_heads=3", *HEUN)
    x, _, record = drawn(tmp_path / "a.pt", tmp_path / "out.npz", *words)
    assert x.shape == (5, 6, 6, channels) and x.dtype == torch.uint8 and "round" in record["rounding"]
    assert np.asarray(Image.open(tmp_path / "out.png")).ndim == (2 if channels == 1 else 3)


def test_safetensors_with_a_word_for_the_family(parity, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file(parity("sit").state, tmp_path / "a.safetensors")
    words = ("backbone.num_heads=4", *HEUN)
    drawn(tmp_path / "a.safetensors", tmp_path / "out.npz", "weights.family=sit", *words)
    capsys.readouterr()
    assert main([str(tmp_path / "a.safetensors"), *HEUN]) == 2  # one of ours has a JSON file beside it
    assert "belong together" in capsys.readouterr().err


def test_names_of_default_outputs_tell_drawings_apart(released, tmp_path):
    """By file, family, key, defects, and whatever else makes another network."""
    path, words = released("sit"), ("backbone.num_heads=4", *HEUN, "solver.steps=1", "sample.count=2")
    sit, repa = "weights.family=sit", "weights.family=repa"
    drawings = [
        ("sit-sit-ema", [sit]),
        ("sit-repa-ema", [repa]),
        ("other-repa-ema", [repa]),
        ("sit-sit-ema", [sit, "backbone.time_scale=1000"]),
        ("sit-sit-ema", [sit, "backbone.num_heads=2"]),
        ("sit-sit-ema-random-labels", [sit, "weights.defects=[random-labels]"]),
    ]
    (tmp_path / "other.pt").write_bytes(path.read_bytes())
    for begin, own in drawings:
        before = {*tmp_path.glob("*.npz")}
        assert main([str(tmp_path / f"{begin.partition('-')[0]}.pt"), *words, *own]) == 0
        (made,) = {*tmp_path.glob("*.npz")} - before
        assert re.fullmatch(rf"samples-{begin}-heun-1-seed-3-[0-9a-f]{{8}}\.npz", made.name)
        assert main([str(tmp_path / f"{begin.partition('-')[0]}.pt"), *words, *own]) == 0  # the same name again
    assert len([*tmp_path.glob("*.npz")]) == len(drawings)


def test_the_key_stands_in_the_name(parity, tmp_path):
    state = parity("sit").state
    torch.save({"model": state, "ema": state}, tmp_path / "a.pt")
    for key in ("model", "ema"):
        words = ("weights.family=sit", f"weights.key={key}", "backbone.num_heads=4", "solver.steps=1", "sample.count=2")
        assert main([str(tmp_path / "a.pt"), *words]) == 0
    assert [path.name.split("-")[3] for path in sorted(tmp_path.glob("*.npz"))] == ["ema", "model"]


def test_training_goes_on_from_released_weights(released, parity, tmp_path):
    """Converted once, as training starts from weights of ours: after a step of no length samples are the file's."""
    from safetensors.torch import save_file

    from pathline.train import main as train

    made = weights.network(weights.read(released("sit")), "sit", num_heads=4)
    save_file(made.state_dict(), tmp_path / "start.safetensors")
    told, _, record = drawn(
        tmp_path / "sit.pt", tmp_path / "a.npz", *HEUN, "weights.family=sit", "backbone.num_heads=4"
    )
    c = {name: record["configuration"][name] for name in ("data", "backbone", "objective")}
    (tmp_path / "c.yaml").write_text(json.dumps({**c, "train": {"steps": 1, "folder": str(tmp_path / "run")}}))
    words = ["train.global_batch=2", "optim.lr=1e-12", f"train.initialize_from={tmp_path / 'start.safetensors'}"]
    assert train([str(tmp_path / "c.yaml"), *words, "train.accelerator=cpu"]) == 0
    x, _, _ = drawn(tmp_path / "run", tmp_path / "b.npz", *HEUN)
    assert torch.allclose(x, told, atol=1e-4)


def test_latents_are_not_measured_as_images(released, tmp_path, capsys):
    drawn(released("sit"), tmp_path / "out.npz", "weights.family=sit", "backbone.num_heads=4", *HEUN)
    capsys.readouterr()
    assert evaluate([str(tmp_path / "out.npz")]) == 2
    assert "expected uint8 (N, H, W, C)" in capsys.readouterr().err
