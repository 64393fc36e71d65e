"""The autoencoders by name: where each lies on the hub of Hugging Face."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PRESETS", "Preset"]


class Preset(NamedTuple):
    """Where an autoencoder lies.

    Attributes:
        model: its repository on the hub.
        subfolder: of the repository; None is its top.
    """

    model: str
    subfolder: str | None = None


PRESETS: dict[str, Preset] = {
    "sd-vae-ft-ema": Preset("stabilityai/sd-vae-ft-ema"),
    "sd-vae-ft-mse": Preset("stabilityai/sd-vae-ft-mse"),
    "sdxl-vae": Preset("stabilityai/sdxl-vae"),
    "sd3-vae": Preset("stabilityai/stable-diffusion-3-medium-diffusers", "vae"),
    "flux-vae": Preset("black-forest-labs/FLUX.1-schnell", "vae"),
    "flux2-vae": Preset("black-forest-labs/FLUX.2-dev", "vae"),
    "taesd": Preset("madebyollin/taesd"),
    "taesdxl": Preset("madebyollin/taesdxl"),
    "taesd3": Preset("madebyollin/taesd3"),
    "taef1": Preset("madebyollin/taef1"),
    "dc-ae-f32c32": Preset("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"),
    "dc-ae-f32c32-sana": Preset("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"),
    "dc-ae-f64c128": Preset("mit-han-lab/dc-ae-f64c128-in-1.0-diffusers"),
    "dc-ae-f128c512": Preset("mit-han-lab/dc-ae-f128c512-in-1.0-diffusers"),
    "rae-dinov2-b": Preset("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"),
    "rae-siglip2-b": Preset("nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08"),
    "rae-mae-b": Preset("nyu-visionx/RAE-mae-base-p16-ViTXL-n08"),
}
