"""The service over real sockets of this machine: answers, refusals, its end."""

import base64
import contextlib
import copy
import hashlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import prometheus_client.parser
import pytest
import sklearn.datasets
from PIL import Image

import maskconnect_jax
from maskconnect_jax.run import cores, inference
from maskconnect_jax.serve import server
from maskconnect_jax.serve.app import Limits

DIGITS = np.rint(sklearn.datasets.load_digits().images * 255 / 16).astype(
  np.uint8
)
SHORT = Limits(
  body_bytes=20_000,
  images=3,
  batch=8,
  head_seconds=0.5,
  body_seconds=0.5,
  answer_seconds=20,
  ending_seconds=5,
)


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'png')
  return file.getvalue()


@pytest.fixture(scope='module')
def model(finished):
  return maskconnect_jax.load(finished.workdir)


@contextlib.contextmanager
def served(model, limits):
  """Yields the port of a service in a thread."""
  begun = threading.Event()
  with server.listen('127.0.0.1', 0) as listening:
    port = listening.getsockname()[1]
    running = server.of(model, limits, begun.set)
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
      assert begun.wait(30)
      yield port
    finally:
      running.should_exit = True
      thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope='module')
def port(model):
  with served(model, SHORT) as port:
    yield port


def ask(port, method='POST', path='/predict', body=None, **headers):
  """Returns status, headers and content of an answer."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
  with contextlib.closing(connection):
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_no_answer_waits_for_an_acknowledgement(port):
  """A second request of a connection would, for 40 ms at least."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
  seconds = []
  with contextlib.closing(connection):
    for _ in range(10):
      start = time.perf_counter()
      connection.request('POST', '/predict', GOOD)
      assert connection.getresponse().read()
      seconds.append(time.perf_counter() - start)
  assert min(seconds[1:]) < 0.03


def form(*parts, boundary='xyz'):
  """Returns body and headers of a form; a part is (filename, content)."""
  body = b''
  for name, content in parts:
    file = f'; filename="{name}"' if name is not None else ''
    body += (
      f'--{boundary}\r\nContent-Disposition: form-data; name="images"{file}'
      '\r\n\r\n'
    ).encode()
    body += content + b'\r\n'
  kind = f'multipart/form-data; boundary={boundary}'
  return body + f'--{boundary}--\r\n'.encode(), {'content-type': kind}


def test_answers_of_requests_that_come_together_equal_single_ones(port, model):
  expected = model.predict(DIGITS[:24])
  with ThreadPoolExecutor(12) as threads:
    found = list(
      threads.map(lambda image: ask(port, body=png(image)), DIGITS[:24])
    )
  for (status, headers, content), row in zip(found, expected, strict=True):
    assert status == 200, content
    assert headers['content-type'] == 'application/json'
    (one,) = json.loads(content)['predictions']
    assert one['image'] == 'the image'
    assert one['class'] == str(row.argmax())
    assert one['probability'] == max(one['probabilities'].values())
    np.testing.assert_allclose(
      list(one['probabilities'].values()), row, atol=1e-6
    )


def test_several_images_in_a_form(port, model):
  body, headers = form(
    ('a.png', png(DIGITS[0])), ('b\\"é.png', png(DIGITS[1])), (None, b'a note')
  )
  status, _, content = ask(port, body=body, **headers)
  assert status == 200, content
  first, second = json.loads(content)['predictions']
  assert first['image'] == 'a.png'
  for one, row in zip((first, second), model.predict(DIGITS[:2]), strict=True):
    np.testing.assert_allclose(
      list(one['probabilities'].values()), row, atol=1e-6
    )


