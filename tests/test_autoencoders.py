"""Autoencoders of diffusers: each class against its own pipeline's arithmetic, written out here; files; refusals."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pathline import InputError
from pathline.core.errors import InputTypeError, MissingPackageError, WeightsError
from pathline.encoders import autoencoders
from pathline.encoders.autoencoders import PRESETS

pytestmark = pytest.mark.usefixtures("torchvision_operators")
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
}
CONFIGURATIONS = {
    "AutoencoderKL": {**BLOCKS, "latent_channels": 5, "scaling_factor": 0.4},
    "AutoencoderKLFlux2": {**BLOCKS, "latent_channels": 3},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (4, 4, 4),
        "decoder_block_out_channels": (4, 4, 4),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": 5,
        "scaling_factor": 1.3,
        "shift_factor": 0.2,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_out_channels": (8, 16, 16),
        "decoder_block_out_channels": (8, 16, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "scaling_factor": 0.41407,
    },
    "VQModel": {**BLOCKS, "latent_channels": 3, "vq_embed_dim": 5, "num_vq_embeddings": 7},
}


@pytest.fixture
def saved(tmp_path):
    """Write a random tiny autoencoder of a class; return its folder and the network."""

    def save(name, folder="vae", **changes):
        torch.manual_seed(1)
        network = getattr(importlib.import_module("diffusers"), name)(**{**CONFIGURATIONS[name], **changes}).eval()
        with torch.no_grad():
            for tensor in network.state_dict().values():  # else all biases and statistics are plain
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor).abs())
        network.save_pretrained(tmp_path / folder)
        return tmp_path / folder, network

    return save


def images(count=3, side=8):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def patches(z):
    """The 2 × 2 patches of (n, c, h, w) as channels, pixel by pixel."""
    return torch.stack([z[:, c, i::2, j::2] for c in range(z.shape[1]) for i in (0, 1) for j in (0, 1)], 1)


# --- each class against its pipeline

SCALINGS = {  # class, changes, and what its pipeline makes of raw latents
    "factor": ("AutoencoderKL", {}, lambda z, _: z * 0.4),
    "default": ("AutoencoderKL", {"scaling_factor": 0.18215}, lambda z, _: z * 0.18215),
    "shift": ("AutoencoderKL", {"scaling_factor": 1.5305, "shift_factor": 0.0609}, lambda z, _: (z - 0.0609) * 1.5305),
    "statistics": (
        "AutoencoderKL",
        {"latents_mean": [0.1, -0.2, 0.3, 2.0, 0.0], "latents_std": [0.5, 2.0, 1.0, 3.0, 0.7]},
        lambda z, _: (z - col(0.1, -0.2, 0.3, 2.0, 0.0)) * 0.4 / col(0.5, 2.0, 1.0, 3.0, 0.7),
    ),
    "batch norm": (
        "AutoencoderKLFlux2",
        {},
        lambda z, vae: (patches(z) - col(*vae.bn.running_mean)) / (col(*vae.bn.running_var) + 1e-4).sqrt(),
    ),
    "tiny": ("AutoencoderTiny", {}, lambda z, _: (z - 0.2) * 1.3),
    "dc": ("AutoencoderDC", {}, lambda z, _: z * 0.41407),
    "vq": ("VQModel", {}, lambda z, _: z * 0.18215),
}
OUTPUTS = {"AutoencoderTiny": "latents", "VQModel": "latents", "AutoencoderDC": "latent"}


def col(*values):
    return torch.tensor([float(value) for value in values])[:, None, None]


def raw(network, x):
    """What the class gives, and its standard deviation."""
    with torch.no_grad():
        encoded = network.encode(x)
    if type(network).__name__ in OUTPUTS:
        return getattr(encoded, OUTPUTS[type(network).__name__]), None
    return encoded.latent_dist.mean, encoded.latent_dist.std


@pytest.mark.parametrize("case", SCALINGS)
def test_latents_are_scaled_as_by_the_classs_own_pipeline(case, saved):
    name, changes, pipeline = SCALINGS[case]
    folder, network = saved(name, **changes)
    autoencoder, x = autoencoders.build("diffusers", model=str(folder)), images()
    mean, std = raw(network, x)
    moments = autoencoder.moments(x)
    wanted = pipeline(mean, network)
    z = autoencoder.to_model(moments.mean)
    torch.testing.assert_close(z, wanted, rtol=1e-6, atol=1e-6)
    assert tuple(z.shape[1:]) == autoencoder.latent_shape(8)
    with pytest.raises(InputError, match=r"got images of 9 × 9, which .* does not take"):
        autoencoder.latent_shape(9)
    assert (moments.std is None) == (std is None)
    if std is not None:
        torch.testing.assert_close(moments.std, patches(std) if case == "batch norm" else std, rtol=1e-6, atol=0)
    told = autoencoder.manifest["scaling"]
    torch.testing.assert_close((moments.mean - col(*told["mean"])) / col(*told["std"]), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(autoencoder.to_autoencoder(z), moments.mean, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        decoded = network.decode(mean).sample
    torch.testing.assert_close(autoencoder.decode(z), decoded, rtol=1e-4, atol=1e-5)


def test_the_logarithm_of_the_variance_is_clamped(saved):
    folder, network = saved("AutoencoderKL")
    with torch.no_grad():
        network.quant_conv.bias[5:].copy_(torch.tensor([1000.0, -1000.0, 0.0, 0.0, 0.0]))
    network.save_pretrained(folder)
    std = autoencoders.build("diffusers", model=str(folder)).moments(images()).std
    assert std is not None
    torch.testing.assert_close(std[:, 0], torch.full((3, 4, 4), 10.0).exp())
    torch.testing.assert_close(std[:, 1], torch.full((3, 4, 4), -15.0).exp())


class Patches(nn.Module):
    """In the place of RAE's encoder: the mean colour of each patch, and more, as tokens."""

    def __init__(self, hidden_size, patch_size):
        super().__init__()
        self.project = nn.Conv2d(3, hidden_size, patch_size, patch_size)


