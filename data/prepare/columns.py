"""The tensors of a shard: what each is called, its type, and the shape of a row."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pathline.data.packed import BYTES, FLOATS, INTEGERS

__all__ = ["FEATURES", "FLIPPED", "MAIN", "Column", "Natural", "Positive", "Strict"]

FLIPPED = "_flip"  # end of the name of a column of mirror images
FEATURES = "features_"  # beginning of the name of a column of an encoder's tokens
MAIN: Final = {"moments": "moments", "mean": "latents", "images": "images"}  # the column of data of each kind
_TYPES = {**FLOATS, **INTEGERS, **BYTES}
_NAMES = {type: name for name, type in _TYPES.items()}
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Entries that are of the type that is told, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Column(Strict):
    """Type and shape of one row of a tensor of the shards."""

    dtype: Literal["F16", "BF16", "F32", "U8", "I64"]
    shape: list[Positive]

    @classmethod
    def of(cls, rows: Tensor) -> Column:
        """Return what is told of rows (n, …)."""
        return cls.model_validate({"dtype": _NAMES[rows.dtype], "shape": list(rows.shape[1:])})

    @property
    def type(self) -> torch.dtype:
        """Type of the values."""
        return _TYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """Size of a row."""
        return self.type.itemsize * math.prod(self.shape)
