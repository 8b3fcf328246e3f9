"""ssm-bench page: tables of a page from the files of its commands."""

from __future__ import annotations

import json

import pytest

from vlmamba.benchmarks import cli, page

TEXT = """# Page

```sh
ssm-bench run rms_norm --impl torch --shape tiny --calls 2 --threads 1 2 --out a.json  # a remark
vlmamba --help
ssm-bench compare a.json b.json
```

<!-- table: a.json -->
old
<!-- end of table -->

After.
"""


def test_the_tables_are_written_from_the_files_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = page.commands(TEXT)
    assert words[-2:] == ["--out", "a.json"]
    cli.main([*words[1:], "--metric", "time"])
    path = tmp_path / "page.md"
    path.write_text(TEXT)
    for _ in range(2):  # the second time nothing changes
        cli.main(["page", "page.md"])
        before, table = path.read_text().split("<!-- table: a.json -->\n")
        assert before == TEXT.split("<!-- table")[0]
        made, _, heads, rules, one, two, end = table.splitlines()[:7]
        report = json.loads((tmp_path / "a.json").read_text())
        assert made.startswith(f"{report['device']}, commit {report['commit']}, {report['date'][:10]}")
        assert heads == "|  |  | fwd, ms | fwd+bwd, ms | speed-up |" and rules == "| --- | --- | --: | --: | --: |"
        assert one.startswith("| rms_norm tiny | torch | 0.") and "% of " in one
        assert two.startswith("| rms_norm tiny, 2 threads | torch |") and end == "<!-- end of table -->"


def test_a_length_has_its_time_a_step_and_what_was_left_out_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main("sweep causal_conv1d --impl torch --values 8 16 --calls 1 --metric time --out a.json".split())
    report = json.loads((tmp_path / "a.json").read_text())
    for case in report["cases"]:
        case["rows"][0]["time"]["processor"] = case["rows"][0]["time"]["median"] = 2e-6 * case["value"]
    report["cases"][1]["rows"].append({"impl": "fla", "mode": "fwd+bwd", "missing": "left out: a call takes 9 s"})
    (tmp_path / "a.json").write_text(json.dumps(report))
    filled = page.fill("<!-- table: a.json -->\n<!-- end of table -->")
    assert filled.count("| 2.00 |") == 2 and "µs a step" in filled
    assert "| fla | over the budget |" in filled


def test_a_page_without_tables_and_a_command_that_fails_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.md"
    path.write_text("nothing")
    with pytest.raises(SystemExit, match="ssm-bench: page.md has no table"):
        cli.main(["page", "page.md"])
    path.write_text(TEXT.replace("rms_norm", "no_op"))
    with pytest.raises(SystemExit, match="ended with status 2; page.md is unchanged"):
        cli.main(["page", "page.md", "--measure"])
    assert "old" in path.read_text()