@pytest.fixture
def rae(monkeypatch, tmp_path):
    """Save a random tiny AutoencoderRAE, whose own encoders are transformers', which are not needed here."""
    module = importlib.import_module("diffusers.models.autoencoders.autoencoder_rae")
    monkeypatch.setattr(
        module, "_build_encoder", lambda **options: Patches(options["hidden_size"], options["patch_size"])
    )
    monkeypatch.setitem(module._ENCODER_FORWARD_FNS, "dinov2", lambda net, x: net.project(x).flatten(2).transpose(1, 2))

    def save(**changes):
        torch.manual_seed(2)
        options = {
            "encoder_hidden_size": 5,
            "encoder_patch_size": 7,
            "encoder_input_size": 14,
            "patch_size": 4,
            "decoder_hidden_size": 8,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 6,
            "latents_mean": torch.randn(5, 2, 2),
            "latents_std": torch.rand(5, 2, 2) + 0.5,
            "noise_tau": 0.8,
            "scaling_factor": 1.5,
        }
        network = module.AutoencoderRAE(**{**options, **changes}).eval()
        network.save_pretrained(tmp_path / "rae")
        return tmp_path / "rae", network

    return save


def test_rae_scales_by_itself_and_is_shown_unit_images(rae):
    """Its statistics, a value for each place, and its factor are inside; its encoder was trained on [0, 1]."""
    folder, network = rae()
    autoencoder, x = autoencoders.build("diffusers", model=str(folder)), images()
    tokens = network.encoder.project(
        (nn.functional.interpolate((x + 1) / 2, size=(14, 14), mode="bicubic") - network.encoder_mean)
        / network.encoder_std
    )
    wanted = (tokens - network._latents_mean) / (network._latents_std + 1e-5) * 1.5
    moments = autoencoder.moments(x)
    z = autoencoder.to_model(moments.mean)
    torch.testing.assert_close(z, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert moments.std is None and autoencoder.latent_shape(8) == (5, 2, 2) == tuple(z.shape[1:])
    assert autoencoder.manifest["input_range"] == [0.0, 1.0]
    assert autoencoder.manifest["scaling"] == {
        "mean": [0.0] * 5,
        "std": [1.0] * 5,
        "source": "applied by the autoencoder itself",
    }
    with torch.no_grad():
        unit = network.decode(wanted).sample
    torch.testing.assert_close(autoencoder.decode(z), 2 * unit - 1, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="got images of 16 × 16"):
        autoencoder.moments(images(side=16))
    with pytest.raises(InputError, match="brings statistics of its own"):
        autoencoders.build("diffusers", model=str(folder), latents_mean=[0.0] * 5, latents_std=[1.0] * 5)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
def test_rae_names_the_package_that_it_needs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(MissingPackageError, match="pip install transformers"):
        autoencoders.build("diffusers", model=str(tmp_path))


# --- options


def test_bytes_are_shown_as_their_floats(saved):
    folder, network = saved("AutoencoderKL")
    autoencoder = autoencoders.build("diffusers", model=str(folder))
    x = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(
        autoencoder.moments(x).mean, raw(network, x.float() / 127.5 - 1)[0], rtol=1e-5, atol=1e-6
    )


def test_another_range_of_inputs_is_kept_on_both_sides(saved):
    folder, network = saved("AutoencoderKL")
    autoencoder, x = autoencoders.build("diffusers", model=str(folder), input_range=(0, 1)), images()
    mean = autoencoder.moments(x).mean
    torch.testing.assert_close(mean, raw(network, (x + 1) / 2)[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        wanted = 2 * network.decode(mean).sample - 1
    torch.testing.assert_close(autoencoder.decode(autoencoder.to_model(mean)), wanted, rtol=1e-4, atol=1e-5)
    assert autoencoder.manifest["input_range"] == [0, 1]


def test_statistics_that_are_given_replace_the_factor(saved):
    folder, network = saved("AutoencoderKL")
    given = {"latents_mean": [1.0, 2.0, 3.0, 4.0, 5.0], "latents_std": [0.5, 0.25, 2.0, 1.0, 4.0]}
    autoencoder, x = autoencoders.build("diffusers", model=str(folder), **given), images()
    wanted = (raw(network, x)[0] - col(1, 2, 3, 4, 5)) / col(0.5, 0.25, 2, 1, 4)
    torch.testing.assert_close(autoencoder.to_model(autoencoder.moments(x).mean), wanted)
    assert autoencoder.manifest["scaling"]["source"] == "latents_mean and latents_std as given"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_it_and_gives_float32(dtype, saved):
    folder, network = saved("AutoencoderKL")
    autoencoder = autoencoders.build("diffusers", model=str(folder), dtype=str(dtype).removeprefix("torch."))
    half, x = network.to(dtype), images()
    moments = autoencoder.moments(x)
    mean, _ = raw(half, x.to(dtype))
    z = autoencoder.to_model(moments.mean)
    assert torch.equal(moments.mean, mean.float()) and z.dtype == moments.std.dtype == torch.float32
    torch.testing.assert_close(z, mean.float() * 0.4)
    decoded = autoencoder.decode(z)
    assert decoded.dtype == torch.float32 and autoencoder.manifest["dtype"] == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        torch.testing.assert_close(decoded, half.decode(autoencoder.to_autoencoder(z).to(dtype)).sample.float())


def test_an_overflow_of_half_precision_is_told(saved):
    folder, network = saved("AutoencoderKL")
    with torch.no_grad():
        network.quant_conv.bias.fill_(1e5)
        network.decoder.conv_out.bias.fill_(1e5)
    network.save_pretrained(folder)
    autoencoder = autoencoders.build("diffusers", model=str(folder), dtype="float16")
    with pytest.raises(InputError, match="float16 cannot hold; use dtype: bfloat16 or float32"):
        autoencoder.moments(images())
    with pytest.raises(InputError, match="float16 cannot hold"):
        autoencoder.decode(torch.zeros(1, 5, 2, 2))


def test_slices_and_empty_batches_change_nothing(saved):
    folder, _ = saved("AutoencoderKLFlux2")
    seen = []
    results = []
    for slices in (2, 7):
        autoencoder = autoencoders.build("diffusers", model=str(folder), slices=slices)
        autoencoder.network.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        autoencoder.network.decoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        mean, std = autoencoder.moments(images(5))
        results.append((mean, std, autoencoder.decode(mean)))
    assert seen == [2, 2, 1, 2, 2, 1, 5, 5]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_it_stays_frozen_and_leaves_torchs_generator_alone(saved):
    folder, _ = saved("VQModel")  # whose table is drawn when it is made
    torch.manual_seed(7)
    before = torch.get_rng_state()
    autoencoder = autoencoders.build("diffusers", model=str(folder)).train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in autoencoder.modules())
    x = images().requires_grad_()
    assert not autoencoder.moments(x).mean.requires_grad and not any(p.requires_grad for p in autoencoder.parameters())
    assert not autoencoder.decode(torch.zeros(1, 5, 2, 2, requires_grad=True)).requires_grad


# --- what it tells, and where it comes from


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_manifest_tells_what_decides_over_latents(name, saved):
    folder, _ = saved(name)
    manifest = autoencoders.build("diffusers", model=str(folder)).manifest
    assert json.loads(json.dumps(manifest)) == manifest
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert manifest["class"] == name and manifest["sha256"] == hashlib.sha256(weights).hexdigest()
    assert (manifest["name"], manifest["dtype"], manifest["input_range"]) == ("diffusers", "float32", [-1.0, 1.0])
    assert len(manifest["scaling"]["mean"]) == len(manifest["scaling"]["std"]) > 2 and manifest["scaling"]["source"]


def test_a_subfolder_and_a_variant(saved, tmp_path):
    folder, network = saved("AutoencoderTiny", "pipeline/vae")
    network.to(torch.float16).save_pretrained(folder, variant="fp16")
    whole, half = (
        autoencoders.build("diffusers", model=str(tmp_path / "pipeline"), subfolder="vae", variant=variant)
        for variant in (None, "fp16")
    )
    assert whole.manifest["sha256"] != half.manifest["sha256"]
    torch.testing.assert_close(whole.moments(images()).mean, half.moments(images()).mean, rtol=0.02, atol=0.02)
    assert half.network.dtype == torch.float32


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_a_local_copy(name, saved):
    folder, _ = saved("AutoencoderKL")
    assert autoencoders.build(name, model=str(folder), subfolder=None).manifest["name"] == name
    assert name in autoencoders.names() and "diffusers" in autoencoders.names()


@pytest.mark.parametrize("name", ["sd-vae-ft-ema", "sd3-vae"])
def test_a_hub_that_cannot_be_reached_is_told(name, monkeypatch, tmp_path):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = rf"got no config.json of {PRESETS[name].model} from the hub \(.+\); give model: FOLDER of a copy, or let"
    with pytest.raises(WeightsError, match=said):
        autoencoders.build(name)


def test_files_come_from_the_hubs_cache(saved, monkeypatch):
    """Only the files that are needed are asked for: repositories hold others, pickles among them."""
    folder, _ = saved("AutoencoderKL", "vae")
    asked = []

    def download(model, name, subfolder):
        asked.append((model, name, subfolder))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    told = autoencoders.build("sd3-vae").manifest
    repository = ("stabilityai/stable-diffusion-3-medium-diffusers", "vae")
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    assert asked == [(repository[0], name, repository[1]) for name in names] and told["name"] == "sd3-vae"


# --- what is refused


def refusal(error, **options):
    with pytest.raises(error) as caught:
        autoencoders.build("diffusers", **options)
    return str(caught.value)


def rewritten(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def test_a_class_that_is_not_known_is_named_with_those_that_are(saved):
    folder, _ = saved("AutoencoderKL")
    said = refusal(WeightsError, model=rewritten(folder, _class_name="AutoencoderKLWan"))
    assert "class 'AutoencoderKLWan', whose scaling of latents is not known" in said and "AutoencoderKLFlux2" in said
    assert "class 'None'" in refusal(WeightsError, model=rewritten(folder, _class_name=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling_factor": None}, "got scaling_factor None in {folder}/config.json of AutoencoderKL"),
        (
            {"scaling_factor": -0.5},
            "got scaling_factor -0.5 in {folder}/config.json of AutoencoderKL, expected a number a",
        ),
        ({"scaling_factor": True}, "got scaling_factor True"),
        ({"scaling_factor": 10**400}, "got scaling_factor 1000"),
        (
            {"shift_factor": "a"},
            "got shift_factor 'a' in {folder}/config.json of AutoencoderKL, expected a number other",
        ),
        (
            {"latents_mean": "abcde", "latents_std": "abcde"},
            "{folder}/config.json of AutoencoderKL that cannot be: got",
        ),
        ({"latents_mean": [None] * 5, "latents_std": [1.0] * 5}, "expected a list of numbers each"),
        ({"scaling_factor": 0.0}, "got scaling_factor 0.0"),
        ({"shift_factor": "much"}, "got shift_factor 'much'"),
        ({"latents_mean": [0.0] * 5}, "give both, 5 numbers each"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "give both, 5 numbers each"),
        ({"latents_mean": [0.0] * 5, "latents_std": [1.0] * 5, "shift_factor": 0.1}, "got shift_factor beside"),
    ],
)
def test_a_scaling_that_is_none_is_refused_never_filled_in(changes, said, saved):
    folder, _ = saved("AutoencoderKL")
    assert said.format(folder=folder) in refusal(WeightsError, model=rewritten(folder, **changes))


def test_statistics_of_a_batch_norm_that_cannot_be_are_refused(saved):
    folder, network = saved("AutoencoderKLFlux2")
    network.bn.running_var[3] = -1.0
    network.save_pretrained(folder)
    assert f"in the weights beside {folder}/config.json" in refusal(WeightsError, model=str(folder))


def test_a_field_of_scaling_that_the_class_ignores_is_refused(saved):
    folder, _ = saved("AutoencoderDC")
    said = refusal(WeightsError, model=rewritten(folder, latents_mean=[0.5] * 4))
    assert "got latents_mean in" in said and "which AutoencoderDC of diffusers" in said and "does not know" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latents_mean": [0.0] * 5}, "give both, 5 numbers each"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "give both, 5 numbers each"),
        ({"latents_mean": [0.0] * 5, "latents_std": [1.0, 1.0, 0.0, 1.0, 1.0]}, "std above 0"),
        ({"latents_mean": [0.0] * 4 + [float("nan")], "latents_std": [1.0] * 5}, "expected finite numbers"),
        ({"dtype": "float64"}, "got dtype 'float64'"),
        ({"slices": 0}, "slices 0; expected"),
        ({"input_range": (1, 0)}, "got input_range (1, 0), expected finite numbers, its lower end first"),
        ({"input_range": (0, math.inf)}, "got input_range (0, inf), expected finite numbers"),
    ],
)
def test_options_that_cannot_be(options, said, saved):
    folder, _ = saved("AutoencoderKL")
    assert said in refusal(InputError, model=str(folder), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latents_mean": "abcde", "latents_std": "abcde"}, "got latents_mean 'abcde'"),
        ({"latents_mean": [0.0] * 5, "latents_std": ["1"] * 5}, "expected a list of numbers each"),
        ({"slices": True}, "slices True; expected"),
        ({"slices": "2"}, "slices '2'; expected"),
        ({"model": 7}, "got model 7"),
        ({"subfolder": 7}, "subfolder 7"),
        ({"variant": 7}, "variant 7"),
        ({"input_range": (0,)}, "got input_range (0,), expected two numbers"),
        ({"input_range": ("0", 1)}, "expected two numbers"),
        ({"input_range": 1.0}, "expected two numbers"),
    ],
)
def test_options_of_another_type(options, said, saved):
    folder, _ = saved("AutoencoderKL")
    assert said in refusal(InputTypeError, **{"model": str(folder), **options})


