"""A run's page: what it shows against what lies in the folder, and that nothing there breaks it or gets out of it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pathline.train import main as train
from pathline.training import page, report
from pathline.training.charts import BUCKETS, chart
from pathline.training.remains import SHEETS, SIDE
from pathline.training.report import main, save_report, write_report

EVIL = "</pre></style><script>alert('out')</script>&\"'"
VOID = {"meta", "link", "img", "circle", "path", "br"}


class Page(HTMLParser):
    """Elements of a page with their attributes and text, checked to be nested well."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), "an attribute twice"
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        if tag in VOID:  # </path> around a title
            return
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for element in self.open:
            element[2].append(text)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict, str]]:
        chosen = [(found, "".join(text)) for name, found, text in self.elements if name == tag]
        return [(found, text) for found, text in chosen if all(found.get(k) == v for k, v in attributes.items())]

    def table(self, caption: str) -> list[list[str]]:
        """Rows of cells of the table of a caption, its head the first."""
        rows, inside = [], False
        for tag, _, text in self.elements:
            if tag == "table":
                inside = False
            elif tag == "caption":
                inside = "".join(text) == caption
            elif tag == "tr" and inside:
                rows.append([])
            elif tag in ("th", "td") and inside:
                rows[-1].append("".join(text))
        return rows

    def facts(self) -> dict[str, str]:
        names, values = ([text for _, text in self.all(tag)] for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))


def lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def row(step, **entries):
    """A row as training writes them."""
    numbers = {"loss": 2.0 / step, "velocity": 1 / step, "gradient_norm": 0.5, "loss_by_time": [3.0 / step, None]}
    speed = {"images_per_second": 70.0 + step, "data_wait_share": 0.03, "memory_gib": 1.5, "lr": 1e-4}
    return {"step": step, **numbers, "window": 5, **speed, "skipped": 2, "passed": 7, "failed_saves": 0, **entries}


def sheet(path, side, value=128):
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(path)


CONFIGURATION = """
data: {name: digits, split: train}
interpolant: {name: linear}
backbone: {name: sit, hidden_size: 12}
objective: {name: velocity}
train: {steps: 35, global_batch: 6, initialize_from: null}
"""


@pytest.fixture
def folder(tmp_path):
    """A run with everything that a page shows."""
    run = tmp_path / "first run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIGURATION)
    lines(run / "metrics.jsonl", [row(5), row(10), row(15), row(20, loss=None)])
    lines(
        run / "incidents.jsonl",
        [
            {"step": 3, "batch": 3, "reason": "data", "samples": [17]},
            {"step": 4, "batch": 4, "reason": "jump", "samples": list(range(11))},
        ],
    )
    lines(
        run / "evaluations.jsonl",
        [
            {"step": step, "average": average, "metric": "fid", "values": {"fid": value}, "count": 1000}
            | ({"uncertainty": {"fid": 0.25}} if average == "ema" else {})
            for step, average, value in ((10, "ema", 30.5), (10, "ema-0.100", 28.25), (20, "ema", 21.5))
        ],
    )
    record = {"metric": "frechet, pca", "count": 300, "values": {"distance": 2.5}, "real": {"distance": 0.75}}
    record |= {"about": {"distance": "0 is equal"}, "uncertainty": {}, "warnings": ["few samples"]}
    (run / "heun.metrics.json").write_text(json.dumps({"format": 2, "metrics": [record], "samples": {}}))
    start = {"versions": {"pathline": "0.1.0", "torch": "2.13.0"}, "devices": "1 × cpu", "weights": None}
    lines(
        run / "starts.jsonl",
        [
            {"time": "2030-01-02T03:04:05+00:00", "step": 0, "checkpoint": None, **start},
            {"time": "2030-01-03T03:04:05+00:00", "step": 10, "checkpoint": "x/step-000000010", **start},
        ],
    )
    for step in (10, 20):
        sheet(run / "pictures" / f"step-{step:09d}.png", 40, step)
    checkpoint = run / "checkpoints" / "step-000000020"
    checkpoint.mkdir(parents=True)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, checkpoint / "model.safetensors")
    state = {"step": 20, "window": {"plain": "velocity"}, "data": {"name": "digits", "sha256": "f00d"}}
    state |= {"statistics": {"mean": [0.25]}, "samples": {"latents_of": {"name": "autoencoder of a test"}}}
    (checkpoint / "state.json").write_text(json.dumps({**state, "encoders": [{"name": "dinov2-s"}]}))
    return run


