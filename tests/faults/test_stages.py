"""What a stage does when a signal, a full disk, a second writer or a dead one comes in its way."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import stages

from surf import checkpoints, cli, merge, store, summary
from surf.errors import SurfError


def stage(out, number):
    """A stage of eight rows, saved one by one; in the third it sends itself a signal."""
    partial = store.Partial(out, "answers", flags="")
    for chunk in cli.chunks([f"r{row}" for row in range(8)], 1, desc="stage"):
        if chunk[0] == "r2":
            os.kill(os.getpid(), number)
        partial.save(answers(*chunk))


@pytest.mark.parametrize(
    ("number", "saved"), [(signal.SIGTERM, 3), (signal.SIGUSR1, 3), (signal.SIGINT, 2), (signal.SIGKILL, 2)]
)
def test_a_signal_ends_a_stage_and_what_was_saved_stays(tmp_path, number, saved):
    """After SIGTERM and SIGUSR1 the rows at work are saved first. Nothing may depend on it: SIGKILL leaves no less behind
    than Ctrl-C, which does not wait."""
    out, said = tmp_path / "part-00000-of-00001.parquet", tmp_path / "said"
    pid = os.fork()
    if pid == 0:
        stages.become(lambda: cli.run(lambda: stage(out, number)), said)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number != signal.SIGKILL:
        assert code == 128 + number, said.read_text()
        assert f"error: stopped by {number.name}" in said.read_text()
        assert "Traceback" not in said.read_text()
    partial = store.Partial(out, "answers", flags="")
    assert sorted(partial.read()["round_id"].to_pylist()) == [f"r{row}" for row in range(saved)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_slices_get_longer_while_the_model_is_fast_and_shorter_when_it_is_slow(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])

    def lengths(count, size, seconds_per_row):
        found = []
        for chunk in cli.chunks(range(count), size, desc="test"):
            clock[0] += seconds_per_row * len(chunk)
            found.append(len(chunk))
        assert sum(found) == count
        return found

    assert lengths(1000, 512, 0.001) == [32, 128, 512, 328]
    assert lengths(200, 512, 5.0) == [32, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 8]
    assert max(lengths(200, 512, 50.0)[3:]) * 50 <= 4 * cli.SLICE_SECONDS
    assert lengths(7, 3, 500.0) == [3, 1, 1, 1, 1]
    assert lengths(0, 3, 1.0) == []


def test_a_full_disk_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "part"))

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(full)
    assert stop.value.code == 1
    assert f"error: {tmp_path / 'part'}: the disk is full" in capsys.readouterr().err


def answers(*ids):
    return store.table_of([{"round_id": i, "rank": -1, "response": ""} for i in ids], "answers")


def test_rows_can_be_saved_while_a_second_writer_of_the_part_is_done_with_it(tmp_path, monkeypatch):
    """It makes the part's folder go away before a piece is written, and again before the piece gets its name."""
    out = tmp_path / "part-00000-of-00001.parquet"
    partial = store.Partial(out, "answers", flags="")
    write, moments = pq.write_table, ["before", "after"]

    def write_table(*args, **options):
        moment = moments.pop(0) if moments else ""
        if moment == "before":
            store.forget(out)
        write(*args, **options)
        if moment == "after":
            store.forget(out)

    monkeypatch.setattr(store.pq, "write_table", write_table)
    partial.save(answers("r0"))
    assert not moments and partial.read()["round_id"].to_pylist() == ["r0"]