def test_floats_of_another_range_are_refused(saved):
    """Levels up to 255, and what is not a number; a little beyond [−1, 1] decoders and filters go themselves."""
    autoencoder = autoencoders.build("diffusers", model=str(saved("AutoencoderKL")[0]))
    assert autoencoder.moments(1.5 * images()).mean.isfinite().all()
    for wrong in (127.5 * (images() + 1), images() * math.nan):
        with pytest.raises(InputError, match=r"got images of floats up to .*, expected \[−1, 1\]; levels a are"):
            autoencoder.moments(wrong)


def test_statistics_are_refused_where_there_are_some(saved):
    folder, _ = saved("AutoencoderKL", latents_mean=[0.0] * 5, latents_std=[2.0] * 5)
    given = {"latents_mean": [0.0] * 5, "latents_std": [1.0] * 5}
    assert "brings statistics of its own" in refusal(InputError, model=str(folder), **given)
    folder, _ = saved("AutoencoderKLFlux2", "other")
    given = {key: 12 * [1.0] for key in given}
    assert "brings statistics of its own" in refusal(InputError, model=str(folder), **given)


def test_images_and_latents_that_do_not_fit(saved):
    folder, _ = saved("AutoencoderKL")
    autoencoder = autoencoders.build("diffusers", model=str(folder))
    for shape in ((3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 6), (2, 4, 8, 8), (2, 3, 7, 7)):
        with pytest.raises(InputError, match=r"got images of (shape|7 × 7)"):
            autoencoder.moments(torch.zeros(shape))
    with pytest.raises(InputTypeError, match=r"images of type torch.int64, expected uint8"):
        autoencoder.moments(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    for call in (autoencoder.decode, autoencoder.to_model, autoencoder.to_autoencoder):
        with pytest.raises(InputError, match=r"got latents of shape \(2, 4, 3, 3\), expected \(N, 5, h, w\)"):
            call(torch.zeros(2, 4, 3, 3))
    for side in ("in_channels", "out_channels"):
        folder, _ = saved("AutoencoderKL", side, **{side: 4})
        assert f"of 4 image channels ({side}), expected 3" in refusal(InputError, model=str(folder))


def test_files_that_are_not_there_or_damaged(saved, tmp_path):
    assert "got no folder ./none; give one" in refusal(WeightsError, model="./none")
    assert "got no config.json in" in refusal(WeightsError, model=str(tmp_path))
    folder, _ = saved("AutoencoderKL")
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    assert "got no diffusion_pytorch_model.fp16.safetensors in" in refusal(
        WeightsError, model=str(folder), variant="fp16"
    )
    content = weights.read_bytes()
    weights.write_bytes(content[:-50])
    assert f"got {folder}, which AutoencoderKL cannot be read from" in refusal(WeightsError, model=str(folder))
    weights.rename(folder / "diffusion_pytorch_model.bin")
    said = refusal(WeightsError, model=str(folder))
    assert "got no diffusion_pytorch_model.safetensors in" in said and "which is there, executes what it holds" in said
    for text, expected in (("{", "cannot be read"), ("[1]", "holds no object"), (" " * 2**21, "got no config.json")):
        config.write_text(text)
        assert expected in refusal(WeightsError, model=str(folder))


def test_weights_of_another_network_are_refused(saved):
    folder, _ = saved("AutoencoderKL")
    assert "which does not fit its config.json" in refusal(
        WeightsError, model=rewritten(folder, use_post_quant_conv=False)
    )
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = {key: value for key, value in load_file(weights).items() if key != "decoder.conv_out.bias"}
    save_file(state, weights, metadata={"format": "pt"})
    folder_name = rewritten(folder, use_post_quant_conv=True)
    assert "decoder.conv_out.bias" in refusal(WeightsError, model=folder_name)


def test_a_configuration_of_more_than_its_file_holds_is_refused_before_it_is_built(saved):
    folder, _ = saved("AutoencoderKL")
    said = refusal(WeightsError, model=rewritten(folder, latent_channels=10**7))
    assert "values of its config.json; use another copy" in said


def test_names_of_older_files_are_read(saved):
    """Stable Diffusion's first autoencoders: attention under other names, and no field but what makes the network."""
    folder, network = saved("AutoencoderKL", scaling_factor=0.18215)
    weights, older = folder / "diffusion_pytorch_model.safetensors", {}
    for key, value in load_file(weights).items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{now}.", f".{then}.")
        older[key] = value
    assert any("proj_attn" in key for key in older)
    save_file(older, weights, metadata={"format": "pt"})
    kept = {"_class_name": "AutoencoderKL", **BLOCKS, "latent_channels": 5}
    (folder / "config.json").write_text(json.dumps(kept))
    autoencoder = autoencoders.build("sd-vae-ft-ema", model=str(folder))
    mean, _ = raw(network, images())
    torch.testing.assert_close(autoencoder.to_model(autoencoder.moments(images()).mean), mean * 0.18215)
