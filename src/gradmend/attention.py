"""How sharp attention is: pure functions of one attention call, on a few of its samples and queries.

`observe` takes the arguments of `scaled_dot_product_attention`, `observe_multi_head` those of
`multi_head_attention_forward`, `observe_logits` the input of a softmax, `observe_weights` its output. All
return one small tensor on the device; `read` makes a record of the fetched numbers.

Shapes: `b` samples, `h` heads, `q` queries, `k` keys, `E` values per head. Without a dimension for heads
([samples, queries, keys]) there is one head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from gradmend.samples import places, real

SAMPLES = 2
"""At most so many samples are looked at,"""

QUERIES = 16
"""and in each of them so many queries; both are drawn once, at random, for each size."""

MASKED = -1e4
"""A key whose mask (or logit, where the mask is already in it) is not above this is not allowed."""

Logits = Float[Tensor, "b h q k"]
Mask = Shaped[Tensor, "#b #h #q #k"]


@dataclass(frozen=True)
class AttentionReading:
    """How sharp the attention of one call is. Queries with less than two allowed keys are left out.

    Args:
        heads: per head, the mean entropy of the weights over that of equal weights on all allowed keys: 0 if
            one key gets everything, 1 if all get the same; NaN if no query may choose.
        top: mean weight of the largest key.
        logit_rms: root mean square of the logits before the softmax (and before a mask is added).
        logit_max: the largest logit.

    Source: Zhai et al., Stabilizing transformer training by preventing attention entropy collapse, 2023,
    https://arxiv.org/abs/2303.06296; Dehghani et al., Scaling vision transformers to 22 billion parameters,
    2023, https://arxiv.org/abs/2302.05442 (growing logits).
    """

    heads: tuple[float, ...]
    top: float
    logit_rms: float
    logit_max: float

    @property
    def entropy(self) -> float:
        """The mean over heads; NaN heads are left out.

        >>> AttentionReading((0.5, math.nan, 1.0), top=0.5, logit_rms=1.0, logit_max=2.0).entropy
        0.75
        """
        known = [entropy for entropy in self.heads if not math.isnan(entropy)]
        return sum(known) / len(known) if known else math.nan


def read(values: Sequence[float]) -> AttentionReading:
    """The record of one attention call, from the numbers of any `observe` function."""
    *heads, top, logit_rms, logit_max = values
    return AttentionReading(tuple(heads), top, logit_rms, logit_max)


@torch.no_grad()
def observe(
    query: Float[Tensor, "*batch length E"],
    key: Float[Tensor, "*others keys E"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float64[Tensor, " numbers"]:
    """What `scaled_dot_product_attention` attends to; all arguments as it takes them.

    Args:
        query: [samples, heads, q, E], or without heads, or without both.
        key: likewise.
        attn_mask: True where a key is allowed, or added to the logits; any shape that broadcasts.
        is_causal: whether query i sees only the keys up to i.
        scale: of the logits, 1 / sqrt(E) by default.
        enable_gqa: whether several heads of queries share one of the keys.

    Returns:
        What `read` takes.

    >>> query, key = torch.zeros(2, 4, 5, 8), torch.randn(2, 4, 6, 8)
    >>> round(read(observe(query, key).tolist()).entropy, 4)
    1.0
    """
    samples, queries = _chosen(query)
    some, keys = _pick(query, query, samples, queries), _pick(key, query, samples)
    if enable_gqa:
        keys = keys.repeat_interleave(some.shape[1] // keys.shape[1], dim=1)
    mask = None if attn_mask is None else _pick(attn_mask, query, samples, queries)
    if is_causal:
        mask = (torch.arange(keys.shape[2], device=key.device) <= queries[:, None])[None, None]
    return _of_logits(_logits(some, keys, scale), mask)


@torch.no_grad()
def observe_multi_head(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Float64[Tensor, " numbers"]:
    """What `torch.nn.functional.multi_head_attention_forward` attends to; `args` and `kwargs` of its call.

    Only those queries and keys are projected that are looked at.

    >>> layer, x = torch.nn.MultiheadAttention(8, 2), torch.zeros(5, 3, 8)
    >>> weights = (layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight)
    >>> round(read(observe_multi_head((x, x, x, 8, 2, *weights, None), {}).tolist()).entropy, 4)
    1.0
    """
    call = _MULTI_HEAD.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    query, key = (x if x.dim() == 3 else x.unsqueeze(1) for x in (given["query"], given["key"]))
    samples = places(query.shape[1], SAMPLES, query.device)
    queries = places(query.shape[0], QUERIES, query.device)
    with torch.autocast(query.device.type, enabled=False):
        (query_weight, query_bias), key_projection = _projections(given)
        some = real(query.index_select(0, queries).index_select(1, samples))
        some = _split_heads(F.linear(some, query_weight, query_bias), given["num_heads"])
        logits = _logits(some, _projected_keys(given, key, samples, *key_projection), None)
    return _of_logits(logits, _multi_head_mask(given, samples, queries, logits))


@torch.no_grad()
def observe_logits(logits: Float[Tensor, "..."], dim: int = -1) -> Float64[Tensor, " numbers"]:
    """What a softmax written out by hand attends to, from its input.

    Args:
        logits: [samples, heads, q, k], or without heads, or without both; masks already in it.
        dim: over which the softmax runs.

    >>> logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]])
    >>> round(read(observe_logits(logits).tolist()).entropy, 4)
    1.0
    """
    some = _some(logits.movedim(dim, -1))
    return _of_logits(real(some), ~(some <= MASKED))


@torch.no_grad()
def observe_weights(weights: Float[Tensor, "..."]) -> Float64[Tensor, " numbers"]:
    """What attention weights attend to, where the logits are not known; all keys count as allowed.

    Args:
        weights: [samples, heads, q, k], or without heads, or without both; they sum to one over k.

    >>> read(observe_weights(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()).heads
    (0.0,)
    """
    some = real(_some(weights))
    unknown = some.new_full((2,), math.nan, dtype=torch.float64)
    keys = torch.full(some.shape[:3], some.shape[3], device=some.device)
    return torch.cat([_of_weights(some, keys), unknown])


def _of_logits(logits: Logits, mask: Mask | None) -> Float64[Tensor, " numbers"]:
    """Entropy of each head, top, rms and largest logit."""
    seen, keys = logits, torch.full((1, 1, 1), logits.shape[3], device=logits.device)
    weights, largest = logits, logits
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else ~(mask <= MASKED)
        keys, forbidden = allowed.expand_as(logits).sum(dim=3), ~allowed
        seen, largest = logits.masked_fill(forbidden, 0), logits.masked_fill(forbidden, -math.inf)
        weights = largest if mask.dtype == torch.bool else largest + mask
    keys = keys.expand(logits.shape[:3])
    rms = torch.linalg.vector_norm(seen, dtype=torch.float64) / keys.sum().sqrt()
    logit = torch.stack([rms, largest.amax().double()])
    return torch.cat([_of_weights(weights.softmax(dim=3), keys), logit])


def _of_weights(weights: Logits, keys: Int64[Tensor, "b h q"]) -> Float64[Tensor, " numbers"]:
    """Entropy of each head, and top, over the queries that may choose between at least two keys."""
    chooses = keys > 1
    counts = chooses.sum(dim=(0, 2))
    entropy = torch.special.entr(weights).sum(dim=3).double() / keys.double().log()
    heads = entropy.where(chooses, 0).sum(dim=(0, 2)) / counts
    top = weights.amax(dim=3).double().where(chooses, 0).sum() / counts.sum()
    return torch.cat([heads, top[None]])


def _logits(query: Float[Tensor, "b h q E"], key: Float[Tensor, "b H k E"], scale: float | None) -> Logits:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        return real(query) @ real(key).mT * scale


def _some(x: Float[Tensor, "..."]) -> Logits:
    return _pick(x, x, *_chosen(x))


def _chosen(query: Float[Tensor, "*batch length E"]) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " q"]]:
    """Which samples and which queries are looked at."""
    samples = math.prod(_lead(query))
    return places(samples, SAMPLES, query.device), places(query.shape[-2], QUERIES, query.device)


def _lead(query: Float[Tensor, "*batch length E"]) -> tuple[int, ...]:
    """The dimensions that number the samples: all before the heads, the first one if there are no heads."""
    return tuple(query.shape[:-3] if query.dim() > 3 else query.shape[:-2]) or (1,)


def _pick(
    x: Tensor, query: Tensor, samples: Int64[Tensor, " b"], queries: Int64[Tensor, " q"] | None = None
) -> Shaped[Tensor, "b h #q _"]:
    """Some samples and queries of what has the query's dimensions, or broadcasts to them."""
    x = x[(None,) * (query.dim() - x.dim())]
    x = x if query.dim() > 3 else x.unsqueeze(-3)
    x = x if x.dim() > 3 else x[None]
    x = x.expand(*_lead(query), *x.shape[-3:]).flatten(0, -4).index_select(0, samples)
    return x if queries is None or x.shape[2] == 1 else x.index_select(2, queries)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _projections(given: Mapping[str, Any]) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias for the queries, and for the keys."""
    if given["use_separate_proj_weight"]:
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    bias = given["in_proj_bias"]
    biases = (None, None) if bias is None else real(bias).chunk(3)[:2]
    return [(real(weight), bias) for weight, bias in zip(weights, biases, strict=True)]


def _split_heads(x: Float[Tensor, "length b HE"], heads: int) -> Float[Tensor, "b h length E"]:
    return x.view(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _projected_keys(
    given: Mapping[str, Any],
    key: Float[Tensor, "k B E"],
    samples: Int64[Tensor, " b"],
    weight: Tensor,
    bias: Tensor | None,
) -> Float[Tensor, "b h keys D"]:
    heads, static = given["num_heads"], given["static_k"]
    if static is not None:
        keys = real(static.reshape(-1, heads, *static.shape[1:]).index_select(0, samples))
    else:
        keys = F.linear(real(key.index_select(1, samples)), weight, bias)
        if given["bias_k"] is not None:
            keys = torch.cat([keys, real(given["bias_k"]).expand(1, *keys.shape[1:])])
        keys = _split_heads(keys, heads)
    return F.pad(keys, (0, 0, 0, 1)) if given["add_zero_attn"] else keys


def _multi_head_mask(
    given: Mapping[str, Any], samples: Int64[Tensor, " b"], queries: Int64[Tensor, " q"], logits: Logits
) -> Mask:
    """What is added to the logits: nothing for the keys that torch appends."""
    attention, padding = given["attn_mask"], given["key_padding_mask"]
    total = torch.zeros_like(logits)
    if attention is not None:
        heads = 1 if attention.dim() == 2 else given["num_heads"]
        attention = attention.reshape(-1, heads, *attention.shape[-2:])
        attention = attention if len(attention) == 1 else attention.index_select(0, samples)
        total[..., : attention.shape[3]] += _added(attention.index_select(2, queries))
    if padding is not None:
        padding = padding.reshape(-1, padding.shape[-1]).index_select(0, samples)
        total[..., : padding.shape[1]] += _added(padding)[:, None, None]
    return total


def _added(mask: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A boolean mask of multi-head attention is true where a key is forbidden."""
    if mask.dtype != torch.bool:
        return real(mask)
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)
