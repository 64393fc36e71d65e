"""``pathline list``: every component by name, with its options and their defaults."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence

from pathline import backbones, data, encoders, interpolants, metrics, objectives, solvers
from pathline.core.registry import Entry, registries
from pathline.data import sources
from pathline.encoders import autoencoders

__all__ = ["lines", "main"]

# importing them fills the registries
KINDS = (backbones, data, sources, encoders, autoencoders, interpolants, metrics, objectives, solvers)


def lines(place: str | None = None) -> Iterator[str]:
    """Yield one line a registry and one a component; ``place`` picks one registry, as ``solvers.grids``."""
    for name, registry in registries().items():
        if place not in (None, name):
            continue
        yield name
        for entry in registry:
            aliases = [alias for alias, target in registry.aliases().items() if target == entry.name]
            also = f" (also {', '.join(sorted(aliases))})" if aliases else ""
            yield f"  {entry.name}{also}: {_options(entry) or 'no options'}"


def _options(entry: Entry[object]) -> str:
    return ", ".join(
        name if option.default is inspect.Parameter.empty else f"{name}={option.default!r}"
        for name, option in entry.options().items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pathline list [registry]``."""
    parser = argparse.ArgumentParser(prog="pathline", description="Components of pathline by name.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="print every registry with its names, options and defaults")
    command.add_argument("registry", nargs="?", choices=list(registries()), help="print this one alone")
    print("\n".join(lines(parser.parse_args(arguments).registry)))
    return 0
