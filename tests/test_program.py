import copy
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from agents.checkpoint import Checkpoints, newest, restore
from agents.ddpg import DDPG, DDPGConfig
from agents.dqn import DQN, DQNConfig
from agents.learner import Learner
from agents.nonfinite import GradientWatch
from agents.presets import ALGORITHMS
from agents.program import Program, inductor
from agents.replay import Replay
from agents.sac import SAC, SACConfig
from agents.seeding import Purpose, Streams
from agents.td3 import TD3, TD3Config
from agents.training import TrainConfig, Training
from polyak_rl import Ema, PolicyAverages, Tail, Uniform, Window
from tests.agent_cases import random_batch

# torch's own, where Inductor is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)

ROWS = 40
SMALL = {"hidden": (16, 16), "batch_size": 8}
CASES = {
    "dqn": (DQN, DQNConfig(**SMALL, target_update_every=3), True),
    "double dqn": (DQN, DQNConfig(**SMALL, double=True, target="soft", tau=0.1), True),
    "ddpg": (DDPG, DDPGConfig(**SMALL), False),
    "sac": (SAC, SACConfig(**SMALL), False),
    "td3": (TD3, TD3Config(**SMALL), False),
}
INDUCTOR = [
    "dqn",
    *(pytest.param(name, marks=pytest.mark.full) for name in CASES if name != "dqn"),
]


def recorder(builds):
    """What leaves a program's operations as they were recorded, compiled by nobody."""

    def build(graph, inputs):
        builds.append(graph)
        return graph

    return build


def programs_of(name):
    """How many programs an agent needs: TD3's actor, and a hard target, have their turns."""
    return 2 if name in ("dqn", "td3") else 1


def learner_of(name, seeds=1, device="cpu", **program):
    """A new agent of each seed, beside a full replay buffer of noise."""
    agent_class, config, discrete = CASES[name]
    members = range(1, seeds + 1)
    agent = agent_class(4, 2, config, members, device, 1000)
    replay = Replay(ROWS, 4, 1 if discrete else 2, seeds, device)
    batches = [random_batch(ROWS, 4, 2, discrete=discrete, seed=seed) for seed in members]
    replay.add(*(torch.cat(field).numpy() for field in zip(*batches, strict=True)))
    return Learner(agent, replay, Streams(Purpose.REPLAY, members, device), **program)


def step(learner, count=1):
    """A round of gradient steps; the tags of the last."""
    learner.begin(count)
    for _ in range(count):
        tags = learner.step()
        learner.agent.descent.watch.count(0, noted=learner.program is not None)
    return tags


def trained(name, spoil=(), updates=9, **options):
    """An agent after single steps, in some of which no reward of the last seed is finite."""
    learner = learner_of(name, **options)
    rewards = learner.replay.rows[-1, :, -6]
    good = rewards.clone()
    for k in range(updates):
        rewards.copy_(torch.full_like(good, math.nan) if k in spoil else good)
        tags = step(learner)
    return learner, tags


def tensors(agent):
    """All that an agent has learnt, by name."""
    networks = {"policy": agent.policy} | {k: t.module for k, t in agent.targets.items()}
    state = {f"{n}.{k}": x for n, net in networks.items() for k, x in net.state_dict().items()}
    for i, optimizer in enumerate(optimizers_of(agent)):
        for own in optimizer.state.values():
            state |= {f"optimizer {i} {k}": x for k, x in own.items()}
    return state


def optimizers_of(agent):
    return [*agent.descent.optimizers.values()]


def read(learner):
    return learner.agent.descent.watch.read()


def assert_same(ours, theirs):
    for name, x in theirs.items():
        assert torch.equal(ours[name], x), name


def assert_close(ours, theirs, rtol=1e-4, atol=1e-6):
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_what_was_recorded_repeats_every_operation(name, seeds):
    eager, eager_tags = trained(name, seeds=seeds)
    builds = []
    program, tags = trained(name, seeds=seeds, compiled=True, build=recorder(builds))
    assert len(builds) == programs_of(name)
    assert_same(tensors(program.agent), tensors(eager.agent))
    assert_same(tags, eager_tags)


@pytest.mark.parametrize("name", CASES)
def test_a_round_is_what_single_steps_are(name):
    """Also a round of more steps than are drawn at once, which a smaller buffer follows."""
    ends = []
    for counts in ([70, 3], [1] * 73):
        program = learner_of(name, compiled=True, build=recorder([]))
        for count in counts:
            step(program, count)
        ends.append(tensors(program.agent))
    eager = learner_of(name)
    step(eager, 73)
    for end in ends:
        assert_same(end, tensors(eager.agent))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("name", "every"), [("dqn", 1), ("td3", 2)])
