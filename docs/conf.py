"""Documentation: `make docs`. The op contracts are the docstrings; examples in `{doctest}` blocks are run."""

import importlib.metadata
import re

project = "vl-mamba"
author = "the vl-mamba authors"
release = importlib.metadata.version("vl-mamba")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `name`
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
suppress_warnings = ["myst.header"]  # parts of the README begin below its first heading

maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

doctest_global_setup = """
import torch
torch.manual_seed(0)
"""

html_show_copyright = False
html_theme = "furo"
html_title = f"vl-mamba {release}"
html_show_sourcelink = False

PAGES = {
    "docs/cluster": "/cluster/README.md",
    "CONTRIBUTING.md": "/contributing.md",
    "docs/extending.md": "/extending.md",
    "docs/glossary.md": "/glossary.md",
    "CHANGELOG.md": "/changelog.md",
}


def setup(app):
    app.connect("include-read", _links_of_the_readme)


def _links_of_the_readme(app, path, docname, content):
    """Files of the repository that are no pages here are named, not linked; pictures are found from here."""

    def link(match):
        text, target = match.groups()
        if target in PAGES:
            return f"[{text}]({PAGES[target]})"
        return f"`{target}`" if text == target or target.endswith(text) else f"{text} (`{target}`)"

    content[0] = content[0].replace('<img src="', '<img src="../')
    content[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", link, content[0])
