"""Questions that reasoning-gym generates by rule, drawn in a process of their own.

    python -m strop.engine.data.procedural      a request on stdin, the items on stdout, both JSON

Own process, for three reasons: six families (word_ladder, ransom_note, ...) give other questions under another string hash
seed, which differs between ranks and between a run and its resume, so PYTHONHASHSEED is set; pool_matrix reseeds numpy's
global generator; and importing the package takes 1.5 s and 60 MB that a trainer needs only once.
"""

import base64
import dataclasses
import difflib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "reasoning-gym:"
PATIENCE = 1000
"""Draws without a new question, beyond 10 for each question found, after which a family counts as exhausted."""
SEED_STRIDE = 10_000_019
"""Item i of a data set is seeded seed + i, so run seeds 1 and 99 would share all but 98 items: they start this far apart."""


@dataclass(frozen=True)
class Item:
    """One generated question; `pickled` is the whole reasoning-gym item (base64), which only its scorer opens."""

    question: str
    answer: str | None
    pickled: str


class RefusedRequest(ValueError):
    """No such family, or options it doesn't take. The message says which there are."""


def draw(family: str, options: Mapping[str, object], size: int, seed: int) -> list[Item]:
    """`size` items of a family with distinct questions, fewer if it has fewer; the same for the same arguments, everywhere.

    Raises RefusedRequest, and RuntimeError with the child's words should the generator fail.
    """
    request = {"family": family, "options": dict(options), "size": size, "first": seed * SEED_STRIDE % 2**31}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # -P: the current folder stays off sys.path; a repository root there would shadow packages of the same name.
    child = subprocess.run(
        [sys.executable, "-P", "-m", "strop.engine.data.procedural"], input=json.dumps(request), capture_output=True, text=True,
        encoding="utf-8", env={**os.environ, **threads, "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"}, check=False,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"reasoning-gym family {family!r} failed to generate: {child.stderr[-2000:].strip()}")
    reply = json.loads(child.stdout)
    if "refused" in reply:
        raise RefusedRequest(reply["refused"])
    return [Item(*fields) for fields in reply["items"]]


def _generate(family: str, options: Mapping[str, object], size: int, first: int) -> dict:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        return {"refused": f"it needs the package reasoning-gym ({error}): pip install 'strop[train]'"}
    if family not in DATASETS:
        close = difflib.get_close_matches(family, DATASETS, n=3) or sorted(DATASETS)
        return {"refused": f"there is no family {family!r}: perhaps {', '.join(close)}"}
    takes = {field.name for field in dataclasses.fields(DATASETS[family][1])} - {"seed", "size"}
    if unknown := sorted(options.keys() - takes):
        return {"refused": f"{family} has no option {unknown[0]!r}: it takes {', '.join(sorted(takes))}"}
    draws = PATIENCE + 20 * size  # finite: acre generates all of its items at once
    try:
        dataset = create_dataset(family, seed=first, size=draws, **options)
    except (AssertionError, ValueError, TypeError) as error:
        return {"refused": f"{family} refuses the options {dict(options)}: {error}"}
    found: dict[str, list] = {}
    newest = 0
    for index in range(draws):
        if len(found) == size or index - newest > PATIENCE + 10 * len(found):
            break
        item = dataset[index]
        if item["question"] not in found:
            newest = index
            answer = None if item["answer"] is None else str(item["answer"])
            found[item["question"]] = [item["question"], answer, base64.b64encode(pickle.dumps(item)).decode()]
    return {"items": list(found.values())}


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the package prints must not mix with the reply
    json.dump(_generate(**json.load(sys.stdin)), output)
    output.close()
