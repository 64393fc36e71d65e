"""Autoencoders of diffusers: each class against its own pipeline's arithmetic, written out here; files; refusals."""

from __future__ import annotations

import importlib

import pytest
import torch

from pathline import InputError
from pathline.encoders import autoencoders

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
