"""The classes of diffusers' autoencoders that are known here: what each gives, and how its latents are scaled.

diffusers scales latents in its pipelines, not in its autoencoders, and in each class by other fields; so one row a
class, and none for a class whose rule is not written down. C channels of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pathline.core.errors import InputError, InputTypeError, PathlineError, WeightsError, suggest

__all__ = ["FIELDS", "KINDS", "Kind", "Scaling", "given_scaling", "kind_of"]

FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps")
SYMMETRIC, UNIT = (-1.0, 1.0), (0.0, 1.0)


class Scaling(NamedTuple):
    """A model's latents are (z − mean)/std, channel by channel.

    Attributes:
        mean: C of them.
        std: C of them.
        source: who says so.
    """

    mean: list[float]
    std: list[float]
    source: str


class Kind(NamedTuple):
    """A class.

    Attributes:
        output: field of what its ``encode`` returns; ``latent_dist`` is a posterior, the others are deterministic.
        channels: C of a network of it.
        side: side of the latent of images of a side, or None for images that it does not take.
        scaling: of a network and its C.
        own_statistics: whether it brings statistics of its latents, so that nobody else's may take their place.
        input_range: of its images, in and out.
        patch: side of the patches whose pixels become channels before latents are scaled.
    """

    output: str
    channels: Callable[[Any], int]
    side: Callable[[Any, int], int | None]
    scaling: Callable[[Any, int], Scaling]
    own_statistics: Callable[[Any], bool] = lambda _: False
    input_range: tuple[float, float] = SYMMETRIC
    patch: int = 1


def kind_of(name: str, where: str) -> Kind:
    """Return the row of a class.

    Raises:
        WeightsError: there is none.
    """
    if name not in KINDS:
        raise WeightsError(
            f"got {where} of class {name!r}, whose scaling of latents is not known here; use one of another class, or "
            f"register an autoencoder of your own ({suggest(name, KINDS)})"
        )
    return KINDS[name]


def given_scaling(mean: Any, std: Any, channels: int) -> Scaling | None:
    """Return the scaling by statistics that somebody gives; None where nobody does.

    Raises:
        InputError: one without the other, another number than C, or values that cannot be.
        InputTypeError: something else than numbers.
    """
    if mean is None and std is None:
        return None
    for values in (mean, std):
        if values is not None and (not isinstance(values, list | tuple) or not all(map(_is_number, values))):
            raise InputTypeError(f"got latents_mean {mean!r} and latents_std {std!r}, expected a list of numbers each")
    if mean is None or std is None or not len(mean) == len(std) == channels:
        raise InputError(f"got latents_mean {mean} and latents_std {std}; give both, {channels} numbers each")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise InputError(f"got latents_mean {mean} and latents_std {std}, expected finite numbers and std above 0")
    return Scaling([float(m) for m in mean], [float(s) for s in std], "latents_mean and latents_std as given")


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)  # larger ones overflow a float


def _field(network: Any, name: str, *, positive: bool = True) -> float:
    """Return a number of a network's configuration; nothing takes the place of one that is not there."""
    value = network.config[name]
    if not _is_number(value) or not math.isfinite(value) or (value <= 0 if positive else value == 0):
        wanted = "a number above 0" if positive else "a number other than 0"
        raise WeightsError(f"got {name} {value!r} in {_place(network)}, expected {wanted}; correct it")
    return float(value)


def _place(network: Any) -> str:
    """Name the file that a network's configuration was read from."""
    return f"{network.config.get('_name_or_path', '')}/config.json of {type(network).__name__}"


def _by_factor(network: Any, channels: int) -> Scaling:
    """z·scale, as SANA's and VQ models' pipelines have it."""
    scale = _field(network, "scaling_factor")
    return Scaling([0.0] * channels, [1 / scale] * channels, "scaling_factor of its configuration")


def _by_factor_and_shift(network: Any, channels: int) -> Scaling:
    """(z − shift)·scale, as the pipelines of Stable Diffusion 3 and FLUX.1 have it; a shift of None or 0 is none."""
    shift, scale = network.config["shift_factor"], _field(network, "scaling_factor")
    if not shift:
        return _by_factor(network, channels)
    shift = _field(network, "shift_factor", positive=False)
    return Scaling([shift] * channels, [1 / scale] * channels, "scaling_factor and shift_factor of its configuration")


