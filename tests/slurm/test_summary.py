"""The summary after a failed run, and the check for jobs that an earlier run left in the queue."""

import pytest

from surf import summary

JOB = """\
Error in rule {rule}:
    message: {message}
    jobid: {number}
    input: results/rounds/{part}.parquet
    output: results/answers/{part}.parquet, results/quarantine/answers/{part}.parquet
    log: {logs} (check log file(s) for error details)
    shell:
        python -m surf.answer --rounds results/rounds/{part}.parquet
        (command exited with non-zero exit code)
    external_jobid: 7

rule merge:
    jobid: 99
    output: results/answers/_manifest.json
"""


def failed(number=2, message="None", rule="answer", part="part-00000-of-00002", logs="a.log, slurm.log"):
    """Snakemake's paragraph about one failed attempt."""
    return JOB.format(rule=rule, message=message, number=number, part=part, logs=logs)


def test_the_last_attempt_counts_and_a_job_that_was_done_in_the_end_is_no_failure(tmp_path):
    text = failed(2) + "Trying to restart job 2.\n" + failed(5, part="part-00001-of-00002") + failed(2)
    text += "Finished jobid: 5 (Rule: answer)\n"
    (job,) = summary.failures(text, tmp_path)
    assert (job.rule, job.output, job.attempts) == ("answer", "results/answers/part-00000-of-00002.parquet", 2)
    assert job.logs == ["a.log", "slurm.log"]


@pytest.mark.parametrize(
    ("state", "slurm_log", "stage_log", "reason"),
    [
        ("TIMEOUT", "", "working\n", "it ran out of time"),
        ("FAILED", "*** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n", "", "it ran out of time"),
        ("OUT_OF_MEMORY", "", "", "it ran out of memory"),
        ("CANCELLED", "error: Job 7 exceeded memory limit (800 > 700), being killed\n", "", "it ran out of memory"),
        ("NODE_FAIL", "", "", "its node failed"),
        ("CANCELLED", "*** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***\n", "", "it was cancelled"),
        ("FAILED", "CalledProcessError in file x:\n", "Traceback\nKeyError: 'a'\n", "KeyError: 'a'"),
        ("FAILED", "CalledProcessError in file x:\n", "error: a.json: bad; next: mend it\n", "a.json: bad; next: mend it"),
        ("FAILED", "", "", "its log says nothing: it was killed, or never started"),
    ],
)
def test_why_a_job_failed(tmp_path, state, slurm_log, stage_log, reason):
    (tmp_path / "slurm.log").write_text(slurm_log)
    (tmp_path / "a.log").write_text(stage_log)
    message = f"SLURM-job '7' failed, SLURM status is: '{state}'."
    assert summary.failures(failed(message=message), tmp_path)[0].reason == reason


def test_a_stages_own_words_count_without_slurm(tmp_path):
    """With memory that a stage ran out of, and coped with, on the way."""
    (tmp_path / "a.log").write_text("CUDA out of memory: batch halved\nValueError: no such layer\n")
    assert summary.failures(failed(logs="a.log"), tmp_path)[0].reason == "ValueError: no such layer"


def test_the_next_command_makes_just_the_failed_parts(tmp_path):
    jobs = summary.failures(failed(2) + failed(5, part="part-00001-of-00002"), tmp_path)
    text = summary.render(jobs, ["snakemake", "--profile", "slurm", "--config", "a={b: 1}"])
    parts = "results/answers/part-00000-of-00002.parquet results/answers/part-00001-of-00002.parquet"
    assert f"  snakemake {parts} --profile slurm --config 'a={{b: 1}}'\n" in text
    assert text.startswith("2 jobs failed:")
    assert summary.render([], ["snakemake"]) == ""


def test_a_failed_check_is_not_told_to_start_the_whole_run(tmp_path):
    check = "Error in rule check:\n    jobid: 1\n    log: check.log (check log file(s) for error details)\n"
    text = summary.render(summary.failures(check, tmp_path), ["snakemake", "--cores", "all"])
    assert text.startswith("1 job failed:\n  check\n") and "next: mend what" in text and "snakemake --cores" not in text
    both = summary.render(summary.failures(check + failed(2), tmp_path), ["snakemake"])
    assert "\n  snakemake results/answers/part-00000-of-00002.parquet\n" in both
    bare = summary.render(summary.failures(check.replace("check:", "draw:"), tmp_path), ["snakemake"])
    assert "\n  snakemake draw\n" in bare, "without an output the rule's name is the target"


def test_targets_are_taken_out_of_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["snakemake", "pairs", "model", "--profile", "slurm", "--retries", "1", "--config", "a=1"])
    assert summary.command_line() == ["snakemake", "--profile", "slurm", "--retries", "1", "--config", "a=1"]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A squeue that prints what it is told."""

    def answer(text, code=0):
        program = tmp_path / "squeue"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return answer


def test_jobs_of_this_folder_are_leftovers_and_others_are_not(tmp_path, queue):
    here = tmp_path / "work"
    queue(
        f"4|rule_answer_wildcards_part-00000-of-00002|{here}\n5|rule_pair|{here}\n"
        f"6|rule_pair|{tmp_path}/other\n7||{here}\n8|my own|{here}"
    )
    text = summary.leftovers(here)
    assert text.startswith("2 jobs of an earlier run still in the queue (answer part-00000-of-00002, pair)")
    assert "scancel 4 5," in text
    queue("")
    assert summary.leftovers(here) == ""


def test_a_queue_that_does_not_answer_is_said(tmp_path, queue):
    queue("", code=1)
    assert "squeue does not answer" in summary.leftovers(tmp_path)
