"""Which tensor follows which: every refusal, and that it comes before the first write."""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from polyak_rl import TargetNetwork, flatten_, hard_update, soft_update
from polyak_rl.pairing import Watch, find_overlap, match, unwrap, walk


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Named(nn.Module):
    """Two layers of equal shapes under chosen names, registered in the order given."""

    def __init__(self, **values: float) -> None:
        super().__init__()
        for name, value in values.items():
            layer = nn.Linear(2, 2, bias=False)
            nn.init.constant_(layer.weight, value)
            self.add_module(name, layer)


class Tied(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2, bias=False)
        self.decoder = nn.Linear(2, 2, bias=False)
        self.decoder.weight = self.encoder.weight
        nn.init.constant_(self.encoder.weight, value)


class LocalDDP(DistributedDataParallel):
    """DistributedDataParallel without a process group: unwrapping goes by type alone."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def tensors_of(network: Any) -> list[Tensor]:
    if isinstance(network, nn.Module):
        return [*network.parameters(), *network.buffers()]
    return list(network.values()) if isinstance(network, dict) else list(network)


def bits(network: Any) -> list[bytes]:
    return [t.detach().contiguous().numpy().tobytes() for t in tensors_of(network)]


@contextmanager
def refused(message: str, *untouched: Any, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises, the text matches, and no bit of the networks has changed."""
    before = [bits(network) for network in untouched]
    with pytest.raises(error, match=message):
        yield
    assert [bits(network) for network in untouched] == before


# ------------------------------------------------------------------------------ names


def test_modules_pair_by_name_whatever_the_order_of_registration() -> None:
    target, online = Named(actor=0.0, critic=0.0), Named(critic=2.0, actor=1.0)
    soft_update(target, online, 0.5)
    assert target.get_submodule("actor").weight[0, 0] == 0.5
    assert target.get_submodule("critic").weight[0, 0] == 1.0


def test_mappings_pair_by_name_whatever_their_order() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    soft_update(target, {"b": torch.full((2,), 2.0), "a": torch.ones(2)}, 0.5)
    assert target["a"].tolist() == [0.5, 0.5]
    assert target["b"].tolist() == [1.0, 1.0]


def test_a_missing_and_an_extra_name_are_both_said() -> None:
    target, online = Named(a=0.0, b=0.0), Named(a=1.0, c=1.0)
    with refused(r"online lacks 'b.weight' and target lacks 'c.weight'", target, online):
        soft_update(target, online)


def test_a_longer_online_network_is_refused_and_not_cut_off() -> None:
    target, online = mlp(), mlp(1).append(nn.Linear(2, 2))
    with refused(r"target lacks '3.weight', '3.bias'", target, online):
        soft_update(target, online)


def test_many_missing_names_are_counted() -> None:
    target = {str(i): torch.zeros(1) for i in range(9)}
    with refused(r"online lacks '0', '1', '2', '3', '4' and 4 more", target):
        soft_update(target, {"x": torch.ones(1)})


def test_an_empty_match_is_refused_by_name_and_a_no_op_by_position() -> None:
    with pytest.raises(ValueError, match="nothing to update"):
        soft_update({}, {})
    with pytest.raises(ValueError, match="nothing to update"):
        soft_update(nn.ReLU(), nn.ReLU())
    soft_update([], [])


def test_names_must_be_strings() -> None:
    with pytest.raises(TypeError, match=r"names of online must be strings, got 3"):
        soft_update({"a": torch.zeros(1)}, {3: torch.zeros(1)})  # type: ignore[dict-item]


def test_an_exclude_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exclude pattern 'encodr\.\*' matches no tensor; the na"):
        match(mlp(), mlp(1), ["encodr.*"])


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to update"):
        match(mlp(), mlp(1), ["*"])


