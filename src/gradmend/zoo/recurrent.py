"""Recurrent networks: a sequence in, one output at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmend.errors import SetupError
from gradmend.layers import Residual
from gradmend.sequences import set_gates
from gradmend.zoo.networks import check_name

_CELLS: Final[Mapping[str, Callable[..., nn.RNNBase]]] = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "residual-gru": nn.GRU,
}


class Recurrent(nn.Module):
    """Reads a sequence step by step, and says at its end what it was.

    Args:
        block: sees the sequence first, as [rows, values, steps].
        body: the recurrent layers, batch first.
        head: takes the state after the last step.
    """

    def __init__(self, block: nn.Module, body: nn.RNNBase, head: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.body = body
        self.head = head

    def forward(self, x: Float[Tensor, "rows steps inputs"]) -> Float[Tensor, "rows outputs"]:
        """What the head makes of the state after the last step."""
        prepared = self.block(x.transpose(1, 2)).transpose(1, 2)
        states, _ = self.body(prepared)
        outputs: Tensor = self.head(states[:, -1])
        return outputs


def recurrent(
    inputs: int,
    outputs: int,
    *,
    cell: str = "residual-gru",
    width: int = 64,
    depth: int = 1,
    memory: int | None = None,
) -> Recurrent:
    """A recurrent network that gives one output per sequence, after its last step.

    The gated recurrent unit, as it is usually written (Chung et al. 2014), with * by element:

        z_t = sigmoid(W_z [h_{t-1}, x_t] + b_z)          update gate
        r_t = sigmoid(W_r [h_{t-1}, x_t] + b_r)          reset gate
        n_t = tanh(W_h [r_t * h_{t-1}, x_t] + b_h)
        h_t = (1 - z_t) * h_{t-1} + z_t * n_t

    torch's `nn.GRU`, which is what this network has, differs in two points. The reset gate comes after the
    matrix product, n_t = tanh(W x_t + b + r_t * (U h_{t-1} + c)), so that one product serves all gates. And
    z_t and 1 - z_t change roles, h_t = (1 - z_t) * n_t + z_t * h_{t-1}: there, z near 1 keeps the state.

    Args:
        inputs: values per step; the network takes [rows, steps, inputs].
        outputs: values per sequence; it returns [rows, outputs].
        cell: rnn (tanh), lstm, gru; or residual-gru: before the GRU a residual block of two convolutions over
            three steps each, projected to the width, and batch normalization.
        width: hidden units of each layer.
        depth: recurrent layers.
        memory: how many steps the gates are to remember, spread from 1 to this by the biases of those that
            keep the state (chrono initialization); None leaves torch's own, whose state halves at every
            step or so. A plain RNN has no gates.

    Raises:
        SetupError: for an unknown cell, or a memory of less than 2 steps.

    Source: Chung, Gulcehre, Cho, Bengio, Empirical evaluation of gated recurrent neural networks on sequence
    modeling, 2014, https://arxiv.org/abs/1412.3555; Tallec, Ollivier, Can recurrent neural networks warp
    time?, 2018, https://arxiv.org/abs/1804.11188 (memory)

    Examples:
        >>> model = recurrent(8, 10, cell="gru", width=16)
        >>> model(torch.zeros(5, 30, 8)).shape
        torch.Size([5, 10])
    """
    check_name("cell", cell, _CELLS)
    if memory is not None and memory < 2:
        raise SetupError(f"Gates remember 2 steps or more, not {memory}.")
    residual = cell == "residual-gru"
    block = _block(inputs, width) if residual else nn.Identity()
    body = _CELLS[cell](width if residual else inputs, width, num_layers=depth, batch_first=True)
    if memory is not None and cell != "rnn":
        set_gates(body, torch.empty(width).uniform_(1, memory - 1).log().tolist(), let_in=True)
    return Recurrent(block, body, nn.Linear(width, outputs))


def _block(inputs: int, width: int) -> nn.Sequential:
    """A residual block over neighbouring steps, and batch normalization."""
    body = nn.Sequential(
        nn.Conv1d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1)
    )
    return nn.Sequential(Residual(body, skip=nn.Conv1d(inputs, width, 1)), nn.BatchNorm1d(width))
