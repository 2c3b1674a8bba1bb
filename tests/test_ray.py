import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from scripts import compare, experiment
from scripts.experiment import driver
from scripts.experiment.jobs import Job, Options, plan
from scripts.experiment.life import CHECKPOINT
from scripts.experiment.locks import Hold
from scripts.experiment.results import collect
from tests.test_compare import TINY, execute
from tests.test_experiment import resumed_at

pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster

from scripts.experiment import cluster

JOB = Job("dqn", "CartPole-v1", (1, 2), **{**TINY, "total_steps": 6_000})
STORE = {"object_store_memory": cluster.OBJECT_STORE}


@pytest.fixture(autouse=True)
def _nothing_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Ray would leave a token there


def on_ray(address):
    return cluster.connected(address, workers=2, num_cpus=1, num_gpus=0)


def wait_for_a_checkpoint(out):
    """Wait until the job could go on if it were lost; not for ever."""
    for _ in range(60_000):
        if any((out / "runs" / JOB.run_names()[0] / CHECKPOINT).glob("*.json")):
            return
        time.sleep(0.002)
    pytest.fail("the job has not come to its first checkpoint")


def results(out):
    return (out / "results" / "results.csv.gz").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a process on this machine."""
    out = tmp_path_factory.mktemp("whole")
    assert execute(out, [JOB]) == []
    return results(out)


@pytest.mark.full
def test_a_node_that_dies_changes_no_number(tmp_path, whole):
    head = {"num_cpus": 0, "include_dashboard": False, **STORE}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    first = nodes.add_node(num_cpus=1, **STORE)
    try:
        with on_ray(nodes.address) as begin:

            def begin_and_lose_the_node(job, out):
                task = begin(job, out)
                wait_for_a_checkpoint(out)
                nodes.add_node(num_cpus=1, **STORE)
                nodes.remove_node(first, allow_graceful=False)
                return task

            assert driver.execute([JOB], tmp_path, 1, begin_and_lose_the_node) == []
    finally:
        nodes.shutdown()
    collect(tmp_path)
    assert results(tmp_path) == whole
    assert len(resumed_at(JOB, tmp_path / "runs")) == 1


@pytest.mark.full
def test_a_task_that_is_tried_again_while_the_first_still_writes_waits_for_it(tmp_path, whole):
    """As of a machine that was given up for lost, and is not."""
    with on_ray("local") as begin:

        def begin_twice(job, out):
            task = begin(job, out)
            wait_for_a_checkpoint(out)
            again.append(begin(job, out))
            assert task.poll() is None
            return task

        again = []
        assert driver.execute([JOB], tmp_path, 1, begin_twice) == []
        ray.get(again[0].ref)
    collect(tmp_path)
    assert results(tmp_path) == whole
    assert resumed_at(JOB, tmp_path / "runs") == []


DRIVER = """
import sys
from pathlib import Path
from scripts.experiment import cluster, driver
from scripts.experiment.jobs import read_job
address, job, out = sys.argv[1:]
with cluster.connected(address, workers=1, num_cpus=1, num_gpus=0) as begin:
    driver.execute([read_job(Path(job))], Path(out), 1, begin)
"""


def start_driver(address, out):
    """A driver in a process of its own, whose job has come to its first checkpoint."""
    driver.prepare(JOB, out)
    words = [sys.executable, "-c", DRIVER, address, str(driver.job_file(JOB, out)), str(out)]
    process = subprocess.Popen(words, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    wait_for_a_checkpoint(out)
    return process


@pytest.mark.full
def test_a_driver_that_is_killed_leaves_no_task_and_another_goes_on(tmp_path, whole):
    nodes = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, **STORE})
    try:
        process = start_driver(nodes.address, tmp_path)
        process.kill()
        process.wait()
        with on_ray(nodes.address) as begin:
            assert driver.execute([JOB], tmp_path, 1, begin) == []
    finally:
        nodes.shutdown()
    collect(tmp_path)
    assert results(tmp_path) == whole
    assert len(resumed_at(JOB, tmp_path / "runs")) == 1


@pytest.mark.full
def test_a_head_node_that_is_killed_ends_the_driver_and_costs_nothing(tmp_path, whole, monkeypatch):
    """Its tasks go on until they notice; whoever comes next waits for them."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    nodes = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    nodes.add_node(num_cpus=1, **STORE)
    try:
        process = start_driver(nodes.address, tmp_path)
        nodes.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        assert process.wait() != 0
        assert driver.execute([JOB], tmp_path, 1) == []
    finally:
        for node in [*nodes.worker_nodes]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    collect(tmp_path)
    assert results(tmp_path) == whole


@pytest.mark.full
def test_an_object_store_that_is_full_is_in_nobodys_way(tmp_path, whole):
    with on_ray("local") as begin:
        most = ray.cluster_resources()["object_store_memory"]
        held = [ray.put(np.zeros(2**20)) for _ in range(int(3 * most / 2**23))]  # 8 MiB each
        assert driver.execute([JOB], tmp_path, 1, begin) == []
        assert held
    collect(tmp_path)
    assert results(tmp_path) == whole


@pytest.mark.full
def test_ctrl_c_leaves_no_task_and_loses_nothing(tmp_path, whole):
    def press():
        wait_for_a_checkpoint(tmp_path)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt), on_ray("local") as begin:
        driver.execute([JOB], tmp_path, 1, begin)
    with closing(Hold()) as hold:
        hold.take(tmp_path / "runs" / JOB.run_names()[0])  # the task has let go of it
    wrong = Job("dqn", "CartPole-v1", (3,), **{**TINY, "agent": {"gamma": 2.0}})
    with on_ray("local") as begin:
        assert driver.execute([JOB, wrong], tmp_path, 2, begin) == [wrong]
    collect(tmp_path)
    assert results(tmp_path) == whole
    assert len(resumed_at(JOB, tmp_path / "runs")) == 1
    errors = (tmp_path / "jobs" / "CartPole-v1__dqn__3.stderr.txt").read_text()
    assert "gamma must be in [0.0, 1.0], got 2.0" in errors


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:9"])
def test_an_address_without_a_cluster_is_refused(address, tmp_path, capsys):
    argv = ["--tier", "s", "--ray", address, "--out", str(tmp_path)]
    assert compare.main(argv) == 2
    assert f"error: there is no Ray to join at '{address}'" in capsys.readouterr().err


def test_without_ray_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "scripts.experiment.cluster")
    monkeypatch.delattr(experiment, "cluster")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert compare.main(["--tier", "s", "--ray", "local", "--out", str(tmp_path)]) == 2
    assert "error: --ray needs Ray: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(tier="s", num_gpus=0.5), "num-gpus is for --ray"),
        (Options(tier="s", ray="local", num_gpus=-1), "num-gpus must be a share of one or a whole"),
        (Options(tier="s", ray="local", num_cpus=1.5), "num-cpus must be a share of one or a"),
    ],
)
def test_resources_that_ray_does_not_know_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(options)


def test_networks_live_on_the_gpu_that_is_asked_for():
    jobs = plan(Options(tier="s", ray="local", num_gpus=0.25))
    assert {job.device for job in jobs} == {"cuda"}
    assert {job.device for job in plan(Options(tier="s", ray="local"))} == {"cpu"}


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="--out must lie on storage that all machines"):
        cluster.work(tmp_path / "jobs" / "run.json", tmp_path / "runs")
