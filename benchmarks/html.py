"""The HTML page of a result: one file that opens offline, with its style and plots inside and no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from typing import Any

from ..train.plot_style import DPI
from .tables import Row, as_html

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


def page(title: str, result: Mapping[str, Any], png: bytes, body: str) -> str:
    """A complete page: title, device, command, the plot if there is one, the body, and the environment."""
    packages = {name: version or "not installed" for name, version in result["packages"].items()}
    facts = {key: result[key] for key in FACTS if result[key] is not None} | packages
    title = escape(title)
    made = f"{result['device']}, commit {result['commit']}, {result['date']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n'
        f"{quiet(made)}<p><code>{escape(result['command'])}</code></p>\n{_image(png, title)}{body}"
        f"<h2>Environment</h2>\n"
        f"{as_html((), [Row((key, str(value))) for key, value in facts.items()], names=(0, 1))}</body></html>\n"
    )


def _image(png: bytes, title: str) -> str:
    if not png:
        return ""
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # from the PNG's header
    return f'<img alt="plot of {title}" width="{width}" src="data:image/png;base64,{b64encode(png).decode()}">\n'


def quiet(text: str) -> str:
    """A paragraph in small grey type."""
    return f'<p class="quiet">{escape(text)}</p>\n'
