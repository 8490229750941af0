"""The same networks in JAX: jitted steps in a scan, one network after the other or all by vmap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp


def vmapped(sizes: Sequence[int], rows: int, steps: int, networks: int, rate: float, x: Any, y: Any) -> None:
    """All networks in one computation."""
    keys = jax.random.split(jax.random.key(0), networks)
    _all(tuple(sizes), rows, steps, rate, x, y, keys).block_until_ready()


def one_by_one(
    sizes: Sequence[int], rows: int, steps: int, networks: int, rate: float, x: Any, y: Any
) -> None:
    """One compiled training after the other."""
    for key in jax.random.split(jax.random.key(0), networks):
        _one(tuple(sizes), rows, steps, rate, x, y, key).block_until_ready()


def _train(sizes: tuple[int, ...], rows: int, steps: int, rate: float, x: Any, y: Any, key: Any) -> Any:
    """Adam over shuffled batches; the losses of all steps."""
    start, order = jax.random.split(key)
    parameters = _start(sizes, start)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    epochs = -(-steps * rows // len(x))
    shuffled = [jax.random.permutation(k, len(x)) for k in jax.random.split(order, epochs)]
    batches = jnp.concatenate(shuffled)[: steps * rows].reshape(steps, rows)

    def step(state: Any, batch: Any) -> Any:
        parameters, mean, square, count = state
        loss, slope = jax.value_and_grad(_loss)(parameters, x[batch], y[batch])
        count = count + 1
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, slope)
        square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, slope)
        scale = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        parameters = jax.tree.map(
            lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8), parameters, mean, square
        )
        return (parameters, mean, square, count), loss

    return jax.lax.scan(step, (parameters, zeros, zeros, jnp.zeros(())), batches)[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _one(sizes: tuple[int, ...], rows: int, steps: int, rate: float, x: Any, y: Any, key: Any) -> Any:
    return _train(sizes, rows, steps, rate, x, y, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _all(sizes: tuple[int, ...], rows: int, steps: int, rate: float, x: Any, y: Any, keys: Any) -> Any:
    return jax.vmap(lambda key: _train(sizes, rows, steps, rate, x, y, key))(keys)


def _start(sizes: tuple[int, ...], key: Any) -> list[tuple[Any, Any]]:
    """Weights and biases drawn as torch draws them."""
    found = []
    for own, (inputs, outputs) in zip(jax.random.split(key, len(sizes) - 1), pairwise(sizes), strict=True):
        weights, biases = jax.random.split(own)
        bound = inputs**-0.5
        weight = jax.random.uniform(weights, (inputs, outputs), minval=-bound, maxval=bound)
        found.append((weight, jax.random.uniform(biases, (outputs,), minval=-bound, maxval=bound)))
    return found


def _loss(parameters: Any, x: Any, y: Any) -> Any:
    for weight, bias in parameters[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = parameters[-1]
    logits = jax.nn.log_softmax(x @ weight + bias)
    return -jnp.take_along_axis(logits, y[:, None], axis=1).mean()
