"""Mutation operators: single changes that spoil many programs, and many not at all.

The kinds are those of faults that were found in real programs, and of the operators made after them
(Humbatova et al., Taxonomy of real faults in deep learning systems, ICSE 2020,
https://doi.org/10.1145/3377811.3380395; DeepCrime, ISSTA 2021, https://doi.org/10.1145/3460319.3464825;
AUTOTRAINER, ICSE 2021; NeuraLint, TOSEM 2021; MLM4DNN, FSE 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.mutations.programs import Program

Change = Callable[[Program], Program]


@dataclass(frozen=True)
class Operator:
    """A change of one thing.

    Args:
        parts: the parts of the setup to blame.
        change: returns the program as it is where there is nothing to change.
        tasks: what kinds of programs it is for.
    """

    parts: tuple[str, ...]
    change: Change
    tasks: tuple[str, ...] = ("classes", "binary", "amounts")

    def __call__(self, program: Program) -> Program | None:
        """The mutant, or None where it would be the same program."""
        changed = self.change(program) if program.task in self.tasks else program
        return None if changed == program else changed


def _set(**facts: object) -> Change:
    return lambda program: replace(program, **facts)  # type: ignore[arg-type]


def _rate(factor: float) -> Change:
    return lambda program: replace(program, rate=factor * program.rate)


def _if(wanted: Callable[[Program], bool], change: Change) -> Change:
    return lambda program: change(program) if wanted(program) else program


def _dense(program: Program) -> bool:
    return not program.filters


def _deeper(count: int, activation: str) -> Change:
    return lambda program: replace(program, hidden=program.hidden[:1] * count, activation=activation)


def _fewer_epochs(factor: float) -> Change:
    return lambda program: replace(program, epochs=max(1, int(program.epochs * factor)))


def _squashed(program: Program) -> Program:
    """A softmax or sigmoid in front of a loss that has its own."""
    logits = {"categorical_crossentropy": "dense_logits", "binary_crossentropy": "binary_logits"}
    last = "sigmoid" if program.task == "binary" else "softmax"
    return replace(program, last=last, loss=logits.get(program.loss, program.loss))


_RATE, _OPTIMIZER, _OUTPUT = ("learning_rate",), ("optimizer", "learning_rate"), ("output", "loss")
_INIT, _ACTIVATION, _INPUT = ("initialization",), ("activation",), ("input",)
_LABELS, _REGULARIZATION, _SIZE = ("labels",), ("regularization",), ("capacity", "depth")
_DEPTH = ("activation", "depth", "initialization", "normalization")

OPERATORS: Mapping[str, Operator] = {
    "rate x 0.001": Operator(_RATE, _rate(1e-3)),
    "rate x 0.01": Operator(_RATE, _rate(1e-2)),
    "rate x 0.1": Operator(_RATE, _rate(0.1)),
    "rate x 10": Operator(_RATE, _rate(10.0)),
    "rate x 100": Operator(_RATE, _rate(100.0)),
    "rate x 1000": Operator(_RATE, _rate(1000.0)),
    "SGD 0.01": Operator(_OPTIMIZER, _set(optimizer="sgd", rate=0.01, momentum=0.0)),
    "RMSprop 0.001": Operator(_OPTIMIZER, _set(optimizer="rmsprop", rate=1e-3)),
    "Adagrad 0.001": Operator(_OPTIMIZER, _set(optimizer="adagrad", rate=1e-3)),
    "Adadelta 0.001": Operator(_OPTIMIZER, _set(optimizer="adadelta", rate=1e-3)),
    "Adam, epsilon 1": Operator(
        ("optimizer", "learning_rate", "numerics"), _set(optimizer="adam", rate=1e-3, epsilon=1.0)
    ),
    "uphill": Operator(("loss", "wiring", "optimizer"), _set(uphill=True)),
    "weights zero": Operator(_INIT, _set(init="zeros")),
    "weights one": Operator(_INIT, _set(init="ones")),
    "weights constant": Operator(_INIT, _set(init="constant")),
    "weights tiny": Operator(_INIT, _set(init="tiny")),
    "weights normal 0.05": Operator(_INIT, _set(init="normal")),
    "weights normal 1": Operator(_INIT, _set(init="wide")),
    "weights normal 10": Operator(_INIT, _set(init="huge")),
    "weights positive": Operator(_INIT, _set(init="positive")),
    "biases -3": Operator(_INIT, _set(bias=-3.0)),
    "no bias": Operator(_SIZE, _set(bias=None)),
    "hidden sigmoid": Operator(_ACTIVATION, _set(activation="sigmoid")),
    "hidden linear": Operator((*_ACTIVATION, "capacity"), _set(activation="linear")),
    "hidden softmax": Operator(_ACTIVATION, _set(activation="softmax")),
    "hidden tanh": Operator(_ACTIVATION, _set(activation="tanh")),
    "six sigmoid layers": Operator(_DEPTH, _if(_dense, _deeper(6, "sigmoid"))),
    "twelve ReLU layers": Operator(_DEPTH, _if(_dense, _deeper(12, "relu"))),
    "one hidden unit": Operator(_SIZE, lambda p: replace(p, hidden=(*p.hidden[:-1], 1))),
    "no hidden layer": Operator(_SIZE, _if(_dense, _set(hidden=()))),
    "squared error of classes": Operator(_OUTPUT, _set(loss="mse"), ("binary",)),
    "absolute error of classes": Operator(_OUTPUT, _set(loss="mae"), ("binary",)),
    "squared error of one-hot": Operator(_OUTPUT, _set(loss="mse", last="softmax"), ("classes",)),
    "absolute error of one-hot": Operator(_OUTPUT, _set(loss="mae", last="softmax"), ("classes",)),
    "binary cross-entropy of softmax": Operator(
        _OUTPUT, _set(loss="binary_crossentropy", last="softmax"), ("classes",)
    ),
    "hinge of 0 and 1": Operator(
        ("loss", "output", "labels"), _set(loss="hinge", last="linear"), ("binary",)
    ),
    "cross-entropy of amounts": Operator(
        _OUTPUT, _set(loss="binary_crossentropy", last="sigmoid"), ("amounts",)
    ),
    "absolute error": Operator(("loss",), _set(loss="mae"), ("amounts",)),
    "sum, no mean": Operator(("loss", "learning_rate"), _set(loss="sum"), ("amounts",)),
    "all pairs": Operator(("loss", "output", "wiring"), _set(loss="pairs"), ("amounts",)),
    "last linear": Operator(
        ("output", "loss"), _if(lambda p: "logits" not in p.loss, _set(last="linear")), ("classes", "binary")
    ),
    "last ReLU": Operator(("output", "activation"), _set(last="relu")),
    "last sigmoid": Operator(("output", "activation"), _set(last="sigmoid"), ("classes", "amounts")),
    "last tanh": Operator(("output", "activation"), _set(last="tanh")),
    "last softmax of one": Operator(("output", "loss"), _set(last="softmax"), ("binary", "amounts")),
    "squashed twice": Operator(_OUTPUT, _squashed, ("classes", "binary")),
    "one unit for all classes": Operator(
        _OUTPUT, _set(units=1, last="sigmoid", loss="binary_crossentropy"), ("classes",)
    ),
    "raw input": Operator(_INPUT, _set(scaling="raw")),
    "input x 100": Operator(_INPUT, _set(factor=100.0)),
    "input x 0.001": Operator(_INPUT, _set(factor=1e-3)),
    "input + 100": Operator(_INPUT, _set(offset=100.0)),
    "row numbers": Operator(_INPUT, _if(_dense, _set(odd="numbers"))),
    "one large column": Operator(_INPUT, _if(_dense, _set(odd="large"))),
    "raw amounts": Operator(_LABELS, _set(amounts="raw"), ("amounts",)),
    "amounts x 100": Operator(_LABELS, _set(stretch=100.0), ("amounts",)),
    "amounts x 0.001": Operator(_LABELS, _set(stretch=1e-3), ("amounts",)),
    "labels exchanged": Operator(_LABELS, _set(exchanged=1.0)),
    "half of the labels exchanged": Operator(_LABELS, _set(exchanged=0.5)),
    "one epoch": Operator(("epochs", "learning_rate"), _set(epochs=1)),
    "a tenth of the epochs": Operator(("epochs", "learning_rate"), _fewer_epochs(0.1)),
    "full batches": Operator(("batch", "epochs", "learning_rate"), _set(batch=100_000)),
    "batches of 512": Operator(("batch", "epochs", "learning_rate"), _set(batch=512)),
    "batches of 2": Operator(("batch",), _set(batch=2)),
    "dropout 0.5": Operator(_REGULARIZATION, _set(dropout=0.5)),
    "dropout 0.9": Operator(_REGULARIZATION, _set(dropout=0.9)),
    "penalty 0.01": Operator(_REGULARIZATION, _set(penalty=0.01)),
    "penalty 1": Operator(_REGULARIZATION, _set(penalty=1.0)),
    "batch normalization": Operator(("normalization",), _set(normalized=True)),
    "frozen": Operator(("wiring",), _set(frozen=True)),
}
"""By their names."""
