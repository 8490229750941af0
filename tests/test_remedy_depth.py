"""Remedies for depth: isometries, tailored activations, branches; what each says of itself, measured."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend import theory
from gradmend.causes import Cause
from gradmend.diagnosis import diagnose
from gradmend.errors import NoEffectWarning
from gradmend.layers import Dense, Residual, Scale, Tailored
from gradmend.probe import measure
from gradmend.remedies import (
    AddSkips,
    CalmAttention,
    Critical,
    DeltaOrthogonal,
    DenseConnections,
    DropBatchNorm,
    Fixup,
    GroupNorm,
    LooksLinear,
    Remedy,
    RMSNorm,
    ScaleBranches,
    SelfNormalizing,
    SigmoidAsTanh,
    Tailor,
    WeightNorm,
)
from gradmend.setup import Batch, Setup
from gradmend.training.loop import Stepper
from gradmend.zoo import mlp
from helpers import ADAM, SGD, blobs, images, plain

CE = nn.CrossEntropyLoss()


def treated(remedy: Remedy, model: nn.Module, batch: Batch | None = None, loss: Any = CE) -> nn.Module:
    return remedy.apply(Setup(model, loss, SGD), batch or blobs()).setup.model


def narrow(rows: int = 64, features: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, features, generator=generator), torch.arange(rows) % 3


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if not list(module.children())]


def gradient_ratio(model: nn.Sequential, x: Tensor) -> float:
    """|gradient at the first pre-activation| over that at the last hidden one."""
    h, hidden = x, []
    for layer in model:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            h.retain_grad()
            hidden.append(h)
    h.square().sum().backward()
    first, last = hidden[0].grad, hidden[-2].grad
    assert first is not None
    assert last is not None
    return (first.norm() / last.norm()).item()


# Isometries


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU])
def test_looks_linear_networks_are_isometries_of_any_depth(activation: type[nn.Module]) -> None:
    x, y = narrow()
    model = treated(LooksLinear(), plain(100, activation, features=32, width=64), (x, y))
    hidden = model[:199](x)  # the last hidden pre-activations
    rel = (
        0.01 if activation in (nn.GELU, nn.SiLU) else 1e-3
    )  # slopes at u and -u sum to 1, their squares do not
    assert gradient_ratio(model, x) == pytest.approx(1.0, rel=rel)
    before = F.cosine_similarity(x[:32], x[32:])
    torch.testing.assert_close(F.cosine_similarity(hidden[:32], hidden[32:]), before, atol=1e-3, rtol=0)
    torch.testing.assert_close(hidden.norm(dim=1) / x.norm(dim=1), torch.full((64,), math.sqrt(2)))


def test_looks_linear_convolutions_are_isometries_too() -> None:
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    for _ in range(20):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    x, y = images()
    model = treated(LooksLinear(), nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 144, 3)), (x, y))
    sizes = [model[: 2 * i + 1](x).square().mean().item() for i in range(21)]
    assert sizes == pytest.approx([sizes[0]] * 21, rel=1e-4)


def test_delta_orthogonal_kernels_lose_nothing_to_padding() -> None:
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1)]
    for _ in range(20):
        layers += [nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1)]
    x, y = images()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 144, 3))
    after = treated(DeltaOrthogonal(), model, (x, y))
    weight = after[2].weight.detach()
    torch.testing.assert_close(weight[:, :, 1, 1] @ weight[:, :, 1, 1].T, torch.eye(16), atol=1e-5, rtol=0)
    assert weight.square().sum().item() == pytest.approx(16, rel=1e-5)


# The edge of chaos


def test_critical_weights_and_biases_have_the_variances_of_the_theory() -> None:
    x, y = narrow(256)
    model = plain(3, nn.Tanh, features=32, width=500)
    after = treated(Critical(), model, (3 * x, y))
    assert after[2].weight.var().item() * 500 == pytest.approx(1.760955, rel=0.02)  # of 250,000 values
    assert after[2].bias.var().item() == pytest.approx(0.05, rel=0.2)  # of 500 values
    lengths = [after[: 2 * i + 1](3 * x).square().mean().item() for i in range(3)]
    assert lengths == pytest.approx([0.570048] * 3, rel=0.1)  # q*, from the first layer on


def test_critical_weights_are_those_of_he_for_relu() -> None:
    after = treated(Critical(), plain(2, nn.ReLU, width=400))
    assert after[2].weight.var().item() * 400 == pytest.approx(2.0, rel=0.02)
    assert after[2].bias.abs().max() == 0


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SELU, nn.ELU, nn.GELU, nn.SiLU])
def test_critical_networks_keep_the_gradient(activation: type[nn.Module]) -> None:
    x, y = narrow(16)
    model = treated(Critical(), plain(30, activation, features=32, width=400), (x, y))
    assert abs(math.log(gradient_ratio(model, x))) < 0.7  # 2 deviations of a network of this size


# Tailored activations


@pytest.mark.parametrize("to", ["LeakyReLU", "Tanh", "Softplus", "GELU", "SiLU", "Mish"])
def test_tailored_networks_keep_length_angle_and_gradient(to: str) -> None:
    x, y = narrow(64, 128)
    x = torch.linalg.qr(x.T)[0].T * math.sqrt(128)  # 64 orthogonal samples
    made = Tailor(to, cosine=0.5).apply(Setup(plain(100, nn.Sigmoid, 128, 128), CE, SGD), (5 * x, y))
    model, last = made.setup.model, made.setup.model[:199](5 * x)
    assert last.square().mean().item() == pytest.approx(1.0, rel=0.5)  # 100 layers of width 128
    wanted = 0.0 if to == "LeakyReLU" else 0.5  # its mean is taken out
    assert F.cosine_similarity(last[:32], last[32:]).mean().item() == pytest.approx(wanted, abs=0.1)
    assert abs(math.log(gradient_ratio(model, 5 * x))) < 0.5
    assert made.remedy == Tailor(to, cosine=0.5, depth=100)


def test_a_tailored_network_learns_where_the_plain_one_does_not() -> None:
    torch.manual_seed(0)
    setup = Setup(plain(60, nn.Sigmoid), CE, ADAM)
    losses = []
    for made in (setup, Tailor().apply(setup, blobs()).setup):
        step = Stepper(made.copy())
        losses.append([step([blobs()]).item() for _ in range(30)][-1])
    assert losses[0] > 1.0
    assert losses[1] < 0.1


def test_self_normalizing_networks_have_mean_zero_and_variance_one() -> None:
    x, y = narrow(256)
    layers = [*plain(16, nn.ReLU, features=32, width=200)]
    model = treated(SelfNormalizing(), nn.Sequential(*layers[:8], nn.Dropout(0.2), *layers[8:]), (x, y))
    assert kinds(model).count("SELU") == 16
    assert kinds(model).count("AlphaDropout") == 1
    outputs = model[:-1](x)
    assert outputs.mean().item() == pytest.approx(0.0, abs=0.1)
    assert outputs.var().item() == pytest.approx(1.0, abs=0.15)


# Sigmoid as tanh


def test_sigmoid_as_tanh_is_the_same_function_between_layers_that_can_absorb_it() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.Sigmoid()]
    padded = [nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 8)]
    model = nn.Sequential(*layers, *padded, nn.Sigmoid(), nn.Linear(8, 3, bias=False))
    x, y = images()
    after = treated(SigmoidAsTanh(), model, (x, y))
    assert [type(layer) for layer in after if not hasattr(layer, "weight")] == [
        nn.Tanh,
        nn.Sigmoid,  # before a layer with padding
        nn.Tanh,
        nn.Flatten,
        nn.Sigmoid,  # before a layer without bias
    ]
    torch.testing.assert_close(after(x), model(x))


# Normalization


@pytest.mark.parametrize("remedy", [RMSNorm(), GroupNorm(4)])
def test_normalization_keeps_the_size_of_the_gradient(remedy: Remedy) -> None:
    x, _ = narrow()
    profile = measure(Setup(treated(remedy, plain(20, nn.ReLU, 32, 64), narrow()), CE), narrow())
    gradients = [r.gradient or 0.0 for r in profile.sites if r.site.weighted]
    assert x.shape[1] == 32
    assert 0.2 < gradients[0] / gradients[-2] < 5


def test_weight_norm_splits_length_and_direction_and_nothing_else() -> None:
    model, (x, _) = plain(3, nn.Tanh), blobs()
    after = treated(WeightNorm(), model)
    torch.testing.assert_close(after(x), model(x))
    assert sum("original0" in name for name, _ in after.named_parameters()) == 4


def test_batches_of_one_train_without_batch_norm_and_scales_are_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.uniform_(model[1].weight)
    optimizer = torch.optim.Adam(model.parameters())
    setup = Setup(model, CE, optimizer)
    Stepper(setup)([blobs()])
    made = DropBatchNorm().apply(setup, blobs()).setup
    assert torch.equal(made.model[1].weight, model[1].weight)
    assert len(made.build_optimizer().state) == 6  # that of scale and shift as well
    x, y = blobs()
    assert made.loss((x[:1], y[:1])).isfinite()


# Attention


class Separate(nn.Module):
    """Attention by hand, of queries and keys from two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=3.0)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(8)
        return self.out(torch.softmax(logits, -1) @ self.value(x)).mean(1)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_weight, std=3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(1)[:, :3]


