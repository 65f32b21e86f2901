"""How ``make docs`` turns this folder and the docstrings into pages."""

import fastpeft

project = "fastpeft"
release = fastpeft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = f"fastpeft {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
myst_heading_anchors = 3
# Links to rows, tables and sources lead out of this folder: they are right in the repository, and stay words here.
suppress_warnings = ["myst.xref_missing"]
