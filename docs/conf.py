"""The documentation site; `make docs` builds it.

Sphinx with MyST, as JAX, Flax, Optax and Orbax have it: their objects.inv let
a docstring link to theirs, and pages stay Markdown that reads well in the
repository. MkDocs Material was weighed: it is in maintenance since 2025.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

project = 'maskconnect_jax'
author = project_copyright = 'The maskconnect_jax authors'
release = version = importlib.metadata.version('maskconnect_jax')
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
]
exclude_patterns = ['results', 'site', 'images']
myst_heading_anchors = 4
myst_enable_extensions = ['deflist']
html_theme = 'furo'
html_title = 'maskconnect_jax'
html_show_sourcelink = False
copybutton_prompt_text = '$ '
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
napoleon_numpy_docstring = False
nitpicky = False


def to_listings(app: Any, name: str, text: list[str]) -> None:
  """Links to files of the package go to their listings on the site."""
  text[0] = re.sub(
    r'\[([^]]*)\]\(\.\./(maskconnect_jax/[\w/]+)\.py\)',
    r'<a href="_modules/\2.html">\1</a>',
    text[0],
  )


def setup(app: Any) -> None:
  """Sphinx calls this once."""
  app.connect('source-read', to_listings)
