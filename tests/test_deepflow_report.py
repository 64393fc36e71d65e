"""Sizes and costs of the published models: the integers that the reference classes gave, and the paper's figures."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from pathline import UnknownNameError, backbones
from pathline.plugins.deepflow.presets import PRESETS, preset
from pathline.plugins.deepflow.report import count, main, report
from pathline.training.speed import forward_flops

# Counted from the reference model classes at 4 × 32 × 32, patch 2, 1000 classes. Parameters: all, trainable.
# Multiply–accumulates: everything with all heads; linear and convolution modules; what sampling needs.
# Paper: millions of parameters, 10⁹ multiply–accumulates.
MEASURED = {
    "sit-b2": (130500112, 130303504, 23001956352, 21793996800, 23001956352, 130, 24),
    "sit-l2": (458086416, 457824272, 80693428224, 77472202752, 80693428224, 458, 80),
    "sit-xl2": (675111184, 674816272, 118616702976, 114388844544, 118616702976, 675, 114),
    "b2-2t-depth-10": (144944688, 144748080, 25897467904, 24186191872, 25888817152, 144, 24),
    "b2-2t-depth-12": (166201392, 166004784, 29729751040, 27817148416, 29721100288, 166, 28),
    "l2-2t-depth-20": (431349808, 431087664, 75460771840, 71568457728, 75448188928, 431, 72),
    "l2-2t-depth-22": (469129264, 468867120, 82184241152, 78023491584, 82171658240, 469, 78),
    "l2-2t-depth-24": (506908720, 506646576, 88907710464, 84478525440, 88895127552, 507, 84),
    "xl2-2t-depth-22": (588341040, 588046128, 102285967360, 97454129152, 102271221760, 588, 97),
    "xl2-2t-depth-24": (636151344, 635856432, 110757609472, 105623781376, 110742863872, 636, 106),
    "xl2-2t-depth-26": (683961648, 683666736, 119229251584, 113793433600, 119214505984, 683, 114),
    "xl2-2t-depth-28": (731771952, 731477040, 127700893696, 121963085824, 127686148096, 731, 122),
    "l2-3t-depth-18": (433438768, 433176624, 76951584768, 72119746560, 76926418944, 433, 72),
    "l2-3t-depth-21": (490107952, 489845808, 87036788736, 81802297344, 87011622912, 490, 82),
    "l2-3t-depth-24": (546777136, 546514992, 97121992704, 91484848128, 97096826880, 547, 92),
    "xl2-3t-depth-18": (538128432, 537833520, 94426873856, 88689065984, 94397382656, 538, 89),
    "xl2-3t-depth-21": (609843888, 609548976, 107134337024, 100943544320, 107104845824, 609, 101),
    "xl2-3t-depth-24": (681559344, 681264432, 119841800192, 113198022656, 119812308992, 681, 113),
    "xl2-3t-depth-27": (753274800, 752979888, 132549263360, 125452500992, 132519772160, 753, 125),
    "xl2-4t-depth-28": (822587952, 822293040, 145869275136, 137111568384, 145825038336, 822, 137),
}
WITH_SIGMA = {  # SiT as released, its head twice as wide: parameters, everything, modules
    "sit-b2": (130512416, 23005102080, 21797142528),
    "sit-l2": (458102816, 80697622528, 77476397056),
    "sit-xl2": (675129632, 118621421568, 114393563136),
}
WIDTHS = {"B": 768, "L": 1024, "XL": 1152}


def width(name: str) -> int:
    return WIDTHS[PRESETS[name].backbone["size"]]


@pytest.mark.parametrize("name", MEASURED)
def test_counts_are_those_of_the_reference_classes(name):
    parameters, trainable, full, modules, sampling, *paper = MEASURED[name]
    found, d = count(PRESETS[name].backbone), width(name)
    assert (found.parameters, found.trainable, found.training, found.modules) == (parameters, trainable, full, modules)
    # the reference embeds t once a branch and the gap once a cut also where all are the same; once is enough
    cuts = PRESETS[name].backbone.get("branches", 1) - 1
    again = cuts * (256 * d + d * d) + max(cuts - 1, 0) * (256 * 2 * d + 4 * d * d)
    assert found.sampling == sampling - again
    figures = PRESETS[name].figures
    assert [figures.parameters, figures.cost] == paper


def test_every_size_of_the_paper_is_here():
    assert set(MEASURED) == {name for name, row in PRESETS.items() if row.tables == "8"}


@pytest.mark.parametrize("name", WITH_SIGMA)
def test_sigma_channels_account_for_the_released_sizes(name):
    found, d = count(PRESETS[name].backbone), width(name)
    more = (16 * (d + 1), 256 * 16 * d, 256 * 16 * d)
    counted = (found.parameters, found.training, found.modules)
    assert tuple(a + b for a, b in zip(counted, more, strict=True)) == WITH_SIGMA[name]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sit", "depth": 3, "align_layer": 2, "align_dims": [7, 3], "align_width": 5},
        {"name": "deepflow", "depth": 5, "cuts": [1, 3], "acceleration_width": [7, 3], "shared_heads": False},
        {"name": "deepflow", "depth": 4, "branches": 2, "refiner": "addition", "align_dims": [5], "align_width": 3},
        {"name": "deepflow", "depth": 3, "branches": 3, "refiner": "none"},
    ],
)
def test_the_block_that_stands_for_all_gives_the_whole_count(options):
    """Against a pass with real numbers through every block, and against each module's own arithmetic."""
    options = {**options, "hidden_size": 12, "num_heads": 3, "input_size": 10, "in_channels": 3, "num_classes": 5}
    network = backbones.build(options)
    x, t, label = torch.randn(1, 3, 10, 10), torch.rand(1), torch.tensor([2])
    speaking = {"with_features": True}
    if options["name"] == "deepflow":
        speaking = {"branch_times": (t + 0.1,) * len(network.cuts)}
    found, costs = count(options), []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "cross_space" not in name:
            module.register_forward_hook(lambda m, _, out: costs.append(out.numel() * m.weight[0].numel()))
    assert 2 * found.sampling == forward_flops(lambda: network(x, t, label=label))
    costs.clear()
    assert 2 * found.training == forward_flops(lambda: network(x, t, label=label, **speaking))
    assert found.modules == sum(costs)


