"""Data that is drawn or comes with scikit-learn: small tables of two classes, and sequences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmend.data import load
from gradmend.errors import DataError


def test_breast_cancer_is_stratified_and_standardized_by_its_training_rows() -> None:
    data = load("breast-cancer")
    assert repr(data) == "Data('breast-cancer', 455 + 114 rows of [30], 2 classes)"
    torch.testing.assert_close(data.x.mean(0), torch.zeros(30), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.x.std(0), torch.ones(30))
    assert data.x_test.mean(0).abs().max() > 1e-3
    shares = [part.float().mean().item() for part in (data.y, data.y_test)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert not torch.equal(load("breast-cancer", seed=1).x, data.x)


def test_random_labels_know_nothing_of_their_rows() -> None:
    data = load("random-labels")
    assert repr(data) == "Data('random-labels', 1000 + 250 rows of [32], 2 classes)"
    assert data.x.min() >= 0
    assert data.x.max() < 1
    assert data.y.unique().tolist() == [0, 1]
    columns = torch.cat([data.x.T, data.y[None].float()]).corrcoef()[-1, :-1]
    assert columns.abs().max() < 5 / math.sqrt(len(data.y))


def test_two_samples_are_one_of_each_class() -> None:
    data = load("two-samples")
    assert repr(data) == "Data('two-samples', 2 + 0 rows of [2], 2 classes)"
    assert data.y.tolist() == [1, 0]


@settings(deadline=None, max_examples=20)
@given(steps=st.integers(1, 60), seed=st.integers(0, 99))
def test_recall_shows_the_class_at_the_first_step_only(steps: int, seed: int) -> None:
    data = load(f"recall-{steps}", seed=seed)
    assert data.x.shape == (1000, steps, 4)
    assert (data.classes, data.name) == (4, f"recall-{steps}")
    for x, y in ((data.x, data.y), (data.x_test, data.y_test)):
        assert torch.equal(x[:, 0], torch.eye(4)[y])
    noise = data.x[:, 1:]
    if steps > 1:
        error = 5 * 0.3 / math.sqrt(noise.numel())
        assert abs(noise.mean().item()) < error
        assert abs(noise.std().item() - 0.3) < error
        shown = noise.gather(2, data.y[:, None, None].expand(-1, steps - 1, 1))
        assert abs(shown.mean().item()) < 5 * 0.3 / math.sqrt(shown.numel())


@pytest.mark.parametrize("name", ["recall-9", "random-labels"])
def test_what_is_drawn_follows_the_seed_and_disturbs_nothing(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (load(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.y, other.y)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("by", "shape"), [("rows", (8, 8)), ("pixels", (64, 1))])
def test_images_in_steps_are_the_same_images(by: str, shape: tuple[int, int]) -> None:
    whole, steps = load("digits", seed=3), load(f"digits-{by}", seed=3)
    assert steps.name == f"digits-{by}"
    assert steps.x.shape[1:] == shape
    assert steps.x_test.shape[1:] == shape
    assert torch.equal(steps.x.flatten(1), whole.x)
    assert torch.equal(steps.x_test.flatten(1), whole.x_test)
    assert torch.equal(steps.y, whole.y)


@pytest.mark.parametrize("name", ["recall", "recall-", "recall-x", "recall-1.5"])
def test_a_recall_needs_its_length(name: str) -> None:
    with pytest.raises(DataError, match="Did you mean 'recall-100'"):
        load(name)


def test_sequences_have_a_step() -> None:
    with pytest.raises(DataError, match="one step or more"):
        load("recall-0")


def test_only_images_are_read_in_steps() -> None:
    with pytest.raises(DataError, match="no data called 'breast-cancer-rows'"):
        load("breast-cancer-rows")
