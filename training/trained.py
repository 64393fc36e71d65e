"""Trained models: found by a path, loaded with words applied, and told by the hash of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pathline import backbones, interpolants, objectives
from pathline import data as datasets
from pathline.core import overrides
from pathline.core.config import Configuration, resolve
from pathline.core.errors import CheckpointError, ConfigurationError, PathlineError
from pathline.core.flow import Flow
from pathline.core.foreign import PICKLED
from pathline.data import Dataset
from pathline.training import checkpoints
from pathline.training.described import Described, Trained, read_trained
from pathline.training.exported import load_exported, read_record
from pathline.training.latents import SHAPED, changes_of_samples
from pathline.training.manifest import SUFFIX, parse
from pathline.training.parts import Parts, build
from pathline.training.released import RELEASED_WORDS, is_released, read_released

__all__ = ["Loader", "average_of", "find", "identity", "load"]

_WORDS = (
    "sample.",
    "solver.",
    "solver=",
    "guidance.",
    "guidance=",
    "train.accelerator=",
    "train.threads=",
    "train.tf32=",
    "data.",
    "autoencoder.",
    "autoencoder=",
)


def load(path: Path, words: Sequence[str]) -> tuple[Configuration, Parts]:
    """Return the configuration of a trained model with words applied, and its components with the averaged weights.

    Where guidance names a weak model, as a run's folder, a checkpoint or exported weights, its averaged weights are
    loaded too, and the configuration names where they lie. The data that it was trained on are looked for only where
    older checkpoints do not tell of them, or words name them, which then have to be of the kind that was trained on.

    Args:
        path: a checkpoint, weights written by ``training.export``, or a file of another program.
        words: as ``solver.steps=25`` or ``autoencoder=sd-vae-ft-ema``; for another program's file also ``weights.…``
            and ``backbone.…``.

    Raises:
        CheckpointError: damaged, or weights that do not fit.
        ConfigurationError: words that do not fit, or that change what was trained.
        WeightsError: another program's weights that cannot be read, or do not tell or fit their network.
    """
    return Loader(path).load(words)


class Loader:
    """Loads a trained model by words, and by others after them: what both have in common is read once.

    So a checkpoint is verified once, and the network is built anew only where other words than of ``solver``,
    ``guidance`` and ``sample``, or another average, ask for it.

    Args:
        path: as of ``load``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._trained: Trained | None = None
        self._last: tuple[dict[str, Any], Parts] | None = None

    def load(self, words: Sequence[str]) -> tuple[Configuration, Parts]:
        """See the function ``load``."""
        released = is_released(self.path, words)
        for word in words:
            if not word.startswith((*_WORDS, *(RELEASED_WORDS if released else ()))):
                wanted = ", ".join(f"{start}…" for start in (*_WORDS, *(RELEASED_WORDS if released else ())))
                raise ConfigurationError(f"got {word!r} for a trained model, expected one of {wanted} alone")
        configuration: Configuration
        fill: Callable[[nn.Module], None]
        data: Described | None
        if released:
            configuration, filled = read_released(self.path, words)
            fill, data = filled, filled.data
        else:
            configuration, data = self._configured(words)
            fill = partial(_load_average, path=self.path, configuration=configuration)
        configuration, loaded = _with_weak_models(configuration, data)
        decided = _decisive(configuration)
        if self._last is not None and self._last[0] == decided:
            like = self._last[1]
            built = build(loaded, training=False, data=like.dataset, like=like)
            return configuration, replace(built, configuration=configuration)
        parts = replace(build(loaded, training=False, data=data), configuration=configuration)
        if data is not None and any(word.startswith("data.") for word in words) and not released:
            parts = replace(parts, dataset=_named_data(configuration, data))
        fill(parts.backbone)
        self._last = decided, parts
        return configuration, parts

    def _configured(self, words: Sequence[str]) -> tuple[Configuration, Described | None]:
        """Return the configuration of a model of ours with words applied, and what it tells of its data."""
        self._trained = self._trained or read_trained(self.path)
        entries = self._trained.configuration.model_dump(mode="json")
        if self.path.is_file():  # of one average, whatever was chosen in training
            entries["sample"]["average"] = None
        configuration = resolve(overrides.apply(entries, words))
        if self.path.is_file():
            _check_average(self.path, configuration)
        return configuration, self._trained.data


def _decisive(configuration: Configuration) -> dict[str, Any]:
    """Return the entries that decide over the network, its weights, data and autoencoder."""
    others = configuration.model_dump(mode="json", exclude={"solver", "guidance", "sample"})
    return {**others, "average": average_of(configuration)}


def _check_average(path: Path, configuration: Configuration) -> None:
    """Raise ConfigurationError if the configuration asks for another average than a file of weights holds."""
    asked, held = configuration.sample.average, read_record(path).get("average")
    if asked not in (None, held):
        raise ConfigurationError(
            f"sample.average: got {asked!r}, and {path} holds {held!r} alone; leave it out, or give the run's folder"
        )