# --------------------------------------------------------------------------- wrappers


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def nested(module: nn.Module) -> nn.Module:
    assert isinstance(module, nn.Sequential)
    module[0] = compiled(module[0])
    return module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compiled submodule": nested,
    "DDP": LocalDDP,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "compile of DDP": lambda module: compiled(LocalDDP(module)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_looked_through_on_either_side(wrap: Callable[[nn.Module], nn.Module]) -> None:
    names = [entry.name for entry in walk(mlp())]
    for target, online in ((mlp(), wrap(mlp(1))), (wrap(mlp()), mlp(1))):
        assert [pair.name for pair in match(target, online)] == names
        soft_update(target, online, 1.0)
        ours, theirs = ([e.tensor for e in walk(network)] for network in (target, online))
        assert all(map(torch.equal, ours, theirs))


def test_a_wrapper_is_known_by_its_type_and_not_by_its_attribute() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    owner = Owner()
    assert unwrap(owner) is owner
    assert [entry.name for entry in walk(owner)] == ["module.weight", "module.bias"]
    assert unwrap(LocalDDP(owner)) is owner


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "module.module."]
)
def test_the_prefixes_of_wrappers_are_stripped_from_plain_mappings(prefix: str) -> None:
    target = {name: torch.zeros_like(t) for name, t in mlp().state_dict().items()}
    online = {prefix + name: torch.ones_like(t) for name, t in target.items()}
    soft_update(target, online, 0.5)
    assert all((t == 0.5).all() for t in target.values())
    soft_update(online, target, 1.0)
    assert all((t == 0.5).all() for t in online.values())


def test_a_private_prefix_is_stripped_in_the_middle_of_a_name_too() -> None:
    target = {"net.0.weight": torch.zeros(1)}
    soft_update(target, {"net._fsdp_wrapped_module.0._orig_mod.weight": torch.ones(1)}, 0.5)
    assert target["net.0.weight"].item() == 0.5


def test_a_child_called_module_keeps_its_name_beside_a_wrapped_twin() -> None:
    plain = {"module.weight": torch.zeros(1), "module.bias": torch.zeros(1)}
    wrapped = {f"module.{name}": torch.ones(1) for name in plain}
    soft_update(plain, wrapped, 0.5)
    assert [t.item() for t in plain.values()] == [0.5, 0.5]
    soft_update(wrapped, plain, 0.5)
    assert [t.item() for t in wrapped.values()] == [0.75, 0.75]


def test_module_is_no_prefix_unless_every_name_starts_with_it() -> None:
    target = {"module.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    online = {"weight": torch.ones(1), "head.weight": torch.ones(1)}
    with refused("online lacks 'module.weight'", target, online):
        soft_update(target, online)


def test_two_names_that_become_one_are_refused() -> None:
    target = {"a": torch.zeros(1)}
    online = {"_orig_mod.a": torch.ones(1), "a": torch.full((1,), 2.0)}
    with refused(r"online names '_orig_mod.a' and 'a' are one name \('a'\)", target, online):
        soft_update(target, online)


# ------------------------------------------------------------ shapes, devices, numbers


@pytest.mark.parametrize(
    ("ours", "theirs"), [((4, 1), (4,)), ((2, 3), (1, 3)), ((1,), ()), ((2,), (3,))]
)
def test_a_shape_that_would_broadcast_is_refused(
    ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    target = {"ok": torch.zeros(2), "w": torch.zeros(ours)}
    online = {"ok": torch.ones(2), "w": torch.ones(theirs)}
    with refused(r"'w' must have one shape, got \(.*\) in target and \(.*\) in online", target):
        soft_update(target, online)
    with refused(r"'\[1\]' must have one shape", target):
        soft_update(target.values(), online.values())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
        (torch.float32, torch.complex64),
        (torch.bool, torch.int64),
        (torch.int32, torch.int64),
    ],
)
def test_another_kind_of_number_is_refused(ours: torch.dtype, theirs: torch.dtype) -> None:
    target = {"w": torch.zeros(2, dtype=ours)}
    with refused(f"'w' must hold one kind of number, got {ours} in target and {theirs}", target):
        soft_update(target, {"w": torch.ones(2, dtype=theirs)})