@pytest.mark.parametrize("kind", [Separate, Packed])
def test_calm_attention_has_logits_of_the_given_size(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    batch = torch.randn(16, 6, 8), torch.arange(16) % 3
    setup = Setup(kind(), CE, SGD)
    sizes = []
    for made in (setup, CalmAttention(2.0).apply(setup, batch).setup):
        readings = [r.attention for r in measure(made, batch).sites if r.attention]
        sizes.append(readings[0].logit_rms)
    assert sizes[0] > 10
    assert sizes[1] == pytest.approx(2.0, rel=1e-3)


# Residual connections


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Stack(nn.Module):
    def __init__(self, residual: bool, depth: int = 8) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h) if self.residual else block(h)
        return self.out(h)


def test_skips_go_around_the_users_own_modules_that_keep_the_shape() -> None:
    model, (x, _) = Stack(residual=False), blobs()
    after = treated(AddSkips(), model)
    h = model.stem(x)
    for block in model.blocks:
        h = h + block(h) / math.sqrt(8)
    torch.testing.assert_close(after(x), model.out(h))
    assert sum(isinstance(module, Residual) for module in after.modules()) == 8


def test_no_skips_around_blocks_that_have_them() -> None:
    with pytest.warns(NoEffectWarning):
        treated(AddSkips(), Stack(residual=True))


