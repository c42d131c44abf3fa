"""The look-out for jobs that SLURM has forgotten: what Snakemake waits for, and when it is lost."""

import os
import signal
import time

import pytest

from surf import watch
from surf.errors import SurfError

LOG = """\
rule answer:
    output: results/answers/part-00000-of-00002.parquet
    jobid: 3
    reason: Missing output files
Job 3 has been submitted with SLURM jobid 71 (log: a.log).
Job 4 has been submitted with SLURM jobid 72 (log: b.log).
Finished jobid: 4 (Rule: answer)
Error in rule answer:
    message: SLURM-job '71' failed, SLURM status is: 'TIMEOUT'.
    jobid: 3
    external_jobid: 71
Trying to restart job 3.
Job 3 has been submitted with SLURM jobid 73 (log: a.log).
Job 5 has been submitted with SLURM jobid 74 (log: c.log).
"""


def test_what_is_waited_for_is_what_was_submitted_last_and_has_not_ended():
    assert watch.waited_for(LOG) == {"73", "74"}
    assert watch.waited_for(LOG.partition("Error in")[0]) == {"71"}
    assert watch.waited_for("") == set()


def test_jobs_are_lost_when_all_have_been_missing_for_a_while():
    lost = watch.Lost(patience=10)
    assert lost.look({"7", "10"}, {"7", "10"}, 0) == []
    assert lost.look({"7", "10"}, {"7"}, 5) == [] == lost.look({"7", "10"}, {"7"}, 50), "one is there: there is time"
    assert lost.look({"7", "10"}, set(), 60) == [] == lost.look({"7", "10"}, set(), 69), "the other went just now"
    assert lost.look({"7", "10"}, set(), 70) == ["7", "10"]
    assert lost.look(set(), set(), 99) == [], "nothing is waited for"


def test_a_queue_that_does_not_answer_proves_nothing():
    lost = watch.Lost(patience=10)
    lost.look({"7"}, set(), 0)
    assert lost.look({"7"}, None, 20) == [] == lost.look({"7"}, set(), 21)
    assert lost.look({"7"}, set(), 31) == ["7"]


def test_snakemake_is_interrupted_and_the_jobs_are_named(tmp_path, monkeypatch, capsys):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 75\n")
    squeue.chmod(0o755)
    (tmp_path / "log").write_text(LOG)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv(watch.PATIENCE, "1")
    sent = []
    monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
    watch.start(tmp_path / "log")
    end = time.monotonic() + 60
    while not sent and time.monotonic() < end:
        time.sleep(0.05)
    assert sent == [(os.getpid(), signal.SIGINT)]
    assert "SLURM has forgotten jobs 73 74" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "0", "ten", "-5"])
def test_a_patience_that_is_none_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setenv(watch.PATIENCE, text)
    with pytest.raises(SurfError, match=f"SURF_LOST_AFTER={text}: is no number of seconds"):
        watch.start(tmp_path / "log")
