"""The published runs, one a row: what was built and trained, and the figures that the paper reports of it.

Source: arXiv:2503.14494, Tables 2 and 3 (systems), 7 (ladder and ablations) and 8 (sizes). ImageNet at 256 × 256 in
latents of 4 × 32 × 32 unless said otherwise; AdamW, batch 256. Figures are the paper's own, where they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pathline.core.errors import UnknownNameError, suggest

__all__ = ["PRESETS", "Figures", "Preset", "preset"]


class Figures(NamedTuple):
    """What the paper reports; None for what is not known.

    Attributes:
        parameters: in millions.
        cost: in 10⁹, as the paper counts; see ``report``.
        fid: Fréchet distance in Inception features, of samples of 250 stochastic steps.
        spatial_fid: the same in spatial features.
        inception_score: of the same samples.
    """

    parameters: float | None = None
    cost: float | None = None
    fid: float | None = None
    spatial_fid: float | None = None
    inception_score: float | None = None


class Preset(NamedTuple):
    """A published run.

    Attributes:
        model: the paper's name of it.
        tables: numbers of the paper's tables that report it.
        backbone: name and options.
        figures: the paper's.
        objective: name and options; those left out have their defaults.
        epochs: of 1,281,167 images; 80 where no number is known.
        guidance_scale: of classifier-free guidance in sampling; None is none, or an unknown one.
    """

    model: str
    tables: str
    backbone: Mapping[str, Any]
    figures: Figures
    objective: Mapping[str, Any]
    epochs: int = 80
    guidance_scale: float | None = None


_DEEPFLOW = {"name": "deepflow"}
_DEEP_SUPERVISION = {"name": "deepflow", "acceleration": 0.0, "max_gap": 0.0}
_VELOCITY = {"name": "velocity"}
_LOGIT_NORMAL = {"times": {"name": "logit-normal", "mean": 0.0, "std": 1.0}}
_ALIGNED = {"name": "deepflow", "align": 0.5}
_PROJECTED = {"align_dims": [768], "clamp_gap": True}  # DINOv2-B; the clamp is that of the released weights


def _sit(size: str, **options: Any) -> dict[str, Any]:
    return {"name": "sit", "size": size, **options}


def _branched(size: str, branches: int, **options: Any) -> dict[str, Any]:
    return {"name": "deepflow", "size": size, "branches": branches, **options}


def _sized(size: str, branches: int, depth: int, parameters: float, cost: float) -> Preset:
    """A row of Table 8."""
    model = f"DeepFlow-{size}/2-{branches}T"
    return Preset(model, "8", _branched(size, branches, depth=depth), Figures(parameters, cost), _DEEPFLOW)


def _rung(fid: float, objective: Mapping[str, Any] = _DEEPFLOW, **options: Any) -> Preset:
    """A row of Table 7."""
    return Preset("DeepFlow-B/2-2T", "7", _branched("B", 2, **options), Figures(fid=fid), objective)


def _system(figures: tuple[float | None, ...], scale: float | None = None, *, aligned: bool = False) -> Preset:
    """A DeepFlow-XL/2-3T of Tables 2 and 3."""
    backbone = _branched("XL", 3, **(_PROJECTED if aligned else {}))
    model = f"DeepFlow-XL/2-3T{' with DINOv2' if aligned else ''}"
    objective = _ALIGNED if aligned else _DEEPFLOW
    return Preset(model, "2, 3", backbone, Figures(None, None, *figures), objective, 400, scale)


PRESETS: dict[str, Preset] = {
    # Tables 2 and 3
    "sit-b2-logit-normal": Preset(
        "SiT-B/2", "2, 3", _sit("B"), Figures(None, None, 29.7, 6.2, 51.0), _VELOCITY | _LOGIT_NORMAL
    ),
    "b2-2t-logit-normal": Preset(
        "DeepFlow-B/2-2T", "2, 3", _branched("B", 2), Figures(None, None, 23.1, 5.6, 60.3), _DEEPFLOW | _LOGIT_NORMAL
    ),
    "sit-xl2-800-epochs": Preset(
        "SiT-XL/2", "2, 3", _sit("XL"), Figures(None, None, 9.8, 7.3, 128.2), _VELOCITY, epochs=800
    ),
    "sit-xl2-repa": Preset(
        "SiT-XL/2 + REPA",
        "2, 3",
        _sit("XL", align_layer=8, align_dims=[768]),
        Figures(None, None, 5.7, 6.4, 171.0),
        {"name": "alignment", "align": 0.5},
        epochs=800,
    ),
    "xl2-3t": _system((7.2, 5.1, 138.5)),
    "xl2-3t-guided": _system((1.97,), 1.325),
    "xl2-3t-ssl": _system((5.0, 5.2, 162.0), aligned=True),
    "xl2-3t-ssl-guided": _system((1.77,), 1.3, aligned=True),
    "xl2-3t-ssl-512": Preset(
        "DeepFlow-XL/2-3T with DINOv2, 512 px",
        "2, 3",
        _branched("XL", 3, input_size=64, **_PROJECTED),
        Figures(fid=1.96),
        _ALIGNED,
        epochs=200,
    ),
    # Table 7: the ladder, each rung with all before it; the last is also λ = 1 of the ablations
    "ladder-0-sit": Preset("SiT-B/2", "7", _sit("B"), Figures(fid=34.4), _VELOCITY),
    "ladder-1-deep-supervision": _rung(33.0, _DEEP_SUPERVISION, refiner="none"),
    "ladder-2-time-gap": _rung(31.1, _DEEPFLOW | {"acceleration": 0.0}, refiner="gap"),
    "ladder-3-acceleration": _rung(29.9, refiner="acceleration"),
    "ladder-4-cross-space-attention": _rung(28.1),
    # Table 7: ablations of its last rung
    "ablation-addition": _rung(29.3, refiner="addition"),
    "ablation-shallow-acceleration": _rung(30.4, acceleration_width=[2048]),
    "ablation-lambda-0.5": _rung(27.8, _DEEPFLOW | {"acceleration": 0.5}),
    "ablation-lambda-0.75": _rung(28.1, _DEEPFLOW | {"acceleration": 0.75}),
    "ablation-lambda-1.25": _rung(28.5, _DEEPFLOW | {"acceleration": 1.25}),
    "ablation-lambda-1.5": _rung(28.8, _DEEPFLOW | {"acceleration": 1.5}),
    # Table 8
    "sit-b2": Preset("SiT-B/2", "8", _sit("B"), Figures(130, 24), _VELOCITY),
    "sit-l2": Preset("SiT-L/2", "8", _sit("L"), Figures(458, 80), _VELOCITY),
    "sit-xl2": Preset("SiT-XL/2", "8", _sit("XL"), Figures(675, 114), _VELOCITY),
    "b2-2t-depth-10": _sized("B", 2, 10, 144, 24),
    "b2-2t-depth-12": _sized("B", 2, 12, 166, 28),
    "l2-2t-depth-20": _sized("L", 2, 20, 431, 72),
    "l2-2t-depth-22": _sized("L", 2, 22, 469, 78),
    "l2-2t-depth-24": _sized("L", 2, 24, 507, 84),
    "xl2-2t-depth-22": _sized("XL", 2, 22, 588, 97),
    "xl2-2t-depth-24": _sized("XL", 2, 24, 636, 106),
    "xl2-2t-depth-26": _sized("XL", 2, 26, 683, 114),
    "xl2-2t-depth-28": _sized("XL", 2, 28, 731, 122),
    "l2-3t-depth-18": _sized("L", 3, 18, 433, 72),
    "l2-3t-depth-21": _sized("L", 3, 21, 490, 82),
    "l2-3t-depth-24": _sized("L", 3, 24, 547, 92),
    "xl2-3t-depth-18": _sized("XL", 3, 18, 538, 89),
    "xl2-3t-depth-21": _sized("XL", 3, 21, 609, 101),
    "xl2-3t-depth-24": _sized("XL", 3, 24, 681, 113),
    "xl2-3t-depth-27": _sized("XL", 3, 27, 753, 125),
    "xl2-4t-depth-28": _sized("XL", 4, 28, 822, 137),
}
"""The published runs, by the name of their recipe in ``configs/deepflow``."""


def preset(name: str) -> Preset:
    """Return a published run.

    Raises:
        UnknownNameError: no such row; carries the nearest name and the full list.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"unknown row {name!r}; {suggest(name, PRESETS)}")
    return PRESETS[name]
