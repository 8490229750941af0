"""The demo: what it promises, measured."""

import io

import pytest
from rich.console import Console

from gradmend.demo import run


def demo(**choices: object) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    options = {
        "data": "digits",
        "depth": 30,
        "activation": "sigmoid",
        "init": "default",
        "seed": 0,
        **choices,
    }
    sound = run(console, **options)  # type: ignore[arg-type]
    return sound, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_deep_network_fails_is_mended_and_learns() -> None:
    sound, text = demo()
    assert sound
    result = text.split("Test accuracy after 900 steps: ")[1]
    untreated, mended = (float(part.split("%")[0].split()[-1]) for part in result.split(", ")[:2])
    assert untreated <= 20
    assert mended >= 95
    for part in ("hidden layers of 64 sigmoid units", "contracting activation", "Mended by: ", "Result"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("choices", [{"depth": 3, "activation": "relu"}, {"depth": 1}])
def test_a_healthy_network_is_called_healthy(choices: dict[str, object]) -> None:
    sound, text = demo(**choices)
    assert sound
    assert "Healthy" in text.splitlines()[-1]


@pytest.mark.slow
def test_other_choices_end_mended_or_healthy() -> None:
    _, text = demo(depth=12, seed=1)
    assert "Mended by: " in text
    assert "Test accuracy after 900 steps: " in text