def shown(folder) -> Page:
    return Page(write_report(folder).read_text())


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_key_facts(folder):
    told = shown(folder).facts()
    assert told["steps"] == "20 of 35" and told["parameters"] == str(3 * 5 + 7) and told["batch"] == "6"
    assert [told[name] for name in ("model", "objective", "interpolant", "data")] == [
        "sit",
        "velocity",
        "linear",
        "digits",
    ]
    assert told["velocity, last 20 steps"] == f"{(1 / 5 + 1 / 10 + 1 / 15 + 1 / 20) / 4:.4f}"
    assert told["loss, last 20 steps"] == "—"  # one row is not finite
    assert told["images per second"] == "82"  # the median of 75, 80, 85 and 90 is 82.5, which rounds to even
    assert told["skipped for: data"] == told["skipped for: jump"] == "1"
    assert told["batches passed over by roll-backs"] == "7"


def test_tables(folder):
    found = shown(folder)
    evaluated = found.table("Measured in the course of training, the newest first")
    assert evaluated[1:] == [
        ["20", "ema", "fid", "fid", "21.5 ± 0.25", "1,000"],
        ["10", "ema-0.100", "fid", "fid", "28.25", "1,000"],
        ["10", "ema", "fid", "fid", "30.5 ± 0.25", "1,000"],
    ]
    assert found.table("heun.metrics.json")[1] == ["frechet, pca", "distance", "2.5", "0.75", "300", "0 is equal"]
    assert any("few samples" in text for _, text in found.all("p"))
    speed = {name: cells for name, *cells in found.table("Over the rows of the log")}
    assert speed["images per second"] == ["82", "75", "90", "90"]
    assert speed["share of time waiting for data"] == ["3.0%"] * 4
    assert found.table("Skipped steps, the newest first")[1:] == [
        ["4", "4", "jump", "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"],
        ["3", "3", "data", "17"],
    ]
    starts = found.table("Starts of the run")
    assert starts[1][:4] == ["2030-01-02T03:04:05+00:00", "0", "—", "—"]
    assert starts[2][1:] == ["10", "x/step-000000010", "—", "pathline 0.1.0, torch 2.13.0", "1 × cpu"]
    assert found.table("Checkpoints")[1][0] == "step-000000020"
    texts = [text for _, text in found.all("pre")]
    for words in ('"sha256": "f00d"', '"mean"', "autoencoder of a test", "dinov2-s", "global_batch: 6"):
        assert any(words in text for text in texts), words


def test_charts_have_every_line_and_a_description(folder):
    found = shown(folder)
    titles = [text for _, text in found.all("h3")]
    assert {"loss", "loss by time t", "gradient norm", "learning rate", "memory, GiB", "fid"} <= set(titles)
    told = {found["aria-label"].split(" over ")[0]: found["aria-label"] for found, _ in found.all("svg", role="img")}
    assert told["gradient norm"] == "gradient norm over steps 5 to 20. from 0.5 to 0.5."
    assert "loss: from 0.4 to 0.1333; velocity: from 0.2 to 0.05." in told["loss"]
    assert told["fid"] == "fid over steps 10 to 20. ema: from 30.5 to 21.5; ema-0.100: from 28.25 to 28.25."


def test_pictures_are_in_the_page(folder):
    found = shown(folder)
    images = found.all("img")
    assert [image["alt"] for image, _ in images] == [
        "Sheet of samples drawn after step 10, a row a class",
        "Sheet of samples drawn after step 20, a row a class",
    ]
    content = base64.b64decode(images[0][0]["src"].removeprefix("data:image/png;base64,"))
    assert content == (folder / "pictures" / "step-000000010.png").read_bytes()


