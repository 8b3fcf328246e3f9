"""Documentation: `make docs`. The op contracts are the docstrings; examples in `{doctest}` blocks are run."""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import logging
import os
import re
import typing
from unittest import mock

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.nodes import make_refnode

import vlmamba.model
import vlmamba.train.config
from vlmamba.benchmarks.options import COMMANDS as SSM_BENCH
from vlmamba.commands import COMMANDS as VLMAMBA
from vlmamba.help import parse
from vlmamba.model.extras import NOISY_LOGGERS

for noisy in NOISY_LOGGERS:
    logging.getLogger(noisy).setLevel(logging.ERROR)

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
exclude_patterns = ["_build", "description.md"]  # the latter is for a package index
default_role = "py:obj"  # docstrings write `name`: a link where a page has the object, code elsewhere
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "html_image"]
suppress_warnings = ["myst.header"]  # parts of the README begin below its first heading

maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # `x, z: ...` stays one line

doctest_global_setup = """
import torch
torch.manual_seed(0)
"""

smartquotes_action = "qe"  # quotes and ellipses; `--option` keeps its dashes

html_show_copyright = False
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"vl-mamba {release}"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["pages.css"]
pygments_dark_style = "github-dark"

PAGES = {
    "docs/cluster": "/cluster/README.md",
    "CONTRIBUTING.md": "/contributing.md",
    "CHANGELOG.md": "/changelog.md",
}


def setup(app):
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_block_formula, None))
    app.connect("include-read", _links_of_the_readme)
    app.connect("source-read", _with_help_of_commands)
    app.connect("missing-reference", _link_by_short_name)
    app.connect("builder-inited", _leave_out_bounds)
    app.connect("autodoc-process-docstring", _escape, priority=300)
    # Around napoleon, which runs at 500 and takes the text before a colon for the type of an attribute.
    app.connect("autodoc-process-docstring", _keep_attribute, priority=400)
    app.connect("autodoc-process-docstring", _restore_attribute, priority=600)
    app.connect("doctree-read", _set_dashes)


# Formulas are MathML in the page itself: Sphinx's own renderers need a script from elsewhere, or TeX.


def _inline_formula(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_formula(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def _with_help_of_commands(app, docname, source):
    """Put the help of each subcommand in the place of `<!-- help of NAME -->`, as its parser prints it."""

    def sections(match):
        commands = {"vlmamba": VLMAMBA, "ssm-bench": SSM_BENCH}[match[1]]
        return "\n\n".join(_section(match[1], name, kind) for name, kind in commands.items())

    source[0] = re.sub(r"<!-- help of (\S+) -->", sections, source[0])


def _section(program, name, kind):
    out = io.StringIO()
    width = mock.patch.dict(os.environ, COLUMNS="80")
    with width, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        parse(f"{program} {name}", kind, ["--help"])
    text = re.sub(r" +$", "", out.getvalue(), flags=re.MULTILINE)
    # Its description is text of the page already; a group is a heading above a rule.
    text = re.sub(r"\n\n.*?(?=\n\n \S[^\n]*\n -+\n)", "", text, count=1, flags=re.DOTALL)
    described, _, lines = inspect.getdoc(kind).partition("Examples:\n")
    return f"## {name}\n\n{described}\n\n```console\n{lines}\n```\n\n```text\n{text.strip()}\n```"


def _leave_out_bounds(app):
    """Annotate fields by their types alone: `int`, not `Annotated[int, Interval("[1, inf)")]`."""
    if app.builder.name == "doctest":  # whose examples run the checks of these bounds
        return
    public = [getattr(vlmamba.model, name) for name in vlmamba.model.__all__]
    for kind in (*public, *vars(vlmamba.train.config).values()):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            continue
        for base in filter(dataclasses.is_dataclass, kind.__mro__):
            hints = typing.get_type_hints(base)
            for annotations in (vars(base).get("__annotations__", {}), base.__init__.__annotations__):
                annotations.update({name: hints[name] for name in annotations.keys() & hints.keys()})


def _escape(app, what, name, obj, options, lines):
    """Keep `d_state: N.` from being read as an empty list, and a result's text before a colon as its type."""
    returns = False
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"^(\s*(?:[*\w, ]+: )?)(\(?[A-Za-z][.)](?:\s|$))", r"\1\\\2", line)
        if returns and line.strip():
            lines[i] = re.sub(r"\S", r": \g<0>", lines[i], count=1)
            returns = False
        returns = returns or line.strip() in ("Returns:", "Yields:")


_attribute = {}


def _keep_attribute(app, what, name, obj, options, lines):
    if what in ("attribute", "data", "property"):
        _attribute[name] = list(lines)


def _restore_attribute(app, what, name, obj, options, lines):
    if name in _attribute:
        lines[:] = _attribute.pop(name)


def _set_dashes(app, doctree):
    """Set an en dash after the name of an argument or an error, where Sphinx leaves two hyphens."""
    for field in doctree.findall(nodes.field_body):
        for text in list(field.findall(nodes.Text)):
            if text.startswith(" -- "):
                text.parent.replace(text, nodes.Text(f" – {text[4:]}"))


def _link_by_short_name(app, env, node, contnode):
    """Link a name to the one documented object whose full name ends with it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not re.fullmatch(r"[A-Za-z_][\w.]*", target):
        return None
    objects = env.domains["py"].objects
    # An object that is documented under two names has one place.
    found = {(entry.docname, entry.node_id) for name, entry in objects.items() if name.endswith(f".{target}")}
    if len(found) != 1:
        return None
    return make_refnode(app.builder, node["refdoc"], *found.pop(), contnode, target)


def _links_of_the_readme(app, path, docname, content):
    """Files of the repository that are no pages here are named, not linked; pictures are found from here."""

    def link(match):
        text, target = match.groups()
        page = PAGES.get(target) or re.sub(r"^docs(/.+\.md)$", r"\1", target)
        if page != target:
            return f"[{text}]({page})"
        return f"`{target}`" if text == target or target.endswith(text) else f"{text} (`{target}`)"

    content[0] = content[0].replace('<img src="', '<img src="../')
    content[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", link, content[0])
