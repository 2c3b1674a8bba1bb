"""DQN on images: the network and the replay memory of Mnih et al. 2015.

https://www.nature.com/articles/nature14236, Methods. An observation is a stack [K, H, W] of the
last K frames, uint8, as `gymnasium.wrappers.FrameStackObservation` makes it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.networks import MLP, QNetwork
from agents.replay import Batch, Replay, Upload, require_memory
from agents.seeding import Streams

Shape = tuple[int, int, int]
"""Frames in a stack, height, width."""


class Conv2d(nn.Module):
    """Convolutions with square kernels, one per member, each over its own batch.

    Weights and biases are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default law, with
    that member's generator. The members are taken one after another: each is the very convolution
    that it is alone, which a grouped one is not always to the last bit.

    Shape:
        x [M, B, channels, H, W] -> [M, B, filters, H', W'].
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel: int,
        stride: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels * kernel * kernel)

        def draw(*shape: int) -> nn.Parameter:
            rows = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
            return nn.Parameter(torch.stack(rows))

        self.weight = draw(filters, channels, kernel, kernel)
        self.bias = draw(filters)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every member's images with its kernels."""
        members = zip(x, self.weight, self.bias, strict=True)
        return torch.stack([F.conv2d(*member, stride=self.stride) for member in members])


class Scale(nn.Module):
    """Bytes to floats from 0 to 1."""

    def forward(self, frames: Tensor) -> Tensor:
        """The frames over 255."""
        return frames / 255


