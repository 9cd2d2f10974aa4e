"""docs/reuse.md's lines for the Hub, word for word, against a hub over HTTP.

The hub is a small one of this machine: it keeps what is committed in memory and
answers the addresses that huggingface_hub asks, from Hugging Face's API.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow  # two processes, which import JAX
pytest.importorskip('huggingface_hub')

ROOT = Path(__file__).parents[2]
NAME = 'NAME/digits'


class Hub(ThreadingHTTPServer):
  """One repository of files; `asked` are the requests, in order."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Answers)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.files: dict[str, bytes] = {}
    self.made = False
    self.asked: list[str] = []
    self.tokens: set[str | None] = set()

  @property
  def commit(self):
    digest = hashlib.sha1(usedforsecurity=False)
    for path, content in sorted(self.files.items()):
      digest.update(f'{path}{len(content)}'.encode() + content)
    return digest.hexdigest()


class Answers(BaseHTTPRequestHandler):
  """The part of the API that pushing and loading a model asks for."""

  protocol_version = 'HTTP/1.1'
  server: Hub

  def log_message(self, *_):
    pass

  def answer(self, status, content, **headers):
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
      headers['Content-Type'] = 'application/json'
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def asked(self):
    """Returns the address without its query, and notes it."""
    path = unquote(urlsplit(self.path).path)
    self.server.asked.append(f'{self.command} {path}')
    return path

  def do_POST(self):
    hub, path = self.server, self.asked()
    if 'chunked' in self.headers.get('Transfer-Encoding', ''):
      body = b''
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    else:
      body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    hub.tokens.add(self.headers.get('Authorization'))
    if path == '/api/repos/create':
      given = json.loads(body)
      assert f'{given["organization"]}/{given["name"]}' == NAME
      hub.made = True
      self.answer(200, {'url': f'{hub.url}/{NAME}', 'name': NAME, 'id': 'x'})
    elif path == '/api/validate-yaml':
      self.answer(200, {'errors': [], 'warnings': []})
    elif path == f'/api/models/{NAME}/preupload/main' and hub.made:
      plain = {'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}
      files = [file['path'] for file in json.loads(body)['files']]
      self.answer(200, {'files': [{'path': file, **plain} for file in files]})
    elif path == f'/api/models/{NAME}/commit/main' and hub.made:
      for line in body.splitlines():
        item = json.loads(line)
        if item['key'] == 'file':
          assert item['value']['encoding'] == 'base64'
          content = base64.b64decode(item['value']['content'])
          hub.files[item['value']['path']] = content
      done = f'{hub.url}/{NAME}/commit/{hub.commit}'
      self.answer(200, {'commitUrl': done, 'commitOid': hub.commit})
    else:
      self.answer(404, {'error': f'no {path}'})

  def do_GET(self):
    hub, path = self.server, self.asked()
    commit = {'X_Repo_Commit': hub.commit}
    about = f'/api/models/{NAME}'
    if path in (about, f'{about}/revision/main') and hub.made:
      names = [{'rfilename': name} for name in hub.files]
      self.answer(200, {'id': NAME, 'sha': hub.commit, 'siblings': names})
    elif path.startswith(f'{about}/tree/') and hub.made:
      self.answer(
        200,
        [
          {
            'type': 'file',
            'path': name,
            'size': len(content),
            'oid': etag(content),
          }
          for name, content in hub.files.items()
        ],
        **commit,
      )
    elif match := re.fullmatch(rf'/{NAME}/resolve/(main|\w{{40}})/(.+)', path):
      content = hub.files.get(match[2])
      if content is None:
        self.answer(404, b'', X_Error_Code='EntryNotFound', **commit)
      else:
        self.answer(200, content, ETag=f'"{etag(content)}"', **commit)
    else:
      self.answer(404, {'error': f'no {path}'})

  do_HEAD = do_GET


def etag(content):
  """Returns the name that git gives the content."""
  blob = b'blob %d\0' % len(content) + content
  return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub():
  with Hub() as hub:
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join(30)


def test_the_documented_lines_publish_a_model_and_load_it(
  hub, finished, tmp_path
):
  page = (ROOT / 'docs' / 'reuse.md').read_text('utf-8')
  push, load = re.findall(
    r'```py\n(.*?)```', page.partition('## Publish\n')[2], re.DOTALL
  )
  place = tmp_path / 'runs' / 'digits'
  place.parent.mkdir()
  place.symlink_to(finished.workdir)
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('HF_', 'HUGGING'))
  } | {
    'HF_ENDPOINT': hub.url,
    'HF_HOME': str(tmp_path / 'home'),
    'HF_TOKEN': 'hf_of_a_test',
    'NO_PROXY': '127.0.0.1',
    'PYTHONPATH': str(ROOT),
  }

  def run(code, cwd):
    done = subprocess.run(
      [sys.executable, '-c', code], cwd=cwd, env=environment, timeout=240,
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stderr[-3000:], hub.asked)
    return done.stdout

  run(push, tmp_path)
  assert 'POST /api/repos/create' in hub.asked
  assert hub.tokens == {'Bearer hf_of_a_test'}
  folder = finished.workdir / 'model'
  expected = {
    path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
  }
  assert {'model.json', 'model.safetensors', 'README.md'} <= set(expected)
  assert hub.files == expected  # without arrays/
  # Elsewhere, with nothing but the name.
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  see = """
import hashlib, numpy as np
images = (np.arange(5 * 64).reshape(5, 8, 8, 1) % 256).astype(np.uint8)
print(hashlib.sha256(np.asarray(model.predict(images)).tobytes()).hexdigest())
"""
  loaded = run(load + see, elsewhere)
  local = 'import maskconnect_jax\n'
  local += f'model = maskconnect_jax.load({str(folder)!r})\n'
  assert loaded == run(local + see, elsewhere)
