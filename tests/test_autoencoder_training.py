"""An autoencoder in training and sampling: against the latents' own, decoded pictures, and samples without the data."""

from __future__ import annotations

import copy
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pathline import data
from pathline.core import listing
from pathline.core.config import load, resolve
from pathline.core.errors import CheckpointError, ConfigurationError, DataError
from pathline.data import sources
from pathline.data.prepare import command
from pathline.encoders import autoencoders
from pathline.training import Trainer, checkpoints, sampling
from pathline.training.described import Described, read_trained, samples_of
from pathline.training.export import export
from pathline.training.manifest import MANIFEST, STATE, write_manifest
from pathline.training.parts import build

pytestmark = pytest.mark.usefixtures("torchvision_operators")
FACTOR = {"mean": [0.0] * 4, "std": [1 / 0.18215] * 4}


@pytest.fixture
def vae(tmp_path):
    """Write a random tiny AutoencoderKL of four channels that halves the side; return its folder."""

    def write(folder="vae", seed=1, **changes):
        torch.manual_seed(seed)
        options = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (4, 8),
            "norm_num_groups": 2,
            "latent_channels": 4,
        }
        network = importlib.import_module("diffusers").AutoencoderKL(**{**options, **changes})
        network.save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    return write


@pytest.fixture
def latents(tmp_path, monkeypatch):
    """Write seven latents; the data set then tells of the autoencoder that it is given, as prepared ones do."""

    def write(of=None, channels=4):
        values = torch.randn(7, channels, 6, 6, generator=torch.Generator().manual_seed(0))
        (tmp_path / "latents").mkdir(exist_ok=True)
        save_file({"latents": values, "labels": torch.arange(7)}, tmp_path / "latents" / "x.safetensors")
        monkeypatch.setattr(data.Latents, "latents_of", of, raising=False)
        return {"name": "latents", "path": str(tmp_path / "latents"), "num_classes": 11}

    return write


def entries(folder, given, autoencoder=None, **sections):
    """A tiny network on latents of 4 × 6 × 6; two steps of five samples."""
    network = {"input_size": 6, "patch_size": 3, "in_channels": 4, "hidden_size": 12, "depth": 1, "num_heads": 3}
    return {
        "data": given,
        "backbone": {"name": "sit", **network, "num_classes": 11},
        "objective": "velocity",
        "autoencoder": autoencoder,
        "ema": {"decay": 0.5},
        "solver": {"name": "euler", "steps": 2},
        "train": {"steps": 2, "global_batch": 5, "folder": str(folder), "accelerator": "cpu"},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 1},
        "sample": {"count": 3, "batch": 2},
        **sections,
    }


def named(folder, **options):
    return {"name": "sd-vae-ft-ema", "model": folder, **options}


def manifest(folder, **options):
    return dict(autoencoders.build("sd-vae-ft-ema", model=folder, **options).manifest)


def refusal(*arguments, **options):
    with pytest.raises(ConfigurationError) as caught:
        build(resolve(entries(*arguments, **options)))
    return str(caught.value)


# --- parts


def test_images_are_decoded_latents(vae, latents, tmp_path):
    folder = vae()
    parts = build(resolve(entries(tmp_path, latents(manifest(folder)), named(folder))))
    z = torch.randn(3, 4, 6, 6)
    network = importlib.import_module("diffusers").AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        wanted = network.decode(z / 0.18215).sample
    assert parts.can_draw and wanted.shape == (3, 3, 12, 12)
    torch.testing.assert_close(parts.images(z), wanted, rtol=1e-4, atol=1e-5)


def test_without_one_latents_stay_latents_and_images_images(latents, tmp_path):
    parts = build(resolve(entries(tmp_path, latents())))
    assert not parts.can_draw and parts.images(torch.zeros(2, 4, 6, 6)) is None
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 1}
    backbone |= {"num_heads": 3, "num_classes": 10}
    parts, x = build(resolve(entries(tmp_path, "digits", backbone=backbone))), torch.randn(2, 1, 8, 8)
    assert parts.can_draw and parts.images(x) is x


def test_latents_of_three_channels_are_no_images(latents, tmp_path):
    given = latents(channels=3)
    backbone = {**entries(tmp_path, given)["backbone"], "in_channels": 3}
    parts = build(resolve(entries(tmp_path, given, backbone=backbone)))
    assert not parts.can_draw and parts.images(torch.zeros(2, 3, 6, 6)) is None