def test_projections_go_around_blocks_that_change_the_shape_but_the_output() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(200, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    model.append(nn.Linear(16, 3))
    x, y = images()
    after = treated(AddSkips(scale=0.0, project=True), model, (x, y))
    skips = [module.skip for module in after.modules() if isinstance(module, Residual)]
    assert list(map(repr, skips)) == [
        "Conv2d(4, 8, kernel_size=(1, 1), stride=(2, 2), bias=False)",
        "Linear(in_features=32, out_features=16, bias=False)",
    ]
    weight = skips[1].weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=0)


def growing() -> Stack:
    """Each block doubles the variance of the stream."""
    torch.manual_seed(0)
    model = Stack(residual=True, depth=30)
    for block in model.blocks:
        nn.init.kaiming_normal_(block.first.weight)
        nn.init.kaiming_normal_(block.second.weight, nonlinearity="linear")
    return model


@pytest.mark.parametrize("remedy", [ScaleBranches(), ScaleBranches(per_unit=True), Fixup()])
def test_the_residual_stream_no_longer_grows(remedy: Remedy) -> None:
    model, sizes = growing(), list[float]()
    for net in (model, treated(remedy, model)):
        net.out.register_forward_pre_hook(lambda _, args: sizes.append(args[0].square().mean().sqrt().item()))
        net(blobs()[0])
    assert sizes[0] > 1000
    assert sizes[-1] < 10


