"""What a problem says, and the numbers it proposes."""

from strop.engine.plan.problem import Problem, nearest_fitting, nearest_multiples, smallest_change


def test_what_was_planned_fits_and_what_was_not_is_allowed():
    problem = Problem("layout.pp", 7, "64 GPUs can't hold it", (4, 8), (("gpus", (63, 70)), ("steps", ())))
    assert str(problem) == "--layout.pp 7: 64 GPUs can't hold it; nearest allowed: 4 or 8, or --gpus 63 or 70"
    assert str(Problem("layout.pp", 7, "no", instead=(("gpus", (63,)),))) == "--layout.pp 7: no; nearest allowed: --gpus 63"
    assert str(Problem("training.fsdp", True, "no", (False,))) == "--training.fsdp: no; nearest allowed: --training.no-fsdp"
    assert str(Problem("layout.pp", 7, "no")) == "--layout.pp 7: no"
    planned = Problem("device", "h100", "too small", ("--layout.tp 2 (8.0 GiB, 1 s a step)",), planned=True)
    assert str(planned) == "--device h100: too small; nearest that fits: --layout.tp 2 (8.0 GiB, 1 s a step)"


def test_the_setting_with_the_smallest_change_is_blamed():
    assert smallest_change({"tp": (8, (4,)), "pp": (7, (4, 8)), "cp": (2, ())}) == "pp"
    assert smallest_change({"tp": (8, (4,)), "pp": (4, (2,))}) == "tp"
    assert smallest_change({"tp": (8, ())}) is None


def test_nearest() -> None:
    assert nearest_fitting(6, 100, lambda number: 32 % number == 0) == (4, 8)
    assert nearest_fitting(64, 100, lambda number: 32 % number == 0) == (32,)
    assert nearest_fitting(0, 3, lambda number: True) == (1,)
    assert nearest_fitting(200, 100, lambda number: number == 100) == (100,)
    assert nearest_multiples(100, 32) == (96, 128)
    assert nearest_multiples(5, 32) == (32,)
