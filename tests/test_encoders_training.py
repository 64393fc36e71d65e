"""Encoders in training, computed or cached: against a loop by hand, and everything that must not fit together."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from pathline import Draws, InputError, data, encoders
from pathline.core.config import resolve
from pathline.core.errors import CheckpointError, ConfigurationError, DataError
from pathline.data.base import as_indices
from pathline.data.features import FeatureFile, write_features
from pathline.encoders import Cached, Computed
from pathline.encoders import cache as command
from pathline.training import Trainer, checkpoints
from pathline.training.log import read_rows
from pathline.training.parts import build
from pathline.training.step import take_step

pytestmark = pytest.mark.usefixtures("torchvision_operators")
CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path):
    """Write random weights of a small ViT of timm; return the path."""

    def write(model="test_vit", seed=1):
        timm = importlib.import_module("timm")
        torch.manual_seed(seed)
        network = timm.create_model(model, num_classes=0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        path = tmp_path / f"{model}-{seed}.safetensors"
        save_file(network.state_dict(), path)
        return str(path)

    return write


@pytest.fixture
def small(weights):
    """The entry of an encoder of 64 channels on a grid of 3 × 3, of digits that are enlarged to 48 pixels."""
    entry = {"name": "timm", "model": "test_vit", "resolution": 48, "resize": True, "final_norm": True}
    return lambda **options: {**entry, "weights": weights(), **options}


@pytest.fixture
def other(weights):
    """The same of 96 channels on a grid of 2 × 2."""
    entry = {"name": "timm", "model": "test_vit3", "resolution": 32, "resize": True}
    return lambda: {**entry, "weights": weights("test_vit3")}


def configuration(folder, encoders_, kind="sit", dims=(64,), **sections):
    """A tiny network on the digits with 2 × 2 tokens, aligned to encoders; 4 steps of 6 images."""
    network = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "num_heads": 3, "num_classes": 10}
    own = {
        "sit": {"depth": 2, "align_layer": 1, "align_dims": list(dims), "align_width": 7},
        "deepflow": {"depth": 3, "cuts": [1, 2], "acceleration_width": 5, "align_dims": list(dims), "align_width": 7},
    }
    objective = {"sit": {"name": "alignment", "align": 0.7}, "deepflow": {"name": "deepflow", "align": 0.7}}
    entries = {
        "data": "digits",
        "backbone": {"name": kind, **network, **own[kind]},
        "objective": objective[kind],
        "encoders": list(encoders_),
        "optim": {"lr": 3e-3, "clip": 0.5, "eps": 1e-2},
        "ema": {"decay": 0.9},
        "solver": {"name": "euler", "steps": 1},
        "train": {"steps": 4, "global_batch": 6, "seed": 5, "folder": str(folder), "accelerator": "cpu"},
        "log": {"every": 2, "tensorboard": False},
        "checkpoint": {"every": 2, "keep": 9},
    }
    for name, section in sections.items():
        entries[name] = section if "name" in section else {**entries[name], **section}
    return resolve(entries)


def trained(folder, *arguments, **options):
    trainer = Trainer(configuration(folder, *arguments, **options))
    trainer.run()
    return trainer


def weights_of(trainer):
    return {key: value.clone() for key, value in trainer.state.network.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# --- computed beside training


@pytest.mark.parametrize("kind", ["sit", "deepflow"])
def test_steps_are_those_written_out_by_hand(kind, small, other, tmp_path):
    """Two encoders on other grids than the network's: resampled, each in its own place; the optimizer sees neither."""
    given = [small(), other()]
    trainer = trained(tmp_path / "run", given, kind, (64, 96), train={"stop_at": 3})
    parts = build(configuration(tmp_path / "other", given, kind, (64, 96)))
    network, own = parts.backbone.train(), [encoders.build(entry) for entry in given]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, eps=1e-2, weight_decay=0.0)
    for step in range(3):
        positions = range(6 * step, 6 * step + 6)
        batch = parts.dataset.batch(parts.dataset.indices_at(positions, 5))
        first, second = (encoder(batch["data"]) for encoder in own)
        image = first.transpose(1, 2).reshape(6, 64, 3, 3)
        first = functional.interpolate(image, (2, 2), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        draws = Draws(5).at(positions, step=step)
        loss = parts.objective(network, batch["data"], draws, label=batch["label"], features=(first, second))
        assert float(loss.terms["align"].detach().abs().mean()) > 1e-3
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    ours = trainer.state.network.state_dict()
    assert max(float((ours[key] - value).abs().max()) for key, value in network.state_dict().items()) < 2e-6
    rows = read_rows(tmp_path / "run")
    assert -1 <= rows[-1]["align"] <= 1 and rows[-1]["skipped"] == 0


def test_encoders_are_in_no_checkpoint_but_named_in_it(small, tmp_path):
    entry = small()
    trainer = trained(tmp_path / "run", [entry])
    path = checkpoints.find(tmp_path / "run")
    names = {p.name for p in path.iterdir() if p.suffix == ".safetensors"}
    assert names == {"model.safetensors", "optim.safetensors", "ema.safetensors"}
    plain = build(configuration(tmp_path, [entry])).backbone
    with safe_open(path / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(plain.state_dict())
    assert not any(p.requires_grad for p in trainer.parts.encoders[0].encoder.parameters())
    (told,) = checkpoints.read_state(path)["encoders"]
    assert told == encoders.build(entry).manifest and len(told["sha256"]) == 64


def test_flops_are_the_networks_alone(small, tmp_path):
    """The encoder's forward pass costs much more than these networks'."""
    aligned = build(configuration(tmp_path, [small()])).forward_flops
    plain = {"backbone": {"align_layer": None, "align_dims": [], "align_width": None}}
    without = build(configuration(tmp_path, [], objective={"name": "velocity"}, **plain)).forward_flops
    projector = 2 * 4 * (12 * 7 + 7 * 7 + 7 * 64)  # two operations a product, four tokens
    assert aligned == without + projector


class Latents(data.Dataset):
    """Latents of 4 × 8 × 8, with or without the images that they are of."""

    num_classes, data_are_images = 10, False

    def __init__(self, images=None, channels=4):
        self.images, self.shape = images, (channels, 8, 8)

    def __len__(self):
        return 12

    def batch(self, indices):
        index = as_indices(indices, 12)
        latents = torch.randn(12, *self.shape, generator=torch.Generator().manual_seed(3))
        images = {} if self.images is None else {"image": self.images[index]}
        return {"data": latents[index], "label": index % 10, "index": index, **images}

    @property
    def statistics(self):
        return {}

    @property
    def manifest(self):
        return {"name": "latents"}


def test_the_image_beside_latents_is_encoded(small):
    images = torch.randint(256, (12, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    encoder = encoders.build(small(resize=False))
    source = Computed(encoder, Latents(images))
    tokens = source.tokens(Latents(images).batch([7, 2, 5]), CPU)
    assert torch.equal(tokens, encoder(images[[7, 2, 5]])) and tokens.shape == (3, 9, 64)
    floats = images / 127.5 - 1
    assert torch.allclose(
        Computed(encoder, Latents(floats)).tokens(Latents(floats).batch([7]), CPU), tokens[:1], atol=1e-4
    )


def test_latents_without_images_are_refused(small):
    encoder = encoders.build(small())
    with pytest.raises(DataError, match=r"got data of shape \(4, 8, 8\) without images, which an encoder needs"):
        Computed(encoder, Latents())
    with pytest.raises(InputError, match="got images of 40 × 40 for timm at 48 × 48"):
        Computed(encoders.build(small(resize=False)), Latents(torch.zeros(12, 3, 40, 40)))


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_no_images_whatever_their_channels(channels, small, tmp_path):
    """Those of some autoencoders have three channels; only the data set knows what they are."""
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.rand(5, channels, 8, 8), "labels": torch.arange(5)}, path)
    encoder = encoders.build(small())
    for dataset in (
        Latents(channels=channels),
        data.build("synthetic", shape=(channels, 8, 8)),
        data.build("latents", path=str(path), num_classes=5),
    ):
        with pytest.raises(DataError, match=rf"got data of shape \({channels}, 8, 8\) without images, which an enc"):
            Computed(encoder, dataset)
    assert data.build("digits").data_are_images


def test_floats_of_another_range_are_refused(small):
    encoder, levels = encoders.build(small()), torch.full((12, 3, 48, 48), 255.0)
    levels[0, 1, 2, 3] = -200.0
    for images, largest in ((levels, "255"), (levels / 100, "2.55"), (-levels / 200, "1.275")):
        with pytest.raises(DataError, match=rf"got floats of up to {largest} for images, expected values in \[−1, 1\]"):
            Computed(encoder, Latents(images))
    for images in (levels.byte(), levels / 255, (levels / 255).bfloat16() * 1.0001):
        assert Computed(encoder, Latents(images)).dim == 64


def test_tokens_are_computed_in_the_precision_of_the_run(small, tmp_path):
    """In bf16 they are those of the encoder called within autocast, bit for bit, and not those of float32."""
    entry, given = small(), []
    trainer = Trainer(configuration(tmp_path, [entry], train={"precision": "bf16"}))
    objective = trainer.parts.objective
    loss = objective.loss

    def recorded(*arguments):
        given.append(arguments[4])
        return loss(*arguments)

    objective.loss = recorded
    take_step(trainer.state)
    dataset, encoder = trainer.parts.dataset, encoders.build(entry)
    images = dataset.batch(dataset.indices_at(range(6), 5))["data"]

    def on_four(tokens):
        image = tokens.float().transpose(1, 2).reshape(6, 64, 3, 3)
        return functional.interpolate(image, (2, 2), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)

    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
    ((tokens,),) = given
    assert torch.equal(tokens, on_four(rounded)) and not torch.equal(tokens, on_four(encoder(images)))


def test_tokens_that_are_not_finite_skip_the_step(small, tmp_path):
    """Whatever they come from: the guard counts the sample, and the weights stay."""
    trainer = Trainer(configuration(tmp_path, [small()]))
    source, before = trainer.parts.encoders[0], weights_of(trainer)
    given = source.tokens

    def broken(batch, device):
        tokens = given(batch, device)
        tokens[2, 1, 3] = math.inf
        return tokens

    source.tokens = broken
    take_step(trainer.state)
    (skipped,) = trainer.state.window.read()
    assert equal(weights_of(trainer), before) and skipped.samples[:, 1].tolist() == [1, 1, 0, 1, 1, 1]
    source.tokens = given
    take_step(trainer.state)
    assert not equal(weights_of(trainer), before) and not trainer.state.window.read()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(strategy, small, other, tmp_path, processes):
    """Each encodes its own half of a batch; no process holds a part of an encoder."""
    given = [small(), other()]
    one = weights_of(trained(tmp_path / "one", given, "deepflow", (64, 96)))
    spread = {"devices": 2, "strategy": strategy, "timeout": 30.0}
    c = configuration(tmp_path / "two", given, "deepflow", (64, 96), train=spread)
    processes(2, lambda: Trainer(c).run(), timeout=120).checked()
    two = checkpoints.read(tmp_path / "two" / "checkpoints" / "step-000000004").tensors["model"]
    assert max(float((two[key] - value).abs().max()) for key, value in one.items()) < 2e-6


# --- a resumed run


def test_a_resumed_run_is_the_run(small, other, tmp_path):
    given = [small(), other()]
    whole = trained(tmp_path / "whole", given, dims=(64, 96))
    trained(tmp_path / "stopped", given, dims=(64, 96), train={"stop_at": 2})
    again = Trainer(configuration(tmp_path / "stopped", given, dims=(64, 96)))
    again.resume(checkpoints.find(tmp_path / "stopped"))
    again.run()
    assert equal(weights_of(whole), weights_of(again))


def test_other_encoder_weights_are_no_resume(small, weights, tmp_path):
    """The same path with other weights in it: only the hash tells."""
    entry = small()
    trained(tmp_path / "run", [entry], train={"stop_at": 2})
    weights_path = entry["weights"]
    with open(weights("test_vit", seed=2), "rb") as other, open(weights_path, "wb") as file:
        file.write(other.read())
    again = Trainer(configuration(tmp_path / "run", [entry]))
    path = checkpoints.find(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"the encoders.0's sha256: '\w{64}' -> '\w{64}'"):
        again.resume(path)
    again.resume(path, allow=["encoders"])
    assert again.state.step == 2


# --- what does not fit together


def refusal(*arguments, **options):
    with pytest.raises(ConfigurationError) as error:
        build(configuration("runs/x", *arguments, **options))
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_widths_and_their_order(small, other):
    given = [small(), other()]
    wanted = "and the encoders have [64, 96]; write align_dims: [64, 96]"
    assert refusal(given, dims=(96, 64)) == [f"backbone.align_dims: got [96, 64], {wanted}"]
    assert refusal(given, "deepflow", (64,)) == [f"backbone.align_dims: got [64], {wanted}"]
    none = {"backbone": {"align_layer": None, "align_dims": [], "align_width": None}}
    (said,) = refusal(given, **none)
    assert said.startswith(f"backbone.align_dims: got [], {wanted}")


def test_encoders_and_objective_need_one_another(small):
    plain = {"backbone": {"align_layer": None, "align_dims": [], "align_width": None}}
    (said,) = refusal([small()], objective={"name": "velocity"}, **plain)
    assert said.startswith("encoders: got 1 for the objective 'velocity', which aligns to none; use 'alignment'")
    (said,) = refusal([], "sit")
    assert said.startswith("encoders: got none for the objective 'alignment', which aligns to some; write encoders")
    (said,) = refusal([small()], "deepflow", objective={"align": 0.0})
    assert said.startswith("encoders: got 1 for the objective 'deepflow', which aligns to none")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("sit", {"objective": {"name": "velocity"}}), ("deepflow", {"objective": {"align": 0.0}})],
)
def test_projectors_that_nothing_trains_are_refused(kind, changes, tmp_path):
    """On one device no reduction waits for their gradients, so that they would stay as they are without a word."""
    (said,) = refusal([], kind, (64, 96), **changes)
    assert said.startswith("backbone.align_dims: got [64, 96] for the objective '") and "leaves the projectors" in said
    assert "with as many encoders, or leave align_dims and align_layer out" in said
    assert build(configuration(tmp_path, [], kind, (64, 96), **changes), training=False).encoders == ()


