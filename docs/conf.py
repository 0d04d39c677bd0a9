"""Sphinx configuration. Tutorials are executed while the documentation is built."""

import os
import sys
from pathlib import Path

from sphinx.application import Sphinx

from captum_classfilters import __version__

sys.path.insert(0, str(Path(__file__).parent))
from make_notebooks import page, scripts
from make_reference import lead_back, object_pages

project = "captum_classfilters"
author = "The captum_classfilters developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_sitemap",
    "sphinxcontrib.bibtex",
]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_theme_options = {"top_of_page_buttons": []}  # pages are read, not their sources
html_title = f"captum-classfilters {__version__}"  # a hyphen lets a narrow side bar break it
exclude_patterns = ["_build", "jupyter_execute"]
# Where the pages are read, for the site map; by default a server on this machine.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "http://localhost:8000/")
sitemap_url_scheme = "{link}"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types with shapes
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["*.md"]
nb_merge_streams = True
nb_execution_show_tb = True

# The tutorials are plain scripts with cells (jupytext's percent format); here they are notebooks.
# Objects have a page each, which the tables of their room lead to: in the side bar of every page so
# many would take two thirds of the build.
_here = Path(__file__).parent
_pages = {f"tutorials/{script.stem}.ipynb": page(script) for script in scripts()}
_pages |= {f"api/objects/{name}.rst": text for name, text in object_pages()}
for name, text in _pages.items():
    path = _here / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """What Sphinx calls once this file is read."""
    app.connect("html-page-context", lead_back)
