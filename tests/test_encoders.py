"""Encoders: the table on the meta device, preprocessing against its formulas, weights from files, grids."""

from __future__ import annotations

import hashlib
import importlib

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from pathline import InputError, encoders
from pathline.core.errors import InputTypeError, MissingPackageError, UnknownNameError, WeightsError
from pathline.encoders import PRESETS, networks, on_grid
from pathline.encoders.base import unit_images

pytestmark = pytest.mark.usefixtures("torchvision_operators")
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def timm():
    return importlib.import_module("timm")


@pytest.fixture
def weights(timm, tmp_path):
    """Write random weights of a model of timm to a file; return its path and the model."""

    def write(model, name="weights.safetensors", **options):
        torch.manual_seed(1)
        network = timm.create_model(model, num_classes=0, **options).eval()
        with torch.no_grad():
            for parameter in network.parameters():  # else norms are plain, and a table of positions is small
                parameter.add_(0.3 * torch.randn_like(parameter))
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(network.state_dict(), path)
        else:
            torch.save({"model": network.state_dict(), "epoch": 7}, path)
        return path, network

    return write


def tiny(path, **options):
    return encoders.build("timm", **{"model": "test_vit", "resolution": 64, "weights": str(path), **options})


def normalised(x, colours):
    mean, std = (torch.tensor(c)[:, None, None] for c in colours)
    return (x - mean) / std


# --- the table

WIDTHS = {  # and prefix tokens: published sizes of each network
    "dinov2-s": (384, 1),
    "dinov2-b": (768, 1),
    "dinov2-l": (1024, 1),
    "dinov2-g": (1536, 1),
    "dinov2-reg-s": (384, 5),
    "dinov2-reg-b": (768, 5),
    "dinov2-reg-l": (1024, 5),
    "dinov2-reg-g": (1536, 5),
    "dino-b": (768, 1),
    "clip-b": (768, 1),
    "clip-l": (1024, 1),
    "mae-b": (768, 1),
    "mae-l": (1024, 1),
    "mae-h": (1280, 1),
    "i-jepa-h": (1280, 0),
    "dinov3-s": (384, 5),
    "dinov3-s-plus": (384, 5),
    "dinov3-b": (768, 5),
    "dinov3-l": (1024, 5),
    "dinov3-h-plus": (1280, 5),
    "dinov3-7b": (4096, 5),
    "siglip2-b": (768, 0),
    "siglip2-l": (1024, 0),
    "siglip2-so400m": (1152, 0),
    "siglip2-g": (1536, 0),
    "mocov3-s": (384, 1),
    "mocov3-b": (768, 1),
    "mocov3-l": (1024, 1),
}


def on_meta(monkeypatch, name, **options):
    """Build an encoder of the table without allocating it, as if its weights had been loaded."""

    def created(preset, size):
        with torch.device("meta"):
            return networks.create(preset.model, size, preset.changes)

    module = importlib.import_module("pathline.encoders.vit")
    monkeypatch.setattr(module, "_loaded", lambda _, preset, size, weights: (created(preset, size), {}))
    return encoders.build(name, **options).to("meta")


def test_the_table_is_complete():
    assert set(encoders.names()) == {*WIDTHS, "timm"} and PRESETS.keys() == WIDTHS.keys()


LONG = [name for name in WIDTHS if name.endswith(("-l", "-g", "-h", "plus", "7b", "400m")) and name != "clip-l"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in WIDTHS])
def test_grid_width_and_prefix_of_every_encoder(name, monkeypatch):
    """Images of R = 96 × 160 give 6 × 10 tokens, whatever the patch; norm and colours are those of the table."""
    encoder = on_meta(monkeypatch, name, resolution=(96, 160))
    width, prefix = WIDTHS[name]
    assert (encoder.dim, encoder.grid, encoder.network.num_prefix_tokens) == (width, (6, 10), prefix)
    patch = 14 if any(word in name for word in ("dinov2", "clip-l", "mae-h", "i-jepa")) else 16
    assert encoder.size == (6 * patch, 10 * patch)
    tokens = encoder(torch.empty(2, 3, 96, 160, device="meta"))
    assert tuple(tokens.shape) == (2, 60, width)
    unnormed = isinstance(encoder.network.norm, torch.nn.Identity)
    assert unnormed == name.startswith(("mae", "clip"))  # as REPA takes them
    colours = CLIP if "clip" in name and "siglip" not in name else HALF if "siglip" in name else IMAGENET
    assert PRESETS[name].colours == colours
    told = encoder.network.pretrained_cfg
    assert name.startswith("mocov3") or (told["mean"], told["std"]) == colours


