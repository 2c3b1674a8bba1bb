"""The life of a run: begun in new folders or gone on with, saved on the way, kept in the end.

A run writes to its folders alone (`scripts.experiment.locks`). Going on, everything is read and
verified before anything is written; what a folder says is data: names stay names, and foreign text
is written and shown with its control characters escaped.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.checkpoint import Checkpoint, Checkpoints, restore
from agents.networks import select_member, stack_members
from agents.presets import ALGORITHMS
from agents.training import Training
from polyak_rl import PolicyAverages
from polyak_rl.files import verify_archive, write_whole
from scripts.experiment.finished import CANDIDATES, CHOICE, SHIPPED
from scripts.experiment.locks import Hold
from scripts.experiment.paths import beside, refuse_link
from scripts.experiment.run_folder import AVERAGES, HEADER, RunFolder, rows_until
from scripts.experiment.schemes import TARGET

CHECKPOINT = "checkpoint"


@dataclass(eq=False)
class Run:
    """A training under way, and all that is kept of it."""

    training: Training
    averages: PolicyAverages | None
    folders: list[RunFolder]
    checkpoints: Checkpoints
    held: Hold
    notes: Sequence[str] = ()  # why it may not be the same, to the bit, as if it had never stopped

    def __post_init__(self) -> None:
        self.about = self.checkpoints.about  # the caller's to change
        self.tried_at = self.training.step  # of the last checkpoint, written or not
        self.training.logs = tuple(self.folders)

    @property
    def path(self) -> Path:
        """The first seed's folder, which stands for the run."""
        return self.folders[0].path

    @property
    def algo(self) -> str:
        """Name of the algorithm."""
        return algorithm(self.training)

    @property
    def words(self) -> str:
        """The run as words of a command line."""
        config = self.training.config
        trust = " --trust" if ":" in config.env_id or config.wrap else ""
        return shlex.quote(str(self.path)) + trust

    def save(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, as `Checkpoints.save` does."""
        self.tried_at = self.training.step
        self.held.check()
        for folder in self.folders:
            folder.sync()
        self.about["folders"] = [folder.path.name for folder in self.folders]
        self.about["rows"] = [folder.mark for folder in self.folders]
        self.checkpoints.save(extra)

    def try_to_save(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint; training goes on where that fails."""
        try:
            self.save(extra)
        except OSError as error:
            at = f"step {self.training.step:,} of {self.checkpoints.folder}"
            print(f"warning: the checkpoint at {at} was not written: {error}", file=sys.stderr)

    def keep(self, *, completed: bool) -> None:
        """Write each seed's last policy, its timeline, and what no timeline gives to its folder.

        What was shipped of an earlier end is removed.

        Raises:
            OSError: They cannot be written; what was there still is.
        """
        self.held.check()
        timeline = self.averages.timeline if self.averages else None
        candidates = self._candidates()
        for member, folder in enumerate(self.folders):
            for name in (CHOICE, SHIPPED):
                (folder.path / name).unlink(missing_ok=True)
            policy = member_policy(self.training, member)
            folder.finish(policy.state_dict(), completed=completed)
            if timeline and timeline.updates:
                own = timeline.member(member, like=policy)
                own.save(folder.path / "timeline.pt", dtype=torch.float32)
                seeds = len(self.folders)
                kept = {n: select_member(x, member, seeds) for n, x in candidates.items()}
                with write_whole(folder.path / CANDIDATES) as file:
                    torch.save(kept, file)

    def _candidates(self) -> dict[str, Mapping[str, Tensor]]:
        """The weights [S, ...] at the end that can be shipped and no timeline gives, by scheme."""
        bank = self.averages.bank if self.averages else None
        found: dict[str, Mapping[str, Tensor]] = {}
        if bank:
            found |= {name: bank.average(name) for name in bank.rules}
        if target := self.training.agent.targets.get("actor"):
            found[TARGET.name] = dict(target.module.named_parameters())
        return found

    def close(self) -> None:
        """Close the environments and the files, and give the folders free."""
        with ExitStack() as stack:
            stack.callback(self.held.close)
            for folder in self.folders:
                stack.callback(folder.close)
            stack.callback(self.training.close)


def begin(
    training: Training,
    averages: PolicyAverages | None,
    held: Hold,
    paths: Sequence[Path],
    about: dict[str, Any],
    *,
    replay: bool = True,
) -> Run:
    """Begin a run in empty folders that are held, in the order of the seeds.

    Args:
        about: What checkpoints say about the run, as plain values.
        replay: Keep the replay buffer in checkpoints.
    """
    checkpoints = Checkpoints(paths[0] / CHECKPOINT, training, averages, about, replay=replay)
    folders = _open_folders(training, paths, None, [HEADER] * len(paths))
    return Run(training, averages, folders, checkpoints, held)


def go_on(
    training: Training,
    averages: PolicyAverages | None,
    held: Hold,
    paths: Sequence[Path],
    checkpoint: Checkpoint,
    notes: Sequence[str] = (),
    *,
    replay: bool = True,
    exact: bool = False,
) -> Run | None:
    """Go on with a run from a checkpoint; a seed's folder that is gone is made anew.

    Args:
        training: New, and built as the checkpoint says, as are its averages.
        checkpoint: Read while the folders were held.
        notes: Why the run may not be the same to the bit, as known so far.
        exact: Return None, with nothing written, where the run may not be the same to the bit.

    Raises:
        ValueError: The checkpoint or a folder does not fit; nothing was written.
        OSError: A folder cannot be written.
    """
    found = list(notes)
    marks = checkpoint.about.get("rows", [])
    if not len(marks) == len(paths) == len(training.seeds):
        raise ValueError(
            f"the checkpoint does not say which folder and rows each seed had: {marks}"
        )
    tables = []
    for path, mark in zip(paths, marks, strict=True):
        for part in (path, path / CHECKPOINT, path / AVERAGES):
            refuse_link(part)
        rows, problem = rows_until(path, mark, checkpoint.step)
        if problem and path.exists() and path != paths[0]:
            raise ValueError(f"{path} is not of this run: {problem}. Move it away to go on")
        tables.append(rows)
        found += [problem] if problem else []
    found = [printable(note) for note in found + restore(checkpoint, training, averages)]
    if exact and found:
        return None

    for path in paths:
        if not path.exists():
            path.mkdir()
            held.take(path)
    folders = _open_folders(training, paths, training.step, tables)
    _note_resume(paths[0], training.step, found)
    checkpoints = Checkpoints(
        checkpoint.folder, training, averages, checkpoint.about, replay=replay, after=checkpoint
    )
    return Run(training, averages, folders, checkpoints, held, found)


def is_kept(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether a run that has ended left its policy, and what can be shipped in its place, whole."""
    names = ["policy.pt"]
    if checkpoint.state["averages"]:
        names += ["timeline.pt", CANDIDATES]
    try:
        for name in names:
            verify_archive(path / name)
    except (OSError, ValueError):
        return False
    return True


def folders_of(path: Path, checkpoint: Checkpoint) -> list[Path]:
    """The folders of a run's seeds, beside the first one's, wherever that was moved.

    Raises:
        ValueError: One of them is no plain name.
        OSError: One of the others is a link.
    """
    _, *names = checkpoint.about.get("folders", [path.name])
    paths = [path, *(beside(path, str(name)) for name in names)]
    if len(set(paths)) < len(paths):
        raise ValueError(f"the checkpoint names one folder for several seeds: {names}")
    for other in paths[1:]:
        refuse_link(other)
    return paths


def printable(text: str) -> str:
    """Foreign text with its control characters escaped: a line stays a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def algorithm(training: Training) -> str:
    """The name of a training's algorithm."""
    kind = type(training.agent)
    return next(name for name, (other, _) in ALGORITHMS.items() if other is kind)


def member_policy(training: Training, member: int) -> nn.Module:
    """The policy of one seed, as a network of one member."""
    state = training.agent.policy.state_dict()
    return stack_members(training.agent.policy, [select_member(state, member, len(training.seeds))])


def _open_folders(
    training: Training, paths: Sequence[Path], resume_at: int | None, tables: Sequence[bytes]
) -> list[RunFolder]:
    algo, about = algorithm(training), (training.config, training.agent.config, resume_at)
    with ExitStack() as stack:
        folders = [
            stack.enter_context(closing(RunFolder(path, algo, seed, *about, rows)))
            for path, seed, rows in zip(paths, training.seeds, tables, strict=True)
        ]
        stack.pop_all()
    return folders


def _note_resume(path: Path, step: int, notes: Sequence[str]) -> None:
    """Add a line to the list of a run's resumes."""
    place, before = path / "resumed.txt", b""
    if place.is_file() and not place.is_symlink():
        before = place.read_bytes()
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {step}: {'; '.join(notes) or 'exact'}\n"
    with write_whole(place) as file:
        file.write(before + line.encode(errors="backslashreplace"))
