"""Studies on a Ray cluster: the same as on one machine, also when a machine goes away."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from gradmend.errors import GradmendError, MissingExtraError, SetupError
from gradmend.study.store import trials_of
from studies import is_cursed, outcomes, own, plain, small, stored, untimed, wait_for_trials

STORE = 100 << 20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one core each, as processes of this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # a busy machine takes long
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.mark.slow
def test_a_cluster_gives_the_same_though_a_node_goes_away(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial once, with the bits of a local run; a task of the lost node is done again."""
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    path, study = tmp_path / "s.gradmend", small(epochs=50, seeds=range(12))

    def lose() -> None:
        wait_for_trials(path, lambda: True)
        cluster.remove_node(second, allow_graceful=False)

    loser = threading.Thread(target=lose)
    loser.start()
    found = outcomes(study, path, "ray")
    loser.join()
    assert len(cluster.list_all_nodes()) == 1
    assert stored(path).keys() == {trial.key for trial in trials_of(study)}
    here = outcomes(study, tmp_path / "here.gradmend")
    assert list(map(untimed, found)) == list(map(untimed, here))


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster that is started for it, with functions of the user's own."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def step(model: nn.Module, batch: Any) -> Tensor:
        if is_cursed(model):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(model, batch)

    found = outcomes(own(step, seeds=[2, 3]), tmp_path / "s.gradmend", "ray")
    assert [outcome.status for outcome in found] == ["done", "failed"]
    assert "Its process died" in found[1].reason


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradmend\[ray\]'"):
        outcomes(small(), tmp_path / "s.gradmend", "ray")


def test_a_cluster_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(GradmendError, match=r"RAY_ADDRESS=127\.0\.0\.1:1"):
        outcomes(small(), tmp_path / "s.gradmend", "ray")


def test_other_workers(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no workers 'rya'\. Did you mean 'ray'"):
        outcomes(small(), tmp_path / "s.gradmend", "rya")
