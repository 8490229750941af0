"""Where there is not enough memory for copies, what needs none is found, and the rest is named."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from functools import partial
from pathlib import Path
import torch
from torch import nn
from gradmend import Setup, diagnose
from gradmend.errors import BatchError

torch.set_num_threads(1)

def setup(width):
    layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3), nn.Softmax(1)
    return Setup(nn.Sequential(*layers), nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3))

def batch(width):
    return torch.randn(64, width), torch.randint(3, (64,))

diagnose(setup(8), batch(8))  # what a process takes for itself
wide, given = setup(3000), batch(3000)
held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
most = held + int(float(sys.argv[1]) * 3000 * 3000 * 4)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
try:
    found = diagnose(wide, given)
    print(*(finding.cause.title for finding in found.findings), *found.lacked, found, sep="; ")
except BatchError as error:
    print(error)
"""


def told(room: float) -> str:
    """What a diagnosis says that may take so many times the memory of the model's weights."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(room)], capture_output=True, text=True, check=True
    )
    return " ".join(ended.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_what_needs_no_copy_is_found_and_what_was_left_out_is_named() -> None:
    words = told(2.5)
    assert words.startswith("softmax before logits loss; the size of a step; steps of the optimizer; ")
    assert "Left out, as there was not enough memory: the size of a step, steps of the optimizer" in words
    assert "This setup will hardly train: softmax before logits loss." in words


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_without_memory_for_a_step_a_smaller_batch_is_asked_for() -> None:
    assert told(0.5) == (
        "There is not enough memory for a forward and a backward pass of 64 samples: give smaller batches, "
        "or a smaller model."
    )