def test_grids_of_another_aspect(small):
    (said,) = refusal([small(resolution=[32, 48])])
    assert said.startswith("encoders.0: got a token grid of 2 × 3 for one of 2 × 2, which differs in aspect")


def test_nothing_is_encoded_for_samples(small, tmp_path):
    """Parts that are not for training take neither encoder nor timm."""
    entry = small(weights="nowhere.safetensors")
    c = configuration(tmp_path, [entry])
    parts = build(c, training=False)
    assert parts.encoders == () and parts.forward_flops == 0
    with pytest.raises(ConfigurationError, match=r"encoders.0: got no file nowhere.safetensors"):
        build(c)


# --- cached


@pytest.fixture
def cached(small, tmp_path):
    """Run the command; return the entry with its file, and the same without."""

    def call(*words, entry=None, name="features.safetensors", split="held-out"):
        given = entry or small()
        file, output = tmp_path / "c.yaml", tmp_path / name
        c = configuration(tmp_path / "run", [given], data={"name": "digits", "split": split})
        file.write_text(c.to_yaml())
        assert command.main([str(file), str(output), "--device", "cpu", *words]) == 0
        return {**given, "cache": str(output)}, given

    return call


def test_cached_tokens_are_the_computed_ones_to_rounding(cached, tmp_path, capsys):
    entry, plain = cached("--batch", "128")
    assert "899 samples in" in capsys.readouterr().out
    dataset = data.build("digits", split="held-out")
    file, live = Cached(tmp_path / "features.safetensors", plain, dataset), Computed(encoders.build(plain), dataset)
    batch = dataset.batch([898, 3, 3, 640])
    ours, truth = file.tokens(batch, CPU), live.tokens(batch, CPU)
    assert ours.dtype == torch.float32 and ours.shape == (4, 9, 64)
    assert bool(((ours - truth).abs() <= truth.abs() * 2**-11 + 1e-6).all()) and float(truth.abs().max()) > 0.5
    assert (file.dim, file.grid) == (live.dim, live.grid) == (64, (3, 3))
    assert {key: value for key, value in file.manifest.items() if key != "cache"} == live.manifest
    with safe_open(entry["cache"], "np") as other:  # any reader of the format
        features = other.get_tensor("features")
    assert features.shape == (899, 9, 64) and features.dtype == np.float16
    assert np.array_equal(features[640], ours[3].half().numpy())


