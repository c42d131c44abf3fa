"""`snakemake --profile slurm` on a real Slurm cluster of this machine: the short form of example.py and faults.py."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cluster as slurm
import pytest

CONFIG = ["--config", "demo={scale: 0.2}"]
COMMAND = ["answers", "--profile", "slurm", "--slurm-init-seconds-before-status-checks", "1", *CONFIG]


@pytest.fixture(scope="module")
def base():
    """A folder that is the same on all nodes, which /tmp is not."""
    folder = Path(tempfile.mkdtemp(prefix="surf-test-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with two GPUs each."""
    if why := slurm.obstacle():
        pytest.skip(why)
    try:
        slurm.install()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"Slurm cannot be installed here: {error}")
    with slurm.Cluster(nodes=2) as started:
        yield started


def test_jobs_of_a_killed_run_are_refused_and_the_result_is_that_of_a_local_run(cluster, base):
    """Snakemake is killed (SIGKILL) while its jobs are at work; the rerun names them, and goes on once they are cancelled."""
    ours = slurm.copy_of_the_project(base / "slurm")
    truth = shutil.copytree(ours, base / "local", symlinks=True)

    def run():
        return cluster.snakemake(ours, *COMMAND)

    def output():
        return (ours / "output.txt").read_text()

    killed = run()
    until(lambda: killed.poll() is not None or len(cluster.jobs()) == 2, output)
    jobs = cluster.jobs()
    assert {comment for comment, _ in jobs.values()} == {
        f"rule_answer_wildcards_part-0000{number}-of-00002" for number in (0, 1)
    }, output()
    for job in jobs:
        details = cluster.call("scontrol", "show", "job", job).stdout
        assert "TresPerNode=gres:gpu:1" in details and "NumNodes=1" in details and "Requeue=1" in details
        cluster.call("scontrol", "suspend", job)  # or they would be done before the rerun starts
    killed.kill()
    killed.wait()

    assert cluster.snakemake(ours, "--unlock", *COMMAND[1:]).wait() == 0, output()
    assert run().wait() != 0
    refusal = output()
    assert f"scancel {' '.join(jobs)}" in refusal and "2 jobs of an earlier run still in the queue" in refusal
    assert set(cluster.jobs("S,R,PD")) == set(jobs), "nothing was submitted beside them"

    cluster.call("scancel", *jobs)
    until(lambda: not cluster.jobs("S,R,PD,CG"), output)
    assert run().wait() == 0, output()
    command = [sys.executable, "-m", "snakemake", "answers", "--profile", "profiles/local", *CONFIG]
    subprocess.run(command, cwd=truth, check=True, capture_output=True)
    for path in sorted((truth / "results").rglob("*.parquet")):
        assert (ours / path.relative_to(truth)).read_bytes() == path.read_bytes(), path


def until(ready, output, seconds=120):
    """Wait until `ready`."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, output()
        time.sleep(0.2)
