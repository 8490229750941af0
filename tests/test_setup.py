"""A setup computes one loss, says what does not fit, and copies as a whole."""

# ruff: noqa: ARG005  # lambdas that stand for a factory or a step take what these take

import copy
from functools import partial
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradmend as gm
from gradmend.errors import BatchError, DataError, SetupError
from gradmend.setup import describe
from helpers import ADAM, SGD, Convolutional, Recurrent, blobs, images, plain, setups

KINDS = list(setups())
CE = nn.CrossEntropyLoss()


class OwnLoss(nn.Module):
    """In the manner of Hugging Face: takes the labels, and returns the loss among its outputs."""

    def __init__(self, output: type = dict) -> None:
        super().__init__()
        self.linear, self.output = nn.Linear(8, 3), output

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.linear(x)
        return self.output(loss=CE(logits, labels), logits=logits)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(8, 8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.bilinear(a, b)


@pytest.mark.parametrize("output", [dict, SimpleNamespace])
def test_a_dict_batch_goes_in_as_keywords(output: type) -> None:
    x, y = blobs()
    model = OwnLoss(output)
    torch.testing.assert_close(gm.Setup(model).loss({"x": x, "labels": y}), CE(model.linear(x), y))


def test_several_inputs_and_one_target() -> None:
    x, y = blobs()
    model = TwoInputs()
    torch.testing.assert_close(gm.Setup(model, CE).loss((x, x, y)), CE(model(x, x), y))


def test_step_is_the_general_form() -> None:
    x, y = blobs()
    model = plain(1, nn.Tanh)
    setup = gm.Setup(model, step=lambda m, batch: 2 * CE(m(batch["x"]), batch["y"]).reshape(1))
    assert setup.loss({"x": x, "y": y}).shape == ()
    torch.testing.assert_close(setup.loss({"x": x, "y": y}), 2 * CE(model(x), y))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_train_like_the_original(kind: str) -> None:
    """Parameters, optimizer groups and state stay paired: both take the same steps, each its own."""
    setup, batch = setups()[kind]
    setup = gm.Setup(setup.model.eval(), setup.loss_fn, torch.optim.Adam(setup.model.parameters(), lr=1e-2))
    _steps(setup, batch, 2)
    twin = setup.copy()
    before = copy.deepcopy(setup.model.state_dict())
    _steps(twin, batch, 2)
    assert all(torch.equal(before[k], v) for k, v in setup.model.state_dict().items())
    _steps(setup, batch, 2)
    for a, b in zip(setup.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b


def test_a_stateful_transform_is_copied() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, parameters: object) -> None:
            self.calls += 1

    transform = Counting()
    setup = gm.Setup(plain(1, nn.Tanh), CE, SGD, gradient_transform=transform)
    gm.diagnose(setup, blobs())
    assert transform.calls == 0
    assert setup.copy().gradient_transform is not transform


def test_what_cannot_be_copied_says_why() -> None:
    model = plain(1, nn.Tanh)
    model.kept = SimpleNamespace(output=model(blobs()[0]))
    with pytest.raises(SetupError, match="earlier forward pass"):
        gm.Setup(model).copy()
    model.kept = Lock()
    with pytest.raises(SetupError, match="cannot pickle"):
        gm.Setup(model).copy()


def test_the_factory_gets_what_is_not_frozen() -> None:
    model = plain(2, nn.Tanh)
    model[0].requires_grad_(False)
    held = gm.Setup(model, CE, SGD).build_optimizer().param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    live = torch.optim.Adam(model.parameters())
    assert gm.Setup(model, CE, live).build_optimizer() is live


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss_fn": CE, "step": lambda m, b: m(b).sum()}, "not both"),
        ({"accumulate": 0}, "1 or more, not 0"),
    ],
)
def test_contradictions(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SetupError, match=says):
        gm.Setup(**{"model": nn.Linear(2, 2), **arguments})


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"seconds": 0.0}])
def test_budgets_are_positive(arguments: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="at least one step"):
        gm.Budget(**arguments)


def test_missing_parts_say_what_to_type() -> None:
    with pytest.raises(SetupError, match="optimizer=partial"):
        gm.Setup(nn.Linear(2, 2), CE).build_optimizer()
    with pytest.raises(SetupError, match="returned int, not a torch Optimizer"):
        gm.Setup(nn.Linear(2, 2), CE, lambda parameters: 3).build_optimizer()  # type: ignore[arg-type,return-value]
    with pytest.raises(SetupError, match="Give `loss_fn=nn"):
        gm.measure(gm.Setup(nn.Linear(8, 3)), blobs())