def _named_data(configuration: Configuration, trained: Described) -> Dataset:
    """Return the data that words name, compared with what a model was trained on."""
    try:
        dataset = datasets.build(configuration.data)
    except PathlineError as error:
        raise ConfigurationError(f"data: {error}") from error
    changed = changes_of_samples(trained, dataset)
    if changed:
        raise ConfigurationError(
            f"data: are others than the model was trained on ({'; '.join(changed)}); name data of the same kind"
        )
    return dataset


def find(model: Path, warn: Callable[[str], None]) -> Path:
    """Return the weights that a path means: a file of exported or released ones, a checkpoint, or a run's newest.

    Raises:
        CheckpointError: there is none, or it is a file of another kind.
    """
    endings = (SUFFIX, *PICKLED)
    if model.is_file():
        if model.suffix.lower() not in endings:
            raise CheckpointError(f"got {model}, expected a name that ends in {', '.join(endings)}, or a run's folder")
        return model
    if not model.is_dir():
        raise CheckpointError(f"got no file or folder at {model}; give a run's folder, a checkpoint in it, or weights")
    return checkpoints.find(model, warn)


def _trained_configuration(path: Path) -> Configuration:
    """Return the configuration that a verified checkpoint, or the file beside exported weights, holds."""
    return read_trained(path).configuration


def _with_weak_models(configuration: Configuration, data: Described | None) -> tuple[Configuration, Configuration]:
    """Return the configuration with weak models named by where they lie, and the same with the models instead.

    ``data`` are those of the model that they guide, as far as it tells.
    """
    named, loaded = [], []
    for number, item in enumerate(configuration.guidance):
        named.append(item)
        loaded.append(item)
        if isinstance(item.get("weak"), str):
            try:
                path = _find_weak(Path(item["weak"]))
                loaded[-1] = {**item, "weak": _weak_flow(path, data)}
            except PathlineError as error:
                raise ConfigurationError(f"guidance.{number}.weak: {error}") from error
            named[-1] = {**item, "weak": str(path)}
    return configuration.model_copy(update={"guidance": named}), configuration.model_copy(update={"guidance": loaded})


def _find_weak(model: Path) -> Path:
    path = find(model, warnings.warn)
    if path.suffix.lower() in PICKLED:
        raise ConfigurationError(
            f"got {path}, another program's weights, which cannot be the weak model here; give train.py's or exported "
            "ones, or in Python Autoguidance(weights.network(...))"
        )
    return path


def _weak_flow(path: Path, guided: Described | None) -> Flow:
    """Return the flow of a model's averaged weights, on the path that it was trained on."""
    trained, data = read_trained(path)
    if data is not None and guided is not None:
        labels = bool(data.num_classes and guided.num_classes)  # a model without may guide one with
        changed = changes_of_samples(guided, data, shaped=SHAPED if labels else SHAPED[:1])
        if changed:
            raise ConfigurationError(
                f"got {path}, which was trained on other data than what it guides ({'; '.join(changed)}); give a model "
                "of the same"
            )
    interpolant = interpolants.build(trained.interpolant)
    objective = objectives.build(trained.objective, interpolant=interpolant)
    backbone = backbones.build(trained.backbone)
    _load_average(backbone, path, trained)
    return Flow(backbone, interpolant, objective.predicts)  # type: ignore[arg-type]  # checked there


def _load_average(backbone: nn.Module, path: Path, configuration: Configuration) -> None:
    """Load the average that the configuration names of a verified checkpoint, or exported weights."""
    weights = load_exported(path)[1] if path.is_file() else checkpoints.read_group(path, average_of(configuration))
    checkpoints.check_tensors(backbone.state_dict(), weights, "weights")
    backbone.load_state_dict(dict(weights))
    backbone.eval()


def average_of(configuration: Configuration) -> str:
    """Return the name of the average that samples are drawn with."""
    return configuration.sample.average or configuration.ema.names[0]


def identity(path: Path, average: str | None = None) -> dict[str, str]:
    """Return the name of a checkpoint or file, its average's (None: the first), and the hash of that one's files.

    Raises:
        CheckpointError: it is gone, or damaged.
    """
    if path.is_file():
        record = parse(path.with_suffix(".json"))
        return {"name": path.name, "average": str(record.get("average")), "weights_sha256": str(record["sha256"])}
    average = average or average_of(read_trained(path).configuration)
    try:
        return {"name": path.name, "average": average, "weights_sha256": checkpoints.hash_of(path, average)}
    except CheckpointError as error:  # as of one that training pruned meanwhile
        raise CheckpointError(f"got {error} in {path}; give a checkpoint that stays") from error