# --- what must fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, "sha256 '000"),
        ({"class": "AutoencoderTiny"}, "class 'AutoencoderTiny' -> 'AutoencoderKL'"),
        ({"input_range": [0.0, 1.0]}, "input_range [0.0, 1.0] -> [-1.0, 1.0]"),
        ({"scaling": {**FACTOR, "mean": [0.0, 0.0, 0.0, 0.1]}}, "scaling.mean [0.0, 0.0, 0.0, 0.1] -> [0.0, "),
        ({"scaling": {**FACTOR, "std": [1 / 0.13025] * 4}}, "scaling.std [7.67"),
        ({"scaling": {**FACTOR, "std": [1 / 0.18215] * 3}}, "scaling.std [5.48"),
    ],
)
def test_another_autoencoder_than_the_datas_is_refused_with_what_differs(changes, said, vae, latents, tmp_path):
    folder = vae()
    found = refusal(tmp_path, latents({**manifest(folder), **changes}), named(folder))
    assert "autoencoder: is another than the latents are of" in found and said in found
    assert found.count("->") == 1 and "prepare the data anew" in found


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "of-another-place", "dtype": "bfloat16"},
        {"sha256": None, "class": None},
        {"scaling": {**FACTOR, "std": [5.48998078] * 4, "source": "somebody"}},
    ],
)
def test_names_precision_and_what_is_not_told_may_differ(changes, vae, latents, tmp_path):
    folder = vae()
    parts = build(resolve(entries(tmp_path, latents({**manifest(folder), **changes}), named(folder))))
    assert parts.can_draw


def test_one_for_pixels_or_other_channels_is_refused(vae, latents, tmp_path):
    folder = vae()
    backbone = {"name": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 1}
    found = refusal(tmp_path, "digits", named(folder), backbone={**backbone, "num_heads": 3, "num_classes": 10})
    assert (
        "autoencoder: got one for data that are pixels; make latents of them by python -m pathline.data.prep" in found
    )
    other = vae("other", latent_channels=3)
    assert "has latents of 3 channels, and the data have 4" in refusal(tmp_path, latents(), named(other))


def test_the_scale_of_latents_is_that_of_the_autoencoder_unless_they_were_scaled_before(vae, tmp_path):
    folder = vae(scaling_factor=0.5)
    save_file({"latents": torch.randn(7, 4, 6, 6), "labels": torch.arange(7)}, tmp_path / "x.safetensors")
    given = {"name": "latents", "path": str(tmp_path / "x.safetensors"), "num_classes": 11}
    for scale in (0.5, 1):
        assert build(resolve(entries(tmp_path, {**given, "scale": scale}, named(folder)))).can_draw
    found = refusal(tmp_path, {**given, "scale": 0.25}, named(folder))
    assert "scaling.std [4.0, 4.0, 4.0, 4.0] -> [2.0, 2.0, 2.0, 2.0]" in found and found.count("->") == 1


