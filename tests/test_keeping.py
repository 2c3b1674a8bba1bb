"""What keeps averages, over odd modules, copies, damaged states and the caller's modes."""

import copy
import io
import multiprocessing
import pickle
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from polyak_rl import (
    AverageBank,
    Ema,
    PolicyAverages,
    Tail,
    Timeline,
    Uniform,
    Window,
    flatten_,
    weighted_average,
)
from polyak_rl.pairing import walk
from polyak_rl.vector import WeightVector
from tests.interrupts import interrupted_at
from tests.odd_modules import Odd, odd_plans, walk_randomly

RULES = {"uniform": Uniform(), "ema": Ema(tau=0.2), "lawa": Window(3, 2), "half": Tail(0.5)}
PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def keeper(kind, module):
    if kind == "bank":
        bank = AverageBank(module, {name: RULES[name] for name in ("uniform", "ema", "lawa")})
        return bank, bank.update, "lawa"
    if kind == "compensated":
        bank = AverageBank(module, {"ema": RULES["ema"]}, compensated=True)
        return bank, bank.update, "ema"
    if kind == "timeline":
        timeline = Timeline(module, capacity=4, max_weight_error=1.0)
        return timeline, timeline.record, Tail(0.5)
    averages = PolicyAverages(module, RULES, capacity=4, max_weight_error=1.0)
    return averages, averages.record, "half"


KEEPERS = pytest.mark.parametrize("kind", ["bank", "compensated", "timeline", "averages"])


def exact(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@PROPERTY
@given(
    plan=odd_plans, buffers=st.sampled_from(["copy", "average", "keep"]), steps=st.integers(1, 9)
)
def test_averages_of_odd_modules_are_the_means_of_their_tensors(plan, buffers, steps):
    module, generator = Odd(plan), torch.Generator().manual_seed(1)
    averages = PolicyAverages(module, RULES, buffers=buffers, capacity=20)
    iterates = []
    for _ in range(steps):
        walk_randomly(module, generator)
        averages.record()
        iterates.append(
            {entry.name: exact(entry.tensor.detach()).clone() for entry in walk(module)}
        )
    before = {entry.name: entry.tensor.detach().clone() for entry in walk(module)}
    for which, rule in RULES.items():
        average = averages.average(which)
        for name, tensor in average.items():
            weighted = zip(rule.weights(steps), iterates, strict=True)
            mean = sum(weight * iterate[name] for weight, iterate in weighted)
            torch.testing.assert_close(exact(tensor), mean, rtol=1e-12, atol=1e-12)
            assert tensor.is_contiguous()
        with averages.applied(which):
            for entry in walk(module):
                held = average.get(entry.name, entry.tensor)
                assert torch.equal(entry.tensor, held.to(entry.tensor.dtype))
        twin = averages.module(which)
        for entry in walk(twin):
            if entry.name in average:
                assert torch.equal(entry.tensor, average[entry.name].to(entry.tensor.dtype))
    for entry in walk(module):
        assert torch.equal(entry.tensor, before[entry.name])


@PROPERTY
@given(plan=odd_plans)
def test_averages_of_odd_modules_survive_their_state(plan):
    module, generator = Odd(plan), torch.Generator().manual_seed(1)
    averages = PolicyAverages(module, RULES, capacity=4, max_weight_error=1.0)
    for _ in range(7):
        walk_randomly(module, generator)
        averages.record()
    loaded = PolicyAverages(module, RULES, capacity=4, max_weight_error=1.0)
    loaded.load_state_dict(averages.state_dict())
    for each in range(6):
        walk_randomly(module, generator)
        averages.record()
        loaded.record()
        for which in RULES:
            assert torch.equal(averages.vector(which), loaded.vector(which)), each


def test_complex_parameters_are_averaged_in_both_parts():
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([1 + 1j, 2 - 3j]))
    averages = PolicyAverages(module, RULES)
    averages.record()
    with torch.no_grad():
        module.weight.mul_(3)
    averages.record()
    assert averages.average("uniform")["weight"].tolist() == [2 + 2j, 4 - 6j]
    assert averages.distances()["uniform"].item() == pytest.approx(1 / 3)