def bomb(side):
  """A PNG of side x side pixels whose header alone is whole."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data).to_bytes(4, 'big')
    return len(data).to_bytes(4, 'big') + kind + data + crc

  size = side.to_bytes(4, 'big') * 2
  rows = zlib.compress(bytes(10**6), 9)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', size + bytes([8, 0, 0, 0, 0]))
    + chunk(b'IDAT', rows)
    + chunk(b'IEND', b'')
  )


def icon(content):
  """An ICO of 8 x 8 pixels by its header, which holds a PNG."""
  return (
    struct.pack('<3H4B2H2I', 0, 1, 1, 8, 8, 0, 0, 1, 8, len(content), 22)
    + content
  )


GOOD = png(DIGITS[0])


@pytest.mark.parametrize(
  ('request_', 'status', 'says'),
  [
    ({'body': b''}, 400, 'the image is empty; send an image file'),
    ({'body': b'{"image": 1}'}, 400, 'not an image that Pillow can read'),
    ({'body': GOOD[:-30]}, 400, 'is damaged or cut short'),
    ({'body': bomb(6_000)}, 400, 'image has more than 32,000,000 pixels; send'),
    ({'body': icon(bomb(9_000))}, 400, 'image has more than 32,000,000 pix'),
    ({'body': bytes(20_001)}, 413, 'the body has more than 20,000 bytes'),
    ({'body': iter([bytes(9_000)] * 3)}, 413, 'more than 20,000 bytes'),
    ({'form': []}, 400, 'the form holds no file'),
    ({'form': [(None, b'text')]}, 400, 'the form holds no file'),
    ({'form': [('a.png', b'')]}, 400, 'a.png is empty; send an image file'),
    ({'form': [('a\tb', b'x')]}, 400, 'an image that Pillow can read'),
    ({'form': [('a.png', GOOD), ('b.png', b'x')]}, 400, 'b.png: is not an'),
    ({'form': [('a.png', GOOD)] * 4}, 400, 'Too many files. Maximum'),
    ({'body': b'x', 'content-type': 'multipart/form-data'}, 400, 'oundary'),
    (
      {'body': b'xx', 'content-type': 'multipart/form-data; boundary=y'},
      400,
      '',
    ),
    ({'method': 'GET'}, 405, 'Method Not Allowed'),
    ({'path': '/other'}, 404, 'Not Found'),
  ],
)
def test_bad_input_is_refused_in_one_line(request_, status, says, port):
  if 'form' in request_:
    body, headers = form(*request_.pop('form'))
    request_ |= {'body': body} | headers
  found, headers, content = ask(port, **request_)
  error = json.loads(content)['error']
  assert (found, says in error) == (status, True), error
  assert '\n' not in error
  assert headers['content-type'] == 'application/json'
  assert ask(port, body=GOOD)[0] == 200


def test_a_lower_bound_of_the_model_holds(model):
  own = copy.copy(model)
  shape = model.record['preprocessing']
  own.record = model.record | {'preprocessing': shape | {'max_pixels': 63}}
  before = Image.MAX_IMAGE_PIXELS
  with served(own, SHORT) as port:
    body, headers = form(('a.png', GOOD))
    status, _, content = ask(port, body=body, **headers)
  assert status == 400
  says = 'a.png has more than 63 pixels; send it smaller'
  assert json.loads(content) == {'error': says}
  assert before == Image.MAX_IMAGE_PIXELS  # of the process
  assert model.prepare(GOOD).shape == (8, 8, 1)  # not of the service


def test_few_images_are_decoded_at_a_time(model, monkeypatch):
  """However many cores there are: each image may take much memory."""
  monkeypatch.setattr(cores, 'available', lambda: 64)
  lock, running, most = threading.Lock(), 0, 0
  prepare = inference.Classifier.prepare

  def counted(self, content):
    nonlocal running, most
    with lock:
      running += 1
      most = max(most, running)
    time.sleep(0.05)
    found = prepare(self, content)
    with lock:
      running -= 1
    return found

  monkeypatch.setattr(inference.Classifier, 'prepare', counted)
  body, headers = form(*[('a.png', GOOD)] * 12)
  with served(model, Limits(batch=1)) as port:
    assert ask(port, body=body, **headers)[0] == 200
  assert most == 4


def test_no_image_may_wait_where_none_may(model):
  limits = Limits(waiting=0, batch=1)
  with served(model, limits) as port:
    status, headers, content = ask(port, body=GOOD)
  assert status == 503
  assert headers['retry-after'] == '1'
  assert 'too many images are waiting' in json.loads(content)['error']


@contextlib.contextmanager
def connected(port):
  with socket.create_connection(('127.0.0.1', port), 30) as connection:
    yield connection


def test_a_slow_head_is_cut(port):
  with connected(port) as slow, connected(port) as idle:
    began = time.monotonic()
    slow.sendall(b'POST /predict HT')
    assert slow.recv(100) == b''
    assert idle.recv(100) == b''
    assert 0.3 < time.monotonic() - began < 20


def test_a_slow_body_is_cut_and_does_not_hold_the_others(port):
  with connected(port) as slow:
    slow.sendall(
      b'POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n123'
    )
    assert ask(port, body=GOOD)[0] == 200
    answer = b''
    while part := slow.recv(1000):
      answer += part
  assert answer.startswith(b'HTTP/1.1 408 ')
  assert b'the body did not arrive within 0.5 s' in answer


def test_a_client_that_goes_leaves_no_trace(port, capsys):
  with connected(port) as gone:
    gone.sendall(
      b'POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n123'
    )
  assert ask(port, body=GOOD)[0] == 200
  assert 'Traceback' not in capsys.readouterr().err


def test_health_metrics_and_page(port):
  status, _, content = ask(port, 'GET', '/health')
  assert status == 200
  assert json.loads(content) == {
    'status': 'ok', 'model': 'resnet8', 'classes': 10,
    'image_shape': [8, 8, 1],
  }  # fmt: skip

  def answered():
    text = ask(port, 'GET', '/metrics')[2].decode()
    families = prometheus_client.parser.text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    by_name = {(s.name, *s.labels.values()): s.value for s in samples}
    assert by_name['maskconnect_waiting_images',] == 0
    return (
      by_name.get(('maskconnect_requests_total', '/predict', '200'), 0),
      by_name['maskconnect_batch_images_sum',],
    )

  before = answered()
  assert ask(port, body=GOOD)[0] == 200
  assert answered() == (before[0] + 1, before[1] + 1)

  status, headers, content = ask(port, 'GET', '/')
  text = content.decode()
  assert status == 200
  assert 'type="file"' in text
  for tag in ('script', 'style'):
    (inner,) = re.findall(f'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inner.encode()).digest())
    assert (
      f"{tag}-src 'sha256-{digest.decode()}'"
      in (headers['content-security-policy'])
    )
  assert 'http' not in re.sub('<!doctype html>', '', text)  # loads nothing


def half_sent(port, stop):
  """Sends a request whose second half follows a signal; returns the answer."""
  while True:
    with contextlib.suppress(OSError):
      if ask(port, 'GET', '/health')[0] == 200:
        break
    time.sleep(0.1)
  with connected(port) as connection:
    connection.sendall(
      b'POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s'
      % (len(GOOD), GOOD[:20])
    )
    time.sleep(0.3)
    stop()
    time.sleep(0.5)
    connection.sendall(GOOD[20:])
    return connection.recv(10_000)


def test_sigterm_lets_a_request_end(finished, cli):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
  with ThreadPoolExecutor(1) as thread:
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    answer = thread.submit(half_sent, port, stop)
    ran = cli('--mode=serve', f'--workdir={finished.workdir}', f'--port={port}')
    assert answer.result(30).startswith(b'HTTP/1.1 200 ')
  assert ran.code == 143
  assert ran.out == f'serving at http://127.0.0.1:{port}\n'
  assert ran.err == ''


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_process_of_its_own_ends_alike(number, status, finished):
  program = subprocess.Popen(
    [
      sys.executable, '-m', 'maskconnect_jax.main', '--mode=serve',
      f'--workdir={finished.workdir}', '--port=0',
    ],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  with program:
    try:
      line = program.stdout.readline()
      match = re.fullmatch(r'serving at http://127\.0\.0\.1:(\d+)\n', line)
      assert match, (line, program.stderr.read())
      answer = half_sent(int(match[1]), lambda: program.send_signal(number))
      assert answer.startswith(b'HTTP/1.1 200 '), answer
      assert program.wait(30) == status
      assert program.stderr.read() == ''
    finally:
      program.kill()


def test_a_port_that_is_taken_is_one_line(cli, finished, port):
  ran = cli('--mode=serve', f'--workdir={finished.workdir}', f'--port={port}')
  assert ran.code == 2
  assert f'--port={port} cannot be listened at: Address already' in ran.err
  assert ran.err.count('\n') == 1


@pytest.mark.slow
def test_ten_thousand_requests_of_64_clients(model):
  def client(number):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    right = 0
    with contextlib.closing(connection):
      for _ in range(10_000 // 64 + (number < 10_000 % 64)):
        connection.request('POST', '/predict', GOOD)
        answer = connection.getresponse()
        (row,) = json.loads(answer.read())['predictions']
        right += (answer.status, row['class']) == (200, expected)
    return right

  expected = model.classes[model.predict(DIGITS[:1])[0].argmax()]
  with served(model, Limits()) as port, ThreadPoolExecutor(64) as pool:
    assert sum(pool.map(client, range(64))) == 10_000
