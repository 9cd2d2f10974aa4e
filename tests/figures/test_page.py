"""All pictures alike: their files, bytes, colours and text."""

import errno
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from maskconnect_jax.errors import InputError
from maskconnect_jax.figures import dynamics, masks, page, topology


def figures(wired, seed=0):
  real = np.random.default_rng(seed).random((4, 6, 6))
  common = {'stages': wired.stages, 'title': 'six blocks'}
  yield (
    'topology',
    topology.topology_figure(wired.sources, live=wired.live, **common),
  )
  yield 'mask', masks.mask_figure(real[-1], wired.sources, **common)
  yield (
    'history',
    dynamics.history_figure([0, 10, 20, 40], real, wired.sources, **common),
  )


def an_empty_page(**settings):
  return page.Page(200, 100, 'a title', 'a subtitle', **settings).figure


def test_save_writes_both_files_and_nothing_else(tmp_path):
  figure = an_empty_page()
  # A dot in the name is no suffix to be replaced.
  paths = page.save(figure, tmp_path / 'new' / 'run.v1')
  assert [p.name for p in paths] == ['run.v1.png', 'run.v1.svg']
  assert sorted(tmp_path.rglob('*.*')) == paths
  assert paths[0].read_bytes().startswith(b'\x89PNG')
  assert page.save(figure, str(tmp_path / 'new' / 'run.v1')) == paths
  assert sorted(tmp_path.rglob('*.*')) == paths


def test_save_that_fails_is_one_line_and_leaves_the_old_file_alone(
  tmp_path, monkeypatch
):
  old = tmp_path / 'topology.png'
  old.write_bytes(b'old')

  def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(page.files.os, 'replace', fail)
  with pytest.raises(InputError, match='No space left') as raised:
    page.save(an_empty_page(), tmp_path / 'topology')
  assert str(raised.value).startswith(f'{old} cannot be written')
  assert '\n' not in str(raised.value)
  assert list(tmp_path.iterdir()) == [old]
  assert old.read_bytes() == b'old'


def test_a_file_where_the_folder_belongs_is_one_line(tmp_path):
  (tmp_path / 'figures').write_text('')
  with pytest.raises(InputError, match='figures is a file, not a folder'):
    page.save(an_empty_page(), tmp_path / 'figures' / 'topology')


def test_what_a_killed_process_left_is_written_over(tmp_path):
  for suffix in ('png', 'svg'):
    (tmp_path / f'.topology.{suffix}.tmp').write_bytes(b'half')
  paths = page.save(an_empty_page(), tmp_path / 'topology')
  assert sorted(tmp_path.iterdir()) == paths


def test_equal_input_gives_equal_bytes_whatever_the_users_style(
  tmp_path, six_blocks
):
  def save_all(folder):
    saved = [
      page.save(figure, tmp_path / folder / name)
      for name, figure in figures(six_blocks)
    ]
    return [path.read_bytes() for pair in saved for path in pair]

  first = save_all('a')
  with matplotlib.rc_context(
    {
      'svg.hashsalt': None,
      'font.size': 30,
      'figure.facecolor': 'black',
      'savefig.bbox': 'tight',
    }
  ):
    before = dict(matplotlib.rcParams)
    assert save_all('b') == first
    assert dict(matplotlib.rcParams) == before
  assert len(set(first)) == len(first)
  other = dict(figures(six_blocks, seed=1))['mask']
  changed = [path.read_bytes() for path in page.save(other, tmp_path / 'c')]
  assert not set(changed) & set(first)


def test_saving_a_figure_twice_gives_equal_bytes(tmp_path, six_blocks):
  figure = dict(figures(six_blocks))['mask']
  once = page.save(figure, tmp_path / 'once')
  again = page.save(figure, tmp_path / 'again')
  for a, b in zip(once, again, strict=True):
    assert a.read_bytes() == b.read_bytes()


def test_title_is_text_and_not_mathematics(svg_of):
  title = 'K = $3$, r_0 <&> 50 %'
  figure = topology.topology_figure(
    [[0], [0]], stages=[0, 0], live=[True, True], title=title
  )
  assert svg_of(figure)[1].count(title) == 1


def luminance(color):
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in colors.to_rgb(color)
  ]
  return np.dot(linear, (0.2126, 0.7152, 0.0722))


def contrast(one, other):
  """As the Web Content Accessibility Guidelines 2.1 define it."""
  low, high = sorted(map(luminance, (one, other)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
  'theme', [page.LIGHT, page.DARK], ids=['light', 'dark']
)
def test_a_theme_can_be_read_on_its_paper(theme, tmp_path):
  assert contrast(theme.ink, theme.paper) > 7
  assert contrast(theme.soft, theme.paper) > 4.5
  for tint in theme.tints[:3]:  # nearly all networks have three stages
    assert contrast(tint, theme.paper) > 3
  for stage, tint in enumerate(theme.tints):
    assert contrast(theme.number(stage), tint) >= 4.5
  assert [theme.tint(stage) for stage in (0, 6)] == [theme.tints[0]] * 2
  path = page.save(an_empty_page(theme=theme), tmp_path / 'page')[0]
  with Image.open(path) as image:
    corner = np.array(image.convert('RGB'))[0, 0] / 255
  np.testing.assert_allclose(corner, colors.to_rgb(theme.paper), atol=0.002)


def test_imports_neither_jax_nor_pyplot():
  code = (
    'import sys; from maskconnect_jax.figures import'
    ' dynamics, masks, page, summary, topology;'
    'sys.exit(str({"jax", "matplotlib.pyplot"} & set(sys.modules)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], check=False, capture_output=True, text=True
  )
  assert done.stderr.strip() == 'set()'
