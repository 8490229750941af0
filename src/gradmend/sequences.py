"""What edits do to recurrent layers, in plain torch: the code of an edit carries these definitions along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Truncated(nn.Module):
    """A recurrent layer whose gradient goes back so many steps only; what it computes stays the same.

    The sequence passes in parts, and the state that goes from one part to the next is cut from its past.
    Packed sequences pass as a whole.

    Args:
        body: `nn.RNN`, `nn.LSTM` or `nn.GRU` of one direction.
        steps: of each part.

    >>> layer = Truncated(nn.GRU(2, 3, batch_first=True), 4)
    >>> layer(torch.zeros(1, 10, 2))[0].shape
    torch.Size([1, 10, 3])
    """

    def __init__(self, body: nn.Module, steps: int) -> None:
        super().__init__()
        self.body = body
        self.steps = steps

    def forward(self, x: Any, state: Any = None) -> Any:
        """Outputs of all steps and the last state, as the layer gives them."""
        if not isinstance(x, Tensor):
            return self.body(x, state)
        dim = 1 if x.dim() == 3 and self.body.batch_first else 0
        outputs: list[Tensor] = []
        for part in torch.split(x, self.steps, dim):
            kept = tuple(s.detach() for s in state) if isinstance(state, tuple) else state
            kept = state.detach() if isinstance(state, Tensor) else kept
            output, state = self.body(part, kept if outputs else state)
            outputs.append(output)
        return torch.cat(outputs, dim), state


class HiddenOnly(nn.Module):
    """An LSTM in the place of a plain RNN: its state is the hidden one only, the cell begins at zero.

    >>> HiddenOnly(nn.LSTM(2, 3))(torch.zeros(5, 2))[1].shape
    torch.Size([1, 3])
    """

    def __init__(self, body: nn.LSTM) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any, state: Any = None) -> Any:
        """Outputs of all steps and the last hidden state."""
        output, (hidden, _) = self.body(x, None if state is None else (state, torch.zeros_like(state)))
        return output, hidden


def gated(layer: Any, kind: str) -> nn.Module:
    """A GRU or LSTM of the sizes of a plain RNN, whose weights become those of the candidate; gates are new.

    >>> gated(nn.RNN(2, 3, batch_first=True), "GRU")
    GRU(2, 3, batch_first=True)
    """
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    own = ("input_size", "hidden_size", "bias") if isinstance(layer, nn.RNNCell) else names
    options, like = {name: getattr(layer, name) for name in own}, next(layer.parameters())
    make = getattr(nn, f"{kind}Cell" if isinstance(layer, nn.RNNCell) else kind)
    new = make(**options).to(like.device, like.dtype).train(layer.training)
    size = layer.hidden_size
    for name, old in layer.named_parameters():
        getattr(new, name).data[2 * size : 3 * size] = old.data
    return HiddenOnly(new) if kind == "LSTM" else new


def set_gates(layer: nn.Module, keep: list[float], let_in: bool = False) -> None:
    """Bias of the gate that keeps the state: the forget gate of an LSTM, the update gate z of torch's GRU.

    torch adds two biases; the other one becomes zero.

    Args:
        keep: one number for each hidden unit, or one for all.
        let_in: whether the input gate of an LSTM gets minus these.

    >>> layer = nn.LSTMCell(2, 3)
    >>> set_gates(layer, [1.0])
    >>> (layer.bias_ih + layer.bias_hh)[3:6]
    tensor([1., 1., 1.], grad_fn=<SliceBackward0>)
    """
    for name, bias in layer.named_parameters(recurse=False):
        if name.startswith("bias_"):
            gates = 4 if "LSTM" in type(layer).__name__ else 3
            size, first = len(bias) // gates, name.startswith("bias_ih")
            value = torch.tensor(keep, dtype=bias.dtype, device=bias.device) * float(first)
            bias.data[size : 2 * size] = value
            if let_in and gates == 4:
                bias.data[:size] = -value
