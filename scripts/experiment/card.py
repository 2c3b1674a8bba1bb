"""A folder with a policy for others: weights, config, and a model card of numbers that are so.

The folder is what `huggingface_hub` takes to upload and what `scripts.enjoy` plays.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from polyak_rl.choose import Choice
from polyak_rl.files import write_whole
from scripts.experiment.finished import CHOICE, SHIPPED, FinishedRun
from scripts.experiment.paths import make_folder, refuse_link

CARD = "README.md"

TEXT = """\
# {algo} on {env_id}

A policy for {env_id}, trained by {algo} for {updates:,} gradient steps (training seed {seed}).
Its weights, from that run: {label}.

{worth}

## Play it

From a checkout of polyak_rl, which trained it (commit {commit}), `DIR` being this folder:

```sh
python -m scripts.enjoy DIR
```

```python
from pathlib import Path
import torch
from scripts.experiment.finished import read

run = read(Path("DIR"))
policy = run.policy("shipped")
obs = torch.zeros(1, 1, *run.interface.obs_shape)  # [member, batch, observation]
action = run.interface.to_env(policy.act(obs)[0, 0].numpy())
```

`{weights}` is data alone: a state dict of tensors with a leading dimension of 1, which
`torch.load("{weights}", weights_only=True)` reads:

{shapes}

`config.json` has every setting of the training, `{choice}` every return and the seed of every
episode that these numbers rest on.
"""


def new_folder(folder: Path) -> None:
    """Make a folder, where there is none with something in it.

    Raises:
        ValueError: There is.
        OSError: It is a link, or cannot be made.
    """
    refuse_link(folder)
    make_folder(folder)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} must be new or empty: it has files in it")


def hand_over(run: FinishedRun, folder: Path) -> None:
    """Fill a folder with the shipped policy of a run, its config, and a model card.

    Raises:
        ValueError: Nothing was shipped.
        OSError: It cannot be written.
    """
    text = card(run)
    for name in (SHIPPED, "config.json", CHOICE):
        with (run.path / name).open("rb") as source, write_whole(folder / name) as file:
            shutil.copyfileobj(source, file)
    with write_whole(folder / CARD) as file:
        file.write(text.encode())


def card(run: FinishedRun) -> str:
    """The model card: what it is, what it is worth and how that is known, how to play it."""
    record = run.choice
    choice = Choice(**record["choice"])
    shapes = "\n".join(f"- `{name}` {list(x.shape)}" for name, x in run.weights("shipped").items())
    text = TEXT.format(
        algo=run.algo.upper(),
        env_id=run.env_id,
        updates=run.timeline.clock,
        seed=run.seed,
        label=record["label"],
        worth=worth(choice, record),
        commit=record["versions"]["this program"],
        weights=SHIPPED,
        choice=CHOICE,
        shapes=shapes,
    )
    return f"---\n{header(run, choice)}---\n\n{text}"


def header(run: FinishedRun, choice: Choice) -> str:
    """What a hub reads of the card: YAML, whose values are written as JSON."""
    tags = ["reinforcement-learning", "deep-reinforcement-learning", "polyak_rl", run.algo]
    lines: dict[str, Any] = {"library_name": "polyak_rl", "tags": [*tags, run.env_id]}
    if choice.valuing:
        fresh = choice.valuing[choice.winner]
        spread = f"{statistics.fmean(fresh):.2f} +/- {statistics.stdev(fresh):.2f}"
        task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
        metric = {"type": "mean_reward", "name": "mean_reward", "value": spread, "verified": False}
        data = {"name": run.env_id, "type": run.env_id}
        result = {"task": task, "dataset": data, "metrics": [metric]}
        lines["model-index"] = [{"name": run.algo.upper(), "results": [result]}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())


def worth(choice: Choice, record: dict[str, Any]) -> str:
    """What the policy reached on episodes that had no part in choosing it."""
    if not choice.valuing:
        return "It was not evaluated: the average was taken unseen."
    fresh = choice.valuing[choice.winner]
    mean, spread = statistics.fmean(fresh), statistics.stdev(fresh)
    by = "mean return" if choice.worst == 1 else f"mean of the worst {choice.worst:.0%}"
    of = "" if choice.worst == 1 else f" in the {by}"
    lines = [
        f"| {len(fresh)} fresh episodes | |",
        "|---|---|",
        f"| mean return | {mean:.1f}, standard deviation {spread:.1f} |",
        f"| mean of the worst tenth | {choice.value(worst=0.1):.1f} |",
    ]
    lines += [
        f"| difference from {name}{of}, 95 % interval | {choice.gain(name)} |"
        for name in dict.fromkeys((choice.last, choice.prior))
        if name != choice.winner
    ]
    others = len(choice.choosing[choice.winner])
    chosen = (
        f"It was chosen among {len(choice.choosing)} candidates by its {by} on {others} other "
        f"episodes, {choice.promised():.1f}; choosing flatters. This was call {record['call']} on "
        "the run's episodes, and no call plays an episode of another."
    )
    return "\n".join([*lines, "", chosen])
