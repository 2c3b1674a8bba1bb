"""Experience replay on the agent's device, one buffer per seed in one tensor."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.seeding import Streams

DRAWN_AT_ONCE = 2**18
"""Numbers of a buffer's rows that are gathered in one go, where many batches are due: 1 MiB."""


class Batch(NamedTuple):
    """B transitions of each of S seeds, float32 but for images, which are uint8.

    `terminated` is 1 where the environment ended by its own rules and the future is worth nothing;
    an episode cut by a time limit has 0 there, and `next_obs` is its real last observation.
    """

    obs: Tensor  # [S, B, O]
    action: Tensor  # [S, B, A]
    reward: Tensor  # [S, B]
    terminated: Tensor  # [S, B]
    next_obs: Tensor  # [S, B, O]


class Upload:
    """Copies what the CPU has to a device without waiting for it.

    The way is through pinned memory, which is not written to before the device has read it.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._staging: Tensor | None = None
        self._read: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor on the device, of one dtype in all calls; on the CPU it is the very one."""
        if self.device.type == "cpu":
            return x
        if self._read is not None and not self._read.query():
            self._read.synchronize()
        if self._staging is None or self._staging.numel() < x.numel():
            self._staging = torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)
            self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        staging = self._staging[: x.numel()].view(x.shape)
        there = staging.copy_(x).to(self.device, non_blocking=True)
        self._read.record(torch.cuda.current_stream(self.device))
        return there


def require_memory(device: torch.device, seeds: int, bytes_a_seed: int) -> None:
    """Raise a ValueError where the replay buffers of so many seeds do not fit on a GPU."""
    if device.type != "cuda":  # a CPU's pages are taken as they are written
        return
    free, _ = torch.cuda.mem_get_info(device)
    if seeds * bytes_a_seed > free:
        raise ValueError(
            f"the replay buffers of {seeds} seeds take {seeds * bytes_a_seed / 2**20:,.0f} MiB, "
            f"{bytes_a_seed / 2**20:,.2f} each, and {device} has {free / 2**20:,.0f} left: train "
            f"at most {free // bytes_a_seed} seeds at once, or choose a smaller buffer_size"
        )


