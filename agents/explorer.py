"""Actions of the behaviour policy: operation by operation, or each step's as one program."""

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.agent import Agent
from agents.program import Build, Program, inductor
from agents.replay import Upload
from agents.seeding import ahead, words_of


def explore(agent: Agent, obs: Tensor, step: int) -> Tensor:
    """Actions of the behaviour policy for obs [S, n, ...] at an environment step, with new draws.

    Where an agent's draws are normal, actions are uniform in [-1, 1] until learning starts; DQN
    says itself which share of its own is random.
    """
    streams, law, shape = agent.noise(obs.shape[1])
    if law == "normal" and step < agent.config.learning_starts:
        return 2 * streams.next("uniform", shape) - 1
    return agent.explore(obs, streams.next(law, shape), *agent.charts(step).values())


class Explorer:
    """Lets an agent act in its environments.

    As a program, from where learning starts, a step is one launch between the upload of what is
    observed and the download of the actions. What is random is made outside, for many steps ahead,
    and waits in rows of a block; which one is a step's, and what schedules say, is uploaded too.

    Args:
        agent: Acts.
        shape: Of the observations, [S, n, ...].
        device: Where the agent lives.
        compiled: Make acting a program, on a GPU; see `agents.program.Program`.
        build: The program's.

    Attributes:
        program: What acts, or None.
    """

    def __init__(
        self,
        agent: Agent,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        compiled: bool = False,
        build: Build | None = inductor,
    ) -> None:
        self.agent, self.shape = agent, shape
        self.program: Program | None = None
        self._upload = Upload(device)
        if not compiled or device.type == "cpu":  # where it would save less than it costs to build
            return
        self.program = Program(self._act, device, build)
        self._draw = agent.noise(shape[1])
        seeds, size = shape[0], self._draw[2]
        self._block = torch.zeros(ahead(seeds, size), seeds, *size, device=device)
        self._places = range(0)  # in the stream, where the block's rows begin
        numbers = math.prod(shape) + len(agent.charts(0)) + 1
        self._sent = torch.zeros(numbers, pin_memory=True)
        self._given = torch.zeros(numbers, device=device)

    def __call__(self, obs: NDArray[Any], step: int) -> NDArray[Any]:
        """Actions [S, n, ...] for observations [S, n, ...] at an environment step."""
        if self.program is None or step < self.agent.config.learning_starts:
            with torch.inference_mode():
                given = self._upload(torch.from_numpy(obs))
                return explore(self.agent, given, step).cpu().numpy()
        # The device has read what it was sent before: its answer was waited for.
        sent = self._sent.numpy()
        sent[: obs.size] = obs.ravel()
        sent[obs.size :] = [*self.agent.charts(step).values(), self._row()]
        self._given.copy_(self._sent, non_blocking=True)
        self.program.renew()
        return self.program()["actions"].cpu().numpy()

    def _row(self) -> int:
        """The block's row that is this step's."""
        streams, law, shape = self._draw
        if streams.position not in self._places:
            streams.tell()
            self._block.copy_(streams.after(law, len(self._block), shape))
            first, words = streams.position, words_of(shape)
            self._places = range(first, first + words * len(self._block), words)
        row = self._places.index(streams.position)
        streams.use(*shape)
        return row

    @torch.no_grad()
    def _act(self) -> dict[str, Tensor]:
        """What is one program."""
        obs, numbers = self._given.tensor_split([math.prod(self.shape)])
        *schedules, row = numbers.unbind()
        noise = self._block.index_select(0, row.long()).squeeze(0)
        return {"actions": self.agent.explore(obs.view(self.shape), noise, *schedules)}
