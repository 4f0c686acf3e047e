"""A LossSpec from a peer's settings, whose errors name the peer's options."""

import re
from typing import Any

from ..specs import LossSpec


def peer_spec(settings: dict[str, Any], peer: str, peer_names: dict[str, str]) -> LossSpec:
    """LossSpec(**settings). Its ValueError begins with `peer` and has fields replaced by `peer_names`."""
    try:
        return LossSpec(**settings)
    except ValueError as error:
        message = re.sub(r"\w+", lambda word: peer_names.get(word[0], word[0]), str(error))
        raise ValueError(f"{peer}: {message}") from error
