"""The public interface is a list, and this is it."""

import importlib
import inspect
import subprocess
import sys

import pytest

import gradmend

PUBLIC = [
    "Budget",
    "Cause",
    "Diagnosis",
    "Finding",
    "GradmendError",
    "History",
    "Notice",
    "Profile",
    "Setup",
    "Study",
    "Treatment",
    "Watch",
    "diagnose",
    "measure",
    "mend",
    "train",
]


def test_the_list_is_complete() -> None:
    assert gradmend.__all__ == PUBLIC
    assert dir(gradmend) == PUBLIC
    assert sorted(gradmend._HOMES) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_importable_and_documented(name: str) -> None:
    found = getattr(gradmend, name)
    home = importlib.import_module(f"gradmend.{gradmend._HOMES[name]}")
    assert found is getattr(home, name)
    assert found.__name__ == name
    doc = inspect.getdoc(found) or ""
    assert len(doc.splitlines()[0]) >= 20
    assert not doc.startswith(f"{name}(")  # what a dataclass writes of itself


def test_verbs_have_examples() -> None:
    for verb in (name for name in PUBLIC if name.islower()):
        assert ">>>" in (inspect.getdoc(getattr(gradmend, verb)) or "")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'gradmend' has no attribute 'fix'"):
        gradmend.fix  # noqa: B018


def test_importing_does_not_load_torch() -> None:
    code = (
        "import sys, gradmend; print('torch' in sys.modules); gradmend.Setup; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