def through_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_cloudpickle(thing):
    cloudpickle = pytest.importorskip("cloudpickle")
    return cloudpickle.loads(cloudpickle.dumps(thing))


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@KEEPERS
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("steps", [0, 5, 40])
@pytest.mark.parametrize(
    "copied", [through_pickle, through_cloudpickle, through_torch, copy.deepcopy]
)
def test_a_copy_goes_on_as_the_original_does(kind, flat, steps, copied):
    module = network()
    if flat:
        flatten_(module)
    original, record, which = keeper(kind, module)
    generator = torch.Generator().manual_seed(1)

    def train(module, record, steps):
        for _ in range(steps):
            walk_randomly(module, generator)
            record()

    train(module, record, steps)
    twin = copied({"net": module, "keeper": original})
    again = twin["keeper"].update if hasattr(original, "update") else twin["keeper"].record
    state = generator.get_state()
    train(module, record, 9)
    generator.set_state(state)
    train(twin["net"], again, 9)
    for (name, ours), theirs in zip(
        original.average(which).items(), twin["keeper"].average(which).values(), strict=True
    ):
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12, msg=name)


@KEEPERS
def test_a_copy_loads_a_state_before_anything_else(kind):
    original, record, which = keeper(kind, network())
    record()
    twin = through_pickle(original)
    twin.load_state_dict(original.state_dict())
    assert torch.equal(twin.vector(which), original.vector(which))


def test_a_copied_vector_reads_the_copied_network():
    twin_net, twin = through_pickle((net := network(), WeightVector(net)))
    with torch.no_grad():
        twin_net[0].weight.fill_(7.0)
    assert twin.named(twin.now())["0.weight"].eq(7.0).all()
    assert twin.module is twin_net


def _go_on(averages, queue):
    nn.init.constant_(averages.network.weight, 8.0)
    averages.record()
    queue.put(averages.average("half")["weight"].item())


def test_averages_go_on_in_another_process():
    policy = nn.Linear(1, 1, bias=False)
    averages = PolicyAverages(policy, {"half": Tail(0.5)})
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(policy.weight, value)
        averages.record()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_go_on, args=(averages, queue))
    process.start()
    assert queue.get(timeout=120) == 7.0
    process.join()


def _paths(state, prefix=()):
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*prefix, key))


def plain(state):
    """A state as values that ``==`` compares."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), state.tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list) else state


def _mutate(state, path, how):
    for key in path[:-1]:
        state = state[key]
    key, old = path[-1], state[path[-1]]
    tensor = isinstance(old, torch.Tensor)
    if how == "gone":
        del state[key]
    elif how == "nan":
        state[key] = torch.full_like(old, float("nan")) if tensor else float("nan")
    elif how == "cut":
        state[key] = old[:-1] if (tensor and old.dim()) or isinstance(old, list | str) else -1
    elif how == "complex":
        state[key] = old.to(torch.complex64) if tensor else 2**70
    elif how == "fraction":
        state[key] = old.long() if tensor else 0.5
    else:
        state[key] = how


@pytest.mark.parametrize(
    "how", ["gone", "nan", "cut", "complex", "fraction", None, -1, "x", [], {}, b"", True]
)
@KEEPERS
def test_a_damaged_state_is_a_value_error_and_nothing_is_loaded(kind, how):
    def new(steps):
        module = network()
        made, record, _ = keeper(kind, module)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            walk_randomly(module, generator)
            record()
        return made

    good = new(11).state_dict()
    victim = new(5)
    start = victim.state_dict()
    before = plain(start)
    refused = 0
    for path in list(_paths(good)):
        state = copy.deepcopy(good)
        _mutate(state, path, how)
        try:
            victim.load_state_dict(state)
        except ValueError:
            refused += 1
            assert plain(victim.state_dict()) == before, path
        else:  # it was a state all the same
            victim.load_state_dict(start)
    assert refused > 10


def test_a_capture_that_would_record_nothing_is_refused(monkeypatch):
    module = network()
    recorders = [keeper(kind, module)[1] for kind in ("bank", "timeline", "averages")]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for record in recorders:
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            record()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for record in recorders:
        record()


@contextmanager
def switched(get, switch, value):
    """One of torch's global switches."""
    before = get()
    switch(value)
    try:
        yield
    finally:
        switch(before)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        lambda: switched(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
        ),
        lambda: switched(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
        ),
        torch.inference_mode,
        lambda: torch.device("meta"),
        torch.enable_grad,
    ],
    ids=["autocast", "dtype", "precision", "deterministic", "inference", "device", "grad"],
)
@KEEPERS
def test_the_callers_modes_change_no_bit(kind, mode):
    def run(within):
        module, generator = network(), torch.Generator().manual_seed(1)
        with within():
            made, record, which = keeper(kind, module)
        for step in range(70):
            walk_randomly(module, generator)
            if step % 3:
                record()
            else:
                with within():
                    record()
        with within():
            vector = made.vector(which)
            own = module[0].weight.detach().clone()
            with made.applied(which):
                assert not torch.equal(module[0].weight, own)
            assert torch.equal(module[0].weight, own)
            twin = made.module(which)
        made.load_state_dict(made.state_dict())
        twin[0].weight.sum().backward()
        return vector

    assert torch.equal(run(mode), run(torch.no_grad))


