"""Sharded and parallel networks: each process moves its own shards, and none talks to another.

The tests of this file run in two processes at once, which stay for all of them. What a test asserts
holds on either, and gathering is left to the tests: `whole` is the network that the shards make.
"""

from __future__ import annotations

import functools
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from polyak_rl import (
    AverageBank,
    Ema,
    Tail,
    TargetNetwork,
    Timeline,
    Uniform,
    Window,
    hard_update,
    soft_update,
)

if not dist.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

RULES = {"uniform": Uniform(), "ema": Ema(half_life=3.0), "window": Window(2, 2)}
HALF = Tail(0.5)
X = torch.linspace(-1, 1, 12).view(4, 3)
_pipes: list[Connection] = []


@pytest.fixture(scope="module", autouse=True)
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    context, meeting = mp.get_context("spawn"), tmp_path_factory.mktemp("ranks") / "meeting"
    processes = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        _pipes.append(ours)
        processes.append(context.Process(target=work, args=(rank, meeting, theirs), daemon=True))
        processes[-1].start()
    yield
    for pipe in _pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    _pipes.clear()


def on_both_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """A test whose body runs in both processes, and fails where it fails in one."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        for pipe in _pipes:
            pipe.send((test.__name__, arguments))
        failures = [pipe.recv() if pipe.poll(100) else "no answer" for pipe in _pipes]
        if any(failures):
            pytest.fail("\n".join(f"rank {r}: {why}" for r, why in enumerate(failures)), False)

    return run


def work(rank: int, meeting: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(0, 30)
    )
    while (task := pipe.recv()) is not None:
        name, arguments = task
        try:
            getattr(sys.modules[__name__], name).__wrapped__(**arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


class Network(nn.Module):
    """Uneven shards, an empty one on rank 1, tied and frozen parameters, and buffers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.tied = nn.ModuleList([nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)])
        self.tied[1].weight = self.tied[0].weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        for layer in (*self.tied, self.frozen, self.head):
            x = layer(x)
        return x.sigmoid()


@functools.cache
def mesh(ranks: tuple[int, ...] = (0, 1)) -> DeviceMesh:
    return DeviceMesh("cpu", ranks)


def sharded(network: nn.Module, over: tuple[int, ...] = (0, 1)) -> nn.Module:
    """The network with FSDP2, its first layer a group of its own."""
    if isinstance(network, Network):
        fully_shard(network.first, mesh=mesh(over))
    fully_shard(network, mesh=mesh(over))
    return network


def plain(network: nn.Module) -> nn.Module:
    return network


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    """The shard of a plain tensor that this rank would hold."""
    return distribute_tensor(tensor, mesh(), [Shard(0)], src_data_rank=None).to_local()


