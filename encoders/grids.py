"""Tokens from one grid to another of the same aspect.

N images, T tokens of a grid of rows and columns, D width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pathline.core.errors import InputError

__all__ = ["check_grids", "on_grid"]

Grid = tuple[int, int]


def on_grid(tokens: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Return tokens on another grid, resampled bicubically, antialiased where it is coarser, in float32.

    Args:
        tokens: (N, T, D), row by row.
        grid: their rows and columns, T = rows·columns.
        wanted: rows and columns to return; the same ones give the tokens as they are.

    Raises:
        InputError: grids of different aspects, or tokens that are not of the first.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise InputError(f"got tokens {tuple(tokens.shape)}, expected (N, {grid[0] * grid[1]}, D) of a grid {grid}")
    if grid == wanted:
        return tokens
    check_grids(grid, wanted)
    image = tokens.float().transpose(1, 2).reshape(len(tokens), -1, *grid)
    return functional.interpolate(image, wanted, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def check_grids(grid: Grid, wanted: Grid) -> None:
    """Raise InputError unless two grids have the same aspect, so that one can be resampled to the other."""
    if grid[0] * wanted[1] != grid[1] * wanted[0]:
        raise InputError(
            f"got a token grid of {grid[0]} × {grid[1]} for one of {wanted[0]} × {wanted[1]}, which differs in aspect; "
            "choose the encoder's resolution, or the backbone's input_size and patch_size, of one aspect"
        )
