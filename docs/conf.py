"""How Sphinx builds the manual."""

from beaker_statestore import __version__

project = "beaker_statestore"
author = "The beaker_statestore authors"
copyright = "2026, The beaker_statestore authors"  # noqa: A001 - Sphinx asks for this name
version = release = __version__

extensions = ["sphinx.ext.autodoc"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "any"
# Names that docstrings mention within their own module, and that the manual has no page for.
nitpicky = False
suppress_warnings = ["ref.any"]

html_theme = "alabaster"
html_theme_options = {"description": "Shared state for web and mail applications", "page_width": "1000px"}
exclude_patterns = ["_build"]
