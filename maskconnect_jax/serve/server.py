"""Runs the service until a signal: uvicorn, with bounds on slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from maskconnect_jax import signals
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import inference
from maskconnect_jax.serve.app import Limits, Service


def serve(
  model: inference.Classifier,
  *,
  host: str,
  port: int,
  begun: Callable[[str], None],
  limits: Limits | None = None,
) -> int:
  """Serves a model until a signal; requests under way are answered first.

  A second signal ends it without them.

  Args:
    model: the model.
    host: the address to listen at.
    port: the port; 0 takes a free one.
    begun: called with the service's address once it answers.
    limits: what requests may cost; None: `Limits()`.

  Returns:
    The number of the signal.

  Raises:
    InputError: nothing can listen there.
  """
  limits = limits or Limits()
  listening = listen(host, port)
  shown = f'[{host}]' if ':' in host else host
  with listening:
    port = listening.getsockname()[1]
    server = of(model, limits, lambda: begun(f'http://{shown}:{port}'))

    def stop(number: int, frame: FrameType | None) -> None:
      del frame
      server.force_exit = server.should_exit
      server.should_exit = True
      server.received = server.received or number

    with signals.caught(stop):
      server.run(sockets=[listening])
    return server.received


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens.

  Raises:
    InputError: nothing can listen there.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, port), family=family, backlog=512)
    # Connections inherit it. asyncio does not set it for a socket it is given,
    # and the end of each answer would wait 40 ms for a client's delayed ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  except (OSError, OverflowError) as error:
    why = getattr(error, 'strerror', None) or error
    raise InputError(
      f'--host={host} --port={port} cannot be listened at: {why}; give others'
    ) from error
  return listening


def of(
  model: inference.Classifier, limits: Limits, begun: Callable[[], None]
) -> Server:
  """Returns a server that answers without compiling anything.

  Args:
    model: the model; each size of a batch is compiled now.
    limits: what requests may cost.
    begun: called once the server answers.
  """
  size = 1
  while size <= min(limits.batch, model.batch_size):
    model.probabilities(np.zeros((size, *model.image_shape), np.uint8))
    size *= 2
  config = uvicorn.Config(
    Service(model, limits).app,
    loop='asyncio',  # uvloop would take the signals
    http=_within(limits.head_seconds),
    ws='none',
    lifespan='on',
    log_config=None,
    log_level='error',
    access_log=False,
    server_header=False,
    proxy_headers=False,
    limit_concurrency=limits.connections,
    timeout_graceful_shutdown=limits.ending_seconds,
  )
  return Server(config, begun)


class Server(uvicorn.Server):
  """A server that leaves signals to `serve`; `should_exit` ends it.

  Attributes:
    received: the number of the first signal; 0: none came.
  """

  def __init__(self, config: uvicorn.Config, begun: Callable[[], None]) -> None:
    super().__init__(config)
    self.received = 0
    self._begun = begun

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Begins to answer; see `uvicorn.Server`."""
    await super().startup(sockets)
    self._begun()

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Leaves the handlers of signals as they are."""
    yield


def _within(seconds: float) -> type[asyncio.Protocol]:
  """Returns a protocol that closes connections whose request does not begin.

  uvicorn itself waits for the head of a request for ever.

  Args:
    seconds: from the first byte of a request, or from the connection, to the
      end of its head.
  """

  class Protocol(H11Protocol):
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self._watch()

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
      self._stop()
      super().connection_lost(exc)

    def on_response_complete(self) -> None:
      super().on_response_complete()
      self._stop()

    def _watch(self) -> None:
      idle = self.cycle is None or self.cycle.response_complete
      if not idle:
        self._stop()
      elif self._timer is None:
        self._timer = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
      self._timer = None
      if self.cycle is None or self.cycle.response_complete:
        self.transport.close()

    def _stop(self) -> None:
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None

  return Protocol