def _of_kl(network: Any, channels: int) -> Scaling:
    """The same, or (z − mean)·scale/std where the configuration has statistics, as Stable Diffusion XL's pipeline."""
    if not _has_statistics(network):
        return _by_factor_and_shift(network, channels)
    if network.config["shift_factor"]:
        raise WeightsError(
            f"got shift_factor beside latents_mean in {_place(network)}, of which pipelines apply one; take one out"
        )
    try:
        given = given_scaling(network.config["latents_mean"], network.config["latents_std"], channels)
    except PathlineError as error:
        raise WeightsError(f"got statistics in {_place(network)} that cannot be: {error}") from error
    scale = _field(network, "scaling_factor")
    assert given is not None
    source = "latents_mean, latents_std and scaling_factor of its configuration"
    return Scaling(given.mean, [std / scale for std in given.std], source)


def _has_statistics(network: Any) -> bool:
    return network.config["latents_mean"] is not None or network.config["latents_std"] is not None


def _of_batch_norm(network: Any, channels: int) -> Scaling:
    """(z − running mean)/√(running variance + ε) of 2 × 2 patches, as FLUX.2's pipeline has it."""
    eps = _field(network, "batch_norm_eps")
    mean, std = network.bn.running_mean.double(), (network.bn.running_var.double() + eps).sqrt()
    if not bool(mean.isfinite().all()) or not bool((std.isfinite() & (std > 0)).all()):
        raise WeightsError(f"got statistics that cannot be in the weights beside {_place(network)}; use another copy")
    return Scaling(mean.tolist(), std.tolist(), "running statistics of its batch norm")


def _inside(network: Any, channels: int) -> Scaling:
    del network
    return Scaling([0.0] * channels, [1.0] * channels, "applied by the autoencoder itself")


def _by_levels(network: Any, resolution: int) -> int | None:
    """Each block but one halves the side."""
    blocks = network.config.get("encoder_block_out_channels") or network.config["block_out_channels"]
    side, left = divmod(resolution, 2 ** (len(blocks) - 1))
    return side if not left and side else None


def _by_levels_and_patches(network: Any, resolution: int) -> int | None:
    side = _by_levels(network, resolution)
    return side // 2 if side and side % 2 == 0 else None


def _of_one_size(network: Any, resolution: int) -> int | None:
    """Whatever it is shown it resizes, and gives images of one size."""
    if not network.config["reshape_to_2d"] or resolution != network.decoder_image_size:
        return None
    return resolution // int(network.decoder_patch_size)


def _latent_channels(network: Any) -> int:
    return int(network.config["latent_channels"])


def _embedded_channels(network: Any) -> int:
    return int(network.config["vq_embed_dim"] or network.config["latent_channels"])


def _patch_channels(network: Any) -> int:
    if tuple(network.config["patch_size"]) != (2, 2):
        raise WeightsError(f"got patches of {network.config['patch_size']} in AutoencoderKLFlux2, expected (2, 2)")
    return 4 * _latent_channels(network)


KINDS: dict[str, Kind] = {
    "AutoencoderKL": Kind("latent_dist", _latent_channels, _by_levels, _of_kl, _has_statistics),
    "AutoencoderKLFlux2": Kind(
        "latent_dist", _patch_channels, _by_levels_and_patches, _of_batch_norm, lambda _: True, patch=2
    ),
    "AutoencoderTiny": Kind("latents", _latent_channels, _by_levels, _by_factor_and_shift),
    "AutoencoderDC": Kind("latent", _latent_channels, _by_levels, _by_factor),
    "VQModel": Kind("latents", _embedded_channels, _by_levels, _by_factor),
    "AutoencoderRAE": Kind(
        "latent",
        lambda network: int(network.config["encoder_hidden_size"]),
        _of_one_size,
        _inside,
        lambda _: True,
        input_range=UNIT,
    ),
}