def test_a_tensor_without_values_is_refused() -> None:
    target = {"ok": torch.zeros(1), "w": torch.zeros(2)}
    ok = torch.ones(1)
    with refused("'w' must be on one device, got cpu in target and meta in online", target):
        soft_update(target, {"ok": ok, "w": torch.ones(2, device="meta")})
    with refused(
        "'w' must be dense, got torch.strided in target and torch.sparse_coo in online", target
    ):
        soft_update(target, {"ok": ok, "w": torch.ones(2).to_sparse()})
    with refused("'w' is on the meta device and has no values"):
        soft_update({"w": torch.ones(1, device="meta")}, {"w": torch.ones(1, device="meta")})


def test_a_lazy_layer_asks_for_a_batch_first() -> None:
    with pytest.raises(ValueError, match="'weight' is not initialised yet: run one batch"):
        soft_update(nn.LazyLinear(2), nn.Linear(3, 2))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_line_that_works() -> None:
    target, online = torch.jit.script(mlp()), torch.jit.script(mlp(1))
    with pytest.raises(ValueError, match=r"is TorchScript, .* give dict\(network.named_parameters"):
        soft_update(target, online)
    soft_update(dict(target.named_parameters()), dict(online.named_parameters()), 1.0)
    assert torch.equal(next(target.parameters()), next(online.parameters()))


@pytest.mark.parametrize("buffers", ["keep", {"x": "keep"}])
def test_a_buffer_that_grows_late_may_if_it_is_kept(buffers: Any) -> None:
    def network(x: float) -> nn.Module:
        module = nn.BatchNorm1d(2)
        module.register_buffer("x", torch.full((1,), x))
        return module

    target, online = network(0.0), network(1.0)
    follower = TargetNetwork(online, 0.5, buffers=buffers)
    for _ in range(2):
        soft_update(target, online, 0.5, buffers=buffers)
        follower.update()
        online.x = torch.ones(3)
        nn.init.constant_(online.weight, 2.0)
    assert target.x.tolist() == [0.0]
    assert follower.module.x.tolist() == [1.0]
    assert target.weight.tolist() == follower.module.weight.tolist() == [1.5, 1.5]
    with refused("'x' must have one shape", target, online):
        soft_update(target, online)


def test_a_mapping_in_a_mapping_is_refused_with_the_line_that_works() -> None:
    class TensorDict(dict[str, Any]):  # what TorchRL's has of it
        def flatten_keys(self, separator: str) -> dict[str, Any]:
            return {f"{a}{separator}{b}": x for a, inner in self.items() for b, x in inner.items()}

    target = TensorDict(actor={"w": torch.zeros(1)})
    online = TensorDict(actor={"w": torch.ones(1)})
    message = r"target\['actor'\] must be a tensor, got dict: give target.flatten_keys\('.'\)"
    with pytest.raises(TypeError, match=message):
        soft_update(target, online)
    soft_update(target.flatten_keys("."), online.flatten_keys("."), 0.5)
    assert target["actor"]["w"].item() == 0.5
    with pytest.raises(TypeError, match="got dict: give one level"):
        soft_update(dict(target), dict(online))


def test_networks_are_told_apart_by_identity_whatever_their_equality_says() -> None:
    class Odd(nn.Linear):
        __hash__ = nn.Module.__hash__

        def __eq__(self, other: object) -> Any:
            return torch.ones(2)  # no bool, as of TorchRL's TensorDictParams

    class Equal(nn.Linear):
        def __hash__(self) -> int:
            return 0

        def __eq__(self, other: object) -> bool:
            return True

    for kind in (Odd, Equal):
        targets, online = (
            [nn.Sequential(kind(1, 1, bias=False)) for _ in range(2)],
            kind(1, 1, False),
        )
        nn.init.constant_(online.weight, 1.0)
        around = nn.Sequential(online)
        for target in (*targets, *[t[0] for t in targets]):
            nn.init.zeros_(next(target.parameters()))
            for _ in range(2):
                soft_update(target, around if isinstance(target, nn.Sequential) else online, 0.5)
            assert next(target.parameters()).item() == 0.75
        targets[0][0] = kind(1, 1, bias=False)  # one that is equal, and another
        nn.init.zeros_(targets[0][0].weight)
        soft_update(targets[0], around, 0.5)
        assert targets[0][0].weight.item() == 0.5
        flatten_(online)
        soft_update(targets[0][0], online, 0.5)
        assert targets[0][0].weight.item() == 0.75


