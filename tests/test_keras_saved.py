"""Saved Keras models: read, translated, checked and mended, against Keras itself."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="Keras is not installed")

from gradmend.causes import Cause  # noqa: E402
from gradmend.data import Data, load  # noqa: E402
from gradmend.diagnosis import diagnose  # noqa: E402
from gradmend.errors import BatchError, DataError, TargetError  # noqa: E402
from gradmend.integrations.keras.code import in_keras  # noqa: E402
from gradmend.integrations.keras.saved import KerasModule, SavedModel  # noqa: E402
from gradmend.integrations.keras.twin import twin  # noqa: E402
from gradmend.remedies import (  # noqa: E402
    BatchNorm,
    ClipNorm,
    Critical,
    He,
    LearningRate,
    Orthogonal,
    Remedy,
    SigmoidAsTanh,
    StandardizeInput,
    SwapActivation,
    Tailor,
    UseOptimizer,
)
from gradmend.setup import Budget, Setup  # noqa: E402
from gradmend.target import Wishes, find  # noqa: E402
from gradmend.treatment import mend  # noqa: E402

L = keras.layers
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((64, 8)).astype("float32")
Y = X[:, :3].argmax(1)
BATCH = torch.from_numpy(X), torch.from_numpy(Y)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def chain(*layers: Any, shape: tuple[int, ...] = (8,)) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([L.Input(shape), *layers])


def classifier(activation: str = "relu", depth: int = 1, optimizer: Any = "sgd") -> Any:
    model = chain(
        *[L.Dense(16, activation, name=f"hidden{i}") for i in range(depth)], L.Dense(3, name="last")
    )
    model.compile(optimizer, CROSS_ENTROPY)
    return model


def activations() -> Any:
    names = (
        "relu",
        "sigmoid",
        "tanh",
        "elu",
        "selu",
        "gelu",
        "silu",
        "softplus",
        "leaky_relu",
        "mish",
        "softmax",
    )
    return chain(*[L.Dense(8, name) for name in names])


def layers_of_their_own() -> Any:
    own = (L.ReLU(), L.Activation("tanh"), L.LeakyReLU(negative_slope=0.3), L.LayerNormalization(), L.ELU())
    return chain(*[layer for one in own for layer in (L.Dense(8, use_bias=False), one)], L.Softmax())


def convolutions() -> Any:
    return chain(
        L.Conv2D(6, 3, padding="same", strides=2),
        L.BatchNormalization(),
        L.ReLU(),
        L.Conv2D(6, (3, 2), dilation_rate=2, groups=2, padding="same", activation="tanh"),
        L.MaxPooling2D(2),
        L.Dropout(0.2),
        L.Flatten(),
        L.Dense(3),
        shape=(10, 9, 2),
    )


def averages() -> Any:
    parts = (L.Conv2D(4, 3, activation="relu"), L.AveragePooling2D(2), L.GlobalAveragePooling2D(), L.Dense(2))
    return chain(*parts, shape=(9, 9, 3))


def branched() -> Any:
    x = keras.Input((8,))
    h = L.Dense(8, "relu", name="branch")(x)
    return keras.Model(x, L.Dense(3, name="last")(L.Add()([h, x])))


@pytest.mark.parametrize("make", [activations, layers_of_their_own, convolutions, averages])
def test_a_twin_computes_what_keras_does(make: Any) -> None:
    model = make()
    for weight in model.weights:  # so that nothing is hidden by zeros and ones
        if "float" in weight.dtype:
            weight.assign(weight.value + 0.1 * torch.rand(*weight.shape))
    other = twin(model)
    assert other is not None
    x = torch.randn(5, *model.input_shape[1:])
    torch.testing.assert_close(other.eval()(x), model(x, training=False), rtol=1e-5, atol=1e-6)


def test_the_gradients_of_a_twin_are_those_of_keras() -> None:
    model = classifier(depth=2)
    other = twin(model)
    assert other is not None
    CROSS_ENTROPY(BATCH[1], model(BATCH[0], training=True)).backward()
    nn.CrossEntropyLoss()(other(BATCH[0]), BATCH[1]).backward()
    for layer in model.layers:
        found = other.get_submodule(layer.name)
        torch.testing.assert_close(found.weight.grad.t(), layer.kernel.value.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.bias.grad, layer.bias.value.grad, rtol=1e-4, atol=1e-7)


def test_a_frozen_layer_stays_frozen() -> None:
    model = classifier(depth=2)
    model.layers[0].trainable = False
    other = twin(model)
    assert other is not None
    assert [p.requires_grad for p in other.parameters()] == [False, False, True, True, True, True]


def test_what_has_no_counterpart_has_no_twin() -> None:
    class Doubled(L.Dense):  # type: ignore[misc]
        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return 2 * super().call(inputs, training)

    assert twin(branched()) is None
    assert twin(chain(Doubled(3))) is None
    assert twin(chain(L.Dense(3, lambda x: x + 1))) is None
    assert twin(chain(L.LSTM(3), shape=(4, 2))) is None


def optimizers() -> dict[str, Any]:
    o = keras.optimizers
    falling = o.schedules.ExponentialDecay(0.1, 3, 0.5)
    return {
        "sgd": o.SGD(0.1),
        "momentum": o.SGD(0.1, momentum=0.9),
        "nesterov": o.SGD(0.1, momentum=0.9, nesterov=True),
        "adam": o.Adam(0.01),
        "amsgrad": o.Adam(0.01, beta_1=0.8, amsgrad=True),
        "adamw": o.AdamW(0.01, weight_decay=0.1),
        "adamax": o.Adamax(0.01),
        "adadelta": o.Adadelta(1.0),
        "adagrad": o.Adagrad(0.1),
        "rmsprop": o.RMSprop(0.01),
        "clipped together": o.SGD(0.5, global_clipnorm=0.1),
        "clipped each": o.SGD(0.5, clipnorm=0.1),
        "clipped values": o.SGD(0.5, clipvalue=0.01),
        "scheduled": o.SGD(falling),
    }


@pytest.mark.parametrize("name", list(optimizers()))
def test_a_setup_trains_as_keras_does(name: str) -> None:
    model = classifier(optimizer=optimizers()[name])
    setup = SavedModel(model, name).setup()
    losses = [(_stepped(setup, state), float(model.train_on_batch(X, Y))) for state in _states(setup)]
    ours, theirs = zip(*losses, strict=True)
    # epsilon is inside the root in Keras's Adagrad and RMSprop, and beside it in torch's
    assert ours == pytest.approx(theirs, rel=3e-3 if name in ("adagrad", "rmsprop") else 1e-4)
    assert ours[-1] < ours[0]


def _states(setup: Setup) -> list[tuple[Any, Any]]:
    optimizer = setup.build_optimizer()
    return [(optimizer, setup.schedule(optimizer) if setup.schedule else None)] * 6


def _stepped(setup: Setup, state: tuple[Any, Any]) -> float:
    optimizer, schedule = state
    optimizer.zero_grad()
    loss = setup.loss(BATCH)
    loss.backward()
    if setup.gradient_transform:
        setup.gradient_transform(list(setup.model.parameters()))
    optimizer.step()
    if schedule:
        schedule.step()
    return loss.item()


def test_an_optimizer_that_torch_has_not_is_said() -> None:
    saved = SavedModel(classifier(optimizer=keras.optimizers.Lion(0.01)), "lion.keras")
    assert saved.setup().optimizer is None
    assert "torch has no Lion like that of Keras" in saved.notes


def test_softmax_and_probabilities_are_no_fault() -> None:
    model = chain(L.Dense(16, "relu"), L.Dense(3, "softmax"))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    assert diagnose(SavedModel(model, "m").setup(), [BATCH] * 4).healthy


def test_softmax_before_a_loss_of_logits_is() -> None:
    model = chain(L.Dense(16, "relu"), L.Dense(3, "softmax"))
    model.compile(keras.optimizers.Adam(0.01), CROSS_ENTROPY)
    found = diagnose(SavedModel(model, "m").setup(), [BATCH] * 4)
    assert Cause.SOFTMAX_BEFORE_LOGITS_LOSS in {finding.cause for finding in found.findings}


def test_a_model_without_a_twin_is_checked_as_keras_runs_it() -> None:
    model = branched()
    model.compile(keras.optimizers.Adam(0.01), CROSS_ENTROPY)
    saved = SavedModel(model, "m")
    found = diagnose(saved.setup(), [BATCH] * 4)
    assert found.healthy
    assert {"layers.branch.matmul", "layers.last.matmul"} <= {r.site.name for r in found.profile.sites}
    assert "mend changes no layers" in saved.notes[0]


def test_a_module_of_keras_trains_and_copies_as_one_of_torch() -> None:
    import copy

    module = KerasModule(chain(L.Dropout(0.5), L.Dense(3)))
    x = torch.ones(4, 8)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert not other.training
    assert [p.shape for p in other.parameters()] == [p.shape for p in module.parameters()]
    assert other(x).abs().sum() > 0 == module(x).abs().sum()


# data


def data(*shape: int, y: torch.Tensor | None = None) -> Data:
    x = torch.randn(6, *shape)
    y = torch.arange(6) % 3 if y is None else y
    return Data(x[:4], y[:4], x[4:], y[4:], name="toy", classes=3)


@pytest.mark.parametrize(
    ("shape", "given"),
    [((8,), (8,)), ((64,), (1, 8, 8)), ((8, 8, 1), (1, 8, 8)), ((4, 5, 3), (3, 4, 5))],
    ids=str,
)
def test_images_are_turned_into_what_the_model_takes(shape: tuple[int, ...], given: tuple[int, ...]) -> None:
    model = chain(L.Flatten(), L.Dense(3), shape=shape)
    rows = data(*given)
    found = SavedModel(model, "m").fitting(rows)
    assert found.x.shape[1:] == found.x_test.shape[1:] == shape
    assert torch.equal(found.x.flatten().sort().values, rows.x.flatten().sort().values)
    if given == (3, 4, 5):
        assert torch.equal(found.x[0, 1, 2], rows.x[0, :, 1, 2])


def test_targets_are_one_hot_where_the_loss_asks_for_it() -> None:
    model = chain(L.Dense(3))
    model.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True))
    found = SavedModel(model, "m").fitting(data(8))
    assert found.y.tolist()[:3] == torch.eye(3).tolist()
    assert SavedModel(classifier(), "m").fitting(data(8)).y.tolist() == [0, 1, 2, 0]


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(BatchError, match=r"takes rows of \[8\], and the data has rows of \[7\]"):
        SavedModel(classifier(), "m.keras").fitting(data(7))


# targets


def test_a_saved_model_is_a_target(tmp_path: Path) -> None:
    file = str(tmp_path / "model.keras")
    model = chain(L.Dense(10), shape=(64,))
    model.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY)
    model.save(file)
    found = find(file, Wishes(data="digits"))
    assert isinstance(found.setup.model, nn.Sequential)
    assert found.setup.build_optimizer().param_groups[0]["lr"] == 0.5
    assert len(found.batches()[0][0]) == 64
    assert (
        find(file, Wishes(data="digits", optimizer="Adam:0.25")).setup.build_optimizer().defaults["lr"]
        == 0.25
    )


def test_one_that_was_not_compiled_gets_the_usual(tmp_path: Path) -> None:
    file = str(tmp_path / "model.keras")
    chain(L.Dense(10), shape=(64,)).save(file)
    found = find(file, Wishes(data="digits"))
    assert isinstance(found.setup.loss_fn, nn.CrossEntropyLoss)
    assert isinstance(found.setup.build_optimizer(), torch.optim.Adam)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="There is no file"):
        find(str(tmp_path / "none.keras"), Wishes(data="digits"))
    (tmp_path / "bad.keras").write_text("nothing")
    with pytest.raises(TargetError, match="Keras cannot read"):
        find(str(tmp_path / "bad.keras"), Wishes(data="digits"))
    classifier().save(tmp_path / "good.keras")
    with pytest.raises(DataError, match="What data shall"):
        find(str(tmp_path / "good.keras"), Wishes())


# mending


def changed(model: Any, *remedies: Remedy) -> tuple[str, Any]:
    """The code of these remedies, and the model that it makes."""
    setup, changes = SavedModel(model, "m").setup(), []
    for remedy in remedies:
        changes.append(remedy.apply(setup, [BATCH]))
        setup = changes[-1].setup
    code = in_keras(changes, model)
    names = {"model": model, "x": X}
    exec(code, names)
    return code, names["model"]


def test_layers_get_activations_and_weights() -> None:
    _, model = changed(classifier("sigmoid", 2), SwapActivation("ReLU"), He())
    assert [layer.activation.__name__ for layer in model.layers] == ["relu", "relu", "linear"]
    variances = [layer.kernel.value.detach().var().item() * layer.kernel.shape[0] for layer in model.layers]
    assert variances == pytest.approx([2, 2, 1], rel=0.5)
    assert type(model.optimizer).__name__ == "SGD"


def test_other_layers_keep_their_weights() -> None:
    before = classifier("sigmoid", 2)
    _, after = changed(before, SwapActivation("Tanh"))
    assert all(map(np.array_equal, before.get_weights(), after.get_weights()))
    x = torch.randn(4, 8)
    assert not torch.allclose(before(x), after(x))


@pytest.mark.parametrize(
    "remedy", [Orthogonal(), Critical(), Tailor(), SigmoidAsTanh()], ids=lambda remedy: type(remedy).__name__
)
def test_the_changed_model_is_like_its_changed_twin(remedy: Remedy) -> None:
    model = chain(*[L.Dense(200, "sigmoid") for _ in range(3)], L.Dense(200))
    model.compile("sgd", "mse")
    x = torch.randn(64, 8)
    change = remedy.apply(SavedModel(model, "m").setup(), [(x, torch.randn(64, 200))])
    names = {"model": model}
    code = in_keras([change], model)
    assert "by hand" not in code
    exec(code, names)
    with torch.no_grad():
        ours, theirs = change.setup.model(x), names["model"](x)
    tolerance = 1e-4 if isinstance(remedy, SigmoidAsTanh) else 0.5  # the others draw anew
    assert ours.square().mean().item() == pytest.approx(theirs.square().mean().item(), rel=tolerance)
    linear = [module for module in change.setup.model.modules() if isinstance(module, nn.Linear)]
    for mine, layer in zip(linear, names["model"].layers, strict=True):
        size = layer.kernel.value.detach().square().mean().item()
        assert mine.weight.square().mean().item() == pytest.approx(size, rel=0.2)


def test_what_compile_takes_is_compiled() -> None:
    code, model = changed(classifier(), LearningRate(0.25), ClipNorm(2.0))
    config = model.optimizer.get_config()
    assert (config["learning_rate"], config["global_clipnorm"]) == (0.25, 2.0)
    assert "clone" not in code
    _, model = changed(classifier(), UseOptimizer("Adam", lr=0.125))
    assert (type(model.optimizer).__name__, float(model.optimizer.learning_rate)) == ("Adam", 0.125)
    assert model.loss is CROSS_ENTROPY


def test_the_input_is_standardized() -> None:
    _, model = changed(classifier(), StandardizeInput())
    assert float(model.layers[0](100 * X + 7).std()) > 50
    assert float(model.layers[0](X).std()) == pytest.approx(1, rel=0.01)
    model.fit(X, Y, verbose=0)


def test_what_keras_is_not_told_is_left_as_a_comment() -> None:
    code, model = changed(classifier(), BatchNorm())
    assert code.startswith("# To be done by hand in Keras: batch normalization")
    assert len(model.layers) == 2


def test_a_mended_model_learns_in_keras() -> None:
    digits = load("digits")
    model = chain(*[L.Dense(32, "sigmoid") for _ in range(8)], L.Dense(10), shape=(64,))
    model.compile(keras.optimizers.SGD(0.01), CROSS_ENTROPY, metrics=["accuracy"])
    saved = SavedModel(model, "m")
    rows = saved.fitting(digits)
    batches = list(rows.batches(64, generator=torch.Generator().manual_seed(0), epochs=1))
    treatment = mend(saved.setup(), batches, Budget(60, 60.0, 12))
    assert treatment.mended
    names = {"model": model, "x": rows.x.numpy()}
    exec(saved.code(treatment.changes), names)
    x, y = rows.x.numpy(), rows.y.numpy()
    names["model"].fit(x, y, epochs=4, batch_size=64, verbose=0)
    assert (names["model"].predict(x, verbose=0).argmax(1) == y).mean() > 0.8
