"""The documentation builds without a warning, its examples run and print what they say, and it has every op."""

from __future__ import annotations

import collections
import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssm_kernels
import vlmamba.model

pytest.importorskip("sphinx")
DOCS = Path(__file__).parent.parent / "docs"


def build(kind: str, out: Path) -> str:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", kind, "-d", str(out / "cache"), str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("html")
    build("html", out)
    return out


def test_everything_public_has_its_contract_on_a_page(pages):
    text = "".join(page.read_text() for page in pages.rglob("*.html") if "_modules" not in page.parts)
    names = set(re.findall(r'id="(?:ssm_kernels|vlmamba)\.(?:\w+\.)*(\w+)"', text))
    for module in (ssm_kernels, vlmamba.model):
        public = [name for name in module.__all__ if callable(getattr(module, name))]  # no constants, no types' names
        # `Backend` and `ScanDirection` are choices of words, which the functions that take them list.
        assert set(public) - {"Backend", "ScanDirection"} <= names
    assert {"Mamba", "Mamba2", "Mamba3", "RMSNorm", "train_stage", "StageConfig"} <= names


def test_pages_ask_for_nothing_from_elsewhere(pages):
    for page in pages.rglob("*.html"):
        loads = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not loads, f"{page.name} loads {loads}"


def dead_links(pages: Path) -> list[str]:
    """Links between pages to a page or a place in it that does not exist. A link out of the source is one too."""
    texts = {page.resolve(): page.read_text() for page in pages.rglob("*.html")}
    places = {page: set(re.findall(r'id="([^"]+)"', text)) for page, text in texts.items()}
    found = []
    for page, text in texts.items():
        for link in set(re.findall(r'<a [^>]*href="((?!\w+:)[^"]+)"', text)):
            path, _, place = html.unescape(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if target not in places if target.suffix == ".html" else not target.exists():
                found.append(f"{page.name}: {link}")
            elif place and place not in places[target]:
                found.append(f"{page.name}: {link}")
    return found


def test_links_between_pages_lead_somewhere(pages, tmp_path):
    assert not dead_links(pages)
    (tmp_path / "a.html").write_text('<p id="b"><a href="#b">.</a><a href="#c">.</a><a class="d" href="d.html">.</a>')
    assert sorted(dead_links(tmp_path)) == ["a.html: #c", "a.html: d.html"]


def faults(page: str) -> list[str]:
    """Find what Sphinx renders wrongly without a warning."""
    found = []
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    if "<blockquote" in page:  # an indented block without `::` before it
        found.append("a quotation")
    found += re.findall(r"Built-in (?:im)?mutable sequence", text)  # the docstring of a constant's type
    found += re.findall(r"Alias for field number \d+", text)  # a field of a NamedTuple without a docstring
    found += re.findall(r"<(?:function|class|module|object) [^>]*>", text)  # a value that has no literal
    found += re.findall(r'class="default_value">(?:<[^>]+>)*_\w+', page)  # a private name as a default
    found += re.findall(r"Type<span class=\"colon\">:</span></dt>.*", page)  # an attribute's text cut at a colon
    found += re.findall(r"(?:Return|Yield) type<span.*", page)  # a result's text cut at a colon
    found += re.findall(r'<ol class="(?:upper|lower)\w+.*', page)  # `d_state: N.` as an empty list
    found += re.findall(r"Interval\(text=\S*", text)  # the bounds that a field is checked for
    found += re.findall(r"usage: [^\n]*\n\n[^\n]*\n\nExamples:", text)  # help that says again what is above it
    found += re.findall(r"</strong> -- .*", page)  # two hyphens for the dash that the next check splits at
    # `x, z: ...` as a line for each name
    for arguments in re.findall(r'<ul class="simple">(.*?)</ul>', page, re.DOTALL):
        lines = [re.sub(r"<[^>]+>", "", item).partition(" – ")[2] for item in arguments.split("<li>")]
        found += [line for line, n in collections.Counter(lines).items() if n > 1 and len(line) > 60]
    # a formula that is not MathML: its source, or what a script from elsewhere would render
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
    found += re.findall(r"\$\$|\\(?:begin|Delta|frac|operatorname|sum|top)(?![A-Za-z])|math notranslate", prose)
    # "see" a name that is neither a link nor an argument on the page
    for name in re.findall(r'see <code class="xref py py-obj[^"]*"><span class="pre">([\w.]+)', page):
        if f"<strong>{name}</strong>" not in page:
            found.append(f"see {name}")
    return found


def test_no_page_renders_a_docstring_wrongly(pages):
    found = {}
    for page in pages.rglob("*.html"):
        if "_modules" not in page.parts:
            found[page.name] = faults(page.read_text())
    assert not {name: list(f) for name, f in found.items() if f}


@pytest.mark.parametrize(
    "page",
    [
        "<blockquote><div>from a import b</div></blockquote>",
        "CROSS = (1, 2) Built-in immutable sequence.",
        "<p>Alias for field number 0</p>",
        "{'a': &lt;function f&gt;}",
        '<em>dt_limit=<span class="default_value"><span class="pre">_UNLIMITED</span></span></em>',
        '<dt>Type<span class="colon">:</span></dt><dd>they end the text</dd>',
        "<p><strong>x</strong> -- (B, L, D) input.</p>",
        '<ul class="simple"><li>x – {0}</li><li>z – {0}</li></ul>'.format("(B, D), or (B, H, P). " * 3),
        '<dt>Return type<span class="colon">:</span></dt><dd>The model. Weights are loaded lazily</dd>',
        '<p>d_state -</p><ol class="upperalpha simple"><li></li></ol>',
        "<em>d_state: Annotated[int, Interval(text=[1, 16])]</em>",
        "<pre>usage: vlmamba data FOLDER\n\nWrite a dataset.\n\nExamples:\n$ vlmamba data easy-vqa data</pre>",
        "<p>$$ x $$</p>",
        r"<p>(\Delta_t)</p>",
        '<span class="math notranslate">x</span>',
        '<p>see <code class="xref py py-obj docutils"><span class="pre">fetch</span></code></p>',
    ],
)
def test_the_search_sees_each_fault(page):
    assert faults(page)


@pytest.mark.slow
def test_examples_run_and_print_their_results(tmp_path):
    build("doctest", tmp_path)
    counts = re.findall(r"(\d+) tests?\n +(\d+) failures? in tests", (tmp_path / "output.txt").read_text())
    assert int(counts[-1][0]) > 80 and counts[-1][1] == "0"
