"""What users type and write in their own files, found and completed."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from torch import nn

from gradmend.data import Data
from gradmend.diagnosis import diagnose
from gradmend.errors import DataError, SetupError, TargetError
from gradmend.target import Target, Wishes, find
from helpers import assert_same

HEAD = """
import torch
from torch import nn
import torch.nn.functional as F
import gradmend as gm

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.out = nn.Linear(width, 3)
    def forward(self, x):
        return self.out(F.relu(self.inner(x)))

x, y = torch.linspace(-2, 2, 256).reshape(64, 4), torch.arange(64) % 3
"""
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Each file is imported as in a process of its own."""
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if name == "helper" or name.endswith("net") or "/" in name:
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "net.py", head: str = HEAD) -> str:
        (tmp_path / name).write_text(head + dedent(text))
        return name

    return write


def look(target: str, **wishes: str) -> Target:
    return find(target, Wishes(**wishes))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("net = Net()", "net"),
        ("setup = gm.Setup(Net(), nn.CrossEntropyLoss())", "setup"),
        ("def build():\n    return Net()", "build"),
        ("def setup():\n    return gm.Setup(Net())", "setup"),
        ("", "Net"),
        ("def build(width=16):\n    return Net(width)", "build"),
        ("from functools import partial\nbuild = partial(Net, width=16)", "build"),
    ],
)
def test_a_name_is_a_module_a_setup_a_function_or_a_class(write: Write, text: str, name: str) -> None:
    file = write(f"batch = (x, y)\n{text}")
    found = look(f"{file}:{name}")
    assert type(found.setup.model).__name__ == "Net"
    assert found.setup.loss(found.batches()[0]).isfinite()


def test_the_seed_decides_the_weights_of_a_function(write: Write) -> None:
    file = write("batch = (x, y)")
    a, b, c = (find(f"{file}:Net", Wishes(seed=seed)).setup.model.inner.weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["batch", "batches", "loader", "train_loader", "data"])
@pytest.mark.parametrize("value", ["(x, y)", "[(x, y), (x, y)]", "DataLoader(TensorDataset(x, y), 32)"])
def test_data_is_found_beside_the_model(write: Write, name: str, value: str) -> None:
    file = write(f"from torch.utils.data import DataLoader, TensorDataset\n{name} = {value}")
    batches = look(f"{file}:Net").batches()
    assert len(batches[0][0]) in (32, 64)


def test_data_may_be_made_by_a_function_or_a_generator(write: Write) -> None:
    file = write("def data():\n    yield x, y\ndef batch():\n    return x, y\n")
    for wish in (None, f"{file}:batch", f"{file}:data"):
        found = find(f"{file}:Net", Wishes(data=wish))
        assert len(found.batches()) == len(found.batches()) == 1


def test_a_file_is_run_once_and_data_of_the_same_file_belongs_to_it(write: Write) -> None:
    file = write("made = []\ndef data():\n    made.append(1)\n    return x, y\nclass Twice(Net): ...\n")
    found = look(f"{file}:Twice", data=f"./{file}:data")
    assert sys.modules[type(found.setup.model).__module__].made == [1]


def test_data_from_another_file(write: Write) -> None:
    write("loader = [(x, y)]", "mydata.py")
    assert len(look(f"{write('')}:Net", data="mydata.py:loader").batches()) == 1