def test_a_sharded_tensor_pairs_with_a_sharded_one_only() -> None:
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    online.weight._local_tensor = online.weight.data  # type: ignore[attr-defined]
    with refused("'weight' must be sharded in both networks or in neither", target, online):
        soft_update(target, online)


# --------------------------------------------------------------------------- sequences


def test_generators_pair_by_position() -> None:
    target, online = mlp(), mlp(1)
    old = [p.detach().clone() for p in target.parameters()]
    soft_update(target.parameters(), online.parameters(), 0.5)
    for new, was, to in zip(target.parameters(), old, online.parameters(), strict=True):
        torch.testing.assert_close(new, (was + to) / 2)


def test_sequences_of_other_lengths_are_refused_and_not_cut_off() -> None:
    target, online = [torch.zeros(1)], [torch.ones(1), torch.ones(1)]
    with refused("must have as many tensors, got 1 and 2", target, online):
        soft_update(target, online)
    with refused("must have as many tensors, got 0 and 2", online):
        soft_update([], online)


def test_an_argument_that_is_no_network_is_refused() -> None:
    target = mlp()
    with refused("both have names .* got Sequential and list", target, error=TypeError):
        soft_update(target, list(mlp(1).parameters()))
    with refused(r"target must be a module, a mapping .* got Tensor", error=TypeError):
        soft_update(torch.zeros(1), [torch.ones(1)])
    with refused("online must be a module, .* got int", error=TypeError):
        soft_update([], 3)  # type: ignore[arg-type]
    with refused(r"online\[0\] must be a tensor, got Linear", error=TypeError):
        soft_update([torch.zeros(1)], [nn.Linear(1, 1)])  # type: ignore[list-item]
    with refused(r"target\['w'\] must be a tensor, got float", error=TypeError):
        soft_update({"w": 0.5}, {"w": torch.ones(1)})  # type: ignore[dict-item]


# --------------------------------------------------------- ties, memory and direction


@pytest.mark.parametrize("kind", ["modules", "mappings", "sequences"])
def test_a_tied_tensor_moves_once(kind: str) -> None:
    target, online = Tied(0.0), Tied(1.0)  # walked twice, 0 -> .1 -> .19
    if kind == "modules":
        soft_update(target, online, 0.1)
    elif kind == "mappings":
        soft_update(target.state_dict(), online.state_dict(), 0.1)
    else:
        soft_update(target.state_dict().values(), online.state_dict().values(), 0.1)
    assert target.encoder.weight[0, 0].item() == pytest.approx(0.10, abs=1e-7)
    assert target.decoder.weight is target.encoder.weight


def test_a_tie_that_online_does_not_have_is_refused() -> None:
    target, online = Tied(0.0), Named(encoder=1.0, decoder=2.0)
    with refused("'encoder.weight' and 'decoder.weight' are one tensor, but online has", target):
        soft_update(target, online)


def test_a_tie_of_online_alone_moves_both_tensors() -> None:
    target, online = Named(encoder=0.0, decoder=0.0), Tied(1.0)
    soft_update(target, online, 0.1)
    assert all(t[0, 0] == torch.tensor(0.1) for t in target.parameters())


@pytest.mark.parametrize("kind", ["module", "wrapped", "mapping", "sequence"])
def test_one_object_as_both_arguments_is_refused(kind: str) -> None:
    network = mlp()
    both = {
        "module": (network, network),
        "wrapped": (network, LocalDDP(network)),
        "mapping": (network.state_dict(),) * 2,
        "sequence": (list(network.parameters()),) * 2,
    }[kind]
    with refused("target and online are the same", network):
        soft_update(*both)


