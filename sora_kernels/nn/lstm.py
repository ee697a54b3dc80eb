"""``LSTM``: ``torch.nn.LSTM`` through :func:`sora_kernels.lstm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._dispatch import BackendError
from ..ops.lstm import cells, op, stack, stock
from ..ops.lstm.arguments import Sizes, autocast, casts


class LSTM(nn.RNNBase):
    """Drop-in ``torch.nn.LSTM``: its constructor, attributes, parameters, state dict,
    initialisation and errors.

    Beyond it: ``torch.compile(fullgraph=True)`` without a recompilation for another T or B,
    ``torch.func``, double backward, and backward in ``eval()`` on every device. A
    ``PackedSequence`` runs in torch's LSTM, in eager mode.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as ``torch.nn.LSTM``.
        backend: as :func:`sora_kernels.lstm`; not part of the state dict.

    Shape:
        input ``[T, B, I]``, ``[B, T, I]`` if ``batch_first``, ``[T, I]`` unbatched, or a
        ``PackedSequence``; hx ``(h_0, c_0)`` or None -> ``(output, (h_n, c_n))``, as
        ``torch.nn.LSTM``.

    Example:
        >>> lstm = sora_kernels.nn.LSTM(128, 256, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(8, 30, 128))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        op.OPERATORS["lstm"].check_name(backend)
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype,
        )  # fmt: skip
        self.backend = backend

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    @classmethod
    def from_torch(cls, module: nn.LSTM, *, backend: str | None = None) -> LSTM:
        """The same layer over the same Parameter objects."""
        if not isinstance(module, nn.LSTM):
            raise TypeError(f"module: expected torch.nn.LSTM, got {type(module).__name__}")
        new = cls(**_arguments(module), device="meta", backend=backend)
        _share(new, module)
        return new

    def to_torch(self) -> nn.LSTM:
        """``torch.nn.LSTM`` over the same Parameter objects, for tools that look for that class."""
        new = nn.LSTM(**_arguments(self), device="meta")
        _share(new, self)
        return new

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        # Read as attributes: that is what parametrisations and functional_call replace.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None and (hx[0].dim() != input.dim() or hx[1].dim() != input.dim()):
            rank, kind = ("3-D", "batched 3-D") if batched else ("2-D", "unbatched 2-D")
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank} but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self._check(input, hx, weights)
        input, hx, cast = autocast(cells.LSTM, input, hx, weights)
        output, (h_n, c_n), _ = stack.run(
            cells.LSTM, input, hx, cast, self.bias, self.num_layers, self.bidirectional, self.batch_first,
            self.proj_size, self.dropout, self.training,
            backend=op.OPERATORS["lstm"].check_name(self.backend),
        )  # fmt: skip
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return output, (h_n, c_n)

    def _check(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        weights: list[Tensor],
        batch_sizes: Tensor | None = None,
    ) -> None:
        """Torch's own errors."""
        cast, w = casts(cells.LSTM, input, batch_sizes is not None), weights[0]
        if input.dtype != w.dtype and not cast:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({w.dtype}). "
                f"Convert input: input.to({w.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.shape[-1]}"
            )
        if batch_sizes is None and input.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if input.device != w.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {w.device}"
            )
        if hx is None:
            return
        for k, size in enumerate((self.get_expected_hidden_size, self.get_expected_cell_size)):
            expected = size(input, batch_sizes)
            self.check_hidden_size(hx[k], expected, f"Expected hidden[{k}] size {{}}, got {{}}")
            if hx[k].device != input.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, found input tensor at "
                    f"{input.device} and hidden tensor at {hx[k].device}"
                )
            if hx[k].dtype != input.dtype and not cast:
                raise RuntimeError(
                    "Input and hidden tensors are not the same dtype, found input tensor with "
                    f"{input.dtype} and hidden tensor with {hx[k].dtype}"
                )

    def _forward_packed(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None, weights: list[Tensor]
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        backend = op.OPERATORS["lstm"].check_name(self.backend)
        if backend not in ("", "torch"):
            raise BackendError(
                f"lstm: backend {backend!r} cannot run: the input is a PackedSequence, "
                "which runs in torch's LSTM"
            )
        data, batch_sizes, order, back = input
        self._check(data, hx, weights, batch_sizes)
        if hx is None:
            sizes = Sizes(2 if self.bidirectional else 1, self.hidden_size, self.proj_size)
            first = data[: int(batch_sizes[0])].unsqueeze(0)
            hx = sizes.zeros(cells.LSTM, first, first.shape[1], self.num_layers)
        else:
            hx = self.permute_hidden(hx, order)
        output, h_n, c_n = stock.layers(
            cells.LSTM, data, hx, weights, batch_sizes, None, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional,
        )  # fmt: skip
        return PackedSequence(output, batch_sizes, order, back), self.permute_hidden(
            (h_n, c_n), back
        )


def _arguments(module: nn.RNNBase) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    return {n: getattr(module, n) for n in (*names, "bidirectional", "proj_size")}


def _share(new: nn.RNNBase, module: nn.RNNBase) -> None:
    for name in module._flat_weights_names:
        weight = getattr(module, name)
        if not isinstance(weight, nn.Parameter):
            raise TypeError(
                f"{name}: expected a Parameter, got a parametrised {type(weight).__name__}"
            )
        setattr(new, name, weight)
    new.train(module.training)
