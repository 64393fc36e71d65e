"""States that a solver holds while the network runs, the network's input among them: ``python benchmarks/memory.py``.

Counted as bytes of live tensors over the bytes of a state, at the call where they are most; the caller's own state and
what the network itself needs are not among them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pathline import Flow, MissingPackageError, backbones, interpolants, solvers
from pathline.solvers import Solver

SHAPE = (16, 4, 32, 32)
OPTIONS: dict[str, dict[str, Any]] = {"ode": {"method": "euler"}, "sde": {"method": "euler"}}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation returns."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage.data_ptr()
        if storage.nbytes() and key not in self.storages:
            self.storages[key] = storage.nbytes()
            weakref.finalize(storage, self.storages.pop, key, None)


def held(solver: Solver) -> float:
    """Return the most states alive at a network call."""
    x, most, alive = torch.randn(SHAPE), 0, Alive()

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(alive.storages.values()))
        return -x

    with alive:
        solver.solve(Flow(backbones.wrap(network), interpolants.build("linear")), x, seed=0)
    return most / (x.numel() * 4)


def main() -> None:
    """Print a table."""
    print("| solver | states |\n|---|---|")
    for name in solvers.names():
        if name in ("mean-flow", "taylor"):  # need networks of their own; as euler
            continue
        stepped = {"steps": 8} if "grid" in solvers.registry.entry(name).options() else {}
        try:
            states = held(solvers.build(name, start=0.95, end=0.05, **stepped, **OPTIONS.get(name, {})))
        except MissingPackageError as error:
            print(f"| {name} | {error} |")
        else:
            print(f"| {name} | {states:.1f} |")


if __name__ == "__main__":
    main()
