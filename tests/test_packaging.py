"""The package: what is listed is what is there, and the wheel holds it all."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FLOORS = ("ssm_kernels", "connectors", "model", "train", "benchmarks")


def folder_of(package: str) -> Path:
    top = ".".join(package.split(".")[:2])
    if top in SETUPTOOLS["package-dir"]:
        package = package.replace(top, SETUPTOOLS["package-dir"][top], 1)
    return ROOT / package.replace(".", "/")


def test_every_package_is_listed():
    on_disk = {init.parent for floor in FLOORS for init in (ROOT / floor).rglob("__init__.py")}
    assert {folder_of(p) for p in SETUPTOOLS["packages"]} == on_disk


HARNESSES = {f"vlmamba.model.harness.{harness}": harness for harness in ("lm_eval", "lmms_eval")}


def modules() -> list[str]:
    """Every module by its import name; adapters to harnesses that are not installed left out."""
    names = []
    for package in SETUPTOOLS["packages"]:
        for file in folder_of(package).glob("*.py"):
            names.append(package if file.stem == "__init__" else f"{package}.{file.stem}")
    return sorted(name for name in names if find_spec(HARNESSES.get(name, "vlmamba")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_is_small_and_of_python_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000


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


def test_importing_does_not_import_triton():
    code = "import sys, ssm_kernels, vlmamba.train.cli; assert 'triton' not in sys.modules, 'triton'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
