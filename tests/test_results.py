"""Files of results: what is written, what tables of several show, and what is told to set them apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pathline.core.errors import DataError
from pathline.evaluate import main as evaluate
from pathline.metrics.base import Record
from pathline.metrics.comparison import differences, markdown, table
from pathline.metrics.results import Result, add, output_of, read, write

DRAWN = {
    "checkpoint": {"name": "step-000000300", "average": "ema", "weights_sha256": "a" * 64},
    "solver": {"name": "heun", "steps": 25},
    "guidance": [],
    "nfe": 50,
    "seed": 0,
    "seed_law": "sample i is a function of (seed, i)",
    "label_law": "balanced",
    "rounding": "float32, clamp, round",
    "precision": "fp32",
    "tf32": False,
}
FID = dict(
    metric="fid",
    count=500,
    values={"fid": 2.0625},
    real={},
    real_count=10_000,
    uncertainty={"fid": 0.0321},
    uncertainty_law="three seeds",
    reference={"name": "virtual", "sha256": "b" * 64, "count": 1000},
    features={"name": "inception", "sha256": "c" * 64},
)


def written(folder, name, *, drawn=DRAWN, size=(3, 5), more=(), **changes):
    """Write a file of results; return its path."""
    path = output_of(folder / f"{name}.npz")
    records = [record.to_json() for record in (Record(**{**FID, **changes}), *more)]
    write(path, records, drawn, "1.2.3", shape=[1, *size])
    return path


def told(*paths):
    return differences([Result.read(path) for path in paths])


def test_a_file_holds_the_result_with_its_evidence(tmp_path):
    path = written(tmp_path, "a", warnings=("few",))
    assert path == tmp_path / "a.metrics.json"
    content = json.loads(path.read_text())
    assert content["metrics"] == [{**FID, "about": {}, "warnings": ["few"]}]
    assert content["samples"] == DRAWN and content["format"] == 2
    assert (content["version"], content["torch"]) == ("1.2.3", torch.__version__)
    result = Result.read(path)
    assert result.shape == (1, 3, 5) and result.drawn == DRAWN
    ((column, figure),) = result.figures.items()
    assert column == ("fid", "fid") and str(figure) == "2.062 ± 0.032"


def test_results_lie_beside_what_they_are_of(tmp_path, monkeypatch):
    for name in ("out.shards", "images.v2"):
        (tmp_path / name).mkdir()
    assert output_of(tmp_path / "out.shards") == tmp_path / "out.metrics.json" == output_of(tmp_path / "out.npz")
    assert output_of(tmp_path / "images.v2") == tmp_path / "images.v2.metrics.json"
    monkeypatch.chdir(tmp_path / "images.v2")
    assert output_of(Path(".")) == tmp_path / "images.v2.metrics.json"


def test_files_written_before_are_read(tmp_path):
    old = {"version": "0.1", "metrics": [{"metric": "frechet, pca", "count": 5, "values": {"distance": 1.5}}]}
    (tmp_path / "a.metrics.json").write_text(json.dumps({**old, "samples": {"nfe": 3}}))
    result = Result.read(tmp_path / "a.metrics.json")
    assert result.shape is None and str(result.figures["frechet, pca", "distance"]) == "1.5"


SAMPLES = {**DRAWN, "samples_sha256": "9" * 64}


def record(count, metric="fid", **values):
    return Record(metric, count, values or {metric: 1.5}, {}, 0).to_json()


def test_results_of_the_same_samples_are_added_and_newer_ones_hold(tmp_path):
    path = tmp_path / "a.metrics.json"
    write(path, [record(50, fid=7.5), record(10, fid=9.5)], SAMPLES, "1.0", asked=["fid"], accuracy=0.5)
    add(path, [record(50, fid=7.25), record(10, "kid", kid=0.5)], SAMPLES, "1.1", shape=[1, 3, 5])
    content = json.loads(path.read_text())
    assert [(r["metric"], r["count"], *r["values"].values(), r.get("version")) for r in content["metrics"]] == [
        ("fid", 10, 9.5, "1.0"),
        ("fid", 50, 7.25, None),
        ("kid", 10, 0.5, None),
    ]
    assert (content["version"], content["accuracy"], content["shape"]) == ("1.1", 0.5, [1, 3, 5])
    assert "asked" not in content  # a sweep finds there what it did not ask for
    assert [file.name for file in tmp_path.iterdir()] == ["a.metrics.json"]


@pytest.mark.parametrize(
    "drawn", [{**SAMPLES, "samples_sha256": "8" * 64}, {**SAMPLES, "nfe": 51}, {"solver": "other"}, {}]
)
def test_results_of_other_samples_go(drawn, tmp_path):
    path = tmp_path / "a.metrics.json"
    older = SAMPLES if "nfe" in drawn else drawn  # of what has no hash nobody knows
    write(path, [record(10)], older, "1.0")
    add(path, [record(7)], drawn, "1.0")
    assert [entry["count"] for entry in json.loads(path.read_text())["metrics"]] == [7]


@pytest.mark.parametrize("content", ["{", '{"format": 2, "metrics": [3]}', '{"by_time": 5}'])
def test_damaged_results_are_replaced(content, tmp_path):
    (tmp_path / "a.metrics.json").write_text(content)
    add(tmp_path / "a.metrics.json", [record(7)], SAMPLES, "1.0")
    assert len(Result.read(tmp_path / "a.metrics.json").records) == 1


def test_results_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.metrics.json"
    write(path, [record(10)], SAMPLES, "1.0")
    before = path.read_bytes()

    def full(self, text):
        self.write_bytes(text[:40].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        add(path, [record(7)], SAMPLES, "1.0")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.metrics.json"]


def test_one_metric_of_several_numbers_of_samples_is_a_row_each(tmp_path, capsys):
    path = tmp_path / "a.metrics.json"
    write(path, [record(50, fid=7.5), record(10, fid=9.5), record(50, "kid", kid=0.5)], SAMPLES, "1.0")
    assert evaluate(["compare", str(path)]) == 0
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()[1:]] == [
        ["a", "(50)", "heun", "50", "7.5", "0.5"],
        ["a", "(10)", "heun", "50", "9.5", "—"],
    ]
    assert printed.err == "warning: fid is not comparable: another number of samples: 50 in a (50); 10 in a (10)\n"


# --- results of training ---------------------------------------------------------------------------------------------


def lines(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "evaluations.jsonl"


def row(step, average, metric="fid", value=2.5):
    head = {"step": step, "average": average, "shape": [1, 3, 5], **DRAWN}
    return {**head, **record(500, metric, **{metric: value})}


def test_what_training_measured_is_read_by_step_and_average(tmp_path, capsys):
    file = lines(
        tmp_path / "run",
        row(10, "ema"),
        row(10, "ema", "kid", None),
        row(10, "ema-0.050", value=3.5),
        row(20, "ema", value=1.5),
    )
    with file.open("a") as end:
        end.write('{"step": 30, "aver')  # a kill
    names = {place: [r.name for r in read(f"{file}{place}")] for place in ("", ":10", ":20:ema", ":10:ema-0.050")}
    assert names == {
        "": ["run 10:ema", "run 10:ema-0.050", "run 20:ema"],
        ":10": ["run 10:ema", "run 10:ema-0.050"],
        ":20:ema": ["run 20:ema"],
        ":10:ema-0.050": ["run 10:ema-0.050"],
    }
    (result,) = read(f"{file}:10:ema")
    assert result.drawn == DRAWN and result.shape == (1, 3, 5) and [len(r) for r in result.records] == [11, 11]
    other = written(tmp_path, "sampled", values={"fid": 1.75})
    assert evaluate(["compare", f"{file}:20:ema", str(other)]) == 0
    printed = capsys.readouterr()
    assert [line.split()[-1] for line in printed.out.splitlines()[1:]] == ["1.5", "0.032"]
    assert "fid is not comparable: another reference" in printed.err and "label law" not in printed.err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (":30", r"got no results at .*:30, expected one of those there: 10:ema, 20:ema"),
        (":10:ema-0.1", "expected one of those there: 10:ema, 20:ema"),
    ],
)
def test_a_step_that_was_not_measured(place, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read(f"{lines(tmp_path / 'run', row(10, 'ema'), row(20, 'ema'))}{place}")


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"metric": "a", "values": {"b": "c"}}'])
def test_lines_of_another_kind_are_refused(line, tmp_path):
    file = lines(tmp_path / "run", row(10, "ema"))
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(DataError, match=r"evaluations\.jsonl, whose line 1"):
        read(str(file))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_rows_are_results_and_columns_metrics(tmp_path, capsys):
    recall = Record("precision-recall, inception, k=3", 500, {"precision": 0.75, "recall": 0.5}, {}, 0)
    first = written(tmp_path, "first", more=[recall])
    second = written(tmp_path, "second", drawn={**DRAWN, "solver": {"name": "euler"}, "nfe": 20}, values={"fid": 13.0})
    assert evaluate(["compare", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["precision-recall", "precision-recall"],
        ["inception", "inception"],
        ["k=3", "k=3"],
        ["result", "solver", "NFE", "fid", "precision", "recall"],
    ]
    assert lines[4].split() == ["first", "heun", "50", "2.062", "±", "0.032", "0.75", "0.5"]
    assert lines[5].split() == ["second", "euler", "20", "13", "±", "0.032", "—", "—"]
    assert evaluate(["compare", str(first), str(second), "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| result | solver | NFE | fid | precision-recall, inception, k=3, precision "
        "| precision-recall, inception, k=3, recall |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| first | heun | 50 | 2.062 ± 0.032 | 0.75 | 0.5 |",
        "| second | euler | 20 | 13 ± 0.032 | — | — |",
    ]


def test_results_of_one_name_are_told_by_their_folders(tmp_path):
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(written(tmp_path / folder, "same"))
    results = [Result.read(path) for path in paths]
    assert [line.split()[0] for line in table(results).splitlines()[1:]] == [
        str(tmp_path / folder / "same") for folder in "xy"
    ]
    assert "|" in markdown(results[:1]) and str(tmp_path) not in markdown(results[:1])


# --- what sets results apart -----------------------------------------------------------------------------------------


def test_equal_results_have_nothing_to_be_told(tmp_path):
    assert told(written(tmp_path, "a"), written(tmp_path, "b", drawn={**DRAWN, "seed": 1, "seconds": 3.5})) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (dict(count=400), "fid is not comparable: another number of samples: 500 in a; 400 in b"),
        (dict(real_count=9), "fid is not comparable: another number of real samples: 10000 in a; 9 in b"),
        (
            dict(reference={**FID["reference"], "sha256": "d" * 64}),
            "fid is not comparable: another reference: virtual sha256=bbbbbbbbbbbb… in a; "
            "virtual sha256=dddddddddddd… in b",
        ),
        (
            dict(features={"name": "inception", "sha256": "e" * 64}),
            "fid is not comparable: another feature space: inception sha256=cccccccccccc… in a; "
            "inception sha256=eeeeeeeeeeee… in b",
        ),
        (
            dict(reference={"kind": "data", "split": "train"}),
            "fid is not comparable: another reference: virtual sha256=bbbbbbbbbbbb… count=1000 in a; "
            "kind=data split=train in b",
        ),
        (dict(size=(5, 3)), "not comparable: another shape of a sample: (1, 3, 5) in a; (1, 5, 3) in b"),
    ],
)
def test_what_makes_figures_not_comparable_is_named(changes, line, tmp_path):
    assert told(written(tmp_path, "a"), written(tmp_path, "b", **changes)) == [line]


def test_where_a_reference_lies_matters_only_as_long_as_its_content_is_unknown(tmp_path):
    known = [{"kind": "images", "path": name, "sha256": "b" * 64} for name in ("x.npz", "y.npz")]
    assert told(*(written(tmp_path, n, reference=r) for n, r in zip("ab", known, strict=True))) == []
    unknown = [{"kind": "images", "path": name} for name in ("x.npz", "y.npz")]
    assert told(*(written(tmp_path, n, reference=r) for n, r in zip("cd", unknown, strict=True))) == [
        "fid is not comparable: another reference: path=x.npz in c; path=y.npz in d"
    ]


@pytest.mark.parametrize(
    ("entry", "value", "line"),
    [
        ("label_law", "random", "not comparable: another label law: balanced in a; random in b"),
        ("rounding", "truncate", "not comparable: another rounding: float32, clamp, round in a; truncate in b"),
        ("autoencoder", {"name": "ft-mse"}, "not comparable: another decoder: none in a; ft-mse in b"),
        ("nfe", 51, "drawn differently: another NFE: 50 in a; 51 in b"),
        ("solver", {"name": "heun"}, "drawn differently: another solver: heun steps=25 in a; heun in b"),
        (
            "guidance",
            [{"name": "cfg", "scale": 1.5}],
            "drawn differently: another guidance: none in a; cfg scale=1.5 in b",
        ),
        ("precision", "bf16", "drawn differently: another precision: fp32 in a; bf16 in b"),
        ("tf32", True, "drawn differently: another TF32: False in a; True in b"),
        (
            "seed_law",
            None,
            "drawn differently: another seed law: sample i is a function of (seed, i) in a; unknown in b",
        ),
        (
            "checkpoint",
            {**DRAWN["checkpoint"], "average": "ema-0.050"},
            "drawn differently: another average of the weights: ema in a; ema-0.050 in b",
        ),
        (
            "checkpoint",
            {**DRAWN["checkpoint"], "weights_sha256": "f" * 64},
            "drawn differently: another checkpoint: aaaaaaaaaaaa… in a; ffffffffffff… in b",
        ),
    ],
)
def test_what_was_drawn_differently_is_named(entry, value, line, tmp_path):
    assert told(written(tmp_path, "a"), written(tmp_path, "b", drawn={**DRAWN, entry: value})) == [line]


def test_samples_without_a_record_are_unknown_in_every_respect(tmp_path):
    lines = told(written(tmp_path, "a"), written(tmp_path, "b", drawn={}))
    assert lines[0] == "nothing is known of how b was drawn"
    assert "not comparable: another label law: balanced in a; unknown in b" in lines
    assert "not comparable: another decoder: none in a; unknown in b" in lines


def test_what_a_metric_warns_of_is_told_again(tmp_path):
    paths = [written(tmp_path, name, warnings=("500 samples for 2048 features",)) for name in "ab"]
    assert told(*paths) == [f"{name}: fid: 500 samples for 2048 features" for name in "ab"]


def test_differences_go_to_stderr_and_are_no_failure(tmp_path, capsys):
    paths = [written(tmp_path, "a"), written(tmp_path, "b", count=4), written(tmp_path, "c", count=4)]
    assert evaluate(["compare", *map(str, paths)]) == 0
    assert capsys.readouterr().err == (
        "warning: fid is not comparable: another number of samples: 500 in a; 4 in b, c\n"
    )


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"metrics": 3}',
        '{"metrics": [3]}',
        '{"metrics": [{"metric": 3, "values": {}}]}',
        '{"metrics": [{"metric": "fid"}]}',
        '{"metrics": [{"metric": "fid", "values": {"fid": "low"}}]}',
        '{"metrics": [], "samples": []}',
        '{"metrics": [], "format": 3}',
        '{"metrics": [], "format": 2, "shape": 5, "samples": {}}',
        '{"metrics": [], "shape": ["a"]}',
        '{"metrics": [{"metric": "fid", "values": {}, "warnings": 5}]}',
        '{"metrics": [{"metric": "fid", "values": {}, "warnings": [5]}]}',
        '{"metrics": [{"metric": "fid", "values": {}, "uncertainty": 5}]}',
        '{"metrics": [{"metric": "fid", "values": {}, "count": []}]}',
        '{"metrics": [{"metric": "fid", "values": {"fid": 1' + "0" * 400 + "}}]}",
    ],
)
def test_files_of_another_kind_are_refused(content, tmp_path, capsys):
    (tmp_path / "a.metrics.json").write_text(content)
    with pytest.raises(DataError, match=r"got .*a\.metrics\.json"):
        Result.read(tmp_path / "a.metrics.json")
    assert evaluate(["compare", str(tmp_path / "a.metrics.json")]) == 2
    assert capsys.readouterr().err.startswith("error: got ")


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"got no file at .*none"):
        Result.read(tmp_path / "none.metrics.json")
