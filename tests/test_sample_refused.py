"""``sample.py`` on files that other programs released: what is asked, what is refused, and with which words."""

from __future__ import annotations

import pytest
import torch

from pathline.sample import main

KNOWN = ("weights.family=sit", "backbone.num_heads=4")


@pytest.fixture
def released(parity, tmp_path):
    """Write the weights of a stored case as an average."""

    def write(name):
        torch.save({"ema": parity(name).state}, tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt"

    return write


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("sit", [], "the keys of sit, dit, repa, which differ in their clocks alone; name the family: weights.family"),
        ("sit", ["weights.family=sti"], "unknown weight family 'sti'; did you mean 'sit'?"),
        ("sit", ["weights.family=sit"], "give backbone.num_heads (no released model is 48 wide)"),
        ("sit", ["weights.famly=sit"], "weights.famly: unknown entry; did you mean 'family'?"),
        ("sit", ["weights.family=3"], "weights.family: "),
        ("sit", ["weights.family=sit", "weights.key=best"], "without weights 'best'"),
        ("sit", ["weights.family=deepflow"], "without what becomes refiners.0.acceleration.0.weight"),
        ("sit", ["optim.lr=1"], "got 'optim.lr=1' for a trained model"),
        ("sit", ["weights.family=sit", "backbone.num_heads=4", "backbone.depth=5"], "missing (20): blocks.3"),
        ("sit", ["weights.family=sit", "backbone.num_heads=4", "backbone.dept=5"], "has no such option; did you mean"),
        ("sit", ["weights.family=sit", "backbone.num_heads=5"], "the heads must divide the width"),
        ("sit", ["weights.family=sit", "backbone.num_heads=4", "data.shape=[4, 4, 4]"], "takes inputs of shape (4, 8"),
        ("deepflow_3t", [], "give backbone.num_heads (no released model is 48 wide), backbone.clamp_gap (true for"),
        ("deepflow_3t", ["weights.family=sit", "backbone.num_heads=4"], "missing (4): final_layer.adaLN_modulation"),
        ("sit", ["weights.family=repa", "weights.defects=[three-channel-guidance]"], "weights.defects: repa has no"),
        (
            "sit",
            ["weights.family=sit", "backbone.num_heads=4", "weights.defects=[three-channel-guidance]"],
            "got 'three-channel-guidance' without guidance",
        ),
        (
            "sit",
            ["weights.family=sit", "backbone.num_heads=4", "weights.defects=[random-labels]", "sample.labels=3"],
            "'random-labels' sets sample.labels to 'random', and it is given as 3; leave one out",
        ),
        (
            "deepflow_3t",
            ["backbone.num_heads=4", "weights.defects=[clamped-gap]", "backbone.clamp_gap=false"],
            "'clamped-gap' sets backbone.clamp_gap to True, and it is given as False",
        ),
    ],
)
def test_what_is_asked_and_refused(name, words, said, released, capsys):
    assert main([str(released(name)), *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed and "Traceback" not in printed


def test_a_hostile_file(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    torch.save({"ema": Trap()}, tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt"), "weights.family=sit"]) == 2
    assert "a.pt, which cannot be read as weights alone" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:200])
    assert main([str(tmp_path / "b.pt"), "weights.family=sit"]) == 2
    assert main([str(tmp_path / "c.pt"), "weights.family=sit"]) == 2


def refused(capsys, path, *words):
    assert main([str(path), *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("backbone.family=3", "backbone 'sit' has no such option"),
        ("backbone.state_dict=3", "backbone 'sit' has no such option"),
        ("backbone.backbone.x=3", "backbone 'sit' has no such option"),
        ("backbone.input_size=null", "backbone.backbone.input_size: got None; Input should be a valid integer"),
        ("backbone.input_size=8.5", "backbone.backbone.input_size: got 8.5; Input should be a valid integer"),
        ("backbone.input_size=[]", "backbone.backbone.input_size: got []"),
        ("backbone.input_size=1000000", "pos_embed (1, 16, 48), expected (1, 250000000000, 48)"),
        ("backbone.in_channels=null", "backbone.backbone.in_channels: got None; Input should be a valid integer"),
        ("backbone.num_classes=1000000000", "table.weight (11, 48), expected (1000000001, 48)"),
        ("backbone.depth=1000000", "entries for 1000000 blocks, too few"),
        ("backbone.hidden_size=10000000000", "options with which no network can be built"),
        ("backbone.mlp_ratio=1e30", "options with which no network can be built"),
        ("sample.average=ema", "sample.average: names an average of train.py's; name a file's weights by weights.key"),
        ("sample.average=bogus", "name a file's weights by weights.key"),
    ],
)
def test_words_that_fit_no_network(word, said, released, capsys):
    """Each is refused before anything is allocated."""
    assert said in refused(capsys, released("sit"), *KNOWN, word)


@pytest.mark.parametrize("word", ["backbone.backbone.x=3", "backbone.backbone=sit", "backbone.family=3"])
def test_words_that_fit_no_deepflow(word, released, capsys):
    words = ("backbone.num_heads=4", "backbone.clamp_gap=false", word)
    assert "backbone 'deepflow' has no such option" in refused(capsys, released("deepflow_3t"), *words)


def test_a_forged_file(released, parity, tmp_path, capsys):
    """Shapes of a much larger network, and values that are none."""
    state = {**parity("sit").state, "y_embedder.embedding_table.weight": torch.zeros(10**6, 1).half()}
    torch.save(state, tmp_path / "a.pt")
    assert "table.weight (1000000, 1), expected (1000000, 48)" in refused(capsys, tmp_path / "a.pt", *KNOWN)
    state = {**parity("sit").state, "blocks.1.attn.proj.bias": torch.full((48,), float("nan"))}
    torch.save(state, tmp_path / "a.pt")
    assert "with NaN or infinity (1): blocks.1.attn.proj.bias" in refused(capsys, tmp_path / "a.pt", *KNOWN)


def test_what_no_weights_lie_under(parity, tmp_path, capsys):
    """A name that is not there, and names of other kinds; capitals do not matter."""
    assert f"got no file or folder at {tmp_path / 'none.pt'}" in refused(capsys, tmp_path / "none.pt", *KNOWN)
    for name in ("noext", "a.pth.tar", "a.npz"):
        torch.save(parity("sit").state, tmp_path / name)
        said = f"got {tmp_path / name}, expected a name that ends in .safetensors, .pt, .pth, .ckpt, .bin, or a run's"
        assert said in refused(capsys, tmp_path / name, *KNOWN)
    (tmp_path / "dir.pt").mkdir()
    assert "dir.pt, which holds no valid checkpoint" in refused(capsys, tmp_path / "dir.pt", *KNOWN)
    torch.save(parity("sit").state, tmp_path / "A.PT")
    assert main([str(tmp_path / "A.PT"), *KNOWN, "solver.steps=1", "sample.count=2"]) == 0


def test_released_weights_are_no_weak_model_of_a_configuration(released, capsys):
    path = released("sit")
    words = ("guidance.0.name=autoguidance", f"guidance.0.weak={path}", "guidance.0.scale=2")
    said = refused(capsys, path, *KNOWN, *words)
    assert f"guidance.0.weak: got {path}, another program's weights" in said
    assert "give train.py's or exported ones, or in Python Autoguidance(weights.network(...))" in said
