"""The service: what each address answers, and what a request may cost.

  POST /predict   classes of one image (the body) or of several (multipart)
  GET  /          a page to upload images
  GET  /health    whether it answers, and which model it is
  GET  /metrics   counts and times, as Prometheus reads them

Starlette, and not FastAPI: requests are images and not JSON, so there is no
schema that pydantic could check, and half of the packages are enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskconnect_jax import files, names
from maskconnect_jax.data import image_headers
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import cores, inference
from maskconnect_jax.serve import page
from maskconnect_jax.serve.batcher import Batcher, BusyError

# An answer that leaves a part of the body unread ends the connection. Otherwise
# a slow client could hold it.
_CLOSE = {'connection': 'close'}
_DECODERS = 4  # images that are decoded at a time: each may take 0.2 GB
_PATHS = ('/', '/health', '/metrics', '/predict')


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may cost, and how many may wait.

  Attributes:
    body_bytes: of the body of a request.
    images: in a request.
    pixels: of an image; fewer if the model's own bound is lower.
    batch: images in a forward pass.
    waiting: images that wait for a forward pass.
    head_seconds: in which the head of a request must arrive.
    body_seconds: in which its body must arrive.
    answer_seconds: from the whole body to the answer.
    connections: at the same time; more get status 503.
    ending_seconds: in which requests under way end after a signal.
  """

  body_bytes: int = 16 * 2**20
  images: int = 32
  pixels: int = 32_000_000
  batch: int = 32
  waiting: int = 512
  head_seconds: float = 10
  body_seconds: float = 30
  answer_seconds: float = 30
  connections: int = 256
  ending_seconds: int = 15


class Metrics:
  """The numbers at /metrics, of one service."""

  def __init__(self) -> None:
    self.registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      'maskconnect_requests', 'Requests answered.', ['path', 'status'],
      registry=self.registry,
    )  # fmt: skip
    self.seconds = prometheus_client.Histogram(
      'maskconnect_predict_seconds', 'Time from request to answer.',
      registry=self.registry,
    )  # fmt: skip
    self.batches = prometheus_client.Histogram(
      'maskconnect_batch_images', 'Images in a forward pass.',
      buckets=[2**n for n in range(9)], registry=self.registry,
    )  # fmt: skip
    self.waiting = prometheus_client.Gauge(
      'maskconnect_waiting_images', 'Images that wait for a forward pass.',
      registry=self.registry,
    )  # fmt: skip


