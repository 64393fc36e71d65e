"""State dictionaries of other programs, read, recognised, turned into ours and back.

A family is a released layout with a name, a way to recognise it, and a clock. The core knows ``sit``, ``dit`` and
``repa``; plugins add theirs. ``network(read("released.pt"), "sit")`` is a backbone on our clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathline.backbones.base import Backbone
from pathline.backbones.base import registry as backbones
from pathline.backbones.clocks import Clocked, ReversedClock
from pathline.core.errors import PathlineError, WeightsError
from pathline.core.families import DiTFamily, REPAFamily, SiTFamily
from pathline.core.foreign import read, unwrapped
from pathline.core.layouts import (
    DEFECTS,
    TRUNK_KEYS,
    Defect,
    Facts,
    Keys,
    State,
    WeightFamily,
    listed,
    registry,
    rename,
    swapped,
)

__all__ = [
    "DEFECTS",
    "TRUNK_KEYS",
    "Defect",
    "DiTFamily",
    "Facts",
    "FamilySpec",
    "Keys",
    "REPAFamily",
    "SiTFamily",
    "State",
    "WeightFamily",
    "check_fit",
    "component",
    "convert",
    "describe",
    "load",
    "network",
    "read",
    "recognise",
    "registry",
    "rename",
    "reverse_clock",
    "swapped",
]

FamilySpec = str | Mapping[str, Any] | WeightFamily
POSITIONS, POSITION_TOLERANCE = "pos_embed", 1e-3
BLOCK_ENTRIES = 4
"""The fewest entries of a transformer block: two weights of its attention, and two of its MLP."""


def convert(state_dict: State, family: FamilySpec | None = None, *, to: FamilySpec | None = None) -> dict[str, Tensor]:
    """Turn a family's state dictionary into ours, or ours into a family's.

    What a network has beside its weights, as ``time_scale``, is in neither: it is to be given again.

    Args:
        state_dict: weights by name; those that wrappers add, as ``module.``, are taken off.
        family: name of the layout that ``state_dict`` has; None recognises it.
        to: name of the layout wanted, if ``state_dict`` is ours; with options as ``{"name": "sit", "sigma": True}``.

    Returns:
        A new dictionary; tensors that need no change are shared.

    Raises:
        WeightsError: the layout is not recognised, or has other keys than its family.
    """
    state_dict = unwrapped(state_dict)
    if to is not None:
        if family is not None:
            raise WeightsError(f"got family {family!r} and to {to!r}; give the one that is not pathline's own layout")
        return registry.build(to).from_pathline(state_dict)
    return (_only_match(state_dict) if family is None else registry.build(family)).to_pathline(state_dict)


def recognise(state_dict: State, family: FamilySpec | None = None) -> WeightFamily:
    """Return the family of weights that are to be used, not only renamed.

    Args:
        state_dict: in the family's layout.
        family: its name; None recognises those that their keys tell.

    Raises:
        WeightsError: unknown keys, or keys that several families have, whose clocks differ.
    """
    if family is not None:
        return registry.build(family)
    found = _only_match(unwrapped(state_dict))
    others = [name for name in registry.names() if registry.build(name).keys_of == found.name]
    if others:
        raise WeightsError(
            f"got weights with the keys of {', '.join((found.name, *others))}, which differ in their clocks alone; "
            "name the family: weights.family"
        )
    return found


def describe(state_dict: State, family: FamilySpec | None = None, /, **given: Any) -> dict[str, Any]:
    """Return the backbone that weights are of, as ``{"name": "sit", "hidden_size": 1152, …}``.

    Args:
        state_dict: in the family's layout.
        family: see ``recognise``.
        given: options that the weights do not tell, as ``num_heads`` of an unusual width, or ``clamp_gap``.

    Raises:
        WeightsError: an option that the weights do not tell is not given; names all of them.
    """
    layout = recognise(state_dict, family)
    options, unknown = layout.facts(unwrapped(state_dict))
    asked = [f"backbone.{name} ({why})" for name, why in unknown.items() if name not in given]
    if asked:
        raise WeightsError(f"got {layout.name} weights, which do not tell all; give {', '.join(asked)}")
    return {**options, **given}


def component(state_dict: State, family: FamilySpec | None = None, /, **given: Any) -> dict[str, Any]:
    """Return what ``describe`` does, within the wrapper that turns the family's clock into ours."""
    layout = recognise(state_dict, family)
    inner = describe(state_dict, layout, **given)
    return inner if layout.wrapper is None else {"name": layout.wrapper, "backbone": inner}


def network(state_dict: State, family: FamilySpec | None = None, /, **given: Any) -> nn.Module:
    """Build the network of weights, on our clock, with the weights in it, in evaluation mode.

    Names and shapes are compared before anything is allocated.

    Args:
        state_dict: see ``describe``.
        family: see ``recognise``.
        given: see ``describe``.

    Raises:
        WeightsError: see ``describe`` and ``load``.
    """
    layout = recognise(state_dict, family)
    named = component(state_dict, layout, **given)
    check_fit(named, state_dict, layout)
    built = backbones.build(named)
    load(built, state_dict, layout)
    return built.eval()