def whole(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in network.state_dict().items()
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def step(network: nn.Module, seed: int) -> None:
    """A random gradient step, the same of a plain and a sharded network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator) / 5
            local(parameter).add_(here(noise) if isinstance(parameter, DTensor) else noise)


@contextmanager
def silent() -> Iterator[None]:
    """The block starts no collective."""
    with CommDebugMode() as communication:
        yield
    assert communication.get_total_counts() == 0, communication.get_comm_counts()


@contextmanager
def refused(message: str, *untouched: nn.Module) -> Iterator[None]:
    before = [[local(t).clone() for t in network.parameters()] for network in untouched]
    with silent(), pytest.raises(ValueError, match=re.escape(message)):
        yield
    for network, tensors in zip(untouched, before, strict=True):
        assert all(map(torch.equal, map(local, network.parameters()), tensors))


@on_both_ranks
def test_the_counter_of_collectives_counts() -> None:
    network = sharded(Network())
    shapes = {name: tuple(local(p).shape) for name, p in network.named_parameters()}
    assert shapes["first.weight"] == ((3, 3), (2, 3))[dist.get_rank()]
    assert shapes["head.weight"] == ((1, 5), (0, 5))[dist.get_rank()]
    with pytest.raises(AssertionError, match="allgather"), silent():
        network(X)


# ------------------------------------------------------------------------ target networks


@pytest.mark.parametrize("kind", ["modules", "mappings", "sequences"])
@pytest.mark.parametrize("tau", [0.3, 1.0])
@on_both_ranks
def test_a_sharded_update_is_the_plain_one_bit_for_bit(kind: str, tau: float) -> None:
    results = []
    for wrap in (plain, sharded):
        target, online = wrap(Network(0)), wrap(Network(1))
        for i in range(3):
            step(online, i)
            both = (target, online)
            if kind == "mappings":
                both = (target.state_dict(), online.state_dict())
            elif kind == "sequences":
                both = (target.parameters(), online.parameters())
            with silent():
                soft_update(*both, tau)
        results.append(whole(target))
    assert_equal(*results)


@on_both_ranks
def test_a_target_follows_through_training_acting_and_evaluation() -> None:
    """Forward passes gather parameters, and some leave them so: nothing may be written to those."""
    runs = []
    for wrap in (plain, sharded):
        online, twin = wrap(Network(0)), wrap(Network(1))
        target = TargetNetwork(online, tau=0.3, target=twin)
        optimizer = torch.optim.Adam(online.parameters(), lr=0.1)
        outputs = []
        for _ in range(4):
            loss = (online(X) - target(X) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                online.eval()(X)
                online.train()
            with silent():
                target.update()
            outputs.append(target(X).detach())
        assert not target(X).requires_grad
        runs.append((whole(target.module), torch.stack(outputs)))
    (theirs, expected), (ours, outputs) = runs
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])
    torch.testing.assert_close(outputs, expected)
    assert (expected[1:] - expected[:-1]).abs().amin() > 1e-3


@on_both_ranks
def test_an_update_between_forward_and_backward_leaves_the_gradient_as_it_is() -> None:
    gradients = []
    for wrap in (plain, sharded):
        online = wrap(Network(0))
        target = TargetNetwork(online, target=wrap(Network(1)))
        loss = online(X).sum()
        target.update()
        loss.backward()
        gradients.append([p.grad for p in online.parameters() if p.requires_grad])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_both_ranks
def test_a_saved_target_goes_on_where_it_was(dtype: torch.dtype) -> None:
    """In 16 bits the float32 masters are shards too."""
    everything = {}
    for wrap in (plain, sharded):
        online = wrap(Network(0).to(dtype))
        target = TargetNetwork(online, tau=0.01, target=wrap(Network(1).to(dtype)))
        for i in range(4):
            step(online, i)
            target.update()
        state = saved(target.state_dict())
        again = TargetNetwork(online, tau=0.01, target=wrap(Network(2).to(dtype)))
        with silent():
            again.load_state_dict(state)
        for i in range(4, 8):
            step(online, i)
            target.update()
            again.update()
        assert (again.clock, target.clock) == (8, 8)
        assert_equal(whole(target.module), whole(again.module))
        everything[wrap] = whole(target.module)
    assert_equal(everything[plain], everything[sharded])


def saved(state: Any) -> Any:
    """What comes back from a file of this rank's own."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_both_ranks
def test_a_sharded_network_asks_for_a_twin() -> None:
    with refused("FSDPNetwork cannot be deep-copied (FSDP does not support deepcopy"):
        TargetNetwork(sharded(Network()))


@on_both_ranks
def test_the_lag_is_that_of_the_shards_here() -> None:
    online, twin = sharded(Network(0)), sharded(Network(1))
    target = TargetNetwork(online, tau=0.5, target=twin)
    step(online, 0)
    names = [name for name, _ in online.named_parameters()]
    theirs, ours = whole(online), whole(twin)
    gap = torch.cat([here(ours[name] - theirs[name]).flatten() for name in names]).norm()
    size = torch.cat([here(theirs[name]).flatten() for name in names]).norm()
    with silent():
        lag = target.lag()
    torch.testing.assert_close(lag, gap / size)


# -------------------------------------------------------------------------------- averages


def keepers(network: nn.Module) -> tuple[AverageBank, Timeline]:
    return AverageBank(network, RULES), Timeline(network, capacity=10, expected=10)


@on_both_ranks
def test_averages_of_shards_are_shards_of_the_averages() -> None:
    averages = []
    for wrap in (plain, sharded):
        network = wrap(Network())
        bank, timeline = keepers(network)
        for i in range(10):
            step(network, i)
            network(X)  # leaves parameters gathered
            with silent():
                bank.update()
                timeline.record()
        with silent():
            averages.append({**{n: bank.average(n) for n in RULES}, "t": timeline.average(HALF)})
    for name, theirs in averages[0].items():
        ours = averages[1][name]
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], here(theirs[key]), rtol=0, atol=1e-15)


