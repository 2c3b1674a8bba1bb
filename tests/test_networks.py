import math
from collections import Counter

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.utils._python_dispatch import TorchDispatchMode

from agents.networks import (
    MLP,
    Critic,
    DeterministicActor,
    GaussianActor,
    Linear,
    QNetwork,
    select_member,
    set_gradients,
    stack_members,
)
from agents.seeding import Purpose, generators
from polyak_rl import flatten_

POLICIES = [QNetwork, DeterministicActor, GaussianActor]


def gens(*seeds):
    return generators(Purpose.INIT, seeds)


@pytest.mark.parametrize("outputs", [1, 2, 3, 7, 8, 9, 12, 64])
@pytest.mark.parametrize("rows", [1, 2, 20])
def test_a_linear_layer_is_each_members_own_affine_map(outputs, rows):
    layer = Linear(5, outputs, gens(0, 1, 2))
    x = torch.randn(3, rows, 5, generator=gens(9)[0])
    oracle = torch.einsum("mbi,mio->mbo", x.double(), layer.weight.double()) + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), oracle, rtol=1e-5, atol=1e-6)


class Counted(TorchDispatchMode, Counter):
    """How often each operation is called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def layer_by_layer(net, x):
    """What an MLP computes, as autograd records it by itself."""
    for layer in net:
        x = layer(x.clone())
    return x


@pytest.mark.parametrize("sizes", [(3, 1), (5, 8, 2), (4, 16, 12, 1), (3, 64, 64, 6)])
@pytest.mark.parametrize("flat", [False, True])
def test_the_gradients_of_an_mlp_are_those_of_its_layers(sizes, flat):
    net = MLP(sizes, gens(0, 1)).double()
    if flat:
        flatten_(net, members=2)
    x = torch.randn(2, 7, sizes[0], generator=gens(9)[0], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 7, sizes[-1], generator=gens(8)[0], dtype=torch.float64)
    inputs = [x, *net.parameters()]
    y, expected = net(x), layer_by_layer(net, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(z, inputs, dy) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_frozen_weight_leaves_the_gradient_of_its_bias():
    net = MLP((3, 8, 2), gens(0))
    net[0].weight.requires_grad_(False)
    x = torch.ones(1, 7, 3)
    expected = torch.autograd.grad(layer_by_layer(net, x).sum(), net[0].bias)
    torch.testing.assert_close(torch.autograd.grad(net(x).sum(), net[0].bias), expected)


def test_backward_adds_to_the_gradients_of_an_mlp_as_to_any_other():
    net = MLP((3, 8, 2), gens(0)).double()
    flatten_(net, members=1)
    x = torch.randn(1, 7, 3, generator=gens(9)[0], dtype=torch.float64)
    (net(x) * net(2 * x)).sum().backward()
    once = [p.grad.clone() for p in net.parameters()]
    (layer_by_layer(net, x) * layer_by_layer(net, 2 * x)).sum().backward()
    for parameter, gradient in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_are_set_where_they_lie_also_of_a_network_that_is_asked_twice(flat):
    net = MLP((3, 8, 2), gens(0, 1)).double()
    weights = [*net.parameters()]
    if flat:
        flatten_(net, members=2)
    x = torch.randn(2, 7, 3, generator=gens(9)[0], dtype=torch.float64)
    twice = (layer_by_layer(net, x) * layer_by_layer(net, 2 * x)).sum()
    expected = torch.autograd.grad(twice, weights)
    set_gradients((net(x) * net(2 * x)).sum(), weights)
    torch.testing.assert_close([p.grad for p in weights], [*expected])
    expected = torch.autograd.grad(layer_by_layer(net, x).sum(), weights)
    places = [p.grad.data_ptr() for p in weights]
    for _ in range(2):  # what is there is overwritten, not added to
        set_gradients(net(x).sum(), weights)
        assert [p.grad.data_ptr() for p in weights] == places
        torch.testing.assert_close([p.grad for p in weights], [*expected])


def test_an_mlp_refuses_a_gradient_that_is_to_be_differentiated_again():
    net = MLP((3, 8, 2), gens(0))
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(net(torch.ones(1, 7, 3)).sum(), net[0].weight, create_graph=True)


def test_slopes_go_through_a_critic_and_not_into_it():
    actor, critic = DeterministicActor(3, 2, (8, 8), gens(0)), Critic(3, 2, (8, 8), gens(1), n=2)
    obs = torch.randn(1, 7, 3, generator=gens(9)[0])
    loss = critic(obs, actor(obs)).mean()
    theirs = torch.autograd.grad(loss, [*actor.parameters()], retain_graph=True)
    with Counted() as ours:
        set_gradients(critic(obs, actor(obs)), [*actor.parameters()], share=1 / 14)
    torch.testing.assert_close([p.grad for p in actor.parameters()], [*theirs])
    assert not any(p.grad is not None for p in critic.parameters())
    with Counted() as both:
        loss = critic(obs, actor(obs))
        set_gradients(loss, [*actor.parameters(), *critic.parameters()], share=1 / 14)
    # One product and one sum less for each of the critic's layers.
    assert [both["bmm"] - ours["bmm"], both["sum"] - ours["sum"]] == [3, 3]


def test_an_input_of_fewer_members_serves_neighbours_and_takes_the_sum_of_their_slopes():
    net = MLP((3, 8, 2), gens(0, 1, 2, 3)).double()
    x = torch.randn(2, 7, 3, generator=gens(9)[0], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 7, 2, generator=gens(8)[0], dtype=torch.float64)
    inputs = [x, *net.parameters()]
    y, expected = net(x), layer_by_layer(net, x[[0, 0, 1, 1]])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(z, inputs, dy) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_loss_through_actor_and_critic_is_traced_whole(backend):
    actor, critic = GaussianActor(3, 2, (8, 8), gens(0, 1)), Critic(3, 2, (8, 8), gens(0, 1), n=2)
    obs = torch.randn(2, 5, 3, generator=gens(9)[0])
    noise = torch.randn(2, 5, 2, generator=gens(8)[0])

    def loss(obs, noise):
        action, log_prob = actor.sample(obs, noise)
        return (0.2 * log_prob - critic(obs, action).amin(1)).mean()

    loss(obs, noise).backward()
    expected = [p.grad for p in actor.parameters()]
    actor.zero_grad()
    torch.compile(loss, fullgraph=True, backend=backend)(obs, noise).backward()
    for parameter, gradient in zip(actor.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_initial_weights_follow_torchs_law_for_one_member_not_for_the_stack():
    layer = Linear(100, 50, gens(*range(30)))
    bound = 1 / math.sqrt(100)
    for tensor in (layer.weight, layer.bias):
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.99 * bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_members_initial_weights_depend_on_its_seed_alone():
    together, alone = MLP((3, 8, 2), gens(5, 6)), MLP((3, 8, 2), gens(6))
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours[1:], theirs)
        assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("hidden", [(256, 256), (400, 300), (64, 64)])
@pytest.mark.parametrize("rows", [1, 5, 64, 100])
@pytest.mark.parametrize(("obs_dim", "action_dim"), [(3, 1), (4, 2), (17, 6)])
def test_a_member_computes_the_same_bits_alone_and_beside_others(hidden, rows, obs_dim, action_dim):
    obs = torch.randn(5, rows, obs_dim, generator=gens(9)[0])
    for policy_class in (QNetwork, GaussianActor):
        together = policy_class(obs_dim, action_dim, hidden, gens(*range(5)))
        flatten_(together, members=5)
        with torch.no_grad():
            values = together.net(obs)
        for seed in range(5):
            alone = policy_class(obs_dim, action_dim, hidden, gens(seed))
            flatten_(alone, members=1)
            with torch.no_grad():
                assert torch.equal(alone.net(obs[seed : seed + 1].clone())[0], values[seed])


def test_the_forward_pass_without_a_graph_is_the_same_bit_for_bit():
    for sizes in ((3, 1), (5, 8, 2), (3, 64, 64, 6)):
        net = MLP(sizes, gens(0, 1))
        x = torch.randn(2, 7, sizes[0], generator=gens(9)[0])
        with torch.no_grad():
            y = net(x)
        assert torch.equal(y, net(x))


def test_the_greedy_action_is_the_largest_value():
    net = QNetwork(3, 4, (8,), gens(0, 1))
    obs = torch.randn(2, 6, 3, generator=gens(2)[0])
    action = net.act(obs)
    assert action.shape == (2, 6)
    assert torch.equal(net(obs).gather(-1, action.unsqueeze(-1)).squeeze(-1), net(obs).amax(-1))


def test_deterministic_actions_lie_between_the_bounds():
    actor = DeterministicActor(3, 2, (8,), gens(0))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(50)
        action = actor.act(torch.randn(1, 100, 3, generator=gens(1)[0]))
    assert action.shape == (1, 100, 2)
    assert action.abs().max() <= 1
    assert action.abs().max() > 0.99


def test_the_gaussian_log_density_is_that_of_a_tanh_transformed_normal():
    actor = GaussianActor(3, 2, (16,), gens(0, 1)).double()
    generator = gens(4)[0]
    obs = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 50, 2, generator=generator, dtype=torch.float64)
    action, log_prob = actor.sample(obs, noise)
    mean, log_std = actor(obs)
    normal = Independent(Normal(mean, log_std.exp()), 1)
    law = TransformedDistribution(normal, [TanhTransform(cache_size=1)])
    assert log_prob.shape == (2, 50)
    torch.testing.assert_close(log_prob, law.log_prob(action), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(action, torch.tanh(mean + log_std.exp() * noise))


def test_the_gaussian_log_density_is_finite_and_right_where_tanh_saturates():
    actor = GaussianActor(1, 1, (), gens(0))
    with torch.no_grad():
        actor.net[0].weight.zero_()
        actor.net[0].bias.copy_(torch.tensor([30.0, 0.0]))  # mean 30, log std 0
    action, log_prob = actor.sample(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    # log N(0) - log(1 - tanh(30)^2), where 1 - tanh(u)^2 = 4 exp(-2u) to double precision
    expected = -0.5 * math.log(2 * math.pi) - (math.log(4) - 60)
    assert action.item() == 1.0
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)


def test_log_std_is_clamped_to_the_documented_range():
    actor = GaussianActor(1, 1, (), gens(0))
    with torch.no_grad():
        actor.net[0].weight.zero_()
        for bias, clamped in ((100.0, 2.0), (-100.0, -20.0), (0.5, 0.5)):
            actor.net[0].bias.copy_(torch.tensor([0.0, bias]))
            assert actor(torch.zeros(1, 1, 1))[1].item() == clamped


def test_sampled_actions_carry_a_gradient_to_mean_and_std():
    actor = GaussianActor(2, 1, (4,), gens(0))
    obs, noise = torch.ones(1, 3, 2), torch.ones(1, 3, 1)
    action, _ = actor.sample(obs, noise)
    (gradient,) = torch.autograd.grad(action.sum(), [actor.net[-1].bias])
    assert (gradient != 0).all()


def test_the_gaussian_policys_evaluation_action_is_tanh_of_the_mean():
    actor = GaussianActor(2, 3, (4,), gens(0))
    obs = torch.randn(1, 5, 2, generator=gens(1)[0])
    assert torch.equal(actor.act(obs), torch.tanh(actor(obs)[0]))


def test_a_seeds_twin_critics_are_neighbouring_members_with_weights_of_their_own():
    twin = Critic(3, 2, (8,), gens(0, 1), n=2)
    generator = gens(5)[0]
    obs = torch.randn(2, 7, 3, generator=generator)
    action = torch.randn(2, 7, 2, generator=generator)
    q = twin(obs, action)
    assert q.shape == (2, 2, 7)
    x = torch.cat((obs, action), dim=-1)
    for seed in range(2):
        for i in range(2):
            h = x[seed]
            for layer in (twin.net[0], twin.net[2]):
                member = seed * 2 + i
                h = h @ layer.weight[member] + layer.bias[member]
                h = h.relu() if layer is twin.net[0] else h
            torch.testing.assert_close(q[seed, i], h.squeeze(-1))
    assert not torch.allclose(q[:, 0], q[:, 1])


@pytest.mark.parametrize("policy_class", POLICIES)
def test_stacked_members_act_as_each_state_does(policy_class):
    policies = [policy_class(3, 2, (8, 8), gens(k, k + 10)) for k in range(3)]
    obs = torch.randn(2, 4, 3, generator=gens(20)[0])
    states = [dict(policy.named_parameters()) for policy in policies]
    before = policies[0].state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    stacked = stack_members(policies[0], states)
    actions = stacked.act(obs.repeat(3, 1, 1))
    for k, policy in enumerate(policies):
        torch.testing.assert_close(actions[2 * k : 2 * k + 2], policy.act(obs))
    assert not any(parameter.requires_grad for parameter in stacked.parameters())
    for name, tensor in policies[0].state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.requires_grad for parameter in policies[0].parameters())


def test_stacked_members_take_the_networks_precision():
    policy = QNetwork(3, 2, (8,), gens(0))
    state = {name: tensor.double() for name, tensor in policy.state_dict().items()}
    stacked = stack_members(policy, [state])
    assert {parameter.dtype for parameter in stacked.parameters()} == {torch.float32}


def test_a_selected_member_loads_into_a_network_of_one_and_shares_no_memory():
    together = QNetwork(3, 2, (8,), gens(0, 1, 2))
    flatten_(together, members=3)
    state = select_member(together.state_dict(), 1, seeds=3)
    alone = QNetwork(3, 2, (8,), gens(9))
    alone.load_state_dict(state)
    obs = torch.randn(3, 4, 3, generator=gens(4)[0])
    torch.testing.assert_close(alone(obs[1:2])[0], together(obs)[1])
    state["net.0.weight"].zero_()
    assert together.net[0].weight[1].abs().sum() > 0


def test_a_selected_seed_of_twin_critics_has_both():
    twins = Critic(3, 1, (4,), gens(0, 1, 2), n=2)
    state = select_member(twins.state_dict(), 2, seeds=3)
    assert torch.equal(state["net.0.weight"], twins.net[0].weight[4:6])
