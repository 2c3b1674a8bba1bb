import re
import signal
import socket
import sys

import pytest
from tensorboard.summary.writer import event_file_writer

from scripts import train
from scripts.experiment import tracking
from tests.test_resume import COMMAND

STAND_IN = '''
"""As much of wandb as a run calls, which writes down what it is asked for."""

import sys
from types import SimpleNamespace

from tensorboard.summary.writer import event_file_writer

run, calls, broken = None, [], ""


class Writer(event_file_writer.EventFileWriter):
    """Where TensorBoard's own is made, wandb reads from then on."""

    def __init__(self, logdir):
        calls.append(("reads", logdir))
        super().__init__(logdir)


def patch(root_logdir):
    calls.append(("patch", root_logdir))
    event_file_writer.EventFileWriter = Writer


def init(**options):
    global run
    calls.append(("init", options))
    if broken == "init":
        raise RuntimeError("no key")
    run = SimpleNamespace()


def finish(exit_code):
    global run
    calls.append(("finish", exit_code))
    if broken == "finish":
        raise BrokenPipeError("it is dead")
    run = None


tensorboard = SimpleNamespace(patch=patch)
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for wandb, which need not be installed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    writer = event_file_writer.EventFileWriter
    import wandb

    yield wandb
    event_file_writer.EventFileWriter = writer
    del sys.modules["wandb"]


def trained(runs, *words):
    assert train.main([*COMMAND, "--runs-dir", str(runs), *words]) == 0
    (folder,) = runs.iterdir()
    return folder


def test_wandb_is_begun_before_the_events_reads_both_folders_and_changes_no_bit(wandb, tmp_path):
    plain = trained(tmp_path / "plain")
    assert not wandb.calls
    folder = trained(tmp_path / "tracked", "--track", "wandb")
    (patched, root), (begun, about), first, second, end = wandb.calls
    assert (patched, root) == ("patch", str(folder))
    assert (begun, about["name"]) == ("init", folder.name)
    assert (about["config"]["algo"], about["config"]["env_id"]) == ("dqn", "CartPole-v1")
    assert about["config"]["seed"] == 1
    assert [first, second] == [("reads", str(folder)), ("reads", str(folder / "averages"))]
    assert end == ("finish", 0)
    assert (folder / "policy.pt").read_bytes() == (plain / "policy.pt").read_bytes()


def test_the_names_of_event_files_are_those_that_wandb_reads(tmp_path):
    """It asks for `tfevents`, the second at which a file began, and this machine's name."""
    folder = trained(tmp_path)
    files = [path.name for path in folder.rglob("*tfevents*")]
    assert len(files) == 2
    for name in files:
        assert re.match(rf".*tfevents\.\d+\.{re.escape(socket.gethostname())}\.", name)


@pytest.mark.parametrize("where", ["init", "finish"])
def test_what_wandb_raises_is_a_warning_and_the_run_is_whole(where, wandb, tmp_path, capsys):
    wandb.broken = where
    folder = trained(tmp_path / "runs", "--track", "wandb")
    assert (folder / "timeline.pt").exists()
    assert capsys.readouterr().err.startswith("warning: wandb: ")


def test_a_resumed_run_is_tracked_again(wandb, tmp_path, monkeypatch):
    class Stopped(train.Training):
        def advance(self):
            super().advance()
            if self.step == 150:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "Training", Stopped)
        assert train.main([*COMMAND, "--runs-dir", str(tmp_path / "r"), "--track", "wandb"]) == 143
    assert wandb.calls[-1] == ("finish", 143)
    (folder,) = (tmp_path / "r").iterdir()
    wandb.calls.clear()
    assert train.main(["--resume", str(folder)]) == 0
    assert [what for what, _ in wandb.calls] == ["patch", "init", "reads", "reads", "finish"]


def test_without_wandb_it_is_refused_also_where_its_folder_lies(tmp_path, monkeypatch, capsys):
    if tracking.importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # what it leaves, which Python takes for a package
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train.main([*COMMAND, "--runs-dir", str(tmp_path / "runs"), "--track", "wandb"]) == 2
    said = "error: --track wandb needs wandb, which is not installed: pip install wandb\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "runs").exists()


def test_several_seeds_are_not_one_run_of_wandb(wandb, tmp_path, capsys):
    command = [*COMMAND, "--runs-dir", str(tmp_path / "runs"), "--track", "wandb"]
    assert train.main([*command, "--seeds", "1..2", "--together"]) == 2
    assert "--track follows one seed" in capsys.readouterr().err
    assert not wandb.calls
