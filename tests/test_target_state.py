"""What a target network keeps: saved and loaded whole, copied, interrupted, and in odd modes."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import cloudpickle
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyak_rl import TargetNetwork, flatten_, soft_update, weighted_average
from polyak_rl.pairing import Pair
from polyak_rl.update import Plan, Terms


class Net(nn.Module):
    """Parameters, batch-norm statistics, a buffer that is not saved, and a tie."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("noise", torch.randn(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.body(x)))


class Agent(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, flat: bool = False):
        super().__init__()
        self.q = Net(seed).to(dtype)
        if flat:
            flatten_(self.q)
        self.target = TargetNetwork(self.q, 0.25, every=2)

    def run(self, steps: int, seed: int = 7) -> None:
        torch.manual_seed(seed)
        for _ in range(steps):
            with torch.no_grad():
                for tensor in (*self.q.parameters(), *self.q.buffers()):
                    if tensor.is_floating_point():
                        tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))
            self.target.update()


def values(network: nn.Module) -> dict[str, Any]:
    """Every number of a network, and of its target."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        **{name: tensor.detach().double().tolist() for name, tensor in tensors.items()},
        **{name: tensor.double().tolist() for name, tensor in network.state_dict().items()},
    }


KINDS = pytest.mark.parametrize(
    ("dtype", "flat"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)


# ------------------------------------------------------------------- plain state dicts


def owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The line that is documented for formats that want tensors with memory of their own."""
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}


@KINDS
def test_the_state_of_an_agent_is_tensors_and_loads_from_tensors_of_their_own(
    dtype: torch.dtype, flat: bool
) -> None:
    agent, other = Agent(0, dtype, flat), Agent(1, dtype, flat)
    agent.run(5)
    state = owned(agent.state_dict())
    storages = {x.untyped_storage().data_ptr() for x in state.values()}
    assert len(storages) == len(state)
    assert all(
        x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes() for x in state.values()
    )
    other.load_state_dict(state)
    assert other.target.clock == 5
    for one in (agent, other):
        one.q.noise.zero_()
        one.run(5)
    assert values(other) == values(agent)


