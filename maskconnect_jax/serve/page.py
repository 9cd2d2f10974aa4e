"""The page at /, on which a browser uploads images. It loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import html

_SCRIPT = """
const form = document.querySelector('form'), out = document.querySelector('ol');
const say = (text) => {
  const line = document.createElement('li');
  line.textContent = text;
  out.append(line);
};
form.addEventListener('submit', async (event) => {
  event.preventDefault();
  out.replaceChildren();
  try {
    const answer = await fetch('predict', {
      method: 'POST', body: new FormData(form),
    });
    const found = await answer.json();
    if (found.error) say(found.error);
    for (const one of found.predictions ?? []) {
      const best = one.labels?.map((name) => [name, one.probabilities[name]])
        ?? [[one.class, one.probability]];
      const listed = best.map(([name, p]) => `${name}, ${p.toFixed(3)}`);
      say(`${one.image}: ${listed.join('; ') || 'no label'}`);
    }
  } catch (error) { say(String(error)); }
});
"""
_STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; color-scheme: light dark;
       max-width: 40rem; margin: 3rem auto; padding: 0 1rem; }
"""


def _hash(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


# What the browser may load and run: this page's own script and style.
POLICY = (
  f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)};"
  " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri"
  " 'none'"
)


def of(name: str, num_classes: int, multi_label: bool) -> str:
  """Returns the page.

  Args:
    name: the network's name.
    num_classes: number of classes.
    multi_label: whether an image gets any number of them.
  """
  kind = 'any' if multi_label else 'one'
  title = html.escape(name)
  return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{_STYLE}</style>
<h1>{title}</h1>
<p>Give images; each gets {kind} of {num_classes:,} classes.</p>
<form action="predict" method="post" enctype="multipart/form-data">
<label>Images
<input type="file" name="images" accept="image/*" multiple required></label>
<button>Classify</button>
</form>
<ol aria-live="polite"></ol>
<script>{_SCRIPT}</script>
</html>
"""