def test_its_entry_is_checked_with_all_others(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        resolve(entries(tmp_path, "digits", {"name": "sd-vae-ft-emu"}))
    assert "autoencoder.name: unknown autoencoder 'sd-vae-ft-emu'; did you mean 'sd-vae-ft-ema'" in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        resolve(entries(tmp_path, "digits", {"name": "diffusers", "dtyp": "float64", "slices": "many"}))
    for said in (
        "autoencoder.dtyp: autoencoder 'diffusers' has no such",
        "autoencoder.model: missing",
        "slices: got 'm",
    ):
        assert said in str(caught.value)
    with pytest.raises(ConfigurationError, match="autoencoder.dtype: got 'float64'"):
        resolve(entries(tmp_path, "digits", {"name": "diffusers", "model": "x", "dtype": "float64"}))
    assert "autoencoder: got no folder ./nowhere" in refusal(tmp_path, "digits", named("./nowhere"))


def test_the_resolved_entry_is_kept_and_read_back(tmp_path):
    (tmp_path / "x.yaml").write_text(resolve(entries(tmp_path, "digits", "sd3-vae")).to_yaml())
    kept = load(tmp_path / "x.yaml").autoencoder
    assert kept == {
        "name": "sd3-vae",
        "model": "stabilityai/stable-diffusion-3-medium-diffusers",
        "subfolder": "vae",
        "variant": None,
        "dtype": "float32",
        "input_range": None,
        "slices": 16,
    }
    assert load(tmp_path / "x.yaml", ["autoencoder=null"]).autoencoder is None
    assert load(tmp_path / "x.yaml", ["autoencoder=taesd", "autoencoder.slices=3"]).autoencoder["slices"] == 3


def test_the_list_of_components_has_autoencoders():
    found = list(listing.lines("encoders.autoencoders"))
    assert found[0] == "encoders.autoencoders" and any(line.startswith("  sd-vae-ft-mse: model=") for line in found)


# --- training


def trained(folder, *arguments, **options):
    trainer = Trainer(resolve(entries(folder, *arguments, **options)))
    trainer.run()
    return folder / "checkpoints" / "step-000000002"


def test_a_checkpoint_tells_what_sampling_needs(vae, latents, tmp_path):
    folder = vae()
    told = manifest(folder)
    state = checkpoints.read_state(trained(tmp_path / "run", latents(told), named(folder)))
    assert state["samples"] == {
        "shape": [4, 6, 6],
        "num_classes": 11,
        "data_are_images": False,
        "latents_of": json.loads(json.dumps(told)),
    }


def test_weights_do_not_depend_on_it_and_a_run_goes_on_with_another_precision(vae, latents, tmp_path):
    folder = vae()
    given = latents(manifest(folder))
    first = trained(tmp_path / "with", given, named(folder))
    second = trained(tmp_path / "without", given)
    for one, other in zip(*(load_file(path / "model.safetensors").values() for path in (first, second)), strict=True):
        assert torch.equal(one, other)
    for autoencoder in (named(folder, dtype="bfloat16"), None):
        options = {"train": {**entries(tmp_path / "with", given)["train"], "steps": 3}}
        trainer = Trainer(resolve(entries(tmp_path / "with", given, autoencoder, **options)))
        trainer.resume(first)
        assert trainer.state.step == 2


def edited(checkpoint, change):
    """Write a checkpoint's state again, changed."""
    state = json.loads((checkpoint / STATE).read_text())
    change(state)
    (checkpoint / STATE).write_text(json.dumps(state))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, 2, good=True)


def resumed(folder, given, checkpoint, allow=()):
    trainer = Trainer(resolve(entries(folder, given)))
    trainer.resume(checkpoint, allow)
    return trainer.state.step


def test_a_run_goes_on_with_the_statistics_that_it_began_with(latents, tmp_path):
    given = latents()
    checkpoint = trained(tmp_path / "run", given)

    def stretch(factor):
        edited(
            checkpoint, lambda state: state["statistics"].update(std=[s * factor for s in state["statistics"]["std"]])
        )

    stretch(1.000005)
    assert resumed(tmp_path / "run", given, checkpoint) == 2
    stretch(1.00005)
    with pytest.raises(CheckpointError, match=r"of another configuration[^\n]*\n  the data's statistics: std \["):
        resumed(tmp_path / "run", given, checkpoint)
    assert resumed(tmp_path / "run", given, checkpoint, ["data"]) == 2
    edited(checkpoint, lambda state: state.pop("statistics"))
    assert resumed(tmp_path / "run", given, checkpoint) == 2


def test_a_run_goes_on_with_latents_of_the_same_autoencoder(latents, tmp_path):
    told = {"class": "AutoencoderKL", "scaling": FACTOR}
    checkpoint = trained(tmp_path / "run", latents(told))
    given = latents({**told, "scaling": {**FACTOR, "mean": [0.5] * 4}})
    with pytest.raises(CheckpointError, match=r"the data's samples: latents_of.scaling.mean \[0.0.* -> \[0.5"):
        resumed(tmp_path / "run", given, checkpoint)
    assert resumed(tmp_path / "run", given, checkpoint, ["data"]) == 2
    assert resumed(tmp_path / "run", latents({"class": "AutoencoderKL"}), checkpoint) == 2


