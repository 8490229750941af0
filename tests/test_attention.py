"""Attention against a plain loop over the weights that torch itself computes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradmend import attention
from gradmend.attention import AttentionReading


def looked_at(numbers: Tensor) -> AttentionReading:
    assert numbers.dtype == torch.float64
    assert not numbers.requires_grad
    return attention.read(numbers.tolist())


def entropies(weights: Tensor, allowed: Tensor) -> tuple[list[float], float]:
    """Per head the mean relative entropy, and the mean of the largest weight, row by row."""
    heads, tops = [], []
    for head in range(weights.shape[1]):
        rows = []
        for row, keys in zip(weights[:, head].flatten(0, 1), allowed[:, head].flatten(0, 1), strict=True):
            if keys.sum() > 1:
                rows.append(-sum(w * math.log(w) for w in row.tolist() if w > 0) / math.log(keys.sum()))
                tops.append(row.max().item())
        heads.append(sum(rows) / len(rows) if rows else math.nan)
    return heads, sum(tops) / len(tops) if tops else math.nan


def agrees(found: AttentionReading, weights: Tensor, allowed: Tensor) -> None:
    heads, top = entropies(weights, allowed)
    assert found.heads == pytest.approx(heads, abs=1e-5, nan_ok=True)
    assert found.top == pytest.approx(top, abs=1e-5, nan_ok=True)


masks = st.sampled_from([None, "causal", "keys", "heads", "samples", "added"])


def mask_of(kind: str | None, samples: int, heads: int, queries: int, keys: int) -> Tensor | None:
    shapes = {"keys": (queries, keys), "heads": (heads, queries, keys), "samples": (samples, 1, 1, keys)}
    if kind == "added":
        return torch.randn(samples, heads, queries, keys).masked_fill(torch.rand(keys) < 0.3, -math.inf)
    return torch.rand(shapes[kind]) < 0.7 if kind in shapes else None


@settings(deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 5),
    masks,
    st.sampled_from([None, 1.0, 5.0]),
    st.integers(0, 999),
)
def test_agrees_with_the_weights_of_torch(
    samples: int,
    groups: int,
    shared: int,
    queries: int,
    keys: int,
    kind: str | None,
    scale: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    heads = groups * shared
    query, key = torch.randn(samples, heads, queries, 4), torch.randn(samples, groups, keys, 4)
    mask = mask_of(kind, samples, heads, queries, keys)
    options: dict[str, Any] = {"is_causal": kind == "causal", "scale": scale, "enable_gqa": shared > 1}
    eye = torch.eye(keys).expand(samples, groups, keys, keys)
    weights = F.scaled_dot_product_attention(query, key, eye, mask, **options)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if kind == "causal":
        allowed = allowed.tril()
    elif mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > -math.inf
    allowed = allowed.expand(samples, heads, queries, keys)
    found = looked_at(attention.observe(query, key, mask, **options))
    agrees(found, weights, allowed)
    if allowed.any():
        logits = query @ key.repeat_interleave(shared, 1).mT * (scale or 0.5)
        assert found.logit_rms == pytest.approx(logits[allowed].square().mean().sqrt().item(), rel=1e-5)
        assert found.logit_max == pytest.approx(logits[allowed].max().item(), rel=1e-5)


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_any_number_of_dimensions(dims: int) -> None:
    first = (0,) * (6 - dims)
    query, key = torch.randn(1, 1, 2, 2, 4, 8)[first], torch.randn(1, 1, 2, 2, 5, 8)[first]
    mask = torch.rand(*query.shape[:-1], 5) < 0.8
    found = looked_at(attention.observe(query, key, mask))
    weights = F.scaled_dot_product_attention(query, key, torch.eye(5).expand(*key.shape[:-1], 5), mask)
    four = (-1, 2, 4, 5) if dims > 3 else (-1, 1, 4, 5)
    agrees(found, weights.reshape(four), mask.reshape(four))


def test_known_values() -> None:
    keys = torch.eye(6)[None, None]
    assert looked_at(attention.observe(torch.zeros(1, 1, 6, 6), keys)).entropy == pytest.approx(1)
    collapsed = looked_at(attention.observe(1e4 * keys, keys))
    assert collapsed.entropy == pytest.approx(0, abs=1e-12)
    assert (collapsed.top, collapsed.logit_max) == pytest.approx((1, 1e4 / math.sqrt(6)))
    half = torch.tensor([[0.0, 0.0, -50.0, -50.0]])
    assert looked_at(attention.observe_logits(half)).entropy == pytest.approx(0.5)


def test_queries_without_a_choice_are_left_out() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [7.0, -math.inf, -math.inf], [-math.inf] * 3])
    found = looked_at(attention.observe_logits(logits))
    assert (*found.heads, found.top) == pytest.approx((1, 0.5))
    assert (found.logit_rms, found.logit_max) == pytest.approx((7 / math.sqrt(3), 7))
    alone = looked_at(attention.observe(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8)))
    assert math.isnan(alone.entropy)
    assert math.isfinite(alone.logit_rms)
    nothing = looked_at(attention.observe_logits(torch.full((2, 2), -math.inf)))
    assert math.isnan(nothing.entropy)
    assert math.isnan(nothing.top)


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_every_customary_masking_value_is_a_mask(least: float) -> None:
    mask = torch.tensor([0.0, 0.0, least, least]).expand(4, 4)
    query, key = torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    assert looked_at(attention.observe(query, key, mask)).heads == pytest.approx((1, 1))
    assert looked_at(attention.observe_logits(query @ key.mT + mask)).heads == pytest.approx((1, 1))


def test_numbers_that_are_none_are_not_hidden() -> None:
    logits = torch.zeros(1, 2, 3, 3)
    logits[0, 1, 0, 0] = math.nan
    found = looked_at(attention.observe_logits(logits))
    assert found.heads[0] == pytest.approx(1)
    assert math.isnan(found.heads[1])
    assert math.isnan(found.logit_rms)


def test_tiny_logits_do_not_underflow() -> None:
    query = torch.full((1, 1, 4, 4), 1e-15)
    assert looked_at(attention.observe(query, query)).logit_rms == pytest.approx(2e-30, rel=1e-5, abs=0)


def test_softmax_over_another_dimension() -> None:
    logits = torch.randn(2, 3, 4, 5)
    along = looked_at(attention.observe_logits(logits))
    assert looked_at(attention.observe_logits(logits.movedim(-1, 0), dim=0)) == along
    weights = looked_at(attention.observe_weights(logits.softmax(-1)))
    assert weights.heads == pytest.approx(along.heads)
    assert weights.top == pytest.approx(along.top)
    assert math.isnan(weights.logit_rms)


def test_a_sample_stands_for_all() -> None:
    query, key = torch.randn(8, 4, 128, 32), torch.randn(8, 4, 128, 32)
    everything = entropies((query @ key.mT / math.sqrt(32)).softmax(-1), torch.ones(8, 4, 128, 128))
    found = looked_at(attention.observe(query, key))
    assert found.heads == pytest.approx(everything[0], abs=0.02)  # 32 of 1024 rows
    assert found == looked_at(attention.observe(query, key))


def test_causal_rows_are_those_drawn() -> None:
    query, key = torch.randn(3, 2, 50, 8), torch.randn(3, 2, 50, 8)
    causal = looked_at(attention.observe(query, key, is_causal=True))
    masked = looked_at(attention.observe(query, key, torch.ones(50, 50, dtype=torch.bool).tril()))
    assert causal == masked
    unmasked = (query @ key.mT / math.sqrt(8)).masked_fill(torch.ones(50, 50).triu(1) > 0, -math.inf)
    assert looked_at(attention.observe_logits(unmasked)).heads == pytest.approx(causal.heads, abs=1e-6)


class MultiHead(TorchFunctionMode):
    """The arguments of the last call of multi-head attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            self.call = args, kwargs
        return func(*args, **(kwargs or {}))