def test_training_from_a_file_is_training_beside_the_encoder(cached, tmp_path):
    """Equal to rounding of float16, and resumed bit for bit; timm is not asked for."""
    entry, plain = cached()
    held_out = {"data": {"name": "digits", "split": "held-out"}}
    computed = weights_of(trained(tmp_path / "computed", [plain], **held_out))
    ours = weights_of(trained(tmp_path / "cached", [entry], **held_out))
    assert max(float((ours[key] - value).abs().max()) for key, value in computed.items()) < 2e-4
    assert not equal(ours, computed)
    trained(tmp_path / "stopped", [entry], **held_out, train={"stop_at": 2})
    again = Trainer(configuration(tmp_path / "stopped", [entry], **held_out))
    again.resume(checkpoints.find(tmp_path / "stopped"))
    again.run()
    assert equal(weights_of(again), ours)
    told = checkpoints.read_state(checkpoints.find(tmp_path / "stopped"))["encoders"]
    assert told[0]["cache"] == FeatureFile(tmp_path / "features.safetensors").sha256


def test_features_of_something_else_are_refused(cached, weights, tmp_path):
    entry, plain = cached()
    dataset, path = data.build("digits", split="held-out"), tmp_path / "features.safetensors"

    def refused(message, component=plain, to=dataset):
        with pytest.raises(DataError, match=message):
            Cached(path, component, to)

    refused(
        "the data's sha256 '.*' -> '.*'; the data's split 'held-out' -> 'all'", to=data.build("digits", split="all")
    )
    refused("model 'test_vit' -> 'test_vit3'", {**plain, "model": "test_vit3"})
    refused("resolution 48 -> 64", {**plain, "resolution": 64})
    refused("final_norm True -> False", {**plain, "final_norm": False})
    refused(r"weights \w{64} -> \w{64}", {**plain, "weights": weights(seed=2)})
    refused(r"weights \w{64} -> of the hub", {**plain, "weights": None})
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(open(plain["weights"], "rb").read())
    assert Cached(path, {**plain, "weights": str(moved)}, dataset).dim == 64
    (said,) = refusal([entry])  # the configuration's data are the training half
    assert said.startswith("encoders.0: got ") and "features of something else" in said