@pytest.mark.parametrize("replaced", ["features", "labels"])
def test_files_replaced_by_others_of_their_size_are_noticed(replaced, tmp_path):
    """Names and sizes stay, and so do the statistics of what is replaced."""
    for number in range(7):
        values = np.random.default_rng(number).permutation(144).reshape(1, 4, 6, 6).astype("f4")
        for kind, array in (("features", values), ("labels", np.array([number]))):
            (tmp_path / f"x_{kind}").mkdir(exist_ok=True)
            np.save(tmp_path / f"x_{kind}" / f"{number}.npy", array)
    given = {"name": "fast-dit", "path": str(tmp_path), "num_classes": 11}
    checkpoint = trained(tmp_path / "run", given)
    assert resumed(tmp_path / "run", given, checkpoint) == 2
    other = values[..., ::-1, :]  # upside down
    np.save(tmp_path / f"x_{replaced}" / "6.npy", other if replaced == "features" else np.array([3]))
    key = "sha256" if replaced == "features" else "labels_sha256"
    with pytest.raises(CheckpointError, match=f"--allow:\n  the data's {key}: [^\n]*$"):
        resumed(tmp_path / "run", given, checkpoint)


@pytest.mark.parametrize("form", ["run", "exported", "weights alone"])
def test_training_begins_with_a_model_of_the_same_latents(form, latents, tmp_path):
    told = {"class": "AutoencoderKL", "scaling": FACTOR}
    path = tmp_path / "run"
    checkpoint = trained(path, latents(told))
    if form != "run":
        path = export(checkpoint)
    if form == "weights alone":
        path.with_suffix(".json").unlink()
    for changes, refused in (({}, False), ({"scaling": {**FACTOR, "std": [7.0] * 4}}, form != "weights alone")):
        trainer = Trainer(resolve(entries(tmp_path / "next", latents({**told, **changes}))))
        before = trainer.state.fingerprint()
        if refused:
            with pytest.raises(CheckpointError, match=r"a model of other data .*latents_of.scaling.std \[5.48.*7.0"):
                trainer.initialize_from(path)
        else:
            trainer.initialize_from(path)
        assert (trainer.state.fingerprint() == before) is refused


# --- sampling


@pytest.fixture
def run(vae, latents, tmp_path):
    """A run on latents with an autoencoder, whose data are gone; returns its newest checkpoint."""
    folder = vae()
    checkpoint = trained(tmp_path / "run", latents(manifest(folder)), named(folder))
    shutil.rmtree(tmp_path / "latents")
    return checkpoint


def test_samples_are_drawn_after_the_data_are_gone(run):
    configuration, parts = sampling.load(run, ["sample.seed=4"])
    assert isinstance(parts.dataset, Described) and parts.dataset.shape == (4, 6, 6) and parts.can_draw
    assert parts.dataset.manifest["count"] == len(parts.dataset) == 7 and parts.dataset.statistics["mean"]
    assert configuration.data["name"] == "latents" and configuration.sample.seed == 4
    x = sampling.solve(parts, parts.backbone, torch.tensor([3, 10, 0]), 3, 4, 2).x
    assert x.shape == (3, 4, 6, 6) and parts.images(x).shape == (3, 3, 12, 12)
    with pytest.raises(DataError, match="got a data set of which only a trained model tells"):
        parts.dataset.batch([0])


def test_words_may_name_another_copy_or_none(run, vae):
    copied = vae("copy")
    _, parts = sampling.load(run, [f"autoencoder.model={copied}"])
    assert parts.autoencoder.manifest == sampling.load(run, [])[1].autoencoder.manifest
    assert sampling.load(run, ["autoencoder=null"])[1].autoencoder is None
    other = vae("other", seed=5)
    with pytest.raises(ConfigurationError, match="autoencoder: is another than the latents are of .*sha256"):
        sampling.load(run, [f"autoencoder.model={other}"])
    with pytest.raises(ConfigurationError, match=r"scaling.std \[5.48"):
        sampling.load(run, [f"autoencoder.model={vae('scaled', scaling_factor=0.13025)}"])


def test_a_word_decodes_what_was_trained_without(vae, latents, tmp_path):
    folder = vae()
    checkpoint = trained(tmp_path / "run", latents(manifest(folder)))
    assert not sampling.load(checkpoint, [])[1].can_draw
    _, parts = sampling.load(checkpoint, ["autoencoder=sd-vae-ft-ema", f"autoencoder.model={folder}"])
    assert parts.images(torch.zeros(2, 4, 6, 6)).shape == (2, 3, 12, 12)


