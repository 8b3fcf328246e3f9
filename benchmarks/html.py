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
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #666; --head: #555; --ground: #fff; --code: #f3f4f6;
  --line: #eee; --rule: #bbb; --wrong: #a31515; --wrong-ground: #fde8e8 }
@media (prefers-color-scheme: dark) { :root { --ink: #d4d7dc; --quiet: #9aa0a8; --head: #aab0b8; --ground: #15171a;
  --code: #24272c; --line: #2a2e34; --rule: #555b63; --wrong: #ff9b9b; --wrong-ground: #4a1c1c } }
body { font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--ground); max-width: 80em; margin: 2.5em auto; padding: 0 1.5em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1.15em; margin: 2.2em 0 .2em; border-bottom: 1px solid var(--rule) }
p { margin: .4em 0 } code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--code);
  padding: .15em .4em; border-radius: 3px; overflow-wrap: anywhere } .quiet { color: var(--quiet); font-size: .92em }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .28em .8em; text-align: right; white-space: nowrap } th { font-weight: 600; color: var(--head) }
thead th { border-bottom: 1.5px solid var(--rule) } td { border-bottom: 1px solid var(--line) }
tr.first td { border-top: 2px solid var(--rule) } .name { text-align: left } td.missing { color: var(--quiet);
  text-align: left; white-space: normal; min-width: 16em }
tr.wrong td { background: var(--wrong-ground); color: var(--wrong); font-weight: 600 }
img { width: 100%; min-width: 42em; height: auto; display: block; margin: .6em 0 }
"""


def page(title: str, result: Mapping[str, Any], png: bytes, body: str) -> str:
    """A complete page: title, device, command, the plot if there is one, the body, and the environment."""
    packages = {name: version or "not installed" for name, version in result["packages"].items()}
    facts = {key: result[key] for key in FACTS if result[key] is not None} | packages
    title = escape(title)
    made = f"{result['device']}, commit {result['commit']}, {result['date']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n'
        f"{quiet(made)}<p><code>{escape(result['command'])}</code></p>\n{_image(png, title)}{body}"
        f"<h2>Environment</h2>\n"
        f"{as_html((), [Row((key, str(value))) for key, value in facts.items()], names=(0, 1))}</body></html>\n"
    )


def _image(png: bytes, title: str) -> str:
    if not png:
        return ""
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # from the PNG's header
    image = f'<img alt="plot of {title}" style="max-width: {width}px" src="data:image/png;base64,'
    return f'<div class="wide">{image}{b64encode(png).decode()}"></div>\n'


def quiet(text: str) -> str:
    """A paragraph in small grey type."""
    return f'<p class="quiet">{escape(text)}</p>\n'
