"""Study files: what they may say, what is refused, and where setups of the user's own are found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gradmend.errors import SetupError, TargetError
from gradmend.setup import Setup
from gradmend.study.file import load_study
from helpers import SGD


def net(seed: int) -> Setup:
    return Setup(nn.Linear(64, 10), nn.CrossEntropyLoss(), SGD)


def write(text: str) -> str:
    Path("plan.toml").write_text(text)
    return "plan.toml"


def test_a_file_says_all_that_a_study_can(own_folder: None) -> None:
    made = load_study(
        write(
            """
            question = "Why?"
            setups = ["deep", "mnist"]
            data = "digits"
            seeds = 3
            steps = 5
            combine = ["alone", ["a", "b"]]
            settings = { width = 8 }
            measure = "train_loss"
            [factors]
            depth = [1, 2]
            skip = [false, true]
            [remedies]
            a = "He()"
            b = ["BatchNorm()", "ClipNorm(0.5)"]
            c = { weight_decay = 0.1 }
            """
        )
    )
    assert (made.name, made.question, made.seeds, made.measure) == ("plan", "Why?", (0, 1, 2), "train_loss")
    assert made.levels["skip"] == ("no", "yes")
    assert len(made.arms()) == 2 * 2 * 2 * 5
    assert made.arms()[4].remedies == ("He()", "BatchNorm()", "ClipNorm(max_norm=0.5)")
    assert made.build(made.arms()[3], 0).setup.build_optimizer().param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('setups = "deep"\nseeds = = 3', "plan.toml: This is no TOML: .*line 2"),
        ("remedies = []", "No setups"),
        ('setups = "deep"\nremedy = []', "plan.toml: There is no key 'remedy'. Did you mean 'remedies'"),
        ('setups = "deep"\nepochs = "ten"', "`epochs` is a whole number, not 'ten'"),
        ('setups = "deep"\nseeds = true', "`seeds` is a whole number or a list, not True"),
        ('setups = "deep"\nname = 3', "`name` is text, not 3"),
        ('setups = "deep"\ncombine = [3]', "`combine` cannot be 3"),
        ('setups = "deep"\n[factors]\ndepht = [1, 2]', "plan.toml: There is no setting 'depht'"),
        ('setups = "net.py:model"', "'net.py:model' is found on the command line"),
        ('[setups.mine]\ntarget = "net.py:model"\nwidth = 3', "takes no 'width'"),
    ],
)
def test_files_that_cannot_be_are_refused(own_folder: None, text: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        load_study(write(text))


def test_a_study_that_is_not_there_is_named(own_folder: None) -> None:
    write("")
    with pytest.raises(TargetError, match=r"There is no study 'plan\.tml'\. Did you mean 'plan\.toml'"):
        load_study("plan.tml")
    with pytest.raises(TargetError, match="Did you mean 'depth'"):
        load_study("dept")


@pytest.mark.parametrize(
    "text",
    ['setups = "net.py:net"', '[setups.mine]\ntarget = "net.py:net"', 'setups = ["net.py:net", "deep"]'],
)
def test_targets_are_found_beside_the_file(own_folder: None, text: str) -> None:
    asked: list[str] = []

    def find(target: str) -> Callable[[int], Setup]:
        asked.append(target)
        return net

    Path("sub").mkdir()
    Path("sub/plan.toml").write_text(f'data = "digits"\n{text}')
    made = load_study("sub/plan.toml", find)
    assert asked == [str(Path("sub/net.py:net"))]
    drawn = made.build(made.arms()[0], 1).setup.model
    torch.manual_seed(1)
    for parameter, expected in zip(drawn.parameters(), net(1).model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
