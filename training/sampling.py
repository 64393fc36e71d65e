"""Samples from a checkpoint, and what is written down about them."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pathline import backbones, interpolants, objectives
from pathline.core import overrides
from pathline.core.config import Configuration, resolve
from pathline.core.draws import Draws
from pathline.core.errors import CheckpointError, ConfigurationError, PathlineError
from pathline.core.flow import BaseFlow, Flow
from pathline.core.foreign import PICKLED
from pathline.solvers.guidance import Autoguidance
from pathline.training import checkpoints
from pathline.training.exported import load_exported
from pathline.training.manifest import SUFFIX, parse
from pathline.training.parts import Parts, build
from pathline.training.pictures import ROUNDING, save_grid, to_uint8
from pathline.training.released import RELEASED_WORDS, ReleasedConfiguration, is_released, read_released

__all__ = ["Drawn", "draw", "draw_picture", "find", "load", "save", "save_picture", "solve"]

_WORDS = ("sample.", "solver.", "solver=", "guidance.", "guidance=", "train.threads=", "data.")


@dataclass(frozen=True)
class Drawn:
    """Samples with their labels, and what they cost.

    Attributes:
        x: (N, C, H, W) on the host.
        labels: (N,), or None.
        nfe: network calls of one batch's solve, the most of all batches.
        block_evaluations: transformer blocks that ran in them, the most as well; None for a network without any.
        seconds: wall time of all solves.
    """

    x: Tensor
    labels: Tensor | None
    nfe: int
    block_evaluations: int | None
    seconds: float


def load(path: Path, words: Sequence[str]) -> tuple[Configuration, Parts]:
    """Return the configuration of a trained model with words applied, and its components with the averaged weights.

    Where guidance names a weak model, as a run's folder, a checkpoint or exported weights, its averaged weights are
    loaded too, and the configuration names where they lie.

    Args:
        path: a checkpoint, weights written by ``training.export``, or a file of another program.
        words: as ``solver.steps=25``; for another program's file also ``weights.…`` and ``backbone.…``.

    Raises:
        CheckpointError: damaged, or weights that do not fit.
        ConfigurationError: words that do not fit, or that change what was trained.
        WeightsError: another program's weights that cannot be read, or do not tell or fit their network.
    """
    released = is_released(path, words)
    for word in words:
        if not word.startswith((*_WORDS, *(RELEASED_WORDS if released else ()))):
            raise ConfigurationError(
                f"got {word!r} for a trained model, expected sample.…, solver.… or guidance.… alone"
            )
    configuration: Configuration
    fill: Callable[[nn.Module], None]
    if released:
        configuration, fill = read_released(path, words)
    else:
        configuration = resolve(overrides.apply(_trained_configuration(path).model_dump(mode="json"), words))
        fill = partial(_load_average, path=path, configuration=configuration)
    configuration, loaded = _with_weak_models(configuration)
    parts = replace(build(loaded, training=False), configuration=configuration)
    fill(parts.backbone)
    return configuration, parts


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
    return load_exported(path)[0] if path.is_file() else resolve(checkpoints.read_state(path)["configuration"])


def _with_weak_models(configuration: Configuration) -> tuple[Configuration, Configuration]:
    """Return the configuration with weak models named by where they lie, and the same with the models instead."""
    named, loaded = [], []
    for number, item in enumerate(configuration.guidance):
        named.append(item)
        loaded.append(item)
        if isinstance(item.get("weak"), str):
            try:
                path = _find_weak(Path(item["weak"]))
                loaded[-1] = {**item, "weak": _weak_flow(path)}
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


def _weak_flow(path: Path) -> Flow:
    """Return the flow of a model's averaged weights, on the path that it was trained on."""
    trained = _trained_configuration(path)
    interpolant = interpolants.build(trained.interpolant)
    objective = objectives.build(trained.objective, interpolant=interpolant)
    backbone = backbones.build(trained.backbone)
    _load_average(backbone, path, trained)
    return Flow(backbone, interpolant, objective.predicts)  # type: ignore[arg-type]  # checked there


def _load_average(backbone: nn.Module, path: Path, configuration: Configuration) -> None:
    """Load the average that the configuration names of a verified checkpoint, or exported weights."""
    weights = load_exported(path)[1] if path.is_file() else checkpoints.read_group(path, _average(configuration))
    checkpoints.check_tensors(backbone.state_dict(), weights, "weights")
    backbone.load_state_dict(dict(weights))
    backbone.eval()


def _average(configuration: Configuration) -> str:
    return configuration.sample.average or configuration.ema.names[0]


def draw(configuration: Configuration, parts: Parts, device: torch.device) -> Drawn:
    """Draw the samples that the section ``sample`` asks for; sample i is a function of (seed, i)."""
    wanted, network = configuration.sample, parts.backbone.to(device)
    for guide in parts.guidance:
        if isinstance(guide, Autoguidance):
            (guide.weak.backbone if isinstance(guide.weak, BaseFlow) else guide.weak).to(device)
    labels = _labels(configuration, getattr(network, "num_classes", 0))
    drawn = solve(parts, network, labels, wanted.count, wanted.seed, wanted.batch, progress=True)
    return replace(drawn, labels=None) if wanted.labels == "none" else drawn


