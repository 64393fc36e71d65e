from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional

from pathline import InputError, InputTypeError, backbones
from pathline.backbones.layers import Attention, attend, math_attention, position_table, scalar_features, unpatchify
from pathline.testing import check_backbone

TOY = {
    "mlp": dict(dim=5, hidden_size=16, num_classes=7),
    "sit": dict(input_size=(4, 6), patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=7),
    "deepflow": dict(
        input_size=(4, 6),
        patch_size=2,
        in_channels=3,
        hidden_size=24,
        depth=3,
        num_heads=2,
        num_classes=7,
        cuts=(1, 2),
        acceleration_width=10,
    ),
    "reversed-clock": {},
    "dit-clock": {},
}
CLOCKS = ("reversed-clock", "dit-clock")  # wrap another backbone


def toy(name, **changes):
    if name in CLOCKS:
        return backbones.build(name, backbone={"name": "sit", **TOY["sit"], **changes})
    return backbones.build(name, **{**TOY[name], **changes})


def shuffled(backbone):
    """Give zero-initialised layers something to say."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3)
    return backbone


def test_every_backbone_has_a_toy():
    assert backbones.names() == sorted(TOY)


@pytest.mark.parametrize("name", TOY)
class TestContract:
    def test_shape_precision_and_attributes(self, name):
        for dtype in (torch.float32, torch.float64):
            backbone = shuffled(toy(name).to(dtype))
            x = torch.randn(2, *backbone.input_shape, dtype=dtype)
            label = torch.tensor([0, backbone.null_label])
            assert (backbone.num_classes, backbone.null_label) == (7, 7)
            for t in (torch.rand(2, dtype=dtype), torch.tensor(0.3, dtype=dtype)):
                out = backbone(x, t, label=label)
                assert out.shape == x.shape and out.dtype == dtype and bool(out.isfinite().all())

    def test_samples_do_not_mix_and_inputs_matter(self, name):
        backbone = shuffled(toy(name).double())
        x, t = torch.randn(3, *backbone.input_shape).double(), torch.rand(3).double()
        label = torch.tensor([1, 4, 7])
        whole = backbone(x, t, label=label)
        for i in range(3):
            assert torch.allclose(backbone(x[i : i + 1], t[i : i + 1], label=label[i : i + 1]), whole[i : i + 1])
        assert not torch.allclose(backbone(x, t.flip(0), label=label), whole)
        assert not torch.allclose(backbone(x, t, label=label.flip(0)), whole)
        assert torch.equal(backbone(x, t, label=label), whole)

    def test_a_scalar_time_is_one_time_for_all(self, name):
        backbone = shuffled(toy(name))
        x, label = torch.randn(3, *backbone.input_shape), torch.tensor([1, 4, 7])
        assert torch.equal(
            backbone(x, torch.tensor(0.3), label=label), backbone(x, torch.tensor([0.3, 0.3, 0.3]), label=label)
        )

    def test_every_parameter_gets_a_gradient(self, name):
        backbone = shuffled(toy(name))
        x, label = torch.randn(3, *backbone.input_shape), torch.tensor([1, 4, 7])
        options = {"branch_times": (torch.rand(3), torch.rand(3))} if name == "deepflow" else {}
        out = backbone(x, torch.rand(3), label=label, **options)
        tensors = [out] if isinstance(out, torch.Tensor) else [*out.velocities, *out.accelerations]
        sum(tensor.square().sum() for tensor in tensors).backward()
        assert [key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_unconditional(self, name):
        backbone = toy(name, num_classes=0)
        assert (backbone.num_classes, backbone.null_label) == (0, None)
        x = torch.randn(2, *backbone.input_shape)
        assert backbone(x, torch.rand(2)).shape == x.shape
        with pytest.raises(InputError, match="got a label, but the backbone is unconditional"):
            backbone(x, torch.rand(2), label=torch.tensor([0, 1]))

    def test_bad_inputs(self, name):
        backbone = toy(name)
        x, t, label = torch.randn(3, *backbone.input_shape), torch.rand(3), torch.tensor([0, 1, 2])
        with pytest.raises(InputError, match=r"got x of shape \(3, 2\), expected \(N, "):
            backbone(torch.zeros(3, 2), t, label=label)
        for shape in ((2,), (3, 1)):
            with pytest.raises(InputError, match=r"got t of shape .*expected \(3,\) or \(\)"):
                backbone(x, torch.zeros(shape), label=label)
        with pytest.raises(InputError, match="got no label"):
            backbone(x, t)
        with pytest.raises(InputError, match=r"got labels of shape \(2,\), expected \(3,\)"):
            backbone(x, t, label=label[:2])
        with pytest.raises(InputTypeError, match="got labels of type torch.float32"):
            backbone(x, t, label=label.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(input_size=(4, 7)), "patch must divide both sides"),
        (dict(num_heads=5), "heads must divide the width"),
        (dict(hidden_size=6, num_heads=3), "multiple of 4"),
        (dict(in_channels=0), "expected positive whole numbers"),
        (dict(depth=2.5), "expected positive whole numbers"),
        (dict(num_classes=-1), "num_classes may be 0"),
        (dict(input_size=(4, 4, 4)), "two of them"),
        (dict(hidden_size=None), "got no size"),
        (dict(size="S"), "beside hidden_size or num_heads"),
        (dict(size="M", hidden_size=None, num_heads=None), "got size 'M', expected one of S, B, L, XL"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    for name in ("sit", "deepflow"):
        with pytest.raises(InputError, match=message):
            toy(name, **options)


def test_mlp_sizes():
    for sizes in (dict(depth=0), dict(depth=1.5), dict(num_classes=-1)):
        with pytest.raises(InputError, match="expected positive whole numbers"):
            backbones.build("mlp", **sizes)


def test_a_fresh_transformer_predicts_zero():
    """adaLN-zero: heads start at zero, so that training starts from the mean velocity."""
    backbone = toy("sit")
    assert not backbone(torch.randn(2, 3, 4, 6), torch.rand(2), label=torch.tensor([0, 1])).any()


def test_initialisation_is_the_papers():
    backbone = backbones.build("sit", hidden_size=256, depth=2, num_heads=4, num_classes=500)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
    qkv = backbone.blocks[0].attention.query_key_value.weight.detach()
    assert float(qkv.abs().max()) <= math.sqrt(6 / (256 + 768)) and float(qkv.std()) == pytest.approx(
        math.sqrt(2 / (256 + 768)), rel=0.02
    )
    kernel = backbone.patches.projection.weight
    assert float(kernel.detach().flatten(1).std()) == pytest.approx(math.sqrt(2 / (16 + 256)), rel=0.05)
    for table in (backbone.labels.weight, backbone.time.hidden.weight, backbone.time.output.weight):
        assert float(table.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not any(block.modulation.linear.weight.any() for block in backbone.blocks)
    assert not backbone.head.linear.weight.any() and not backbone.head.modulation.linear.weight.any()


def test_position_table_by_its_formula():
    width, height, breadth = 8, 3, 5
    table = position_table(width, height, breadth)
    assert table.shape == (1, 15, 8)
    for row in range(height):
        for column in range(breadth):
            frequencies = [1.0, 10000 ** (-1 / 2)]
            expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            assert table[0, row * breadth + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_scalar_features_by_their_formula():
    t = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    angles = [[float(value) * 10000 ** (-i / 128) for i in range(128)] for value in t]
    expected = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]).double()
    assert torch.allclose(scalar_features(t), expected, atol=1e-7)
    assert scalar_features(t.bfloat16()).dtype == torch.float32


def test_unpatchify_puts_values_where_they_belong():
    tokens = torch.arange(2 * 6 * 12, dtype=torch.float32).reshape(2, 6, 12)  # 2 × 3 tokens of 2 × 2 × 3 values
    image = unpatchify(tokens, 2, 2)
    assert image.shape == (2, 3, 4, 6)
    for n, c, h, w in ((0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 3), (1, 0, 1, 4)):
        token, inside = (h // 2) * 3 + w // 2, (h % 2) * 2 + w % 2
        assert image[n, c, h, w] == tokens[n, token, inside * 3 + c]


def test_attention_against_torchs_own_module():
    ours, theirs = Attention(24, 3).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    with torch.no_grad():
        ours.query_key_value.bias.normal_()
        theirs.in_proj_weight.copy_(ours.query_key_value.weight)
        theirs.in_proj_bias.copy_(ours.query_key_value.bias)
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    x = torch.randn(2, 5, 24).double()
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_query_key_norm_normalises_each_head():
    attention = Attention(24, 3, norm=True)
    x = torch.randn(2, 5, 24)
    query, key, value = attention.query_key_value(x).chunk(3, -1)
    query, key = (functional.layer_norm(y.reshape(2, 5, 3, 8), (8,)).reshape(2, 5, 24) for y in (query, key))
    assert torch.allclose(attention(x), attention.output(attend(query, key, value, 3)), atol=1e-6)


@pytest.mark.parametrize("name", ["sit", "deepflow"])
def test_forward_mode_differentiation_through_the_math_kernel(name):
    backbone = shuffled(toy(name).double())
    x, t, label = torch.randn(2, 3, 4, 6).double(), torch.rand(2).double(), torch.tensor([0, 7])
    direction = torch.randn_like(x)
    with math_attention():
        _, tangent = jvp(lambda x: backbone(x, t, label=label), (x,), (direction,))
    h = 1e-6
    difference = backbone(x + h * direction, t, label=label) - backbone(x - h * direction, t, label=label)
    assert torch.allclose(tangent, difference / (2 * h), rtol=1e-5, atol=1e-7)


def test_wrap_takes_any_function():
    backbone = backbones.wrap(lambda x, t, label: x * t[:, None] + label[:, None], num_classes=3, null_label=3)
    out = backbone(torch.ones(2, 5), torch.tensor([1.0, 2.0]), label=torch.tensor([0, 3]))
    assert out.tolist() == [[1.0] * 5, [5.0] * 5] and backbone.null_label == 3


SMALL = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, num_heads=2, depth=2)
BUILT = {
    "mlp": [dict(dim=3), dict(num_classes=4), dict(takes_gap=True)],
    "sit": [
        dict(**SMALL, num_classes=0),
        dict(**SMALL, num_classes=4, query_key_norm=True),
        dict(**SMALL, num_classes=4, takes_gap=True, align_layer=1, align_dims=(5,)),
    ],
    "deepflow": [dict(**SMALL, num_classes=4, acceleration_width=8), dict(**SMALL, num_classes=0, cuts=())],
    "reversed-clock": [dict(backbone=dict(name="sit", **SMALL, num_classes=4))],
    "dit-clock": [dict(backbone=dict(name="sit", **SMALL, num_classes=4))],
}


@pytest.mark.parametrize("name", backbones.names())
def test_every_backbone_of_the_registry_keeps_the_contract(name):
    assert name in BUILT, "add options for the new backbone here"
    for options in BUILT[name]:
        backbone = backbones.build(name, **options)
        for p in backbone.parameters():
            torch.nn.init.normal_(p, std=0.2)  # heads are zero at first
        check_backbone(backbone)
