"""The measured factor of a block, against its exact Jacobian."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradmend as gm
from gradmend.jacobian import block_factors
from test_inside import ByHand, Tagger


def factors(model: nn.Module, batch: Any, kind: str) -> tuple[dict[tuple[int, int], float], gm.Profile]:
    setup = gm.Setup(model, nn.CrossEntropyLoss())
    profile = gm.measure(setup, batch)
    wanted = [site.index for site in profile.anatomy.sites if site.kind == kind]
    return block_factors(setup, batch, wanted), profile


def squared_jacobian(function: Any, x: Tensor) -> float:
    """|J|_F^2 over the number of outputs, the mean over Gaussian v of |J^T v|^2 / |v|^2."""
    jacobian = torch.func.jacrev(function)(x)
    return (jacobian.double().square().sum() / function(x).numel()).item()


def test_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    first, layer = nn.Linear(5, 4), nn.GRU(4, 8, batch_first=True)
    model = Tagger(nn.Sequential(first, layer), 8)
    x, y = torch.randn(16, 12, 5), torch.randint(3, (16,))
    found, _ = factors(model, (x, y), "recurrent")
    exact = squared_jacobian(lambda h: layer(h)[0], first(x[:1]).detach())
    assert found == {(1, 0): pytest.approx(exact, rel=0.2)}  # one sample against 16, one random vector


def test_attention() -> None:
    torch.manual_seed(0)
    model = ByHand(fused=True)
    x, y = torch.randn(64, 6, 8), torch.randint(3, (64,))
    found, _ = factors(model, (x, y), "attention")

    def block(h: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in h.chunk(3, dim=-1))
        return torch.softmax(q @ k.mT / 2, dim=-1) @ v

    exact = sum(squared_jacobian(block, model.qkv(one[None]).detach()) for one in x[:16]) / 16
    assert found == {(1, 0): pytest.approx(exact, rel=0.1)}


def test_branches_are_told_apart() -> None:
    """Of a product of two signals each factor is that of one way in, though one feeds the other."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.out(h * torch.sigmoid(h))

    torch.manual_seed(0)
    model = Gate()
    x, y = torch.randn(512, 4), torch.randint(3, (512,))
    found, _ = factors(model, (x, y), "product")
    h = model.a(x).detach()
    gate = torch.sigmoid(h)
    assert found == pytest.approx(
        {(2, 0): gate.square().mean().item(), (2, 1): h.square().mean().item()}, rel=0.1
    )


def test_what_reads_the_batch_has_none_and_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    state = torch.get_rng_state()
    found = block_factors(gm.Setup(model, nn.CrossEntropyLoss()), batch, range(4))
    assert set(found) == {(1, 0), (2, 1), (3, 2)}
    assert found[2, 1] == pytest.approx(1.0, rel=0.05)  # every maximum passes its gradient on
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
