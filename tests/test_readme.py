"""What README says is run, or compared with what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from pathline import Draws, backbones, data, interpolants, objectives, solvers
from pathline.core import listing
from pathline.core.registry import registries

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_length_and_first_commands():
    assert len(README.splitlines()) <= 120
    assert [block.strip() for block in blocks("bash")[:2]] == ["make train", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_fifteen_lines_run():
    """The whole program, with fewer steps: it trains, and its samples have the right shape."""
    program = blocks("python")[0]
    code = [line for line in program.splitlines() if line.strip()]
    assert len(code) <= 16  # one call is broken over two lines
    short = program.replace("steps=1000", "steps=30").replace("steps=50", "steps=5")
    assert short.count("steps=30") == 1 and short.count("steps=5)") == 1
    scope: dict = {}
    exec(compile(short, "README", "exec"), scope)
    assert scope["images"].shape == (10, 1, 8, 8) and bool(scope["images"].isfinite().all())
    digits = data.build("digits", split="held-out").batch(range(200))
    torch.manual_seed(0)
    options = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=4, num_heads=4, num_classes=10)
    untrained = backbones.build("deepflow", **options, cuts=(2,), acceleration_width=64)
    trained, first = (
        float(
            scope["objective"](network, digits["data"], Draws(0).at(range(200)), label=digits["label"]).total.detach()
        )
        for network in (scope["backbone"], untrained)
    )
    assert trained < 0.8 * first


def test_an_objective_in_one_file(monkeypatch):
    program = blocks("python")[1]
    monkeypatch.setattr(objectives.registry, "_entries", dict(objectives.registry._entries))
    exec(compile(program, "my_objective", "exec"), {"__name__": "my_objective"})
    objective = objectives.build("absolute", interpolant=interpolants.build("linear"), label_dropout=0.0)
    x, draws = torch.randn(5, 3), Draws(0).at(range(5))
    loss = objective(backbones.wrap(lambda x, t: 0 * x), x, draws)
    expected = (draws.normal("noise", (3,)) - x).abs().mean()
    assert torch.allclose(loss.total, expected)


def test_the_table_of_names_is_complete():
    table = dict(re.findall(r"^\| `([a-z.]+)` \| (.*) \|$", README, re.MULTILINE))
    known = registries()
    assert set(table) == set(known)
    for place, names in table.items():
        assert re.findall(r"`([^`]+)`", names) == known[place].names(), place


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if "train.py" in line]
)
def test_commands_name_entries_that_exist(line, tmp_path, monkeypatch, processes):
    """In processes of their own, one a device: train.py would start this very test again as the second one."""
    from pathline.train import main

    words = shlex.split(line, comments=True)[2:]
    words = [word for word in words if word not in ("--resume", "auto")]
    monkeypatch.chdir(ROOT)
    devices = next((int(word.partition("=")[2]) for word in words if word.startswith("train.devices=")), 1)
    rehearsed = processes(devices, lambda: main([*words, f"train.folder={tmp_path / 'run'}", "--dry-run"]), timeout=100)
    assert rehearsed.checked() == [0] * devices
    assert "494,988 parameters" in rehearsed.outputs[0] and not (tmp_path / "run").exists()


def test_a_run_that_stopped_goes_on_by_the_command_that_readme_gives(tmp_path, monkeypatch):
    """README's pair of commands as they stand, but for the folder and a stop after 2 and after 4 steps."""
    from pathline.train import main

    commands = [line for line in "\n".join(blocks("bash")).splitlines() if "runs/slower" in line]
    assert len(commands) == 2
    monkeypatch.chdir(ROOT)
    for command, stop in zip(commands, (2, 4), strict=True):
        words = shlex.split(command.replace("runs/slower", str(tmp_path / "run")), comments=True)
        assert main([*words[2:], f"train.stop_at={stop}"]) == 0
        assert (tmp_path / "run" / "checkpoints" / f"step-{stop:09d}").is_dir()


def test_listing_names_every_component_with_its_defaults(capsys):
    assert listing.main(["list"]) == 0
    printed = capsys.readouterr().out
    for place, registry in registries().items():
        assert f"\n{place}\n" in f"\n{printed}"
        for name in registry.names():
            assert f"\n  {name}" in printed
    assert "euler-maruyama: steps=250" in printed and "acceleration_width=2048" in printed
    assert listing.main(["list", "solvers.grids"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "solvers.grids" and {"  paper: last=0.04", "  uniform: no options"} < {*lines}
    assert [line.strip().split(":")[0].split(" ")[0] for line in lines[1:]] == solvers.grids.names()


def test_files_that_readme_names_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        if not name.startswith("http"):
            assert (ROOT / name).exists(), name