def test_many_and_large_pictures(folder):
    """The first, the last and some between; one of 600 KiB is reduced, and one that is none is told."""
    for step in range(30, 330, 10):
        sheet(folder / "pictures" / f"step-{step:09d}.png", 7, step)
    sheet(folder / "pictures" / "step-000000330.png", 900)
    (folder / "pictures" / "step-000000010.png").write_bytes(b"no picture")
    found = shown(folder)
    images, captions = found.all("img"), [text for _, text in found.all("figcaption")]
    assert len(images) == SHEETS - 1 and "step 330, reduced" in captions
    last = base64.b64decode(images[-1][0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(last)).size == (SIDE, SIDE)
    assert any("step-000000010.png" in text for _, text in found.all("p", **{"class": "note alarm"}))


# --- nothing gets out, or in -----------------------------------------------------------------------------------------


def test_the_page_is_whole_and_accessible(folder):
    text = write_report(folder).read_text()
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>") and found.all("html", lang="en")
    assert [text for _, text in found.all("h1")] == ["first run"] and found.all("title")[0][1] == "first run"
    links = [link["href"] for link, _ in found.all("a")]
    assert links == [f"#{heading['id']}" for heading, _ in found.all("h2")] and len(links) == 9
    for kind in ("src", "href"):
        assert all(
            element[kind][:1] == "#" or element[kind][:5] == "data:"
            for _, element, _ in found.elements
            if kind in element
        )
    assert not re.search(r"url\(|@import|https?:", text) and not found.all("script")
    assert not any(name.startswith("on") for _, element, _ in found.elements for name in element)
    assert "default-src 'none'" in found.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert all(head.get("scope") in ("col", "row") for head, _ in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) == len(found.all("div", role="region")) == 6
    assert all(image["alt"] for image, _ in found.all("img"))


def test_texts_are_escaped(folder):
    (folder / "config.yaml").write_text(CONFIGURATION + f"# {EVIL}\n" + json.dumps({"log": {"wandb": EVIL}})[1:-1])
    lines(folder / "metrics.jsonl", [{**row(5), EVIL: 0.5}, {**row(10), EVIL: 0.25}])
    lines(folder / "incidents.jsonl", [{"step": 3, "batch": 3, "reason": EVIL, "samples": [EVIL]}])
    entry = {"average": EVIL, "metric": EVIL, "values": {EVIL: 1.0}, "count": 5}
    lines(folder / "evaluations.jsonl", [{"step": step, **entry} for step in (5, 10)])
    lines(folder / "starts.jsonl", [{"time": EVIL, "versions": {EVIL: EVIL}}])
    record = {"metric": EVIL, "count": 5, "values": {EVIL: 1.0}, "about": {EVIL: EVIL}, "warnings": [EVIL]}
    (folder / f"{EVIL.replace('/', '')}.metrics.json").write_text(json.dumps({"format": 2, "metrics": [record]}))
    (folder / "heun.metrics.json").write_text(EVIL)
    (folder / "checkpoints" / "step-000000020" / "state.json").write_text(json.dumps({"data": {EVIL: EVIL}}))
    evil = folder.parent / EVIL.replace("/", "")
    folder.rename(evil)
    text = write_report(evil).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    found = Page(text)  # nested well
    assert {tag for tag, _, _ in found.elements} <= {
        *("html head meta link title style body header main footer nav section h1 h2 h3 p a dl div dt dd").split(),
        *("figure figcaption span svg g path circle text ul li i b img table caption thead tbody tr th td").split(),
        *("details summary pre").split(),
    }


def test_what_is_missing_is_left_out(folder):
    whole = {heading for _, heading in shown(folder).all("h2")}
    (folder / report.NAME).unlink()
    for name, chapter in {
        "evaluations.jsonl": "Evaluation",
        "pictures": "Samples",
        "heun.metrics.json": "Results",
        "config.yaml": "Configuration",
        "incidents.jsonl": None,
        "starts.jsonl": None,
        "checkpoints": None,
        "metrics.jsonl": "Curves",
    }.items():
        path = folder / name
        kept = folder.parent / name
        path.rename(kept)
        found = shown(folder)
        headings = {heading for _, heading in found.all("h2")}
        gone = {chapter, *(["Speed"] if name == "metrics.jsonl" else [])} - {None}
        assert headings == whole - gone and not found.all("p", **{"class": "note alarm"})[1:], name
        kept.rename(path)
    for name in ("evaluations.jsonl", "heun.metrics.json", "incidents.jsonl", "starts.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    for name in ("checkpoints", "pictures"):
        shutil.rmtree(folder / name)
    found = shown(folder)  # of a run that has just begun
    assert {heading for _, heading in found.all("h2")} == {"Summary", "Configuration"}
    assert found.facts()["log"] == "no row so far" and found.facts()["steps"] == "0 of 35"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "data: [unclosed"),
        ("config.yaml", "7"),
        ("metrics.jsonl", '{"step": 5, "loss": "much"}\n'),
        ("metrics.jsonl", '{"step": 5, "loss": NaN, "window": 5, "gradient_norm": Infinity}\n{"step'),
        ("incidents.jsonl", "[]\n7\n"),
        ("evaluations.jsonl", '{"step": null, "values": {"fid": NaN}}\n{"values": 7}\n[]\nno JSON\n'),
        ("heun.metrics.json", "{}"),
        ("starts.jsonl", '{"versions": 7}\n{"step'),
        ("checkpoints/step-000000020/state.json", '{"window": 7, "samples": 7, "step": "x"}'),
        ("checkpoints/step-000000020/model.safetensors", "no tensors"),
    ],
)
def test_damaged_files_do_not_take_the_page_with_them(name, content, folder):
    (folder / name).write_text(content)
    found = shown(folder)
    assert len(found.all("h2")) >= 7 and found.all("footer")


