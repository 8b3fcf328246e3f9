"""The package: what is listed is what is there, and the wheel holds it all."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from ssm_kernels._core.dispatch import NUMBA_MISSING
from vlmamba.model.extras import PACKAGES as PACKAGES_OF_EXTRAS
from vlmamba.model.extras import install_command

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGES = ("ssm_kernels", "connectors", "model", "serve", "train", "vlmamba", "benchmarks")


def folder_of(package: str) -> Path:
    top = ".".join(package.split(".")[:2])
    if top in SETUPTOOLS["package-dir"]:
        package = package.replace(top, SETUPTOOLS["package-dir"][top], 1)
    return ROOT / package.replace(".", "/")


def test_messages_name_packages_that_can_be_installed():
    """This package is not on PyPI, so that `pip install 'vl-mamba[cpu]'` would find nothing, or someone else's."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {extra: extras[extra] for extra in PACKAGES_OF_EXTRAS} == {k: [*v] for k, v in PACKAGES_OF_EXTRAS.items()}
    assert install_command("quantize") == "pip install 'torchao>=0.18'"
    (numba,) = extras["cpu"]
    assert f"pip install '{numba}'" in NUMBA_MISSING
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            assert not re.search(r"pip install '?vl-mamba", file.read_text()), file


def test_every_package_is_listed():
    on_disk = {init.parent for package in PACKAGES for init in (ROOT / package).rglob("__init__.py")}
    assert {folder_of(p) for p in SETUPTOOLS["packages"]} == on_disk


HARNESSES = {f"vlmamba.model.harness.{harness}": harness for harness in ("lm_eval", "lmms_eval")}