def test_a_target_that_shares_storage_with_online_is_refused() -> None:
    online = mlp()
    target = mlp(1)
    target[2].weight = online[2].weight
    with refused("target '2.weight' shares memory with online '2.weight'", target, online):
        soft_update(target, online)
    with refused(r"target '\[(\d)\]' shares memory with online '\[\1\]'", online):
        soft_update([p.data for p in online.parameters()], online.parameters())


def test_memory_is_compared_by_bytes_and_not_by_names_or_storages() -> None:
    memory = torch.zeros(12)
    with refused("target 'a' shares memory with online 'b'", [memory]):
        soft_update({"a": memory[:4], "b": torch.zeros(4)}, {"a": torch.ones(4), "b": memory[3:7]})
    array = np.zeros(12, dtype=np.float32)  # two storages over one array
    with refused(r"shares memory", [torch.from_numpy(array)]):
        soft_update([torch.from_numpy(array[:8])], [torch.from_numpy(array[4:])])
    soft_update([memory[:4]], [memory[4:8]], 0.5)  # side by side in one storage is fine


def test_columns_that_interleave_are_apart_and_columns_that_meet_are_not() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    soft_update([table[:, :2]], [table[:, 2:]], 1.0)
    assert table[:, :2].tolist() == table[:, 2:].tolist()
    with refused("shares memory", [table]):
        soft_update([table[:, :3]], [table[:, 1:]], 1.0)


def test_a_target_that_overlaps_itself_is_refused() -> None:
    one = torch.zeros(1)
    with refused(r"target '\[0\]' and '\[0\]' overlap in memory", [one]):
        soft_update([one.expand(4)], [torch.ones(4)])
    row = torch.zeros(5)
    with refused(r"target '\[0\]' and '\[1\]' overlap in memory", [row]):
        soft_update([row[:3], row[2:]], [torch.ones(3), torch.ones(3)])


def test_an_expanded_online_tensor_is_only_read_and_welcome() -> None:
    target = torch.zeros(4)
    soft_update([target], [torch.ones(1).expand(4)], 0.5)
    assert target.tolist() == [0.5] * 4


def test_swapped_arguments_are_noticed() -> None:
    target, online = mlp().requires_grad_(False), mlp(1)
    online(torch.ones(1, 3)).sum().backward()
    with refused("target '0.weight' has a gradient, and online is frozen .* swapped", online):
        soft_update(online, target)
    with refused("swapped", online):
        soft_update(online.parameters(), target.parameters())
    hard_update(online, target)  # a copy back is no average in the wrong direction
    with refused("swapped", online):
        soft_update(online, target)
    soft_update(target, online)  # the right way round


def test_a_critic_frozen_for_the_actors_step_moves_a_target_that_never_was() -> None:
    online = mlp()
    target = copy.deepcopy(online)
    online(torch.ones(1, 3)).sum().backward()
    online.requires_grad_(False)
    exact = [
        t.detach().lerp(o, 0.5) for t, o in zip(tensors_of(target), tensors_of(mlp(1)), strict=True)
    ]
    online.load_state_dict(mlp(1).state_dict())
    soft_update(target, online, 0.5)
    assert all(map(torch.equal, tensors_of(target), exact))
    soft_update(target.parameters(), online.parameters(), 0.5)


def test_a_network_may_be_set_back_to_its_target() -> None:
    online = mlp()
    target = TargetNetwork(online, 0.5)
    before = bits(target.module)
    online(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(online.parameters(), 0.1).step()
    hard_update(online, target.module)
    assert bits(online) == before


def test_two_networks_that_both_train_or_both_do_not_are_welcome() -> None:
    soft_update(mlp(), mlp(1))
    soft_update(mlp().requires_grad_(False), mlp(1).requires_grad_(False))


def test_what_is_only_compared_may_share_memory_and_keeps_its_tied_names() -> None:
    names = [pair.name for pair in match(Tied(), Tied(), writes=False)]
    assert names == ["encoder.weight", "decoder.weight"]
    state = mlp().state_dict()
    assert len(match(state, dict(state), writes=False)) == 4


views = st.tuples(
    st.integers(0, 10), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 7)), max_size=2)
)


