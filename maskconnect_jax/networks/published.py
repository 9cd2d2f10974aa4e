"""Weights of published ResNets and ResNeXts: torchvision's and timm's layout.

Both name their arrays alike. Here each has the name of one of ours:

  conv1.weight, bn1.*                    stem/conv, stem/norm
  layer2.0.conv1.weight, layer2.0.bn1.*  stack/blocks/3/conv1, .../norm1, after
                                         three blocks of layer1
  layer2.0.downsample.0.weight, .1.*     stack/blocks/3/shortcut_conv, _norm
  fc.weight, fc.bias                     head

Kernels go from OIHW to HWIO, and that of the head from [out, in] to [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskconnect_jax.errors import InputError

SUFFIXES = ('.safetensors', '.pth', '.pt')
_KINDS = {
  'weight': 'scale',
  'bias': 'bias',
  'running_mean': 'mean',
  'running_var': 'var',
}
_BLOCK = re.compile(
  r'layer([1-4])\.(\d{1,3})\.(?:(conv|bn)([1-3])|downsample\.([01]))\.(\w+)'
)


def read(path: Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a file; no code of the file runs.

  Args:
    path: FILE.safetensors; or FILE.pth, for which PyTorch must be installed.

  Returns:
    The arrays by their names in the file.

  Raises:
    InputError: the file cannot be read.
  """
  try:
    if path.suffix == '.safetensors':
      import safetensors.numpy

      return safetensors.numpy.load_file(path)
    return _unpickled(path)
  except OSError as error:
    raise InputError(f'{path} cannot be read: {error.strerror}') from error
  except Exception as error:  # whatever a damaged file makes the readers raise
    if isinstance(error, InputError):
      raise
    why = (str(error) or type(error).__name__).splitlines()[0]
    raise InputError(
      f'{path} holds no weights that can be read: {why}'
    ) from error


def _unpickled(path: Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'{path} needs PyTorch to be read; or convert it where PyTorch is: import'
      ' torch, safetensors.torch; safetensors.torch.save_file(torch.load('
      f"'{path.name}', weights_only=True), '{path.stem}.safetensors')"
    ) from error
  state: Any = torch.load(path, map_location='cpu', weights_only=True)
  if not isinstance(state, Mapping):
    raise InputError(f'{path} holds a {type(state).__name__}, no state_dict')
  return {
    str(name): array.numpy()
    for name, array in state.items()
    if isinstance(array, torch.Tensor)
  }


def renamed(
  weights: Mapping[str, np.ndarray], stages: Sequence[int]
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Returns the arrays under our names and in our layout.

  Args:
    weights: the arrays by their published names.
    stages: the stage of each of our blocks, from 0.

  Returns:
    The arrays by name, such as 'stack/blocks/0/conv1/kernel', and the names of
    arrays that are none of ours. Counters of batches are neither.
  """
  first = {stage: stages.index(stage) for stage in set(stages)}
  found, unknown = {}, []
  for name, array in weights.items():
    if name.endswith('num_batches_tracked'):
      continue
    ours = _name_of(name, first, len(stages))
    if ours is None:
      unknown.append(name)
      continue
    if array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    elif ours == 'head/kernel':
      array = array.T
    found[ours] = array
  return found, unknown


def _name_of(
  name: str, first: Mapping[int, int], num_blocks: int
) -> str | None:
  """Returns our name of a published one; None if it is none of ours."""
  if name == 'conv1.weight':
    return 'stem/conv/kernel'
  if name in ('fc.weight', 'fc.bias'):
    return 'head/kernel' if name == 'fc.weight' else 'head/bias'
  owner, _, kind = name.rpartition('.')
  if owner == 'bn1' and kind in _KINDS:
    return f'stem/norm/{_KINDS[kind]}'
  match = _BLOCK.fullmatch(name)
  if match is None:
    return None
  stage, place, layer, number, shortcut, kind = match.groups()
  block = first.get(int(stage) - 1, num_blocks) + int(place)
  following = [at for at in first.values() if at > first.get(int(stage) - 1, 0)]
  if block >= min(following, default=num_blocks):
    return None
  own = f'stack/blocks/{block}'
  if layer == 'conv' or shortcut == '0':
    part = f'conv{number}' if layer else 'shortcut_conv'
    return f'{own}/{part}/kernel' if kind == 'weight' else None
  if kind not in _KINDS:
    return None
  part = f'norm{number}' if layer else 'shortcut_norm'
  return f'{own}/{part}/{_KINDS[kind]}'
