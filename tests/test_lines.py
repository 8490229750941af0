"""Which line of code is named: the user's before a package's, and never one of torch or Keras."""

from collections.abc import Callable
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmend.anatomy import Site
from gradmend.lines import line_of_definition, remember_lines
from gradmend.recorder import read

CODE = """import torch

def steep(x):
    return torch.tanh(x)

class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return steep(self.linear(x))
"""


@pytest.fixture(params=["site-packages", "dist-packages"])
def packages(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of installed packages: one that brings a model, and Keras."""
    for name in ("brought", "keras"):
        folder = tmp_path / request.param / name
        folder.mkdir(parents=True)
        (folder / "body.py").write_text(CODE)
    return tmp_path / str(request.param)


def body(packages: Path, name: str) -> dict[str, Any]:
    """What a package holds."""
    found: dict[str, Any] = {}
    file = packages / name / "body.py"
    exec(compile(file.read_text(), str(file), "exec"), found)
    return found


def sites(model: nn.Module) -> dict[str, Site]:
    x = torch.randn(3, 4)
    return {site.function: site for site in read(model, partial(model, x), x).sites}


def test_a_model_that_a_package_brings_has_the_lines_of_the_package(packages: Path) -> None:
    with remember_lines():
        found = sites(body(packages, "brought")["Body"]())
    file = packages / "brought" / "body.py"
    assert {name: site.line for name, site in found.items()} == {"linear": f"{file}:9", "tanh": f"{file}:4"}


def test_keras_is_to_its_users_what_torch_is(packages: Path) -> None:
    found = sites(body(packages, "keras")["Body"]())
    assert [site.line for site in found.values()] == [None, None]
    assert line_of_definition(body(packages, "keras")["steep"]) is None


@pytest.mark.parametrize("name", ["brought", "keras"])
def test_the_users_line_comes_before_that_of_a_package_which_it_calls(packages: Path, name: str) -> None:
    steep: Callable[[Tensor], Tensor] = body(packages, name)["steep"]

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return steep(x)

    line = Net.forward.__code__.co_firstlineno + 1
    assert sites(Net())["tanh"].line == f"{__file__}:{line}"


def test_the_standard_library_is_nobodys() -> None:
    steep = singledispatch(torch.tanh)  # calls it from its own file

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return steep(x)

    line = Net.forward.__code__.co_firstlineno + 1
    assert sites(Net())["tanh"].line == f"{__file__}:{line}"