def solve(
    parts: Parts,
    network: nn.Module,
    labels: Tensor | None,
    count: int,
    seed: int,
    batch: int,
    *,
    progress: bool = False,
) -> Drawn:
    """Draw samples 0 … count − 1.

    Args:
        parts: tells solver, guidance and path.
        network: in evaluation mode; its device is used.
        labels: (count,), or None for an unconditional network.
        count: number of samples.
        seed: with a sample's number fixes its noise, and what an SDE draws on the way.
        batch: samples solved at once; changes nothing but rounding.
        progress: show a progress bar.

    Raises:
        SolverError: a sample became NaN or infinite.
    """
    flow, device = parts.flow(network), next(network.parameters()).device
    pieces, spent, began = [], [], time.perf_counter()
    for first in tqdm(range(0, count, batch), desc="sampling", unit="batch", disable=not progress):
        ids = range(first, min(first + batch, count))
        noise = Draws(seed).normal("initial noise", ids, parts.dataset.shape).to(device)
        given = parts.conditions(None if labels is None else labels[first : ids.stop].to(device))
        solution = parts.solver.solve(flow, noise, seed=seed, sample_ids=ids, **given)
        pieces.append(solution.x.cpu())
        spent.append((solution.nfe, solution.block_evaluations))
    blocks = [ran for _, ran in spent if ran is not None]
    most = max(blocks) if blocks else None
    return Drawn(torch.cat(pieces), labels, max(calls for calls, _ in spent), most, time.perf_counter() - began)


def draw_picture(parts: Parts, network: nn.Module) -> Drawn:
    """Draw ten samples of each of the first ten classes, with fixed noise."""
    classes = min(10, getattr(network, "num_classes", 0))
    labels = torch.arange(classes).repeat_interleave(10) if classes else None
    count = 10 * classes or 100
    return solve(parts, network, labels, count, parts.configuration.sample.seed, batch=count)


def save_picture(drawn: Drawn, folder: Path, step: int) -> None:
    """Write samples drawn after a step as ``pictures/step-….png``, and as ``samples.png``, which is the newest."""
    path = folder / "pictures" / f"step-{step:09d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(path, drawn.x, drawn.labels)
    shutil.copyfile(path, folder / "samples.png")


def save(drawn: Drawn, configuration: Configuration, checkpoint: Path, output: Path, version: str) -> list[Path]:
    """Write ``output`` (.npz: arr_0, and labels as arr_1), a picture and a record beside it; return their paths.

    Images, of one or three channels, are uint8 NHWC; anything else is latents, float32 NCHW and without a picture.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    images = _are_images(drawn)
    arrays: dict[str, Any] = {"arr_0": to_uint8(drawn.x) if images else drawn.x.float().numpy()}
    if drawn.labels is not None:
        arrays["arr_1"] = drawn.labels.numpy()
    np.savez(output, **arrays)
    picture, record = output.with_suffix(".png"), output.with_suffix(".json")
    if images:
        save_grid(picture, drawn.x, drawn.labels)
    record.write_text(json.dumps(_record(drawn, configuration, checkpoint, version), indent=1))
    return [output, picture, record] if images else [output, record]


def _are_images(drawn: Drawn) -> bool:
    return drawn.x.shape[1] in (1, 3)


def _record(drawn: Drawn, configuration: Configuration, checkpoint: Path, version: str) -> dict[str, Any]:
    c = configuration.model_dump(mode="json")
    values = {"rounding": ROUNDING} if _are_images(drawn) else {"values": "latents, float32 (N, C, H, W)"}
    weak = [_identity(Path(item["weak"])) for item in configuration.guidance if "weak" in item]
    return {
        "version": version,
        "checkpoint": c["weights"]
        if isinstance(configuration, ReleasedConfiguration)
        else _identity(checkpoint, _average(configuration)),
        **({"weak_checkpoints": weak} if weak else {}),
        "count": len(drawn.x),
        "seed": c["sample"]["seed"],
        "label_law": c["sample"]["labels"],
        "solver": c["solver"],
        "guidance": c["guidance"],
        "nfe": drawn.nfe,
        "block_evaluations": drawn.block_evaluations,
        "seconds": round(drawn.seconds, 3),
        **values,
        "data": c["data"],
        "configuration": c,
    }


def _identity(path: Path, average: str | None = None) -> dict[str, str]:
    """Return the name of a checkpoint or file, its average's (None: the first), and the hash of that one's files."""
    if path.is_file():
        record = parse(path.with_suffix(".json"))
        return {"name": path.name, "average": str(record.get("average")), "weights_sha256": str(record["sha256"])}
    average = average or _average(_trained_configuration(path))
    return {"name": path.name, "average": average, "weights_sha256": checkpoints.hash_of(path, average)}


def _labels(configuration: Configuration, classes: int) -> Tensor | None:
    """Return the labels asked for: by a law, the null label, one for all, or a list, repeated as needed."""
    wanted = configuration.sample
    if not classes:
        return None
    if wanted.labels == "balanced":
        return torch.arange(wanted.count) % classes
    if wanted.labels == "random":
        return (Draws(wanted.seed).uniform("labels", range(wanted.count)) * classes).long()
    if wanted.labels == "none":
        return torch.full((wanted.count,), classes)
    named = torch.tensor([wanted.labels] if isinstance(wanted.labels, int) else wanted.labels)
    return named[torch.arange(wanted.count) % len(named)]
