"""The engine of studies: each trial once, as if alone, and in the journal whatever happens."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmend.journal import Journal, JournalError
from gradmend.ratio import gradient_ratio
from gradmend.study.chunks import memory, plan, without
from gradmend.study.outcome import Outcome
from gradmend.study.processes import Processes
from gradmend.study.start import first_batch
from gradmend.study.store import Store, trials_of
from gradmend.training import train
from studies import is_cursed, longer, outcomes, own, plain, small, stored, untimed, wait_for_trials

RUN = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from studies import longer, outcomes
if __name__ == "__main__":
    torch.set_num_threads(2)
    outcomes(longer(), Path(sys.argv[1]))
"""


def started(path: Path) -> "subprocess.Popen[bytes]":
    """A process that runs a study in two processes of its own."""
    command = [sys.executable, "-c", RUN, str(path), str(Path(__file__).parent)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def finish_times(path: Path) -> dict[str, float]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, finished FROM trial").fetchall())


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Sequence[Outcome]]:
    """The journal of a study that is done, and its outcomes."""
    path = tmp_path_factory.mktemp("study") / "s.gradmend"
    found = outcomes(small(), path)
    return path.read_bytes(), found


@pytest.fixture
def done(tmp_path: Path, ended: tuple[bytes, Sequence[Outcome]]) -> tuple[Path, Sequence[Outcome]]:
    path = tmp_path / "s.gradmend"
    path.write_bytes(ended[0])
    return path, ended[1]


Done = tuple[Path, Sequence[Outcome]]

# each trial as alone


def test_an_outcome_is_what_train_gives(done: Done) -> None:
    study, found = small(), done[1]
    assert [(dict(o.arm), o.seed) for o in found] == [(dict(t.arm.levels), t.seed) for t in trials_of(study)]
    for trial, outcome in list(zip(trials_of(study), found, strict=True))[::5]:
        recipe = study.build(trial.arm, trial.seed)
        batch = first_batch(recipe, trial.seed)
        ratio = 10 ** gradient_ratio(recipe.setup, batch).measured
        taken = memory(recipe.setup, recipe.data.head(recipe.batch_size))
        history = train(recipe.setup, recipe.data, epochs=5, batch_size=16, seed=trial.seed, device="cpu")
        assert outcome.status == "done"
        assert outcome.losses == pytest.approx(history.loss, rel=1e-4)
        assert outcome.accuracies == pytest.approx(history.accuracy)
        measures = outcome.measures
        assert measures["test_accuracy"] == pytest.approx(history.test_accuracy)
        assert measures["test_loss"] == pytest.approx(history.test_loss, rel=1e-4)
        assert measures["gap"] == pytest.approx(measures["train_accuracy"] - measures["test_accuracy"])
        assert measures["train_loss"] == pytest.approx(
            torch.tensor(history.loss[-10:]).quantile(0.5).item(), rel=1e-3
        )
        assert measures["gradient_ratio"] == pytest.approx(ratio, rel=1e-4)
        assert measures["parameters"] == sum(p.numel() for p in recipe.setup.model.parameters())
        assert measures["memory"] == taken
        assert 0 < measures["step_seconds"] < measures["seconds"]


def test_steps_to_the_target_are_those_of_the_first_epoch_that_reaches_it(tmp_path: Path) -> None:
    found = outcomes(small(epochs=8), tmp_path / "s.gradmend")
    for outcome in found:
        epoch = next((i for i, right in enumerate(outcome.accuracies, 1) if right >= 0.9), None)
        assert outcome.measures.get("steps_to_target") == (None if epoch is None else 8 * epoch)
    assert any("steps_to_target" in outcome.measures for outcome in found)


def test_findings_are_those_of_an_arms_first_trial(tmp_path: Path) -> None:
    deep = {"activation": "sigmoid", "width": 8}
    study = small(factors={"depth": [30, 2]}, settings=deep, seeds=range(2), epochs=1)
    first, second, shallow, _ = outcomes(study, tmp_path / "s.gradmend")
    assert "VANISHING_GRADIENT" in first.findings
    assert second.findings == ()
    assert "VANISHING_GRADIENT" not in shallow.findings


def test_processes_give_the_same_bits_as_this_one(done: Done) -> None:
    study = small()
    chunks = plan(study, trials_of(study), 1e9)
    assert len(chunks) > 1
    apart = [run for _, run in Processes(2).run(study, chunks, lambda *_: None)]
    found = {key: outcome for run in apart for key, outcome in run.items()}
    for trial, outcome in zip(trials_of(study), done[1], strict=True):
        assert untimed(found[trial.key]) == untimed(outcome)


