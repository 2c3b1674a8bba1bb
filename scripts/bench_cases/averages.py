"""Averages of the policy: what they add to a gradient step, and what many of them cost."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from agents.averaging import record_policy
from agents.sac import SACConfig
from agents.training import Training
from polyak_rl import AverageBank, Ema, PolicyAverages, Power, Rule, Uniform, Window, flatten_
from scripts.bench_cases.floors import COPY
from scripts.bench_cases.timing import STEP, Bench, Contender, call_all
from scripts.bench_cases.trainings import filled, learn
from scripts.bench_cases.updates import dense
from scripts.experiment.schemes import SHOWN, rules_of

BLOCK = 32  # updates after which a bank takes them in: calls hold so many, lest turns differ
PLAIN, DEFAULT, TWELVE = "without averages", "default averages", "12 averages and a timeline"
AVERAGING, AVERAGES = "SAC step with averages", "averages"


def twelve_rules(updates: int) -> dict[str, Rule]:
    """As many averages as an experiment on averaging may want."""
    rules: dict[str, Rule] = {
        f"from{percent}": Uniform(start=updates * percent // 100)
        for percent in (0, 10, 25, 50, 75, 90)
    }
    for percent in (0.1, 1, 3, 10):
        rules[f"ema{percent:g}"] = Ema(half_life=updates * percent / 100)
    rules["power"] = Power(gamma=6.94)
    rules["window"] = Window(size=5, every=max(1, updates // 100))
    return rules


RULES: dict[str, Callable[[int], dict[str, Rule]]] = {
    DEFAULT: partial(rules_of, SHOWN),
    TWELVE: twelve_rules,
}


def averages_of(
    training: Training, name: str
) -> tuple[PolicyAverages, Sequence[Callable[[], None]]]:
    """Averages of a training's policy by a set of rules, and what records them at each step."""
    averages = record_policy(training, RULES[name](training.total_updates))
    training.learner.averages.remove(averages)
    return averages, [averages.record]


def averaging(bench: Bench) -> None:
    """A SAC step with and without averages of the policy, in place and on their own."""
    training = filled("sac", "HalfCheetah-v5", SACConfig(), bench.device)
    recorders = {name: averages_of(training, name)[1] for name in RULES}
    step = partial(learn, training)  # of one agent, so that contenders differ in the averages alone
    calls: dict[str, list[Callable[[], None]]] = {
        PLAIN: [step],
        **{name: [step, *records] for name, records in recorders.items()},
        **{f"{name}, alone": [*records] for name, records in recorders.items()},
    }
    contenders = {
        name: Contender(partial(call_all, each * BLOCK), BLOCK) for name, each in calls.items()
    }
    bench.compare(AVERAGING, contenders, seconds=STEP, baseline=PLAIN)
    training.close()


def many_averages(bench: Bench) -> None:
    """A bank of many averages of SAC's actor."""
    for count in bench.sizes((1, 2, 4, 8, 16, 32, 64)):
        policy = dense(17, 256, 256, 12).to(bench.device)
        vector = flatten_(policy).buffers[0]
        rules = {f"ema{i}": Ema(half_life=1000.0 * (i + 1)) for i in range(count)}
        bank = AverageBank(policy, rules)
        contenders = {
            COPY: Contender(partial(torch.empty_like(vector).copy_, vector)),
            "AverageBank": Contender(partial(call_all, [bank.update] * BLOCK), BLOCK),
        }
        note = "SAC's actor, 73,000 parameters; an update of all averages"
        bench.compare(AVERAGES, contenders, size=str(count), note=note)