@on_both_ranks
def test_an_average_is_evaluated_on_the_shards_and_the_weights_come_back() -> None:
    """Every forward pass leaves gathered parameters behind, which are those of before the swap."""
    results = []
    for wrap in (plain, sharded):
        network = wrap(Network()).eval()
        bank, timeline = keepers(network)
        for i in range(10):
            step(network, i)
            bank.update()
            timeline.record()
        outputs, before = [network(X)], whole(network)
        with bank.applied("uniform"):
            outputs.append(network(X))
            with pytest.raises(RuntimeError, match=r"state_dict\(\) inside applied\(\)"):
                network.state_dict()
            with timeline.applied(HALF):
                outputs.append(network(X))
            outputs.append(network(X))
        outputs.append(network(X))
        assert_equal(whole(network), before)
        results.append(torch.stack(outputs).detach())
    torch.testing.assert_close(results[1], results[0])
    online, uniform, half, uniform_again, online_again = results[1]
    assert torch.equal(online, online_again)
    assert torch.equal(uniform, uniform_again)
    assert len({x.sum().item() for x in (online, uniform, half)}) == 3


@on_both_ranks
def test_inside_a_swap_a_step_is_refused_and_an_average_goes_into_a_twin() -> None:
    network, twin = sharded(Network(0)), sharded(Network(1))
    bank, _ = keepers(network)
    bank.update()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with bank.applied("ema"):
        with pytest.raises(RuntimeError, match=r"an optimizer step inside applied\(\)"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"update\(\) inside applied\(\)"):
            bank.update()
        AverageBank(twin, RULES).update()  # other weights are free
    twin(X)
    with silent():
        bank.copy_to("ema", twin)
    assert_equal(whole(twin), whole(network))
    with refused("build a second one and give it to copy_to"):
        bank.module("ema")


@on_both_ranks
def test_saved_averages_go_on_where_they_were(tmp_path: Path) -> None:
    network = sharded(Network())
    bank, timeline = keepers(network)
    for i in range(5):
        step(network, i)
        bank.update()
        timeline.record()
    path = tmp_path / f"{dist.get_rank()}.pt"
    again = AverageBank(network, RULES)
    with silent():
        again.load_state_dict(saved(bank.state_dict()))
        timeline.save(path)
        other = Timeline.load(path, network)
    for i in range(5, 9):
        step(network, i)
        for record in (bank.update, again.update, timeline.record, other.record):
            record()
    assert_equal(again.average("ema"), bank.average("ema"))
    assert_equal(other.average(HALF), timeline.average(HALF))


@on_both_ranks
def test_the_shards_of_another_rank_are_refused(tmp_path: Path) -> None:
    """Also where they have the same shapes."""
    bank, timeline = keepers(sharded(nn.Linear(4, 4)))
    torch.save(bank.state_dict(), tmp_path / f"bank-{dist.get_rank()}.pt")
    timeline.save(tmp_path / f"timeline-{dist.get_rank()}.pt")
    dist.barrier()
    theirs = 1 - dist.get_rank()
    state = torch.load(tmp_path / f"bank-{theirs}.pt", weights_only=True)
    with refused(f"'shard [{theirs}] of [Shard(dim=0)] over ranks [0, 1]'"):
        bank.load_state_dict(state)
    with refused("the saved averages are of another network: [('bias', (2, 'shard"):
        Timeline.load(tmp_path / f"timeline-{theirs}.pt", bank._vector.module)


def spread(network: nn.Module) -> nn.Module:
    """The network on DTensors without FSDP, as tensor parallelism has it."""
    for name, parameter in network.named_parameters():
        shards = distribute_tensor(parameter.detach(), mesh(), [Shard(0)], src_data_rank=None)
        network.register_parameter(name, nn.Parameter(shards))
    return network


@pytest.mark.parametrize("wrap", [sharded, spread])
@on_both_ranks
def test_a_rank_without_any_weight_goes_along(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network, twin = (wrap(nn.Linear(3, 1, bias=False)) for _ in range(2))
    target = TargetNetwork(network, target=twin)
    bank, timeline = keepers(network)
    for i in range(40):
        step(network, i)
        for move in (target.update, bank.update, timeline.record):
            move()
    again, _ = keepers(network)
    again.load_state_dict(saved(bank.state_dict()))
    assert_equal(again.average("ema"), bank.average("ema"))
    with again.applied("ema"):
        AverageBank(twin, RULES).update()  # other weights are free
    compensated = AverageBank(network, RULES, compensated=True)
    compensated.load_state_dict(saved(compensated.state_dict()))
    assert timeline.average(HALF)["weight"].shape == ((1, 3), (0, 3))[dist.get_rank()]
    assert target.lag().isfinite()


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["modules", "mappings", "sequences"])
@on_both_ranks
def test_a_plain_and_a_sharded_network_are_refused_by_name(kind: str) -> None:
    both = Network(0), sharded(Network(1))
    for target, online in (both, both[::-1]):
        only = "online" if target is both[0] else "target"
        name, ours, theirs = "first.weight", target, online
        if kind == "mappings":
            ours, theirs = target.state_dict(), online.state_dict()
        elif kind == "sequences":
            name, ours, theirs = "[0]", [*target.parameters()], [*online.parameters()]
        sentence = f"'{name}' must be sharded in both networks or in neither, got it sharded in "
        with refused(sentence + only, target, online):
            soft_update(ours, theirs)
        with refused("must be sharded in both networks or in neither", target, online):
            TargetNetwork(online, target=target)