@pytest.mark.parametrize("count", [1, 12, 200])
def test_features_of_other_images_are_refused(count, small, tmp_path):
    """Of latents the manifest leaves the images out; first and last sample are always among those compared."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator)

    def dataset(images, with_images=True):
        path = tmp_path / "latents.safetensors"
        latents = {"latents": torch.ones(count, 4, 2, 2), "labels": torch.zeros(count, dtype=torch.long)}
        save_file({**latents, "images": images}, path)
        return data.build("latents", path=str(path), num_classes=1, images=with_images)

    entry, output = small(resize=False), tmp_path / "features.safetensors"
    command.cache(entry, dataset(images), output, batch=64, device=CPU)
    assert Cached(output, entry, dataset(images)).dim == Cached(output, entry, dataset(images, False)).dim == 64
    for changed in {0, count // 2 if count < 64 else count - 1, count - 1}:
        others = images.clone()
        others[changed, 1, 40, 5] ^= 1
        with pytest.raises(DataError, match=r"features of something else \(the data's images \w{64} -> \w{64}\)"):
            Cached(output, entry, dataset(others))
        assert Cached(output, entry, dataset(others, False)).dim == 64  # nothing to compare


def test_files_without_features(tmp_path, cached):
    _, plain = cached()
    path, content = tmp_path / "features.safetensors", (tmp_path / "features.safetensors").read_bytes()
    dataset = data.build("digits", split="held-out")
    save_file({"features": torch.ones(2, 3, 5).half()}, tmp_path / "bare", {"format": "pathline features 1"})
    for changed, message in (
        ((tmp_path / "bare").read_bytes(), "which holds no features"),
        (content[:-2], "a damaged file"),
        (content[:40], "a damaged file"),
        (b"", "a damaged file"),
        (b"no features", "a damaged file"),
        (open(plain["weights"], "rb").read(), "which holds no features"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=message):
            Cached(path, plain, dataset)
    path.unlink()
    with pytest.raises(DataError, match="got no features at"):
        Cached(path, plain, dataset)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """An older one stays as it is."""
    told = {"component": {"name": "x"}, "encoder": {"grid": [1, 2], "weights": "hub", "sha256": "3"}, "data": {"a": 1}}
    told["images"] = "5"
    path = tmp_path / "features.safetensors"
    rows = torch.randn(5, 2, 3)
    write_features(path, iter((rows[:2], rows[2:])), (5, 2, 3), **told)
    before = path.read_bytes()
    assert torch.equal(FeatureFile(path).rows(torch.tensor([4, 0])), rows[[4, 0]].half())

    def interrupted():
        yield rows[:2]
        raise KeyboardInterrupt

    for batches, error in (
        (interrupted(), KeyboardInterrupt),
        ((rows * 1e5,), DataError),
        ((rows * math.nan,), DataError),
        ((rows[:4],), DataError),
        ((rows[:, :1],), DataError),
    ):
        with pytest.raises(error):
            write_features(path, batches, (5, 2, 3), **told)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    for place in (tmp_path, tmp_path / "none" / "x", Path(".")):
        with pytest.raises(DataError, match="to write features to, expected a file in a folder that is there"):
            write_features(place, (rows,), (5, 2, 3), **told)


def test_the_command_names_what_is_wrong(tmp_path, small, capsys):
    file = tmp_path / "c.yaml"
    c = configuration(tmp_path / "run", [small()])
    file.write_text(yaml.safe_dump(json.loads(c.model_dump_json())))
    for words, said in (
        (("--encoder", "1"), "got --encoder 1 and --batch 64 for 1 encoders"),
        (("--batch", "0"), "got --encoder 0 and --batch 0"),
        (("encoders.0.resolution=50",), "got resolution 50"),
        (("encoders.0.resize=false",), "got images of 8 × 8 for timm at 48 × 48"),
        (("encoders.0.resize=perhaps",), "encoders.0.resize: got 'perhaps'"),
    ):
        assert command.main([str(file), str(tmp_path / "out"), *words]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("c.yaml", "."), "got . to write features to, expected a file in a folder that is there"),
        (("c.yaml", "none/out"), "got none/out to write features to"),
        (("c.yaml", "out", "--device", "cud"), "got --device cud, which cannot be used here"),
        (("c.yaml", "out", "--device", "cuda:77"), "got --device cuda:77, which cannot be used here"),
        (("c.yaml", "out", "--device", "meta"), "got --device meta, which cannot be used here"),
    ],
)
def test_the_command_refuses_output_and_device_before_it_loads(words, said, tmp_path, capsys, monkeypatch):
    """In a folder without the configuration, which would be the next to be missed."""
    monkeypatch.chdir(tmp_path)
    assert command.main(list(words)) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}") and not list(tmp_path.iterdir())