@settings(deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "keys", "heads"]),
    st.sampled_from([None, "bool", "float"]),
    st.integers(0, 999),
)
def test_multi_head_agrees_with_the_weights_of_torch(
    separate: bool,
    bias: bool,
    appended: bool,
    batch_first: bool,
    attn: str | None,
    padding: str | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    sizes = {"kdim": 5, "vdim": 7} if separate else {"kdim": 8, "vdim": 8}
    layer = nn.MultiheadAttention(
        8, 2, bias=bias, add_bias_kv=appended, add_zero_attn=appended, batch_first=batch_first, **sizes
    )
    nn.init.normal_(layer.in_proj_weight if not separate else layer.k_proj_weight)
    query, key, value = (
        torch.randn(2, 3, 8),
        torch.randn(2, 6, sizes["kdim"]),
        torch.randn(2, 6, sizes["vdim"]),
    )
    shape = {"keys": (3, 6), "heads": (4, 3, 6)}
    mask = torch.rand(shape[attn]) < 0.3 if attn else None
    pad = torch.rand(2, 6) < 0.3 if padding else None
    given_pad = (
        torch.zeros(2, 6).masked_fill(pad, -math.inf) if padding == "float" and pad is not None else pad
    )
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    seen = MultiHead()
    with seen:
        options = {"attn_mask": mask, "key_padding_mask": given_pad, "average_attn_weights": False}
        if padding == "float" and mask is not None:
            options["attn_mask"] = torch.zeros(mask.shape).masked_fill(mask, -math.inf)
        weights = layer(*inputs, **options)[1]
    forbidden = torch.zeros(2, 2, 3, weights.shape[-1], dtype=torch.bool)
    if mask is not None:
        forbidden[..., :6] |= mask.view(-1, 2, 3, 6) if attn == "heads" else mask
    if pad is not None:
        forbidden[..., :6] |= pad[:, None, None]
    agrees(looked_at(attention.observe_multi_head(*seen.call)), weights, ~forbidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batched", [True, False])
def test_multi_head_logits(dtype: torch.dtype, batched: bool) -> None:
    layer, x = nn.MultiheadAttention(8, 2, dtype=dtype), torch.randn(5, 2, 8, dtype=dtype)
    x = x if batched else x[:, 0]
    seen = MultiHead()
    with seen:
        layer(x, x, x, need_weights=False)
    found = looked_at(attention.observe_multi_head(*seen.call))
    q, k, _ = F.linear(x.float(), layer.in_proj_weight.float(), layer.in_proj_bias.float()).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (2, 4)).movedim(0, -2) for part in (q, k))
    logits = q @ k.mT / 2
    assert found.logit_rms == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-5)
    assert found.logit_max == pytest.approx(logits.max().item(), rel=1e-5)


