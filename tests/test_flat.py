"""Flat networks: the same network in other memory, and as if nothing had happened."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyak_rl import TargetNetwork, flatten_, soft_update
from polyak_rl.flat import flat_of, flatten_like_


def mlp(seed: int = 0, hidden: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2))


def conv(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Members(nn.Module):
    """Linear layers with a leading member dimension, as the agents have them."""

    def __init__(self, members: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.w1 = nn.Parameter(torch.randn(members, 3, 5))
        self.b1 = nn.Parameter(torch.randn(members, 1, 5))
        self.w2 = nn.Parameter(torch.randn(members, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w1 + self.b1) @ self.w2


def values(module: nn.Module) -> dict[str, bytes]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.detach().contiguous().numpy().tobytes())
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """The calls of every aten operator inside the block."""
    calls: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls[func._schema.name] = calls.get(func._schema.name, 0) + 1
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


# ----------------------------------------------------------------------- what remains


@pytest.mark.parametrize("make", [mlp, conv, Tied, lambda: mlp().double(), lambda: mlp().half()])
def test_parameters_keep_identity_names_shapes_strides_and_bits(make: Any) -> None:
    network = make()
    parameters = dict(network.named_parameters(remove_duplicate=False))
    before = values(network)
    strides = {name: p.stride() for name, p in parameters.items()}
    flat = flatten_(network)
    after = dict(network.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in after)
    assert {name: p.stride() for name, p in after.items()} == strides
    assert values(network) == before
    assert flat.intact()
    assert flat_of(network) is flat


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_tensor_starts_on_64_bytes_of_one_buffer(dtype: torch.dtype) -> None:
    network = mlp().to(dtype)
    flat = flatten_(network)
    (buffer,), (parameter,) = flat.buffers, flat.parameters
    assert parameter.data_ptr() == buffer.data_ptr()
    for p in network.parameters():
        for tensor, whole in ((p, buffer), (p.grad, parameter.gradient)):
            start = tensor.data_ptr() - whole.data_ptr()
            assert tensor.data_ptr() % 64 == 0
            assert 0 <= start <= whole.nbytes - tensor.nbytes


def test_transposed_and_sliced_parameters_keep_their_values() -> None:
    network = nn.Linear(4, 3)
    network.weight = nn.Parameter(torch.randn(4, 3).t())
    network.bias = nn.Parameter(torch.randn(6)[::2])
    before = values(network)
    flatten_(network)
    assert values(network) == before
    assert network.weight.stride() == (1, 3)  # dense: kept
    assert network.bias.stride() == (1,)  # a slice: closed up


def test_a_flat_network_computes_the_same_bits() -> None:
    plain, x = mlp(hidden=64), torch.randn(1, 3)
    flat = copy.deepcopy(plain)
    flatten_(flat)
    assert torch.equal(flat(x), plain(x))


def test_tied_weights_stay_tied_and_take_one_slot() -> None:
    network = Tied()
    flat = flatten_(network)
    assert network.decoder.weight is network.encoder.weight
    (slots,) = flat.layout.values()
    assert [slot.name for slot in slots] == ["encoder.weight", "encoder.bias", "decoder.bias"]


def test_frozen_parameters_and_other_dtypes_have_buffers_of_their_own() -> None:
    network = mlp()
    network[0].requires_grad_(False)
    network[2].double()
    flat = flatten_(network)
    assert len(flat.buffers) == 2
    assert [p.dtype for p in flat.parameters] == [torch.float64]
    assert network[0].weight.grad is None


def test_buffers_stay_where_they_are() -> None:
    network = conv()
    mean = network[1].running_mean
    flatten_(network)
    assert network[1].running_mean is mean


def test_gradients_that_are_there_are_kept() -> None:
    network = mlp()
    network(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in network.parameters()]
    flat = flatten_(network)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), before, strict=True))
    assert flat.parameters[0].grad.norm() > 0


def test_flattening_again_changes_nothing() -> None:
    network = mlp()
    flat = flatten_(network)
    assert flatten_(network) is flat
    assert flatten_(torch.compile(network, backend="eager")) is flat


# --------------------------------------------------------------------- saving, copying


def test_the_state_dict_is_the_plain_one_both_ways() -> None:
    plain, flat = mlp(0), mlp(1)
    memory = flatten_(flat)
    flat.load_state_dict(plain.state_dict())
    assert values(flat) == values(plain)
    assert memory.intact()
    other = mlp(2)
    other.load_state_dict(flat.state_dict())
    assert values(other) == values(plain)


def test_a_file_holds_the_buffer_once_and_loads_as_plain_data() -> None:
    network = mlp(hidden=512)
    plain, flat = io.BytesIO(), io.BytesIO()
    torch.save(network.state_dict(), plain)
    flatten_(network)
    torch.save(network.state_dict(), flat)
    assert flat.tell() < 1.1 * plain.tell()
    flat.seek(0)
    other = mlp(1, hidden=512)
    other.load_state_dict(torch.load(flat, weights_only=True))
    assert values(other) == values(network)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_unpickled_networks_are_ordinary(twin_of: Any) -> None:
    network = mlp()
    flatten_(network)
    twin = twin_of(network)
    assert values(twin) == values(network)
    assert flat_of(twin) is None
    assert not any(isinstance(p.grad, Tensor) for p in twin.parameters())
    with torch.no_grad():
        twin[0].weight.zero_()
    assert network[0].weight.abs().sum() > 0
    assert flatten_(twin).intact()


def test_a_flat_parameter_is_no_independent_copy_of_anything() -> None:
    (parameter,) = flatten_(mlp()).parameters
    with pytest.raises(TypeError, match="a FlatParameter cannot be copied: copy the module"):
        copy.deepcopy(parameter)
    with pytest.raises(TypeError, match="a FlatParameter cannot be pickled: save state_dict"):
        pickle.dumps(parameter)


# ------------------------------------------------------------------------- optimizing


def train(
    network: nn.Module, optimizer: Any, clear: Any, clip: Any = None, steps: int = 20
) -> None:
    torch.manual_seed(3)
    for _ in range(steps):
        clear()
        network(torch.randn(8, 3)).square().mean().backward()
        if clip is not None:
            clip()
        optimizer.step()


@pytest.mark.parametrize("make", [mlp, Tied])
@pytest.mark.parametrize("name", ["Adam", "Adam fused", "AdamW", "SGD", "RMSprop"])
def test_an_optimizer_on_the_flat_parameters_trains_as_on_the_module(make: Any, name: str) -> None:
    torch.manual_seed(0)
    plain = make()
    network = copy.deepcopy(plain)
    flat = flatten_(network)
    options = {"lr": 1e-2, **({"fused": True} if "fused" in name else {})}
    kind = getattr(torch.optim, name.split()[0])
    ours, theirs = kind(flat.parameters, **options), kind(plain.parameters(), **options)
    train(network, ours, ours.zero_grad)
    train(plain, theirs, theirs.zero_grad)
    # vector instructions and their remainders round differently, by a unit in the last place
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)
    assert flat.intact()


@pytest.mark.parametrize("clear", ["flat", "optimizer", "module to None", "module to zero"])
def test_every_way_of_clearing_gradients_works(clear: str) -> None:
    plain, network = mlp(), mlp()
    flat = flatten_(network)
    ours = torch.optim.SGD(flat.parameters, lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    clears = {
        "flat": flat.zero_grad,
        "optimizer": ours.zero_grad,
        "module to None": network.zero_grad,
        "module to zero": lambda: network.zero_grad(set_to_none=False),
    }
    train(network, ours, clears[clear])
    train(plain, theirs, theirs.zero_grad)
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_clearing_does_not_miss_a_gradient_that_lies_elsewhere() -> None:
    network = mlp()
    flat = flatten_(network)
    network.zero_grad()
    network(torch.ones(1, 3)).sum().backward()
    flat.zero_grad()
    assert flat.parameters[0].grad.abs().sum() == 0
    assert all(p.grad.abs().sum() == 0 for p in network.parameters())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_that_backward_replaced_is_gathered() -> None:
    network, plain = mlp(), mlp()
    flat = flatten_(network)
    for net in (network, plain):
        net(torch.ones(1, 3)).sum().backward(create_graph=True)
    gradient = flat.parameters[0].grad
    assert not gradient.requires_grad
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert network[0].weight.grad.data_ptr() == gradient.data_ptr()
    for net in (network, plain):  # or the graph keeps itself alive
        for p in net.parameters():
            p.grad = None


def test_gradients_accumulate_over_several_backward_passes() -> None:
    network = mlp()
    flat = flatten_(network)
    network(torch.ones(1, 3)).sum().backward()
    once = flat.parameters[0].grad.clone()
    network(torch.ones(1, 3)).sum().backward()
    assert torch.equal(flat.parameters[0].grad, 2 * once)


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_is_torchs_clipping(max_norm: float) -> None:
    network, plain = mlp(), mlp()
    flat = flatten_(network)
    for net in (network, plain):
        net(torch.ones(4, 3)).square().sum().backward()
    norm = flat.clip_grad_norm_(max_norm)
    theirs = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    torch.testing.assert_close(norm, theirs)
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_clipping_over_two_buffers_takes_one_norm() -> None:
    network, plain = mlp(), mlp()
    for net in (network, plain):
        net[2].double()
        for i, p in enumerate(net.parameters()):
            p.grad = torch.full_like(p, i + 1.0)
    norm = flatten_(network).clip_grad_norm_(1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 1.0).float())
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_does_not_outlive_its_step(value: float) -> None:
    network = mlp()
    flat = flatten_(network)
    network[0].weight.grad[0, 0] = value
    assert not flat.clip_grad_norm_(1.0).isfinite()
    for p in network.parameters():
        p.grad.fill_(1e-3)  # as a backward pass that overwrites does
    assert flat.clip_grad_norm_(1.0).isfinite()


@pytest.mark.parametrize("members", [1, 2, 5])
def test_a_members_norm_and_clipping_do_not_depend_on_the_others(members: int) -> None:
    together = Members(members)
    flat = flatten_(together, members=members)
    assert flat.buffers[0].shape[0] == members
    together(torch.randn(8, 3)).square().sum().backward()
    grads = [p.grad.clone() for p in together.parameters()]
    norms = flat.clip_grad_norm_(0.3)
    assert norms.shape == (members,)
    for i in range(members):
        alone = Members(1)
        solo = flatten_(alone, members=1)
        for p, grad in zip(alone.parameters(), grads, strict=True):
            p.grad.copy_(grad[i : i + 1])
        assert torch.equal(solo.clip_grad_norm_(0.3), norms[i : i + 1])
        for p, q in zip(alone.parameters(), together.parameters(), strict=True):
            assert torch.equal(p.grad[0], q.grad[i])


def test_a_members_training_does_not_depend_on_the_others() -> None:
    def trained(members: list[int]) -> dict[str, Tensor]:
        network, start = Members(len(members)), Members(5)
        with torch.no_grad():
            for p, q in zip(network.parameters(), start.parameters(), strict=True):
                p.copy_(q[members])
        flat = flatten_(network, members=len(members))
        optimizer = torch.optim.Adam(flat.parameters, lr=1e-2, fused=True)
        torch.manual_seed(7)
        for _ in range(30):
            x = torch.randn(8, 3)
            flat.zero_grad()
            network(x).square().mean((1, 2)).sum().backward()
            flat.clip_grad_norm_(0.5)
            optimizer.step()
        return {name: p.detach()[members.index(2)] for name, p in network.named_parameters()}

    alone = trained([2])
    for others in ([1, 2], [0, 1, 2, 3, 4]):
        together = trained(others)
        assert all(torch.equal(alone[name], together[name]) for name in alone)


# ----------------------------------------------------------------- leaving the buffer


LEAVING = {
    "cast": lambda m: m.double(),
    "assigned": lambda m: m.load_state_dict(mlp(1).state_dict(), assign=True),
    "replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(5, 3))),
    "grown": lambda m: m.append(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())
def test_an_optimizer_raises_once_the_network_has_left_the_buffer(leave: Any) -> None:
    network = mlp()
    flat = flatten_(network)
    optimizer = torch.optim.Adam(flat.parameters)
    leave(network)
    assert not flat.intact()
    before = values(network)
    for use in (optimizer.zero_grad, optimizer.step, lambda: flat.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"has left this flat buffer .* call flatten_ again"):
            use()
    assert values(network) == before
    again = flatten_(network)
    assert again is not flat
    assert again.intact()
    assert values(network) == before


@pytest.mark.parametrize("freeze_first", [True, False])
def test_an_optimizer_raises_where_a_parameter_was_frozen_or_unfrozen(freeze_first: bool) -> None:
    network = mlp()
    network[0].bias.requires_grad_(not freeze_first)
    flat = flatten_(network)
    optimizer = torch.optim.AdamW(flat.parameters, weight_decay=0.5)
    network(torch.ones(1, 3)).sum().backward()
    network[0].bias.requires_grad_(freeze_first)
    before = values(network)
    with pytest.raises(RuntimeError, match=r"'0\.bias' was frozen or unfrozen after flatten_"):
        optimizer.step()
    assert values(network) == before
    again = flatten_(network)
    assert again is not flat
    torch.optim.AdamW(again.parameters).step()


def test_freezing_for_a_while_is_fine() -> None:
    critic = mlp()
    flat = flatten_(critic)
    optimizer = torch.optim.SGD(flat.parameters, lr=0.1)
    critic.requires_grad_(False)
    optimizer.param_groups[0]["params"][0].grad = None
    critic.requires_grad_(True)
    critic(torch.ones(1, 3)).sum().backward()
    optimizer.step()


# --------------------------------------------------------------------------- refusals


def refusal(kind: str) -> nn.Module:
    network = mlp()
    if kind == "nothing":
        return nn.ReLU()
    if kind == "lazy":
        return nn.LazyLinear(2)
    if kind == "meta":
        network[2].to("meta")
    if kind == "sparse":
        network[2].weight = nn.Parameter(torch.eye(2, 5).to_sparse())
    if kind == "sharded":
        network[2].weight._local_tensor = network[2].weight.data  # type: ignore[attr-defined]
    if kind == "inferred":
        with torch.inference_mode():
            network[2].weight = nn.Parameter(torch.eye(2, 5))
    if kind == "computed":
        del network[2].weight
        network[2]._parameters["weight"] = torch.ones(2, 5, requires_grad=True) * 2  # type: ignore[assignment]
    if kind == "shared":
        network.append(nn.Linear(5, 2))
        network[3].weight.data = network[2].weight.data
    return network


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "ReLU has no parameters to flatten"),
        ("lazy", "cannot flatten: 'weight' is not initialised yet: run one batch"),
        ("meta", "cannot flatten: '2.weight' is on the meta device and has no values"),
        ("sparse", "cannot flatten: '2.weight' must be dense, got layout torch.sparse_coo"),
        ("sharded", r"cannot flatten: '2.weight' is sharded \(DTensor\)"),
        ("inferred", "cannot flatten: '2.weight' was made in inference mode"),
        ("computed", "cannot flatten: '2.weight' is computed from other tensors, not a leaf"),
        ("shared", "'2.weight' and '3.weight' share memory and are two Parameters"),
    ],
)
def test_what_cannot_be_flattened_is_said_and_nothing_is_moved(kind: str, message: str) -> None:
    network = refusal(kind)
    first = next(network.parameters(), None)
    where = None if first is None or kind == "lazy" else first.data_ptr()
    with pytest.raises(ValueError, match=message):
        flatten_(network)
    assert where is None or first.data_ptr() == where
    assert flat_of(network) is None


def test_members_must_be_the_leading_dimension_of_every_parameter() -> None:
    with pytest.raises(ValueError, match=r"'w1' must have a leading dimension of 3 members, got"):
        flatten_(Members(2), members=3)
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        flatten_(Members(2), members=0)


def test_a_members_row_holds_all_its_parameters() -> None:
    network = Members(4)
    flat = flatten_(network, members=4)
    with torch.no_grad():
        flat.parameters[0][2] = 0
    assert all((p[2] == 0).all() and (p[1] != 0).any() for p in network.parameters())


# ------------------------------------------------------------------ target and online


def test_a_target_takes_the_layout_of_its_online_network() -> None:
    online = mlp()
    flat = flatten_(online)
    target = TargetNetwork(online)
    ours = flat_of(target.module)
    assert ours is not None
    assert [*ours.layout.values()] == [*flat.layout.values()]
    assert ours.parameters == []


def test_a_twin_of_another_dtype_keeps_it() -> None:
    online = mlp()
    flatten_(online)
    target = TargetNetwork(online, target=mlp(1).bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in target.module.parameters())


def test_a_copy_of_a_plain_network_stays_plain() -> None:
    target = mlp()
    flatten_like_(target, mlp(1))
    assert flat_of(target) is None


@pytest.mark.parametrize("tau", [0.005, torch.tensor(0.005)], ids=["float", "tensor"])
@pytest.mark.parametrize("how", ["soft_update", "TargetNetwork"])
def test_two_flat_networks_update_in_one_kernel_without_allocating(how: str, tau: Any) -> None:
    online, target = mlp(), mlp(1)
    flatten_(online)
    if how == "soft_update":
        flatten_(target)

        def update() -> None:
            soft_update(target, online, tau)
    else:
        update = TargetNetwork(online, tau).update
    update()
    with counted() as calls:
        update()
    calls.pop("aten::detach", None)  # a look at tau, no memory and no kernel
    assert calls == {"aten::lerp_": 1}


def test_networks_of_other_layouts_update_all_the_same() -> None:
    online = mlp()
    flatten_(online)
    for target in (mlp(1), nn.Sequential(mlp(1))[0]):
        flatten_(target[0])  # a part of it is flat on its own
        soft_update(target, online, 1.0)
        assert values(target) == values(online)


def test_leaving_and_flattening_again_is_followed() -> None:
    online = mlp()
    flatten_(online)
    target = TargetNetwork(online, 0.5)
    online.double()
    target.update()
    assert target.module[0].weight.dtype == torch.float64
    flatten_(online)
    with torch.no_grad():
        online[0].weight.fill_(1.0)
        target.module[0].weight.fill_(0.0)
    target.update()
    assert (target.module[0].weight == 0.5).all()
    with counted() as calls:
        target.update()
    assert calls == {"aten::lerp_": 1}


def test_flattening_a_parent_takes_the_child_along() -> None:
    actor, critic = mlp(0), mlp(1)
    flat = flatten_(critic)
    whole = flatten_(nn.ModuleList([actor, critic]))
    assert whole.intact()
    assert not flat.intact()


shapes = st.lists(
    st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=40)
@given(
    shapes=shapes,
    tau=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_flat_networks_update_bit_for_bit_as_plain_ones(
    shapes: list[tuple[int, ...]], tau: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    online, target = (
        nn.ParameterDict({str(i): torch.randn(s, dtype=dtype) for i, s in enumerate(shapes)})
        for _ in range(2)
    )
    flat_online, flat_target = copy.deepcopy(online), copy.deepcopy(target)
    flatten_(flat_online)
    flatten_(flat_target)
    before = values(online)
    soft_update(target, online, tau)
    soft_update(flat_target, flat_online, tau)
    assert values(flat_target) == values(target)
    assert values(flat_online) == before
