"""Config files as people write them, and paths as flags."""

import pytest
from absl import flags

from maskconnect_jax import flags as flags_lib
from maskconnect_jax.errors import InputError

HEAD = (
  'from maskconnect_jax import config as config_lib\n'
  'def get_config(word=""):\n'
  '  config = config_lib.default()\n'
  '  config.data.name = word\n'
)


def written(folder, text):
  path = folder / 'my config.py'
  path.write_text(text, encoding='utf-8', newline='')
  return path


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('', 'no get_config()'),
    ('config = 1\n', 'no get_config()'),
    ('get_config = 1\n', 'no get_config()'),
    ('def get_config(:\n', 'line 1'),
    ('raise AttributeError("x")\n', 'line 1: AttributeError: x'),
    ('x = 1\n  y = 2\n', 'line 2'),
    ('a = "\0"\n', ''),
    ('import no_such_module\n', 'line 1: ModuleNotFoundError: No module named'),
    ('1 / 0\n', 'line 1: ZeroDivisionError'),
    (HEAD, 'get_config() returns None'),
    ('def get_config():\n  return {"batch_size": 4}\n', 'returns a dict'),
    (
      HEAD + '  open("/no/such/file")\n  return config\n',
      'line 5: FileNotFound',
    ),
    (HEAD + '  config.batch_size = "many"\n  return config\n', "'batch_size'"),
    (HEAD + '  config.batch_size = 12.5\n  return config\n', "'batch_size'"),
    (HEAD + '  config.duration = 30\n  return config\n', "'duration'"),
    (HEAD + '  config.data = 30\n  return config\n', "'data'"),
    (HEAD + '  config.nothing.here = 3\n  return config\n', 'nothing'),
    (HEAD + '  return config.lr\n', 'line 5: AttributeError'),
    ('import sys\ndef get_config():\n  sys.exit(3)\n', 'line 3: SystemExit: 3'),
    ('def get_config():\n  return get_config()\n', 'RecursionError'),
    ('def get_config():\n  raise ValueError("a\\nb")\n', 'ValueError: a b)'),
  ],
)
def test_files_that_are_no_config(text, says, tmp_path):
  path = written(tmp_path, text)
  with pytest.raises(InputError) as error:
    flags_lib.ConfigParser().parse(str(path))
  message = str(error.value)
  assert message.startswith(f'--config={path} is no config file (')
  assert says in message
  assert '\n' not in message


@pytest.mark.parametrize(
  'text',
  [
    HEAD + '  return config\n',
    '\ufeff' + HEAD + '  return config\n',
    (HEAD + '  # é\n  return config\n').replace('\n', '\r\n'),
    HEAD + "  config.optimizer.steps_at = ['30%']\n  return config\n",
    HEAD
    + '  import ml_collections as m\n  return m.FrozenConfigDict(config)\n',
  ],
)
def test_files_that_are(text, tmp_path):
  path = written(tmp_path, text)
  config = flags_lib.ConfigParser().parse(str(path))
  assert config.batch_size == 128
  assert config.is_locked
  config.batch_size = 4  # as an override does
  assert flags_lib.ConfigParser().parse(f'{path}:idx').data.name == 'idx'


def test_a_word_that_a_file_does_not_know_is_one_line(tmp_path):
  path = written(
    tmp_path,
    HEAD + '  raise config_lib.InputError(f"there is no {word!r};\\ngive a")\n',
  )
  with pytest.raises(InputError) as error:
    flags_lib.ConfigParser().parse(f'{path}:b')
  assert str(error.value) == f"--config={path}:b: there is no 'b'; give a"


def test_shipped_configs_are_found_in_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  parse = flags_lib.ConfigParser().parse
  (tmp_path / 'digits').mkdir()  # as images may lie in it
  for name in ('digits', 'digits.py', 'configs/digits.py', 'configs/digits'):
    assert parse(name).data.source == 'digits'
  assert parse('cifar:100,branch').model.name == 'resnext29_8x8d'
  assert parse('cifar10').connectivity.fan_in == 10
  (tmp_path / 'configs').mkdir()
  written(tmp_path, HEAD + '  return config\n').rename('configs/digits.py')
  assert parse('configs/digits.py').data.name == ''  # one's own comes first
  assert parse('digits').connectivity.fan_in == 3
  for name in ('other/digits.py', './none', 'digits.json', str(tmp_path / 'x')):
    with pytest.raises(InputError, match='there is no such file'):
      parse(name)
  with pytest.raises(InputError, match='brings cifar, cifar10, digits, '):
    parse('configs/cifar100.py')


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('cifar:20', "there is no '20'; give 10 or 100, then branch, as_published"),
    ('cifar:100,leaf', "there is no '100,leaf'; give"),
    ('imagenet:leaf', "there is no 'leaf'; give block or branch"),
    ('mini_imagenet:', "there is no ''; give block or branch"),
    ('study:cpu-branch', "there is no part 'cpu-branch'; give learners"),
  ],
)
def test_words_that_the_shipped_configs_do_not_know(name, says):
  with pytest.raises(InputError) as error:
    flags_lib.ConfigParser().parse(name)
  assert str(error.value).startswith(f'--config={name}: {says}')


def test_a_config_file_of_any_name_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  written(tmp_path, HEAD + '  return config\n').rename(tmp_path / 'plain')
  assert flags_lib.ConfigParser().parse('~/plain').batch_size == 128


@pytest.mark.parametrize('name', ['none.py', '', '.', '~/none.py', 'x' * 300])
def test_no_config_file(name):
  with pytest.raises(InputError, match='--config='):
    flags_lib.ConfigParser().parse(name)


def test_path_flags_are_paths(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  values = flags.FlagValues()
  holder = flags.DEFINE(
    flags_lib.PathParser(), 'out', None, 'help', flag_values=values
  )
  values(['program', '--out=~/a b'])
  assert holder.value == tmp_path / 'a b'
  for bad in ('', 'a\0b', 'x' * 256, '~no such user/x'):
    with pytest.raises(flags.IllegalFlagValueError, match='--out='):
      values(['program', f'--out={bad}'])
