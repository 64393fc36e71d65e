"""Checks at the borders: data loading, the entry of a solve, objectives. Never inside a loop.

N samples; () is one value for all.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pathline.core.errors import InputError, InputTypeError, MissingPackageError

__all__ = ["as_times", "check_finite", "check_labels", "check_time_shape", "check_times", "require"]


def as_times(t: Tensor | float) -> Tensor:
    """Return ``t`` as a floating-point tensor, its precision kept; a Python number becomes float32.

    Raises:
        InputTypeError: ``t`` is neither a floating-point tensor nor a number.
    """
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise InputTypeError(f"got t of type {t.dtype}, expected a floating-point tensor; call t.float()")
        return t
    if isinstance(t, int | float) and not isinstance(t, bool):
        return torch.tensor(float(t))
    raise InputTypeError(f"got t of type {type(t).__name__}, expected a tensor or a number")


def check_time_shape(t: Tensor, count: int) -> None:
    """Raise InputError unless ``t`` has shape (count,) or ()."""
    if t.shape not in ((), (count,)):
        raise InputError(f"got t of shape {tuple(t.shape)}, expected ({count},) or (); pass one time a sample")


def check_times(t: Tensor | float, count: int | None = None) -> Tensor:
    """Check times and return them as a tensor.

    Values are read only where ``t`` lies on the host: a device is never waited for.

    Args:
        t: times in [0, 1], shape (count,) or ().
        count: number of samples; None accepts any one-dimensional or scalar ``t``.

    Raises:
        InputError: a wrong shape, a NaN, or a time outside [0, 1].
        InputTypeError: not floating point.
    """
    t = as_times(t)
    if count is not None:
        check_time_shape(t, count)
    elif t.ndim > 1:
        raise InputError(f"got t of shape {tuple(t.shape)}, expected (N,) or (); pass one time a sample")
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ~((t >= 0) & (t <= 1))
        if bool(outside.any()):
            value = t[outside][0].item() if t.ndim else t.item()
            raise InputError(f"got t = {value:g}, expected times in [0, 1]: t = 0 is data, t = 1 is noise")
    return t


def check_labels(label: Any, count: int, num_classes: int, *, null: bool) -> None:
    """Check class labels; their values are read only on the host.

    Args:
        label: integer labels, shape (count,).
        count: number of samples.
        num_classes: labels run from 0 to num_classes - 1.
        null: whether num_classes itself, the null label, is allowed.

    Raises:
        InputError: a wrong shape or a value out of range.
        InputTypeError: not an integer tensor.
    """
    if not isinstance(label, Tensor) or label.is_floating_point() or label.dtype == torch.bool:
        came = label.dtype if isinstance(label, Tensor) else type(label).__name__
        raise InputTypeError(f"got labels of type {came}, expected an integer tensor; call label.long()")
    if label.shape != (count,):
        raise InputError(f"got labels of shape {tuple(label.shape)}, expected ({count},): one label a sample")
    if label.device.type == "cpu" and count:
        low, high = int(label.min()), int(label.max())
        highest = num_classes if null else num_classes - 1
        if low < 0 or high > highest:
            wrong = low if low < 0 else high
            meaning = f" ({num_classes} is the null label)" if null else ""
            raise InputError(f"got label {wrong}, expected 0 to {highest}{meaning}; check num_classes")


def check_finite(value: Tensor, name: str) -> None:
    """Raise InputError if ``value`` holds a NaN or an infinity. Waits for the device: borders only."""
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"got NaN or infinite values in {name}, expected finite ones; check where it comes from")


def require(module: str, extra: str) -> Any:
    """Import and return an optional module, as ``require("scipy.optimize", "transport")``.

    Raises:
        MissingPackageError: it is not installed; says which extra of pathline brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"got no package {module.split('.')[0]!r} ({error}); pip install 'pathline[{extra}]'"
        ) from error
