"""The HTML page of a result: one file that opens offline, with its style and plots inside and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plots import DPI

FACTS = ("device", "driver", "threads", "cores", "python", "commit", "date")
"""Keys of the environment, beside the packages."""
STYLE = """
body { font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c1e21;
  max-width: 64em; margin: 2.5em auto; padding: 0 1.5em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1.15em; margin: 2.2em 0 .2em; border-bottom: 1px solid #ddd }
p { margin: .4em 0 } code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f4f6;
  padding: .15em .4em; border-radius: 3px } .quiet { color: #666; font-size: .92em }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .28em .8em; text-align: right; white-space: nowrap } th { font-weight: 600; color: #555 }
thead th { border-bottom: 1.5px solid #888 } td { border-bottom: 1px solid #eee }
tr.first td { border-top: 2px solid #bbb } .name { text-align: left } td.missing { color: #777; text-align: left;
  white-space: normal } tr.wrong td { background: #fde8e8; color: #a31515; font-weight: 600 }
img { max-width: 100%; height: auto; display: block; margin: .6em 0 }
"""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    cells: Sequence[str]
    missing: str = ""
    """The reason why the cells that follow are missing; it takes their place."""
    is_first: bool = False
    """A new group of rows starts here."""
    is_wrong: bool = False


def page(title: str, result: Mapping[str, Any], body: str) -> str:
    """A complete page: title, device, command, the body, and the environment."""
    packages = {name: version or "not installed" for name, version in result["packages"].items()}
    facts = {key: result[key] for key in FACTS if result[key] is not None} | packages
    made = f"{result['device']}, commit {result['commit']}, {result['date']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n'
        f"{quiet(made)}<p><code>{escape(result['command'])}</code></p>\n{body}<h2>Environment</h2>\n"
        f"{table((), [Row((key, str(value))) for key, value in facts.items()], names=(0, 1))}</body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Row], names: Sequence[int] = (0,)) -> str:
    """A table; the columns `names` hold words and are aligned to the left, the others hold numbers."""
    kinds = [' class="name"' if i in names else "" for i in range(max(len(heads), 1 + max(names)))]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, heads, strict=False))
    body = ""
    for row in rows:
        classes = " ".join(["first"] * row.is_first + ["wrong"] * row.is_wrong)
        cells = "".join(
            f"<td{kinds[i] if i < len(kinds) else ''}>{escape(cell)}</td>" for i, cell in enumerate(row.cells)
        )
        if row.missing:
            span = max(1, len(heads) - len(row.cells))
            cells += f'<td class="missing" colspan="{span}">{escape(row.missing)}</td>'
        body += f'<tr class="{classes}">{cells}</tr>\n' if classes else f"<tr>{cells}</tr>\n"
    head = f"<thead><tr>{head}</tr></thead>\n" if heads else ""
    return f"<table>{head}<tbody>{body}</tbody></table>\n"


def image(png: bytes, alt: str) -> str:
    """A plot, embedded."""
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # from the PNG's header
    return f'<img alt="{escape(alt)}" width="{width}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'


def quiet(text: str) -> str:
    """A paragraph in small grey type."""
    return f'<p class="quiet">{escape(text)}</p>\n'


def escape(value: object) -> str:
    """A value as HTML text."""
    return html.escape(str(value))
