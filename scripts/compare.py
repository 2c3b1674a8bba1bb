"""Uniform Polyak-Ruppert averaging of the policy against no averaging, on Gymnasium environments.

    python -m scripts.compare --tier s                         # minutes; also `make compare`
    python -m scripts.compare --algo dqn --env-id CartPole-v1 --seeds 20
    python -m scripts.compare --algo sac --env-id my_module:My-v0 --agent.learning-rate 1e-3
    python -m scripts.compare --tier m --workers 2             # hours; start it again to go on
    python -m scripts.compare --tier l --ray auto              # on a cluster: experiment/cluster.py

Plans the runs, does what is missing, one process a run, and writes `results/results.csv.gz` (a row
an evaluation episode) and `results/runs.json` (what became of each planned run) under `--out`.
`python -m scripts.report OUT/results` makes the report of them. `--algo sac --help`
shows the settings of an algorithm too. When it is stopped or killed, or
the whole machine is, start it again: finished runs stay, others go on from their last checkpoint.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import tyro

from agents.environments import EnvironmentFault
from agents.presets import ALGORITHMS, preset
from scripts.experiment.baseline import EPISODES, random_score
from scripts.experiment.driver import execute, finished
from scripts.experiment.jobs import Options, check, plan
from scripts.experiment.locks import Hold
from scripts.experiment.paths import make_folder
from scripts.experiment.results import collect
from scripts.experiment.room import require_room, size_of_jobs
from scripts.experiment.terminal import INTERRUPTED, unfailing_output, whole_numbers


@dataclass(frozen=True)
class OfNoAlgorithm(Options[Any]):
    """Options without those of an algorithm, which was not named."""

    agent: tyro.conf.Suppress[None] = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, which nothing that is printed can change."""
    with unfailing_output(), closing(Hold()) as held:
        prog = "python -m scripts.compare"
        words = whole_numbers(sys.argv[1:] if argv is None else argv)
        default = defaults(words)
        if default.agent is None and any(word.startswith("--agent.") for word in words):
            known = ", ".join(ALGORITHMS)
            print(f"error: --agent.* needs --algo, which is one of {known}", file=sys.stderr)
            return 2
        agent: Any = type(default.agent)
        kind: Any = OfNoAlgorithm if default.agent is None else cast(Any, Options)[agent]
        options: Options[Any] = tyro.cli(
            kind,
            config=(tyro.conf.AvoidSubcommands,),
            args=words,
            prog=prog,
            description=__doc__,
            default=default,
        )
        return do(dataclasses.replace(options, out=options.out.expanduser()), held)


def defaults(words: Sequence[str]) -> Options[Any]:
    """What a command line leaves out; its algorithm's preset, where it names one."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--algo", default=None)
    scan.add_argument("--env-id", "--env_id", default="")
    known, _ = scan.parse_known_args(words)
    agent = preset(known.algo, known.env_id)[0] if known.algo in ALGORITHMS else None
    return Options(agent=agent) if agent else OfNoAlgorithm()


def do(options: Options[Any], held: Hold) -> int:
    """Do what a command line asks for, in an output folder that `held` takes."""
    try:
        jobs = plan(options)
        check(jobs)
        scores = scale(options)
        missing = [job for job in jobs if not finished(job, options.out)]
        if options.ray is not None:
            importlib.import_module("scripts.experiment.cluster")  # not only when it is needed
        if any(job.algo == "ppo" for job in missing):
            importlib.import_module("scripts.experiment.ppo")
        needed = size_of_jobs(missing, options.workers, options.out / "runs")
        require_room(options.out, needed, "make room, or give another --out or fewer --workers")
        make_folder(options.out)
        held.take(options.out)  # one driver: two would wait for each other's runs
    except (ValueError, OSError, ImportError, EnvironmentFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        try:
            if options.ray is None:
                failed = execute(missing, options.out, options.workers)
            else:
                from scripts.experiment import cluster  # Ray is there for those who ask for it

                shares = options.num_cpus, options.num_gpus
                with cluster.connected(options.ray, options.workers, *shares) as begin:
                    failed = execute(missing, options.out, len(missing), begin)  # Ray queues them
        finally:
            collect(options.out, scores)
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        print("Start again to go on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; start again to go on.")
        return INTERRUPTED
    runs = sum(len(job.seeds) for job in jobs)
    print(f"{runs} runs, {len(failed)} jobs failed. Results: {options.out / 'results'}")
    print(f"Report: python -m scripts.report {options.out / 'results'}")
    return 1 if failed else 0


def scale(options: Options[Any]) -> dict[str, tuple[float, float]]:
    """What 0 and 1 of normalised scores are, by environment, where that was asked for."""
    high = options.reference_score
    if high is None:
        return {}
    assert options.algo is not None
    assert options.env_id is not None
    low = options.random_score
    if low is None:
        low = random_score(options.algo, options.env_id, options.wrap)
        print(f"Random score, measured on {EPISODES} episodes: {low:.6g}")
        if low == high:
            raise ValueError(f"reference-score must differ from the random score, {low}")
    return {options.env_id: (low, high)}


if __name__ == "__main__":
    sys.exit(main())
