"""What a reward worker runs: symbolic equality by math-verify, and reasoning-gym's own scorers.

Both libraries can hang, eat all memory, raise or evaluate the answer as Python, so this module is imported by
`workers` alone and its functions run only in a worker process. They are loaded when first asked for: importing
math-verify takes 0.7 s and reasoning-gym 1.4 s.
"""

import base64
import math
import pickle
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

Verifier = Literal["math", "math-reads", "reasoning-gym"]
Verify = Callable[[Mapping[str, object]], float]

CANARY = "no answer: strop asks whether this scorer pays for anything"
"""A reasoning-gym scorer that gives this full credit can't be trusted with the item at hand."""


def load(verifier: Verifier) -> Verify:
    """The function behind a verifier; it takes a job's arguments and returns a score. ImportError without its package."""
    if verifier == "reasoning-gym":
        return _load_reasoning_gym()
    equal, reads = _load_math()
    return equal if verifier == "math" else reads


@cache
def _load_math() -> tuple[Verify, Verify]:
    from math_verify import parse, verify

    def read(text: object) -> list:
        # No time-outs of its own: they are signal.alarm, which would cancel ours; the pool kills what takes too long.
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    def equal(arguments: Mapping[str, object]) -> float:
        """1.0 where answer and gold are the same mathematical object (arguments: answer, gold), else 0.0."""
        return float(verify(read(arguments["gold"]), read(arguments["answer"]), timeout_seconds=None))

    def reads(arguments: Mapping[str, object]) -> float:
        """1.0 where math-verify makes an expression of `gold` (not merely a string of it) that equals itself."""
        parsed = read(arguments["gold"])
        return float(len(parsed) > 1 and verify(parsed, parsed, timeout_seconds=None))

    return equal, reads


@cache
def _load_reasoning_gym() -> Verify:
    import reasoning_gym

    datasets: dict[tuple, object] = {}

    def full_credit(arguments: Mapping[str, object]) -> float:
        """1.0 only where the family's own scorer gives full credit (arguments: family, options, item, answer).

        Scorers pay len(gold) / len(answer) for an answer that contains the gold, 0.01 for trying, or (game_of_life_halting)
        everything for anything. None of that is a right answer, so what isn't full is 0, and an item whose scorer
        gives `CANARY` full credit is compared with its gold by text. NaN is passed on, for the caller to count.
        """
        family, options = arguments["family"], arguments["options"]
        key = (family, repr(sorted(options.items())))
        if key not in datasets:
            datasets[key] = reasoning_gym.create_dataset(family, seed=0, size=1, **options)
        item, answer = pickle.loads(base64.b64decode(arguments["item"])), arguments["answer"]
        score = datasets[key].score_answer(answer, item)
        if not math.isfinite(score):
            return math.nan
        if score >= 1.0 and pays_for_anything(datasets[key], item):
            return float(answer == item["answer"])
        return float(score >= 1.0)

    def pays_for_anything(dataset, item: Mapping[str, object]) -> bool:
        try:
            return dataset.score_answer(CANARY, item) >= 1.0
        except Exception:  # a scorer that can't even read the canary doesn't pay for it (prime_factorization raises)
            return False

    return full_credit
