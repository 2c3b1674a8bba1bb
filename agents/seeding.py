"""Every random stream of a run, derived from (purpose, seed) so that no two of them share numbers.

A stream belongs to one seed and one purpose: what a seed draws does not depend on which other
seeds are trained beside it, and drawing more for one purpose leaves the others as they were.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Literal

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
    POSTHOC = 8
    RANDOM = 9


def generators(purpose: Purpose, seeds: Sequence[int]) -> list[torch.Generator]:
    """One torch generator per seed for this purpose, on the CPU.

    Example:
        >>> first, second = generators(Purpose.INIT, [1, 2])
        >>> alone, = generators(Purpose.INIT, [2])
        >>> torch.equal(torch.rand(3, generator=second), torch.rand(3, generator=alone))
        True
    """
    return [torch.Generator().manual_seed(_key(purpose, seed)) for seed in seeds]


Noise = Literal["normal", "uniform"]
Law = Noise | Literal["integer"]
_LOW = 2**32 - 1


class Streams:
    """The random numbers that S seeds draw for one purpose, each from a stream of its own.

    On the CPU a stream is a torch generator. On a device it is counted: its number i is a function
    of its key and of i, SplitMix64's (Steele, Lea & Flood 2014,
    https://doi.org/10.1145/2660193.2660195), so that one launch draws for all seeds, and for many
    calls ahead. The numbers of the two are different ones.

    Args:
        purpose: What for.
        seeds: One training seed per stream.
        device: Where the numbers are made.

    Attributes:
        position: How many words of 64 bits each counted stream has used.

    Example:
        >>> both, alone = Streams(Purpose.UPDATE, [1, 2]), Streams(Purpose.UPDATE, [2])
        >>> torch.equal(both.draw("normal", (3,))[1], alone.draw("normal", (3,))[0])
        True
    """

    def __init__(
        self, purpose: Purpose, seeds: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.counted = self.device.type != "cpu"
        self.position = 0
        self._generators = generators(purpose, seeds)
        self._form: tuple[Noise, tuple[int, ...]] | None = None  # of the rows that were made ahead
        self._rows: Iterator[Tensor] = iter(())
        self._used = 0  # of these rows
        self._place = 0  # of the next of them; elsewhere, others have drawn since
        self._before: list[Tensor] = []  # where torch's generators were when they were made
        if self.counted:
            keys = torch.tensor([[_key(purpose, seed) - 2**63] for seed in seeds])
            self._keys = keys.to(device)  # [S, 1]
            self._start = torch.zeros(1, dtype=torch.int64, device=device)

    def draw(self, law: Noise, shape: tuple[int, ...]) -> Tensor:
        """Numbers [S, *shape] by their law."""
        if self.counted:
            return self.next(law, shape)
        self._settle()
        return self._draw(law, shape)

    def next(self, law: Noise, shape: tuple[int, ...]) -> Tensor:
        """As `draw`, but made for many calls at once: quick where all are of one form."""
        fits = self._form == (law, shape) and self._place == self.position
        row = next(self._rows, None) if fits else None
        if row is None:
            self._settle()
            calls = ahead(len(self._generators), shape)
            if self.counted:
                self.tell()
                self._rows = iter(self.after(law, calls, shape))
            else:
                self._before = [generator.get_state() for generator in self._generators]
                self._rows = iter([self._draw(law, shape) for _ in range(calls)])
            self._form = law, shape  # last: what was interrupted is of no form
            row = next(self._rows)
        self._used += 1
        self.use(*shape)
        self._place = self.position
        return row

    def _draw(self, law: Noise, shape: tuple[int, ...]) -> Tensor:
        make = torch.randn if law == "normal" else torch.rand
        draws = [make(shape, generator=g) for g in self._generators]
        return torch.stack(draws) if len(draws) > 1 else draws[0].unsqueeze(0)

    def _settle(self) -> None:
        """Drop what was made ahead; torch's generators are where single calls had left them."""
        if self._form and not self.counted:
            for generator, place in zip(self._generators, self._before, strict=True):
                generator.set_state(place)
            for _ in range(self._used):
                self._draw(*self._form)
        self._form, self._used = None, 0

    def below(self, high: int, calls: int, size: int) -> Tensor:
        """What so many calls for `size` integers from [0, high) give: [calls, S, size]."""
        if self.counted:
            self.tell()
            numbers = self.after("integer", calls, (size,)).remainder_(high)
            self.use(size, calls=calls)
            return numbers
        self._settle()
        shape = (calls, size)
        draws = [torch.randint(high, shape, generator=g) for g in self._generators]
        return torch.stack(draws, dim=1)

    def tell(self) -> None:
        """Tell the device the position of a counted stream."""
        self._start.fill_(self.position)

    def after(
        self, law: Law, calls: int, shape: tuple[int, ...], *, skip: int = 0, every: int = 0
    ) -> Tensor:
        """What calls of a counted stream give after the position that the device was told.

        Nothing is counted, so that it can be one program: see `use`.

        Args:
            law: Standard normal numbers, uniform ones from [0, 1), or 32 bits as integers.
            calls: How many.
            shape: Of each seed's numbers in a call.
            skip: Words that go before the first of them.
            every: Words from one call to the next; 0: they follow on each other.

        Returns:
            Numbers [calls, S, *shape].
        """
        count, words = math.prod(shape), words_of(shape)
        first = torch.arange(calls, device=self.device).mul_(every or words).add_(self._start)
        index = first.unsqueeze(1) + torch.arange(skip, skip + words, device=self.device)
        bits = splitmix64(self._keys, index.unsqueeze(1))  # [calls, S, words]
        high, low = bits.bitwise_right_shift(32).bitwise_and_(_LOW), bits.bitwise_and(_LOW)
        if law == "normal":  # Box & Muller 1958
            radius = high.add_(1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
            angle = low.float().mul_(2 * math.pi * 2**-32)
            numbers = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)
        else:
            numbers = torch.cat((high, low), dim=-1)
            if law == "uniform":
                numbers = numbers.bitwise_right_shift_(8).float().mul_(2**-24)
        return numbers[..., :count].reshape(calls, -1, *shape)

    def use(self, *shape: int, calls: int = 1) -> None:
        """Count calls as made; of torch's generators they are counted by themselves."""
        if self.counted:
            self.position += calls * words_of(shape)

    def state_dict(self) -> dict[str, Any]:
        """Where each stream is."""
        self._settle()
        states = [generator.get_state() for generator in self._generators]
        return {"position": self.position, "generators": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, also on a device of another kind."""
        self.position, self._form = int(state["position"]), None
        for generator, place in zip(self._generators, state["generators"], strict=True):
            generator.set_state(place)


Draw = tuple[Streams, Noise, tuple[int, ...]]
"""Numbers that a step takes: from where, by which law, and the shape of each seed's."""


def splitmix64(key: Tensor, index: Tensor) -> Tensor:
    """Word number `index` of the stream that begins at `key`: 64 bits as a signed integer.

    Example:
        >>> word = splitmix64(torch.tensor([1234567]), torch.tensor([0, 1]))
        >>> [int(x) % 2**64 for x in word]
        [6457827717110365317, 3203168211198807973]
    """
    z = key + (index + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor
    return z ^ ((z >> 31) & (2**33 - 1))


def ahead(seeds: int, shape: Sequence[int]) -> int:
    """For how many calls numbers are made ahead: 64, or what makes some 16 million of them."""
    return max(1, min(64, 2**24 // (seeds * math.prod(shape))))


def words_of(shape: Sequence[int]) -> int:
    """How many words a call for numbers of this shape takes: two numbers come from one."""
    return -(-math.prod(shape) // 2)


def _key(purpose: Purpose, seed: int) -> int:
    return int(np.random.SeedSequence((purpose, seed)).generate_state(1, np.uint64)[0])


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
