"""Sphinx configuration. Tutorials are executed while the documentation is built."""

import os
import sys
from pathlib import Path

from captum_classfilters import __version__

sys.path.insert(0, str(Path(__file__).parent))
from make_notebooks import page, scripts

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
html_title = f"captum_classfilters {__version__}"
exclude_patterns = ["_build", "_templates", "jupyter_execute"]
templates_path = ["_templates"]
# Where the pages are read, for the site map; by default a server on this machine.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "http://localhost:8000/")
sitemap_url_scheme = "{link}"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# A page for each object; what Captum's and Python's own classes define is documented there.
autosummary_context = {
    "not_ours": "Attribution, LayerAttribution, Module, Callback, Tabular, Mapping, Sequence, Enum, "
    "tuple, object"
}

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
_notebooks = Path(__file__).parent / "tutorials"
_notebooks.mkdir(exist_ok=True)
for script in scripts():
    notebook, text = _notebooks / f"{script.stem}.ipynb", page(script)
    if not notebook.exists() or notebook.read_text(encoding="utf-8") != text:
        notebook.write_text(text, encoding="utf-8")
