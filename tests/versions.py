"""Parts of the suite on other versions of Python, PyTorch, Triton and transformers: `make versions`.

Each row has an environment of its own, which is made, used and removed. Results go to benchmarks/results/versions.json
and to the table in docs/install.md as each row ends, so that a run that was stopped goes on with the next row. An
environment holds the packages that the parts import, not the whole `test` extra. Nothing here runs in CI: one with
PyTorch's CUDA build takes 3 GB to load and 6 GB of disk, and a row about 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- versions: written by make versions -->\n", "<!-- end of versions -->\n"


class Row(NamedTuple):
    """An environment. What is None is what pip takes beside the others."""

    python: str
    torch: str
    triton: str | None = None
    transformers: str | None = None
    numpy: str | None = None

    @property
    def name(self) -> str:
        versions = zip(("torch", "triton", "transformers", "numpy"), self[1:], strict=True)
        return " ".join([f"python-{self.python}", *(f"{n}-{v}" for n, v in versions if v)])


ROWS = (
    Row("3.10", "2.9.0"),
    Row("3.10", "2.13.0"),
    Row("3.11", "2.13.0", "3.7.1", "5.23.0"),
    Row("3.11", "2.13.0", "3.9.0", "5.24.0"),
    Row("3.11", "2.13.0", "3.4.0", numpy="2.3.5"),
    Row("3.11", "2.13.0", "3.6.0", numpy="2.3.5"),
    Row("3.12", "2.13.0"),
    Row("3.13", "2.13.0"),
    Row("3.13", "2.15.0"),
)

OPS = [f"tests/ssm_kernels/test_{op}.py" for op in ("selective_scan", "ssd", "causal_conv1d", "norm", "cross_scan")]
PARTS: dict[str, list[str]] = {
    "ops": OPS,
    "interpreter": [*OPS, "-m", "triton", "-k", "two_halves or steps_equal or packed or final or wide"],
    "models": ["tests/model/test_lm.py", "tests/model/test_vlm.py", "tests/ssm_kernels/test_integrations.py"],
    "training": ["tests/train/test_loop.py", "tests/train/test_distributed.py"],
}
"""Arguments of pytest. `ops` runs without Triton, `interpreter` a sixth of the same tests with TRITON_INTERPRET=1."""


def interpreter(version: str) -> str | None:
    """The path of a Python of this version: pyenv's, or what is on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for folder in sorted(pyenv.glob(f"{version}.*"), reverse=True):
        if (folder / "bin" / "python").exists():
            return str(folder / "bin" / "python")
    return shutil.which(f"python{version}")


def install(row: Row, environment: Path) -> str | None:
    """Make an environment; the reason where that fails."""
    python = interpreter(row.python)
    if python is None:
        return f"no Python {row.python}"
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    named = {"torch": row.torch, "transformers": row.transformers, "numpy": row.numpy}
    pins = [f"{name}=={version}" for name, version in named.items() if version]
    packages = ["--editable", ".[demo]", "transformers", "pytest", "hypothesis"]  # what PARTS import
    steps = [[python, "-m", "venv", str(environment)], [*pip, *pins], [*pip, *packages, *pins]]
    if row.triton:  # without its place in torch's metadata, which pins one version
        steps.append([*pip, "--no-deps", f"triton=={row.triton}"])
    for step in steps:
        done = subprocess.run(step, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
            return (errors or done.stdout.splitlines() or [f"{step[0]} failed"])[-1]
    return None


def installed(environment: Path) -> dict[str, str]:
    """The versions in an environment."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "names = ('torch', 'triton', 'transformers', 'numpy')\n"
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in names}}))"
    )
    return json.loads(subprocess.check_output([str(environment / "bin" / "python"), "-c", code], text=True))


def run(part: str, environment: Path) -> str:
    """Pytest's own sum, and the names of what failed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if part == "interpreter" else "0"}
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-v", "-rf", "--tb=no", *PARTS[part]]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sums = re.findall(r"^=+ (.*(?:passed|failed|skipped|error).*?) in .*=+$", done.stdout, re.MULTILINE)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not sums:
        return f"pytest ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"
    return "; ".join([sums[-1], *failed[:5]])


def table(results: dict[str, dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| Python | torch | Triton | transformers | NumPy | " + " | ".join(PARTS) + " | run on |",
        "|---" * (6 + len(PARTS)) + "|",
    ]
    for row in ROWS:
        result = results.get(row.name, {})
        found = result.get("versions", {})
        cells = [found.get(n) or getattr(row, n) or "pip's choice" for n in row._fields]
        outcomes = [result.get("problem") or result.get("parts", {}).get(part, "not run") for part in PARTS]
        lines.append("| " + " | ".join([*cells, *outcomes, result.get("date", "")]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=[r.name for r in ROWS], help="run this row, again if need be")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="run these parts of a row alone")
    parser.add_argument("--folder", type=Path, help="where environments are made (default: a temporary folder)")
    arguments = parser.parse_args()

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in ROWS:
        if arguments.row and row.name not in arguments.row or not arguments.row and row.name in results:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(f"{row.name}: installing", flush=True)
            environment = Path(folder) / "venv"
            result = {"date": datetime.date.today().isoformat(), "problem": install(row, environment)}
            if result["problem"] is None:
                result |= {"versions": installed(environment), "parts": results.get(row.name, {}).get("parts", {})}
                for part in arguments.part or PARTS:
                    print(f"{row.name}: {part}", flush=True)
                    result["parts"][part] = run(part, environment)
                    print(f"{row.name}: {part}: {result['parts'][part]}", flush=True)
            else:
                print(f"{row.name}: {result['problem']}", flush=True)
        results[row.name] = result
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
