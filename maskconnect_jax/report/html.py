"""HTML of a page: its frame, and the parts that sections share.

Text from files is escaped where it enters: `text`, and every function that
takes words. What these functions return is HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from maskconnect_jax.drawing import svg, theme

_COLUMNS = 4  # of a table that fits a phone
_LONG = 36  # letters of a cell that stay on one line
_FOLDER = Path(__file__).parent


def heading(words: str) -> str:
  """Returns words with a capital letter; those that have one stay: 'mAP'."""
  return words.capitalize() if words.islower() else words


def text(value: Any) -> str:
  """Returns a value as escaped text, also for an attribute."""
  words = str(value).encode('utf-8', 'backslashreplace').decode()
  return html.escape(words)


def unbroken(parts: Sequence[str]) -> str:
  """Returns parts with dots between them; a line breaks between parts only."""
  last = len(parts) - 1
  return ' '.join(
    f'<span>{text(part)}{"" if at == last else " ·"}</span>'
    for at, part in enumerate(parts)
  )


def commands(lines: str) -> str:
  """Returns commands, of which a line breaks between words if it can."""
  broken = '\n'.join(
    ' '.join(f'<span>{text(word)}</span>' for word in line.split(' '))
    for line in lines.splitlines()
  )
  return f'<pre>{broken}</pre>'


def page(title: str, body: Iterable[str], *, reload_seconds: int = 0) -> str:
  """Returns a whole page.

  Args:
    title: of the browser's tab.
    body: the HTML of its parts.
    reload_seconds: how often the browser reads the file again; 0: never.
  """
  css = (_FOLDER / 'page.css').read_text('utf-8')
  script = (_FOLDER / 'page.js').read_text('utf-8')
  reload = ''
  if reload_seconds:
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}">'
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en">',
      '<head>',
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta name="color-scheme" content="light dark">',
      # Without an icon of its own, a browser would look for one.
      f'<link rel="icon" href="data:,">{reload}',
      f'<title>{text(title)}</title>',
      f'<style>{theme.style(":root")}{svg.STYLE}{css}</style>',
      '</head>',
      '<body>',
      '<main>',
      *body,
      '</main>',
      f'<script>{script}</script>',
      '</body>',
      '</html>',
      '',
    ]
  )


def section(name: str, title: str, *parts: str, about: str = '') -> str:
  """Returns a section with a heading; without parts, nothing.

  Args:
    name: id of the section.
    title: its heading.
    *parts: HTML; empty ones are left out.
    about: a line below the heading.
  """
  parts = tuple(part for part in parts if part)
  if not parts:
    return ''
  line = f'<p class="about">{text(about)}</p>' if about else ''
  return (
    f'<section id="{name}" aria-labelledby="{name}-title">'
    f'<h2 id="{name}-title">{text(title)}</h2>{line}'
    + '\n'.join(parts)
    + '</section>'
  )


def grid(*parts: str) -> str:
  """Returns parts side by side, as many as fit."""
  parts = tuple(part for part in parts if part)
  return f'<div class="grid">{"".join(parts)}</div>' if parts else ''


def figure(title: str, drawing: str, *, about: str = '') -> str:
  """Returns a drawing with its title above, and a line below."""
  line = f'<p class="note">{text(about)}</p>' if about else ''
  return (
    f'<figure><figcaption>{text(title)}</figcaption>{drawing}{line}</figure>'
  )


def facts(pairs: Sequence[tuple[str, str, str]]) -> str:
  """Returns large numbers: (name, value, a line below the value)."""
  return (
    '<dl class="facts">'
    + ''.join(
      f'<div><dt>{text(name)}</dt><dd>{text(value)}'
      f'<small>{text(below)}</small></dd></div>'
      for name, value, below in pairs
    )
    + '</dl>'
  )


def table(
  head: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str
) -> str:
  """Returns a table, whose first column names its rows.

  On a phone a row of many columns becomes a list, a line for each cell.

  Args:
    head: the names of the columns.
    rows: of each row, as many cells.
    caption: above the table.
  """
  many = ' class="stacked"' if len(head) > _COLUMNS else ''
  cells = ''.join(f'<th scope="col">{text(name)}</th>' for name in head)
  lines = [
    '<tr>'
    + f'<th scope="row">{text(row[0])}</th>'
    + ''.join(map(_cell, head[1:], row[1:]))
    + '</tr>'
    for row in rows
  ]
  return (
    f'<figure><figcaption>{text(caption)}</figcaption>'
    '<div class="wide" tabindex="0" role="region"'
    f' aria-label="{text(caption)}">'
    f'<table{many}><thead><tr>{cells}</tr></thead>'
    f'<tbody>{"".join(lines)}</tbody></table></div></figure>'
  )


def _cell(column: str, value: Any) -> str:
  # Only long text may break: numbers in two lines are hard to read.
  long = ' class="long"' if len(str(value)) > _LONG else ''
  return f'<td{long} data-column="{text(column)}">{text(value)}</td>'


def folded(title: str, *parts: str) -> str:
  """Returns parts that a click on their title shows."""
  return f'<details><summary>{text(title)}</summary>{"".join(parts)}</details>'


def data(name: str, record: Any) -> str:
  """Returns a JSON record for the page's script.

  Args:
    name: id of the element.
    record: JSON values.
  """
  content = json.dumps(record, separators=(',', ':'), allow_nan=False)
  # So that no text can end the element.
  content = content.replace('<', '\\u003c')
  return f'<script type="application/json" id="{name}">{content}</script>'