@on_both_ranks
def test_an_average_of_shards_does_not_go_into_a_plain_network() -> None:
    other = Network(1)
    bank, _ = keepers(sharded(Network(0)))
    with refused("'first.weight' must be sharded in both networks or in neither", other):
        bank.copy_to("ema", other)


@on_both_ranks
def test_other_placements_and_other_meshes_are_refused_by_name() -> None:
    def split(placement: Any, over: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
        tensor = torch.ones(4, 4)
        shards = distribute_tensor(tensor, mesh(over), [placement], src_data_rank=None)
        return {"ok": torch.zeros(1), "w": shards}

    target = split(Shard(0))
    for other, what in (
        (split(Shard(1)), "[Shard(dim=1)] over ranks [0, 1]"),
        (split(Replicate()), "[Replicate()] over ranks [0, 1]"),
        (split(Shard(0), (1, 0)), "[Shard(dim=0)] over ranks [1, 0]"),
    ):
        other["ok"] += 1
        with refused(
            "'w' must be sharded alike in both networks, got [Shard(dim=0)] over ranks [0, 1] in "
            f"target and {what} in online"
        ):
            soft_update(target, other)
        assert target["ok"].item() == 0
    same = split(Shard(0))
    same["w"] *= 3
    with silent():
        hard_update(target, same)
    assert local(target["w"]).tolist() == [[3.0] * 4] * 2
    with refused("over ranks [0, 1] in target and [Shard(dim=0)] over ranks [1, 0] in online"):
        TargetNetwork(sharded(Network(), (1, 0)), target=sharded(Network()))


@on_both_ranks
def test_shards_that_a_module_around_them_gathered_are_refused() -> None:
    online, twin = (sharded(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))) for _ in range(2))
    target = TargetNetwork(online[0], target=twin[0])
    bank = AverageBank(online[0], RULES)
    target.update()
    online(X)
    twin(X)
    for move in (target.update, bank.update):
        with refused("'weight' was sharded and is whole now: call reshard() on the module around"):
            move()
    online.reshard()
    twin.reshard()
    with silent():
        target.update()
        bank.update()


@on_both_ranks
def test_a_sharded_network_that_changes_is_noticed() -> None:
    online, twin = (sharded(nn.Sequential(nn.Linear(3, 3), nn.Tanh())) for _ in range(2))
    target = TargetNetwork(online, target=twin)
    state = {name: tensor.clone() for name, tensor in online.state_dict().items()}
    online.load_state_dict(state, assign=True)  # other tensors of equal values
    step(online, 0)
    with silent():
        target.update()
        target.sync()
    assert_equal(whole(twin), whole(online))
    online[1].register_parameter("new", nn.Parameter(torch.zeros(1)))  # where there was none
    with refused("target lacks '1.new'"):
        target.update()


# --------------------------------------------------------------------------- data parallel


@on_both_ranks
def test_data_parallel_networks_are_followed_without_communication() -> None:
    online = DistributedDataParallel(Network(dist.get_rank()), broadcast_buffers=False)
    target = TargetNetwork(online, tau=0.3)
    bank, timeline = keepers(online)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    for i in range(6):
        optimizer.zero_grad()
        online(X + dist.get_rank() + i).square().mean().backward()
        optimizer.step()
        with silent():
            target.update()
            bank.update()
            timeline.record()
    averages = {**dict(target.module.named_parameters()), **bank.average("ema")}
    averages["timeline"] = timeline.vector(HALF)
    for name, tensor in averages.items():
        theirs = tensor.detach().clone()
        dist.broadcast(theirs, src=0)
        assert torch.equal(tensor, theirs), name
    assert target.lag() > 0