def modules() -> list[str]:
    """Every module by its import name; adapters to harnesses that are not installed left out."""
    names = []
    for package in SETUPTOOLS["packages"]:
        for file in folder_of(package).glob("*.py"):
            names.append(package if file.stem == "__init__" else f"{package}.{file.stem}")
    return sorted(name for name in names if find_spec(HARNESSES.get(name, "vlmamba")))


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    if kind == "wheel":  # not in source/build, where modules that are gone may lie
        base = out.with_name(f"{out.name}-base")
        command += ["--config-setting=--global-option=build", f"--config-setting=--global-option=--build-base={base}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def test_a_package_index_can_show_the_description(wheel, archive):
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        described = files.read(name).decode().partition("\n\n")[2]
    assert described.startswith("# vl-mamba")
    # An index has no files beside it: no relative link, and no picture.
    assert not re.findall(r"\]\((?!https://)", described) and "<img" not in described and "![" not in described


def test_the_source_archive_builds_the_same_wheel(wheel, archive, tmp_path):
    shutil.unpack_archive(archive, tmp_path)
    again = build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert one.namelist() == other.namelist()


def test_the_source_archive_has_what_the_repository_has(archive):
    """Its tests run, and its pages have their pictures, examples and figures."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout of git")
    tracked = {name for name in done.stdout.split("\0") if name and not name.startswith(".") and (ROOT / name).exists()}
    with tarfile.open(archive) as files:
        archived = {name.partition("/")[2] for name in files.getnames()}
    assert not tracked - archived
    assert not {name for name in archived if "_build/" in name or "__pycache__" in name or name.startswith("runs/")}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PYPROJECT["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_is_small_and_of_python_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if ".dist-info/" not in name]
    assert {name for name in names if not name.endswith((".py", "/py.typed"))} == {"vlmamba/serve/page.html"}


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -I keeps the checkout and an editable install's folder out; the wheel's content comes first.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"import importlib\nfor name in {modules()!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


CONSUMER = """
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

from ssm_kernels import SSDOutput, add_rms_norm, selective_scan, ssd, use_backend
from ssm_kernels.modules import Mamba2, MixerState
from vlmamba import load_model
from vlmamba.connectors import ConnectorConfig, build_connector
from vlmamba.model import VLM, GenerationConfig, LMConfig, MambaLM

x = torch.ones(1)
assert_type(ssd(x, x, x, x, x, dt_softplus=True, backend="reference"), SSDOutput)
assert_type(selective_scan(x, x, x, x, x).final_states, Tensor)
assert_type(add_rms_norm(x, x).residual, Tensor)
assert_type(Mamba2(64).new_state(1), MixerState)
with use_backend("torch"):
    build_connector(ConnectorConfig("vss-l2", scan="cross"), vision_width=48, lm_width=64)
assert_type(MambaLM.from_pretrained("name", dtype=torch.bfloat16, device_map="auto"), MambaLM)
assert_type(VLM.from_pretrained(Path("folder")), VLM)
assert_type(load_model("name"), MambaLM | VLM)
assert_type(VLM.from_pretrained("name").generate(["?"], [None], GenerationConfig(max_new_tokens=8)), list[str])

ssd(x, x, x, x)  # wrong: no C
ssd(x, x, x, x, x, backend="cuda")  # wrong
ssd(x, x, x, x, x).states  # wrong
use_backend("fast")  # wrong
ConnectorConfig("vss-l3")  # wrong
LMConfig(layer="rwkv")  # wrong
GenerationConfig(max_tokens=8)  # wrong
VLM.from_pretrained("name", dtyp=torch.bfloat16)  # wrong
"""


def test_a_type_checker_sees_the_types_of_the_wheel(wheel, tmp_path):
    """Right use passes and each wrong line is reported, with nothing of the checkout in sight; so do the commands."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    assert {path.parent.name for path in (tmp_path / "wheel").rglob("py.typed")} == set(PACKAGES)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    commands = ["wheel/vlmamba/*.py", "wheel/vlmamba/commands"]  # in a checkout their imports do not resolve
    settings = {"include": ["consumer.py", *commands], "extraPaths": ["wheel"], "pythonVersion": "3.12"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = {i for i, line in enumerate(CONSUMER.splitlines()) if "# wrong" in line}
    errors = {(Path(d["file"]).name, d["range"]["start"]["line"]) for d in found if d["severity"] == "error"}
    assert errors == {("consumer.py", line) for line in wrong}, found


def test_the_changelog_starts_with_this_version():
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.split()[1] == PYPROJECT["project"]["version"]


def test_the_kernels_need_torch_alone(tmp_path):
    """Without triton and everything else that is optional, the kernels import and run."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "einops", "transformers", "huggingface_hub", "PIL", "tokenizers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch, ssm_kernels
from ssm_kernels.modules import Mamba, Mamba2
x = torch.randn(2, 5, 32)
print(Mamba(32)(x).shape, Mamba2(32, headdim=16)(x).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([2, 5, 32])") == 2


def test_importing_does_not_import_triton_or_numba():
    code = "import sys, ssm_kernels, vlmamba.cli; assert not {'triton', 'numba'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TORCH_FREE_HELP = """
import sys
from {module} import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch"
"""


@pytest.mark.parametrize(
    ("module", "commands"),
    [("vlmamba.cli", "vlmamba.commands"), ("vlmamba.benchmarks.cli", "vlmamba.benchmarks.options")],
)
def test_help_and_version_do_not_import_torch(module, commands):
    names = importlib.import_module(commands).COMMANDS
    for arguments in ([], ["--help"], ["--version"], *([command, "--help"] for command in names)):
        code = TORCH_FREE_HELP.format(module=module, arguments=arguments)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout


def test_every_public_name_of_the_models_is_where_it_is_looked_for():
    import vlmamba.model

    assert set(vlmamba.model._MODULE_OF) == set(vlmamba.model.__all__)
    for name in vlmamba.model.__all__:
        assert getattr(vlmamba.model, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        vlmamba.model.Nothing  # noqa: B018


CHECKOUT_COMPLETE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
import importlib
for name in ("vlmamba.model", "vlmamba.train", "vlmamba.connectors", "vlmamba.benchmarks", "vlmamba.commands.train"):
    module = importlib.import_module(name)
    assert module.__file__.startswith({root!r}), module
"""


def test_a_checkout_on_the_path_is_complete_without_an_install(tmp_path):
    """Another checkout may be the installed one, so the subpackages are found beside `vlmamba/`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + CHECKOUT_COMPLETE.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", [ROOT, Path("/")], ids=["checkout", "elsewhere"])
def test_modules_run_from_any_working_directory(folder):
    command = [sys.executable, "-m", "vlmamba", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.stdout == f"vlmamba {PYPROJECT['project']['version']}\n", done.stderr


def test_names_of_the_package_are_imported_when_they_are_used():
    import vlmamba

    for name in vlmamba.__all__:
        assert getattr(vlmamba, name) is not None
    assert set(vlmamba.__all__) <= set(dir(vlmamba))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        vlmamba.Nothing  # noqa: B018
    code = "import sys, vlmamba; vlmamba.__version__; assert 'torch' not in sys.modules; vlmamba.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
