"""The embedded handwritten digits."""

from pathline.data.digits.dataset import Digits

__all__ = ["Digits"]