class Service:
  """A model's answers to requests.

  Attributes:
    app: the ASGI application.
  """

  def __init__(self, model: inference.Classifier, limits: Limits) -> None:
    shape = model.record['preprocessing']
    own = shape.get('max_pixels', image_headers.MAX_PIXELS)
    self._pixels = min(own, limits.pixels)
    # The model's bound is for its owner's images, this one for anyone's.
    self._model = copy.copy(model)
    self._model.record = model.record | {
      'preprocessing': shape | {'max_pixels': self._pixels}
    }
    self._limits = limits
    self._name = str(model.record['architecture']['name'])
    self._metrics = Metrics()
    self._batcher = Batcher(
      model.probabilities,
      size=min(limits.batch, model.batch_size),
      most_waiting=limits.waiting,
      observe=self._metrics.batches.observe,
    )
    self._metrics.waiting.set_function(lambda: len(self._batcher.waiting))
    # Decoding releases Python's lock. More threads than cores would only take
    # memory; and small files may be images that take much of it.
    self._decoders = ThreadPoolExecutor(
      min(cores.available(), _DECODERS), 'decode'
    )
    starlette = Starlette(
      routes=[
        Route('/', self._page),
        Route('/health', self._health),
        Route('/metrics', self._read_metrics),
        Route('/predict', self._predict, methods=['POST']),
      ],
      exception_handlers={HTTPException: _refused, Exception: _failed},
      lifespan=self._lifespan,
    )
    self.app: ASGIApp = self._counted(starlette)

  @contextlib.asynccontextmanager
  async def _lifespan(self, _: Any) -> AsyncIterator[None]:
    with self._decoders, image_headers.lower_bound_of_pillow(self._pixels):
      async with self._batcher.running():
        yield

  def _counted(self, app: ASGIApp) -> ASGIApp:
    """Returns an application that counts the answers of another one."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
      if scope['type'] != 'http':
        await app(scope, receive, send)
        return
      path = scope['path'] if scope['path'] in _PATHS else 'other'
      began = time.perf_counter()

      async def counting(message: Message) -> None:
        if message['type'] == 'http.response.start':
          self._metrics.requests.labels(path, message['status']).inc()
          if path == '/predict':
            self._metrics.seconds.observe(time.perf_counter() - began)
        await send(message)

      await app(scope, receive, counting)

    return counted

  async def _page(self, _: Request) -> Response:
    headers = {'content-security-policy': page.POLICY} | _NO_SNIFF
    content = page.of(
      self._name, len(self._model.classes), self._model.multi_label
    )
    return HTMLResponse(content, headers=headers)

  async def _health(self, _: Request) -> Response:
    return _json(
      {
        'status': 'ok',
        'model': self._name,
        'classes': len(self._model.classes),
        'image_shape': self._model.image_shape,
      }
    )

  async def _read_metrics(self, _: Request) -> Response:
    content = prometheus_client.generate_latest(self._metrics.registry)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def _predict(self, request: Request) -> Response:
    limits = self._limits
    try:
      async with asyncio.timeout(limits.body_seconds):
        named = await self._contents(_limited(request, limits.body_bytes))
    except TimeoutError as error:
      why = f'the body did not arrive within {limits.body_seconds:g} s'
      raise HTTPException(408, why, _CLOSE) from error
    except ClientDisconnect as error:  # nobody reads the answer
      raise HTTPException(400, 'the connection was closed', _CLOSE) from error
    loop = asyncio.get_running_loop()
    try:
      async with asyncio.timeout(limits.answer_seconds):
        images = await asyncio.gather(
          *(
            loop.run_in_executor(self._decoders, self._decoded, *one)
            for one in named
          )
        )
        rows = await self._batcher.rows(images)
    except InputError as error:
      raise HTTPException(400, str(error)) from error
    except (BusyError, TimeoutError) as error:
      why = 'too many images are waiting; try again later'
      raise HTTPException(503, why, {'retry-after': '1'}) from error
    found = [
      {'image': name} | self._model.answer(row)
      for (name, _), row in zip(named, rows, strict=True)
    ]
    return _json({'predictions': found})

  async def _contents(self, request: Request) -> list[tuple[str, bytes]]:
    """Returns the name and the content of each file of a request."""
    kind = request.headers.get('content-type', '').partition(';')[0].strip()
    if kind.lower() != 'multipart/form-data':
      named = [('the image', await request.body())]
    else:
      most = self._limits.images
      async with request.form(max_files=most, max_fields=most) as form:
        named = [
          (names.one_line(file.filename or 'the image'), await file.read())
          for _, file in form.multi_items()
          if isinstance(file, UploadFile)
        ]
    if not named:
      raise HTTPException(400, 'the form holds no file')
    for name, content in named:
      if not content:
        raise HTTPException(400, f'{name} is empty; send an image file')
    return named

  def _decoded(self, name: str, content: bytes) -> Any:
    try:
      return self._model.prepare(content)
    except image_headers.TooLargeError as error:
      raise InputError(
        f'{name} has more than {self._pixels:,} pixels; send it smaller'
      ) from error
    except InputError as error:
      why = str(error).removeprefix('the image').lstrip(': ')
      raise InputError(f'{name}: {why}') from error


_NO_SNIFF = {'x-content-type-options': 'nosniff'}


def _limited(request: Request, most: int) -> Request:
  """Returns a request whose body raises an error beyond `most` bytes.

  Raises:
    HTTPException: the head of the request announces more.
  """
  error = HTTPException(413, f'the body has more than {most:,} bytes', _CLOSE)
  announced = request.headers.get('content-length', '')
  if announced.isdecimal() and int(announced[:20]) > most:
    raise error
  taken = 0

  async def receive() -> Message:
    nonlocal taken
    message = await request.receive()
    taken += len(message.get('body', b''))
    if taken > most:
      raise error
    return message

  return Request(request.scope, receive)


def _json(record: dict[str, Any], status: int = 200) -> Response:
  content = json.dumps(files.finite(record), allow_nan=False)
  return Response(content, status, _NO_SNIFF, 'application/json')


async def _refused(_: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  answer = _json({'error': error.detail}, error.status_code)
  answer.headers.update(error.headers or {})
  return answer


async def _failed(_: Request, error: Exception) -> Response:
  return _json({'error': f'the service failed: {type(error).__name__}'}, 500)
