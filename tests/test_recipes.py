"""The recipes of ``configs/deepflow``: one a published run, what its row says, and fit to be trained."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pathline import encoders
from pathline.core.config import load, resolve
from pathline.encoders import Encoder
from pathline.plugins.deepflow.presets import PRESETS
from pathline.train import main as train
from pathline.training.parts import build

FOLDER = Path(__file__).parent.parent / "configs" / "deepflow"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "base"}
ALIGNED = [name for name, row in PRESETS.items() if "align_dims" in row.backbone]
SMALL = (
    "backbone.size=null",
    "backbone.hidden_size=12",
    "backbone.num_heads=3",
    "backbone.input_size=8",
    "backbone.num_classes=5",
    "data.num_classes=5",
    "train.steps=2",
    "train.global_batch=4",
    "train.precision=fp32",
    "train.accelerator=cpu",
    "solver.steps=2",
    "sample.count=3",
    "log.tensorboard=false",
)


class TwoByTwo(Encoder):
    """An encoder of four tokens: the means of an image's quarters, 768 times each."""

    dim, grid, manifest = 768, (2, 2), {"name": "quarters"}

    def forward(self, images):
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).mean(1)
        return quarters.flatten(1)[:, :, None].expand(-1, -1, 768)


def small(name: str, folder: Path) -> list[str]:
    """Words that shrink a recipe."""
    row = PRESETS[name]
    branches = row.backbone.get("branches", 1)
    words = [*SMALL, f"backbone.depth={2 * branches}", f"data.path={folder}"]
    if "acceleration_width" not in row.backbone and row.backbone.get("refiner") not in ("none", "gap") and branches > 1:
        words.append("backbone.acceleration_width=7")
    if row.backbone.get("align_layer"):
        words.append("backbone.align_layer=1")
    if name in ALIGNED:
        words += ["backbone.align_width=11", "encoders.0.name=quarters"]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of latents with their images."""
    path = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    for i, rows in enumerate((5, 3)):
        packed = {
            "latents": torch.randn(rows, 4, 8, 8, generator=generator).half() / 0.18215,
            "labels": torch.randint(5, (rows,), generator=generator),
            "images": torch.randint(256, (rows, 3, 16, 16), dtype=torch.uint8, generator=generator),
        }
        save_file(packed, path / f"part-{i}.safetensors")
    return path


@pytest.fixture
def quarters(monkeypatch):
    monkeypatch.setattr(encoders.registry, "_entries", dict(encoders.registry._entries))
    encoders.register("quarters")(TwoByTwo)


def test_every_row_has_its_recipe():
    assert set(FILES) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_is_what_its_row_says(name):
    row, c = PRESETS[name], load(FILES[name])
    said = resolve({"data": {"name": "digits"}, "train": {"steps": 1, "folder": "x"}, **_components(row)})
    assert c.backbone == said.backbone and c.objective == said.objective and c.guidance == said.guidance
    assert c.train.steps == ceil(Fraction(row.epochs * 1_281_167, 256))
    assert c.train.folder == f"runs/deepflow/{name}"


def _components(row) -> dict:
    guidance = [{"name": "classifier-free", "scale": row.guidance_scale}] if row.guidance_scale else []
    return {"backbone": dict(row.backbone), "objective": dict(row.objective), "guidance": guidance}


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_trains_as_the_paper_does(name):
    c = load(FILES[name])
    assert (c.optim.name, c.optim.lr, c.optim.betas, c.optim.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 0)
    assert (c.optim.schedule, c.optim.warmup_steps, c.optim.clip) == ("constant", 0, 1.0)
    assert (c.ema.decay, c.ema.warmup, c.ema.lengths) == (0.9999, False, ())
    assert (c.train.global_batch, c.train.precision) == (256, "fp16")
    assert c.interpolant == {"name": "linear"} and c.objective["label_dropout"] == 0.1
    assert (c.data["name"], c.data["num_classes"], c.data["scale"]) == ("latents", 1000, 0.18215)
    side = 64 if name.endswith("512") else 32
    assert [c.backbone[key] for key in ("input_size", "in_channels", "num_classes")] == [side, 4, 1000]
    assert (c.solver["name"], c.solver["steps"], c.solver["grid"]["last"]) == ("euler-maruyama", 250, 0.04)
    assert (c.solver["grid"]["name"], c.solver["diffusion"]["name"], c.solver["end"]) == ("paper", "linear", 0)
    assert c.data["images"] == bool(c.encoders) == (name in ALIGNED)
    for encoder in c.encoders:
        assert (encoder["name"], encoder["resolution"]) == ("dinov2-b", 8 * side)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_begins_with_the_papers_figures(name):
    row = PRESETS[name]
    first = FILES[name].read_text(encoding="utf-8").splitlines()[0]
    figures = [figure for figure in row.figures if figure is not None]
    kinds = ("{} M parameters", "{} GFLOPS", "FID {}", "sFID {}", "IS {}")
    told = ", ".join(kind.format(x) for kind, x in zip(kinds, row.figures, strict=True) if x is not None)
    table = f"Table{'s' if ',' in row.tables else ''} {row.tables.replace(', ', ' and ')}"
    assert figures and first == f"# {row.model}, the paper's {table}: {told}."


def test_there_is_nothing_in_the_rows_that_the_paper_does_not_report():
    """Tables 2, 3 and 7, as they are published."""
    reported = {
        "2, 3": {29.7, 23.1, 9.8, 5.7, 7.2, 5.0, 1.97, 1.77, 1.96},
        "7": {34.4, 33.0, 31.1, 29.9, 28.1, 29.3, 30.4, 27.8, 28.5, 28.8},
    }
    for tables, figures in reported.items():
        assert {row.figures.fid for row in PRESETS.values() if row.tables == tables} == figures


@pytest.mark.parametrize("name", PRESETS)
def test_a_shrunken_recipe_can_be_trained(name, folder, quarters):
    """Its parts are built and its loss is evaluated, with a small encoder in the place of its own."""
    parts = build(load(FILES[name], small(name, folder)))
    assert parts.forward_flops > 0 and len(parts.dataset) == 8 and parts.dataset.shape == (4, 8, 8)


@pytest.mark.parametrize("name", ["xl2-3t-ssl-guided", "ladder-1-deep-supervision"])
def test_a_shrunken_recipe_trains_two_steps(name, folder, quarters, tmp_path):
    run = tmp_path / "run"
    assert train([str(FILES[name]), *small(name, folder), f"train.folder={run}"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["skipped"] == 0
    assert (run / "checkpoints" / "step-000000002" / "model.safetensors").is_file()
