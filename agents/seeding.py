"""Every random stream of a run, derived from (purpose, seed) so that no two of them share numbers.

A stream belongs to one seed and one purpose: what a seed draws does not depend on which other
seeds are trained beside it, and drawing more for one purpose leaves the others as they were.
"""

import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Purpose(IntEnum):
    """What random numbers are for; the values are part of the streams, so never renumber them."""

    INIT = 0
    EXPLORATION = 1
    UPDATE = 2
    REPLAY = 3
    EPISODE = 4
    EVALUATION = 5
    PLACEBO = 6
    ORACLE = 7
    POSTHOC = 8


def generators(
    purpose: Purpose, seeds: Sequence[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One torch generator per seed for this purpose.

    Example:
        >>> first, second = generators(Purpose.INIT, [1, 2])
        >>> alone, = generators(Purpose.INIT, [2])
        >>> torch.equal(torch.rand(3, generator=second), torch.rand(3, generator=alone))
        True
    """
    states = [
        np.random.SeedSequence((purpose, seed)).generate_state(1, np.uint64) for seed in seeds
    ]
    return [torch.Generator(device).manual_seed(int(state[0])) for state in states]


def normal(sources: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Standard normal draws [S, *shape], each seed's from its own generator and on its device."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in sources])


def uniform(sources: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Draws [S, *shape] from [0, 1), each seed's from its own generator and on its device."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in sources])


def episode_seed(seed: int, env_index: int, episode: int) -> int:
    """The seed of the `episode`-th training episode in environment `env_index` of a run."""
    sequence = np.random.SeedSequence((Purpose.EPISODE, seed, env_index, episode))
    return int(sequence.generate_state(1)[0])


def evaluation_seeds(
    env_id: str, seed: int, episodes: int, purpose: Purpose = Purpose.EVALUATION
) -> NDArray[Any]:
    """Seeds [episodes] of the evaluation episodes of the run with this training seed.

    Each run has a set of its own (one set for all would make its start states a fixed effect);
    inside a run every evaluation, last or averaged, plays the same set, so they are paired.
    A longer set begins with the shorter one.
    """
    key = (purpose, zlib.crc32(env_id.encode()), seed)
    return np.random.SeedSequence(key).generate_state(episodes)
