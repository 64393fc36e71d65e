"""Exact flows: Gaussian mixtures, whose velocity, score, noise, data and density are known on every path.

K components, N samples, S the shape of one sample; t has shape (N,) or (). All in float64 unless the inputs say less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pathline import backbones
from pathline.core.checks import check_times
from pathline.core.draws import Draws
from pathline.core.errors import InputError
from pathline.core.flow import Flow
from pathline.interpolants.base import Interpolant, Kind, broadcast, check_kinds
from pathline.interpolants.bridge import Stochastic

__all__ = ["ExactPrediction", "GaussianMixture"]


class ExactPrediction(NamedTuple):
    """Expectations given x_t, each (N, *S).

    Attributes:
        data: E[data | x].
        source: E[source | x]: the noise, where the source is standard normal.
        latent: E[z | x] of a path with latent noise; zeros elsewhere.
        score: ∇ log p_t(x).
        log_density: log p_t(x), (N,), in nats.
    """

    data: Tensor
    source: Tensor
    latent: Tensor
    score: Tensor
    log_density: Tensor


class GaussianMixture:
    """A mixture of K Gaussians with one standard deviation each, as data or as the source of a two-ended path.

    Args:
        means: (K, *S).
        stds: standard deviations above 0, K of them or one for all.
        weights: K probabilities that sum to 1; None for equal ones.
        labels: class of each component, K whole numbers from 0; None for an unlabelled mixture.

    Raises:
        InputError: shapes or values that do not fit.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Any],
        stds: Tensor | Sequence[float] | float,
        *,
        weights: Sequence[float] | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim < 2:
            raise InputError(f"got means of shape {tuple(self.means.shape)}, expected (K, *S)")
        count = len(self.means)
        self.stds = torch.as_tensor(stds, dtype=torch.float64).expand(count)
        self.weights = torch.as_tensor([1 / count] * count if weights is None else weights, dtype=torch.float64)
        if self.weights.shape != (count,) or bool((self.stds <= 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise InputError(f"got {count} means, stds {self.stds.tolist()} and weights {self.weights.tolist()}")
        self.labels = None if labels is None else torch.as_tensor(labels)
        if self.labels is not None and self.labels.shape != (count,):
            raise InputError(f"got {tuple(self.labels.shape)} labels for {count} components; give one each")

    @classmethod
    def standard(cls, shape: Sequence[int]) -> GaussianMixture:
        """Return standard normal noise of a sample's shape."""
        return cls(torch.zeros(1, *shape), 1.0)

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 if unlabelled."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def sample(self, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw samples (count, *S), float32, and the components they come from, (count,)."""
        draws = Draws(seed)
        ids = range(count)
        edges = self.weights.cumsum(0)[:-1].float()
        component = torch.bucketize(draws.uniform("component", ids).contiguous(), edges, right=True)
        noise = draws.normal("sample", ids, self.means.shape[1:])
        return self.means[component].float() + broadcast(self.stds[component].float(), noise) * noise, component

    def predict(
        self,
        x: Tensor,
        t: Tensor | float,
        path: Interpolant,
        *,
        label: Tensor | None = None,
        source: GaussianMixture | None = None,
    ) -> ExactPrediction:
        """Return the exact expectations at x_t.

        Args:
            x: (N, *S).
            t: times in [0, 1].
            path: any path, two-ended and latent ones included.
            label: (N,), restricts each sample to the components of its class; ``num_classes`` means all.
            source: what stands at t = 1, drawn independently of the data; None is standard normal noise.
        """
        t = check_times(t, len(x))
        x64, times = x.double(), t.double().expand(len(x))
        source = source or GaussianMixture.standard(tuple(x.shape[1:]))
        alpha, sigma, _, _ = path.evaluate(times)
        gamma = path.latent(times).gamma if isinstance(path, Stochastic) else torch.zeros_like(times)
        k, m = len(self.means), len(source.means)
        mine, theirs = torch.arange(k).repeat_interleave(m), torch.arange(m).repeat(k)
        # component (i, j) at t: N(α·mean_i + σ·mean_j, α²·std_i² + σ²·std_j² + γ²)
        left, right = self.means[mine][None], source.means[theirs][None]
        a, s, g = (c.reshape(-1, 1) for c in (alpha, sigma, gamma))
        variance = (a * self.stds[mine]) ** 2 + (s * source.stds[theirs]) ** 2 + g**2  # (N, K·M)
        a_x, s_x, g_x = (broadcast(c, x64)[:, None] for c in (alpha, sigma, gamma))
        residual = x64[:, None] - a_x * left - s_x * right  # (N, K·M, *S)
        logits = (self.weights[mine].log() + source.weights[theirs].log())[None].expand(len(x), -1)
        logits = self._only(logits, label, mine)
        dim = residual[0, 0].numel()
        logits = logits - 0.5 * residual.flatten(2).square().sum(-1) / variance
        logits = logits - 0.5 * dim * torch.log(2 * math.pi * variance)
        share = logits.softmax(1)

        def mean(value: Tensor) -> Tensor:
            return (broadcast_pairs(share, value) * value).sum(1).to(x.dtype)

        pull = residual / broadcast_pairs(variance, residual)
        ours, others = (c.square()[None, :] for c in (self.stds[mine], source.stds[theirs]))
        return ExactPrediction(
            mean(left + a_x * broadcast_pairs(ours, residual) * pull),
            mean(right + s_x * broadcast_pairs(others, residual) * pull),
            mean(g_x * pull),
            mean(-pull),
            logits.logsumexp(1).to(x.dtype),
        )

    def value(
        self,
        kind: Kind,
        x: Tensor,
        t: Tensor | float,
        path: Interpolant,
        *,
        label: Tensor | None = None,
        source: GaussianMixture | None = None,
    ) -> Tensor:
        """Return the exact prediction of a kind, (N, *S): velocity, score, noise or data; on a latent path also drift.

        Raises:
            UnknownNameError: an unknown kind.
            OpenEndError: t at an end where a rate is infinite.
        """
        exact = self.predict(x, t, path, label=label, source=source)
        latent = isinstance(path, Stochastic)
        if kind == "velocity" or (latent and str(kind) == "drift"):
            rates = path.coefficients(t)
            value = broadcast(rates.alpha_rate, x).to(x) * exact.data
            value = value + broadcast(rates.sigma_rate, x).to(x) * exact.source
            if isinstance(path, Stochastic) and kind == "velocity":
                value = value + broadcast(path.latent(t).gamma_rate, x).to(x) * exact.latent
            return value
        check_kinds(kind)
        if kind == "score":
            return exact.score
        if kind == "noise":
            return exact.latent if latent else exact.source
        return exact.data

    def log_density(self, x: Tensor, t: Tensor | float, path: Interpolant, *, label: Tensor | None = None) -> Tensor:
        """Return log p_t(x) in nats, (N,)."""
        return self.predict(x, t, path, label=label).log_density

    def backbone(
        self, path: Interpolant, predicts: Kind = "velocity", *, source: GaussianMixture | None = None
    ) -> nn.Module:
        """Return the exact prediction as a backbone for any solver; with labels it takes ``label``, null included."""
        options: dict[str, Any] = {"input_shape": tuple(self.means.shape[1:])}
        if self.labels is None:
            return backbones.wrap(lambda x, t: self.value(predicts, x, t, path, source=source), **options)
        options |= {"num_classes": self.num_classes, "null_label": self.num_classes}
        return backbones.wrap(
            lambda x, t, label=None: self.value(predicts, x, t, path, label=label, source=source), **options
        )

    def flow(self, path: Interpolant, predicts: Kind = "velocity") -> Flow:
        """Return the exact flow on a path."""
        return Flow(self.backbone(path, predicts), path, predicts)

    def _only(self, logits: Tensor, label: Tensor | None, component: Tensor) -> Tensor:
        """Leave only the components of each sample's class; the null label leaves all."""
        if label is None:
            return logits
        if self.labels is None:
            raise InputError("got labels for a mixture without; give labels=… when building it")
        allowed = (self.labels[component][None] == label[:, None]) | (label[:, None] == self.num_classes)
        logits = logits.masked_fill(~allowed, -math.inf)
        return logits - logits.logsumexp(1, keepdim=True)


def broadcast_pairs(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (N, K) to multiply (N, K, *S)."""
    return value.reshape(*value.shape, *(1,) * (like.ndim - 2))
