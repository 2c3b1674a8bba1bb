"""Target networks: worked numbers, a slow oracle, both ends exact, and every known fault."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyak_rl import TargetNetwork, flatten_, hard_update, soft_update, weighted_average
from tests.pretended_cuda import SYNC_WARNING


def mlp(seed: int = 0, hidden: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2))


def scalar(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A network of one number."""
    network = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(network.weight, value)
    return network


def norm(seed: int = 0) -> nn.BatchNorm1d:
    """Float and integer buffers, persistent and not."""
    torch.manual_seed(seed)
    network = nn.BatchNorm1d(2)
    network.register_buffer("table", torch.randn(3), persistent=False)
    network.running_mean.normal_()
    network.num_batches_tracked.fill_(seed)
    return network


class Agent(nn.Module):
    """An encoder that actor and target share."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def bits(network: nn.Module) -> dict[str, Any]:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {
        n: (t.dtype, t.detach().cpu().view(torch.uint8).tolist())
        if t.dim()
        else (t.dtype, t.detach().cpu().reshape(1).view(torch.uint8).tolist())
        for n, t in tensors
    }


def fill(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(value)


def step(network: nn.Module) -> None:
    """What an optimizer does: other weights in the same memory."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))


def oracle(target: nn.Module, online: nn.Module, tau: float) -> dict[str, Tensor]:
    """theta' <- tau theta + (1 - tau) theta', slowly and in float64, by name."""
    onlines = dict(online.named_parameters())
    return {
        name: tau * onlines[name].detach().double() + (1 - tau) * p.detach().double()
        for name, p in target.named_parameters()
    }


@contextmanager
def refused(
    message: str, *untouched: nn.Module, error: type[Exception] = ValueError
) -> Iterator[None]:
    """The block raises, the text matches, and no bit of the networks has changed."""
    before = [bits(network) for network in untouched]
    with pytest.raises(error, match=message):
        yield
    assert [bits(network) for network in untouched] == before


# -------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("how", ["modules", "mappings", "sequences", "TargetNetwork"])
def test_three_updates_worked_by_hand(how: str) -> None:
    online, target = scalar(1.0), scalar(0.5)
    tracker = TargetNetwork(online, tau=0.1)
    if how == "TargetNetwork":
        fill(tracker.module, 0.5)
        target = tracker.module
    seen = []
    for _ in range(3):
        if how == "modules":
            soft_update(target, online, 0.1)
        elif how == "mappings":
            soft_update(dict(target.named_parameters()), dict(online.named_parameters()), 0.1)
        elif how == "sequences":
            soft_update(target.parameters(), online.parameters(), 0.1)
        else:
            tracker.update()
        seen.append(target.weight.item())
    assert seen == pytest.approx([0.55, 0.595, 0.6355], abs=1e-7)
    assert online.weight.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("tau", [0.001, 0.005, 0.3, 0.999])
def test_soft_update_equals_the_oracle(dtype: torch.dtype, tau: float) -> None:
    online = nn.ParameterDict({"w": torch.randn(7, 3, dtype=dtype)})
    target = nn.ParameterDict({"w": torch.randn(7, 3, dtype=dtype)})
    exact = tau * online["w"].to(torch.complex128) + (1 - tau) * target["w"].to(torch.complex128)
    before = bits(online)
    soft_update(target, online, tau)
    torch.testing.assert_close(target["w"].to(torch.complex128), exact, rtol=1e-6, atol=1e-6)
    assert bits(online) == before


def test_tau_0_leaves_every_bit_of_the_parameters() -> None:
    target, online = mlp(), mlp(1)
    fill(online, math.nan)
    before = bits(target)
    soft_update(target, online, 0.0)
    assert bits(target) == before


@pytest.mark.parametrize("flat", [False, True])
def test_tau_1_copies_every_bit_and_heals_nan(flat: bool) -> None:
    target, online = mlp(), mlp(1)
    fill(target, math.nan)
    fill(target[2], math.inf)
    with torch.no_grad():
        online[0].weight[0, 0] = -0.0
    if flat:
        flatten_(target)
        flatten_(online)
    soft_update(target, online, 1)
    assert bits(target) == bits(online)
    hard_update(target, mlp(2))
    assert bits(target) == bits(mlp(2))


def test_a_target_that_equals_its_online_network_does_not_move() -> None:
    online = mlp(hidden=64)
    target = copy.deepcopy(online)
    for _ in range(3):
        soft_update(target, online, 0.005)
    assert bits(target) == bits(online)


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan, math.inf, True, "0.1", None])
def test_a_tau_outside_0_to_1_is_refused(tau: Any) -> None:
    target, online = mlp(), mlp(1)
    for update in (
        lambda: soft_update(target, online, tau),
        lambda: soft_update(target, online, {"*": tau}),
        lambda: TargetNetwork(online, tau, target=target),
    ):
        with refused(r"tau must be in \[0, 1\], got ", target, online):
            update()
    soft_update(target, online)
    with refused(r"tau must be in \[0, 1\], got ", target, online):  # also where the match is known
        soft_update(target, online, tau)


def test_numbers_of_numpy_are_numbers() -> None:
    target, online = scalar(0.0), scalar(1.0)
    soft_update(target, online, np.float32(0.5))
    assert target.weight.item() == 0.5


names = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True)
trees = st.recursive(
    st.just(0),
    lambda t: st.dictionaries(st.sampled_from("abcd"), t, min_size=1, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(tree=trees, tau=st.floats(0, 1), seed=st.integers(0, 99), data=st.data())
def test_random_trees_follow_by_name_whatever_the_order_of_registration(
    tree: Any, tau: float, seed: int, data: Any
) -> None:
    def build(node: Any, order: Callable[[list[str]], list[str]]) -> nn.Module:
        if not isinstance(node, dict):
            return nn.Linear(2, 2)
        module = nn.Module()
        for name in order(sorted(node)):
            module.add_module(name, build(node[name], order))
        return module

    torch.manual_seed(seed)
    target = build(tree, sorted)
    online = build(tree, lambda names: data.draw(st.permutations(names)))
    exact, before = oracle(target, online, tau), bits(online)
    soft_update(target, online, tau)
    assert bits(online) == before
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.double(), exact[name], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ tau by name and tensor


def test_of_several_tau_patterns_the_last_one_that_matches_counts() -> None:
    target, online = mlp(), mlp(1)
    fill(target, 0.0)
    fill(online, 1.0)
    soft_update(target, online, {"*": 0.5, "0.*": 0.25, "*.bias": 1.0})
    assert [round(p.mean().item(), 6) for p in target.parameters()] == [0.25, 1.0, 0.5, 1.0]
    soft_update(target, online, {"0.*": 0.25, "*": 0.0})
    assert target[0].weight[0, 0].item() == 0.25


@pytest.mark.parametrize("as_state", [False, True], ids=["modules", "mappings"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_a_pattern_are_exact_whatever_kind_of_number_they_are(
    as_state: bool, dtype: torch.dtype
) -> None:
    for one, zero in ((1, 0), (1.0, 0.0), (np.float64(1), np.float64(0))):
        target, online = scalar(math.nan, dtype), scalar(2.0, dtype)
        kept, infinite = scalar(3.0, dtype), scalar(math.inf, dtype)
        both = [target, online, kept, infinite]
        a, b, c, d = [n.state_dict() for n in both] if as_state else both
        soft_update(a, b, {"*": one})
        assert target.weight.item() == 2
        soft_update(c, d, {"*": zero})
        assert kept.weight.item() == 3


def test_the_order_and_the_values_of_tau_patterns_are_read_at_each_call() -> None:
    target, online = scalar(0.0), scalar(1.0)
    taus = {"*": 0.0, "weight": 0.5}
    soft_update(target, online, taus)
    assert target.weight.item() == 0.5
    soft_update(target, online, {"weight": 0.5, "*": 0.0})
    assert target.weight.item() == 0.5
    taus["weight"] = 1.0
    soft_update(target, online, taus)
    assert target.weight.item() == 1.0


def test_a_tensor_without_a_tau_and_a_tau_without_a_tensor_are_refused() -> None:
    target, online = mlp(), mlp(1)
    for update in (
        lambda taus: soft_update(target, online, taus),
        lambda taus: TargetNetwork(online, taus, target=target),
    ):
        with refused(r"no tau pattern matches '2.weight'; the patterns are \['0.\*'\]", target):
            update({"0.*": 0.5})
        with refused(r"tau pattern 'encoder.\*' matches no tensor; the names are '0.we", target):
            update({"*": 0.5, "encoder.*": 0.1})


def test_a_refused_tau_leaves_the_target_network_as_it_was() -> None:
    target = TargetNetwork(mlp(), 0.25)
    for tau in ({"nope": 0.5}, 2.0):
        with pytest.raises(ValueError, match="tau"):
            target.tau = tau
    assert target.tau == 0.25
    target.tau = {"*": 0.5}
    target.tau = 0.75
    fill(target.online, 1.0)
    fill(target.module, 0.0)
    target.update()
    assert target.module[0].weight[0, 0].item() == 0.75


@pytest.mark.parametrize("flat", [False, True])
def test_a_tensor_tau_is_read_at_each_update(flat: bool) -> None:
    online = mlp()
    if flat:
        flatten_(online)
    tau = torch.tensor(0.5)
    target = TargetNetwork(online, tau)
    fill(target.module, 0.0)
    fill(online, 1.0)
    seen = []
    for value in (0.5, 0.5, 0.0, 1.0):
        tau.fill_(value)
        target.update()
        seen.append(target.module[2].weight[1, 1].item())
    assert seen == [0.5, 0.75, 0.75, 1.0]


def test_a_tensor_tau_takes_the_arithmetic_at_both_ends() -> None:
    target, online = scalar(math.nan), scalar(1.0)
    soft_update(target, online, torch.tensor(1.0))
    assert math.isnan(target.weight.item())


def test_a_tensor_tau_must_be_one_number_on_the_device_of_the_networks() -> None:
    target, online = mlp(), mlp(1)
    for tau, message in (
        (torch.ones(1), r"floating-point tensor of no dimensions, got torch.float32 \(1,\)"),
        (torch.tensor(1), r"floating-point tensor of no dimensions, got torch.int64 \(\)"),
        (torch.tensor(0.5, device="meta"), "on the device of '0.weight', cpu, got meta"),
    ):
        with refused(f"tau must be .*{message}", target, online):
            soft_update(target, online, tau)


def test_a_tensor_tau_of_another_precision_and_one_that_trains_are_read_all_the_same() -> None:
    target, online = mlp(), mlp(1)
    exact = oracle(target, online, 0.25)
    soft_update(target, online, nn.Parameter(torch.tensor(0.25, dtype=torch.float64)))
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.double(), exact[name], rtol=1e-6, atol=1e-6)
        assert p.is_leaf


# ----------------------------------------------------------------------------- buffers


def test_buffers_are_copied_exactly_integers_and_non_persistent_ones_too() -> None:
    target, online = norm(0), norm(5)
    soft_update(target, online, 0.5)
    for name, buffer in online.named_buffers():
        assert torch.equal(target.get_buffer(name), buffer)
    assert target.num_batches_tracked.item() == 5


def test_buffers_may_be_averaged_but_integers_never_are() -> None:
    target, online = norm(0), norm(5)
    expected = (target.running_mean + online.running_mean) / 2
    soft_update(target, online, 0.5, buffers="average")
    torch.testing.assert_close(target.running_mean, expected)
    assert target.num_batches_tracked.item() == 5


def test_buffers_may_be_kept() -> None:
    target, online = norm(0), norm(5)
    before = {name: buffer.clone() for name, buffer in target.named_buffers()}
    hard_update(target, online, buffers="keep")
    assert all(torch.equal(target.get_buffer(name), b) for name, b in before.items())
    assert torch.equal(target.weight, online.weight)


def test_buffer_policies_go_by_pattern_the_last_counts_and_the_rest_is_copied() -> None:
    target, online = norm(0), norm(5)
    table, mean = target.table.clone(), (target.running_mean + online.running_mean) / 2
    soft_update(
        target, online, 0.5, buffers={"running_*": "keep", "table": "keep", "*_mean": "average"}
    )
    assert torch.equal(target.table, table)
    torch.testing.assert_close(target.running_mean, mean)
    assert target.num_batches_tracked.item() == 5


def test_an_unknown_policy_and_an_unused_pattern_are_refused() -> None:
    target, online = norm(0), norm(5)
    with refused("buffers must be 'copy', 'average' or 'keep', got 'mean'", target):
        soft_update(target, online, buffers="mean")  # type: ignore[arg-type]
    with refused(
        "buffers pattern 'weight' matches no tensor; the names are 'running_mean'", target
    ):
        soft_update(target, online, buffers={"weight": "keep"})


def test_in_plain_mappings_floats_are_averaged_and_the_rest_is_copied() -> None:
    target, online = norm(0).state_dict(), norm(5).state_dict()
    mean = (target["running_mean"] + online["running_mean"]) / 2
    soft_update(target, online, 0.5)
    torch.testing.assert_close(target["running_mean"], mean)
    assert target["num_batches_tracked"].item() == 5


def test_a_state_dict_may_lack_what_is_not_persistent() -> None:
    target, online = norm(0).requires_grad_(False), norm(5)
    table = target.table.clone()
    soft_update(target, online.state_dict(), 1.0)
    assert torch.equal(target.table, table)
    assert torch.equal(target.running_mean, online.running_mean)


# --------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_soft_update_refuses_a_target_that_rounding_would_stop(dtype: torch.dtype) -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(2).to(dtype)}
    online = {"a": torch.ones(2), "b": torch.ones(2).to(dtype)}
    for tau in (0.005, torch.tensor(0.5)):
        with pytest.raises(ValueError, match=f"target 'b' is {dtype}: rounding would stop a soft"):
            soft_update(target, online, tau)
        assert target["a"].tolist() == [0, 0]
    hard_update(target, online)
    assert target["b"].float().tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.005, 0.001])
def test_a_16_bit_target_does_not_stall(dtype: torch.dtype, tau: float) -> None:
    online = scalar(0.0, dtype)
    target = TargetNetwork(online, tau)
    fill(online, 1.0)
    naive = torch.zeros((), dtype=dtype)
    for _ in range(int(12 / tau)):
        target.update()
        naive.lerp_(torch.ones((), dtype=dtype), tau)
    assert target.module.weight.item() == 1.0
    assert naive.item() < 0.96  # what it would be without a float32 master


def test_a_16_bit_target_is_the_rounded_float32_average_at_every_step() -> None:
    online = mlp().bfloat16()
    target = TargetNetwork(online, 0.005)
    exact = {name: p.detach().float() for name, p in online.named_parameters()}
    for _ in range(50):
        step(online)
        target.update()
        for name, p in online.named_parameters():
            exact[name].lerp_(p.detach().float(), 0.005)
            assert torch.equal(target.module.get_parameter(name), exact[name].bfloat16())


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_both_ends_are_exact_in_16_bits_too(tau: float) -> None:
    online = mlp().bfloat16()
    target = TargetNetwork(online, tau)
    before = bits(target.module)
    step(online)
    target.update()
    assert bits(target.module) == (bits(online) if tau else before)


def test_assigning_tau_at_each_step_does_not_stall_a_16_bit_target() -> None:
    online = scalar(0.0, torch.bfloat16)
    target = TargetNetwork(online, 0.005)
    fill(online, 1.0)
    for _ in range(2400):
        target.tau = 0.005
        target.update()
    assert target.module.weight.item() == 1.0


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: fill(m, 7.0),
    "loaded": lambda m: m.load_state_dict({"weight": torch.full((1, 1), 7.0)}),
    "assigned": lambda m: m.load_state_dict(
        {"weight": torch.full((1, 1), 7.0, dtype=torch.bfloat16)}, assign=True
    ),
    "replaced": lambda m: setattr(
        m, "weight", nn.Parameter(torch.full((1, 1), 7.0, dtype=torch.bfloat16), False)
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_what_is_written_to_a_16_bit_copy_starts_its_master_anew(
    write: Callable[[nn.Module], object],
) -> None:
    online = scalar(0.0, torch.bfloat16)
    target = TargetNetwork(online, 0.5)
    target.update()
    write(target.module)
    target.update()
    assert target.module.weight.item() == 3.5


def test_a_write_to_one_16_bit_tensor_leaves_the_masters_of_the_others() -> None:
    online = mlp().bfloat16()
    target = TargetNetwork(online, 0.005)
    step(online)
    target.update()
    masters = {name: m.clone() for name, m in target.state_dict().items() if "masters" in name}
    with torch.no_grad():
        target.module[0].bias.fill_(1.0)
    target.tau = 0.0
    target.tau = 0.005
    target.update()
    for name, p in online.named_parameters():
        start = torch.ones(4) if name == "0.bias" else masters[f"masters.{name}"]
        expected = start.lerp(p.detach().float(), 0.005)
        assert torch.equal(target.state_dict()[f"masters.{name}"], expected)


def test_networks_of_two_precisions_meet_in_the_targets_or_its_masters() -> None:
    online = mlp()
    wide = TargetNetwork(online, 0.25, target=mlp(1).double())
    narrow = TargetNetwork(online, 0.25, target=mlp(1).bfloat16())
    assert [p.dtype for p in wide.module.parameters()] == [torch.float64] * 4
    step(online)
    exact = oracle(wide.module, online, 0.25)
    wide.update()
    narrow.update()
    for name, p in wide.module.named_parameters():
        torch.testing.assert_close(p, exact[name])
        rounded = narrow.module.get_parameter(name)
        torch.testing.assert_close(rounded.double(), exact[name], rtol=0.02, atol=0.02)


def test_a_float32_target_in_double_equals_the_oracle_after_many_updates() -> None:
    online = scalar(0.0)
    target = TargetNetwork(online, 0.001)
    fill(online, 1.0)
    for _ in range(2000):
        target.update()
    assert target.module.weight.item() == pytest.approx(1 - 0.999**2000, rel=1e-4)


# ------------------------------------------------------------------------- TargetNetwork


def test_the_copy_is_frozen_in_eval_mode_and_called_through() -> None:
    online = nn.Sequential(mlp(), nn.Dropout(0.5), nn.BatchNorm1d(2))
    target = TargetNetwork(online)
    parent = nn.ModuleList([online, target])
    parent.train()
    assert online.training
    assert not any(module.training for module in target.module.modules())
    x = torch.randn(4, 3)
    out = target(x)
    assert not out.requires_grad
    assert torch.equal(out, target.module(x))
    assert all(not p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in online.parameters())
    assert target.module[2].num_batches_tracked.item() == 0


class Policy(nn.Module):
    """What the agents of others read of a network beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 2)
        self.register_buffer("action_scale", torch.tensor(2.0))
        self.bound = 3.0
        self.register_buffer("epsilon", torch.zeros(2))

    def get_action(self, x: Tensor) -> Tensor:
        return self.q(x) * self.action_scale

    def reset_noise(self) -> None:
        self.epsilon.add_(1.0)

    def __deepcopy__(self, memo: Any) -> Policy:
        twin = Policy()
        twin.load_state_dict(self.state_dict())
        return twin


def test_what_the_target_does_not_have_is_read_from_the_copy_and_not_set_there() -> None:
    online = Policy()
    target = TargetNetwork(online, 0.5)
    x = torch.ones(1, 2)
    assert target.q is target.module.q
    assert target.q is not online.q
    assert target.action_scale is target.module.action_scale
    assert target.bound == 3.0
    assert torch.equal(target.get_action(x), online.get_action(x))
    assert not target.get_action(x).requires_grad
    target.bound = 4.0
    assert (target.bound, target.module.bound) == (4.0, 3.0)
    with pytest.raises(AttributeError, match="'Policy' object has no attribute 'nothing'"):
        _ = target.nothing
    assert not hasattr(TargetNetwork.__new__(TargetNetwork), "q")
    for twin in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert isinstance(twin, TargetNetwork)  # and not what the copy makes of itself
        assert twin.q is twin.module.q
        twin.update()


def test_an_item_that_is_asked_of_the_target_is_the_copys() -> None:
    networks = nn.ModuleDict({"actor": mlp(), "critic": mlp(1)})
    target = TargetNetwork(networks)
    assert target["actor"] is target.module["actor"]
    assert "actor" in target
    assert [*target] == ["actor", "critic"]
    layers = TargetNetwork(mlp())
    assert layers[0] is layers.module[0]
    assert len([*layers]) == 3
    assert bool(target)
    with pytest.raises(TypeError):
        _ = TargetNetwork(nn.Linear(2, 2))[0]


def test_a_noisy_target_has_the_noise_of_online_or_keeps_its_own() -> None:
    online = Policy()
    online.reset_noise()
    same, own = TargetNetwork(online), TargetNetwork(online, buffers={"epsilon": "keep"})
    own.reset_noise()
    online.reset_noise()
    online.reset_noise()
    same.update()
    own.update()
    assert same.epsilon.tolist() == [3.0, 3.0]
    assert own.epsilon.tolist() == [2.0, 2.0]
    own.train()
    assert not own.module.training
    own.module.train()
    assert own.q.training


def test_a_lazy_network_asks_for_a_batch_first() -> None:
    with pytest.raises(ValueError, match="'weight' is not initialised yet: run one batch"):
        TargetNetwork(nn.LazyLinear(2))


def test_a_parameter_without_elements_is_frozen_too() -> None:
    online = nn.Linear(2, 3)
    online.weight = nn.Parameter(torch.zeros(3, 0))
    target = TargetNetwork(online)
    assert not target(torch.zeros(2, 0)).requires_grad


def test_the_online_network_is_no_child_of_its_target() -> None:
    target = TargetNetwork(mlp())
    assert [name for name, _ in target.named_parameters()] == [
        "module.0.weight",
        "module.0.bias",
        "module.2.weight",
        "module.2.bias",
    ]


def test_frozen_and_hand_changed_parameters_follow_too() -> None:
    online = mlp()
    online[0].requires_grad_(False)
    target = TargetNetwork(online, 0.5)
    fill(online, 1.0)
    fill(target.module, 0.0)
    target.update()
    assert all((p == 0.5).all() for p in target.module.parameters())


@pytest.mark.parametrize("every", [1, 3])
def test_the_clock_fires_at_n_2n_and_3n(every: int) -> None:
    online = scalar(0.0)
    target = TargetNetwork(online, 1.0, every=every)
    fired = []
    for n in range(1, 3 * every + 1):
        fill(online, float(n))
        target.update()
        if target.module.weight.item() == n:
            fired.append(n)
        assert target.clock == n
    assert fired == [every, 2 * every, 3 * every]


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_every_must_be_a_positive_whole_number(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, got"):
        TargetNetwork(mlp(), every=every)


def test_online_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="online must be a module, got OrderedDict"):
        TargetNetwork(mlp().state_dict())  # type: ignore[arg-type]


def test_sync_copies_now_and_the_clock_goes_on() -> None:
    online = mlp()
    target = TargetNetwork(online, 0.0, every=5)
    target.update()
    step(online)
    target.sync()
    assert bits(target.module) == bits(online)
    assert target.clock == 1


def test_the_online_network_is_only_read_and_draws_nothing() -> None:
    online = nn.Sequential(mlp(), nn.BatchNorm1d(2))
    before, random = bits(online), torch.get_rng_state()
    target = TargetNetwork(online, 0.5)
    target.update()
    target.sync()
    target.lag()
    assert bits(online) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_lag_is_the_relative_distance() -> None:
    online = mlp()
    target = TargetNetwork(online, 0.005)
    assert target.lag().item() == 0.0
    step(online)
    theirs, ours = (
        torch.cat([p.detach().double().flatten() for p in n.parameters()])
        for n in (online, target.module)
    )
    assert target.lag().item() == pytest.approx(float((ours - theirs).norm() / theirs.norm()))
    assert target.lag().dtype == torch.float32
    assert target.lag().shape == ()


def test_lag_sees_small_distances_in_double_and_leaves_buffers_out() -> None:
    online = nn.Sequential(scalar(1.0, torch.float64), nn.BatchNorm1d(1).double())
    target = TargetNetwork(online, buffers="keep")
    with torch.no_grad():
        online[0].weight += 1e-12
        online[1].running_mean += 100
    assert target.lag().item() == pytest.approx(1e-12 / math.sqrt(2), rel=1e-3)


def test_lag_may_be_told_by_member() -> None:
    online = nn.ParameterDict({"w": torch.ones(3, 2, 2), "b": torch.ones(3)})
    target = TargetNetwork(online)
    with torch.no_grad():
        online["w"][1] += 1.0
        online["b"][2] += 1.0
    expected = [0.0, math.sqrt(4 / 17), math.sqrt(1 / 8)]
    assert target.lag(members=True).tolist() == pytest.approx(expected)
    other = TargetNetwork(mlp())
    with pytest.raises(ValueError, match="needs one leading dimension in all parameters"):
        other.lag(members=True)


def test_a_twin_serves_where_a_network_cannot_be_copied() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("it holds a socket")

    online, twin = Stubborn(2, 2), Stubborn(2, 2)
    message = r"Stubborn cannot be deep-copied \(it holds a socket\): build a second one and pass"
    with refused(message, online):
        TargetNetwork(online)
    target = TargetNetwork(online, target=twin)
    assert target.module is twin
    assert bits(twin) == bits(online)
    assert not twin.training
    assert not twin.weight.requires_grad


def test_a_twin_that_does_not_match_is_refused_and_stays_as_it_is() -> None:
    online = mlp()
    for twin, message in (
        (mlp(1, hidden=5), r"'0.weight' must have one shape"),
        (nn.Sequential(nn.Linear(3, 4)), "target lacks '2.weight', '2.bias'"),
        (online, "same object"),
        (nn.Sequential(online[0], nn.ReLU(), nn.Linear(4, 2)), "shares memory"),
    ):
        with refused(message, online, twin):
            TargetNetwork(online, target=twin)
        assert twin.training
        assert all(p.requires_grad for p in twin.parameters())


def test_a_target_inside_its_online_network_is_refused() -> None:
    online = nn.ModuleDict({"q": nn.Linear(2, 2)})
    target = TargetNetwork(online)
    online["target"] = target
    with refused("target lacks 'target.module.q.weight'", target.module):
        target.update()


# ------------------------------------------------------------------------------ exclude


def test_an_excluded_encoder_is_shared_and_left_alone() -> None:
    online = Agent()
    target = TargetNetwork(online, 0.5, exclude=["encoder.*"])
    assert target.module.encoder[0].weight is online.encoder[0].weight
    assert target.module.encoder[1].running_mean is online.encoder[1].running_mean
    assert target.module.head.weight is not online.head.weight
    assert online.encoder[0].weight.requires_grad
    assert not target.module.head.weight.requires_grad
    fill(online, 1.0)
    fill(target.module.head, 0.0)
    target.update()
    assert (target.module.head.weight == 0.5).all()
    assert (online.encoder[0].weight == 1.0).all()


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "cast": lambda m: m.double(),
    "assigned": lambda m: m.load_state_dict(Agent(1).state_dict(), assign=True),
    "replaced": lambda m: setattr(m.encoder[0], "weight", nn.Parameter(torch.ones(4, 3))),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_shared_encoder_stays_shared_where_online_gets_another(
    move: Callable[[nn.Module], object],
) -> None:
    online = Agent()
    target = TargetNetwork(online, 0.5, exclude="encoder.*")
    move(online)
    target.update()
    theirs = {**dict(online.named_parameters()), **dict(online.named_buffers())}
    ours = {**dict(target.module.named_parameters()), **dict(target.module.named_buffers())}
    assert [n for n in ours if ours[n] is theirs[n]] == [n for n in ours if "encoder" in n]


def test_an_exclude_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exclude pattern 'enc.\*' matches no tensor"):
        TargetNetwork(Agent(), exclude=["enc.*"])


def test_a_twin_keeps_what_it_has_of_the_excluded() -> None:
    online, twin = Agent(), Agent(1)
    encoder = bits(twin.encoder)
    target = TargetNetwork(online, target=twin, exclude=["encoder.*"])
    online.double()
    target.update()
    assert bits(twin.encoder).keys() == encoder.keys()
    assert bits(target.module.head) == bits(online.head)
    fresh = Agent(1).encoder.double()
    assert torch.equal(twin.encoder[0].weight, fresh[0].weight)


# ------------------------------------------------------------------ moved and replaced


def followed(target: TargetNetwork) -> None:
    """One update with tau 0.5 reaches every parameter of the copy that is there now."""
    fill(target.online, 1.0)
    fill(target.module, 0.0)
    target.update()
    assert all((p == 0.5).all() for p in target.module.parameters())
    assert not any(p.requires_grad for p in target.module.parameters())


FOLLOWED: dict[str, Callable[[TargetNetwork], object]] = {
    "online cast": lambda t: t.online.double(),
    "target cast": lambda t: t.double(),
    "both cast": lambda t: (t.online.double(), t.double()),
    "online assigned": lambda t: t.online.load_state_dict(mlp(1).state_dict(), assign=True),
    "target assigned": lambda t: t.module.load_state_dict(mlp(1).state_dict(), assign=True),
    "online replaced": lambda t: setattr(t.online[0], "bias", nn.Parameter(torch.zeros(4))),
    "target replaced": lambda t: setattr(t.module[0], "bias", nn.Parameter(torch.zeros(4), False)),
    "online data": lambda t: setattr(t.online[0].bias, "data", torch.zeros(4)),
    "target data": lambda t: setattr(t.module[0].bias, "data", torch.zeros(4)),
    "online layer": lambda t: t.online.__setitem__(0, nn.Linear(3, 4)),
    "online flattened": lambda t: flatten_(t.online),
    "target flattened": lambda t: flatten_(t.module),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_what_was_moved_or_replaced_is_followed(
    change: Callable[[TargetNetwork], object], flat: bool
) -> None:
    online = mlp()
    if flat:
        flatten_(online)
    target = TargetNetwork(online, 0.5)
    target.update()
    change(target)
    followed(target)


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_soft_update_follows_too(change: Callable[[Any], object]) -> None:
    class Both:
        online, module = mlp(), mlp(1)

        def double(self) -> None:
            self.module.double()

    both = Both()
    both.online = mlp()
    soft_update(both.module, both.online, 0.5)
    change(both)
    fill(both.online, 1.0)
    fill(both.module, 0.0)
    soft_update(both.module, both.online, 0.5)
    assert all((p == 0.5).all() for p in both.module.parameters())


def test_the_copy_takes_the_dtype_of_online_unless_it_has_its_own() -> None:
    target = TargetNetwork(mlp())
    target.online.double()
    target.update()
    assert target.module[0].weight.dtype == torch.float64
    target.module.bfloat16()
    target.update()
    target.online.float()
    target.update()
    assert target.module[0].weight.dtype == torch.bfloat16


CHANGED: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "added": (lambda m: m.append(nn.Linear(2, 2)), "target lacks '3.weight', '3.bias'"),
    "deleted": (lambda m: m.__delitem__(2), "online lacks '2.weight', '2.bias'"),
    "resized": (lambda m: m.__setitem__(0, nn.Linear(5, 4)), "'0.weight' must have one shape"),
    "no bias": (lambda m: setattr(m[0], "bias", None), "online lacks '0.bias'"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_a_network_of_other_names_or_shapes_is_refused_and_not_counted(
    change: Callable[[nn.Sequential], object], message: str
) -> None:
    online, plain = mlp(), mlp(1)
    target = TargetNetwork(online, 0.5)
    target.update()
    soft_update(plain, online, 0.5)
    change(online)
    for update in (target.update, target.sync, target.lag, lambda: soft_update(plain, online)):
        with refused(message, target.module, plain, online):
            update()
    assert target.clock == 1


def test_loading_the_online_tensors_themselves_is_refused() -> None:
    target = TargetNetwork(mlp())
    target.module.load_state_dict(target.online.state_dict(), assign=True)
    with refused("shares memory with online", target.online):
        target.update()


# ----------------------------------------------------------------------- save and resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("how", ["file", "assign", "deepcopy", "pickle"])
def test_a_resumed_target_goes_on_bit_for_bit(how: str, flat: bool, dtype: torch.dtype) -> None:
    def make(seed: int) -> nn.ModuleDict:
        online = mlp(seed).to(dtype)
        if flat:
            flatten_(online)
        return nn.ModuleDict({"q": online, "target": TargetNetwork(online, 0.005, every=3)})

    def run(agent: nn.ModuleDict, updates: int) -> None:
        for _ in range(updates):
            step(agent["q"])
            agent["target"].update()

    agent = make(0)
    run(agent, 7)
    if how == "deepcopy":
        resumed = copy.deepcopy(agent)
    elif how == "pickle":
        resumed = pickle.loads(pickle.dumps(agent))
    else:
        file = io.BytesIO()
        torch.save(agent.state_dict(), file)
        file.seek(0)
        resumed = make(1)
        state = torch.load(file, weights_only=True)
        resumed.load_state_dict(state, assign=how == "assign")
    assert resumed["target"].online is resumed["q"]
    assert resumed["target"].clock == 7
    for network in (agent, resumed):
        torch.manual_seed(9)
        run(network, 300)
    assert bits(resumed) == bits(agent)
    assert resumed["target"].clock == 307
    ours, theirs = (a.state_dict() for a in (agent, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    masters = [name for name in ours if name.startswith("target.masters.")]
    assert len(masters) == (4 if dtype == torch.bfloat16 else 0)


def test_the_state_is_tensors_and_plain_values() -> None:
    target = TargetNetwork(mlp().bfloat16())
    target.update()
    state = target.state_dict()
    assert all(isinstance(x, Tensor) for x in state.values())
    assert state["clock"].item() == 1
    masters = {name: x for name, x in state.items() if name.startswith("masters.")}
    assert sorted(name[8:] for name in masters) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(m.dtype == torch.float32 for m in masters.values())


def test_masters_of_another_network_are_refused() -> None:
    target = TargetNetwork(mlp().bfloat16())
    target.update()
    state = TargetNetwork(mlp(hidden=5).bfloat16()).state_dict()
    with refused(r"'module.0.weight' must have the shape \(3, 4\)|'masters.*", target.module):
        target.load_state_dict(state)
    assert target.clock == 1


def test_weights_without_masters_start_them() -> None:
    target = TargetNetwork(scalar(0.0, torch.bfloat16), 0.5)
    target.load_state_dict(TargetNetwork(scalar(7.0)).state_dict())
    target.update()
    assert target.module.weight.item() == 3.5


def test_copies_do_not_share_anything() -> None:
    target = TargetNetwork(mlp(), 0.5)
    twin = copy.deepcopy(target)
    assert twin.online is not target.online
    before = bits(target.module)
    step(twin.online)
    twin.update()
    assert bits(target.module) == before
    assert bits(twin.module) != before
    assert target.clock == 0


# ------------------------------------------------------------------------------ compile


@pytest.fixture
def compiling() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("case", ["plain", "flat", "bfloat16", "patterns", "exclude", "wrapped"])
def test_the_whole_update_compiles_and_does_the_same(case: str) -> None:
    def make() -> TargetNetwork:
        online = Agent().bfloat16() if case == "bfloat16" else Agent()
        if case == "flat":
            flatten_(online)
        if case == "wrapped":
            online.head = torch.compile(online.head, backend="eager")
        tau = {"*": 0.1, "head.*": 0.2} if case == "patterns" else 0.1
        return TargetNetwork(online, tau, exclude=["encoder.0.*"] if case == "exclude" else [])

    ours, theirs = make(), make()
    backend = "aot_eager" if case in ("flat", "bfloat16") else "eager"
    update = torch.compile(ours.update, fullgraph=True, backend=backend)
    for n in range(12):
        for target, call in ((ours, update), (theirs, theirs.update)):
            torch.manual_seed(n)
            step(target.online)
            call()
    assert bits(ours.module) == bits(theirs.module)
    assert ours.clock == theirs.clock == 12
    ours.update()
    theirs.update()
    assert bits(ours.module) == bits(theirs.module)
    assert ours.clock == 13


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    "change", ["online cast", "target assigned", "online replaced", "online data", "online layer"]
)
def test_a_compiled_update_follows_what_was_moved_or_replaced(change: str) -> None:
    target = TargetNetwork(mlp(), 0.5)
    update = torch.compile(target.update, fullgraph=True, backend="eager")
    update()
    FOLLOWED[change](target)
    fill(target.online, 1.0)
    fill(target.module, 0.0)
    update()
    assert all((p == 0.5).all() for p in target.module.parameters())


@pytest.mark.usefixtures("compiling")
def test_a_compiled_update_refuses_a_network_of_other_names() -> None:
    target = TargetNetwork(mlp(), 0.5)
    update = torch.compile(target.update, fullgraph=True, backend="eager")
    update()
    target.online.append(nn.Linear(2, 2))
    before = bits(target.module)
    with pytest.raises(Exception, match="same names"):
        update()
    assert bits(target.module) == before


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_soft_update_compiles_whole_and_pairs_by_name(backend: str) -> None:
    class Two(nn.Module):
        def __init__(self, *order: str) -> None:
            super().__init__()
            for name in order:
                self.add_module(name, nn.Linear(2, 2))

    target, online = Two("a", "b"), Two("b", "a")
    exact = oracle(target, online, 0.25)

    @torch.compile(fullgraph=True, backend=backend)
    def update(tau: Tensor) -> None:
        soft_update(target, online, tau)

    update(torch.tensor(0.25))
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.double(), exact[name], rtol=1e-6, atol=1e-6)
    update(torch.tensor(1.0))
    for name, p in target.named_parameters():
        torch.testing.assert_close(p, online.get_parameter(name))


@pytest.mark.usefixtures("compiling")
def test_a_compiled_update_keeps_its_cadence() -> None:
    online = scalar(0.0)
    target = TargetNetwork(online, 1.0, every=3)
    update = torch.compile(target.update, fullgraph=True, backend="eager")
    fired = []
    for n in range(1, 10):
        fill(online, float(n))
        update()
        if target.module.weight.item() == n:
            fired.append(n)
    assert fired == [3, 6, 9]
    assert target.clock == 9


# -------------------------------------------------------------------------------- speed


def test_an_update_allocates_nothing_that_stays_or_goes() -> None:
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            known = {id(a) for a in args if isinstance(a, Tensor)}
            known |= {id(a) for x in args if isinstance(x, list) for a in x}
            outs = out if isinstance(out, list | tuple) else [out]
            made.extend(func.name() for o in outs if isinstance(o, Tensor) and id(o) not in known)
            return out

    online = nn.Sequential(mlp(), nn.BatchNorm1d(2))
    mixed = TargetNetwork(online, target=copy.deepcopy(online).double())
    targets = [TargetNetwork(online), TargetNetwork(copy.deepcopy(online).bfloat16()), mixed]
    targets.append(TargetNetwork(online, {"*": 0.5, "0.*": 0.1}, buffers="average"))
    for target in targets:
        target.update()
        with Watch():
            target.update()
            target.sync()
    assert made == []


def test_soft_update_keeps_no_network_alive() -> None:
    import gc
    import weakref

    target, online = mlp(), mlp(1)
    soft_update(target, online)
    flatten_(online)
    soft_update(target, online)
    alive = [weakref.ref(target), weakref.ref(online)]
    del target, online
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


# --------------------------------------------------------------------- weighted average


def test_a_weighted_average_is_the_weighted_sum() -> None:
    networks = [mlp(seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.4]
    before = [bits(network) for network in networks]
    average = weighted_average(networks, weights)
    assert list(average) == list(networks[0].state_dict())
    for name, tensor in average.items():
        exact = sum(
            w * n.get_parameter(name).detach().double()
            for w, n in zip(weights, networks, strict=True)
        )
        assert torch.equal(tensor, exact.float())
        assert not tensor.requires_grad
    assert [bits(network) for network in networks] == before


def test_two_networks_average_as_in_w1_p_plus_w2_1_minus_p() -> None:
    average = weighted_average([scalar(1.0), scalar(3.0)], [0.25, 0.75])
    assert average["weight"].item() == 2.5
    assert weighted_average([scalar(5.0)], [1.0])["weight"].item() == 5.0
    assert weighted_average([scalar(5.0), scalar(3.0)], [1, -1])["weight"].item() == 2.0


def test_integer_buffers_come_from_the_first_and_the_result_loads() -> None:
    first, second = norm(3), norm(5)
    average = weighted_average([first, second], [0.5, 0.5])
    assert average["num_batches_tracked"].item() == 3
    average["num_batches_tracked"] += 1
    assert first.num_batches_tracked.item() == 3
    norm(7).load_state_dict(average)  # non-persistent buffers are not in it


def test_modules_and_states_mix_and_tied_names_are_all_there() -> None:
    class Tied(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.a, self.b = scalar(value), scalar(value)
            self.b.weight = self.a.weight

    states: list[nn.Module | Mapping[str, Tensor]] = [Tied(1.0), Tied(3.0).state_dict()]
    average = weighted_average(states, [0.5, 0.5])
    assert {name: t.item() for name, t in average.items()} == {"a.weight": 2.0, "b.weight": 2.0}
    prefixed = {f"module.{name}": t for name, t in Tied(5.0).state_dict().items()}
    assert list(weighted_average([prefixed, Tied(1.0)], [0.5, 0.5])) == list(prefixed)
    assert weighted_average([Tied(1.0), prefixed], [0.5, 0.5])["b.weight"].item() == 3.0
    same = Tied(2.0)
    assert weighted_average([same, same.state_dict()], [0.5, 0.5])["a.weight"].item() == 2.0


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (0, [], "got 0 networks and 0 weights"),
        (2, [1.0], "got 2 networks and 1 weights"),
        (2, [0.5, math.nan], r"weights must be finite, got \[0.5, nan\]"),
        (1, [math.inf], "weights must be finite"),
    ],
)
def test_weights_must_be_finite_and_one_a_network(
    count: int, weights: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_average([mlp(seed) for seed in range(count)], weights)


def test_networks_that_do_not_match_are_not_averaged() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' must have one shape"):
        weighted_average([mlp(), mlp(hidden=5)], [0.5, 0.5])
    with pytest.raises(TypeError, match="networks must be modules or mappings, got list"):
        weighted_average([[torch.ones(1)]], [1.0])  # type: ignore[list-item]


# --------------------------------------------------------------------------------- cuda


@pytest.mark.cuda
@pytest.mark.filterwarnings(f"ignore:{SYNC_WARNING}")
def test_on_a_device_the_update_stays_there_and_follows_online() -> None:
    online = mlp()
    target = TargetNetwork(online, 0.5)
    online.cuda()
    target.update()
    assert target.module[0].weight.is_cuda
    fill(online, 1.0)
    fill(target.module, 0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        target.update()
        lag = target.lag()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (target.module[0].weight == 0.5).all()
    assert lag.item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must be on one device, got cpu in target and cuda:0"):
        soft_update(mlp(), online)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["plain", "flat", "bfloat16"])
def test_an_update_is_captured_in_a_graph_with_a_schedule_of_tau(kind: str) -> None:
    online = mlp().cuda()
    if kind == "bfloat16":
        online.bfloat16()
    if kind == "flat":
        flatten_(online)
    tau = torch.tensor(0.5, device="cuda")
    target = TargetNetwork(online, tau)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        target.update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        target.update()
    fill(online, 1.0)
    fill(target.module, 0.0)
    target.sync()
    fill(online, 0.0)
    for value, expected in ((0.5, 0.5), (0.25, 0.375), (1.0, 0.0)):
        tau.fill_(value)
        graph.replay()
        assert target.module[0].weight[0, 0].item() == expected