def test_saved_rows_are_kept_until_the_dataset_is_whole(tmp_path):
    """Snakemake deletes a part whose job ended after Snakemake itself was killed; it is made again from the saved rows."""
    parts = [tmp_path / f"part-0000{number}-of-00002.parquet" for number in range(2)]
    for number, part in enumerate(parts):
        store.Partial(part, "answers", flags="").save(answers(f"r{number}"))
        store.write_table(part, answers(f"r{number}"), "answers", {"version": 1})
    parts[0].unlink()
    assert store.Partial(parts[0], "answers", flags="").read().num_rows == 1
    store.write_table(parts[0], answers("r0"), "answers", {"version": 1})
    merge.merge("answers", parts, tmp_path / "_manifest.json")
    assert not (tmp_path / "_partial").exists()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    path = tmp_path / "deep/a.parquet"
    path.parent.mkdir()
    dead, alive, elsewhere = (
        path.with_name(f".a.parquet.{where}.{pid}.0123abcd.tmp") for where, pid in ((host, gone.pid), (host, 1), ("other", 1))
    )
    users = path.with_name(".notes.tmp")
    for stray in (dead, alive, elsewhere, users):
        stray.touch()
    store.write_table(path, answers("a"), "answers")
    assert not dead.exists() and alive.exists() and elsewhere.exists(), "another machine's writer may be alive"
    dead.touch()
    store.Partial(path, "answers", flags="").save(answers("a"))
    store.Partial(tmp_path / "deep/b.parquet", "answers", flags="").save(answers("b"))
    assert store.sweep(tmp_path) == 2
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([alive.name, users.name, "a.parquet", "_partial"])
    assert [folder.name for folder in (path.parent / "_partial").iterdir()] == ["b"], "b is not finished"


def test_a_torn_manifest_names_a_command_that_helps(tmp_path):
    manifest = tmp_path / "_manifest.json"
    for content in ("", '{"dataset": "ans', "[]", "{}"):
        manifest.write_text(content)
        with pytest.raises(SurfError, match=f"next: rm {manifest}, then your snakemake command again"):
            store.parts_of(manifest, "answers")
    manifest.unlink()
    with pytest.raises(SurfError, match="next: your snakemake command again"):
        store.parts_of(manifest, "answers")


def test_only_the_last_attempt_says_why(tmp_path):
    log = tmp_path / "a.log"
    log.write_text(
        f"12:00:00 answer {cli.BEGINS} n1, process 7\nerror: the first attempt's\n12:01:00 answer {cli.BEGINS} n1, process 8\n"
    )
    assert summary.why("", [log]) == "its log says nothing: it was killed, or never started"
    log.write_text(log.read_text() + "error: stopped by SIGTERM; …\n")
    assert summary.why("", [log]) == "stopped by SIGTERM; …"


def test_a_full_disk_is_the_reason_when_the_log_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(summary.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert summary.why("", [tmp_path / "a.log"]) == f"the disk of {tmp_path} is full"


def test_a_truncated_checkpoint_is_not_whole(tmp_path):
    run = {"fingerprint": "f", "result": None}
    store.write_json(tmp_path / "run.json", run)
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/weights").write_bytes(b"12345678")
        checkpoints.mark(folder)
    assert checkpoints.last(tmp_path, run) == str(tmp_path / "checkpoint-2")
    os.truncate(tmp_path / "checkpoint-2/deep/weights", 5)
    assert checkpoints.last(tmp_path, run) == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_second_training_of_a_model_is_refused_until_the_first_ends(tmp_path):
    program = (
        "import sys; from pathlib import Path; from surf import checkpoints\n"
        "with checkpoints.alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=-1, stdout=-1) as first:
        first.stdout.readline()
        with pytest.raises(SurfError, match=rf"process {first.pid} on \S+ is training this model"), checkpoints.alone(tmp_path):
            pass
        first.kill()
    with checkpoints.alone(tmp_path):
        pass


def test_torn_saved_rows_are_made_anew_and_whole_ones_are_not(tmp_path):
    out = tmp_path / "part-00000-of-00001.parquet"
    partial = store.Partial(out, "answers", flags="")
    for row in "abc":
        partial.save(answers(row))
    pieces = sorted(partial.folder.glob("*.parquet"))
    lost = pq.read_table(pieces[0], partitioning=None)["round_id"].to_pylist()
    for size in (0, 4, pieces[0].stat().st_size // 2):
        os.truncate(pieces[0], size) if pieces[0].exists() else pieces[0].write_bytes(b"PAR1")
        assert {*partial.read()["round_id"].to_pylist(), *lost} == set("abc")
        assert not pieces[0].exists()
