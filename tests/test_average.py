import copy
import math

import pytest
import torch
from torch import nn

from polyak_rl import (
    AverageBank,
    Ema,
    Polynomial,
    Power,
    Tail,
    Uniform,
    Warmup,
    Window,
    flatten_,
    refresh_batch_norm,
)

RULES = {
    "uniform": Uniform(),
    "late": Uniform(start=70),
    "ema": Ema(half_life=9.0),
    "debiased": Ema(tau=0.02, debias=True),
    "polynomial": Polynomial(gamma=3),
    "power": Power(sigma_rel=0.1),
    "window": Window(size=4, every=10),
    "warmup": Warmup(tau=0.1),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def walk(module, generator, scale=0.1):
    """One random gradient step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def snapshot(module):
    return {name: p.detach().double().clone() for name, p in module.named_parameters()}


def oracle(rule, iterates, every):
    """The average in float64 from every iterate that was kept."""
    weights = rule.weights(len(iterates), every)
    names = iterates[0]
    return {n: sum(w * x[n] for w, x in zip(weights, iterates, strict=True)) for n in names}


def same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


@pytest.mark.parametrize("every", [1, 7, 100])
@pytest.mark.parametrize("flat", [False, True])
def test_each_rule_equals_an_oracle_that_keeps_every_iterate(every, flat):
    policy, generator = network(), torch.Generator().manual_seed(1)
    if flat:
        flatten_(policy)
    bank, iterates = AverageBank(policy, RULES, every=every), []
    for step in range(1, 45 * every + 1):
        walk(policy, generator, 0.1)
        bank.update()
        if step % every == 0:
            iterates.append(snapshot(policy))
            if len(iterates) in (1, 2, 31, 33, 45):
                for name, rule in RULES.items():
                    same(bank.average(name), oracle(rule, iterates, every), rtol=1e-12, atol=1e-12)


def test_a_long_uniform_average_does_not_stall():
    """Weights drift by 2 % over a million iterates; a float32 mean would lose the whole drift."""
    policy = nn.Linear(1, 1, bias=False)
    bank = AverageBank(policy, {"uniform": Uniform()})
    n = 1_000_000
    drift = (1 + 0.02 * torch.arange(1, n + 1, dtype=torch.float64) / n).float()
    weight = policy.weight.detach()
    for x in drift:
        weight.copy_(x)
        bank.update()
    total = drift.double().sum().item()
    assert bank.average("uniform")["weight"].item() == pytest.approx(total / n, rel=1e-12)
    stalled = torch.ones(())
    for k, x in enumerate(drift, 1):
        stalled += (x - stalled) / k
    assert abs(stalled.item() - total / n) > 1e-3  # what float32 gives


def test_compensated_float32_is_as_good_as_its_result_can_hold():
    policy, generator = network(), torch.Generator().manual_seed(1)
    rules = {"uniform": Uniform(), "ema": Ema(half_life=300.0), "late": Uniform(start=1000)}
    exact = AverageBank(policy, rules)
    compensated = AverageBank(policy, rules, compensated=True)
    for _ in range(3000):
        walk(policy, generator, 1e-3)
        exact.update()
        compensated.update()
    for name in rules:
        ours = compensated.average(name)
        assert all(tensor.dtype == torch.float32 for tensor in ours.values())
        theirs = {key: tensor.float() for key, tensor in exact.average(name).items()}
        same(ours, theirs, rtol=3e-7, atol=3e-8)


def test_training_with_the_bank_on_is_the_same_bit_for_bit():
    def train(averaging):
        torch.manual_seed(3)
        policy = network()
        optimizer = torch.optim.Adam(policy.parameters())
        bank = AverageBank(policy, RULES) if averaging else None
        for _ in range(60):
            loss = policy(torch.randn(8, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if bank:
                bank.update()
                with bank.applied("ema"):
                    policy(torch.ones(1, 3))
        return [p.detach() for p in policy.parameters()], torch.rand(1)

    on, off = train(True), train(False)
    assert all(torch.equal(a, b) for a, b in zip(on[0], off[0], strict=True))
    assert torch.equal(on[1], off[1])


@pytest.mark.parametrize("t0", [0, 3, 20])
def test_uniform_reproduces_the_average_of_torch_asgd(t0):
    policy = network().double()
    optimizer = torch.optim.ASGD(policy.parameters(), lr=0.05, t0=t0)
    bank = AverageBank(policy, {"uniform": Uniform(start=t0 + 1)})
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        policy(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        bank.update()
    ax = {name: optimizer.state[p]["ax"] for name, p in policy.named_parameters()}
    # torch keeps its weight 1 / k in float32
    same(bank.average("uniform"), ax, rtol=1e-6, atol=1e-8)


def test_rules_reproduce_swa_and_ema_of_averaged_model():
    policy, generator = network().double(), torch.Generator().manual_seed(5)
    swa = torch.optim.swa_utils.AveragedModel(policy)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    ema = torch.optim.swa_utils.AveragedModel(policy, multi_avg_fn=decay)
    bank = AverageBank(policy, {"swa": Uniform(), "ema": Ema(tau=0.1)})
    for _ in range(40):
        walk(policy, generator)
        swa.update_parameters(policy)
        ema.update_parameters(policy)
        bank.update()
    for name, model in (("swa", swa), ("ema", ema)):
        same(bank.average(name), snapshot(model.module), rtol=1e-12, atol=1e-14)


def test_debiased_ema_has_the_numbers_of_optax():
    policy = nn.Linear(1, 1, bias=False)
    bank, seen = AverageBank(policy, {"ema": Ema(tau=0.1, debias=True)}), []
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(policy.weight, value)
        bank.update()
        seen.append(bank.average("ema")["weight"].item())
    assert seen == pytest.approx([1, 1.526316, 2.070111], abs=5e-7)


def test_updates_count_at_the_clock_that_is_stated():
    policy = nn.Linear(1, 1, bias=False)
    bank = AverageBank(policy, {"uniform": Uniform()}, every=10)
    for i in range(2000):
        nn.init.constant_(policy.weight, float(i))
        bank.update()
    assert bank.average("uniform")["weight"].item() == pytest.approx(1004.0)  # of 9, 19, ...


def test_before_the_first_update_an_average_is_the_network():
    policy = network()
    bank = AverageBank(policy, {"uniform": Uniform(), "window": Window(3, 2)}, every=5)
    same(bank.average("uniform"), {n: p.detach() for n, p in policy.named_parameters()})


def test_an_average_that_restarts_forgets_a_nan():
    policy, generator = network(), torch.Generator().manual_seed(0)
    bank = AverageBank(policy, {"late": Uniform(start=40), "window": Window(1, 10)})
    with torch.no_grad():
        policy[0].weight.fill_(math.nan)
    bank.update()
    bank.average("late")  # takes the NaN in
    with torch.no_grad():
        policy[0].weight.fill_(1.0)
    for _ in range(60):
        walk(policy, generator)
        bank.update()
    assert all(t.isfinite().all() for name in bank.rules for t in bank.average(name).values())


def trained(rules=None):
    policy, generator = network(), torch.Generator().manual_seed(2)
    bank = AverageBank(policy, rules or {"uniform": Uniform(), "ema": Ema(tau=0.1)})
    for _ in range(20):
        walk(policy, generator)
        bank.update()
    return policy, bank


def test_the_weights_come_back_bit_for_bit():
    policy, bank = trained()
    before = [p.detach().clone() for p in policy.parameters()]
    average = bank.average("uniform")
    with bank.applied("uniform") as inside:
        assert inside is policy
        for name, p in policy.named_parameters():
            assert torch.equal(p, average[name].float())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_swaps_nest_and_unwind_in_order():
    policy, bank = trained()
    other = AverageBank(policy, {"newest": Ema(tau=1.0)})
    other.update()
    before = copy.deepcopy(policy.state_dict())
    with bank.applied("uniform"):
        outer = copy.deepcopy([*policy.parameters()])
        with (
            bank.applied("ema"),
            other.applied("newest"),
            pytest.raises(RuntimeError, match=r"state_dict\(\) inside applied\(\)"),
        ):
            policy.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(outer, policy.parameters(), strict=True))
    same(policy.state_dict(), before, rtol=0, atol=0)


def test_the_weights_come_back_after_an_exception():
    policy, bank = trained()
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(ZeroDivisionError), bank.applied("ema"):
        raise ZeroDivisionError
    same(policy.state_dict(), before, rtol=0, atol=0)
    bank.update()  # and the bank goes on


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer_step_inside_is_refused(flat):
    policy, bank = trained()
    parameters = flatten_(policy).parameters if flat else policy.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    policy(torch.ones(1, 3)).sum().backward()
    with bank.applied("ema"):
        with pytest.raises(RuntimeError, match=r"inside applied\(\)"):
            optimizer.step()
        elsewhere = nn.Linear(1, 1)
        elsewhere(torch.ones(1, 1)).sum().backward()
        torch.optim.SGD(elsewhere.parameters(), lr=1.0).step()  # other weights are free
    optimizer.step()


def test_updating_a_bank_inside_is_refused():
    policy, bank = trained()
    other = AverageBank(policy, {"uniform": Uniform()})
    with bank.applied("ema"):
        for each in (bank, other):
            with pytest.raises(RuntimeError, match=r"update\(\) inside applied\(\)"):
                each.update()
    assert (bank.clock, other.clock) == (20, 0)


def test_states_of_whatever_holds_a_swapped_tensor_are_refused_inside():
    policy, bank = trained()
    tied = nn.Linear(3, 4)
    tied.weight = policy[0].weight
    critic = nn.Sequential(policy[0], nn.Linear(4, 1))  # which shares the encoder
    agent = nn.ModuleDict({"policy": policy, "critic": critic})
    elsewhere = nn.Linear(2, 1)
    before = copy.deepcopy(agent.state_dict())
    with bank.applied("uniform"):
        for module in (
            policy,
            policy[0],
            agent,
            critic,
            tied,
            torch.compile(policy, backend="eager"),
        ):
            refused = pytest.raises(RuntimeError, match=r"average\(name\) and module\(name\)")
            with refused:
                module.state_dict()
            with refused:
                module.load_state_dict({})
        elsewhere.load_state_dict(elsewhere.state_dict())
    same(agent.state_dict(), before, rtol=0, atol=0)


def test_a_compiled_network_is_swapped_too():
    policy = network()
    compiled = torch.compile(policy, backend="eager")
    bank = AverageBank(compiled, {"uniform": Uniform()})
    x = torch.ones(2, 3)
    compiled(x)
    bank.update()
    first = policy(x)
    walk(policy, torch.Generator().manual_seed(0), 1.0)
    with bank.applied("uniform"):
        torch.testing.assert_close(compiled(x), first)
    assert not torch.allclose(compiled(x), first)


def test_a_network_that_moves_meanwhile_gets_its_weights_back():
    policy, bank = trained()
    before = copy.deepcopy(policy.state_dict())
    with bank.applied("uniform"):
        policy.double()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name].double())
    bank.update()


def test_a_network_that_is_flattened_or_reassigned_is_followed():
    policy, bank = trained({"uniform": Uniform()})
    mean = bank.average("uniform")
    flatten_(policy)
    bank.update()
    state = {name: torch.zeros_like(tensor) for name, tensor in policy.state_dict().items()}
    last = snapshot(policy)
    policy.load_state_dict(state, assign=True)
    bank.update()
    expected = {name: (mean[name] * 20 + last[name]) / 22 for name in mean}
    same(bank.average("uniform"), expected, rtol=1e-12, atol=1e-14)


def test_a_network_of_other_shapes_is_refused():
    policy, bank = trained()
    policy[2] = nn.Linear(5, 3)
    with pytest.raises(ValueError, match=r"2\.bias"):
        bank.update()


def test_module_is_independent_and_copy_to_writes():
    _, bank = trained()
    twin, other = bank.module("uniform"), network(9)
    bank.copy_to("uniform", other)
    for name, tensor in bank.average("uniform").items():
        assert torch.equal(twin.get_parameter(name), tensor.float())
        assert torch.equal(other.get_parameter(name), tensor.float())
    walk(twin, torch.Generator(), 1.0)
    assert not torch.equal(twin[0].weight, bank.module("uniform")[0].weight)
    with pytest.raises(ValueError, match="same tensor names"):
        bank.copy_to("uniform", nn.Linear(3, 5))


def test_a_network_that_cannot_be_copied_is_told_what_to_do_instead():
    policy = network()
    bank = AverageBank(policy, {"uniform": Uniform()})
    policy.activation = policy(torch.ones(1, 3))  # no leaf of a graph
    with pytest.raises(ValueError, match=r"Sequential cannot be deep-copied .* copy_to"):
        bank.module("uniform")


def test_tied_weights_are_averaged_once():
    policy = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    policy[1].weight = policy[0].weight
    bank = AverageBank(policy, {"ema": Ema(tau=0.1)})
    for value in (0.0, 1.0):
        nn.init.constant_(policy[0].weight, value)
        bank.update()
    assert bank.average("ema")["0.weight"].unique().item() == pytest.approx(0.1)
    twin = bank.module("ema")
    assert twin[0].weight is twin[1].weight


@pytest.mark.parametrize(
    ("buffers", "mean"), [("copy", 2.0), ("average", 1.0), ({"0.running_mean": "average"}, 1.0)]
)
def test_buffers_follow_their_policy(buffers, mean):
    policy = nn.Sequential(nn.BatchNorm1d(1))
    bank = AverageBank(policy, {"uniform": Uniform()}, buffers=buffers)
    for value in (0.0, 2.0):
        policy[0].running_mean.fill_(value)
        policy[0].num_batches_tracked.add_(1)
        bank.update()
    twin = bank.module("uniform")
    assert twin[0].running_mean.item() == mean
    assert twin[0].num_batches_tracked.item() == 2


def test_batch_norm_statistics_are_recomputed_for_an_average():
    policy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    batches = [torch.randn(16, 2, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    refresh_batch_norm(policy, batches)
    expected = torch.stack([policy[0](x).mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(policy[1].running_mean, expected)
    assert policy.training
    assert policy[2].training
    assert policy[1].momentum == 0.1
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        refresh_batch_norm(policy, [])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        refresh_batch_norm(policy, [batches[0], torch.ones(4, 3)])
    same(policy.state_dict(), before, rtol=0, atol=0)
    assert policy[1].momentum == 0.1


def test_a_batch_gives_its_input_also_where_forward_could_do_without():
    class Lenient(nn.BatchNorm1d):
        def forward(self, input=None):
            return super().forward(input)

    norm = Lenient(1)
    refresh_batch_norm(norm, [(torch.full((4, 1), 3.0), torch.zeros(4))])
    assert norm.running_mean.item() == 3.0


def test_a_loader_of_inputs_and_labels_gives_what_torch_s_update_bn_gives():
    policy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    data = torch.utils.data.TensorDataset(torch.randn(40, 2), torch.arange(40))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    theirs = copy.deepcopy(policy)
    torch.optim.swa_utils.update_bn(loader, theirs)
    refresh_batch_norm(policy, loader)
    same(policy.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("extra", [(), (torch.zeros(4),)])
def test_a_network_of_two_inputs_gets_both(extra):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, obs, action, state=None):
            assert state is None
            return self.norm(torch.cat([obs, action], 1))

    critic = Critic()
    refresh_batch_norm(critic, [(torch.full((4, 2), 2.0), torch.full((4, 1), 3.0), *extra)])
    assert critic.norm.running_mean.tolist() == [2.0, 2.0, 3.0]


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("stop", [0, 13, 40])
def test_a_saved_bank_goes_on_where_it_was(stop, compensated, tmp_path):
    def run(until, policy, bank):
        while bank.clock < until:
            walk(policy, torch.Generator().manual_seed(bank.clock))
            bank.update()

    policy = network()
    bank = AverageBank(policy, RULES, every=3, compensated=compensated)
    run(stop, policy, bank)
    torch.save((bank.state_dict(), policy.state_dict()), tmp_path / "bank.pt")
    bank_state, policy_state = torch.load(tmp_path / "bank.pt", weights_only=True)
    again = network(7)
    again.load_state_dict(policy_state)
    flatten_(again)  # another layout
    resumed = AverageBank(again, RULES, every=3, compensated=compensated)
    resumed.load_state_dict(bank_state)
    run(95, policy, bank)
    run(95, again, resumed)
    for name in RULES:
        same(resumed.average(name), bank.average(name), rtol=1e-12, atol=1e-7 if compensated else 0)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("stop", [0, 2, 13, 96, 130])
def test_saving_moves_no_bit_and_what_is_loaded_goes_on_bit_for_bit(stop, compensated):
    def run(policy, bank, until):
        while bank.clock < until:
            walk(policy, torch.Generator().manual_seed(bank.clock))
            bank.update()

    def bank_of(policy):
        return AverageBank(policy, RULES, every=3, compensated=compensated)

    policies = [network() for _ in range(3)]
    plain, saved, loaded = map(bank_of, policies)
    run(policies[0], plain, 200)
    run(policies[1], saved, stop)
    loaded.load_state_dict(saved.state_dict())
    policies[2].load_state_dict(policies[1].state_dict())
    for policy, bank in zip(policies[1:], (saved, loaded), strict=True):
        run(policy, bank, 200)
        for name in RULES:
            same(bank.average(name), plain.average(name), rtol=0, atol=0)


def test_more_iterates_may_wait_in_a_saved_bank_than_fit_the_block_that_loads_it(monkeypatch):
    _, bank = trained()
    monkeypatch.setattr("polyak_rl.iterates._BLOCK", 8)
    loaded = AverageBank(network(7), bank.rules)
    loaded.load_state_dict(bank.state_dict())
    same(loaded.average("uniform"), bank.average("uniform"), rtol=1e-12, atol=1e-14)


def test_a_bank_of_a_compiled_network_loads_into_a_plain_one():
    _, bank = trained()
    compiled = AverageBank(torch.compile(network(8), backend="eager"), bank.rules)
    compiled.load_state_dict(bank.state_dict())
    same(compiled.average("ema"), bank.average("ema"), rtol=0, atol=0)
    assert compiled.average("ema")["0.weight"].dtype == torch.float64


def test_a_bank_of_another_kind_is_refused_by_name():
    _, bank = trained()
    state = bank.state_dict()
    for other, message in (
        (AverageBank(network(), {"uniform": Uniform(), "ema": Ema(tau=0.2)}), "rules"),
        (AverageBank(network(), bank.rules, every=2), "every"),
        (AverageBank(network(), bank.rules, compensated=True), "compensated"),
        (AverageBank(nn.Linear(3, 5), bank.rules), "another network"),
    ):
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert torch.equal(other.state_dict()["averages"], before["averages"])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AverageBank(network(), {}), ValueError, "at least one rule"),
        (lambda: AverageBank(network(), {"x": 0.5}), TypeError, "must be a Rule, got float"),
        (lambda: AverageBank(network(), {"x": Tail(0.5)}), ValueError, "record a Timeline"),
        (lambda: AverageBank(network(), RULES, every=0), ValueError, "at least 1, got 0"),
        (lambda: AverageBank([torch.ones(1)], RULES), TypeError, "of a module, got list"),
        (lambda: AverageBank(nn.ReLU(), RULES), ValueError, "no floating-point tensor"),
        (lambda: trained()[1].average("best"), ValueError, "averages are uniform, ema"),
    ],
)
def test_a_misuse_is_one_sentence(build, error, message):
    with pytest.raises(error, match=message):
        build()
