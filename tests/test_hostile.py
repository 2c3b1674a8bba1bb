"""What a run folder that somebody else made can do: nothing outside itself."""

import itertools
import json
import shutil
import sys

import gymnasium as gym
import pytest

from agents.checkpoint import newest
from scripts import enjoy, posthoc, ship, train
from scripts.experiment.jobs import Job
from scripts.experiment.measurement import run
from scripts.experiment.paths import beside, folder_name
from scripts.experiment.trust import require_trusted
from tests.test_checkpoint import sign
from tests.test_compare import TINY
from tests.test_resume import COMMAND, DQN_TINY, QUICK, contents, killed_at
from tests.test_resume import TINY as SMALL


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """The folder of a run that was killed at step 180."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(180, patch, [*COMMAND, "--runs-dir", str(runs)])
    (folder,) = runs.iterdir()
    return folder


@pytest.fixture(scope="module")
def finished(broken_off, tmp_path_factory):
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(broken_off, folder)
    assert train.main(["--resume", str(folder)]) == 0
    return folder


@pytest.fixture
def outside(tmp_path):
    """What must stay as it is."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    yield outside
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"file": "mine"}


def about(folder, **changes):
    """Change what a run's newest checkpoint says of the run, checksums and all."""
    number = newest(folder / "checkpoint")[0].number
    text = (folder / "checkpoint" / f"{number:06d}.json").read_bytes().partition(b"\n")[2]
    sign(folder / "checkpoint", number, about=json.loads(text)["about"] | changes)


FILES = ["resumed.txt", "config.json", "evaluations.csv", "policy.pt"]
FILES += ["timeline.pt", "candidates.pt"]


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(
    name, broken_off, outside, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / "file")
    assert train.main(["--resume", str(folder)]) == 0
    assert not (folder / name).is_symlink()


@pytest.mark.parametrize("name", ["checkpoint", "averages", "lock"])
def test_a_link_in_the_place_of_a_folder_or_of_the_lock_is_refused(
    name, broken_off, outside, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    if name == "lock":
        (folder / name).unlink()
        (folder / name).symlink_to(outside / "file")
    else:
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    assert train.main(["--resume", str(folder)]) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["..", ".", "", "../outside", "/tmp/x", "a/../../outside"])
def test_a_folder_that_a_checkpoint_names_is_a_plain_name(name, tmp_path):
    with pytest.raises(ValueError, match="is not the name of a folder beside"):
        beside(tmp_path / "run", name)
    assert beside(tmp_path / "run", "..x") == tmp_path / "..x"


def test_another_run_beside_a_hostile_one_is_not_written_to(finished, tmp_path, capsys):
    """Its checkpoint names the other as the folder of a second seed."""
    command = f"{DQN_TINY} {QUICK} {SMALL} --seeds 1,4 --together --checkpoint-every 70".split()
    with pytest.MonkeyPatch.context() as patch:
        killed_at(180, patch, [*command, "--runs-dir", str(tmp_path)])
    first = min(tmp_path.iterdir())
    victim = tmp_path / "victim"
    shutil.copytree(finished, victim)
    before = contents(victim)
    about(first, folders=[first.name, "victim"])
    assert train.main(["--resume", str(first)]) == 2
    assert f"{victim} is not of this run" in capsys.readouterr().err
    assert contents(victim) == before
    about(first, folders=[first.name, ".."])
    assert train.main(["--resume", str(first)]) == 2
    assert "'..' is not the name of a folder" in capsys.readouterr().err


