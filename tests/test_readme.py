"""Python, commands and links of the README and docs, as a reader uses them.

Python is run. Commands are not: they are read by the parser of the program
that they start, so that a page which names a flag, a config field, a script or
a make target that does not exist fails.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import errno
import functools
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax import flags
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import export
from maskconnect_jax.study import sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
WITH_COMMANDS = [
  *PAGES,
  ROOT / 'CONTRIBUTING.md',
  ROOT / 'benchmarks/README.md',
]
OURS = ('maskconnect_jax.main', 'maskconnect_jax')  # after python -m
# Programs of others, whose arguments are theirs.
OTHERS = {'curl', 'export', 'source', 'gcloud', 'kubectl'}


def blocks_of(language: str) -> dict[str, str]:
  """The code blocks of a language, by page and number."""
  return {
    f'{page.name}-{number}': code
    for page in PAGES
    for number, code in enumerate(
      re.findall(
        rf'```{language}\n(.*?)```', page.read_text('utf-8'), re.DOTALL
      )
    )
  }


BLOCKS = blocks_of('python')
OTHER_BLOCKS = blocks_of('py')


@pytest.mark.parametrize('name', BLOCKS)
def test_python_block_runs(name, tmp_path, monkeypatch, finished, capsys):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'digits').symlink_to(finished.workdir)
  (tmp_path / 'docs').symlink_to(ROOT / 'docs')
  monkeypatch.chdir(tmp_path)
  exec(compile(BLOCKS[name], name, 'exec'), {})
  if name.startswith('results.md'):
    # The comments at the end are what is printed, from docs/results alone.
    told = re.search(r'((?:^# .*\n)+)\Z', BLOCKS[name], re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    assert told
    assert '; '.join(re.findall('# (.*)', told[1])) == '; '.join(printed)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_file_and_heading_it_links_to_is_there(page):
  links = re.findall(r'\]\((?!http)([^)]+)\)', page.read_text('utf-8'))
  for link in links:
    path, _, heading = link.partition('#')
    target = page.parent / path if path else page
    assert target.exists(), link
    if heading:
      titles = re.findall(r'^#+ (.*)$', target.read_text('utf-8'), re.MULTILINE)
      anchors = [
        re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')
        for title in titles
      ]
      assert heading in anchors, link


def test_there_are_links_and_blocks():
  assert len(BLOCKS) >= 4
  assert '](docs/' in PAGES[0].read_text('utf-8')


def test_every_config_it_names_is_there():
  for page in PAGES:
    text = page.read_text('utf-8')
    for name in set(re.findall(r'configs/\w+\.py', text)):
      assert (ROOT / name).exists(), (page.name, name)


def commands_of(text: str) -> list[list[str]]:
  """The words of every command in the code blocks and code spans of a page."""
  lines = []
  for language, code in re.findall(
    r'^ *```(\w*)\n(.*?)^ *```', text, re.DOTALL | re.MULTILINE
  ):
    if language in ('', 'bash', 'sh'):
      lines += re.sub(r'\\\n', ' ', code).splitlines()
  prose = re.sub(r'^ *```.*?^ *```', '', text, flags=re.DOTALL | re.MULTILINE)
  lines += [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose)]
  found = []
  for line in lines:
    if not re.match(
      r'\s*([A-Z_]+=\S+ )*(python3? |maskconnect |make |bash |launch/\w|sbatch '
      r'|pip |curl |export |source |--config=)',
      line,
    ):
      continue
    parts: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
      if word in ('&&', '|', ';'):
        parts.append([])
      elif parts[-1] or not re.fullmatch(r'[A-Z_]+=.*', word):
        parts[-1].append(word)  # without variables before a command
    found += filter(None, parts)
  return found


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
  """The parser of a program in benchmarks/, which ends where it would parse."""

  class Found(Exception):
    pass

  def parse(self, *_):
    raise Found(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / 'benchmarks'))
    patch.setattr(sys, 'argv', [script])
    # Loading PyTorch takes seconds, and it may be missing.
    for name in ('torch', 'torch_network', 'torchvision', 'timm'):
      patch.setitem(sys.modules, name, mock.MagicMock())
    patch.setattr(argparse.ArgumentParser, 'parse_args', parse)
    with pytest.raises(Found) as found:
      runpy.run_path(str(ROOT / 'benchmarks' / script), run_name='__main__')
  return found.value.args[0]


def check_run(arguments: list[str]) -> None:
  """Reads the arguments of the main program as it does itself."""
  given = [word for word in arguments if not word.endswith('...')]
  # RUN, DIR or N stand for what the reader has; a number must be one.
  given = [re.sub('=N$', '=4', word) for word in given]
  argv = ['main.py', *given]
  # ml_collections looks for overrides of the config in sys.argv.
  with flagsaver.flagsaver(), mock.patch.object(sys, 'argv', argv):
    assert flags.parse(argv, '') == ['main.py'], arguments
    if (config := flags.CONFIG.value) is not None:
      config_lib.check(config)
      for variant in config.variants:
        sweep.parse_variant(variant)


def check_command(words: list[str]) -> None:
  """Fails if a command names what does not exist, or would not be parsed."""
  program, *rest = words
  if program in ('maskconnect', '--config') or program.startswith('--config='):
    check_run(rest if program == 'maskconnect' else words)
  elif program in ('python', 'python3') and rest[:1] == ['-m']:
    if rest[1] in OURS:
      check_run(rest[2:])
    else:
      assert rest[1] in ('venv', 'pytest'), words
  elif program in ('python', 'python3') and rest[0].startswith('benchmarks/'):
    parser_of(Path(rest[0]).name).parse_args(rest[1:])
  elif program in ('python', 'python3'):
    assert rest[0] == '-c', words
    compile(rest[1], 'command', 'exec')
  elif program == 'make':
    targets = re.findall(r'^\.PHONY: (\w+)$', (ROOT / 'Makefile').read_text(),
                         re.MULTILINE)  # fmt: skip
    assert {word for word in rest if '=' not in word} <= {*targets}, words
  elif program in ('bash', 'sbatch') or program.startswith('launch/'):
    at = next(at for at, word in enumerate(words) if '/' in word)
    assert (ROOT / words[at]).is_file(), words
    if words[at].startswith('launch/'):
      check_run([w for w in words[at + 1 :] if w.startswith('--config')])
  elif program == 'pip':
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for word in rest:
      if extras := re.fullmatch(r'(?:maskconnect_jax|\.)\[(.*)\]', word):
        assert {*extras[1].split(',')} <= {*setup['options.extras_require']}
  else:
    assert program in OTHERS, words


@pytest.mark.parametrize('page', WITH_COMMANDS, ids=lambda page: page.name)
def test_every_command_would_be_parsed(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for words in commands_of(page.read_text('utf-8')):
    try:
      check_command(words)
    except (InputError, SystemExit, StopIteration) as error:
      pytest.fail(f'{shlex.join(words)}: {error}')


@pytest.mark.parametrize('page', WITH_COMMANDS, ids=lambda page: page.name)
def test_every_flag_and_field_that_prose_names_is_there(page):
  fields = config_lib.FIELDS
  scripts = ''.join(
    path.read_text('utf-8')
    for folder in ('benchmarks', 'launch')
    for path in (ROOT / folder).iterdir()
    if path.is_file()
  )
  prose = re.sub(r'```.*?```', '', page.read_text('utf-8'), flags=re.DOTALL)
  for span in re.findall(r'`([^`]+)`', prose):
    for name in re.findall(r'(?:^|\s)--([\w.-]+)', span):
      if name.startswith(('config.', 'xla_')):
        continue
      ours = name in absl_flags.FLAGS or name.partition('.')[0] == 'config'
      assert ours or f'--{name}' in scripts, span
    for name in re.findall(r'(?:^|[\s-])config\.([a-z_.0-9]+)', span):
      path = name.rstrip('.')
      known = path in fields or any(f.startswith(f'{path}.') for f in fields)
      assert known or path.endswith(('json', 'py')), span
    changed = re.fullmatch(
      r'((?:connectivity|data|masks|optimizer|model)\.\w+)=.*', span
    )
    assert not changed or changed[1] in fields, span


def messages_of_the_code() -> list[str]:
  """Every text of the package, '…' for each value that it is filled with."""
  found = [os.strerror(errno.ENOSPC)]
  for path in (ROOT / 'maskconnect_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
      if isinstance(node, ast.JoinedStr):
        found.append(
          ''.join(
            str(part.value) if isinstance(part, ast.Constant) else '…'
            for part in node.values
          )
        )
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def test_every_error_that_the_docs_name_is_in_the_code():
  page = (ROOT / 'docs' / 'errors.md').read_text('utf-8')
  named = re.findall(r'^\| `([^`]+)` \|', page, re.MULTILINE)
  assert len(named) >= 12
  messages = '\n'.join(messages_of_the_code())
  for error in named:
    # What is wrong and what to do may be in two parts of the code.
    for part in re.split('…|; ', error):
      assert part.strip() in messages, (error, part)


@pytest.mark.parametrize('name', OTHER_BLOCKS)
def test_python_that_is_not_run_compiles(name):
  """Slow tests run them: the next one, and that of tests/run/test_hub.py."""
  compile(OTHER_BLOCKS[name], name, 'exec')


@pytest.mark.slow
@pytest.mark.parametrize(
  'told', ["data.source = 'arrays'", 'import onnxruntime']
)
def test_python_that_takes_longer_runs(told, tmp_path, monkeypatch, finished):
  (code,) = (code for code in OTHER_BLOCKS.values() if told in code)
  monkeypatch.chdir(tmp_path)
  if 'onnx' in told:
    pytest.importorskip('jax2onnx')
    export.write(
      maskconnect_jax.load(finished.workdir), 'onnx', tmp_path / 'digits.onnx'
    )
  found: dict[str, Any] = {}
  exec(compile(code, told, 'exec'), found)
  if 'onnx' in told:
    assert found['logits'].shape == (2, 10)
  else:
    assert (tmp_path / 'runs/mine/report.html').is_file()


def test_wrong_commands_are_seen():
  for line in (
    'make demmo', 'maskconnect --mode=trian', 'maskconnect --fallow',
    'maskconnect --config=digits --config.connectivity.fanin=3',
    'maskconnect --config=digits --config.connectivity.fan_in=many',
    'maskconnect --config=digits --config.connectivity.rule=best',
    "maskconnect --config=digits --config.variants='rule=learned'",
    'maskconnect --config=configs/digit.py', 'launch/gpus.sh --config=digits',
    'python benchmarks/step_time.py --batchsize=8',
    'python benchmarks/times.py',
    "pip install 'maskconnect_jax[gpus]'", 'rm -r runs',
  ):  # fmt: skip
    with pytest.raises((InputError, SystemExit, AssertionError, OSError)):
      check_command(shlex.split(line))


def test_the_code_beside_each_equation_is_there():
  """Names like `connectivity.draw`, in the file that they link to."""
  page = (ROOT / 'docs' / 'method.md').read_text('utf-8')
  named = re.findall(r'\[`(\w+)\.(\w+)`\]\(\.\./([\w/]+\.py)\)', page)
  assert len(named) >= 12
  for module, name, path in named:
    assert Path(path).stem == module
    body = ast.parse((ROOT / path).read_text('utf-8')).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert name in {one.name for one in body if isinstance(one, kinds)}
