"""Links of the README and of the pages lead somewhere, and tables of names are complete."""

from __future__ import annotations

import re
from pathlib import Path

from vlmamba.benchmarks import op_report
from vlmamba.model import PRESETS, VISION_ENCODERS
from vlmamba.model.formats.language import PUBLISHED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT / "docs")): path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts
}


def test_every_published_name_is_in_the_table():
    named = set()
    for span in re.findall(r"`([^`\n]+)`", PAGES["models.md"]):
        start, _, rest = span.partition("{")
        middle, _, end = rest.partition("}")
        named |= {start + choice + end for choice in middle.split(",")}
    assert set(PUBLISHED) | set(VISION_ENCODERS) | set(PRESETS) <= named


def test_links_to_files_and_headings_lead_somewhere():
    for name, text in {"README.md": README, **{f"docs/{n}": t for n, t in PAGES.items()}}.items():
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            path, _, heading = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f"{name}: {link}"
            if heading and target.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert heading in anchors, f"{name}: {link}"


def test_the_readme_s_times_are_those_of_the_benchmarks():
    report = op_report.read(ROOT / "benchmarks" / "results" / "cpu-ops.json")
    measured = {
        (case["op"], row["impl"]): 1e3 * row["time"]["processor"]
        for case in report["cases"]
        for row in case["rows"]
        if row["mode"] == "fwd+bwd"
    }
    times = r"\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$"
    rows = re.findall(r"^\| (?:`(\w+)`|a Mamba-2 block).*?" + times, README, re.MULTILINE)
    assert len(rows) == 4
    for op, *shown in rows:
        assert shown == [f"{measured[op or 'mamba2_block', i]:,.0f}" for i in ("ours", "torch", "transformers")], op
    shown = re.search(r"\*\*(\d+) ms, not (\d+) s\*\*", README)
    scan = [measured["selective_scan", impl] for impl in ("ours", "transformers")]
    assert shown and shown.groups() == (f"{scan[0]:.0f}", f"{scan[1] / 1e3:.0f}")
    processor = re.search(r"One thread of an? (.*?),", README)
    assert processor and set(processor[1].split()) <= set(report["device"].replace("(R)", "").split())


def test_the_readme_stays_a_first_page():
    assert len(README.splitlines()) <= 150
    assert not any("{include} ../README" in text for text in PAGES.values())