class PixelQNetwork(QNetwork):
    """The network of Mnih et al. 2015: uint8 obs [S, B, K, H, W] -> Q(s, .) [S, B, actions].

    32 filters 8 x 8 with stride 4, 64 of 4 x 4 with stride 2, 64 of 3 x 3 with stride 1, a ReLU
    after each; then the hidden layers, (512,) in the paper.

    Raises:
        ValueError: The frames are smaller than 36 x 36, which leaves nothing to the last filter.
    """

    def __init__(
        self,
        obs_shape: Shape,
        action_dim: int,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> None:
        nn.Module.__init__(self)
        frames, *image = obs_shape
        if min(image) < 36:
            raise ValueError(
                "observations must be (frames, height, width) with images of at least 36 x 36, "
                f"got {obs_shape}"
            )
        layers: list[nn.Module] = [Scale()]
        for channels, filters, kernel, stride in (
            (frames, 32, 8, 4),
            (32, 64, 4, 2),
            (64, 64, 3, 1),
        ):
            layers += [Conv2d(channels, filters, kernel, stride, generators), nn.ReLU(inplace=True)]
            image = [(size - kernel) // stride + 1 for size in image]
        features = 64 * math.prod(image)
        head = MLP((features, *hidden, action_dim), generators)
        self.net = nn.Sequential(*layers, nn.Flatten(2), head)


class FrameReplay(Replay):
    """A `Replay` of stacks of frames that keeps each frame once.

    Consecutive observations share all frames but one, and so do a transition's two. A row has the
    places of a stack's frames instead of the stack (exact in float32), and a batch is put together
    from them. The stack that a transition begins with is the one that a transition of the step
    before ended with, known again by its bytes, or a new one. So nothing depends on where episodes
    end, on how stacks are padded or on how many environments take turns, and what is no stack at
    all is kept whole.

    A frame stays as long as a row shows it. There are places for `capacity` frames and a sixteenth
    more; where episodes are so short that their first frames need more, more are made.

    Args:
        obs_dim: Frames in a stack, height, width; the others as in `Replay`.

    Attributes:
        frames: What lies in each place, uint8 [S, places, H, W].

    Raises:
        ValueError: The capacity is below 1, or needs more places than float32 can count, 2^24.
    """

    def __init__(
        self,
        capacity: int,
        obs_dim: Shape,
        action_dim: int = 1,
        members: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        stack, *image = obs_dim
        super().__init__(capacity, stack, action_dim, members, device)
        self.frames = torch.empty(members, 0, *image, dtype=torch.uint8, device=device)
        self.uses = [Counter[int]() for _ in range(members)]  # how often rows show each place
        self.free: list[list[int]] = [[] for _ in range(members)]  # the places that no row shows
        # Where the frames lie of the stacks that the last step ended with, by their bytes.
        self.known: list[dict[bytes, list[int]]] = [{} for _ in range(members)]
        self.columns = [*range(stack), *range(-stack, 0)]  # of the rows, where they show frames
        self.shown = np.zeros((members, capacity, 2 * stack), dtype=np.int32)  # what is there
        self._new: list[tuple[int, int, NDArray[Any]]] = []  # frames on their way to their places
        self._upload_frames, self._upload_index = Upload(device), Upload(device)
        self._make_places(capacity + self._more())
        # Rows without a transition show place 0, until the last of them is overwritten.
        self.rows.zero_()
        for uses, free in zip(self.uses, self.free, strict=True):
            uses[0] = capacity * len(self.columns)
            free.remove(0)

    def add(
        self,
        obs: NDArray[Any],
        action: NDArray[np.float32] | NDArray[np.int64],
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        next_obs: NDArray[Any],
    ) -> None:
        """Store n transitions of every seed, as `Replay.add` does, of stacks [S, n, K, H, W].

        Raises:
            ValueError: n is above the capacity, or there are more places than float32 can count.
        """
        if obs.shape[1] > self.capacity:  # before a frame is stored
            raise ValueError(
                f"cannot add {obs.shape[1]} transitions at once to a capacity of {self.capacity}"
            )
        places = np.empty((2, *obs.shape[:3]), dtype=np.float32)
        for member in range(len(obs)):
            known = {}
            for i, (stack, next_stack) in enumerate(
                zip(obs[member], next_obs[member], strict=True)
            ):
                before = self.known[member].get(stack.tobytes()) or self._store(member, stack)
                if np.array_equal(next_stack[:-1], stack[1:]):
                    after = before[1:] + self._store(member, next_stack[-1:])
                else:
                    after = self._store(member, next_stack)
                known[next_stack.tobytes()] = after
                places[:, member, i] = before, after
            self.known[member] = known
        super().add(places[0], action, reward, terminated, places[1])

    def append(self, rows: NDArray[np.float32]) -> None:
        """Store transitions as rows whose frames have their places; what they replace goes."""
        self._put_frames()
        at = np.arange(self.added, self.added + rows.shape[1]) % self.capacity
        replaced = self.shown[:, at]
        self.shown[:, at] = shown = rows[..., self.columns]
        super().append(rows)
        for member, uses in enumerate(self.uses):
            uses.update(shown[member].astype(int).ravel().tolist())
            uses.subtract(replaced[member].ravel().tolist())
            gone = (place for place in np.unique(replaced[member]).tolist() if not uses[place])
            self.free[member] += gone

    def batches(self, batch_size: int, streams: Streams, count: int) -> Iterator[Batch]:
        """Batches of `Replay.batches`, with stacks put together: uint8 [S, B, K, H, W]."""
        for batch in super().batches(batch_size, streams, count):
            obs, next_obs = self._stacks(batch.obs), self._stacks(batch.next_obs)
            yield batch._replace(obs=obs, next_obs=next_obs)

    def dump(self, n: int) -> bytes:
        """The newest n transitions: rows that count the frames, and after them the frames."""
        rows = self.last(n).numpy()
        frames = []
        for member in range(len(rows)):
            shown = rows[member][:, self.columns].astype(int)
            places, number = np.unique(shown, return_inverse=True)
            rows[member][:, self.columns] = number.reshape(shown.shape)
            frames.append(self.frames[member, places].cpu().numpy().tobytes())
        return b"".join([rows.astype("<f4", copy=False).tobytes(), *frames])

    def load(self, data: bytes, n: int) -> None:
        """Store n transitions from `dump`."""
        members, width = len(self.rows), self.rows.shape[-1]
        numbers = members * n * width
        rows = np.frombuffer(data, "<f4", numbers).astype(np.float32).reshape(members, n, width)
        frames = np.frombuffer(data, np.uint8, offset=4 * numbers).copy()
        frames = frames.reshape(-1, *self.frames.shape[2:])
        for member, row in enumerate(rows):
            number = row[:, self.columns].astype(int)
            count = number.max() + 1
            places = np.array(self._store(member, frames[:count]), dtype=np.float32)
            row[:, self.columns] = places[number]
            frames = frames[count:]
        self.append(rows)

    def _stacks(self, places: Tensor) -> Tensor:
        """The stacks [S, B, K, H, W] whose frames lie in these places [S, B, K]."""
        first = self.frames.shape[1] * torch.arange(len(places), device=places.device)
        index = (places.long() + first.view(-1, 1, 1)).flatten()
        stacks = self.frames.flatten(0, 1).index_select(0, index)
        return stacks.view(*places.shape, *self.frames.shape[2:])

    def _store(self, member: int, frames: NDArray[Any]) -> list[int]:
        """Put frames in free places; one that repeats the frame before shares its place."""
        places: list[int] = []
        for i, frame in enumerate(frames):
            if i == 0 or not np.array_equal(frame, frames[i - 1]):
                if not self.free[member]:
                    self._make_places(self._more())
                place = self.free[member].pop()
                self._new.append((member, place, frame))
            places.append(place)
        return places

    def _put_frames(self) -> None:
        """Bring new frames to their places, some MiB at a time."""
        while self._new:
            new, self._new = self._new[:256], self._new[256:]
            members, places, frames = zip(*new, strict=True)
            index = torch.tensor(members) * self.frames.shape[1] + torch.tensor(places)
            stacked = torch.from_numpy(np.stack(frames))
            self.frames.flatten(0, 1).index_copy_(
                0, self._upload_index(index), self._upload_frames(stacked)
            )

    def _more(self) -> int:
        return self.capacity // 16 + len(self.columns)

    def _make_places(self, more: int) -> None:
        members, made, *image = self.frames.shape
        if made + more > 2**24:
            raise ValueError(f"a replay of frames has at most {2**24} places, got {made + more}")
        require_memory(self.frames.device, members, (made + more) * math.prod(image))
        # Uninitialised on purpose: the system hands out the pages as they are first written.
        frames = self.frames.new_empty(members, made + more, *image)
        frames[:, :made] = self.frames
        self.frames = frames
        for free in self.free:
            free[:0] = range(made + more - 1, made - 1, -1)  # the lowest one is taken first
