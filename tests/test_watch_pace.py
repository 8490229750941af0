"""The pace keeps to its budget, whatever a look costs, and looks at once where something is suspected."""

from collections.abc import Callable

import pytest

from gradmend.watch.pace import SHARES, Pace

ALL = tuple(SHARES)


class World:
    """Steps of one second, longer where something is looked at."""

    def __init__(
        self,
        costs: dict[str, float],
        budget: float,
        chosen: Callable[[int], bool] | None = None,
        always: float = 0.0,
    ) -> None:
        self.now, self.costs = 0.0, costs
        self.pace = Pace(budget, chosen, lambda: self.now)
        self.listen = self.pace.timed(lambda: self.wait(always))
        self.looks: dict[str, list[int]] = {name: [] for name in ("", *ALL)}
        self.step = 0

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.listen()
            looked = self.pace.next(self.step, ALL)
            for name in looked or ("",):
                self.looks[name].append(self.step)
            self.now += 1 + sum(self.costs[name] for name in looked)
            self.pace.note(looked)

    @property
    def spent(self) -> float:
        return self.now - self.step


CHEAP = {"exam": 1.0, "taps": 0.05, "gradients": 0.02, "weights": 0.03}
DEAR = {"exam": 20.0, "taps": 0.9, "gradients": 0.4, "weights": 0.8}


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_looks_cost_no_more_than_their_budget(costs: dict[str, float], budget: float) -> None:
    world = World(costs, budget)
    world.run(3000)
    before = world.spent
    world.run(40_000)
    assert all(world.looks[name] for name in ALL)
    assert 0.3 * budget < (world.spent - before) / 40_000 < sum(SHARES.values()) * budget * 1.05


@pytest.mark.parametrize(
    ("always", "whole"), [(0.001, 0.0101), (0.01, 0.014), (0.014, 0.0167), (0.05, 0.0527)]
)
def test_looks_give_way_to_what_every_step_costs(always: float, whole: float) -> None:
    world = World(DEAR, 0.02, always=always)
    world.run(80_000)
    assert all(len(world.looks[name]) > 1 for name in ALL)
    assert 0.8 * whole < world.spent / 80_000 < 1.05 * whole


def test_one_thing_is_looked_at_in_a_step_and_first_of_all_everything() -> None:
    world = World(CHEAP, 0.02)
    world.run(60)
    assert world.looks["exam"] == [1]
    assert [world.looks[name][0] for name in ("taps", "gradients", "weights")] == [2, 3, 4]
    assert len(world.looks[""]) > 30


def test_steps_chosen_for_layers_do_not_drive_out_the_rest() -> None:
    world = World(DEAR, 0.02, lambda step: step > 1)
    world.run(5000)
    exams = world.looks["exam"]
    assert [*exams, *world.looks["taps"]] == [*exams, *(step for step in range(1, 5001) if step not in exams)]
    assert 0 < len(exams) < 10
    assert len(world.looks["weights"]) > 5
    assert len(world.looks["gradients"]) > 5


def test_a_suspicion_is_followed_at_once_and_then_less_and_less() -> None:
    world = World(CHEAP, 1e-6)
    world.run(100)
    for _ in range(1000):
        world.pace.suspect(world.step)
        world.run(1)
    exams = [step for step in world.looks["exam"] if step > 100]
    assert exams == [101, 151, 251, 451, 851]
