"""Whole video networks in two builds from one description: stock modules, or ``sk.nn.ConvBNAct3d``, ``ConvAct3d``.

The architectures are those published: R3D-18 and R(2+1)D-18 (Tran et al., 2018), X3D-M (Feichtenhofer, 2020; its
dropout left out, that rows repeat). Both builds have the same state dict.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sora_kernels as sk

Size = tuple[int, int, int]
# (in, out, kernel, stride=(1, 1, 1), *, groups=1, activation="relu", norm=True) -> module of (x, residual=None)
Unit = Callable[..., nn.Module]


class Stock(nn.Module):
    """What the published code does, with the children of ``ConvBNAct3d``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size, padding: Size,
        *, groups: int, bias: bool, activation: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias
        )
        self.bn = nn.BatchNorm3d(out_channels)
        kinds = {"relu": nn.ReLU(inplace=True), "silu": nn.SiLU(), None: nn.Identity()}
        self.activation = kinds[activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        if residual is not None:
            out += residual
        return self.activation(out)


class StockConv(nn.Module):
    """A convolution alone, with the child of ``ConvAct3d``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size, padding: Size,
        *, groups: int, bias: bool, activation: None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _unit(
    kinds: tuple[Callable[..., nn.Module], Callable[..., nn.Module]], in_channels: int, out_channels: int,
    kernel: Size, stride: Size = (1, 1, 1), *, groups: int = 1, activation: str | None = "relu", norm: bool = True,
) -> nn.Module:  # fmt: skip
    padding = tuple(k // 2 for k in kernel)
    return kinds[0 if norm else 1](
        in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False,
        activation=activation,
    )  # fmt: skip


class Block(nn.Module):
    """A body whose last unit takes the block's input, or a projection of it, as residual."""

    def __init__(self, body: list[nn.Module], shortcut: nn.Module | None) -> None:
        super().__init__()
        *first, self.last = body
        self.body = nn.Sequential(*first)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.last(self.body(x), residual)


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole clip shows in them, then SiLU."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(channels, squeezed, 1)
        self.fc2 = nn.Conv3d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(torch.relu(self.fc1(x.mean((2, 3, 4), keepdim=True)))).sigmoid()
        return nn.functional.silu(x * scale)


def r3d_18(unit: Unit, width: float = 1.0, classes: int = 400) -> nn.Sequential:
    widths = [round(c * width) for c in (64, 128, 256, 512)]
    stem = unit(3, widths[0], (3, 7, 7), (1, 2, 2))
    return _resnet(unit, stem, _conv3d, widths, classes)


def r2plus1d_18(unit: Unit, width: float = 1.0, classes: int = 400) -> nn.Sequential:
    widths = [round(c * width) for c in (64, 128, 256, 512)]
    middle = round(45 * width)
    stem = nn.Sequential(unit(3, middle, (1, 7, 7), (1, 2, 2)), unit(middle, widths[0], (3, 1, 1)))
    return _resnet(unit, stem, _conv2plus1d, widths, classes)


def _conv3d(
    unit: Unit, in_channels: int, out_channels: int, middle: int, stride: int
) -> list[nn.Module]:
    return [unit(in_channels, out_channels, (3, 3, 3), (stride, stride, stride))]


def _conv2plus1d(
    unit: Unit, in_channels: int, out_channels: int, middle: int, stride: int
) -> list[nn.Module]:
    return [
        unit(in_channels, middle, (1, 3, 3), (1, stride, stride)),
        unit(middle, out_channels, (3, 1, 1), (stride, 1, 1)),
    ]


def _resnet(
    unit: Unit, stem: nn.Module, conv: Callable[..., list[nn.Module]], widths: list[int], classes: int
) -> nn.Sequential:  # fmt: skip
    """Four stages of two basic blocks."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = widths[0]
    for stage, out in enumerate(widths):
        blocks = []
        for stride in (1 if stage == 0 else 2, 1):
            # As many weights as one 3x3x3 convolution has.
            middle = channels * out * 27 // (channels * 9 + out * 3)
            body = conv(unit, channels, out, middle, stride) + conv(unit, out, out, middle, 1)
            shortcut = None
            if stride != 1 or channels != out:
                shortcut = unit(channels, out, (1, 1, 1), (stride, stride, stride), activation=None)
            blocks.append(Block(body, shortcut))
            channels = out
        parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    parts["head"] = nn.Sequential(
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, classes)
    )
    return nn.Sequential(parts)


def x3d_m(unit: Unit, width: float = 1.0, classes: int = 400) -> nn.Sequential:
    channels = round(24 * width)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = nn.Sequential(
        unit(3, channels, (1, 3, 3), (1, 2, 2), activation=None, norm=False),
        unit(channels, channels, (5, 1, 1), groups=channels),
    )
    for stage, (depth, out) in enumerate(zip((3, 5, 11, 7), (24, 48, 96, 192), strict=True)):
        out = round(out * width)
        blocks = []
        for number in range(depth):
            body = _x3d_body(unit, channels, out, number)
            shortcut: nn.Module | None = None
            if number == 0 and channels == out:  # no BatchNorm here, as published
                shortcut = unit(channels, out, (1, 1, 1), (1, 2, 2), activation=None, norm=False)
            elif number == 0:
                shortcut = unit(channels, out, (1, 1, 1), (1, 2, 2), activation=None)
            blocks.append(Block(body, shortcut))
            channels = out
        parts[f"res{stage + 2}"] = nn.Sequential(*blocks)
    inner, hidden = _expanded(channels), round(2048 * width)
    parts["head"] = nn.Sequential(
        unit(channels, inner, (1, 1, 1)), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(inner, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip
    return nn.Sequential(parts)


def _expanded(channels: int) -> int:
    return int(2.25 * channels)


def _x3d_body(unit: Unit, in_channels: int, out: int, number: int) -> list[nn.Module]:
    """Expand, depthwise, in every other block squeeze and excite, project."""
    inner = _expanded(out)
    stride = (1, 2, 2) if number == 0 else (1, 1, 1)
    depthwise = functools.partial(unit, inner, inner, (3, 3, 3), stride, groups=inner)
    if number % 2 == 0:
        middle = [depthwise(activation=None), SqueezeExcite(inner, _squeezed(inner))]
    else:
        middle = [depthwise(activation="silu")]
    return [unit(in_channels, inner, (1, 1, 1)), *middle, unit(inner, out, (1, 1, 1))]


def _squeezed(channels: int) -> int:
    """A sixteenth, to a multiple of 8, at most a tenth below it."""
    share = channels / 16
    rounded = max(8, int(share + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * share else rounded + 8


STACKS: dict[str, Callable[..., nn.Sequential]] = {
    "r3d_18": r3d_18,
    "r2plus1d_18": r2plus1d_18,
    "x3d_m": x3d_m,
}


def build(
    name: str, kind: str, *, width: float = 1.0, classes: int = 400, backend: str | None = None
) -> nn.Sequential:
    """A network of :data:`STACKS`.

    Args:
        kind: ``"torch"``: :class:`Stock` units; ``"sora"``: the library's, with ``backend``.
        width: factor of all widths but the clip's.
    """
    own = (functools.partial(m, backend=backend) for m in (sk.nn.ConvBNAct3d, sk.nn.ConvAct3d))
    kinds = {"torch": (Stock, StockConv), "sora": tuple(own)}
    return STACKS[name](functools.partial(_unit, kinds[kind]), width, classes)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Random affine parameters and the running statistics of ``x``: what training might have left.

    A channel that stays silent over a small clip would have its rounding errors multiplied by
    1/sqrt(eps) in evaluation: it gets a hundredth of its neighbours' variance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0
    was = model.training
    model.train()(x)
    model.train(was)
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_var is not None
        norm.running_var.clamp_(min=norm.running_var.mean() / 100)