def test_values_that_are_not_finite(folder):
    entry = {"average": "ema", "metric": "fid", "count": 5}
    lines(
        folder / "evaluations.jsonl",
        [{"step": s, "values": {"fid": v}, **entry} for s, v in ((5, math.nan), (10, 3.0))],
    )
    lines(folder / "metrics.jsonl", [row(5, loss=None, lr=None), row(10, loss=None, images_per_second=None)])
    found = shown(folder)
    assert found.table("Measured in the course of training, the newest first")[2][4] == "nan"
    assert "nan" not in "".join(drawn.get("d", "") for _, drawn, _ in found.elements)
    assert found.facts()["loss, last 10 steps"] == "—"


def test_a_long_run_gives_a_page_of_bounded_size(folder):
    """6,000 rows, 5,000 skipped steps, 3,000 evaluations and a manifest of 4 MB."""
    rng = np.random.default_rng(0)
    lines(folder / "metrics.jsonl", [row(step, loss=float(rng.random())) for step in range(1, 6001)])
    lines(
        folder / "incidents.jsonl",
        [{"step": i, "batch": i, "reason": "data", "samples": [i] * 99} for i in range(5000)],
    )
    entry = {"average": "ema", "metric": "fid", "values": {"fid": 3.0}, "count": 5}
    lines(folder / "evaluations.jsonl", [{"step": step, **entry} for step in range(3000)])
    state = {"data": {"files": ["x" * 4000] * 1000}}
    (folder / "checkpoints" / "step-000000020" / "state.json").write_text(json.dumps(state))
    found = shown(folder)
    assert (folder / report.NAME).stat().st_size < 2**20
    notes = [text for _, text in found.all("p")]
    assert "4,940 more rows are not shown." in notes and "2,940 more rows are not shown." in notes
    assert any("more characters" in text for _, text in found.all("pre"))