class Cut(nn.Module):
    """Something between the parameters and the loss records no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def frozen() -> nn.Module:
    return nn.Linear(8, 3).requires_grad_(False)


x, y = blobs()
NORMED = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
NAN = torch.where(torch.arange(96)[:, None] == 5, torch.nan, x)
BAD: dict[str, tuple[gm.Setup, Any, type[Exception], str]] = {
    "no parameters": (gm.Setup(nn.ReLU(), CE), (x, y), SetupError, "has no parameters"),
    "all frozen": (gm.Setup(frozen(), CE), (x, y), SetupError, "requires_grad_"),
    "lazy": (gm.Setup(nn.LazyLinear(3), CE), (x, y), SetupError, "lazy layers"),
    "meta": (gm.Setup(nn.Linear(8, 3, device="meta"), CE), (x, y), SetupError, "meta device"),
    "no_grad": (gm.Setup(Cut(), CE), (x, y), BatchError, "no_grad"),
    "detached loss": (
        gm.Setup(nn.Linear(8, 3), step=lambda m, b: CE(m(b[0]), b[1]).detach()),
        (x, y),
        BatchError,
        "detach",
    ),
    "other model": (
        gm.Setup(nn.Linear(8, 3), step=lambda m, b: CE(NORMED(b[0]), b[1])),
        (x, y),
        BatchError,
        "reaches none of the model's parameters",
    ),
    "not scalar": (
        gm.Setup(nn.Linear(8, 3), nn.CrossEntropyLoss(reduction="none")),
        (x, y),
        BatchError,
        "must be one number, not float32 \\[96\\]. Take its mean",
    ),
    "not a tensor": (
        gm.Setup(nn.Linear(8, 3), step=lambda m, b: m(b[0]).sum().item()),
        (x, y),
        BatchError,
        "must be one number, not float",
    ),
    "no rows": (gm.Setup(nn.Linear(8, 3), CE), (x[:0], y[:0]), DataError, "no rows"),
    "NaN": (gm.Setup(nn.Linear(8, 3), CE), (NAN, y), DataError, "row 5, column 0"),
    "integers": (gm.Setup(nn.Linear(8, 3), CE), (x.long(), y), BatchError, r"x\.float\(\)"),
    "integer images": (gm.Setup(Convolutional(), CE), (images()[0].byte(), y[:16]), BatchError, "float"),
    "single row": (gm.Setup(NORMED, CE), (x[:1], y[:1]), BatchError, "take more rows"),
    "wrong width": (gm.Setup(nn.Linear(9, 3), CE), (x, y), BatchError, r"cannot take .*\[96, 8\]"),
    "unknown token": (
        gm.Setup(Recurrent(), CE),
        (torch.full((4, 5), 10), y[:4]),
        BatchError,
        "num_embeddings",
    ),
    "loss does not fit": (gm.Setup(nn.Linear(8, 3), CE), (x, x), BatchError, "cannot compare"),
    "too few classes": (gm.Setup(nn.Linear(8, 2), CE), (x, y), BatchError, "cannot compare the output"),
    "keywords": (gm.Setup(OwnLoss()), {"x": x}, BatchError, r"\{x: float32 \[96, 8\]\}"),
    "no .loss": (gm.Setup(nn.Linear(8, 3)), {"input": x}, BatchError, "without a `.loss`"),
    "not a pair": (gm.Setup(nn.Linear(8, 3), CE), x, BatchError, r"not float32 \[96, 8\]"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("look", [gm.measure, gm.diagnose])
def test_misfits_say_what_to_do(look: Any, name: str) -> None:
    setup, batch, error, says = BAD[name]
    with pytest.raises(error, match=says):
        look(setup, batch)


def test_describe() -> None:
    assert describe({"x": x, "y": [y, 3]}) == "{x: float32 [96, 8], y: (int64 [96], int)}"


def _steps(setup: gm.Setup, batch: Any, steps: int) -> None:
    optimizer = setup.build_optimizer()
    for _ in range(steps):
        optimizer.zero_grad()
        setup.loss(batch).backward()
        optimizer.step()


def test_clipping_is_a_gradient_transform() -> None:
    clip = partial(nn.utils.clip_grad_norm_, max_norm=1e-3)
    setup = gm.Setup(plain(1, nn.Tanh), CE, SGD, gradient_transform=clip)
    plainly = gm.Setup(setup.model, CE, SGD)
    ratios = [[p.update_ratio for p in gm.measure(s, blobs()).parameters] for s in (setup, plainly)]
    assert all(a < b for a, b in zip(*ratios, strict=True))


def test_adam_ignores_the_scale_of_the_loss() -> None:
    """Its first step is the learning rate in every direction, whatever the gradient."""
    model = plain(1, nn.Tanh)
    (one, other) = (
        gm.measure(gm.Setup(model, step=lambda m, b, s=scale: s * CE(m(b[0]), b[1]), optimizer=ADAM), (x, y))
        for scale in (1.0, 10.0)
    )
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert a.update_ratio == pytest.approx(b.update_ratio, rel=1e-3)  # Adam's eps of 1e-8
        assert b.gradient == pytest.approx(10 * (a.gradient or 0), rel=1e-4)
