"""A fine-tune with another number of processes than its checkpoints: it begins anew, and says why."""

import json
import shutil

import pytest
from test_finetune import job, rows  # noqa: F401

from surf import checkpoints, finetune, samples, store


class Killed(BaseException):
    """Ends a training as a kill would."""


def train_until(batch, settings, monkeypatch):
    """Train, and be killed when this many batches have been made."""
    made = []

    def collate(*args, **keywords):
        made.append(0)
        if len(made) > batch:
            raise Killed
        return samples.collate(*args, **keywords)

    monkeypatch.setattr(finetune, "collate", collate)
    with pytest.raises(Killed):
        finetune.train(**settings)
    monkeypatch.setattr(finetune, "collate", samples.collate)


def test_checkpoints_of_two_processes_are_not_resumed_by_one_and_the_reason_is_said(job, tmp_path, monkeypatch, caplog):  # noqa: F811
    settings = job(epochs=1, save_steps=1)
    unharmed = settings | {"out": tmp_path / "unharmed"}
    finetune.train(**unharmed)
    train_until(3, settings, monkeypatch)
    folder = settings["out"] / "_checkpoints"
    assert (folder / "checkpoint-2" / checkpoints.WHOLE).exists()
    shutil.copytree(folder, tmp_path / "kept")

    # the same checkpoints, as those of a run with two processes
    run = json.loads((folder / "run.json").read_text())
    assert "--finetune.processes=1" in run["flags"]
    two = run["flags"].replace("--finetune.processes=1", "--finetune.processes=2")
    store.write_json(folder / "run.json", run | {"fingerprint": "two", "flags": two})
    caplog.set_level("INFO", "surf")
    finetune.train(**settings)
    line = "training begins anew: 2 checkpoints here are of another run (--finetune.processes=2, now --finetune.processes=1)"
    assert line in caplog.text and "step 1/4" in caplog.text and "going on from" not in caplog.text
    same = (settings["out"] / "model.safetensors").read_bytes() == (unharmed["out"] / "model.safetensors").read_bytes()
    assert same, "it is the model of a run that was never killed"

    # and with the number they were made with they are resumed
    caplog.clear()
    again = settings | {"out": tmp_path / "again"}
    shutil.copytree(tmp_path / "kept", again["out"] / "_checkpoints")
    finetune.train(**again)
    assert "going on from" in caplog.text and "step 2/4" not in caplog.text and "step 3/4" in caplog.text
    assert (again["out"] / "model.safetensors").read_bytes() == (unharmed["out"] / "model.safetensors").read_bytes()


def test_other_data_is_said_as_well(tmp_path, caplog):
    run = {"fingerprint": "a", "flags": "--x=1", "result": None}
    store.write_json(tmp_path / "run.json", run)
    (tmp_path / "checkpoint-5").mkdir()
    assert checkpoints.last(tmp_path, run | {"fingerprint": "b"}) is None
    assert "1 checkpoints here are of another run (other data or weights)" in caplog.text
    assert not (tmp_path / "checkpoint-5").exists()
