"""The model card: README.md of a model folder, as hubs of models show it.

The front matter is YAML. Each value in it is written as JSON, which is YAML,
so that no name of a data set or a class can break it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import ml_collections

from maskconnect_jax import names
from maskconnect_jax.run import scores, software

NAME = 'README.md'
PICTURE = 'topology.png'
_METHOD = 'https://arxiv.org/abs/1807.11473'
_CLASSES = 20  # named in the card; model.json names all


def text(
  config: ml_collections.ConfigDict,
  summary: dict[str, Any],
  *,
  classes: Sequence[str],
  image_shape: Sequence[int],
) -> str:
  """Returns the model card of a finished run.

  Args:
    config: the run's config.
    summary: the content of the run's summary.json.
    classes: name of each output.
    image_shape: (height, width, channels) of the network's input.
  """
  data = config.data.name or config.data.source
  height, width, channels = image_shape
  kind = 'grey' if channels == 1 else 'RGB'
  title = f'{summary["model"]}, {_wiring(summary)}'
  shown = ', '.join(map(_plain, classes[:_CLASSES]))
  if len(classes) > _CLASSES:
    shown += f' and {len(classes) - _CLASSES:,} more'
  metric = scores.metric_of(summary)
  value = summary[f'test_{metric.field}_pruned']
  several = metric is scores.MAP
  noun = 'labels' if several else 'classes'
  what = 'gives images any of' if several else 'classifies images into'
  versions = [' '.join(one) for one in software.recorded(summary).items()]
  return '\n'.join(
    [
      *_front_matter(data, summary, title, config.data.source),
      f'# {title}',
      '',
      f'A {summary["model"]} that {what} {len(classes):,}'
      f' {noun}. Its wiring is {_wiring(summary)}:'
      f' [MaskConnect]({_METHOD}) learns which earlier blocks each block reads,'
      ' then freezes the wiring and cuts out the blocks that nothing reads.',
      '',
      f'![Which blocks read which]({PICTURE})',
      '',
      '| | |',
      '| --- | --- |',
      f'| data | {_plain(data)}, {summary["num_train_examples"]:,} training'
      f' images |',
      f'| test {metric.words} | {value:.2%}'
      f' {"on" if several else "of"} {summary["num_test_examples"]:,} images |',
      f'| parameters | {summary["parameters_pruned"]:,} |',
      f'| multiply-adds of an image | {summary["multiply_adds_pruned"]:,} |',
      f'| blocks | {summary["blocks_pruned"]} of {summary["blocks"]} |',
      f'| input | {kind}, {height} x {width}; images of any size are resized |',
      f'| training | {summary["steps"]:,} steps, seed {summary["seed"]},'
      f' {summary["num_devices"]} x {summary["device"]} |',
      f'| software | {", ".join(versions)} |',
      f'| {noun} | {shown} |',
      '',
      '## Use',
      '',
      '`pip install maskconnect_jax`, then',
      '',
      '```',
      'import maskconnect_jax',
      '',
      "model = maskconnect_jax.load('.')  # this folder",
      "probabilities = model.predict(['photo.png'])",
      '```',
      '',
      '`model.json` holds architecture, wiring, classes and preprocessing.'
      ' `model.safetensors` and `arrays/` (Orbax) hold the same arrays; one of'
      ' them is enough. No code of the folder runs.',
      '',
      '## Before you publish it',
      '',
      'Write the licence of the weights into the front matter, and say here'
      ' what the model is for and what it was not tested on.',
      '',
    ]
  )


def _wiring(summary: dict[str, Any]) -> str:
  return f'{summary["rule"].replace("_", "-")}, fan-in {summary["fan_in"]}'


def _plain(name: str) -> str:
  """Returns a name as it may stand in a cell of a table."""
  shown = names.encodable(names.one_line(name)).replace('|', r'\|')
  return shown.replace('<', '&lt;').replace('[', r'\[')


def _front_matter(
  data: str, summary: dict[str, Any], title: str, source: str
) -> list[str]:
  own = scores.metric_of(summary)
  # Hubs know mAP as the mean average precision.
  kind = 'mean_average_precision' if own is scores.MAP else own.field
  metric = {
    'type': kind,
    'name': f'test {own.words}',
    'value': summary[f'test_{own.field}_pruned'],
  }
  result = {
    'task': {'type': 'image-classification'},
    'dataset': {'name': names.encodable(data), 'type': source},
    'metrics': [metric],
  }
  fields = {
    'license': 'unknown',
    'library_name': 'maskconnect_jax',
    'pipeline_tag': 'image-classification',
    'tags': [
      'image-classification', 'jax', 'flax', 'maskconnect', summary['model'],
    ],
    'datasets': [names.encodable(data)],
    'metrics': [kind],
    'model-index': [{'name': title, 'results': [result]}],
  }  # fmt: skip
  lines = [f'{name}: {json.dumps(value)}' for name, value in fields.items()]
  return ['---', *lines, '---', '']
