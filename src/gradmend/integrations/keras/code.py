"""Changes of a Keras model's twin as code for Keras."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from gradmend.remedies import Change, ClipNorm, ClipValue, LearningRate, StandardizeInput, UseOptimizer
from gradmend.surgery import Edit

_Configs = dict[str, dict[str, Any]]
"""New entries of the configurations of layers, by the layer's name."""

_ACTIVATIONS = {
    "ReLU": "relu",
    "SELU": "selu",
    "ELU": "elu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Mish": "mish",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Identity": "linear",
}
_INITIALIZERS = {
    "partial(nn.init.kaiming_normal_, nonlinearity='linear')": "lecun_normal",
    "partial(nn.init.kaiming_normal_, a=0.0, nonlinearity='leaky_relu')": "he_normal",
    "nn.init.xavier_normal_": "glorot_normal",
    "nn.init.orthogonal_": {"class_name": "Orthogonal", "config": {"gain": 1.0}},
    "nn.init.zeros_": "zeros",
}
_WITH_NUMBER = {"orthogonal_, gain": ("Orthogonal", "gain"), "normal_, std": ("RandomNormal", "stddev")}
_PUT = re.compile(r'model\.set_submodule\("([^"]+)", nn\.(\w+)\((?:negative_slope=)?([-\d.e]*)\)\)')
_DRAWN = re.compile(r'set_weight\(model\.get_submodule\("([^"]+)"\), (.+?)(?:, bias=(.+))?\)', re.S)
_LEAKY = re.compile(r"partial\(nn\.init\.kaiming_normal_, a=([-\d.e]+), nonlinearity='leaky_relu'\)")
_ABSORBED = re.compile(r'absorb\(model\.get_submodule\(("[^"]+")\)(.*)\)')
_NUMBER = re.compile(r"partial\(nn\.init\.(\w+, \w+)=([-\d.e]+)\)")
_WITHIN = re.compile(r'\("(body\.)+')
"""What stands in front of a layer's name once something has been put before the model."""

_OPTIMIZERS = {"NAdam": "Nadam"}
_COMPILED = (UseOptimizer, LearningRate, ClipNorm, ClipValue)

_CLONE = """\
changes = {{
{changes}
}}


def changed(layer):
    return type(layer).from_config({{**layer.get_config(), **changes.get(layer.name, {{}})}})


model = keras.models.clone_model(original, clone_function=changed)
for old, new in zip(original.layers, model.layers):
    if "kernel_initializer" not in changes.get(old.name, {{}}):
        new.set_weights(old.get_weights())
"""
_ABSORB = """\
def absorb(name, before=1.0, shift=0.0, after=1.0):
    layer = model.get_layer(name)
    sums = keras.ops.sum(layer.kernel, axis=list(range(len(layer.kernel.shape) - 1)))
    layer.bias.assign(after * (layer.bias + shift * sums))
    layer.kernel.assign(before * after * layer.kernel)


"""
_STANDARDIZE = """\
standardized = keras.layers.Normalization()
standardized.adapt(x)  # x: the inputs that you train on
model = keras.Sequential([standardized, model])
"""


def in_keras(changes: Sequence[Change], model: Any) -> str:
    """Changes of a twin as Python for the Keras model itself; what has no counterpart is left as a comment.

    Args:
        changes: of the twin, in their order.
        model: of Keras.

    Returns:
        Code that works on the variable `model`, and makes it anew; "" without changes.
    """
    known: _Configs = {}
    absorbed, parts, words = "", [], []
    for change in changes:
        found = _told(change.edits, model)
        if found is not None:
            for name, entries in found[0].items():
                known.setdefault(name, {}).update(entries)
            absorbed += found[1]
        elif isinstance(change.remedy, StandardizeInput):
            parts.append(_STANDARDIZE)
        elif not isinstance(change.remedy, _COMPILED):
            words.append(_comment(change))
    if known:
        rows = "\n".join(f"    {name!r}: {entries!r}," for name, entries in known.items())
        parts.insert(0, _CLONE.format(changes=rows) + ("\n\n" + _ABSORB + absorbed if absorbed else ""))
    if parts or any(isinstance(change.remedy, _COMPILED) for change in changes):
        parts = ["import keras\n\noriginal = model\n", *parts, _compile(changes, model.compiled)]
    return "\n".join(parts + words)