class Replay:
    """A ring of the last `capacity` transitions of each seed, sampled uniformly with replacement.

    A transition is one row (obs | action | reward | terminated | next_obs) of a float32 tensor
    [S, capacity, D], so that a batch is one gather and its fields are views of the result. It takes
    4 D bytes, D = 2 O + A + 2: for HalfCheetah's million transitions 168 MB a seed.

    Args:
        capacity: Transitions kept per seed.
        obs_dim: Size O of an observation.
        action_dim: Size A of a stored action; 1 for a discrete one (exact below 2^24).
        members: Number S of seeds.
        device: Where the rows live and are sampled.

    Attributes:
        added: Transitions ever added per seed.

    Raises:
        ValueError: The capacity is below 1, or there is not the memory on a GPU for all seeds.
    """

    def __init__(
        self,
        capacity: int,
        obs_dim: int,
        action_dim: int,
        members: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 transition, got {capacity}")
        self.capacity = capacity
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        require_memory(torch.device(device), members, 4 * capacity * sum(self.widths))
        # Uninitialised on purpose: the system hands out the pages as they are first written.
        self.rows = torch.empty(members, capacity, sum(self.widths), device=device)
        self.first_rows = capacity * torch.arange(members, device=device).unsqueeze(1)  # [S, 1]
        self.added = 0
        self._upload = Upload(device)

    @property
    def size(self) -> int:
        """Transitions stored per seed."""
        return min(self.added, self.capacity)

    @property
    def position(self) -> int:
        """Where the next transition goes: transition number t lies at t mod capacity."""
        return self.added % self.capacity

    def add(
        self,
        obs: NDArray[np.float32],
        action: NDArray[np.float32] | NDArray[np.int64],
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        next_obs: NDArray[np.float32],
    ) -> None:
        """Store n transitions of every seed.

        Args:
            obs: [S, n, O].
            action: [S, n, A], or [S, n] for discrete actions.
            reward: [S, n].
            terminated: [S, n]; not truncated.
            next_obs: [S, n, O]; the real last observation where the episode ended.

        Raises:
            ValueError: n is above the capacity.
        """
        members, n, obs_dim = obs.shape
        if n > self.capacity:
            raise ValueError(f"cannot add {n} transitions at once to a capacity of {self.capacity}")
        rows = np.empty((members, n, self.rows.shape[2]), dtype=np.float32)
        rows[:, :, :obs_dim] = obs
        rows[:, :, obs_dim : -obs_dim - 2] = action.reshape(members, n, self.widths[1])
        rows[:, :, -obs_dim - 2] = reward
        rows[:, :, -obs_dim - 1] = terminated
        rows[:, :, -obs_dim:] = next_obs
        self.append(rows)

    def append(self, rows: NDArray[np.float32]) -> None:
        """Store transitions that are rows [S, n, D]; n is at most the capacity."""
        n, position = rows.shape[1], self.position
        fitting = min(n, self.capacity - position)
        on_host = self.rows.is_cpu  # where NumPy's slices are less work
        ring: Any = self.rows.numpy() if on_host else self.rows
        new: Any = rows if on_host else self._upload(torch.from_numpy(rows))
        ring[:, position : position + fitting] = new[:, :fitting]
        if fitting < n:  # the rest wraps to the start of the ring
            ring[:, : n - fitting] = new[:, fitting:]
        self.added += n

    def last(self, n: int) -> Tensor:
        """The newest n transitions, at most `size`, as rows [S, n, D] on the CPU, oldest first."""
        index = torch.arange(self.added - n, self.added, device=self.rows.device) % self.capacity
        return self.rows[:, index].cpu()

    def dump(self, n: int) -> bytes:
        """The newest n transitions for a file: float32 rows [S, n, D], little-endian."""
        return self.last(n).numpy().astype("<f4", copy=False).tobytes()

    def load(self, data: bytes, n: int) -> None:
        """Store n transitions from `dump`."""
        rows = np.frombuffer(data, dtype="<f4").astype(np.float32)
        self.append(rows.reshape(len(self.rows), n, -1))

    def sample(self, batch_size: int, streams: Streams) -> Batch:
        """Draw `batch_size` transitions of every seed, each from that seed's stream.

        Args:
            batch_size: B, with replacement, so it may exceed the number stored.
            streams: One per seed, on the device of the buffer.

        Raises:
            ValueError: Nothing is stored yet.
        """
        return next(self.batches(batch_size, streams, 1))

    def batches(self, batch_size: int, streams: Streams, count: int) -> Iterator[Batch]:
        """What `count` calls of `sample` would return, to the bit, drawn many at a time.

        Raises:
            ValueError: Nothing is stored yet.
        """
        self.require_some()
        at_once = max(1, DRAWN_AT_ONCE // (len(self.rows) * batch_size * sum(self.widths)))
        for first in range(0, count, at_once):
            picks = streams.below(self.size, min(at_once, count - first), batch_size)
            yield from map(Batch, *(field.unbind() for field in self.take(picks)))

    def require_some(self) -> None:
        """Raise a ValueError where nothing is stored yet."""
        if self.size == 0:
            raise ValueError("cannot sample from an empty replay buffer; add a transition first")

    def take(self, picks: Tensor) -> Batch:
        """The transitions at places [..., S, B] of each seed's buffer, [..., S, B, ...]."""
        index = (self.first_rows + picks).flatten()
        rows = self.rows.flatten(0, 1).index_select(0, index).view(*picks.shape, -1)
        obs, action, reward, terminated, next_obs = torch.split(rows, self.widths, dim=-1)
        return Batch(obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs)
