"""The encoders by name: one row each, with the settings of REPA (arXiv:2410.06940) where it has them.

Sizes follow one rule: images of side R are shown at side patch·R/16, so that each encoder has R/16 tokens a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["PRESETS", "Preset"]

Colour = tuple[float, float, float]
IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Colour, Colour] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Preset(NamedTuple):
    """How an encoder is built, and what it is shown.

    Attributes:
        model: name of a ViT in timm, with the tag of its weights.
        colours: mean and standard deviation of each channel, for values in [0, 1]; None for what timm tells.
        final_norm: whether tokens are taken after the last norm; REPA leaves it out for MAE and CLIP.
        changes: options in which the model differs from timm's.
        local: whether the weights are the authors' MoCo v3 checkpoints, which timm's hub does not have.
    """

    model: str
    colours: tuple[Colour, Colour] | None = IMAGENET
    final_norm: bool = True
    changes: Mapping[str, Any] = MappingProxyType({})
    local: bool = False


PRESETS: dict[str, Preset] = {
    "dinov2-s": Preset("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-b": Preset("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-l": Preset("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-g": Preset("vit_giant_patch14_dinov2.lvd142m"),
    "dinov2-reg-s": Preset("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-b": Preset("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-l": Preset("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-g": Preset("vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dino-b": Preset("vit_base_patch16_224.dino"),
    # OpenAI's weights were trained with QuickGELU, which timm's names without the word do not have
    "clip-b": Preset("vit_base_patch16_clip_quickgelu_224.openai", CLIP, final_norm=False),
    "clip-l": Preset("vit_large_patch14_clip_quickgelu_224.openai", CLIP, final_norm=False),
    "mae-b": Preset("vit_base_patch16_224.mae", final_norm=False),
    "mae-l": Preset("vit_large_patch16_224.mae", final_norm=False),
    "mae-h": Preset("vit_huge_patch14_224.mae", final_norm=False),
    "i-jepa-h": Preset("vit_huge_patch14_gap_224.in1k_ijepa"),
    "dinov3-s": Preset("vit_small_patch16_dinov3.lvd1689m"),
    "dinov3-s-plus": Preset("vit_small_plus_patch16_dinov3.lvd1689m"),
    "dinov3-b": Preset("vit_base_patch16_dinov3.lvd1689m"),
    "dinov3-l": Preset("vit_large_patch16_dinov3.lvd1689m"),
    "dinov3-h-plus": Preset("vit_huge_plus_patch16_dinov3.lvd1689m"),
    "dinov3-7b": Preset("vit_7b_patch16_dinov3.lvd1689m"),
    "siglip2-b": Preset("vit_base_patch16_siglip_gap_256.v2_webli", HALF),
    "siglip2-l": Preset("vit_large_patch16_siglip_gap_256.v2_webli", HALF),
    "siglip2-so400m": Preset("vit_so400m_patch16_siglip_gap_256.v2_webli", HALF),
    "siglip2-g": Preset("vit_giantopt_patch16_siglip_gap_256.v2_webli", HALF),
    # the authors' small model has 12 heads, timm's 6
    "mocov3-s": Preset("vit_small_patch16_224", changes={"num_heads": 12}, local=True),
    "mocov3-b": Preset("vit_base_patch16_224", local=True),
    "mocov3-l": Preset("vit_large_patch16_224", local=True),
}
