import copy

import torch

from agents.optimizers import Adam
from polyak_rl import flatten_


def make():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return network, flatten_(network)


def train(network, optimizer, steps, first=0):
    for k in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(k))
        network(x).square().mean().backward()
        optimizer.step()


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_adam_is_torchs_fused_adam_bit_for_bit():
    (ours, flat), (theirs, their_flat) = make(), make()
    train(ours, Adam(flat.parameters, lr=1e-2), 50)
    train(theirs, torch.optim.Adam(their_flat.parameters, lr=1e-2, fused=True), 50)
    assert torch.equal(weights(ours), weights(theirs))


def test_adams_state_is_torchs_both_ways():
    (ours, flat), (theirs, their_flat) = make(), make()
    adam, torchs = (
        Adam(flat.parameters, lr=1e-2),
        torch.optim.Adam(their_flat.parameters, lr=1e-2, fused=True),
    )
    train(ours, adam, 5)
    train(theirs, torchs, 5)
    states = copy.deepcopy((adam.state_dict(), torchs.state_dict()))  # they are live otherwise
    adam.load_state_dict(states[1])
    torchs.load_state_dict(states[0])
    train(ours, adam, 5, first=5)
    train(theirs, torchs, 5, first=5)
    assert torch.equal(weights(ours), weights(theirs))


def test_adam_takes_its_learning_rate_anew_at_each_step():
    network, flat = make()
    adam = Adam(flat.parameters, lr=1e-2)
    train(network, adam, 1)
    before = weights(network).clone()
    adam.param_groups[0]["lr"] = 0.0
    train(network, adam, 1)
    assert torch.equal(weights(network), before)