# --- charts ----------------------------------------------------------------------------------------------------------


def points(figure: str, place: int = 0) -> np.ndarray:
    """Corners of a line, (n, 2), from the left; y counts downwards."""
    path = Page(figure).all("path", **{"class": "line"})[place][0]["d"]
    return np.array([[float(number) for number in pair.split()] for pair in re.split("[ML]", path)[1:]])


def test_points_lie_where_their_values_are():
    """Of 0, 2, 6 and 8 at the steps 10, 20, 40 and 50: differences keep their ratios, on both axes."""
    drawn = points(chart("learning rate", np.array([10.0, 20, 40, 50]), {"": np.array([0.0, 2, 6, 8])}))
    x, y = drawn.T
    assert np.allclose(np.diff(x) / (x[-1] - x[0]), [0.25, 0.5, 0.25], atol=1e-3)
    assert np.allclose(np.diff(y) / (y[-1] - y[0]), [0.25, 0.5, 0.25], atol=2e-3) and y[0] > y[-1]


def test_losses_of_a_wide_range_are_drawn_by_their_logarithm():
    y = points(chart("loss", np.arange(3.0), {"loss": np.array([1000.0, 10, 0.1])}))[:, 1]
    assert np.diff(y)[0] == pytest.approx(np.diff(y)[1], abs=0.11) and np.diff(y)[0] > 50
    ticks = [text for _, text in Page(chart("loss", np.arange(3.0), {"": np.array([1000.0, 10, 0.1])})).all("text")]
    assert {"0.1", "1", "10", "100", "1000"} <= set(ticks)


def test_labels_of_the_axis_are_at_their_values():
    figure = chart("learning rate", np.array([0.0, 5000]), {"": np.array([0.0, 4.0])})
    marks = {text: (float(at["x"]), float(at["y"])) for at, text in Page(figure).all("text")}
    (x0, y0), (x1, y1) = points(figure)
    assert marks["0"] and marks["4"][1] - 3.5 == pytest.approx(y1, abs=0.1)
    assert marks["2"][1] - 3.5 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert marks["1k"][0] == pytest.approx(x0 + (x1 - x0) / 5, abs=0.1)


def test_gaps_and_counts():
    steps, values = np.arange(5.0), np.array([1.0, 2, math.nan, 3, 4])
    path = Page(chart("gradient norm", steps, {"": values})).all("path", **{"class": "line"})[0][0]["d"]
    assert path.count("M") == 2 and path.count("L") == 2
    stairs = points(chart("skipped and failed", np.arange(3.0), {"skipped": np.array([0.0, 0, 2])}))
    assert (np.diff(stairs, axis=0) == 0).any(1).all()  # across or up alone


def test_many_rows_are_thinned_out_and_keep_their_ends_and_extremes():
    values = np.sin(np.arange(9000.0))
    values[4321] = 7.0
    drawn = points(chart("learning rate", np.arange(9000.0), {"": values}))
    assert len(drawn) <= 2 * BUCKETS + 2
    highest = drawn[drawn[:, 1].argmin()]
    assert highest[0] == pytest.approx(drawn[0, 0] + (drawn[-1, 0] - drawn[0, 0]) * 4321 / 8999, abs=0.1)


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [-3.0, -2.0], [1e300, -1e300], [1e-300, 2e-300], [7.0]])
@pytest.mark.parametrize("title", ["loss", "memory, GiB", "skipped and failed"])
def test_ranges_of_any_kind(title, values):
    drawn = points(chart(title, np.arange(float(len(values))), {"": np.array(values)}))
    assert np.isfinite(drawn).all() and (drawn >= 0).all() and (drawn[:, 0] <= 420).all() and (drawn[:, 1] <= 210).all()