@pytest.mark.parametrize(("resolution", "size", "grid"), [(256, 224, 16), (512, 448, 32), (384, 336, 24)])
def test_sizes_of_patch_14(resolution, size, grid, monkeypatch):
    """REPA's 224·(R // 256) where that is right, and 14·R/16 at every other size."""
    encoder = on_meta(monkeypatch, "dinov2-s", resolution=resolution)
    assert (encoder.size, encoder.grid) == ((size, size), (grid, grid))


def test_mocos_small_model_has_twelve_heads(monkeypatch):
    heads = {name: on_meta(monkeypatch, f"mocov3-{name}").network.blocks[0].attn.num_heads for name in "sb"}
    assert heads == {"s": 12, "b": 12}  # facebookresearch/moco-v3, vits.py


def test_clip_is_the_network_that_its_weights_were_trained_with(monkeypatch):
    """QuickGELU: x·sigmoid(1.702·x)."""
    act, x = on_meta(monkeypatch, "clip-b").network.blocks[3].mlp.act, torch.linspace(-3, 3, 7)
    assert torch.allclose(act(x), x * torch.sigmoid(1.702 * x), atol=1e-6)


# --- what an encoder is shown


def test_images_of_both_types_are_the_same_images():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = levels.float() / 127.5 - 1
    assert torch.equal(unit_images(levels), (torch.arange(256) / 255).reshape(1, 1, 16, 16).expand(1, 3, -1, -1))
    assert torch.allclose(unit_images(floats), unit_images(levels), atol=1e-6)
    assert unit_images(floats.double()).dtype == torch.float32


@pytest.mark.parametrize(("name", "first"), [("dinov2-s", True), ("clip-l", False)])
def test_order_and_size_of_preprocessing(name, first, monkeypatch):
    """Normalised, then resized by 14/16, as REPA; CLIP there the other way round. Bicubic without antialiasing."""
    encoder = on_meta(monkeypatch, name, resolution=(64, 96))
    colours = CLIP if name == "clip-l" else IMAGENET
    for key, value in zip(("mean", "std"), colours, strict=True):
        setattr(encoder, key, torch.tensor(value)[:, None, None])
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    x = images / 255
    x = normalised(x, colours) if first else x
    x = functional.interpolate(x, (56, 84), mode="bicubic", align_corners=False, antialias=False)
    x = x if first else normalised(x, colours)
    assert torch.allclose(encoder.prepare(images), x, atol=1e-5)
    assert torch.allclose(encoder.prepare(images / 127.5 - 1), x, atol=1e-5)


def test_patch_16_is_shown_the_image_itself(monkeypatch):
    encoder = on_meta(monkeypatch, "siglip2-b", resolution=(64, 96))
    encoder.mean, encoder.std = (torch.full((3, 1, 1), 0.5) for _ in range(2))
    images = torch.rand(2, 1, 64, 96) * 2 - 1
    assert torch.allclose(encoder.prepare(images), images.expand(-1, 3, -1, -1), atol=1e-6)


