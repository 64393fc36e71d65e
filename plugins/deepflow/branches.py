"""What the branches of a backbone say, and which of them are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from pathline.core.errors import InputError

__all__ = ["Branches", "Spoken", "check_alignment", "check_one_branch", "resolve_cuts"]


class Branches(NamedTuple):
    """What the branches say.

    Attributes:
        velocities: of x's shape, one a branch asked; of all k in training, where the last is the model's velocity.
        accelerations: of x's shape, one a branch asked; k − 1 in training, none where the refiner has none.
        features: k − 1 tuples, with one tensor (N, T, dim) per entry of ``align_dims``; empty unless in training.
    """

    velocities: tuple[Tensor, ...]
    accelerations: tuple[Tensor, ...]
    features: tuple[tuple[Tensor, ...], ...]


class Spoken(NamedTuple):
    """Which branches are to speak, by their numbers from 1, ascending.

    Attributes:
        velocities: of 1 … k.
        accelerations: of 1 … k − 1.
    """

    velocities: tuple[int, ...] = ()
    accelerations: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The last branch named: no block after it need run."""
        return max((*self.velocities, *self.accelerations))

    def check(self, branches: int, accelerating: int) -> None:
        """Raise InputError unless at least one branch is named, ascending and from those there are.

        Args:
            branches: k: velocities are those of 1 … k.
            accelerating: accelerations are those of the branches 1 … ``accelerating``.
        """
        if not self.velocities and not self.accelerations:
            raise InputError(f"got spoken {self}, expected at least one branch of 1 … {branches}")
        for name, numbers, largest in (
            ("velocities", self.velocities, branches),
            ("accelerations", self.accelerations, accelerating),
        ):
            known = all(type(number) is int and 1 <= number <= largest for number in numbers)
            if not known or list(numbers) != sorted(set(numbers)):
                there = f"ascending, distinct branches of 1 … {largest}" if largest else "none: no branch has one"
                raise InputError(f"got {name} {tuple(numbers)} in spoken, expected {there}")


def resolve_cuts(branches: int | None, cuts: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the cuts, given or spread evenly.

    Raises:
        InputError: they do not fit the depth, or not the number of branches.
    """
    if cuts is not None and not isinstance(cuts, Sequence):
        raise InputError(f"got cuts {cuts}, expected a sequence of block counts; write ({cuts},)")
    if cuts is not None:
        chosen = tuple(cuts)
        if branches is not None and branches != len(chosen) + 1:
            raise InputError(f"got branches {branches} beside cuts {chosen}; give one or the other")
        if any(type(cut) is not int or not 1 <= cut < depth for cut in chosen) or list(chosen) != sorted(set(chosen)):
            raise InputError(f"got cuts {chosen}, expected ascending, distinct block counts from 1 to {depth - 1}")
        return chosen
    count = 2 if branches is None else branches
    if type(count) is not int or count < 1 or depth % count:
        raise InputError(f"got branches {count} and depth {depth}; expected a divisor of the depth, or give cuts")
    return tuple(depth * i // count for i in range(1, count))


def check_one_branch(options: Mapping[str, tuple[object, object]]) -> None:
    """Raise InputError for an option of what stands at cuts, where there are none.

    Args:
        options: name -> (what was given, the default).
    """
    unused = [f"{name} {given!r}" for name, (given, default) in options.items() if given != default]
    if unused:
        raise InputError(
            f"got {', '.join(unused)} for a backbone of one branch, which has no cut; leave out, or give more branches"
        )


def check_alignment(dims: Sequence[int], hidden: int | None, layer: object) -> None:
    """Raise InputError unless projectors can stand after the cuts.

    Args:
        dims: width of each encoder.
        hidden: hidden width of the projectors, or None.
        layer: ``align_layer`` of the trunk, which may have no projectors of its own.
    """
    if layer is not None:
        raise InputError(
            f"got align_layer {layer} for a branched backbone, whose projectors stand after its cuts; leave it out and "
            "give align_dims alone"
        )
    widths = (*dims, 1 if hidden is None else hidden) if isinstance(dims, Sequence) else ()
    if not widths or not all(type(width) is int and width >= 1 for width in widths):
        raise InputError(f"got align_width {hidden}, align_dims {dims}; expected positive numbers, as [768] for dims")
    if hidden is not None and not dims:
        raise InputError(f"got align_width {hidden} without align_dims, which alone use it; give both or neither")