# killed


def test_kill_9_loses_only_what_runs(tmp_path: Path) -> None:
    """What was there is not done again, and in the end all is as without the kill."""
    path, study = tmp_path / "s.gradmend", longer()
    with started(path) as child:
        wait_for_trials(path, lambda: child.poll() is None)
        with pytest.raises(JournalError, match="Another process is running a study"):
            Store(path)
        child.kill()
    before = finish_times(path)
    assert 0 < len(before) < study.trials
    found = outcomes(study, path)
    after = finish_times(path)
    assert after.keys() == {trial.key for trial in trials_of(study)}
    assert {key: after[key] for key in before} == before
    whole = outcomes(study, tmp_path / "whole.gradmend")
    assert list(map(untimed, found)) == list(map(untimed, whole))


def test_a_study_that_is_done_is_not_done_again(done: Done) -> None:
    path, found = done
    before = finish_times(path)
    assert outcomes(small(), path) == found
    assert finish_times(path) == before
    assert [file.name for file in path.parent.iterdir()] == ["s.gradmend"]


# changed


def test_new_trials_alone_are_done(done: Done) -> None:
    path, old = done
    before = finish_times(path)
    more = {"activation": ["relu", "elu", "tanh"], "learning_rate": [0.1, 0.02]}
    new = small(factors=more, remedies=["BatchNorm()"], seeds=range(4))
    found = outcomes(new, path)
    after = finish_times(path)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(found) == new.trials == 48
    known = {(*o.arm.values(), o.seed): untimed(o)[2:] for o in found}
    assert all(known[(*outcome.arm.values(), "no", outcome.seed)] == untimed(outcome)[2:] for outcome in old)


def test_trials_taken_out_of_the_plan_stay_in_the_journal(done: Done) -> None:
    path, found = done
    assert len(outcomes(small(seeds=[1]), path)) == 4
    assert len(stored(path)) == 12
    assert outcomes(small(), path) == found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 6}, "12 of the 12 trials that are done were done otherwise.*epochs was 5, is 6"),
        ({"settings": {"width": 16, "depth": 2}}, "settings.width was 8, is 16"),
        ({"target": 0.8}, "target was 0.9, is 0.8"),
        ({"factors": {"init": ["he", "zero"]}}, "12 of the 12"),
        ({"name": "other"}, "holds the study 'small', not 'other'"),
    ],
)
def test_a_contradiction_is_refused(done: Done, changes: dict[str, Any], told: str) -> None:
    path, found = done
    with pytest.raises(JournalError, match=told):
        outcomes(small(**changes), path)
    assert outcomes(small(), path) == found


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    text, other, newer = (tmp_path / name for name in ("a.gradmend", "b.gradmend", "c.gradmend"))
    text.write_text("no database, but a text that is long enough to look like one" * 20)
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE mine (x)")
    Journal(newer).run().close()
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = [path.read_bytes() for path in (text, other, newer)]
    for path, told in ((text, "not a journal"), (other, "not a journal"), (newer, "version 99")):
        with pytest.raises(JournalError, match=told):
            outcomes(small(), path)
    assert [path.read_bytes() for path in (text, other, newer)] == before


def test_a_journal_may_hold_runs_beside_the_study(tmp_path: Path) -> None:
    path = tmp_path / "s.gradmend"
    Journal(path).run("watched").close()
    with pytest.raises(JournalError, match="holds no study"):
        stored(path)
    outcomes(small(seeds=[0]), path)
    assert [run["name"] for run in Journal(path).runs()] == ["watched"]
    assert len(stored(path)) == 4


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be written"):
        outcomes(small(), tmp_path / "nowhere" / "s.gradmend")


# trials that do not end well


def test_a_trial_that_diverges_does_not_touch_the_others(tmp_path: Path) -> None:
    settings = {"activation": "relu", "width": 8, "depth": 2}
    wild = small(factors={"learning_rate": [0.1, 1e6]}, settings=settings, epochs=20)
    calm = small(factors={"learning_rate": [0.1, 0.05]}, settings=settings, epochs=20)
    found = outcomes(wild, tmp_path / "wild.gradmend")
    alone = outcomes(calm, tmp_path / "calm.gradmend")
    assert [outcome.status for outcome in found] == ["done"] * 3 + ["diverged"] * 3
    for outcome, same in zip(found[:3], alone[:3], strict=True):
        assert outcome.losses == pytest.approx(same.losses, rel=1e-4)
    for outcome in found[3:]:
        assert not math.isfinite(outcome.losses[-1])
        assert not {"test_accuracy", "gap", "test_loss", "train_loss"} & outcome.measures.keys()