def _told(edits: Sequence[Edit], model: Any) -> tuple[_Configs, str] | None:
    """Edits as configurations of Keras's layers, and calls of `absorb`; None if that does not say it all."""
    configs: _Configs = {}
    calls = ""
    for edit in edits:
        code = _WITHIN.sub('("', edit.code)
        entry = _activation(code, model) or _weights(code, model)
        call = _ABSORBED.fullmatch(code)
        if entry is not None:
            configs.setdefault(entry[0], {}).update(entry[1])
        elif call is not None:
            calls += f"absorb({call[1]}{call[2]})\n"
        else:
            return None
    return (configs, calls) if configs else None


def _activation(code: str, model: Any) -> tuple[str, dict[str, Any]] | None:
    match = _PUT.fullmatch(code)
    function = _function(match[2], match[3]) if match else None
    if match is None or function is None:
        return None
    for layer in model.layers:
        config = layer.get_config()
        names = (layer.name, f"{layer.name}_{config.get('activation')}")
        if "activation" in config and match[1] in names:
            return layer.name, {"activation": function}
    return None


def _function(kind: str, number: str) -> Any:
    """How Keras names an activation of torch with this number, if any.

    >>> _function("SiLU", ""), _function("LeakyReLU", "0.2")["config"]
    ('silu', {'negative_slope': 0.2})
    """
    if kind != "LeakyReLU":
        return None if number else _ACTIVATIONS.get(kind)
    slope = {"negative_slope": ast.literal_eval(number or "0.01")}
    return {"module": "keras.layers", "class_name": kind, "config": slope, "registered_name": None}


def _weights(code: str, model: Any) -> tuple[str, dict[str, Any]] | None:
    match = _DRAWN.fullmatch(code)
    if match is None or match[1] not in {layer.name for layer in model.layers}:
        return None
    kernel, bias = _initializer(match[2]), _initializer(match[3] or "nn.init.zeros_")
    if kernel is None or bias is None:
        return None
    return match[1], {"kernel_initializer": kernel, "bias_initializer": bias}


def _initializer(code: str) -> Any:
    """How Keras draws what this code of torch draws.

    >>> _initializer("partial(nn.init.normal_, std=0.5)")
    {'class_name': 'RandomNormal', 'config': {'stddev': 0.5}}
    """
    if code in _INITIALIZERS:
        return _INITIALIZERS[code]
    if (match := _LEAKY.fullmatch(code)) is not None:
        scale = 2 / (1 + ast.literal_eval(match[1]) ** 2)
        return {"class_name": "VarianceScaling", "config": {"scale": scale, "mode": "fan_in"}}
    if (match := _NUMBER.fullmatch(code)) is not None and match[1] in _WITH_NUMBER:
        name, key = _WITH_NUMBER[match[1]]
        return {"class_name": name, "config": {key: ast.literal_eval(match[2])}}
    return None


def _compile(changes: Sequence[Change], compiled: bool) -> str:
    """A call of `compile` with what is new, and the rest as it was."""
    options: dict[str, float] = {}
    for remedy in (change.remedy for change in changes):
        if isinstance(remedy, ClipNorm):
            options["global_clipnorm"] = remedy.max_norm
        elif isinstance(remedy, ClipValue):
            options["clipvalue"] = remedy.value
    if not compiled or any(isinstance(change.remedy, UseOptimizer) for change in changes):
        optimizer = _written(changes[-1], options)
    else:
        rates = [change.remedy.lr for change in changes if isinstance(change.remedy, LearningRate)]
        new = {**({"learning_rate": rates[-1]} if rates else {}), **options}
        config = "original.optimizer.get_config()"
        optimizer = f"type(original.optimizer).from_config({config}{f' | {new!r}' if new else ''})"
    loss = "original.loss" if compiled else "your_loss"
    return f"optimizer = {optimizer}\nmodel.compile(optimizer, loss={loss})\n"


def _written(last: Change, options: Mapping[str, float]) -> str:
    made = last.setup.build_optimizer()
    group = made.param_groups[0]
    name = type(made).__name__
    numbers = {"learning_rate": group["lr"], **options}
    if group.get("momentum"):
        numbers["momentum"] = group["momentum"]
    arguments = ", ".join(f"{key}={value!r}" for key, value in numbers.items())
    return f"keras.optimizers.{_OPTIMIZERS.get(name, name)}({arguments})"


def _comment(change: Change) -> str:
    """What is left to the user, with torch's code for it."""
    code = "\n".join(edit.code for edit in change.edits)
    text = f"To be done by hand in Keras: {change.text}. On layers of torch of the same names it is:\n{code}"
    return textwrap.indent(text, "# ", lambda _: True) + "\n"
