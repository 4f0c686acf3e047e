"""The learning rate against numbers worked by hand."""

import pytest

from strop.engine.config import InputError
from strop.engine.train.schedule import check_schedule, learning_rate


@pytest.mark.parametrize(
    ("schedule", "floor", "expected"),
    [
        ("constant", 0.1, [0.5, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("linear", 0.2, [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", 0.0, [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("cosine", 0.5, [0.5, 1, 1, 0.5 + (1 + 0.5**0.5) / 4, 0.75, 0.5 + (1 - 0.5**0.5) / 4]),
    ],
)
def test_six_steps_with_two_of_warm_up(schedule, floor, expected):
    rates = [learning_rate(step, 3e-4, 6, 2, schedule, floor) for step in range(1, 7)]
    assert rates == pytest.approx([3e-4 * fraction for fraction in expected], rel=1e-12, abs=1e-18)


def test_without_warm_up_and_with_nothing_else():
    assert learning_rate(1, 1.0, 1, 0, "constant", 0.0) == 1.0
    assert learning_rate(1, 1.0, 1, 0, "cosine", 0.3) == 1.0
    assert [learning_rate(step, 1.0, 2, 2, "linear", 0.0) for step in (1, 2)] == [0.5, 1.0]


def test_impossible_schedules_are_refused_by_name():
    with pytest.raises(InputError, match=r"--train.warmup-steps 7: must lie between 0 and --train.steps 6"):
        check_schedule(6, 7, 0.0)
    with pytest.raises(InputError, match=r"--train.lr-floor 1.5"):
        check_schedule(6, 2, 1.5)