def test_averages_in_a_program_are_those_of_single_operations_and_change_no_bit(
    name, every, device
):
    rules = {"ema": Ema(tau=0.1), "late": Uniform(start=9), "lawa": Window(3, 5), "t": Tail(0.5)}
    build = None if device == "cuda" else recorder([])
    plain = learner_of(name, 2, device, compiled=True, build=build)
    eager = learner_of(name, 2, device)
    program = learner_of(name, 2, device, compiled=True, build=build)
    kept = []
    for one in (eager, program):
        averages = PolicyAverages(one.agent.policy, rules, every=every, expected=75)
        one.record(averages)
        kept.append(averages)
    for count in (40, 1, 34):
        for one in (plain, eager, program):
            step(one, count)
        for which in rules:
            assert torch.equal(*(averages.vector(which) for averages in kept)), which
        if count == 1:
            kept[1].load_state_dict(kept[1].state_dict())  # to other memory
    assert_same(tensors(program.agent), tensors(plain.agent))
    assert [averages.clock for averages in kept] == [75, 75]
    with kept[1].applied("ema"), pytest.raises(RuntimeError, match=r"inside applied\(\)"):
        step(program)
    step(program)
    assert kept[1].clock == 76


def test_nothing_is_left_of_a_round_that_was_broken_off():
    ends = []
    for program in ({}, {"compiled": True, "build": recorder([])}):
        learner = learner_of("double dqn", **program)
        learner.begin(5)
        learner.step()
        learner.begin(3)
        learner.step()
        ends.append(tensors(learner.agent))
    assert_same(*ends)


@needs_compiler
@pytest.mark.parametrize("name", INDUCTOR)
def test_a_compiled_step_is_the_same_to_rounding(name):
    eager, eager_tags = trained(name, seeds=2, spoil={2, 5}, updates=7)
    program, tags = trained(name, seeds=2, spoil={2, 5}, updates=7, compiled=True)
    assert len(program.program.recorded) == programs_of(name)
    assert_close(tensors(program.agent), tensors(eager.agent))
    finite = {tag: x for tag, x in eager_tags.items() if x.isfinite().all()}
    assert finite
    assert_close(tags, finite)
    assert read(program) == read(eager) != []


@pytest.mark.parametrize("name", CASES)
def test_bad_numbers_do_not_reach_the_weights_of_a_program_and_are_named(name):
    eager, _ = trained(name, spoil={0, 4, 5})
    program, _ = trained(name, spoil={0, 4, 5}, compiled=True, build=recorder([]))
    assert all(x.isfinite().all() for x in tensors(program.agent).values())
    assert_same(tensors(program.agent), tensors(eager.agent))
    bad = read(program)
    assert bad == read(eager)
    assert {gradient.row for gradient in bad} == {0, 4, 5}


def test_a_program_is_made_anew_where_what_it_writes_to_was_replaced():
    builds = []
    program, _ = trained("ddpg", compiled=True, build=recorder(builds))
    eager, _ = trained("ddpg")
    for one in (program, eager):
        for parameter in one.agent.critic_target.module.parameters():
            parameter.data = 2 * parameter.data
        for _ in range(3):
            step(one)
    assert len(builds) == 2
    assert_same(tensors(program.agent), tensors(eager.agent))


def test_loaded_moments_are_those_that_a_program_goes_on_with():
    builds = []
    program, _ = trained("ddpg", compiled=True, build=recorder(builds))
    eager, _ = trained("ddpg")
    for one in (program, eager):
        kept = copy.deepcopy(one.agent.descent.state_dict())
        step(one)
        one.agent.descent.load_state_dict(kept)
        step(one)
        assert kept["critic"]["state"][0]["step"] == 9  # and the state is not written to
    assert len(builds) == 1
    assert_same(tensors(program.agent), tensors(eager.agent))


def test_what_is_only_read_is_not_copied(monkeypatch):
    table, total = torch.arange(6.0), torch.zeros(())
    copied = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda x: copied.append(x.numel()) or clone(x))
    program = Program(lambda: {"total": total.add_(table.sum())}, build=recorder([]))
    assert [program()["total"].item() for _ in range(2)] == [15, 30]
    assert copied == [1]


def test_a_rehearsal_that_fails_leaves_no_trace():
    weight = torch.ones(3)

    def step():
        weight.mul_(2)
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        Program(step)()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("read", [lambda x: bool(x.sum() > 0), torch.nonzero, torch.Tensor.unique])
def test_a_step_that_reads_a_value_is_refused(device, read):
    weight = torch.ones(3, device=device)

    def step():
        weight.mul_(2)
        read(weight)
        return {"weight": weight}

    with pytest.raises(RuntimeError, match="this cannot be one program: it reads a tensor's value"):
        Program(step, device)()
    assert (weight == 1).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_step_that_moves_memory_is_refused(device):
    weight = nn.Parameter(torch.ones(3, device=device))

    def step():
        weight.data = weight.data * 2
        return {}

    with pytest.raises(RuntimeError, match="cannot be one program: it moves a tensor's memory"):
        Program(step, device)()


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_step_that_draws_is_refused(generator):
    with pytest.raises(RuntimeError, match="cannot be one program: it draws random numbers"):
        Program(lambda: {"x": torch.rand(3, generator=generator)})()


