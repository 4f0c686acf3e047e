"""Random numbers that are a function of (seed, sample id, position) and of nothing else.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, doi
10.1145/2063384.2063405) is a counter-based generator: no state to carry, to save or to keep in step between ranks, so a
response comes out the same in any batch order, after any preemption and on any number of ranks.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten Philox rounds, vectorised: counter [4, B] and key [2, B] give [4, B], all int64 holding 32-bit words.

    A 64-bit product may overflow int64; two's complement keeps its bits, and masking after the shift drops the sign.
    """
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device).unsqueeze(1)
    steps = torch.tensor(_KEY_STEPS, device=counter.device).unsqueeze(1)
    multiplied, mixed = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        product = (multipliers * multiplied).flip(0)
        multiplied = (product >> 32) & _WORD ^ mixed ^ key
        mixed = product & _WORD
        key = key + steps & _WORD
    return torch.stack((multiplied, mixed), dim=1).flatten(0, 1)


def uniform(seeds_B: Tensor, sample_ids_B: Tensor, positions_B: Tensor) -> Tensor:
    """fp64 [B] in [0, 1), multiples of 2^-53, for int64 [B] seeds, sample ids and positions (below 2^32) in the response."""
    counter = torch.stack((sample_ids_B & _WORD, sample_ids_B >> 32 & _WORD, positions_B, torch.zeros_like(positions_B)))
    words = philox4x32(counter, torch.stack((seeds_B & _WORD, seeds_B >> 32 & _WORD)))
    return (words[0] << 21 | words[1] >> 11).double() * 2.0**-53