def test_data_that_words_name_are_looked_for(run, tmp_path):
    with pytest.raises(ConfigurationError, match="data: got no latents at"):
        sampling.load(run, [f"data.path={tmp_path / 'elsewhere'}"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling": {**FACTOR, "std": [1 / 0.13025] * 4}}, "latents_of.scaling.std \\[5.48.* -> \\[7.67"),
        ({"class": "AutoencoderTiny"}, "latents_of.class 'AutoencoderKL' -> 'AutoencoderTiny'"),
    ],
)
def test_data_that_words_name_are_of_the_kind_that_was_trained_on(changes, said, vae, latents, tmp_path):
    folder = vae()
    checkpoint = trained(tmp_path / "run", latents(manifest(folder)), named(folder))
    _, parts = sampling.load(checkpoint, ["data.images=false"])
    assert isinstance(parts.dataset, data.Latents) and parts.can_draw
    latents({**manifest(folder), **changes})
    with pytest.raises(ConfigurationError, match=f"data: are others than the model was trained on .*{said}"):
        sampling.load(checkpoint, ["data.images=false"])
    latents()  # which tell nothing: the autoencoder is still compared with what was trained
    with pytest.raises(ConfigurationError, match="autoencoder: is another than the latents are of"):
        sampling.load(checkpoint, ["data.images=false", f"autoencoder.model={vae('w', scaling_factor=0.13025)}"])
    with pytest.raises(ConfigurationError, match=r"num_classes 11 -> 12"):
        sampling.load(checkpoint, ["data.num_classes=12"])


def test_a_word_that_is_none_names_those_that_are(run):
    with pytest.raises(ConfigurationError) as caught:
        sampling.load(run, ["train.steps=3"])
    for word in ("sample.…", "train.tf32=…", "data.…", "autoencoder=…"):
        assert word in str(caught.value)


def test_a_weak_model_is_of_the_same_latents(latents, tmp_path):
    told = {"class": "AutoencoderKL", "scaling": FACTOR}
    strong = trained(tmp_path / "strong", latents(told))
    weak = trained(tmp_path / "weak", latents(told))
    other = trained(tmp_path / "other", latents({**told, "input_range": [0, 1], "class": "VQModel"}))
    word = "guidance=[{{name: autoguidance, weak: {}, scale: 2.0}}]"
    assert sampling.load(strong, [word.format(weak)])[0].guidance[0]["weak"] == str(weak)
    with pytest.raises(ConfigurationError, match=r"guidance.0.weak: got .*other.*'AutoencoderKL' -> 'VQModel'\)"):
        sampling.load(strong, [word.format(other)])
    edited(other, lambda state: state.pop("samples"))
    assert sampling.load(strong, [word.format(other)])[0].guidance[0]["weak"] == str(other)


def test_an_older_checkpoint_looks_for_its_data(vae, latents, tmp_path):
    folder = vae()
    checkpoint = trained(tmp_path / "run", latents(manifest(folder)), named(folder))
    edited(checkpoint, lambda state: (state.pop("samples"), state["configuration"].pop("autoencoder")))
    assert read_trained(checkpoint).data is None
    _, parts = sampling.load(checkpoint, [])
    assert isinstance(parts.dataset, data.Latents) and parts.autoencoder is None
    Trainer(resolve(entries(tmp_path / "run", latents(manifest(folder))))).resume(checkpoint)
    shutil.rmtree(tmp_path / "latents")
    with pytest.raises(ConfigurationError, match="data: got no latents at"):
        sampling.load(checkpoint, [])


def test_exported_weights_need_no_data_either(run, tmp_path):
    path = export(run, output=tmp_path / "shared" / "weights.safetensors")
    shutil.rmtree(tmp_path / "run")
    configuration, parts = sampling.load(path, [])
    assert isinstance(parts.dataset, Described) and parts.can_draw and configuration.autoencoder is not None
    assert parts.dataset.latents_of == json.loads(json.dumps(dict(parts.autoencoder.manifest)))
    wanted = load_file(path)
    assert all(torch.equal(value, wanted[key]) for key, value in parts.backbone.state_dict().items())


def test_a_description_tells_what_the_data_set_did(latents):
    dataset = data.build(latents({"class": "AutoencoderKL"}))
    described = Described({"samples": samples_of(dataset), "data": dataset.manifest, "statistics": dataset.statistics})
    for name in ("shape", "num_classes", "data_are_images", "latents_of", "manifest", "statistics"):
        assert getattr(described, name) == getattr(dataset, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [4, 6]},
        {"shape": [4, 6, 0]},
        {"shape": [4, 6, 2.5]},
        {"num_classes": -1},
        {"data_are_images": "yes"},
        {"latents_of": [1]},
        {"more": 1},
    ],
)
def test_a_description_that_cannot_be_is_refused(changes):
    told = {"shape": [4, 6, 6], "num_classes": 11, "data_are_images": False, "latents_of": None}
    Described({"samples": copy.deepcopy(told)})
    with pytest.raises(CheckpointError, match="tells of samples which cannot be"):
        Described({"samples": {**told, **changes}})


