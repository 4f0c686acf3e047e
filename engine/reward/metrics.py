"""What a step's scores say, for metrics.jsonl."""

import math
from collections.abc import Iterable, Sequence

from ..batch import Score


def reward_metrics(scores: Iterable[tuple[str, Score]]) -> dict[str, float]:
    """Means over (data source, score) pairs of a step, from all ranks or one.

    reward/mean, reward/<part> for each part of the scores (accuracy, format, finished, timeout, crash, error) and reward/nan,
    the fraction of rewards that are no number; the same under reward/<source>/ where there is more than one source. NaN is left
    out of the other means, and a mean over nothing is left out altogether.
    """
    by_source: dict[str, list[Score]] = {}
    for source, score in scores:
        by_source.setdefault(source, []).append(score)
    metrics = _means("reward", [score for group in by_source.values() for score in group])
    if len(by_source) > 1:
        for source, group in sorted(by_source.items()):
            metrics |= _means(f"reward/{source}", group)
    return metrics


def _means(prefix: str, scores: Sequence[Score]) -> dict[str, float]:
    columns: dict[str, list[float]] = {"mean": [score.value for score in scores]}
    for score in scores:
        for part, value in score.parts.items():
            columns.setdefault(part, []).append(value)
    columns["nan"] = [float(math.isnan(score.value)) for score in scores]
    known = {name: [value for value in column if not math.isnan(value)] for name, column in columns.items()}
    return {f"{prefix}/{name}": sum(column) / len(column) for name, column in known.items() if column}