def test_colours_can_be_told_from_the_ground():
    """WCAG 2: contrast 4.5 for text, 3 for lines, in light and dark."""

    def luminance(colour: str) -> float:
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(first), luminance(second)))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for theme, drawn in ((page.LIGHT, page.LINES_LIGHT), (page.DARK, page.LINES_DARK)):
        for ground in (theme["paper"], theme["card"]):
            assert all(contrast(theme[ink], ground) >= 4.5 for ink in ("ink", "muted", "accent", "alarm"))
            assert all(contrast(colour, ground) >= 3 for colour in drawn)


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_command(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0 and str(folder / "report.html") in capsys.readouterr().out
    assert main([str(folder), str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").read_text().startswith("<!DOCTYPE html>")
    for words, said in (
        ([str(tmp_path / "nowhere")], "holds no run"),
        ([str(folder), str(tmp_path)], "expected a file"),
        ([str(folder), str(tmp_path / "nowhere" / "x.html")], "No such file"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        told = capsys.readouterr().err
        assert said in told and told.startswith("error: ") and told.count("\n") == 1


def test_a_failure_leaves_the_older_page_and_no_trace(folder, monkeypatch, capsys):
    before = write_report(folder).read_bytes()
    names = {path.name for path in folder.iterdir()}
    monkeypatch.setattr(report, "document", lambda *given: "\ud800")  # which no file can hold
    assert save_report(folder) is None
    assert "warning: no report.html (UnicodeEncodeError" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == before and {path.name for path in folder.iterdir()} == names


TINY = """
data: digits
backbone: {name: sit, input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 12, depth: 1, num_heads: 3,
           num_classes: 10}
objective: velocity
solver: {name: euler, steps: 2}
train: {steps: 6, global_batch: 5, folder: runs/x, accelerator: cpu}
log: {every: 2, tensorboard: false}
checkpoint: {every: 3}
"""


def test_training_writes_the_page_and_notes_its_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pathline.train.save_curves", lambda folder: None)  # for speed
    (tmp_path / "c.yaml").write_text(TINY)
    words = [str(tmp_path / "c.yaml"), f"train.folder={tmp_path / 'run'}"]
    assert train([*words, "train.stop_at=3"]) == 0
    found = Page((tmp_path / "run" / "report.html").read_text())
    assert found.facts()["steps"] == "2 of 6" and len(found.all("img")) == 1  # rows are written every 2 steps
    assert train([*words, "--resume", "auto"]) == 0
    found = Page((tmp_path / "run" / "report.html").read_text())
    starts = found.table("Starts of the run")
    assert found.facts()["steps"] == "6 of 6" and [start[1] for start in starts[1:]] == ["0", "3"]
    assert starts[2][2].endswith("step-000000003") and f"torch {torch.__version__}" in starts[2][4]
    monkeypatch.setattr(report, "document", lambda *given: 1 / 0)
    (tmp_path / "run" / "starts.jsonl").unlink()
    (tmp_path / "run" / "starts.jsonl").mkdir()
    assert train([*words, "--resume", "auto", "train.steps=8"]) == 0
    said = capsys.readouterr().err
    assert "no report.html (ZeroDivisionError" in said and "starts.jsonl lacks this start" in said


# --- a browser -------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
).split()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize(("scheme", "ground"), [(1, page.LIGHT["paper"]), (0, page.DARK["paper"])])
def test_a_browser_shows_the_page(scheme, ground, width, folder, tmp_path):
    """In light and dark, wide and narrow: many colours on the ground that is asked for, and nothing on the console."""
    path, taken = write_report(folder), tmp_path / "shown.png"
    flags = [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    window = [f"--window-size={width},2000", f"--screenshot={taken}", path.as_uri()]
    done = subprocess.run([CHROMIUM, *FLAGS, *flags, *window], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    image = Image.open(taken).convert("RGB")
    assert image.size == (width, 2000)
    colours = {colour: count for count, colour in image.getcolors(2**24)}
    wanted = tuple(int(ground[i : i + 2], 16) for i in (1, 3, 5))
    assert max(colours, key=lambda colour: colours[colour] * (colour == wanted)) == wanted and colours[wanted] > 10**5
    assert len(colours) > 500 and np.asarray(image).std() > 10