def test_what_a_manifest_says_is_written_as_one_line_without_control_characters(
    broken_off, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    number = newest(folder / "checkpoint")[0].number
    sign(folder / "checkpoint", number, versions={"torch": "1\n\x1b[2J; rm -rf ~\n"})
    assert train.main(["--resume", str(folder)]) == 0
    (line,) = (folder / "resumed.txt").read_text().splitlines()
    assert r"torch was 1\n\x1b[2J; rm -rf ~\n, now" in line
    assert "\x1b" not in capsys.readouterr().err


def test_what_is_made_of_a_finished_run_follows_no_link(finished, outside, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("posthoc.csv", "shipped.pt", "shipped.json", "episodes.json"):
        (folder / name).symlink_to(tmp_path / "not yet" if "json" in name else outside / "file")
    (folder / "videos").mkdir()
    (folder / "videos" / "rl-video-episode-0.mp4").symlink_to(outside / "file")
    assert posthoc.main([str(folder), "--episodes", "2"]) == 0
    assert ship.main([str(folder), "--episodes", "0"]) == 0
    assert not any((folder / name).is_symlink() for name in ("shipped.pt", "shipped.json"))
    assert enjoy.main([str(folder), "--episodes", "1", "--video"]) == 0
    (video,) = (folder / "videos").iterdir()
    assert video.stat().st_size > 1000
    assert not video.is_symlink()
    video.unlink()
    (folder / "videos").rmdir()
    (folder / "videos").symlink_to(outside)
    assert enjoy.main([str(folder), "--episodes", "1", "--video"]) == 2
    assert "is a symbolic link: nothing is written through it" in capsys.readouterr().err


def test_a_link_in_the_place_of_a_run_of_the_comparison_is_refused(outside, tmp_path):
    job = Job("dqn", "CartPole-v1", (1,), **TINY)
    (tmp_path / job.run_names()[0]).symlink_to(outside)
    with pytest.raises(OSError, match="is a symbolic link"):
        run(job, tmp_path)


# Modules that a folder names


def module_in(folder):
    """Put a module there that leaves a trace when it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.py").write_text(
        "from pathlib import Path\n"
        "import gymnasium\n"
        "Path(__file__).with_name('imported').touch()\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "if 'Evil-v0' not in gymnasium.registry:\n"
        "    gymnasium.register('Evil-v0', CartPoleEnv, max_episode_steps=20)\n"
    )


@pytest.fixture
def forget():
    """Import nothing of one test in the next."""
    yield
    for name in [name for name in sys.modules if name.split(".")[-1] == "evil"]:
        del sys.modules[name]
    gym.registry.pop("Evil-v0", None)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("script", [enjoy, posthoc, ship])
def test_a_module_that_lies_in_the_run_folder_is_never_imported(
    script, finished, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "runs" / "a run"
    shutil.copytree(finished, folder)
    module_in(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    for module in ("runs.a run.evil", "evil"):
        monkeypatch.syspath_prepend(str(folder))
        config["run"]["env_id"] = f"{module}:Evil-v0"
        (folder / "config.json").write_text(json.dumps(config))
        for trust in ([], ["--trust"]):
            assert script.main([str(folder), *trust]) == 2
            assert "whose module lies in that folder itself" in capsys.readouterr().err
    assert not (folder / "imported").exists()


@pytest.mark.usefixtures("forget")
def test_a_module_that_a_folder_names_is_imported_only_with_trust_and_is_said(
    finished, tmp_path, monkeypatch, capsys
):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished, folder)
    module_in(elsewhere)
    monkeypatch.syspath_prepend(str(elsewhere))
    config = json.loads((folder / "config.json").read_text())
    config["run"]["env_id"] = "evil:Evil-v0"
    (folder / "config.json").write_text(json.dumps(config))
    assert enjoy.main([str(folder), "--episodes", "1"]) == 2
    message = f"imports the module 'evil' ({elsewhere / 'evil.py'}): add --trust"
    assert message in capsys.readouterr().err
    assert not (elsewhere / "imported").exists()
    assert enjoy.main([str(folder), "--episodes", "1", "--trust"]) == 0
    said = f"importing the module 'evil' ({elsewhere / 'evil.py'}) for 'evil:Evil-v0'"
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("forget")
def test_a_run_of_a_module_is_resumed_with_trust_as_its_last_line_says(
    tmp_path, monkeypatch, capsys
):
    module_in(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    command = f"{DQN_TINY} {QUICK} {SMALL} --env-id evil:Evil-v0 --checkpoint-every 70".split()
    runs = tmp_path / "my runs"
    killed_at(180, monkeypatch, [*command, "--runs-dir", str(runs)])
    (folder,) = runs.iterdir()
    assert train.main(["--resume", str(folder)]) == 2
    assert "add --trust if you trust that folder" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--trust"]) == 0
    assert f"python -m scripts.enjoy '{folder}' --trust\n" in capsys.readouterr().out


def test_a_wrapper_that_a_folder_names_is_a_module_that_it_names(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = json.loads((folder / "config.json").read_text())
    config["run"]["wrap"] = ["gymnasium.wrappers:ClipReward"]
    (folder / "config.json").write_text(json.dumps(config))
    assert posthoc.main([str(folder)]) == 2
    assert "imports the module 'gymnasium.wrappers'" in capsys.readouterr().err
    config["run"]["wrap"] = ["gymnasium.wrappers:FlattenObservation"]
    (folder / "config.json").write_text(json.dumps(config))
    assert enjoy.main([str(folder), "--episodes", "1", "--trust"]) == 0


def test_nothing_is_imported_to_find_out_where_a_module_lies(tmp_path, monkeypatch):
    package = tmp_path / "elsewhere" / "package"
    module_in(package)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"package.evil.*package/evil.py.*add --trust"):
        require_trusted("package.evil:Evil-v0", tmp_path / "run", trust=False)
    with pytest.raises(ValueError, match="which is not found here"):
        require_trusted("nowhere.evil:Evil-v0", tmp_path / "run", trust=False)
    require_trusted("CartPole-v1", tmp_path / "run", trust=False)


# Names and sizes


def test_other_names_give_another_folder():
    ids = [
        "ns/A-v0",
        "ns-A-v0",
        "ns_A-v0",
        "ns/A-v0/",
        "ns%2FA-v0",
        "a__b",
        "a___b",
        "a__",
        "m:A-v0",
    ]
    ids += ["m.A-v0", "a", "b", "a__dqn", "..", "A__1"]
    parts = [*itertools.product(ids, ["dqn", "sac"], ["1", "12"])]
    parts += [*itertools.product(ids, ["dqn"], ["x", "b__", "_x"], ["1"])]
    names = {folder_name(*each) for each in parts}
    assert len(names) == len(parts)
    assert all("/" not in name and name not in ("", ".", "..") for name in names)
    assert folder_name("CartPole-v1", "dqn", "lr-x0.25", "201") == "CartPole-v1__dqn__lr-x0.25__201"


def test_a_config_of_layers_that_its_weights_do_not_have_takes_no_memory(
    finished, tmp_path, capsys
):
    for name in ("config.json", "policy.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["agent"]["hidden"] = [2**20, 2**20]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert enjoy.main([str(tmp_path)]) == 2
    assert "units have more than its" in capsys.readouterr().err
