"""MaskConnect of both levels in PyTorch: CIFAR's ResNet and ResNeXt.

torch_port.py and cpu_peer.py compare this network with the package's and time
both. It imports nothing of the package. Its modules have the names of the
package's, so that weights map one to one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

PROBABILITY_FLOOR = 1e-6


class StraightThrough(torch.autograd.Function):
  """Returns the mask; its gradient goes to the real mask unchanged."""

  @staticmethod
  def forward(ctx, real_mask, mask):
    """Both [L, L]."""
    return mask.clone()

  @staticmethod
  def backward(ctx, gradient):
    """Every entry gets its gradient, drawn or not."""
    return gradient, None


def draw(
  real_mask: torch.Tensor, valid: torch.Tensor, fan_in: int
) -> torch.Tensor:
  """Draws min(K, valid) distinct sources per row, p ∝ r: Gumbel top-k.

  Args:
    real_mask: r, float32 [L, L].
    valid: bool [L, L].
    fan_in: K.

  Returns:
    b, float32 [L, L], of zeros and ones.
  """
  # -log of an exponential variable is a Gumbel one.
  gumbel = -torch.empty_like(real_mask).exponential_().log()
  scores = real_mask.clamp(min=PROBABILITY_FLOOR).log() + gumbel
  scores = scores.masked_fill(~valid, -torch.inf)
  picked = scores.topk(min(fan_in, scores.shape[-1])).indices
  return torch.zeros_like(real_mask).scatter(-1, picked, 1.0) * valid


def conv(
  in_features: int,
  features: int,
  stride: int = 1,
  size: int = 3,
  groups: int = 1,
) -> nn.Conv2d:
  """A convolution without bias that keeps the image's size at stride 1."""
  layer = nn.Conv2d(
    in_features,
    features,
    size,
    stride,
    padding=size // 2,
    groups=groups,
    bias=False,
  )
  nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
  return layer


def zero_pad_channels(x: torch.Tensor, features: int) -> torch.Tensor:
  """Appends zero channels up to `features`."""
  return F.pad(x, (0, 0, 0, 0, 0, features - x.shape[1]))