def test_the_report_names_the_largest_deviations(capsys):
    assert main(["sit-l2", "xl2-2t-depth-26", "l2-3t-depth-24", "b2-2t-depth-12", "xl2-3t-guided"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "largest deviation in parameters: +0.96 M (xl2-2t-depth-26)",
        "largest deviation in cost: -2.53 G (sit-l2)",
        "largest deviation in cost of a branched model: -0.52 G (l2-3t-depth-24)",
    ):
        assert f"{line}\n" in printed
    row = next(line for line in printed.splitlines() if line.startswith("l2-3t-depth-24"))
    numbers = re.findall(r"[-+]?[\d,]+(?:\.\d+)?", row.removeprefix("l2-3t-depth-24"))
    assert numbers == ["546,777,136", "546,514,992", "547", "-0.22", "97.09", "97.12", "91.48", "92", "-0.52"]
    assert next(line for line in printed.splitlines() if line.startswith("xl2-3t-guided")).endswith("1.97")


def test_a_report_of_rows_without_figures_has_no_deviation():
    assert not [line for line in report(["ladder-1-deep-supervision"]) if "deviation" in line]


def test_a_row_that_does_not_exist(capsys):
    with pytest.raises(UnknownNameError, match="unknown row 'xl2-3t-sl'; did you mean 'xl2-3t-ssl'"):
        preset("xl2-3t-sl")
    assert main(["sit-b2", "b2-2t-dept-12"]) == 2
    told = capsys.readouterr()
    assert "did you mean 'b2-2t-depth-12'?" in told.err and not told.out