def test_a_remedy_that_does_not_fit_is_recorded(tmp_path: Path) -> None:
    study = small(factors={}, remedies=["ForgetBias()", "BatchNorm()"], seeds=range(2))
    found = outcomes(study, tmp_path / "s.gradmend")
    assert Counter(outcome.status for outcome in found) == {"done": 4, "not applicable": 2}
    (reason,) = {outcome.reason for outcome in found if outcome.status == "not applicable"}
    assert "ForgetBias" in reason
    before = finish_times(tmp_path / "s.gradmend")
    outcomes(study, tmp_path / "s.gradmend")
    assert finish_times(tmp_path / "s.gradmend") == before


def test_one_that_fails_is_told_and_done_again(tmp_path: Path) -> None:
    path, flag = tmp_path / "s.gradmend", tmp_path / "repaired"

    def step(model: nn.Module, batch: Any) -> Tensor:
        if is_cursed(model) and not flag.exists():
            raise ZeroDivisionError("the user's own error\nand more")
        return plain(model, batch)

    found = outcomes(own(step), path)
    assert [outcome.status for outcome in found] == ["done"] * 3 + ["failed"] + ["done"] * 2
    assert found[3].reason == "ZeroDivisionError: the user's own error"
    before = finish_times(path)
    flag.touch()
    assert [outcome.status for outcome in outcomes(own(step), path)] == ["done"] * 6
    after = finish_times(path)
    assert [key for key in before if after[key] != before[key]] == [trials_of(own(step))[3].key]


def test_one_without_memory_is_told(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return plain(model, batch) + (torch.empty(1 << 60).sum() if is_cursed(model) else 0)

    found = outcomes(own(step), tmp_path / "s.gradmend")
    assert [outcome.status for outcome in found] == ["done"] * 3 + ["failed"] + ["done"] * 2
    assert "Out of memory, even alone: it takes about" in found[3].reason


def test_a_process_that_dies_takes_nothing_with_it() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        if is_cursed(model):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(model, batch)

    study = own(step)
    trials = trials_of(study)
    chunks = plan(study, trials, 1e9)
    assert max(len(chunk.jobs) for chunk in chunks) > 1
    runs = [run for _, run in Processes(2).run(study, chunks, lambda *_: None)]
    found = {key: outcome for run in runs for key, outcome in run.items()}
    assert [found[trial.key].status for trial in trials] == ["done"] * 3 + ["failed"] + ["done"] * 2
    assert "Its process died" in found[trials[3].key].reason


# chunks


@given(room=st.floats(1, 1e7), seeds=st.integers(1, 40), done=st.sets(st.integers(0, 159)))
@settings(max_examples=20, deadline=None)
def test_chunks_hold_each_trial_once_and_fit(room: float, seeds: int, done: set[int]) -> None:
    study = small(seeds=range(seeds), factors={"activation": ["relu", "tanh"]})
    trials = trials_of(study)
    chunks = plan(study, trials, room)
    assert sorted(job.trial.key for chunk in chunks for job in chunk.jobs) == sorted(t.key for t in trials)
    assert all(sum(job.memory for job in c.jobs) <= room or len(c.jobs) == 1 for c in chunks)
    assert all(len({job.trial.arm.levels["activation"] for job in c.jobs}) == 1 for c in chunks)
    keys = {trial.key for i, trial in enumerate(trials) if i in done}
    left = without(chunks, keys)
    assert sorted(job.trial.key for c in left for job in c.jobs) == sorted(
        t.key for t in trials if t.key not in keys
    )
    assert [job.turn for c in chunks for job in c.jobs].count(0) == 2


def test_rates_share_a_chunk_but_structures_do_not() -> None:
    study = small()
    chunks = plan(study, trials_of(study), 1e9)
    assert [len(chunk.jobs) for chunk in chunks] == [6, 6]
    assert all(len({job.trial.arm.levels["learning_rate"] for job in chunk.jobs}) == 2 for chunk in chunks)


def test_the_journal_is_plain_to_read(done: Done) -> None:
    """Other programs find arms and measures as JSON, and losses as numbers."""
    path, (first, *_) = done
    with closing(sqlite3.connect(path)) as connection:
        arm, measures, losses = connection.execute("SELECT arm, measures, losses FROM trial").fetchone()
    assert json.loads(arm) == dict(first.arm)
    assert json.loads(measures) == dict(first.measures)
    assert len(losses) == 4 * len(first.losses)