@pytest.mark.parametrize("kind", ["bank", "timeline", "averages"])
def test_an_interrupted_load_leaves_the_old_state_or_the_new(kind):
    module = network()
    there, record, _ = keeper(kind, module)
    for _ in range(7):
        record()
    state, new = there.state_dict(), plain(there.state_dict())
    here, record, _ = keeper(kind, module)
    record()
    start, old = here.state_dict(), plain(here.state_dict())
    n = 1
    while interrupted_at(n, lambda: here.load_state_dict(state)):
        assert plain(here.state_dict()) in (old, new), n
        here.load_state_dict(start)
        n += 1
    assert n > 100
    assert plain(here.state_dict()) == new


def test_what_is_read_in_inference_mode_is_of_use_outside():
    module = network()
    averages = PolicyAverages(module, {"uniform": Uniform()})
    averages.record()
    with torch.inference_mode():
        read = [
            averages.last(),
            averages.average("last"),
            averages.average("uniform"),
            weighted_average([module], [1.0]),
            {"vector": averages.vector("last")},
        ]
    assert not any(tensor.is_inference() for tensors in read for tensor in tensors.values())


def test_an_average_is_plain_tensors_for_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    module = network()
    module[0].weight.data = module[0].weight.data.t().contiguous().t()
    averages = PolicyAverages(module, {"uniform": Uniform()})
    averages.record()
    for tensors in (averages.last(), weighted_average([module, module], [0.5, 0.5])):
        safetensors.save_file(tensors, tmp_path / "last.safetensors")
        for name, tensor in safetensors.load_file(tmp_path / "last.safetensors").items():
            assert torch.equal(tensor, module.get_parameter(name))
    safetensors.save_file(averages.average("uniform"), tmp_path / "uniform.safetensors")
    loaded = safetensors.load_file(tmp_path / "uniform.safetensors")
    twin = network()
    twin.load_state_dict(loaded, strict=False)
    assert all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), module.parameters(), strict=True)
    )


def test_networks_that_cannot_be_averaged_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="'weight' is not initialised yet: run one batch"):
        AverageBank(nn.LazyLinear(2), {"uniform": Uniform()})
    with pytest.warns(DeprecationWarning, match="jit"):
        script = torch.jit.script(nn.Linear(1, 1))
    for build in (lambda m: AverageBank(m, {"uniform": Uniform()}), Timeline):
        with pytest.raises(ValueError, match="TorchScript networks cannot be averaged"):
            build(script)


def test_a_kept_buffer_may_grow_late():
    def new():
        module = network()
        module.register_buffer("seen", None)
        return module

    module = new()
    averages = PolicyAverages(module, {"uniform": Uniform()}, buffers={"seen": "keep"})
    averages.record()
    for size in (2, 5):
        module.seen = torch.ones(size)
        averages.record()
    other = new()
    averages.copy_to("uniform", other)
    assert other.seen is None
    averages.copy_to("uniform", module)  # onto the network itself
    assert module.seen.shape == (5,)