def check_fit(backbone: Mapping[str, Any], state_dict: State, family: FamilySpec | None = None) -> None:
    """Compare names, shapes and types with those of a backbone that is yet to be built, as ``component`` names it.

    Raises:
        WeightsError: missing, unexpected or mis-shaped entries, all in one; or options that are beyond all numbers.
    """
    layout = recognise(state_dict, family)
    depth = (backbone if layout.wrapper is None else backbone["backbone"]).get("depth")
    if isinstance(depth, int) and depth * BLOCK_ENTRIES > len(state_dict):  # making even an empty network takes time
        raise WeightsError(
            f"got {len(state_dict)} entries for {depth} blocks, too few; check the file, or give the depth"
        )
    try:
        with torch.device("meta"):
            shell = backbones.build(backbone)
    except PathlineError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # of numbers that torch cannot count
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"got options with which no network can be built, {dict(backbone)}: {reason}") from error
    _, wanted, given = _compared(shell, state_dict, layout)
    _refuse(_misfits(wanted, given), layout)


def load(backbone: nn.Module, state_dict: State, family: FamilySpec | None = None) -> None:
    """Fill a backbone with a family's weights; a wrapper's clock is passed through.

    The position table is not taken but compared: it is a formula, which averaging and narrow types round.

    Args:
        backbone: of the network that the weights are of.
        state_dict: in the family's layout, of any floating-point type.
        family: see ``recognise``.

    Raises:
        WeightsError: missing, unexpected or mis-shaped entries, all in one; else those with NaN or infinity, or
            positions that differ by over 1e-3, or over the rounding of a narrower type.
    """
    layout = recognise(state_dict, family)
    inner, wanted, given = _compared(backbone, state_dict, layout)
    _refuse(_misfits(wanted, given) or _wrong_values(wanted, given), layout)
    table = {POSITIONS: wanted[POSITIONS]} if POSITIONS in wanted else {}
    inner.load_state_dict(layout.to_pathline({**given, **table}))


def reverse_clock(backbone: nn.Module) -> Backbone:
    """Wrap a velocity network whose clock runs from noise (0) to data (1), as SiT's, as −net(x, 1 − t)."""
    return ReversedClock(backbone=backbone)


def _only_match(state: State) -> WeightFamily:
    families = {name: registry.build(name) for name in registry.names()}
    matching = [name for name, family in families.items() if family.matches(state)]
    if len(matching) != 1:
        known = sorted(families, key=lambda name: families[name].keys_of is not None)
        raise WeightsError(f"got weights that match {matching or 'no known family'}; name one of {', '.join(known)}")
    return families[matching[0]]


def _compared(
    backbone: nn.Module, state: State, layout: WeightFamily
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Return the network within a clock, its own weights in the family's layout, and those given."""
    inner = backbone.backbone if isinstance(backbone, Clocked) else backbone
    wanted = layout.current(layout.from_pathline(inner.state_dict()))
    return inner, wanted, layout.current(unwrapped(state))


def _refuse(problems: list[str], layout: WeightFamily) -> None:
    if problems:
        raise WeightsError(
            "\n  ".join((f"got {layout.name} weights that do not fit the backbone; check its options:", *problems))
        )


def _misfits(wanted: State, given: State) -> list[str]:
    """List what is missing, unexpected, of another shape or type."""
    shapes, types = [], []
    for key in wanted.keys() & given.keys():
        if given[key].shape != wanted[key].shape:
            shapes.append(f"{key} {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}")
        elif not given[key].is_floating_point():
            types.append(f"{key} {given[key].dtype}")
    return _problems(
        {
            "missing": [key for key in wanted if key not in given and key != POSITIONS],
            "unexpected": [key for key in given if key not in wanted],
            "of another shape": sorted(shapes),
            "not floating-point": sorted(types),
        }
    )


def _wrong_values(wanted: State, given: State) -> list[str]:
    """List what is not finite, and positions that are others, of weights that fit."""
    broken = [
        key for key, value in given.items() if key != POSITIONS and not value.to(wanted[key].dtype).isfinite().all()
    ]
    problems = _problems({"with NaN or infinity": broken})
    if POSITIONS in wanted and POSITIONS in given:
        away = float((given[POSITIONS].double() - wanted[POSITIONS].double()).abs().max())
        allowed = max(POSITION_TOLERANCE, torch.finfo(given[POSITIONS].dtype).eps)
        if not away <= allowed:  # NaN is not
            problems.append(
                f"{POSITIONS} differs by {away:.2g} from the sine–cosine table, more than {allowed:g}; "
                "check the file, or give backbone.input_size if the grid is no square"
            )
    return problems


def _problems(kinds: Mapping[str, list[str]]) -> list[str]:
    return [f"{kind} ({len(found)}): {listed(found)}" for kind, found in kinds.items() if found]