def test_layer_scale_has_one_factor_per_unit() -> None:
    after = treated(ScaleBranches(per_unit=True), Stack(residual=True))
    scales = [module for module in after.modules() if isinstance(module, Scale)]
    assert [tuple(scale.factor.shape) for scale in scales] == [(16,)] * 8
    assert all((scale.factor == 0.1).all() for scale in scales)


def test_fixup_begins_with_branches_of_zero_that_shrink_with_depth() -> None:
    after = treated(Fixup(), Stack(residual=True, depth=9))
    assert all((block.second.weight == 0).all() for block in after.blocks)
    assert (after.out.weight == 0).all()
    deviations = torch.stack([block.first.weight.std() for block in after.blocks])
    assert deviations.mean().item() == pytest.approx(math.sqrt(2 / 16) / 9**0.5, rel=0.05)


def test_dense_blocks_read_all_outputs_before_them_and_learn_to_use_them() -> None:
    model, (x, y) = plain(5, nn.Tanh), blobs()
    made = DenseConnections(blocks=3).apply(Setup(model, CE, ADAM), (x, y)).setup
    torch.testing.assert_close(made.model(x), model(x))
    dense = [module for module in made.model.modules() if isinstance(module, Dense)]
    widths = [[m.in_features for m in d.modules() if isinstance(m, nn.Linear)] for d in dense]
    assert widths == [[32, 64, 96]]  # four blocks keep the shape; one alone is left as it is
    Stepper(made)([(x, y)])
    assert (dense[0].body[3].weight[:, 32:] != 0).any()


def ill(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "batch norm":
        return mlp(8, 3, depth=50, activation="relu", norm="batch")
    if name == "large weights":
        return mlp(8, 3, depth=30, activation="tanh", init="large")
    return growing() if name == "growing" else mlp(8, 3)


@pytest.mark.parametrize(
    ("name", "remedy", "causes"),
    [
        ("batch norm", AddSkips(), {Cause.BATCH_NORM_EXPLOSION}),
        ("batch norm", DropBatchNorm(), {Cause.BATCH_NORM_EXPLOSION}),
        ("large weights", Critical(), {Cause.CHAOS, Cause.WEIGHTS_TOO_LARGE}),
        ("growing", ScaleBranches(), {Cause.RESIDUAL_GROWTH}),
        ("growing", Fixup(), {Cause.RESIDUAL_GROWTH}),
        ("sigmoids", Tailor(), {Cause.CONTRACTING_ACTIVATION, Cause.VANISHING_GRADIENT}),
        ("sigmoids", SelfNormalizing(), {Cause.CONTRACTING_ACTIVATION, Cause.VANISHING_GRADIENT}),
        ("sigmoids", AddSkips(), {Cause.CONTRACTING_ACTIVATION, Cause.VANISHING_GRADIENT}),
    ],
)
def test_what_it_treats_is_found_before_and_gone_after(name: str, remedy: Remedy, causes: set[Cause]) -> None:
    setup = Setup(ill(name), CE, ADAM)
    assert causes <= remedy.treats
    assert causes <= diagnose(setup, blobs()).causes
    assert not causes & diagnose(remedy.apply(setup, blobs()).setup, blobs()).causes


def test_the_code_of_a_tailored_activation_makes_it() -> None:
    shape = theory.tailor(torch.tanh, 10)
    module = Tailored("tanh", *vars(shape).values())
    again = eval(repr(module), {"Tailored": Tailored})
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(again(x), module(x))
