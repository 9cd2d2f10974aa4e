"""The section of a page that shows some test images."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from maskconnect_jax.report import html
from maskconnect_jax.report.record import Examples, Record


def examples(record: Record) -> str:
  """Returns the section of the images; '' without any."""
  own = record.examples
  if own is None or not len(own.labels):
    return ''
  right = own.right
  parts = []
  for title, chosen in (('Wrong', ~right), ('Right', right)):
    shown = [_example(record, own, int(at)) for at in np.flatnonzero(chosen)]
    if shown:
      parts.append(
        f'<h3>{title}</h3><ul class="examples">{"".join(shown)}</ul>'
      )
  return html.section(
    'examples',
    'Test images',
    *parts,
    about='Some that the pruned network gets wrong, and some that it gets'
    ' right.',
  )


def _class(record: Record, label: Any) -> str:
  """Returns the name of a class, or those of several labels."""
  numbers = np.flatnonzero(label) if np.ndim(label) else [label]
  shown = [
    record.classes[at] if at < len(record.classes) else str(at)
    for at in map(int, numbers)
  ]
  return ', '.join(shown) or 'no label'


def _example(record: Record, own: Examples, at: int) -> str:
  image = own.images[at]
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
    buffer, 'PNG', optimize=True
  )
  content = base64.b64encode(buffer.getvalue()).decode()
  label, found = (
    _class(record, n) for n in (own.labels[at], own.predicted[at])
  )
  words = label
  if not own.right[at]:
    words = f'{label}, taken for {found}'
  small = ' class="small"' if image.shape[0] < 64 else ''
  return (
    f'<li><img{small} src="data:image/png;base64,{content}" width="96"'
    f' height="96" alt=""><span>{html.text(words)}</span></li>'
  )
