"""What a loss function does is told by its behaviour, and never wrongly."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmend.contract.nature import answers_alike, classes_told_apart, pairs_samples, read_loss

# ---- losses as people write them ---------------------------------------------------------------------------


def one_hot(y: Tensor, z: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)


def clipped(p: Tensor) -> Tensor:
    return p.clamp(1e-7, 1 - 1e-7)


def binary(p: Tensor, y: Tensor) -> Tensor:
    return -(y * torch.log(clipped(p)) + (1 - y) * torch.log(1 - clipped(p)))


def softmax(z: Tensor) -> Tensor:
    e = (z - z.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def focal(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(1).gather(1, y[:, None])
    return -((1 - p) ** 2 * p.log()).mean()


CLASSES: dict[str, tuple[Callable[..., Tensor], str | None, str]] = {
    "cross_entropy": (F.cross_entropy, "cross entropy", "logits"),
    "summed": (partial(F.cross_entropy, reduction="sum"), "cross entropy", "logits"),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.1), "cross entropy", "logits"),
    "by hand": (
        lambda z, y: -(one_hot(y, z) * torch.log(softmax(z) + 1e-9)).sum(1).mean(),
        "cross entropy",
        "logits",
    ),
    "by log_softmax": (lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).sum(), "cross entropy", "logits"),
    "nll_loss": (F.nll_loss, "cross entropy", "log probabilities"),
    "nll by hand": (lambda z, y: -z.gather(1, y[:, None]).mean(), "cross entropy", "log probabilities"),
    "clipped": (
        lambda p, y: -(one_hot(y, p) * clipped(p).log()).sum(1).mean(),
        "cross entropy",
        "probabilities",
    ),
    "picked": (
        lambda p, y: -torch.log(p.gather(1, y[:, None]) + 1e-12).sum(),
        "cross entropy",
        "probabilities",
    ),
    "keras": (
        lambda p, y: -(one_hot(y, p) * clipped(p / p.sum(1, keepdim=True)).log()).sum(1).mean(),
        "cross entropy",
        "probabilities",
    ),
    "focal": (focal, None, "logits"),
    "multi_margin_loss": (F.multi_margin_loss, None, "logits"),
}
"""Of outputs [B, C, ...] and class numbers [B, ...]: family and what the output has to be."""

YES_OR_NO: dict[str, tuple[Callable[..., Tensor], str | None, str]] = {
    "binary_cross_entropy": (F.binary_cross_entropy, "binary cross entropy", "probabilities"),
    "summed": (partial(F.binary_cross_entropy, reduction="sum"), "binary cross entropy", "probabilities"),
    "by hand": (lambda p, y: binary(p, y).mean(), "binary cross entropy", "probabilities"),
    "with_logits": (F.binary_cross_entropy_with_logits, "binary cross entropy", "logits"),
    "positive weight": (
        partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(3.0)),
        "binary cross entropy",
        "logits",
    ),
    "logits by hand": (
        lambda z, y: (z.clamp(min=0) - z * y + (-z.abs()).exp().log1p()).sum(),
        "binary cross entropy",
        "logits",
    ),
    "mse_loss": (F.mse_loss, "squared", "values"),
    "l1_loss": (F.l1_loss, "absolute", "values"),
    "smooth_l1_loss": (F.smooth_l1_loss, None, "values"),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, "binary cross entropy", "logits"),
    "poisson_nll_loss": (F.poisson_nll_loss, "poisson", "logits"),
}
"""Of outputs and targets of one shape, zeros and ones."""

AMOUNTS: dict[str, tuple[Callable[..., Tensor], str | None, str]] = {
    "mse_loss": (F.mse_loss, "squared", "values"),
    "half of the sum": (lambda z, y: (z - y).square().sum() / 2, "squared", "values"),
    "l1_loss": (F.l1_loss, "absolute", "values"),
    "percent": (lambda z, y: 100 * ((y - z) / y.abs().clamp(min=1e-7)).abs().mean(), "absolute", "values"),
    "log cosh": (lambda z, y: (z - y).cosh().log().mean(), None, "values"),
    "root": (lambda z, y: (z - y).square().mean().sqrt(), None, "values"),
    "huber_loss": (F.huber_loss, None, "values"),
}
"""Of outputs and targets of one shape, real numbers of unit scale."""

UNSURE = {
    "dice": lambda z, y: 1 - 2 * (z * y).sum() / (z + y).sum(),
    "critic": lambda z, y: (z * (2 * y - 1)).mean(),
    "cosine": lambda z, y: 1 - F.cosine_similarity(z, y).mean(),
    "two losses": lambda z, y: (
        F.binary_cross_entropy_with_logits(z, y) + (z.sigmoid() - y).abs().sum().sqrt()
    ),
    "noise": lambda z, y: (z - y + torch.randn_like(z)).abs().pow(1.5).mean() * torch.rand(()),
    "refusing": lambda *_: 1 / 0,
    "no tensor": lambda z, y: float((z - y).abs().mean()),
}


def classes(b: int, c: int, places: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    return torch.randint(c, (b, *places), generator=torch.Generator().manual_seed(seed))


def bits(*shape: int) -> Tensor:
    y = torch.rand(shape, generator=torch.Generator().manual_seed(1)).round()
    y.view(-1)[:2] = torch.tensor([0.0, 1.0])
    return y


def check(reading: Any, family: str | None, wants: str) -> None:
    assert reading is not None
    assert (reading.family, reading.wants, reading.sign) == (family, wants, 1)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shape", [(2, 2), (7, 3), (32, 50)])
def test_losses_of_class_numbers(name: str, shape: tuple[int, int]) -> None:
    loss, family, wants = CLASSES[name]
    found = read_loss(loss, shape, classes(*shape))
    check(found, family, wants)
    assert found is not None
    assert (found.axis, found.normalizes) == (1, name == "keras")


@pytest.mark.parametrize("name", ["cross_entropy", "smoothed", "nll_loss", "by hand"])
def test_classes_of_places(name: str) -> None:
    """Segmentation: the classes lie along the second axis."""
    loss, family, wants = CLASSES[name]
    found = read_loss(loss, (3, 4, 5, 6), classes(3, 4, (5, 6)))
    check(found, family, wants)
    assert found is not None
    assert found.axis == 1


def test_classes_along_the_last_axis() -> None:
    """A language model that flattens its outputs."""
    found = read_loss(
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), (3, 6, 9), classes(3, 9, (6,))
    )
    check(found, "cross entropy", "logits")
    assert found is not None
    assert found.axis == 2


def test_weights_of_classes_and_ignored_targets_change_nothing() -> None:
    y = classes(16, 4)
    weighted = nn.CrossEntropyLoss(weight=torch.rand(4) + 0.1)
    check(read_loss(weighted, (16, 4), y), "cross entropy", "logits")
    y[::2] = -100
    found = read_loss(weighted, (16, 4), y)
    check(found, "cross entropy", "logits")
    assert found is not None
    assert found.ignored == 0.5


@pytest.mark.parametrize("dense", ["one hot", "soft"])
@pytest.mark.parametrize("name", ["cross_entropy", "kl_div", "keras", "kld by hand"])
def test_losses_of_distributions(name: str, dense: str) -> None:
    y = F.one_hot(classes(12, 5), 5).float() if dense == "one hot" else torch.rand(12, 5).softmax(1)
    loss, wants = {
        "cross_entropy": (F.cross_entropy, "logits"),
        "kl_div": (partial(F.kl_div, reduction="batchmean"), "log probabilities"),
        "keras": (
            lambda p, t: -(t * clipped(p / p.sum(1, keepdim=True)).log()).sum(1).mean(),
            "probabilities",
        ),
        "kld by hand": (
            lambda p, t: (t.clamp(min=1e-7) * (t.clamp(min=1e-7) / clipped(p)).log()).sum(),
            "probabilities",
        ),
    }[name]
    check(read_loss(loss, (12, 5), y), "cross entropy", wants)


@pytest.mark.parametrize("name", YES_OR_NO)
@pytest.mark.parametrize("shape", [(8, 1), (8,), (6, 5), (2, 3, 4)])
def test_losses_of_zeros_and_ones(name: str, shape: tuple[int, ...]) -> None:
    if name == "multilabel_soft_margin_loss" and shape == (8,):
        return  # it wants two dimensions or more
    loss, family, wants = YES_OR_NO[name]
    check(read_loss(loss, shape, bits(*shape)), family, wants)


@pytest.mark.parametrize("name", AMOUNTS)
@example(rows=2, columns=1, seed=82)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(2, 20), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_losses_of_amounts(name: str, rows: int, columns: int, seed: int) -> None:
    """Never another nature than the true one: a Huber loss is an absolute error where errors are large.

    It is a squared one among targets that hardly differ, beside which only small errors are tried.
    """
    loss, family, wants = AMOUNTS[name]
    y = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = read_loss(loss, (rows, columns), y)
    assert found is not None
    assert (found.wants, found.sign) == (wants, 1)
    single = rows * columns == 1 or name == "root"
    near = "squared" if family is None and y.std(correction=0) < 0.5 else family
    assert found.family in {family, near, "absolute" if single or family is None else family}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", ["mse_loss", "half of the sum", "l1_loss", "percent"])
def test_the_scale_of_amounts_changes_nothing(name: str, scale: float) -> None:
    loss, family, wants = AMOUNTS[name]
    y = scale * (2 + torch.randn(16, 2, generator=torch.Generator().manual_seed(3)))
    check(read_loss(loss, (16, 2), y), family, wants)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 12),
    seed=st.integers(0, 99),
    name=st.sampled_from(sorted(CLASSES)),
)
def test_natures_do_not_depend_on_sizes(rows: int, columns: int, seed: int, name: str) -> None:
    loss, family, wants = CLASSES[name]
    check(read_loss(loss, (rows, columns), classes(rows, columns, seed=seed)), family, wants)


@pytest.mark.parametrize("name", UNSURE)
def test_nothing_is_said_of_other_losses(name: str) -> None:
    assert read_loss(UNSURE[name], (12, 3), bits(12, 3)) is None


@pytest.mark.parametrize("targets", [(-1.0, 1.0), (0.0, 1.0)])
def test_hinges(targets: tuple[float, float]) -> None:
    low, high = targets
    y = low + (high - low) * bits(20, 1)
    found = read_loss(lambda z, t: (1 - z * t).clamp(min=0).mean(), (20, 1), y)
    check(found, "hinge", "values")
    assert found is not None
    assert found.ignored == pytest.approx(float((y == 0).float().mean()))


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_hinges_of_amounts(scale: float) -> None:
    """The hinge of a small target lies beyond the outputs that are tried."""
    y = scale * torch.randn(40, 1, generator=torch.Generator().manual_seed(2))
    check(read_loss(lambda z, t: (1 - z * t).clamp(min=0).mean(), (40, 1), y), "hinge", "values")


COMPARED: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "mse_loss": (lambda z, y: (z - y).square().mean(), "squared"),
    "l1_loss": (lambda z, y: (z - y).abs().mean(), "absolute"),
    "log cosh": (lambda z, y: (z - y).cosh().log().mean(), None),
    "of logarithms": (
        lambda z, y: (z.clamp(min=0).log1p() - y.log1p()).square().mean(),
        None,
    ),
}


@pytest.mark.parametrize("name", COMPARED)
def test_losses_that_compare_all_units_with_one_target(name: str) -> None:
    loss, family = COMPARED[name]
    y = classes(24, 3).float()[:, None]
    check(read_loss(loss, (24, 3), y), family, "values")


def pinball(z: Tensor, y: Tensor) -> Tensor:
    share = torch.tensor([0.1, 0.5, 0.9])
    return torch.maximum(share * (y - z), (share - 1) * (y - z)).mean()


def test_quantiles_of_one_target_are_not_alike() -> None:
    assert read_loss(pinball, (24, 3), torch.randn(24, 1)) is None


def test_embeddings_are_not_compared_with_labels() -> None:
    def contrastive(z: Tensor, y: Tensor) -> Tensor:
        near = (z[:, None] - z).square().sum(-1)
        return torch.where(y[:, None] == y, near, (1 - near).clamp(min=0)).mean()

    assert read_loss(contrastive, (24, 3), classes(24, 3)) is None


@pytest.mark.parametrize("name", AMOUNTS)
def test_only_what_divides_by_the_targets_says_so(name: str) -> None:
    found = read_loss(AMOUNTS[name][0], (24, 1), classes(24, 3).float()[:, None])
    assert found is not None
    assert found.divides is (name == "percent")
    assert found.ignored == pytest.approx(float((classes(24, 3) > 0).float().mean()) * found.divides)


def test_what_divides_by_the_square_of_the_targets() -> None:
    y = 2 * torch.rand(24, 1, generator=torch.Generator().manual_seed(0)) - 1
    for loss, divides in ((lambda z, y: ((z - y) / y).square().mean(), True), (F.mse_loss, False)):
        found = read_loss(loss, (24, 1), y)
        check(found, "squared", "values")
        assert found is not None
        assert found.divides is divides


def test_a_loss_that_is_no_number_whatever_the_output() -> None:
    y = 4 * torch.rand(24, 1, generator=torch.Generator().manual_seed(0)) - 2
    loss = COMPARED["of logarithms"][0]
    check(read_loss(loss, (24, 1), y), "undefined", "nothing")
    check(read_loss(loss, (24, 1), y.abs()), None, "values")
    assert read_loss(loss, (24, 1), y.abs().index_fill(0, torch.tensor(3), math.nan)) is None


def test_units_that_a_loss_treats_alike() -> None:
    y = classes(24, 3).float()[:, None]
    found = read_loss(lambda z, y: -F.cosine_similarity(z, y).mean(), (24, 3), y)
    assert found is not None
    assert found.kinds == 1
    by_column = read_loss(lambda z, y: -(z.gather(1, y.long()).tanh()).mean(), (24, 3), y)
    assert by_column is None or by_column.kinds is None


def test_classes_that_a_loss_only_weighs() -> None:
    z = [0.0, 1.0, 2.0, 3.0]
    by_number = classes_told_apart(lambda z, y: -(y * z.log_softmax(1)).sum(), (6, 4), torch.zeros(6, 1), z)
    proper = classes_told_apart(F.cross_entropy, (6, 4), torch.zeros(6, dtype=torch.long), z)
    assert (by_number, proper) == (1, 4)


def test_soft_margins_are_binary_cross_entropy_of_signs() -> None:
    check(read_loss(F.soft_margin_loss, (20, 1), 2 * bits(20, 1) - 1), "binary cross entropy", "logits")


def test_counts() -> None:
    y = torch.poisson(torch.full((30, 1), 4.0), generator=torch.Generator().manual_seed(0))
    check(read_loss(F.poisson_nll_loss, (30, 1), y), "poisson", "logits")
    check(read_loss(partial(F.poisson_nll_loss, log_input=False), (30, 1), y), "poisson", "values")


def test_a_loss_that_the_output_does_not_change() -> None:
    """Softmax over one unit, in the loss."""
    found = read_loss(F.cross_entropy, (8, 1), torch.zeros(8, dtype=torch.long))
    assert found is not None
    assert (found.family, found.wants) == ("flat", "nothing")


def test_softmax_over_the_batch() -> None:
    found = read_loss(lambda z, y: -(F.one_hot(y, 4) * z.log_softmax(0)).sum(1).mean(), (9, 4), classes(9, 4))
    assert found is not None
    assert (found.wants, found.axis) == ("logits", 0)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "clipped", "keras"])
def test_the_sign_of_a_loss(name: str) -> None:
    loss, family, wants = CLASSES[name]
    found = read_loss(lambda z, y: -loss(z, y), (9, 4), classes(9, 4))
    assert found is not None
    assert (found.family, found.wants, found.sign) == (family, wants, -1)


def test_a_penalty_beside_the_loss_changes_nothing() -> None:
    weight = torch.ones(3, requires_grad=True)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y) + 100 * weight.square().sum()

    check(read_loss(loss, (9, 2), torch.randn(9, 2)), "squared", "values")


@pytest.mark.parametrize(
    ("output", "target", "paired"), [((9, 1), (9,), False), ((9,), (9, 1), False), ((9,), (9,), True)]
)
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, lambda z, y: F.smooth_l1_loss(z, y)])
def test_broadcast_losses_mix_samples(loss: Any, output: Any, target: Any, paired: bool) -> None:
    assert pairs_samples(loss, output, 100 + torch.rand(target)) is paired


def discrepancy(z: Tensor, y: Tensor) -> Tensor:
    """The maximum mean discrepancy of two sets, with a Gaussian kernel."""
    near = [(-torch.cdist(a, b).square()).exp().mean() for a, b in ((z, z), (y, y), (z, y))]
    return near[0] + near[1] - 2 * near[2]


@pytest.mark.parametrize(
    ("loss", "alike"),
    [
        (lambda z, y: (z - y.flatten()).square().mean(), True),
        (lambda z, y: (z.unsqueeze(1) - y).abs().mean(), True),
        (F.mse_loss, False),
        (F.l1_loss, False),
        (discrepancy, False),
        (lambda z, y: (z.mean() - y.mean()).square(), False),
        (lambda z, y: z.square().mean() + 0 * y.sum(), False),
    ],
    ids=["pairs", "pairs, absolute", "squared", "absolute", "sets", "means", "no targets"],
)
def test_what_asks_all_samples_for_one_answer(loss: Any, alike: bool) -> None:
    y = torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    assert answers_alike(loss, (8, 1), y) is alike
