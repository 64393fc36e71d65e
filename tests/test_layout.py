"""Decisions about layout and imports, held by tests."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

import pathline

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IGNORED = {"tests", "benchmarks", "docs", "examples", "configs", "runs", "build", "dist"}
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in IGNORED and not path.relative_to(ROOT).parts[0].startswith(".")
)


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, **options)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["pathline", *(part for part in parts if part != "__init__")])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_root_holds_only_the_package_and_its_scripts():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "train.py", "sample.py", "evaluate.py"}


def test_listed_packages_are_the_tree():
    tree = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == tree
    folders = {module_name(path / "__init__.py") for path in {source.parent for source in SOURCES}}
    assert folders == tree, "a folder of sources without an __init__.py"


def test_nothing_stale_shadows_the_package():
    assert not list(ROOT.glob("*.egg-info")), "delete the folder: it shadows the installed metadata"
    assert Path(pathline.__file__) == ROOT / "__init__.py"


def test_no_folder_is_named_like_a_library():
    dependencies = {"torch", "numpy", "lightning", "lightning_fabric", "pydantic", "yaml", "safetensors", "tqdm", "PIL"}
    top = {path.name for path in ROOT.iterdir() if path.is_dir()} | {path.stem for path in ROOT.glob("*.py")}
    assert not top & (dependencies | set(sys.stdlib_module_names))


# what a package may import of pathline; core's first five modules may be imported by all
FREE = {"errors", "checks", "registry", "draws"}
ALLOWED = {
    "interpolants": {"interpolants"},
    "backbones": {"backbones"},
    "objectives": {"objectives", "interpolants"},
    "solvers": {"solvers", "interpolants", "core.flow"},
    "core.flow": {"interpolants"},
    "core.weights": {"backbones", "core.families", "core.foreign", "core.layouts"},
    "core.families": {"core.layouts"},
    "core.foreign": set(),
    "core.layouts": {"backbones"},
    "core.config": {"core", "interpolants", "backbones", "objectives", "solvers", "data", "encoders"},
    "data": {"data"},
    "data.prepare": {"data", "encoders"},
    "encoders": {"encoders", "data"},
    "encoders.cache": {"encoders", "data", "core.config"},
    "metrics": {"metrics", "data", "encoders", "interpolants", "solvers", "core.flow"},
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name = module_name(path).removeprefix("pathline").lstrip(".")
    ours = {other.removeprefix("pathline.") for other in imported(path) if other.startswith("pathline.")}
    for other in ours:
        assert not other.startswith("plugins") or name.startswith("plugins"), "nothing imports plugins"
        if not name.startswith(("train", "sample", "evaluate")):
            assert other.split(".")[0] not in {"train", "sample", "evaluate"}, "no module imports the scripts"
    rule = next((ALLOWED[key] for key in sorted(ALLOWED, reverse=True) if f"{name}.".startswith(f"{key}.")), None)
    if name.startswith("core.") and name.split(".")[1] in FREE:
        rule = set()
    if rule is None:
        return
    for other in ours:
        if other.startswith("core.") and other.split(".")[1] in FREE:
            continue
        assert any(f"{other}.".startswith(f"{allowed}.") for allowed in rule), f"{name} imports {other}"


def test_import_is_light():
    """Under two seconds beyond torch, and no optional package with it."""
    program = (
        "import sys, time, torch; began = time.perf_counter(); import pathline;"
        "from pathline import backbones, data, interpolants, objectives, solvers; print(time.perf_counter() - began);"
        "heavy = {'timm', 'diffusers', 'torchvision', 'flow_matching', 'torchdiffeq', 'torchsde', 'lightning_fabric',"
        " 'tensorboard', 'sklearn', 'scipy', 'pathline.plugins'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    seconds, heavy = min((run("-c", program).stdout.split("\n")[:2] for _ in range(2)), key=lambda row: float(row[0]))
    assert float(seconds) < 2.0
    assert heavy == "[]"


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_each_file_is_imported_under_one_name(script):
    """Script, module and console start give the same classes: no source file is loaded twice."""
    program = (
        "import runpy, sys, contextlib\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "import pathline.backbones, pathline.solvers\n"
        "pathline.backbones.names()\n"
        "seen = {}\n"
        "for name, module in list(sys.modules.items()):\n"
        "    file = getattr(module, '__file__', None)\n"
        f"    if file and file.startswith({str(ROOT)!r}) and '.venv' not in file:\n"
        "        seen.setdefault(file, []).append(name)\n"
        "print({file: names for file, names in seen.items() if len(names) > 1})"
    )
    assert run("-c", program, cwd=ROOT).stdout.strip() == "{}"


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_modules_and_console_scripts_start(command):
    console = Path(sys.executable).parent / f"pathline-{command}"
    for start in ([sys.executable, "-m", f"pathline.{command}"], [str(console)]):
        printed = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True).stdout
        assert "usage:" in printed
    assert (
        "usage:"
        in subprocess.run(
            [str(console.parent / "pathline"), "--help"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_public_names_can_be_touched():
    for path in SOURCES:
        name = module_name(path)
        module = __import__(name, fromlist=["_"])
        public = getattr(module, "__all__", None)
        if path.parent == ROOT and path.name != "__init__.py":
            continue
        if public is None:
            assert path.name == "__init__.py", f"{name} has no __all__"
            continue
        for attribute in public:
            assert getattr(module, attribute) is not None
        assert len(set(public)) == len(public)


def test_versions_agree():
    top = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ["))
    assert top.split("]")[0] == f"## [{pathline.__version__}"
    assert metadata("pathline")["Version"] == pathline.__version__
    assert f"version: {pathline.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_no_generator_of_torch_or_numpy_is_seeded_by_the_library():
    for path in SOURCES:
        text = path.read_text()
        for word in ("torch.manual_seed(", "np.random.seed(", "random.seed(", "import pickle", "weights_only=False"):
            assert word not in text, f"{path}: {word}"


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_alone(tmp_path):
    """The sdist builds the wheel; neither holds tests; the wheel works outside of the checkout."""
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)  # building leaves folders behind
    run("-m", "build", "--outdir", str(tmp_path / "dist"), str(tmp_path / "source"))
    wheel, sdist = (next((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"pathline", f"pathline-{pathline.__version__}.dist-info"}
    assert not [name for name in names if "/tests/" in name or "/benchmarks/" in name or "/docs/" in name]
    wanted = {"pathline/" + str(path.relative_to(ROOT)) for path in SOURCES}
    wanted |= {"pathline/py.typed", "pathline/data/digits/digits.npz", "pathline/data/digits/LICENSE.md"}
    assert wanted <= set(names)
    assert any(name.endswith("/LICENSE") for name in tarfile.open(sdist).getnames())
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, 'site');"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)];"
        "import pathline; from pathline import data, backbones; print(pathline.__file__);"
        "print(len(data.build('digits', split='train')), backbones.names())"
    )
    out = run("-c", program, cwd=tmp_path).stdout
    assert "site" in out and "898" in out and "deepflow" in out
