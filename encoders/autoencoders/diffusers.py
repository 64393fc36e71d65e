"""Autoencoders of diffusers as autoencoders here: one adapter, with the class's own scaling stated once.

N images of R × R pixels; C, h, w the shape of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from pathline.core.errors import InputError, InputTypeError
from pathline.encoders.autoencoders.base import Autoencoder, Moments, registry
from pathline.encoders.autoencoders.files import find, load
from pathline.encoders.autoencoders.kinds import given_scaling
from pathline.encoders.autoencoders.presets import PRESETS, Preset

__all__ = ["DiffusersAutoencoder"]

Precision = Literal["float32", "float16", "bfloat16"]
FARTHEST = 2.0  # that images from a decoder or a filter may overshoot [−1, 1] to; others are of another range
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder of diffusers, in evaluation mode and without gradients for good.

    Latents of AutoencoderKLFlux2 are those of its pipeline: 2 × 2 patches as channels. VA-VAE and others that are an
    AutoencoderKL with statistics of their own, told elsewhere, take them as ``latents_mean`` and ``latents_std``.

    Args:
        name: of the autoencoder, for its manifest.
        model: a folder that ``save_pretrained`` wrote, or ``owner/name`` on the hub of Hugging Face.
        subfolder: of the model, as ``vae`` in a pipeline's.
        variant: of the weights' file, as ``fp16``.
        dtype: precision that the network computes in; latents and images are float32.
        latents_mean: of each of C channels, where the class brings no statistics; model latents are then
            (z − latents_mean)/latents_std, and scaling_factor is not applied.
        latents_std: see ``latents_mean``.
        input_range: of images as the network is shown them; None is the class's own. Others are for latents of
            programs that fed it otherwise, as EDM2's (0, 1).
        slices: images that are encoded or decoded at once.

    Raises:
        InputError: statistics that do not fit, or a range or number that cannot be.
        InputTypeError: an option of another type.
        WeightsError: see ``files.find`` and ``files.load``.
        MissingPackageError: diffusers, or what it needs, is not installed.
    """

    network: Any  # of diffusers, whose attributes have no types
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        model: str,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: Precision = "float32",
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        input_range: tuple[float, float] | None = None,
        slices: int = 16,
    ) -> None:
        super().__init__()
        _check_options(model, subfolder, variant, dtype, input_range, slices)
        files = find(str(model), subfolder, variant)
        network, sha256 = load(files)
        self.kind, self.channels, self.slices = files.kind, files.kind.channels(network), slices
        self.input_range = self.kind.input_range if input_range is None else (input_range[0], input_range[1])
        low, high = self.input_range
        self._centre, self._half = (low + high) / 2, (high - low) / 2
        for side in ("in_channels", "out_channels", "num_channels"):  # of each class those that it has
            if network.config.get(side, 3) != 3:
                raise InputError(f"got {model} of {network.config[side]} image channels ({side}), expected 3")
        given = given_scaling(latents_mean, latents_std, self.channels)
        if given is not None and self.kind.own_statistics(network):
            raise InputError(f"got latents_mean for {model}, which brings statistics of its own; leave it out")
        scaling = given or self.kind.scaling(network, self.channels)
        self.network = nn.Module.to(network, TYPES[dtype])  # its own warns of nothing
        for key, values in (("mean", scaling.mean), ("std", scaling.std)):
            self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)
        self.requires_grad_(False).train()
        self.manifest = {
            "name": name,
            "class": files.class_name,
            "sha256": sha256,
            "dtype": dtype,
            "input_range": list(self.input_range),
            "scaling": scaling._asdict(),
        }

    def train(self, mode: bool = True) -> DiffusersAutoencoder:
        """Stay in evaluation mode, whatever is asked for."""
        super().train(False)
        return self

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latent of an image of ``resolution`` × ``resolution`` pixels.

        Raises:
            InputError: a resolution that it does not take.
        """
        side = self.kind.side(self.network, resolution)
        if side is None:
            raise InputError(
                f"got images of {resolution} × {resolution}, which {self.manifest['class']} does not take; use a "
                "multiple of what it shrinks images by, or the one size that it has"
            )
        return self.channels, side, side

    @torch.no_grad()
    def moments(self, images: Tensor) -> Moments:
        """Return the unscaled posterior of images (N, 3, R, R), uint8 or floats in [−1, 1], in float32.

        Raises:
            InputError: images of another shape, floats far out of [−1, 1], or values that float16 cannot hold.
            InputTypeError: neither uint8 nor floating point.
        """
        if not isinstance(images, Tensor) or (images.dtype != torch.uint8 and not images.is_floating_point()):
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputTypeError(f"got images of type {came}, expected uint8 from 0 to 255 or floats in [−1, 1]")
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise InputError(f"got images of shape {tuple(images.shape)}, expected (N, 3, R, R)")
        self.latent_shape(images.shape[2])
        first = images[: self.slices]
        if first.is_floating_point() and first.numel() and not float(first.abs().max()) <= FARTHEST:
            raise InputError(
                f"got images of floats up to {float(first.abs().max()):g}, expected [−1, 1]; levels a are a/127.5 − 1"
            )
        found = [self._encoded(part) for part in self._parts(images)]
        means, stds = [mean for mean, _ in found], [std for _, std in found if std is not None]
        return Moments(torch.cat(means), torch.cat(stds) if stds else None)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        """Cut a batch up; an empty one is one part."""
        yield from torch.split(x.to(self.mean.device), self.slices)

    def _encoded(self, images: Tensor) -> Moments:
        signed = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
        shown = signed * self._half + self._centre
        found = getattr(self.network.encode(shown.to(self.network.dtype)), self.kind.output)
        if self.kind.output != "latent_dist":
            return Moments(self._checked(found), None)
        # diffusers has clamped the logarithm to [−30, 20]
        mean, std = self._checked(found.mean), (self._checked(found.logvar) / 2).exp()
        return Moments(self._patched(mean), self._patched(std))

    def _checked(self, x: Tensor) -> Tensor:
        """Return a result in float32; half precision overflows where others do not."""
        if x.dtype == torch.float16 and not bool(x.isfinite().all()):
            raise InputError("got values that float16 cannot hold; use dtype: bfloat16 or float32 for this autoencoder")
        return x.float()

    def _patched(self, z: Tensor) -> Tensor:
        p = self.kind.patch
        return rearrange(z, "n c (h p) (w q) -> n (c p q) h w", p=p, q=p)

    def to_model(self, z: Tensor) -> Tensor:
        """Return (z − mean)/std of latents (N, C, h, w), in float32."""
        return (self._shaped(z) - self.mean) / self.std

    def to_autoencoder(self, z: Tensor) -> Tensor:
        """Return z·std + mean of a model's latents (N, C, h, w), in float32."""
        return self._shaped(z) * self.std + self.mean

    def _shaped(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise InputError(f"got latents of shape {tuple(z.shape)}, expected (N, {self.channels}, h, w)")
        return z.to(self.mean.device).float()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the images (N, 3, R, R) in [−1, 1], not clamped, of a model's latents, in float32.

        Raises:
            InputError: latents of another shape, or images that float16 cannot hold.
        """
        p = self.kind.patch
        raw = rearrange(self.to_autoencoder(z), "n (c p q) h w -> n c (h p) (w q)", p=p, q=p)
        images = [self._checked(self.network.decode(part.to(self.network.dtype)).sample) for part in self._parts(raw)]
        return (torch.cat(images) - self._centre) / self._half


def _check_options(model: Any, subfolder: Any, variant: Any, dtype: Any, input_range: Any, slices: Any) -> None:
    """Raise InputTypeError or InputError for options that cannot be, whatever the files hold."""
    texts = isinstance(model, str | Path) and all(isinstance(text, str | None) for text in (subfolder, variant))
    if not texts or type(slices) is not int:
        raise InputTypeError(
            f"got model {model!r}, subfolder {subfolder!r}, variant {variant!r}, slices {slices!r}; expected texts and "
            "a whole number"
        )
    if dtype not in tuple(TYPES) or slices < 1:
        raise InputError(f"got dtype {dtype!r}, slices {slices}; expected one of {', '.join(TYPES)}, and 1 or more")
    if input_range is None:
        return
    numbers = isinstance(input_range, list | tuple) and all(type(end) in (int, float) for end in input_range)
    if not numbers or len(input_range) != 2:
        raise InputTypeError(f"got input_range {input_range!r}, expected two numbers")
    if not all(map(math.isfinite, input_range)) or not input_range[0] < input_range[1]:
        raise InputError(f"got input_range {input_range}, expected finite numbers, its lower end first")


@registry.register("diffusers")
def any_autoencoder(
    model: str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: Precision = "float32",
    latents_mean: list[float] | None = None,
    latents_std: list[float] | None = None,
    input_range: tuple[float, float] | None = None,
    slices: int = 16,
) -> Autoencoder:
    """Build an autoencoder of diffusers from a folder or the hub; see ``DiffusersAutoencoder``."""
    return DiffusersAutoencoder(
        "diffusers",
        model,
        subfolder=subfolder,
        variant=variant,
        dtype=dtype,
        latents_mean=latents_mean,
        latents_std=latents_std,
        input_range=input_range,
        slices=slices,
    )


def _named(name: str, preset: Preset) -> Callable[..., Autoencoder]:
    """Return what builds a row of the table."""

    def build(
        *,
        model: str = preset.model,
        subfolder: str | None = preset.subfolder,
        variant: str | None = None,
        dtype: Precision = "float32",
        input_range: tuple[float, float] | None = None,
        slices: int = 16,
    ) -> Autoencoder:
        return DiffusersAutoencoder(
            name, model, subfolder=subfolder, variant=variant, dtype=dtype, input_range=input_range, slices=slices
        )

    build.__doc__ = f"Build {preset.model} of the hub, or a copy of it; see ``DiffusersAutoencoder``."
    return build


for _name, _preset in PRESETS.items():
    registry.register(_name)(_named(_name, _preset))