@settings(deadline=None, max_examples=200)
@given(written=st.lists(views, min_size=1, max_size=3), read=st.lists(views, max_size=3))
def test_overlap_is_found_exactly_where_two_tensors_share_a_byte(
    written: list[Any], read: list[Any]
) -> None:
    memory = torch.arange(64)

    def view(offset: int, dims: list[tuple[int, int]]) -> Tensor:
        return memory.as_strided([n for n, _ in dims], [s for _, s in dims], offset)

    ours, theirs = ([view(*v) for v in group] for group in (written, read))
    cells = [x for t in ours for x in t.flatten().tolist()]
    shared = len(set(cells)) < len(cells) or any(
        x in cells for t in theirs for x in t.flatten().tolist()
    )
    found = find_overlap([("", t) for t in ours], [("", t) for t in theirs])
    assert (found is not None) == shared


# ------------------------------------------------------------------------------ watch


def replace(module: nn.Module, name: str, value: float = 0.0) -> None:
    setattr(module, name, nn.Parameter(torch.full_like(getattr(module, name), value)))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "double": lambda m: m.double(),
    "data": lambda m: setattr(m[0].weight, "data", torch.zeros(4, 3)),
    "assign": lambda m: m.load_state_dict(mlp(1).state_dict(), assign=True),
    "a parameter replaced": lambda m: replace(m[0], "weight"),
    "a parameter of one element replaced by an equal one": lambda m: replace(m[4], "bias"),
    "a parameter set to None": lambda m: setattr(m[0], "bias", None),
    "a parameter deleted": lambda m: delattr(m[0], "bias"),
    "a missing bias added": lambda m: setattr(m[3], "bias", nn.Parameter(torch.zeros(2))),
    "a parameter added to a layer without any": lambda m: m[1].register_parameter(
        "scale", nn.Parameter(torch.ones(1))
    ),
    "a buffer added": lambda m: m[0].register_buffer("count", torch.zeros(1)),
    "a layer added": lambda m: m.append(nn.ReLU()),
    "a layer replaced": lambda m: m.__setitem__(1, nn.Tanh()),
    "a layer deleted": lambda m: m.__delitem__(4),
}


def watched() -> nn.Sequential:
    network = mlp().append(nn.Linear(2, 2, bias=False)).append(nn.Linear(2, 1))
    nn.init.zeros_(network[4].bias)
    return network


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_watch_notices_each_way_of_changing_a_network(
    change: Callable[[nn.Sequential], object],
) -> None:
    network = watched()
    if change is CHANGES["assign"]:
        network = mlp()
    watch = Watch(mlp(1), network)
    assert watch.intact()
    change(network)
    assert not watch.intact()


def test_a_watch_lets_values_modes_and_gradients_change() -> None:
    network = watched()
    watch = Watch(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    network.load_state_dict(watched().state_dict())
    network.eval().requires_grad_(False).zero_grad()
    network[0].weight.data.fill_(math.nan)
    assert watch.intact()


def test_a_watch_sees_inside_wrappers() -> None:
    inner = mlp()
    watch = Watch(nn.Sequential(OrderedDict(net=LocalDDP(inner))))
    replace(inner[0], "weight")
    assert not watch.intact()


def test_the_library_imports_neither_the_compiler_nor_distributed_tensors() -> None:
    import subprocess

    code = (
        "import sys, torch; before = set(sys.modules); import polyak_rl\n"
        "new = set(sys.modules) - before\n"
        "sys.exit(any(m.startswith(('torch._dynamo', 'torch.distributed.tensor')) for m in new))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
