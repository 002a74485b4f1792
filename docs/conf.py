"""Settings of the site. What is generated is written by `_generate` before Sphinx reads a page."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "src"))

from _generate import after_napoleon, before_napoleon, link_names, move_links, write_pages
from sphinx.application import Sphinx

import pplr

project = "pplr"
author = copyright = "the pplr authors"  # noqa: A001
version = release = pplr.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["*_text", "generated/included"]
nitpicky = True
nitpick_ignore_regex = [  # no other project's inventory is fetched, so that the site builds without a network
    ("py:.*", rf"({'|'.join(sorted(sys.stdlib_module_names))})(\..*)?"),
    ("py:.*", r"(torch|numpy|scipy|polars|transformers|peft|pydantic|grpc|google|flwr|cryptography)\..*"),
    ("py:.*", r"<google\..*|pplr\.runtimes\.stage_pb2\..*|pplr\.(\w+\.)*(\w*T|_\w+)"),  # protobuf's; type variables
    ("py:class", r"Path|(dict|tuple)\[\w+"),
]
highlight_language = "none"
default_role = "code"
toc_object_entries = False  # a menu of every function on every page takes a quarter of the build
smartquotes = False  # options begin with two hyphens
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_custom_sections = ["Cites"]
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"pplr {version}"
html_static_path = ["_static"]
html_css_files = ["pplr.css"]
html_domain_indices = False
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Sphinx) -> None:
    """Write what is generated, and join Sphinx's events."""
    write_pages(HERE)
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    app.connect("doctree-read", link_names)
    app.connect("include-read", move_links)
