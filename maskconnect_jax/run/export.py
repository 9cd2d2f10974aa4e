"""A model as one file for other programs: StableHLO or ONNX.

The file holds the weights and the preprocessing after the resize. It takes
images uint8 [N, H, W, C] of the model's own height, width and channels, in a
batch of any size N, and gives logits float32 [N, classes]. Their softmax are
the probabilities; of a multi-label model their sigmoid. The resize is left out:
Pillow's antialiasing, with which the model was trained, is in neither format.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maskconnect_jax import backend, files
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import augment, inference

PLATFORMS = ('cpu', 'cuda', 'tpu')
# Of 2024; onnxruntime 1.18 and newer run it. The converter's least is 21.
_OPSET = 21


def write(model: inference.Classifier, kind: str, path: Path) -> None:
  """Writes a model to a file, whole or not at all.

  Args:
    model: the model.
    kind: 'stablehlo' or 'onnx'.
    path: of the file.

  Raises:
    InputError: a package is missing, or the file cannot be written.
  """
  files.check_output(path)
  content = {'stablehlo': stablehlo, 'onnx': onnx}[kind](model)
  with files.replacing(path, len(content)) as temporary:
    temporary.write_bytes(content)


def stablehlo(model: inference.Classifier) -> bytes:
  """Returns a model as `jax.export` serializes it, for all of `PLATFORMS`.

  Any program reads it with `jax.export.deserialize`, and calls it with
  uint8 [N, H, W, C]. JAX promises to read it for six months, so the model
  folder stays the archive.

  Raises:
    InputError: the package flatbuffers is missing.
  """
  from jax import export

  (count,) = export.symbolic_shape('n')
  images = jax.ShapeDtypeStruct((count, *model.image_shape), jnp.uint8)
  exported = export.export(jax.jit(_logits_of(model)), platforms=PLATFORMS)
  try:
    with backend.native(False):  # it is on no other machine
      return bytes(exported(images).serialize())
  except ImportError as error:
    raise _missing(error, 'export') from error


def onnx(model: inference.Classifier) -> bytes:
  """Returns a model as ONNX: input 'images', output 'logits'.

  Raises:
    InputError: the converter, jax2onnx, is missing or fails with this JAX.
  """
  with _silent():
    try:
      import jax2onnx
    except ImportError as error:
      raise _missing(error, 'onnx') from error
    images = jax.ShapeDtypeStruct(('N', *model.image_shape), jnp.uint8)
    try:
      with backend.without_platforms():
        converted: Any = jax2onnx.to_onnx(
          _logits_of(model),
          [images],
          model_name='maskconnect_jax',
          opset=_OPSET,
          input_names=['images'],
          output_names=['logits'],
        )
    except Exception as error:  # whatever it meets inside a JAX it is not for
      why = (str(error) or type(error).__name__).splitlines()[0]
      raise InputError(
        f'jax2onnx cannot convert the model with JAX {jax.__version__}'
        f' ({why}); make a new environment, and there: pip install'
        " 'maskconnect_jax[onnx]'"
      ) from error
  return bytes(converted.SerializeToString())


def _logits_of(
  model: inference.Classifier,
) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that is exported, with the weights as constants."""
  network, own = model.model, model.record['preprocessing']

  def logits(images: jax.Array) -> jax.Array:
    found: jax.Array = network(
      augment.normalize(images, own['mean'], own['std'])
    )
    return found

  return logits


def _missing(error: ImportError, extra: str) -> InputError:
  return InputError(
    f"a package is missing ({error}); pip install 'maskconnect_jax[{extra}]'"
  )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Keeps off the terminal what the converter logs of its unused plugins."""
  disabled = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(disabled)
