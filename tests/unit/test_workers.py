"""One worker a device, and two lanes in each: equal rows, failures and signals that reach everyone."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from surf import answer, cli, config, store, workers
from surf.errors import SurfError

ROOT = Path(__file__).parents[2]
# A stage without a model: rows are numbers; what it shall do beside its work stands in the file FAULT.
STAGE = """
import os, sys, time
from pathlib import Path
from surf import cli, store, workers

def main():
    folder = Path(sys.argv[1])
    partial = store.Partial(folder / "part-00000-of-00001.parquet", "answers", a=1)
    if count := workers.wanted():
        (table,), errors = workers.lead(count, [partial], 20, desc="numbers")
        rows = sorted(row["round_id"] for row in store.rows(table))
        print(*rows, *sorted(errors.items()))
        return
    own = workers.mine(range(20), str)
    partial.save(store.table_of([{"round_id": f"{n:02}", "rank": -1, "response": str(os.getpid())} for n in own], "answers"))
    (folder / f"pid{os.getpid()}").touch()
    fault = (folder / "FAULT").read_text() if (folder / "FAULT").exists() else ""
    if fault == "die" and 0 in own:
        raise RuntimeError("the device fell off the bus")
    while fault == "die":
        time.sleep(0.1)
    if fault == "forget":
        store.forget(partial.out)
    while fault == "wait":
        time.sleep(0.1)
    if workers.report({f"bad{own[0]}": os.environ["CUDA_VISIBLE_DEVICES"]}, len(own)):
        return
    print("alone", len(own))

cli.run(main)
"""


class Stage:
    def __init__(self, folder):
        self.folder = folder
        (folder / "stage.py").write_text(STAGE)

    def start(self, fault="", **environment):
        if fault:
            (self.folder / "FAULT").write_text(fault)
        return subprocess.Popen(
            [sys.executable, self.folder / "stage.py", self.folder],
            env={**os.environ, "SURF_WORKERS": "2", "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, count=2):
        """Of the workers, once all rows are saved."""
        limit = time.monotonic() + 180
        while time.monotonic() < limit:
            found = [int(path.name.removeprefix("pid")) for path in self.folder.glob("pid*")]
            if len(found) == count:
                return found
            time.sleep(0.05)
        raise AssertionError("the workers did not start")


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_for_the_end(pids):
    limit = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_workers_share_the_rows_and_have_a_device_each(tmp_path):
    process = Stage(tmp_path).start(CUDA_VISIBLE_DEVICES="GPU-a,GPU-b")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    words = out.split("(")
    assert words[0].split() == [f"{n:02}" for n in range(20)]
    assert sorted(word.split("'")[3] for word in words[1:]) == ["GPU-a", "GPU-b"]
    assert len(list(tmp_path.glob("pid*"))) == 2


def test_a_worker_that_dies_ends_the_job_with_its_error_and_rows_stay(tmp_path):
    stage = Stage(tmp_path)
    process = stage.start("die")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "failed with exit code 1: RuntimeError: the device fell off the bus" in err and "] Traceback" in err
    wait_for_the_end(stage.pids())
    rows = store.Partial(tmp_path / "part-00000-of-00001.parquet", "answers", a=1).read()
    assert sorted(rows["round_id"].to_pylist()) == [f"{n:02}" for n in range(20)]


def test_rows_that_another_job_made_forgotten_are_missed_and_no_part_is_written_without_them(tmp_path):
    """A second job finished the part, its dataset became whole, and its saved rows went, while a worker was still busy."""
    process = Stage(tmp_path).start("forget")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    assert "part-00000-of-00001.parquet: its saved rows are gone: another job finished it meanwhile" in err


def test_a_signal_reaches_the_workers(tmp_path):
    stage = Stage(tmp_path)
    process = stage.start("wait")
    pids = stage.pids()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    wait_for_the_end(pids)


def test_workers_end_when_their_leader_is_killed(tmp_path):
    stage = Stage(tmp_path)
    process = stage.start("wait")
    pids = stage.pids()
    process.kill()
    process.communicate(timeout=60)
    wait_for_the_end(pids)


def test_lanes_keep_the_order_work_side_by_side_and_finish_before_an_error_is_raised():
    meet = threading.Barrier(2, timeout=30)
    assert list(workers.lanes([[1], [2], [3], [4]], lambda one: (meet.wait(), one[0])[1])) == [1, 2, 3, 4]
    done = []

    def work(one):
        if one[0] == 2:
            raise KeyboardInterrupt
        done.append(one[0])

    with pytest.raises(KeyboardInterrupt):
        list(workers.lanes([[n] for n in range(9)], work))
    assert done in ([0, 1], [0, 1, 3])


def test_two_workers_write_the_part_of_one_process(tmp_path, tiny_lvlm, drawn_images, monkeypatch, crew):
    rows = [
        {"round_id": f"c{n}#0", "image": f"q{n % 6}.png", "question": "What?" * (n % 3), "answer": "yes", "task": "short"}
        for n in range(12)
    ]
    rows[5]["image"] = "gone.png"
    store.write_table(tmp_path / "rounds.parquet", store.table_of(rows, "rounds"), "rounds")
    sections = {
        "lvlm": config.Lvlm(model=str(tiny_lvlm), dtype="float32"),
        "answer": config.Answer(max_new_tokens=4, flush_rows=4),
        "images": config.Images(roots=[str(drawn_images)], max_bad_share=0.5),
    }
    flags = shlex.split(f"{cli.flags(**sections)} {cli.knobs(**sections)}")

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["answer", *paths(folder), *flags])
        answer.main()
        return [(folder / name).read_bytes() for name in ("part-00000-of-00001.parquet", "quarantine.parquet")]

    def paths(folder):
        out = folder / "part-00000-of-00001.parquet"
        return [
            "--rounds",
            str(tmp_path / "rounds.parquet"),
            "--out",
            str(out),
            "--quarantine",
            str(folder / "quarantine.parquet"),
        ]

    alone = run(tmp_path / "alone")

    saved = crew(answer.main)
    assert run(tmp_path / "two") == alone
    assert 0 < saved[0] < saved[1] == 11


def test_the_number_of_workers(monkeypatch):
    for text, count in (("0", 0), ("1", 0), ("3", 3)):
        monkeypatch.setenv("SURF_WORKERS", text)
        assert workers.wanted() == count
    monkeypatch.setenv("SURF_WORKERS", "many")
    with pytest.raises(SurfError, match="SURF_WORKERS=many"):
        workers.wanted()
