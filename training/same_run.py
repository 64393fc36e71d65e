"""Whether a run goes on with what its checkpoint was trained with: configuration, data and encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathline.core.config import Configuration, differences, resolve
from pathline.core.errors import CheckpointError
from pathline.core.sections import Train
from pathline.training.described import Described
from pathline.training.latents import alike, changes_of_samples
from pathline.training.parts import Parts

__all__ = ["check_same_run"]

# what may change between a checkpoint and the run that goes on from it: nothing that moves a weight but by rounding
FREE = (
    "train.stop_at train.folder train.threads train.accelerator train.devices train.num_nodes train.strategy "
    "train.micro_batch train.initialize_from train.activation_checkpointing train.compile train.timeout "
    "train.collect_garbage_every guard.rollback_after guard.max_rollbacks ema.snapshot_every "
    "data.workers log. checkpoint. solver. guidance sample. autoencoder evaluation."
).split()
ROUNDED = 1e-5  # relative difference between statistics of the same data


def check_same_run(
    saved: Mapping[str, Any], parts: Parts, told: Mapping[str, Any], path: Path, allow: Sequence[str] = ()
) -> None:
    """Raise CheckpointError if the checkpoint's configuration or data differ in what the weights depend on.

    ``told`` is what ``State.describe`` tells of the run's data; older checkpoints know no statistics or samples.
    Differences in what ``allow`` names, entries or whole sections, are none.
    """
    before: Configuration = resolve(saved["configuration"])
    constant = parts.configuration.optim.schedule == "constant"  # only then is a longer run the same so far
    free = (*FREE, "train.steps") if constant else tuple(FREE)
    changed = [line for line in differences(before, parts.configuration) if not line.startswith(free)]
    old, new = before.train, parts.configuration.train
    if parts.objective.mixes_samples and _cut(old) != _cut(new):
        changed.append(
            f"train.micro_batch: {old.micro_batch} on {old.devices * old.num_nodes} devices -> {new.micro_batch} on "
            f"{new.devices * new.num_nodes}, and the objective mixes all that is taken at once"
        )
    changed += _changes("the data's", saved["data"], told["data"])
    if isinstance(saved.get("statistics"), dict):
        changed += _changes_of_statistics(saved["statistics"], told["statistics"])
    if "samples" in saved:
        changes = changes_of_samples(Described(saved, path), parts.dataset)
        changed += [f"the data's samples: {line}" for line in changes]
    encoded: list[dict[str, Any]] = saved["encoders"]
    for number, (then, source) in enumerate(zip(encoded, parts.encoders, strict=False)):  # their number is configured
        changed += _changes(f"the encoders.{number}'s", then, source.manifest)
    allowed = tuple(f"{name}{end}" for name in allow for end in (":", "."))
    allowed += tuple(f"the {name}" for name in ("data", "encoders") if name in allow)
    changed = [line for line in changed if not line.startswith(allowed)]
    if changed:
        raise CheckpointError(
            f"got {path} of another configuration; give these back their values, start anew in another train.folder, "
            "or name what may differ by --allow:\n  " + "\n  ".join(changed)
        )


def _changes(whose: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List what two manifests tell differently."""
    return [
        f"{whose} {key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _changes_of_statistics(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List which statistics differ by more than the order of sums could make them, of those that both tell."""
    return [
        f"the data's statistics: {key} {before[key]} -> {after[key]}"
        for key in sorted(before.keys() & after.keys())
        if not alike(before[key], after[key], ROUNDED)
    ]


def _cut(train: Train) -> list[int]:
    """Return how many samples of a global batch are taken at once, in the order of the training stream."""
    workers = train.devices * train.num_nodes
    share = train.global_batch // workers
    micro = train.micro_batch or share
    return [min(micro, share - start) for start in range(0, share, micro)] * workers