def test_static_keys_and_boolean_masks() -> None:
    x, static = torch.randn(3, 2, 8), torch.randn(4, 3, 4)
    layer = nn.MultiheadAttention(8, 2)
    shared = (
        8,
        2,
        layer.in_proj_weight,
        layer.in_proj_bias,
        None,
        None,
        False,
        0.0,
        layer.out_proj.weight,
        None,
    )
    mask, padding = torch.rand(3, 3) < 0.3, torch.rand(2, 3) < 0.3
    options = {"static_k": static, "static_v": static, "attn_mask": mask, "key_padding_mask": padding}
    weights = F.multi_head_attention_forward(x, x, x, *shared, average_attn_weights=False, **options)[1]
    found = looked_at(attention.observe_multi_head((x, x, x, *shared), options))
    agrees(found, weights, ~(mask | padding[:, None, None]).expand_as(weights))


class NoFetch(TorchDispatchMode):
    """Fails as soon as a number is fetched from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


def test_nothing_is_fetched_nor_disturbed() -> None:
    query = torch.randn(3, 2, 20, 4, dtype=torch.bfloat16, requires_grad=True)
    mask, before = torch.rand(20, 20) < 0.5, query.detach().clone()
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    seen = MultiHead()
    with seen:
        layer(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.bool))
    state = torch.get_rng_state()
    apart = attention.observe(query, query, mask)
    with NoFetch(), torch.autocast("cpu"):
        together = attention.observe(query, query, mask)
        attention.observe_logits(query)
        attention.observe_multi_head(*seen.call)
    assert torch.equal(together, apart)
    assert torch.equal(query, before)
    assert torch.equal(torch.get_rng_state(), state)