def adapted(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
  """Brings an earlier output to [N, C, H, W]: average pool, zero channels."""
  if x.shape == shape:
    return x
  return zero_pad_channels(F.avg_pool2d(x, x.shape[-1] // shape[-1]), shape[1])


class BasicBlock(nn.Module):
  """y = relu(F(x) + S(x)), S without parameters (option A)."""

  def __init__(self, in_features: int, features: int, stride: int) -> None:
    super().__init__()
    self.in_features, self.features, self.stride = in_features, features, stride
    self.conv1 = conv(in_features, features, stride)
    self.norm1 = nn.BatchNorm2d(features)
    self.conv2 = conv(features, features)
    self.norm2 = nn.BatchNorm2d(features)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [N, in_features, H, W] to [N, features, H / s, W / s]."""
    residual = F.relu(self.norm1(self.conv1(x)))
    residual = self.norm2(self.conv2(residual))
    shortcut = x[:, :, :: self.stride, :: self.stride]
    return F.relu(residual + zero_pad_channels(shortcut, self.features))


class Bottleneck(nn.Module):
  """y = relu(F(x) + S(x)), F of 1x1, 3x3 in groups and 1x1 convolutions."""

  def __init__(
    self,
    in_features: int,
    inner: int,
    features: int,
    stride: int,
    groups: int,
  ) -> None:
    super().__init__()
    self.in_features, self.stride = in_features, stride
    self.conv1 = conv(in_features, inner, size=1)
    self.norm1 = nn.BatchNorm2d(inner)
    self.conv2 = conv(inner, inner, stride, groups=groups)
    self.norm2 = nn.BatchNorm2d(inner)
    self.conv3 = conv(inner, features, size=1)
    self.norm3 = nn.BatchNorm2d(features)
    self.projected = stride != 1 or in_features != features
    if self.projected:
      self.shortcut_conv = conv(in_features, features, stride, size=1)
      self.shortcut_norm = nn.BatchNorm2d(features)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [N, in_features, H, W] to [N, features, H / s, W / s]."""
    residual = F.relu(self.norm1(self.conv1(x)))
    residual = F.relu(self.norm2(self.conv2(residual)))
    residual = self.norm3(self.conv3(residual))
    if self.projected:
      x = self.shortcut_norm(self.shortcut_conv(x))
    return F.relu(residual + x)


class MaskedStack(nn.Module):
  """Blocks that read the mean of the earlier outputs that a mask picks."""

  def __init__(
    self,
    blocks: Sequence[nn.Module],
    *,
    fan_in: int,
    topology: Sequence[Sequence[int]] | None,
    live: Sequence[bool] | None,
  ) -> None:
    """Keeps the blocks.

    Args:
      blocks: in order.
      fan_in: K.
      topology: the sources of each block, or None to learn them.
      live: whether each block runs; None: all do.
    """
    super().__init__()
    self.live = [True] * len(blocks) if live is None else list(live)
    self.reads = [(block.in_features, block.stride) for block in blocks]
    self.blocks = nn.ModuleList(
      block if alive else nn.Identity()
      for block, alive in zip(blocks, self.live, strict=True)
    )
    self.fan_in, self.topology = fan_in, topology
    if topology is None:
      valid = torch.ones(len(blocks), len(blocks), dtype=torch.bool).tril()
      self.register_buffer('valid', valid, persistent=False)
      self.register_buffer(
        'scale', 1 / valid.sum(-1, True).clamp(max=fan_in), persistent=False
      )
      self.real_mask = nn.Parameter(0.5 * valid)

  def forward(
    self, x: torch.Tensor, mask: torch.Tensor | None = None
  ) -> torch.Tensor:
    """Maps the stem's output to the last block's; mask: b, default drawn."""
    if self.topology is None:
      if mask is None:
        mask = draw(self.real_mask.detach(), self.valid, self.fan_in)
      weights = StraightThrough.apply(self.real_mask, mask) * self.scale
    # Sums over sources, and over a whole batch for the gradient of a weight.
    exact = torch.promote_types(x.dtype, torch.float32)
    outputs, last, shape, here, before = [x], x, x.shape, {}, {}
    (batch, _, height, width), scale = x.shape, 1
    for target, block in enumerate(self.blocks):
      channels, stride = self.reads[target]
      wanted = torch.Size((batch, channels, height // scale, width // scale))
      scale *= stride
      if not self.live[target]:
        outputs.append(None)
        continue
      if wanted != shape:
        shape, here, before = wanted, {}, here
      learned = self.topology is None
      picked = range(target + 1) if learned else self.topology[target]
      for i in picked:
        if i not in here:
          here[i] = adapted(before.get(i, outputs[i]), shape)
      sources = [here[i] for i in picked]
      if learned:
        terms = zip(weights[target].unbind(), sources, strict=False)
        total = sum(w * y.to(exact) for w, y in terms)
      elif len(sources) == 1:
        total = sources[0]
      else:
        total = sum(y.to(exact) for y in sources) / len(sources)
      last = block(total.to(x.dtype))
      outputs.append(last)
    return last


def sizes(
  blocks_per_stage: Sequence[int], width: int, expansion: int
) -> Iterator[tuple[int, int, int, int]]:
  """Yields stage, channels in, channels out and stride of each block.

  Args:
    blocks_per_stage: the number of blocks of each stage.
    width: channels of the stem.
    expansion: 4 for bottlenecks, else 1.
  """
  before = width
  for stage, depth in enumerate(blocks_per_stage):
    features = width * 2**stage * expansion
    for index in range(depth):
      yield stage, before, features, 2 if stage and not index else 1
      before = features


class BranchBlock(nn.Module):
  """C bottlenecks side by side, each with its own input and output.

  The channels of all branches lie behind each other.
  """

  def __init__(
    self, in_features: int, inner: int, features: int, stride: int, groups: int
  ) -> None:
    super().__init__()
    self.groups, self.features, self.stride = groups, features, stride
    self.conv1 = conv(groups * in_features, inner, size=1, groups=groups)
    self.norm1 = nn.BatchNorm2d(inner)
    self.conv2 = conv(inner, inner, stride, groups=groups)
    self.norm2 = nn.BatchNorm2d(inner)
    self.conv3 = conv(inner, groups * features, size=1, groups=groups)
    self.norm3 = nn.BatchNorm2d(groups * features)

  def forward(
    self, x: torch.Tensor, identity: float, gain: float
  ) -> torch.Tensor:
    """Returns y_c = gain * F_c(x_c) + s * A(x_c) of all branches.

    Args:
      x: the x_c, [N, C * in_features, H, W].
      identity: s.
      gain: of the residuals.

    Returns:
      [N, C * features, H / s, W / s].
    """
    residual = F.relu(self.norm1(self.conv1(x)))
    residual = F.relu(self.norm2(self.conv2(residual)))
    residual = self.norm3(self.conv3(residual))
    shortcut = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
    apart = shortcut.unflatten(1, (self.groups, -1))
    more = self.features - apart.shape[2]
    if more:
      apart = F.pad(apart, (0, 0, 0, 0, 0, more))
    return gain * residual + identity * apart.flatten(1, 2)


class BranchStack(nn.Module):
  """Blocks of C branches; each branch takes the sum of branches before it."""

  def __init__(
    self,
    blocks: Sequence[BranchBlock],
    *,
    fan_in: int,
    masks: Sequence[torch.Tensor] | None,
  ) -> None:
    """Keeps the blocks.

    Args:
      blocks: in order; the last one has all of C branches.
      fan_in: K.
      masks: b between neighbours, [branches, branches before], of a frozen
        wiring; None to learn them.
    """
    super().__init__()
    self.blocks = nn.ModuleList(blocks)
    self.fan_in, self.masks = fan_in, masks
    self.branches = blocks[-1].groups
    if masks is None:
      shape = len(blocks) - 1, self.branches, self.branches
      valid = torch.ones(shape, dtype=torch.bool)
      self.register_buffer('valid', valid, persistent=False)
      self.real_mask = nn.Parameter(0.5 * valid)

  def forward(
    self, x: torch.Tensor, mask: torch.Tensor | None = None
  ) -> torch.Tensor:
    """Maps the stem's output to the sum of the last block's branches."""
    masks = self.masks
    if masks is None:
      if mask is None:
        mask = draw(self.real_mask.detach(), self.valid, self.fan_in)
      masks = StraightThrough.apply(self.real_mask, mask)
    first, *others = self.blocks
    gain = self.branches**-0.5
    x = first(x.repeat(1, first.groups, 1, 1), 1 / self.branches, gain)
    for own, block in zip(masks, others, strict=True):
      apart = x.unflatten(1, (own.shape[1], -1))
      mixed = torch.einsum('ck,nkfhw->ncfhw', own, apart).flatten(1, 2)
      x = block(mixed, 1 / self.fan_in, gain)
    return x.unflatten(1, (self.branches, -1)).sum(1)


class ResNet(nn.Module):
  """A stem, a stack and a head: CIFAR's ResNet, or its ResNeXt."""

  def __init__(
    self, stack: nn.Module, *, width: int, features: int, num_classes: int
  ) -> None:
    """Builds the network.

    Args:
      stack: of blocks.
      width: channels of the stem.
      features: channels of the stack's output.
      num_classes: of the logits.
    """
    super().__init__()
    self.stem = nn.Sequential(
      OrderedDict(
        conv=conv(3, width), norm=nn.BatchNorm2d(width), relu=nn.ReLU()
      )
    )
    self.stack = stack
    self.head = nn.Linear(features, num_classes)

  def forward(
    self, images: torch.Tensor, mask: torch.Tensor | None = None
  ) -> torch.Tensor:
    """Maps [N, 3, H, W] to logits [N, num_classes]."""
    return self.head(self.stack(self.stem(images), mask).mean((2, 3)))


def layout_of(model: nn.Module) -> torch.memory_format:
  """Returns channels_last, but not for branches: it takes 1.6 times as long."""
  branches = isinstance(getattr(model, 'stack', None), BranchStack)
  return torch.contiguous_format if branches else torch.channels_last


@torch.no_grad()
def project(stack: nn.Module) -> None:
  """Clips r to [0, 1], and to 0 where a source is not valid."""
  stack.real_mask.clamp_(0, 1).mul_(stack.valid)


def make_optimizer(
  model: nn.Module,
  *,
  learning_rate: float,
  mask_rate: float,
  weight_decay: float,
) -> torch.optim.Optimizer:
  """Nesterov SGD; kernels alone decay, real masks have a rate of their own."""
  kernels, vectors, masks = [], [], []
  for name, parameter in model.named_parameters():
    if name.endswith('real_mask'):
      masks.append(parameter)
    else:
      (kernels if parameter.ndim > 1 else vectors).append(parameter)
  groups = [
    {'params': kernels, 'weight_decay': weight_decay},
    {'params': vectors},
  ]
  if masks:
    groups.append(
      {'params': masks, 'lr': mask_rate, 'momentum': 0.0, 'nesterov': False}
    )
  optimizer = torch.optim.SGD(
    groups, learning_rate, momentum=0.9, nesterov=True, fused=True
  )
  if masks:
    optimizer.register_step_post_hook(lambda *_: project(model.stack))
  return optimizer


class TrainingStep:
  """One step of training; a call returns the loss without waiting for it."""

  def __init__(
    self,
    model: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    mode: str,
    **rates: float,
  ) -> None:
    """Compiles nothing yet; the first call does.

    Args:
      model: moved to the GPU, if there is one.
      mean: per channel, on the 0..255 scale.
      std: likewise.
      dtype: of the activations, by autocast.
      mode: 'eager', or one of torch.compile's.
      **rates: see `make_optimizer`.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    self.model = model.to(device, memory_format=layout_of(model)).train()
    self.optimizer = make_optimizer(self.model, **rates)
    mean, std = (
      torch.tensor(values, device=device).view(3, 1, 1)
      for values in (mean, std)
    )

    def loss_of(images, labels, *mask):
      # [N, H, W, 3] in memory is [N, 3, H, W] in channels_last.
      inputs = (images.permute(0, 3, 1, 2).float() - mean) / std
      with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(inputs, *mask), labels)

    self.loss_of = (
      loss_of if mode == 'eager' else torch.compile(loss_of, mode=mode)
    )

  def __call__(
    self, images: torch.Tensor, labels: torch.Tensor, *mask: torch.Tensor
  ) -> torch.Tensor:
    """Takes a step; the gradients stay until the next.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int64 [N].
      *mask: b, float32 [L, L]; none to draw it.
    """
    self.optimizer.zero_grad()
    loss = self.loss_of(images, labels, *mask)
    loss.backward()
    self.optimizer.step()
    return loss.detach()