# --- weights


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pth.tar"])
def test_tokens_are_those_of_timms_network(name, weights):
    """The same network at its own size of 160 pixels: no resampling, so that timm's features are the truth."""
    path, network = weights("test_vit", name)
    encoder = tiny(path, resolution=160)
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        truth = network.forward_features((images - 0.5) / 0.5)[:, 1:]
    tokens = encoder(2 * images - 1)
    assert torch.allclose(tokens, truth, atol=1e-4) and tokens.shape == (2, 100, 64)
    assert not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.manifest == {
        "name": "timm",
        "model": "test_vit",
        "resolution": [160, 160],
        "resize": False,
        "final_norm": True,
        "dim": 64,
        "grid": [10, 10],
        "weights": "file",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_the_final_norm_can_be_left_out(weights):
    path, network = weights("test_vit")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    plain, normed = tiny(path, final_norm=False)(images), tiny(path)(images)
    assert torch.allclose(network.norm(plain), normed, atol=1e-4)
    assert not torch.allclose(plain, normed, atol=0.1)


def test_the_position_table_is_resampled_when_weights_are_loaded(weights):
    """Bicubic and antialiased, from 10 × 10 to 4 × 6; the class token's entry stays."""
    path, network = weights("test_vit")
    table = network.pos_embed.detach()
    patches = table[:, 1:].transpose(1, 2).reshape(1, 64, 10, 10)
    resampled = functional.interpolate(patches, (4, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    ours = tiny(path, resolution=(64, 96)).network.pos_embed
    assert torch.allclose(ours, torch.cat((table[:, :1], resampled), 1), atol=1e-5)


def test_it_stays_as_it_is(weights):
    """Evaluation mode whatever is asked for, no entry in another's state, torch's generator untouched."""
    path, _ = weights("test_vit")
    before = torch.random.get_rng_state()
    encoder = tiny(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    images = torch.rand(2, 3, 64, 64)
    tokens = encoder(images)
    encoder.train()
    assert not any(module.training for module in encoder.modules()) and torch.equal(encoder(images), tokens)
    assert encoder.mean.dtype == torch.float32 and "mean" not in encoder.state_dict()


def test_images_of_another_size_are_resized_only_when_asked(weights):
    path, _ = weights("test_vit")
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    with pytest.raises(InputError, match="got images of 8 × 8 for timm at 64 × 64; set its resolution"):
        tiny(path)(images)
    grown = functional.interpolate((images + 1) / 2, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(tiny(path, resize=True)(images), tiny(path)(2 * grown - 1), atol=1e-4)


def moco_checkpoint(state):
    """A checkpoint as the authors write it, with what stands beside the encoder in it."""
    wrong = {
        "blocks.13.norm1.": "blocks.13.norm13.",
        "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13.",
        "blocks.14.norm2.": "blocks.14.norm14.",
        "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14.",
    }
    named = {}
    for key, value in state.items():
        for right, misnomer in wrong.items():
            key = key.replace(right, misnomer)
        named[f"module.base_encoder.{key}"] = value
        named[f"module.momentum_encoder.{key}"] = torch.zeros_like(value)
    named["module.base_encoder.head.0.weight"] = torch.zeros(5, 3)
    named["module.predictor.0.weight"] = torch.zeros(3, 5)
    return {"epoch": 300, "arch": "vit", "state_dict": named, "optimizer": {"lr": 1.0}}


@pytest.fixture
def small_moco(monkeypatch):
    """MoCo's row with a network of 15 narrow blocks: its names reach block 14."""
    preset = PRESETS["mocov3-l"]._replace(changes={"embed_dim": 24, "depth": 15, "num_heads": 3})
    return lambda path, **options: encoders.PatchEncoder(
        "mocov3-l", preset, **{"resolution": 64, "weights": path, "final_norm": True, "resize": False, **options}
    )


def test_mocov3_checkpoints_are_read_under_their_own_names(timm, tmp_path, small_moco):
    torch.manual_seed(2)
    network = timm.create_model("vit_large_patch16_224", num_classes=0, embed_dim=24, depth=15, num_heads=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    checkpoint = moco_checkpoint(network.state_dict())
    assert any("blocks.13.mlp.fc13." in key for key in checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "vit-l.pth.tar")
    encoder = small_moco(str(tmp_path / "vit-l.pth.tar"))
    ours = encoder.network.state_dict()
    assert ours.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.equal(ours[key], value) or key == "pos_embed", key
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 16, 24)
    converted = networks.mocov3_state({"base_encoder.blocks.14.norm14.bias": 1, "predictor.0.weight": 2})
    assert converted == {"blocks.14.norm2.bias": 1}
    assert networks.mocov3_state({"blocks.3.norm1.bias": 1}) == {"blocks.3.norm1.bias": 1}  # in timm's names already


def test_mocov3_has_no_weights_on_the_hub():
    with pytest.raises(WeightsError, match="got no weights for mocov3-b, which timm's hub does not have; give weights"):
        encoders.build("mocov3-b")


class _Executed:
    """What a hostile file would run when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a file of weights was executed",))


def test_files_that_do_not_fit(timm, weights, tmp_path, small_moco):
    path, network = weights("test_vit")
    state = network.state_dict()

    def refused(content, message):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=message):
            tiny(tmp_path / "other.pth")

    refused({**state, "blocks.6.norm1.weight": torch.ones(64)}, r"1 left over, as blocks.6.norm1.weight")
    refused({k: v for k, v in state.items() if "blocks.5.mlp" not in k}, r"4 missing, as blocks.5.mlp.fc1.weight")
    refused({**state, "norm.weight": torch.ones(65)}, r"1 of another shape, as norm.weight")
    refused({"state_dict": {"x": 3}}, "missing|layout that timm does not know")
    refused({**state, "other": _Executed()}, "cannot be read as weights alone")
    assert tiny(_saved({**state, "head.weight": torch.zeros(2, 64), "fc_norm.bias": torch.ones(1)}, tmp_path)).dim == 64
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-9])
    for name in ("short.safetensors", "none.safetensors"):
        with pytest.raises(WeightsError, match="cannot be read as weights alone|got no file"):
            tiny(tmp_path / name)
    torch.save({"state_dict": {"module.base_encoder.norm.weight": torch.ones(24)}}, tmp_path / "moco.pth")
    with pytest.raises(WeightsError, match="missing, as cls_token"):
        small_moco(str(tmp_path / "moco.pth"))


def _saved(state, folder):
    torch.save(state, folder / "saved.pth")
    return folder / "saved.pth"


def test_weights_of_the_hub_that_cannot_be_had(monkeypatch, timm):
    def offline(*_, **options):
        if options["pretrained"]:
            raise OSError("no route to the hub\nand a long story")
        return made("test_vit", **options)

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    message = r"got no weights of vit_base_patch14_dinov2.lvd142m from timm's hub \(no route to the hub\); give weights"
    with pytest.raises(WeightsError, match=message):
        encoders.build("dinov2-b")


def test_weights_of_the_hub_are_hashed_as_they_are_loaded(monkeypatch, timm):
    """The hub's answer is a network; here it is one that was made beforehand."""
    torch.manual_seed(4)
    ready = timm.create_model("test_vit", num_classes=0, img_size=(64, 64))
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **o: ready if o["pretrained"] else made(*a, **o))
    first = encoders.build("timm", model="test_vit", resolution=64).manifest
    with torch.no_grad():
        ready.norm.bias[3] += 1e-3
    second = encoders.build("timm", model="test_vit", resolution=64).manifest
    assert first["weights"] == second["weights"] == "hub" and first["sha256"] != second["sha256"]
    assert {**first, "sha256": ""} == {**second, "sha256": ""}


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(resolution=100), InputError, "got resolution 100, expected multiples of 16"),
        (dict(resolution=(64, 8)), InputError, r"got resolution \(64, 8\), expected multiples of 16"),
        (dict(resolution=64.0), InputTypeError, "got resolution 64.0, expected a whole number or two, as 256"),
        (dict(resolution=(64, 96.0)), InputTypeError, r"got resolution \(64, 96.0\), expected a whole number or two"),
        (dict(resolution=(64, 96, 128)), InputTypeError, r"got resolution \(64, 96, 128\), expected a whole number"),
        (dict(resolution="64"), InputTypeError, "got resolution '64', expected a whole number or two"),
        (dict(model="test_vt"), UnknownNameError, "has no model 'test_vt'; did you mean test_vit"),
        (dict(model="test_resnet"), InputError, "got timm model 'test_resnet'"),
        (dict(model="test_efficientnet"), InputError, "got timm model 'test_efficientnet', which is no ViT: it cannot"),
        (dict(model="test_vit2"), InputError, "got final_norm for test_vit2, which has no norm of its tokens"),
        (dict(weights="nowhere.pth"), WeightsError, "got no file nowhere.pth"),
    ],
)
def test_options_that_do_not_fit(options, error, message, weights):
    path, _ = weights(options.get("model", "test_vit") if options.get("model") == "test_vit2" else "test_vit")
    with pytest.raises(error, match=message):
        tiny(**{"path": path, **options})


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.long), InputTypeError, "got images of type torch.int64, expected uint8"),
        (torch.zeros(2, 4, 64, 64), InputError, r"got images of shape \(2, 4, 64, 64\), expected \(N, 1, H, W\) or"),
        (torch.zeros(3, 64, 64), InputError, r"got images of shape \(3, 64, 64\)"),
        (torch.zeros(2, 3, 64, 80), InputError, "got images of 64 × 80 for timm at 64 × 64"),
        ([1], InputTypeError, "got images of type list"),
    ],
)
def test_images_that_do_not_fit(images, error, message, weights):
    with pytest.raises(error, match=message):
        tiny(weights("test_vit")[0])(images)


