"""DeepFlow's forward pass written out a second time, in plain torch and in its authors' keys, beside ours.

It reproduces the stored cases of the authors' program first, and then stands in for it where there is none: four
branches, uneven cuts, other channels and patches, three branches with alignment, two encoders with the clamp.
"""

from __future__ import annotations

import math

import pytest
import torch

from pathline import WeightsError, backbones, weights


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def normed(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def sigmoid_gated(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def attention(query, key, value, heads):
    """Softmax of QKᵀ/√d times V, the whole map formed."""

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = split(query), split(key), split(value)
    scores = torch.einsum("nhtd,nhmd->nhtm", query, key) / math.sqrt(query.shape[-1])
    scores = (scores - scores.max(-1, keepdim=True).values).exp()
    return torch.einsum("nhtm,nhmd->nhtd", scores / scores.sum(-1, keepdim=True), value).transpose(1, 2).flatten(2)


def embedded(state, name, scalar):
    angles = scalar[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    features = torch.cat((angles.cos(), angles.sin()), dim=1)
    return linear(state, f"{name}.mlp.2", sigmoid_gated(linear(state, f"{name}.mlp.0", features)))


def modulation(state, name, condition, parts):
    return [
        part[:, None] for part in linear(state, f"{name}.adaLN_modulation.1", sigmoid_gated(condition)).chunk(parts, 1)
    ]


def block(state, name, tokens, condition, heads):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(state, name, condition, 6)
    query_key_value = linear(state, f"{name}.attn.qkv", normed(tokens) * (1 + scale_a) + shift_a).chunk(3, -1)
    tokens = tokens + gate_a * linear(state, f"{name}.attn.proj", attention(*query_key_value, heads))
    hidden = gelu(linear(state, f"{name}.mlp.fc1", normed(tokens) * (1 + scale_m) + shift_m))
    return tokens + gate_m * linear(state, f"{name}.mlp.fc2", hidden)


def head(state, name, tokens, condition, grid, patch):
    shift, scale = modulation(state, name, condition, 2)
    out = linear(state, f"{name}.linear", normed(tokens) * (1 + scale) + shift)
    out = out.unflatten(1, grid).unflatten(-1, (patch, patch, -1))  # n, row, column, p, q, c
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def stacked(state, name, x, layers):
    """Linear layers with SiLU between."""
    for i in range(layers):
        x = linear(state, f"{name}.{2 * i}", sigmoid_gated(x) if i else x)
    return x


def refined(state, i, tokens, space, gap, heads, clamp):
    """VeRA: acceleration features, and what the next branch begins with."""
    name = f"df_blocks.{i}"
    acceleration = stacked(state, f"{name}.acc_mlp", tokens, 4)
    shift, scale = modulation(state, f"{name}.acc_norm", gap, 2)
    if clamp:
        scale = scale.clamp(-5, 5)
    merged = normed(torch.cat((tokens, acceleration), -1)) * (1 + scale) + shift
    merged = linear(state, f"{name}.acc_norm.mlp.fc2", gelu(linear(state, f"{name}.acc_norm.mlp.fc1", merged)))
    gain, offset = (state[f"{name}.cross_attention.layer_norm.{kind}"] for kind in ("weight", "bias"))
    query, other = (normed(x, 1e-5) * gain + offset for x in (space, merged))
    inner = f"{name}.cross_attention.multihead_attn"
    matrices, biases = state[f"{inner}.in_proj_weight"].chunk(3), state[f"{inner}.in_proj_bias"].chunk(3)
    projected = [x @ m.T + b for x, m, b in zip((query, other, other), matrices, biases, strict=True)]
    return acceleration, query + linear(state, f"{inner}.out_proj", attention(*projected, heads))


def reference(state, x, times, label, *, heads, cuts, clamp, encoders=0):
    """Velocities, accelerations and features of all branches, in float64."""
    state = {key: value.double() for key, value in state.items()}
    x, times = x.double(), [t.double() for t in times]
    kernel = state["x_embedder.proj.weight"]
    patch, rows = kernel.shape[-1], x.shape[2] // kernel.shape[-1]
    grid = (rows, x.shape[3] // patch)
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    space = patches @ kernel.flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    classes = state["y_embedder.embedding_table.weight"][label]
    tokens, condition = space, embedded(state, "t_embedder", times[0]) + classes
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    velocities, accelerations, features = [], [], []
    for number in range(depth):
        tokens = block(state, f"blocks.{number}", tokens, condition, heads)
        if number + 1 in cuts:
            i = cuts.index(number + 1)
            velocities.append(head(state, "final_layer.0", tokens, condition, grid, patch))
            gap = embedded(state, "dt_embedder", times[i + 1] - times[i])
            acceleration, tokens = refined(state, i, tokens, space, gap, heads, clamp)
            accelerations.append(head(state, "final_acc_layer", acceleration, condition, grid, patch))
            condition = embedded(state, "t_embedder", times[i + 1]) + classes
            row = range(i * encoders, (i + 1) * encoders)
            features.append([stacked(state, f"projectors.{j}", tokens, 3) for j in row])
    velocities.append(head(state, "final_layer.1", tokens, condition, grid, patch))
    return velocities, accelerations, features


def positions(width, side):
    """Columns in the first half, rows in the second; sines, then cosines."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    table = torch.cat((angles.sin(), angles.cos()), 1)
    column, row = table[None, :].expand(side, -1, -1), table[:, None].expand(-1, side, -1)
    return torch.cat((column, row), -1).reshape(1, side * side, width).float()


def drawn(width, depth, channels, patch, side, classes, cuts, hidden, dims=(), gap_scale=1.0):
    """Weights in the authors' keys, with no value left at zero: the shapes are their program's."""
    outputs = patch * patch * channels
    shapes = {"y_embedder.embedding_table": (classes + 1, width)}

    def add(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    for name, size in (("t_embedder", width), ("dt_embedder", 2 * width)):
        add(f"{name}.mlp.0", size, 256)
        add(f"{name}.mlp.2", size, size)
    for i in range(depth):
        add(f"blocks.{i}.attn.qkv", 3 * width, width)
        add(f"blocks.{i}.attn.proj", width, width)
        add(f"blocks.{i}.mlp.fc1", 4 * width, width)
        add(f"blocks.{i}.mlp.fc2", width, 4 * width)
        add(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    for name in ("final_layer.0", "final_layer.1", "final_acc_layer"):
        add(f"{name}.linear", outputs, width)
        add(f"{name}.adaLN_modulation.1", 2 * width, width)
    for i in range(len(cuts)):
        sizes = (width, hidden, 2 * hidden, hidden, width)
        for layer in range(4):
            add(f"df_blocks.{i}.acc_mlp.{2 * layer}", sizes[layer + 1], sizes[layer])
        add(f"df_blocks.{i}.acc_norm.mlp.fc1", 2 * width, 2 * width)
        add(f"df_blocks.{i}.acc_norm.mlp.fc2", width, 2 * width)
        add(f"df_blocks.{i}.acc_norm.adaLN_modulation.1", 4 * width, 2 * width)
        inner = f"df_blocks.{i}.cross_attention"
        shapes[f"{inner}.multihead_attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{inner}.multihead_attn.in_proj_bias"] = (3 * width,)
        add(f"{inner}.multihead_attn.out_proj", width, width)
        shapes[f"{inner}.layer_norm.weight"] = shapes[f"{inner}.layer_norm.bias"] = (width,)
    for i, dim in enumerate(dims * len(cuts)):
        for layer, (rows, columns) in enumerate(((hidden, width), (hidden, hidden), (dim, hidden))):
            add(f"projectors.{i}.{2 * layer}", rows, columns)
    shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (width, channels, patch, patch), (width,)
    shapes["y_embedder.embedding_table.weight"] = shapes.pop("y_embedder.embedding_table")
    generator = torch.Generator().manual_seed(width + depth)
    state = {"pos_embed": positions(width, side)}
    for key, shape in shapes.items():
        scale = 1.2 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        state[key] = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        if key.endswith("layer_norm.weight"):
            state[key] += 1
        if "acc_norm.adaLN" in key:
            state[key] *= gap_scale
        state[key] = state[key].float()
    return state


def spoken(made, x, times, label):
    out = made(x, times[0], label=label, branch_times=times[1:])
    return out.velocities, out.accelerations, out.features


def assert_close(ours, theirs, tolerance):
    """Velocities, accelerations and features, each of its shape and within ``tolerance``; nothing is small."""
    ours_all = [*ours[0], *ours[1], *(item for cut in ours[2] for item in cut)]
    theirs_all = [*theirs[0], *theirs[1], *(item for cut in theirs[2] for item in cut)]
    assert len(ours_all) == len(theirs_all) >= 3
    for a, b in zip(ours_all, theirs_all, strict=True):
        assert a.shape == b.shape and float(b.std()) > 0.1
        assert float((a.detach().double() - b.double()).abs().max()) <= tolerance


@pytest.mark.parametrize("name", ["deepflow_3t", "deepflow_2t_ssl"])
def test_the_second_writing_is_the_authors_program(name, parity):
    state, given, wanted, about = parity(name)
    config, times = about["config"], [given[key] for key in sorted(given) if key.startswith("t_")]
    options = dict(heads=config["num_heads"], cuts=config["df_idxs"], clamp=config["legacy_scaling"])
    velocities, accelerations, features = reference(
        state, given["x"], times, given["y"], **options, encoders=int(config["ssl_align"])
    )
    stored = (
        ("velocity", velocities),
        ("acceleration", accelerations),
        ("feature", [item for cut in features for item in cut]),
    )
    for kind, tensors in stored:
        for i, tensor in enumerate(tensors):
            assert float((tensor - wanted[f"{kind}_{i}"].double()).abs().max()) <= 2e-5
    assert sum(len(tensors) for _, tensors in stored) == sum(key.startswith(("vel", "acc", "feat")) for key in wanted)


CASES = {
    "four branches": dict(width=24, depth=8, channels=4, patch=2, side=3, classes=5, cuts=(2, 4, 6), hidden=14),
    "uneven cuts": dict(width=20, depth=7, channels=4, patch=2, side=3, classes=5, cuts=(1, 2, 5), hidden=14),
    "other channels and patches": dict(width=16, depth=2, channels=3, patch=4, side=2, classes=7, cuts=(1,), hidden=10),
    "one channel, one pixel a patch": dict(
        width=28, depth=4, channels=1, patch=1, side=5, classes=3, cuts=(2,), hidden=9
    ),
    "three branches with alignment": dict(
        width=24, depth=6, channels=4, patch=2, side=3, classes=5, cuts=(2, 4), hidden=14, dims=(11,)
    ),
    "two encoders and the clamp": dict(
        width=24, depth=6, channels=5, patch=2, side=3, classes=5, cuts=(2, 4), hidden=14, dims=(11, 6), gap_scale=9.0
    ),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    """Weights, inputs, and the options that the weights do not tell."""
    sizes = CASES[request.param]
    state, clamp = drawn(**sizes), "clamp" in request.param
    count, pixels = 3, sizes["patch"] * sizes["side"]
    x = torch.randn(count, sizes["channels"], pixels, pixels)
    times = [torch.rand(count) for _ in range(len(sizes["cuts"]) + 1)]
    label = torch.tensor([0, sizes["classes"], 2])
    given = dict(num_heads=4, clamp_gap=clamp) | (dict(cuts=sizes["cuts"]) if "uneven" in request.param else {})
    reading = dict(heads=4, cuts=sizes["cuts"], clamp=clamp, encoders=len(sizes.get("dims", ())))
    return state, (x, times, label), given, reading


def test_ours_is_the_second_writing(case):
    """In float32 within 2e-5, in float64 within 1e-10; the branches' times and the clamp matter."""
    state, (x, times, label), given, reading = case
    wanted = reference(state, x, times, label, **reading)
    made = backbones.build(weights.describe(state, **given))
    made.load_state_dict(weights.convert(state))
    assert_close(spoken(made, x, times, label), wanted, 2e-5)
    in_full = spoken(made.double(), x.double(), [t.double() for t in times], label)
    assert_close(in_full, wanted, 1e-10)
    other = reference(state, x, [times[0], *(t + 0.1 for t in times[1:])], label, **reading)
    assert float((other[0][-1] - wanted[0][-1]).abs().max()) > 1e-3
    if reading["clamp"]:
        without = reference(state, x, times, label, **{**reading, "clamp": False})
        assert float((without[0][-1] - wanted[0][-1]).abs().max()) > 1e-2


def test_the_network_of_weights_has_them_and_gives_them_back(case):
    """To the byte, but for the position table, which is the formula's."""
    state, (x, times, label), given, reading = case
    made = weights.network(state, **given)
    assert not made.training
    assert_close(spoken(made, x, times, label), reference(state, x, times, label, **reading), 2e-5)
    returned = weights.convert(made.state_dict(), to="deepflow")
    assert set(returned) == set(state)
    for key, value in state.items():
        if key == "pos_embed":
            assert float((returned[key] - value).abs().max()) < 1e-6
        else:
            assert torch.equal(returned[key], value) and returned[key].dtype == value.dtype


def test_what_weights_tell_and_what_they_do_not():
    state = drawn(**CASES["two encoders and the clamp"])
    told = weights.describe(state, num_heads=4, clamp_gap=True)
    assert told == {
        "name": "deepflow",
        "hidden_size": 24,
        "depth": 6,
        "patch_size": 2,
        "in_channels": 5,
        "num_classes": 5,
        "mlp_ratio": 4.0,
        "input_size": 6,
        "cuts": [2, 4],
        "acceleration_width": 14,
        "align_dims": [11, 6],
        "align_width": 14,
        "num_heads": 4,
        "clamp_gap": True,
    }
    with pytest.raises(WeightsError, match=r"backbone.num_heads \(no released .*24 wide\), backbone.clamp_gap \(true"):
        weights.describe(state)
    uneven = drawn(**CASES["uneven cuts"])
    with pytest.raises(WeightsError, match=r"give backbone.cuts \(4 branches do not divide 7 blocks evenly\)"):
        weights.describe(uneven, num_heads=4, clamp_gap=False)
    wide = drawn(**{**CASES["other channels and patches"], "width": 384})
    assert weights.describe(wide, clamp_gap=False)["num_heads"] == 6


def test_projectors_that_do_not_pair_up():
    state = drawn(**CASES["two encoders and the clamp"])
    odd = {key: value for key, value in state.items() if not key.startswith("projectors.3.")}
    with pytest.raises(WeightsError, match="got 3 projectors at 2 VeRA blocks, expected as many at each"):
        weights.convert(odd)