def test_data_from_tables_and_arrays(write: Write, tmp_path: Path) -> None:
    file, x = write(""), np.linspace(-1, 1, 240).reshape(60, 4)
    np.savez(tmp_path / "arrays.npz", x=x, y=np.arange(60) % 3)
    rows = [",".join([*(f"{v:.3f}" for v in row), "abc"[i % 3]]) for i, row in enumerate(x)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c,d,kind", *rows]))
    for wish in ("arrays.npz", "table.csv:kind", "table.csv"):
        found = look(f"{file}:Net", data=wish)
        assert isinstance(found.data, Data)
        assert found.setup.loss(found.batches()[0]).isfinite()


def test_batches_of_data_are_always_the_same(write: Write) -> None:
    found = look("deep")
    assert_same(found.batches(3), found.batches(3))


@pytest.mark.parametrize("name", ["loss_fn", "criterion", "loss"])
def test_loss_and_optimizer_are_found_beside_the_model(write: Write, name: str) -> None:
    optimizer = "optimizer = torch.optim.RMSprop(net.parameters(), lr=0.25)"
    file = write(f"batch = (x, y)\n{name} = nn.MultiMarginLoss()\nnet = Net()\n{optimizer}")
    found = look(f"{file}:net")
    assert type(found.setup.loss_fn) is nn.MultiMarginLoss
    assert found.setup.build_optimizer().param_groups[0]["lr"] == 0.25
    assert found.notes == (
        "loss MultiMarginLoss (defined beside the model)",
        "optimizer RMSprop (defined beside the model)",
    )


def test_options_come_before_what_is_defined(write: Write) -> None:
    file = write(
        "batch = (x, F.one_hot(y, 3).float())\nsetup = gm.Setup(Net(), nn.L1Loss(), torch.optim.Adam)"
    )
    found = look(f"{file}:setup", loss="mse", optimizer="sgd:0.5")
    assert type(found.setup.loss_fn) is nn.MSELoss
    assert found.setup.build_optimizer().param_groups[0]["lr"] == 0.5
    assert found.notes == ()


@pytest.mark.parametrize(("target", "loss"), [("y", "CrossEntropyLoss"), ("torch.zeros(64, 3)", "MSELoss")])
def test_the_usual_loss_suits_the_targets_and_is_said_to_be_assumed(
    write: Write, target: str, loss: str
) -> None:
    found = look(f"{write(f'batch = (x, {target})')}:Net")
    assert type(found.setup.loss_fn).__name__ == loss
    assert found.notes[0].startswith(f"loss {loss} (assumed: ")
    assert found.notes[1] == "optimizer Adam (assumed: give --optimizer NAME:LR)"


def test_findings_carry_the_line_that_made_the_layer_or_called_the_function(
    write: Write, tmp_path: Path
) -> None:
    net = """
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 8)  # makes it
            nn.init.zeros_(self.inner.weight)
            self.out = nn.Linear(8, 3)
        def forward(self, x):
            return torch.softmax(self.out(torch.tanh(self.inner(x))), 1)  # calls it
    batch = (1000 * x, y)
    """
    file = write(net)
    lines = (tmp_path / file).read_text().splitlines()
    made, called = (next(i for i, s in enumerate(lines, 1) if text in s) for text in ("# makes", "# calls"))
    found = look(f"{file}:Two")
    where = {f.cause.title: f.where for f in diagnose(found.setup, found.batches()).findings}
    assert where["unscaled input"] == (f"{file}:{made}",)
    assert where["softmax before logits loss"] == (f"{file}:{called}",)


def test_sizes_and_lengths_are_those_of_a_recipe_or_of_a_training(write: Write) -> None:
    found = look("very-deep", depth=20, width=16, epochs=3, batch_size=100)
    assert [layer.out_features for layer in found.setup.model[::2]] == [16] * 20 + [10]
    assert (found.epochs, found.batch_size) == (3, 100)
    assert found.setup.schedule.keywords["total_iters"] == 3 * 15
    file = write("batch = (x, y)")
    found = look(f"{file}:Net", epochs=3)
    assert (found.epochs, found.batch_size) == (3, 64)
    with pytest.raises(TargetError, match="--depth and --width are for recipes"):
        look(f"{file}:Net", width=16)


def test_neighbours_dataclasses_pickle_and_future_annotations_work(write: Write) -> None:
    write("width = 8", "helper.py", head="")
    text = """
    import pickle
    from dataclasses import dataclass
    import helper

    @dataclass
    class Options:
        width: int = helper.width

    assert Options.__annotations__["width"] is int
    options = pickle.loads(pickle.dumps(Options()))
    def build():
        return Net(options.width)
    batch = (x, y)
    """
    model = look(f"{write(text)}:build").setup.model
    assert pickle.loads(pickle.dumps(model)).inner.out_features == 8


@pytest.mark.parametrize("stem", ["random", "json", "torch"])
def test_a_file_may_have_the_name_of_a_module(write: Write, stem: str) -> None:
    before = sys.modules[stem]
    text = (
        "from dataclasses import dataclass\n@dataclass\nclass Options:\n    width: 'int' = 8\nbatch = (x, y)"
    )
    head = HEAD if stem != "torch" else HEAD.replace("import gradmend as gm", "")
    assert look(f"{write(text, f'{stem}.py', head)}:Net").setup.model is not None
    assert sys.modules[stem] is before


def test_nothing_is_written_beside_the_users_files(write: Write, tmp_path: Path) -> None:
    file = write("batch = (x, y)")
    before = (tmp_path / file).read_bytes()
    look(f"{file}:Net")
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_bytes() == before


@pytest.mark.parametrize("name", ["deep", "mnist"])
def test_recipes(name: str) -> None:
    found = look(name, data="digits", optimizer="SGD:0.5")
    assert (found.name, found.batch_size, found.epochs) == (name, 64 if name == "deep" else 32, found.epochs)
    assert found.setup.build_optimizer().param_groups[0]["lr"] == 0.5


BAD: list[tuple[str, str, dict[str, str], type[Exception], str]] = [
    ("", "nte.py:Net", {}, TargetError, "There is no file 'nte.py'. Did you mean 'net.py'?"),
    ("", "nowhere/net.py:Net", {}, TargetError, "There is no file 'nowhere/net.py'. Possible: none."),
    ("", "net.py", {}, TargetError, "Which model of net.py? Type net.py:NAME. Possible: Net."),
    ("", "net.py:", {}, TargetError, "Which model of net.py? Type net.py:NAME. Possible: Net."),
    ("", "net.py:Nett", {}, TargetError, "net.py has no 'Nett'. Did you mean 'Net'? Possible: Net."),
    (
        "",
        "net.py:x",
        {},
        TargetError,
        "net.py:x is a Tensor. A target is a torch.nn.Module, a gradmend.Setup,",
    ),
    ("f = lambda: 3", "net.py:f", {}, TargetError, "net.py:f is a int. A target is"),
    (
        "",
        "depe",
        {},
        TargetError,
        "'depe' is neither `file.py:name` nor a shipped recipe. Did you mean 'deep'?",
    ),
    ("", "net.txt:Net", {}, TargetError, "'net.txt:Net' is neither `file.py:name` nor a shipped recipe."),
    (
        "",
        "net.py:Net",
        {},
        DataError,
        "What data shall net.py:Net see? Type --data digits, --data table.csv:",
    ),
    (
        "",
        "net.py:Net",
        {"data": "digit"},
        DataError,
        "There is no data called 'digit'. Did you mean 'digits'?",
    ),
    ("", "net.py:Net", {"data": "no.csv"}, DataError, "There is no file no.csv."),
    ("", "net.py:Net", {"data": "net.py:z"}, DataError, "net.py has no 'z'. "),
    ("", "net.py:Net", {"data": "net.py"}, DataError, "Which data of net.py? Type net.py:NAME. "),
    (
        "batch = (x, y)",
        "net.py:Net",
        {"loss": "mes"},
        SetupError,
        "There is no loss 'mes'. Did you mean 'mse'?",
    ),
    (
        "batch = (x, y)",
        "net.py:Net",
        {"optimizer": "Adm"},
        SetupError,
        "There is no optimizer 'Adm' here. Did",
    ),
    (
        "batch = (x, y)",
        "net.py:Net",
        {"optimizer": "SGD:fast"},
        SetupError,
        "'fast' is no learning rate. Type",
    ),
    (
        "batch = (x, y)",
        "net.py:Net",
        {"optimizer": "SGD:-1"},
        SetupError,
        "'-1' is no learning rate. Type",
    ),
    ("batch = (x, y)", "net.py:Net", {"optimizer": "SGD:nan"}, SetupError, "'nan' is no learning rate. Type"),
    (
        "batch = (x, y)",
        "net.py:Net",
        {"optimizer": "LBFGS"},
        SetupError,
        "There is no optimizer 'LBFGS' here.",
    ),
    (
        "batch = (x, y)",
        "net.py:Net",
        {"device": "gpu"},
        SetupError,
        "There is no device 'gpu'. ",
    ),
    ("batch = []", "net.py:Net", {}, DataError, "The loader is empty: it gave no batch."),
    (
        "net = nn.ReLU()\nbatch = (x, y)",
        "net.py:net",
        {},
        SetupError,
        "The model ReLU has no parameters, so there",
    ),
    (
        *("net = Net().requires_grad_(False)\nbatch = (x, y)", "net.py:net", {}, SetupError),
        "All 4 parameters of Net are frozen. Call `model.requires_grad_(True)`.",
    ),
]


@pytest.mark.parametrize(("text", "target", "wishes", "kind", "message"), BAD, ids=[row[-1] for row in BAD])
def test_what_cannot_be_used_is_named_with_what_is_possible(
    write: Write, text: str, target: str, wishes: dict[str, str], kind: type[Exception], message: str
) -> None:
    write(text)
    with pytest.raises(kind) as error:
        look(target, **wishes)
    assert str(error.value).startswith(message)


CRASHES = {
    "import": (
        "def inner():\n    return 1 / 0\ninner()",
        "Net",
        "raised an error when it was imported",
        "inner()",
    ),
    "call": ("def f():\n    return {}['k']\n", "f", "raised an error when it was called", "return {}['k']"),
    "syntax": ("def f(:\n", "f", "raised an error when it was imported", "def f(:"),
    "exit": ("import sys\nsys.exit(3)", "f", "raised an error when it was imported", "sys.exit(3)"),
    "setup": ("s = gm.Setup(3)", "s", "raised an error when it was imported", "s = gm.Setup(3)"),
    "arguments": (
        "def f(width):\n    ...",
        "f",
        "raised an error when it was called",
        "f() missing 1 required",
    ),
    "missing": ("import no_such_thing", "f", "raised an error when it was imported", "import no_such_thing"),
    "data": ("def data():\n    raise OSError('gone')", "Net", "raised an error when it was called", "'gone'"),
    "chain": (
        *("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('no') from e", "f"),
        *("raised an error when it was imported", "ZeroDivisionError: division by zero"),
    ),
}


@pytest.mark.parametrize("case", CRASHES)
def test_errors_of_the_users_code_show_the_users_traceback_alone(write: Write, case: str) -> None:
    text, name, what, line = CRASHES[case]
    file = write(text)
    with pytest.raises((TargetError, DataError)) as error:
        look(f"{file}:{name}")
    message = str(error.value)
    assert what in message.splitlines()[0]
    assert line in message
    assert "src/gradmend" not in message
    assert "importlib" not in message
    assert "Traceback" not in message or f'File "{file}"' in message