def test_views_of_one_memory_are_written_in_order():
    memory, x = torch.zeros(6), torch.zeros(3)

    def step():
        memory[1:4].add_(x)
        memory.view(2, 3)[:, 1].mul_(memory[3])
        return {"head": memory[:2].clone(), "sum": memory.sum()}

    builds = []
    program = Program(step, build=recorder(builds))
    expected = torch.zeros(6)
    for k in range(3):
        x.copy_(torch.arange(3.0) + k)
        tags = program()
        expected[1:4] += x
        expected.view(2, 3)[:, 1] *= expected[3].clone()
        assert torch.equal(memory, expected)
        assert torch.equal(tags["head"], expected[:2])
        assert tags["sum"] == expected.sum()
    assert len(builds) == 1


def test_memory_that_is_written_to_in_part_is_seen_as_a_whole():
    """By strides Inductor would copy all of it back at every call."""
    table, row, at = torch.zeros(4, 3), torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
    builds = []
    program = Program(lambda: {"table": table.index_copy_(0, at, row)}, build=recorder(builds))
    assert program()["table"].tolist() == [[1.0] * 3] + 3 * [[0.0] * 3]
    assert "as_strided" not in builds[0].code


def training(algo="dqn", env_id="CartPole-v1", agent_config=None, **options):
    agent_config = agent_config or DQNConfig(hidden=(16, 16), learning_starts=20, train_every=1)
    run = TrainConfig(env_id, 120, eval_every=60, eval_episodes=2, compile=True, **options)
    return Training(algo, agent_config, run, (1,))


@needs_compiler
def test_a_compiled_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    whole = training()
    first = training()
    for _ in range(70):
        whole.advance()
        first.advance()
    Checkpoints(tmp_path, first).save()
    second = training()
    restore(newest(tmp_path)[0], second)
    whole.run()
    second.run()
    for one in (whole, first, second):
        assert len(one.learner.program.recorded) == 1
    assert_same(tensors(second.agent), tensors(whole.agent))
    assert (second.evaluations["last"].returns == whole.evaluations["last"].returns).all()
    for one in (whole, first, second):
        one.close()


@pytest.mark.parametrize(
    ("agent_config", "options", "message"),
    [
        (None, {"lr_decay": "linear"}, "compile needs a constant learning rate, got 'linear'"),
    ],
)
def test_what_a_program_cannot_do_is_refused(agent_config, options, message):
    with pytest.raises(ValueError, match=message):
        training(agent_config=agent_config, **options)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda agent: agent.descent.optimizers["q"].param_groups[0].update(lr=0.1),
            "constant learning rate",
        ),
        (lambda agent: agent.q.requires_grad_(False), "was frozen or unfrozen after flatten_"),
        (
            lambda agent: agent.q.load_state_dict(copy.deepcopy(agent.q.state_dict()), assign=True),
            "has left this flat buffer",
        ),
    ],
)
def test_what_a_program_would_not_notice_is_refused_before_the_next_round(change, message):
    one = training()
    while one.updates < 1:
        one.advance()
    change(one.agent)
    with pytest.raises(RuntimeError, match=message):
        one.advance()
    assert one.updates == 1
    one.close()


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="compile needs Python's headers"):
        training()


def test_a_missing_compiler_is_named_before_anything_begins(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler: install g\+\+"):
        training()


needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="fusing on a GPU needs Triton")


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("build", [None, pytest.param(inductor, marks=needs_triton)])
def test_a_captured_graph_is_the_same_to_rounding(name, build):
    options = {"seeds": 2, "device": "cuda", "spoil": {2, 5}}
    eager, eager_tags = trained(name, **options)
    program, tags = trained(name, **options, compiled=True, build=build)
    assert len(program.program.recorded) == programs_of(name)
    bounds = {} if build is None else {"rtol": 1e-3, "atol": 1e-5}
    assert_close(tensors(program.agent), tensors(eager.agent), **bounds)
    finite = {tag: x for tag, x in eager_tags.items() if x.isfinite().all()}
    assert finite
    assert_close(tags, finite, **bounds)
    assert read(program) == read(eager) != []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_flags_go_round_where_there_are_more_steps_than_rows(device):
    build = None if device == "cuda" else recorder([])
    learner = learner_of("sac", device=device, compiled=True, build=build)
    watch = learner.agent.descent.watch = GradientWatch(
        learner.agent.descent.watch.networks, 1, device, capacity=8
    )
    rewards = learner.replay.rows[-1, :, -6]
    good = rewards.clone()
    found = []
    for k in range(30):
        if watch.full:
            found.append([bad.row for bad in watch.read() if bad.network == "critic"])
        rewards.copy_(torch.full_like(good, math.nan) if k % 5 == 4 else good)
        step(learner)
    assert found == [[4], [1, 6], [3]]


def test_every_agent_has_a_case():
    assert {case[0] for case in CASES.values()} == {agent for agent, _ in ALGORITHMS.values()}