def test_tokens_that_are_no_grid(weights):
    encoder = tiny(weights("test_vit")[0])
    encoder.network.forward_features = lambda x: torch.zeros(2, 16, 64)
    with pytest.raises(
        InputError, match=r"got tokens \(2, 16, 64\) from test_vit, expected 1 and 16 of a grid of 4 × 4"
    ):
        encoder(torch.rand(2, 3, 64, 64))


def test_a_torchvision_of_another_build_is_named(monkeypatch):
    def broken(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(networks, "require", broken)
    with pytest.raises(MissingPackageError) as error:
        encoders.build("dinov2-b")
    said = str(error.value)
    assert f"built for another torch than {torch.__version__}" in said and "got torchvision" in said
    assert "install the torchvision built for this torch" in said and "or the torch that this torchvision" in said


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pathline\[encoders\]'"):
        encoders.build("dinov2-b")


# --- grids


def test_equal_grids_leave_tokens_as_they_are():
    tokens = torch.randn(2, 15, 7)
    assert on_grid(tokens, (3, 5), (3, 5)) is tokens


@pytest.mark.parametrize("wanted", [(2, 4), (6, 12), (9, 18)])
def test_tokens_are_resampled_as_an_image(wanted):
    """Channel by channel, rows first, against torch's own resampling; a ramp stays a ramp away from the edges."""
    tokens = torch.randn(3, 3 * 6, 5)
    ours = on_grid(tokens, (3, 6), wanted)
    for sample in range(3):
        for channel in range(5):
            image = torch.stack([tokens[sample, 6 * row : 6 * row + 6, channel] for row in range(3)])
            found = functional.interpolate(image[None, None], wanted, mode="bicubic", antialias=True)[0, 0]
            assert torch.allclose(ours[sample, :, channel], found.reshape(-1), atol=1e-5)
    assert torch.allclose(on_grid(torch.full((2, 18, 3), 0.7), (3, 6), wanted), torch.tensor(0.7))
    assert on_grid(tokens.half(), (3, 6), wanted).dtype == torch.float32


def test_grids_of_another_aspect():
    with pytest.raises(InputError, match="got a token grid of 3 × 5 for one of 3 × 4, which differs in aspect"):
        on_grid(torch.randn(2, 15, 7), (3, 5), (3, 4))
    with pytest.raises(InputError, match=r"got tokens \(2, 14, 7\), expected \(N, 15, D\)"):
        on_grid(torch.randn(2, 14, 7), (3, 5), (6, 10))
