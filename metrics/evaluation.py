"""Several metrics of one stream of samples: each feature space sees a batch once, whatever number of metrics share it.

N images, D features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pathline.core.errors import InputError, UnknownOptionError
from pathline.core.registry import Entry
from pathline.metrics import features as spaces
from pathline.metrics.base import Metric, Real, Record, Reference, registry
from pathline.metrics.features import Features
from pathline.metrics.sets import ImageReference

__all__ = ["Evaluation", "component"]

Component = dict[str, Any]


class Evaluation:
    """Metrics by name, fed together.

    Args:
        metrics: names, or ``{"name": …, **options}``. ``name:space`` names the feature space as well, as
            ``frechet:pca``; what no feature space is called is a model of timm, as ``fd:vit_large_patch14_dinov2``.
            Without one it is ``digits-cnn`` beside the halves of a small labelled set, and ``inception`` elsewhere.
        reference: what to compare with; None where no metric compares.
        device: of the feature networks.
        features: options of feature spaces by their names, as ``{"inception": {"weights": PATH}}``.

    Raises:
        UnknownNameError, UnknownOptionError: no such metric, feature space or option.
        InputError: no metrics, or one that needs a reference without one.
    """

    def __init__(
        self,
        metrics: Sequence[str | Mapping[str, Any]],
        reference: Reference | None = None,
        device: str | torch.device = "cpu",
        *,
        features: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not metrics:
            raise InputError("got no metrics, expected one or more; name some")
        self.reference, self.device, self._options = reference, torch.device(device), features or {}
        self._spaces: dict[str, Features] = {}
        self._components = [component(metric) for metric in metrics]
        self.metrics = [self._built(named) for named in self._components]

    def expects(self, count: int, *, labelled: bool) -> None:
        """Check what can be checked before the first sample is there, as ``Metric.expects`` does, of all metrics.

        Args:
            count: number of samples to come, of all processes.
            labelled: whether they will have labels.

        Raises:
            InputError, DataError: samples or a reference that do not suffice.
        """
        for metric in self.metrics:
            metric.expects(count, labelled=labelled)

    def update(self, images: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Take a batch in.

        Args:
            images: (N, C, H, W), uint8 or floats in [−1, 1].
            labels: (N,) that were asked for.
            indices: (N,) numbers of the samples, needed where several processes share them: what depends on their
                order, as the splits of an Inception Score, goes by these.

        Raises:
            InputError, InputTypeError: samples that are not of the reference's kind.
        """
        given = {"data": images, "label": labels, "index": indices}
        batch = {name: value for name, value in given.items() if value is not None}
        for metric in self.metrics:
            metric.check(batch)  # before any network runs
        found: dict[int, dict[str, Tensor]] = {}
        for metric in self.metrics:
            space = metric.features
            if space is not None and id(space) not in found:
                found[id(space)] = space.outputs(images)
            metric.add(batch, {} if space is None else found[id(space)])

    def state(self) -> dict[str, Tensor]:
        """Return all that has been taken in, as tensors on the host."""
        return {f"{i}/{key}": value for i, metric in enumerate(self.metrics) for key, value in metric.state().items()}

    def merge_state(self, state: Mapping[str, Tensor]) -> None:
        """Merge what ``state`` of an evaluation of the same metrics returned, as in another process."""
        for i, metric in enumerate(self.metrics):
            own = f"{i}/"
            metric.merge_state({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})

    def compute(self) -> list[Record]:
        """Return a record of each metric, in their order; raises InputError for too few samples."""
        return [metric.compute() for metric in self.metrics]

    def fresh(self) -> Evaluation:
        """Return an evaluation of the same metrics that has seen nothing; feature networks are shared, not built again.

        So one training run, or several averages of a model, need each network once.
        """
        other = copy.copy(self)
        other.metrics = [other._built(named) for named in self._components]
        return other

    def _built(self, named: Component) -> Metric:
        entry = registry.entry(named["name"])
        filled: dict[str, Any] = {key: None for key in ("real", "classifier", "features") if key in entry.options()}
        given = {key: value for key, value in named.items() if key != "name"}
        problems = registry.problems(entry, {**filled, **given})
        if problems:  # before a network is built
            raise UnknownOptionError("; ".join(problems.values()))
        if "real" in filled:
            if self.reference is None:
                raise InputError(f"got no reference for the metric {entry.name}, which compares with one; give one")
            given["real"] = self.reference
        if "classifier" in filled:
            given["classifier"] = self._space(given.get("classifier") or "digits-cnn")
        if "features" in filled:
            given["features"] = self._space(given.get("features") or self._default(entry))
        return registry.build(entry.name, **given)

    def _default(self, entry: Entry[Metric]) -> str:
        """Return the feature space of a metric that names none."""
        small = isinstance(self.reference, Real) and entry.name in ("frechet", "precision-recall")
        return "digits-cnn" if small else "inception"

    def _space(self, space: str | Mapping[str, Any] | Features) -> Features:
        """Return a feature space, built once for all metrics that name it."""
        if isinstance(space, Features):
            return space
        named = _space_component(space)
        options = {**self._options.get(named["name"], {}), **named}
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self._spaces:
            built = spaces.registry.build({**self._fitted(named["name"], options), **options})
            built.to(self.device)
            self._spaces[key] = built
        return self._spaces[key]

    def _fitted(self, space: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a feature space is fitted on, where it is fitted and nothing is named for it.

        Raises:
            InputError: the reference has no images for it.
        """
        known, reference = spaces.registry.entry(space).options(), self.reference
        if "training" not in known or "training" in given:
            return {}
        if isinstance(reference, Real):
            return {"training": reference.training}
        if isinstance(reference, ImageReference):
            return {"training": reference}
        if "shape" in known and reference is not None and reference.shape is not None:
            return {"shape": reference.shape}
        if known["training"].default is known["training"].empty:
            raise InputError(
                f"got nothing to fit the feature space {space} on, as the reference is no images; set "
                f"{space}.training to a data set or a place of images (--option {space}.training=…)"
            )
        return {}


def component(metric: str | Mapping[str, Any]) -> Component:
    """Return a metric as ``{"name": …, **options}``, its shorthand ``name:space`` resolved."""
    if isinstance(metric, Mapping):
        if "name" not in metric:
            raise UnknownOptionError(f"got a metric without a name: {dict(metric)}; add name: …")
        return dict(metric)
    name, _, space = metric.partition(":")
    return {"name": name, "features": _space_component(space)} if space else {"name": name}


def _space_component(space: str | Mapping[str, Any]) -> Component:
    if isinstance(space, Mapping):
        return dict(space)
    return {"name": space} if space in spaces.names() else {"name": "timm", "model": space}
