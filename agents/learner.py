"""Gradient steps on batches of a replay buffer: operation by operation, or each one program."""

from collections.abc import Iterator

import torch
from torch import Tensor

from agents.agent import Agent
from agents.program import Build, Program, inductor
from agents.replay import Batch, Replay
from agents.seeding import Law, Streams, ahead, words_of
from polyak_rl import PolicyAverages


def update(agent: Agent, batch: Batch) -> dict[str, Tensor]:
    """An agent's next gradient step, with new draws for its `batch_size` transitions."""
    draws = [streams.draw(law, shape) for streams, law, shape in agent.draws]
    return agent.learn(batch, *draws, *agent.turns.next())


class Learner:
    """Lets an agent learn from batches that are drawn from its replay buffer.

    As a program, a gradient step is all of this at once: the batch is gathered, the agent learns,
    its targets follow, bad gradients are noted, and averages are given the new weights. Outside
    are what is random, which is made for many steps ahead and waits in rows of a block, of which
    each step reads the next, and what averages make of many steps' weights.

    Args:
        agent: Learns.
        replay: Where its transitions are.
        sampling: One stream per seed, for batches.
        compiled: Make the gradient step a program; see `agents.program.Program`.
        build: The program's.

    Attributes:
        program: The gradient step, or None.
        averages: Of the policy's weights, which are recorded in each gradient step; see `record`.
    """

    def __init__(
        self,
        agent: Agent,
        replay: Replay,
        sampling: Streams,
        *,
        compiled: bool = False,
        build: Build | None = inductor,
    ) -> None:
        self.agent, self.replay, self.sampling = agent, replay, sampling
        self.program: Program | None = None
        self.averages: list[PolicyAverages] = []
        self._batches: Iterator[Batch] = iter(())
        if not compiled:
            return
        device, seeds = replay.rows.device, len(replay.rows)
        self.program = Program(self._step, device, build)
        self._making = Program(self._make, device, None)  # the bits of single draws
        picks: tuple[Streams, Law, tuple[int]] = (sampling, "integer", (agent.config.batch_size,))
        self._draws: list[tuple[Streams, Law, tuple[int, ...]]] = [picks, *agent.draws]
        self._ahead = min(ahead(seeds, shape) for _, _, shape in self._draws)
        self._blocks = [
            torch.zeros(
                (self._ahead, seeds, *shape),
                dtype=torch.int64 if law == "integer" else torch.float32,
                device=device,
            )
            for _, law, shape in self._draws
        ]
        self._row = torch.zeros(1, dtype=torch.int64, device=device)  # of the next gradient step
        self._size = torch.ones((), dtype=torch.int64, device=device)  # of the replay buffer
        self._left = 0  # rows not yet read
        self._due = 0  # gradient steps left of the round

    def record(self, averages: PolicyAverages) -> None:
        """Record the policy's weights in every gradient step from now on."""
        self.averages.append(averages)
        if self.program is not None:
            self.program.recorded.clear()

    def begin(self, count: int) -> None:
        """Begin a round of so many gradient steps.

        Raises:
            ValueError: Nothing is stored to learn from.
        """
        if self.program is None:
            batch_size = self.agent.config.batch_size
            self._batches = self.replay.batches(batch_size, self.sampling, count)
            return
        self.replay.require_some()
        self.program.renew()
        if not self.program.recorded:
            for target in self.agent.targets.values():
                target.lag()  # it lies where it will stay, and has its plan
        self._size.fill_(self.replay.size)
        self._due = count
        if not self.sampling.counted:  # of a round that was broken off: of another size
            self._left = 0

    def step(self) -> dict[str, Tensor]:
        """The next gradient step; tags with values [S, ...] on the device."""
        if self.program is None:
            tags = update(self.agent, next(self._batches))
            for averages in self.averages:
                averages.record()
            return tags
        for averages in self.averages:
            averages.expect()
        if not self._left:
            self._refill()
        self._left -= 1
        self._due -= 1
        for streams, _, shape in self._draws:
            streams.use(*shape)
        tags = self.program(*self.agent.turns.next())
        for averages in self.averages:
            averages.count()
        return tags

    def _step(self, *turns: bool) -> dict[str, Tensor]:
        """What is one program."""
        picks, *noise = (block.index_select(0, self._row).squeeze(0) for block in self._blocks)
        batch = self.replay.take(picks.remainder(self._size))
        tags = self.agent.learn(batch, *noise, *turns)
        self.agent.descent.watch.note()
        for averages in self.averages:
            averages.write()
        self._row.add_(1)
        return tags

    def _refill(self) -> None:
        """Draw for the steps to come: on CPU those of this round, in the order of single steps."""
        if self.sampling.counted:
            for streams in {draw[0] for draw in self._draws}:
                streams.tell()
            self._making()
            self._left = self._ahead
            return
        self._left = min(self._ahead, self._due)
        picks, *others = self._blocks
        picks[: self._left] = self.sampling.below(self.replay.size, self._left, picks.shape[-1])
        for row in range(self._left):
            for (streams, law, shape), block in zip(self.agent.draws, others, strict=True):
                block[row] = streams.draw(law, shape)
        self._row.zero_()

    def _make(self) -> dict[str, Tensor]:
        """The blocks of draws that follow on what the device was told."""
        used: dict[Streams, int] = {}  # words of a step's draws from one stream
        for streams, _, shape in self._draws:
            used[streams] = used.get(streams, 0) + words_of(shape)
        skip = dict.fromkeys(used, 0)
        for (streams, law, shape), block in zip(self._draws, self._blocks, strict=True):
            rows = streams.after(law, self._ahead, shape, skip=skip[streams], every=used[streams])
            block.copy_(rows)
            skip[streams] += words_of(shape)
        self._row.zero_()
        return {}
