"""What docs/extending.md shows is run as it stands; each block ends in a check of its own."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from pathline.core import listing
from pathline.core.registry import registries

assert listing  # imports every registry

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(# (\S+)\n.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch):
    for registry in registries().values():
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


@pytest.mark.parametrize(("program", "file"), BLOCKS, ids=[name for _, name in BLOCKS])
def test_each_file_runs_and_registers_its_component(program, file):
    before = {place: set(registry.names()) for place, registry in registries().items()}
    exec(compile(program, file, "exec"), {"__name__": file.removesuffix(".py")})
    added = [name for place, registry in registries().items() for name in set(registry.names()) - before[place]]
    assert len(added) == 1 and f'"{added[0]}"' in program


def test_all_kinds_are_shown():
    assert [name for _, name in BLOCKS] == [
        "my_path.py",
        "my_objective.py",
        "my_coupling.py",
        "my_guidance.py",
        "my_grid.py",
        "my_plugin.py",
    ]
    project = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    assert project["project"]["entry-points"]["pathline.plugins"] == {"mine": "my_plugin"}
    assert "SineSquared" in PAGE


def test_the_paths_ends_are_as_the_page_says():
    scope: dict = {"__name__": "my_path"}
    exec(compile(BLOCKS[0][0], "my_path.py", "exec"), scope)
    assert scope["SineSquared"]().open_ends("velocity", "data") == (0.0, 1.0)
