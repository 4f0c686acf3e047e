"""Imported for its effect, in each of verl's worker processes: `register()` of `verl.py`, and nothing else.

verl imports what `actor_rollout_ref.model.external_lib` names where a worker starts.
"""

from .verl import register

register()