def test_released_weights_are_decoded_by_a_word(vae, parity, tmp_path):
    path = tmp_path / "released.pt"
    torch.save({"ema": parity("sit").state}, path)
    words = ["weights.family=sit", "backbone.num_heads=4", "solver.name=euler", "solver.steps=1"]
    _, parts = sampling.load(path, words)
    channels, height, width = parts.dataset.shape
    assert not parts.can_draw and channels == 4
    _, parts = sampling.load(path, [*words, "autoencoder=sd-vae-ft-ema", f"autoencoder.model={vae()}"])
    assert parts.images(torch.zeros(2, channels, height, width)).shape == (2, 3, 2 * height, 2 * width)
    other = [*words, "autoencoder=sdxl-vae", f"autoencoder.model={vae('xl', scaling_factor=0.125)}"]
    said = r"scaling.std \[5.48.* -> \[8.0.*, where weights.latent_scale tells the former"
    with pytest.raises(ConfigurationError, match=said):
        sampling.load(path, other)
    assert sampling.load(path, [*other, "weights.latent_scale=0.125"])[1].can_draw
    with pytest.raises(ConfigurationError, match="weights.latent_scale: "):
        sampling.load(path, [*words, "weights.latent_scale=0"])


def test_from_images_to_latents_to_samples_that_are_images(vae, tmp_path):
    """Prepared by an autoencoder, trained with it, and drawn without the data; another one is refused."""
    for number, label in enumerate("aabab"):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        picture = torch.randint(256, (12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(picture.numpy()).save(tmp_path / "images" / label / f"{number}.png")
    folder, packed = vae(), tmp_path / "packed"
    words = [str(tmp_path / "images"), str(packed), "--resolution", "12", "--dtype", "float32"]
    assert command.main([*words, "--autoencoder", f"sd-vae-ft-ema,model={folder}"]) == 0
    network = {**entries(tmp_path, "digits")["backbone"], "num_classes": 2}
    given = {"name": "prepared", "path": str(packed), "posterior": "mean"}
    parts = build(resolve(entries(tmp_path, given, named(folder), backbone=network)))
    autoencoder = parts.autoencoder
    stored = parts.dataset.batch([3])["data"]
    source = sources.build("folder", path=str(tmp_path / "images"))
    pixels = torch.from_numpy(np.asarray(source.read(3)).copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(stored, autoencoder.to_model(autoencoder.moments(pixels).mean), rtol=1e-5, atol=1e-6)
    other = vae("other", seed=5)
    assert "is another than the latents are of (sha256" in refusal(tmp_path, given, named(other), backbone=network)
    checkpoint = trained(tmp_path / "run", given, named(folder), backbone=network)
    shutil.rmtree(packed)
    _, parts = sampling.load(checkpoint, [])
    assert parts.dataset.latents_of["sha256"] == autoencoder.manifest["sha256"]
    assert parts.images(stored).shape == (1, 3, 12, 12)


def test_pictures_of_training_are_decoded(vae, latents, tmp_path):
    """The first sample of ``samples.png``, enlarged threefold behind a gap of one pixel."""
    folder = vae()
    checkpoint = trained(tmp_path / "run", latents(manifest(folder)), named(folder))
    _, parts = sampling.load(checkpoint, [])
    x = sampling.solve(parts, parts.backbone, torch.arange(10).repeat_interleave(10), 100, 0, 100).x[:1]
    wanted = (parts.images(x)[0].clamp(-1, 1) * 127.5 + 127.5).round().permute(1, 2, 0)
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        found = torch.from_numpy(np.asarray(picture).copy())[3:39:3, 3:39:3].float()
    assert found.shape == (12, 12, 3) and float((found - wanted).abs().max()) <= 1 and len(found.unique()) > 9