def test_safetensors_keep_an_agent(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    agent, other = Agent(0, flat=True), Agent(1, flat=True)
    agent.run(5)
    safetensors.save_file(owned(agent.state_dict()), tmp_path / "agent.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "agent.safetensors"))
    assert other.state_dict().keys() == agent.state_dict().keys()
    assert all(map(torch.equal, other.state_dict().values(), agent.state_dict().values()))


def test_agents_and_their_states_are_averaged_with_their_clocks_left_alone() -> None:
    one, two = Agent(0), Agent(1)
    one.run(3)
    two.run(6)
    expected = {
        name: a.lerp(b, 0.5) if a.is_floating_point() else a
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True)
    }
    for pair in ([one, two], [one.state_dict(), two], [one, two.state_dict()]):
        average = weighted_average(pair, [0.5, 0.5])
        assert average.keys() == expected.keys()
        for name, tensor in average.items():
            torch.testing.assert_close(tensor, expected[name])
    assert average["target.clock"].item() == 3
    Agent(2).load_state_dict(average)


def test_a_state_follows_a_state_and_a_module_the_state_of_another() -> None:
    one, two = Agent(0), Agent(1)
    two.run(6)
    state = owned(one.state_dict())
    soft_update(state, two.state_dict(), 1.0)
    assert state["target.clock"].item() == 6
    assert torch.equal(state["target.module.head.weight"], two.target.module.head.weight)
    for p in one.parameters():
        p.requires_grad_(False)
    soft_update(one, two.state_dict(), 1.0)
    assert torch.equal(one.q.head.weight, two.q.head.weight)
    assert one.target.clock == 0  # a clock is no weight of a module
    soft_update(state, one, 1.0)
    assert state["target.clock"].item() == 6


def test_the_state_of_older_checkpoints_loads() -> None:
    agent = Agent(0, torch.bfloat16)
    agent.run(5)
    state = dict(agent.state_dict())
    masters = {n[15:]: state.pop(n) for n in [*state] if n.startswith("target.masters.")}
    clock, skipped = state.pop("target.clock").item(), state.pop("target.skipped").item()
    state["target._extra_state"] = {"clock": clock, "skipped": skipped, "masters": masters}
    other = Agent(1, torch.bfloat16)
    other.load_state_dict(state)
    assert other.state_dict().keys() == agent.state_dict().keys()
    assert all(map(torch.equal, other.state_dict().values(), agent.state_dict().values()))


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a negative clock": (lambda s: s.update(clock=torch.tensor(-1)), "clock must be a whole"),
    "half a step": (lambda s: s.update(clock=torch.tensor(1.5)), "clock must be a whole"),
    "a huge clock": (lambda s: s.update(clock=2**70), "clock must be a whole"),
    "a clock of two": (lambda s: s.update(clock=torch.tensor([1, 2])), "clock must be a whole"),
    "a clock in words": (lambda s: s.update(clock="five"), "clock must be a whole"),
    "skipped is no count": (lambda s: s.update(skipped=True), "skipped must be a whole"),
    "no clock": (lambda s: s.pop("clock"), r"it lacks \['clock'\]"),
    "no weight": (lambda s: s.pop("module.head.weight"), r"it lacks \['module.head.weight'\]"),
    "one more": (lambda s: s.update(x=torch.ones(1)), r"has \['x'\] beside"),
    "a shape": (
        lambda s: s.update({"module.head.bias": torch.ones(5)}),
        r"'module.head.bias' must have the shape \(4,\), got \(5,\)",
    ),
    "a weight that is none": (
        lambda s: s.update({"module.head.bias": 1.0}),
        "'module.head.bias' must be a tensor, got float",
    ),
    "a master too few": (lambda s: s.pop("masters.head.bias"), "the saved masters .* do not fit"),
    "a master of another shape": (
        lambda s: s.update({"masters.head.bias": torch.ones(1)}),
        r"'masters.head.bias' must have the shape \(4,\), got \(1,\)",
    ),
    "a master that is none": (
        lambda s: s.update({"masters.head.bias": 1}),
        "'masters.head.bias' must be a tensor, got int",
    ),
    **{
        f"{what} in {name}": (
            lambda s, name=name, x=x: s.update({name: x}),
            f"'{name}' must be dense and torch",
        )
        for name in ("module.head.bias", "masters.head.bias")
        for what, x in {
            "nothing but zeros kept": torch.zeros(4).to_sparse(),
            "no values": torch.zeros(4, device="meta"),
            "complex numbers": torch.ones(4, dtype=torch.complex64),
        }.items()
    },
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_a_state_that_does_not_fit_is_refused_whole(
    spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    agent, other = Agent(0, torch.bfloat16), Agent(1, torch.bfloat16)
    for one in (agent, other):
        one.run(3)
    state = dict(agent.target.state_dict())
    spoil(state)
    before = values(other)
    with pytest.raises(ValueError, match=message):
        other.target.load_state_dict(state)
    assert values(other) == before
    other.run(2)
    twin = Agent(1, torch.bfloat16)
    twin.run(3)
    twin.run(2)
    assert values(other) == values(twin)


# -------------------------------------------------------------------------- round trips


def saved(agent: Any) -> Any:
    file = io.BytesIO()
    torch.save(agent, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _echo(queue: Any, back: Any) -> None:
    agent = queue.get()
    agent.run(4)
    back.put(pickle.dumps(values(agent)))


ROUND_TRIPS = {
    "pickle": lambda agent: pickle.loads(pickle.dumps(agent)),
    "cloudpickle": lambda agent: pickle.loads(cloudpickle.dumps(agent)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
}


@KINDS
@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_a_target_that_was_packed_goes_on_as_the_original_does(
    trip: Callable[[Agent], Agent], dtype: torch.dtype, flat: bool
) -> None:
    agent = Agent(0, dtype, flat)
    agent.run(3)
    twin = trip(agent)
    assert twin.target.online is twin.q
    for one in (agent, twin):
        one.run(4)
    assert values(twin) == values(agent)
    assert twin.target.clock == 7


def test_a_target_is_packed_also_where_its_network_points_back_at_it() -> None:
    agent = Agent(0)
    agent.q.__dict__["owner"] = agent
    twin = pickle.loads(pickle.dumps(agent.q))
    assert twin.owner.target.online is twin
    for one in (agent, twin.owner):
        one.run(2)
    assert values(twin.owner) == values(agent)


def test_a_target_goes_on_in_another_process_and_in_this_one() -> None:
    agent, twin = Agent(0, flat=True), Agent(0, flat=True)
    context = mp.get_context("spawn")
    there, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=_echo, args=(there, back))
    process.start()
    there.put(agent)
    theirs = pickle.loads(back.get())
    process.join()
    twin.run(4)
    assert theirs == values(twin)
    clock = agent.target.clock
    agent.run(1)  # on memory that torch has moved to where both processes reach it
    assert agent.target.clock == clock + 1


def test_a_flat_network_whose_memory_is_shared_stays_flat() -> None:
    q = Net(0)
    flat = flatten_(q)
    optimizer = torch.optim.SGD(flat.parameters, 0.1)
    q.share_memory()
    q(torch.randn(5, 3)).sum().backward()
    before = q.head.bias.clone()
    optimizer.step()
    assert flat.intact()
    assert not torch.equal(q.head.bias, before)


# --------------------------------------------------------------------------- interrupts


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """KeyboardInterrupt at the n-th line that the library runs inside; how many it ran."""
    ran = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if "polyak_rl" not in frame.f_code.co_filename:
            return None
        if event == "line":
            ran[0] += 1
            if ran[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def lines_of(make: Callable[[], Any], act: Callable[[Any], object]) -> int:
    subject = make()
    with interrupted_at(0) as ran:
        act(subject)
    return ran[0]


INTERRUPTED: dict[str, Callable[[Agent], object]] = {
    "update": lambda agent: agent.target.update(),
    "sync": lambda agent: agent.target.sync(),
    "tau": lambda agent: setattr(agent.target, "tau", 0.75),
    "taus": lambda agent: setattr(agent.target, "tau", {"*": 0.5}),
    "soft_update": lambda agent: soft_update(agent.plain, agent.q, 0.5),
}


@pytest.mark.parametrize(
    ("dtype", "flat", "fresh"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, False, False)],
)
@pytest.mark.parametrize("act", INTERRUPTED.values(), ids=INTERRUPTED.keys())
def test_an_interrupt_at_any_line_leaves_all_of_an_update_or_nothing(
    act: Callable[[Agent], object], fresh: bool, dtype: torch.dtype, flat: bool
) -> None:
    def make() -> Agent:
        agent = Agent(0, dtype, flat)
        agent.plain = Net(5)
        agent.run(3)
        agent.head = nn.Identity()
        agent.q.head.bias.data.fill_(0.5)
        if fresh:  # what was planned no longer holds
            agent.q.head.bias = nn.Parameter(torch.full((4,), 3.0, dtype=dtype))
        return agent

    def after(agent: Agent) -> Any:
        return values(agent), agent.target.tau, agent.target.clock

    undone, done = make(), make()
    act(done)
    allowed, goes_on = [after(undone), after(done)], []
    for one in (undone, done):
        one.run(2)
        goes_on.append(after(one))
    total = lines_of(make, act)
    assert total > 3
    stride = max(1, total // 20)  # all of a short way, and of a long one a part with its end
    for line in (*range(1, total - 10, stride), *range(max(1, total - 10), total + 1)):
        agent = make()
        with interrupted_at(line):
            act(agent)
        state = after(agent)
        assert state in allowed, line
        agent.run(2)
        assert after(agent) == goes_on[allowed.index(state)], line


def test_a_refused_update_counts_nothing_and_the_next_one_goes_on() -> None:
    agent, twin = Agent(0), Agent(0)
    bias, agent.q.head.bias = agent.q.head.bias, None
    before = values(agent.target)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"online lacks 'head\.bias'"):
            agent.target.sync()
    assert values(agent.target) == before
    agent.q.head.bias = bias
    for one in (agent, twin):
        one.run(5)
    assert values(agent.target) == values(twin.target)


# -------------------------------------------------------------------- the caller's modes


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@KINDS
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_target_does_not_follow_the_modes_of_its_caller(
    mode: Callable[[], Any], dtype: torch.dtype, flat: bool
) -> None:
    def run(inside: bool) -> tuple[Any, ...]:
        around = mode if inside else torch.enable_grad
        q, plain = Net(0).to(dtype), Net(5).to(torch.float32)
        with around():
            if flat:
                flatten_(q)
            target = TargetNetwork(q, {"*": 0.25})
            target.tau = 0.25
            target.update()
            soft_update(plain, q, 0.5)
        with torch.no_grad():
            for p in q.parameters():
                p.add_(1.0)
        target.update()  # outside, what was made inside
        soft_update(plain, q, 0.5)
        with around():
            target.update()
            soft_update(plain, q, 0.5)
            lag = target.lag()
            average = weighted_average([q, plain], [0.25, 0.75])
            state = copy.deepcopy(target.state_dict())
        target.load_state_dict(state)
        target.update()
        kinds = [x.dtype for x in (*target.state_dict().values(), *average.values(), lag)]
        numbers = [values(target), values(plain), lag.item()]
        return kinds, numbers, [x.double().tolist() for x in average.values()]

    assert run(True) == run(False)


def test_a_network_that_was_laid_flat_under_inference_mode_trains() -> None:
    q = Net(0)
    with torch.inference_mode():
        flat = flatten_(q)
    q(torch.randn(5, 3)).sum().backward()
    torch.optim.SGD(flat.parameters, 0.1).step()
    assert not q.head.bias.is_inference()


# ----------------------------------------------------------------------------- captures


def test_what_a_graph_would_not_repeat_is_refused_while_it_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every, guarded, plain = (
        TargetNetwork(Net(0), every=4),
        TargetNetwork(Net(0), guard="finite"),
        TargetNetwork(Net(0)),
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for target, found in ((every, "every=4 and guard=None"), (guarded, "every=1 and guard='fin")):
        with pytest.raises(RuntimeError, match=f"captured .* every=1 and guard=None, got {found}"):
            target.update()
        assert target.clock == 0
    plain.update()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    every.update()
    assert every.clock == plain.clock == 1


# ----------------------------------------------------------------------------- launches


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is sent to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_tensor_tau_of_many_tensors_is_two_launches_on_a_device() -> None:
    pairs = [
        Pair(str(i), torch.empty(3, i, device="meta"), torch.empty(3, i, device="meta"), False)
        for i in range(2, 9)
    ]
    terms = {pair.name: Terms("average", None) for pair in pairs}
    plan = Plan(pairs, torch.empty((), device="meta"), terms)
    with Count() as count:
        plan.apply()
    assert count.names == ["aten::copy_", "aten::_foreach_lerp_.List"]


# -------------------------------------------------------------------------- odd modules

sizes = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0), (3, 1, 2)])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.bfloat16])
members = st.lists(
    st.tuples(sizes, dtypes, st.sampled_from(["parameter", "frozen", "buffer", "unsaved"])),
    min_size=1,
    max_size=5,
)


