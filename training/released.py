"""Models of other programs, sampled from their own files: what it does not tell, its family and words do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import nn

from pathline.core import overrides, weights
from pathline.core.config import Configuration, resolve
from pathline.core.errors import ConfigurationError, suggest
from pathline.core.foreign import PICKLED, read_named
from pathline.core.layouts import Defect, WeightFamily
from pathline.core.sections import Section, Text
from pathline.training.described import Described
from pathline.training.exported import digest

__all__ = ["RELEASED_WORDS", "Released", "ReleasedConfiguration", "Weights", "is_released", "read_released"]

FIRST_SCALE, FIRST_CHANNELS = 0.18215, 4  # of Stable Diffusion's first autoencoders (arXiv:2112.10752)
RELEASED_WORDS = ("weights.", "backbone.")


class Weights(Section):
    """Which weights a file's are.

    ``family`` names their layout where their keys do not; ``key`` one of several weights in the file, as ``model``;
    ``defects`` what their program does wrong and is to be done again, as ``three-channel-guidance``.
    ``latent_scale`` is the factor that brought an autoencoder's latents to the network; without it, where latents have
    four channels, that of Stable Diffusion's first ones, 0.18215, of which all published weights of these layouts are.
    """

    family: Text | None = None
    key: Text | None = None
    defects: tuple[Text, ...] = ()
    latent_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Released(Weights):
    """The same with all that was found: file name, family, and the hash of the file."""

    file: Text
    sha256: Text


class ReleasedConfiguration(Configuration):
    """The configuration of another program's model."""

    weights: Released


class Filled:
    """Weights on their way into a network: ``fill(backbone)``.

    Attributes:
        data: what is known of those that the model makes: images where they have one channel or three, unless an
            autoencoder is given that decodes them.
    """

    def __init__(self, state: weights.State, family: WeightFamily, samples: Mapping[str, Any]) -> None:
        self.state, self.family, self.data = state, family, Described({"samples": samples})

    def __call__(self, backbone: nn.Module) -> None:
        """Load them; raises WeightsError where they do not fit."""
        weights.load(backbone, self.state, self.family)
        backbone.eval()


def _latents_of(channels: int, scale: float | None) -> dict[str, Any] | None:
    """Return what is known of the autoencoder of latents: how they were scaled, if that."""
    factor = FIRST_SCALE if scale is None and channels == FIRST_CHANNELS else scale
    if factor is None:
        return None
    std = [1 / factor] * channels
    return {"scaling": {"mean": [0.0] * channels, "std": std, "source": "weights.latent_scale"}}


def is_released(path: Path, words: Sequence[str]) -> bool:
    """Whether a path means another program's weights: by its ending, or because ``weights.…`` says so."""
    return path.is_file() and (path.suffix.lower() in PICKLED or any(word.startswith("weights.") for word in words))


def read_released(path: Path, words: Sequence[str]) -> tuple[ReleasedConfiguration, Filled]:
    """Read another program's weights and return the configuration of their model, and what fills its network.

    Args:
        path: of the file.
        words: as ``weights.family=sit``, ``backbone.num_heads=4`` and those of any trained model.

    Raises:
        WeightsError: the file cannot be read, or does not tell what is needed.
        ConfigurationError: words that do not fit.
    """
    own = overrides.apply({}, [word for word in words if word.startswith(RELEASED_WORDS)])
    wanted = _checked(own.get("weights", {}))
    key, state = read_named(path, wanted.key)
    family = weights.recognise(state, wanted.family)
    defects = _known_defects(wanted.defects, family)
    options = _with_backbone_defects(own.get("backbone", {}), defects)
    entries = _entries(weights.component(state, family, **options), family)
    stand_in = entries["data"]
    entries = overrides.apply(entries, [word for word in words if not word.startswith(RELEASED_WORDS)])
    if entries.get("sample", {}).get("average") is not None:
        raise ConfigurationError("sample.average: names an average of train.py's; name a file's weights by weights.key")
    filled = resolve(_with_defects(entries, defects))
    weights.check_fit(filled.backbone, state, family)
    released = Released(**{**dict(wanted), "family": family.name, "key": key}, file=path.name, sha256=digest(path))
    made = filled.data if filled.data["name"] == stand_in["name"] else stand_in  # others are to measure the model on
    shape, images = made["shape"], made["shape"][0] in (1, 3) and filled.autoencoder is None
    samples = {
        "shape": shape,
        "num_classes": made["num_classes"],
        "data_are_images": images,
        "latents_of": None if images else _latents_of(shape[0], wanted.latent_scale),
    }
    fill = Filled(state, family, samples)
    return ReleasedConfiguration(**{**dict(filled), "weights": released}), fill


def _checked(given: Any) -> Weights:
    try:
        return Weights.model_validate(given)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            path = ".".join(map(str, ("weights", *detail["loc"])))
            unknown = detail["type"] == "extra_forbidden"
            hint = f"unknown entry; {suggest(str(detail['loc'][-1]), Weights.model_fields)}"
            lines.append(f"{path}: {hint if unknown else detail['msg']}")
        raise ConfigurationError("; ".join(lines)) from error


def _entries(backbone: dict[str, Any], family: WeightFamily) -> dict[str, Any]:
    """Return the sections of a model that others trained; its data are stand-ins of its shape."""
    inner = backbone if family.wrapper is None else backbone["backbone"]
    side = inner["input_size"]
    shape = [inner["in_channels"], *(side if isinstance(side, list | tuple) else [side, side])]
    return {
        "data": {"name": "synthetic", "shape": shape, "num_classes": inner["num_classes"]},
        "interpolant": family.interpolant,
        "backbone": backbone,
        "objective": family.predicts,
        "solver": "euler-maruyama",
        "train": {"steps": 1, "folder": "runs/released"},
    }


def _known_defects(names: Sequence[str], family: WeightFamily) -> dict[str, Defect]:
    for name in names:
        if name not in family.defects:
            raise ConfigurationError(f"weights.defects: {family.name} has no {name!r}; {suggest(name, family.defects)}")
    return {name: family.defects[name] for name in names}


def _with_backbone_defects(options: Mapping[str, Any], defects: Mapping[str, Defect]) -> dict[str, Any]:
    """Return the backbone's options with those that defects set."""
    result = dict(options)
    for name, defect in defects.items():
        section, _, entry = defect.entry.partition(".")
        if section == "backbone":
            _set(result, entry, defect, name)
    return result


def _with_defects(entries: Mapping[str, Any], defects: Mapping[str, Defect]) -> dict[str, Any]:
    """Return entries with those that defects set, in every guidance where they are of one."""
    result: dict[str, Any] = deepcopy(dict(entries))
    for name, defect in defects.items():
        *path, entry = defect.entry.split(".")
        if path == ["guidance", "*"]:
            if not result.get("guidance"):
                raise ConfigurationError(
                    f"weights.defects: got {name!r} without guidance, which it is of; leave it out"
                )
            for guide in result["guidance"]:
                _set(guide, entry, defect, name)
        elif path != ["backbone"]:
            _set(result.setdefault(path[0], {}), entry, defect, name)
    return result


def _set(section: dict[str, Any], entry: str, defect: Defect, name: str) -> None:
    if section.setdefault(entry, defect.value) != defect.value:
        raise ConfigurationError(
            f"weights.defects: {name!r} sets {defect.entry} to {defect.value!r}, and it is given as "
            f"{section[entry]!r}; leave one out"
        )
