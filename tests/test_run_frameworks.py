"""`gradmend run` with trainings that frameworks run: the same to the last bit, and every step seen."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from running import ROOT, plain, watched

FILE = str(ROOT / "tests" / "frameworks.py")
SEEN = {
    "lightning": "gradmend: Sequential, 12 steps",
    "huggingface": "gradmend: Classifier, 12 steps",
    "keras": "gradmend: Sequential, 11 steps",  # the first shows that it has no optimizer of torch
}
PACKAGES = {"huggingface": "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEN)
def test_frameworks_train_to_the_same(tmp_path: Path, kind: str) -> None:
    package = PACKAGES.get(kind, kind)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    runs = [run([FILE, str(tmp_path), kind], cwd=tmp_path) for run in (plain, watched)]
    assert [done.returncode for done in runs] == [0, 0]
    assert runs[0].stdout == runs[1].stdout
    assert SEEN[kind] in runs[1].stderr