def odd(shape: list[Any], seed: int, tie: bool, transpose: bool) -> nn.Module:
    """A module of what a network may hold: empty, complex, tied, transposed, of any dtype."""
    torch.manual_seed(seed)
    module, child = nn.Module(), nn.Module()
    for i, (size, dtype, role) in enumerate(shape):
        tensor = torch.randn(size, dtype=torch.float64).to(dtype)
        tensor = tensor.mT.contiguous().mT if transpose and tensor.dim() > 1 else tensor
        home = child if i % 2 else module
        if role in ("parameter", "frozen"):
            home.register_parameter(f"x{i}", nn.Parameter(tensor, role == "parameter"))
        else:
            home.register_buffer(f"x{i}", tensor, persistent=role == "buffer")
    if tie and (first := next(iter(module._parameters.values()), None)) is not None:
        child.register_parameter("tied", first)
    module.register_buffer("count", torch.tensor(seed))
    module.add_module("child", child)
    return module


@settings(deadline=None, max_examples=60)
@given(shape=members, tie=st.booleans(), transpose=st.booleans(), tau=st.floats(0, 1))
def test_an_odd_module_is_followed_packed_saved_and_followed_again(
    shape: list[Any], tie: bool, transpose: bool, tau: float
) -> None:
    online = odd(shape, 1, tie, transpose)
    target = TargetNetwork(online, tau)
    start = {name: p.detach().clone() for name, p in target.module.named_parameters()}
    online.load_state_dict(odd(shape, 2, tie, transpose).state_dict())
    pair = nn.ModuleDict({"online": online, "target": target})
    twin = pickle.loads(pickle.dumps(pair))
    fresh = odd(shape, 1, tie, transpose)
    loaded = TargetNetwork(fresh, tau)
    fresh.load_state_dict(online.state_dict())
    loaded.load_state_dict(owned(target.state_dict()))
    for one in (target, twin["target"], loaded):
        one.update()
        for name, p in one.module.named_parameters():
            wide = torch.complex128 if p.is_complex() else torch.float64
            a, b = start[name].to(wide), online.get_parameter(name).detach().to(wide)
            close = 1e-2 if p.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(p.to(wide), a + tau * (b - a), rtol=close, atol=close)
        assert one.clock == 1
        assert one.module.get_buffer("count").item() == 2
        assert not any(p.requires_grad for p in one.parameters())
