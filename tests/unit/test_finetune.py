"""The fine-tune: right gradients, right files, and the same result after a kill."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from surf import cli, config, finetune, processing, prompts, samples, store
from surf.errors import SurfError
from surf.images import Images

ANSWERS = ("a red square", "yes", "two green triangles", "no", "blue", "one yellow circle on white", "black", "three")
KINDS = ("pair", "positive_only", "no_reference", "negative_only")


def reference(number):
    return {"image_id": number, "image": f"r{number % 8}.png", "caption": f"caption {number}", "similarity": 0.5, "gain": 0.1}


def rows(count):
    return [
        {
            "round_id": f"c{number}#0",
            "image": f"q{number % 6}.png",
            "question": f"What is in picture {number}?",
            "answer": ANSWERS[number % len(ANSWERS)],
            "task": "short",
            "kind": KINDS[number % len(KINDS)],
            "positive_first": number % 2 == 0,
            "positive": reference(number),
            "negative": reference(number + 1),
        }
        for number in range(count)
    ]


@pytest.fixture
def job(tiny_lvlm, drawn_images, tmp_path, monkeypatch):
    """Keywords of `finetune.train` for 16 rows and 8 steps of 4 rows; keyword arguments change the settings."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    pairs = tmp_path / "pairs.parquet"

    def settings(count=16, dtype="float32", table=None, **flags):
        store.write_table(pairs, store.table_of(table or rows(count), "pairs"), "pairs")
        flags = {"batch_size": 4, "zero_stage": 0, "learning_rate": 3e-3, "save_steps": 3} | flags
        return {
            "pairs": pairs,
            "out": tmp_path / "model",
            "seed": 7,
            "finetune": config.Finetune(**flags),
            "lvlm": config.Lvlm(model=str(tiny_lvlm), dtype=dtype),
            "images": config.Images(roots=[str(drawn_images)]),
        }

    return settings


def weights(out):
    return load_file(out / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def read(out):
    return json.loads((out / "model.json").read_text())


def test_overfit_writes_the_answers_word_for_word(job, drawn_images):
    from transformers import AutoModelForImageTextToText

    settings = job(count=4, epochs=80, learning_rate=5e-3, gradient_checkpointing=False)
    finetune.train(**settings)
    out = settings["out"]
    written = read(out)
    assert written["loss"] < 0.03
    assert written["steps"] == len(written["loss_curve"]) == 80
    assert {"samples": 4, "dropped": 0, "epochs": 80.0, "seed": 7}.items() <= written.items()
    base = weights(finetune.Path(settings["lvlm"].model))
    tuned = weights(out)
    assert tuned.keys() == base.keys()
    assert "language_model.model.embed_tokens.weight" in tuned
    assert "vision_tower.vision_model.embeddings.class_embedding" in tuned
    frozen = [name for name in base if name.startswith("vision_tower.")]
    assert all(tuned[name].equal(base[name]) for name in frozen)
    changed = [name for name in base if not tuned[name].equal(base[name])]
    assert set(base) - set(changed) == set(frozen)
    assert written["trainable_parameters"] == sum(base[name].numel() for name in changed)
    assert not [path.name for path in out.iterdir() if path.suffix in (".bin", ".pt", ".tmp")]
    assert [path.name for path in (out / "_checkpoints").iterdir()] == ["run.json"]

    lvlm = settings["lvlm"].model_copy(update={"model": str(out)})
    processor = processing.load_processor(lvlm)
    model, loading = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    roots = Images([str(drawn_images)])
    texts, pictures = [], []
    for row in rows(4):
        prompt = prompts.from_options(row["question"], row["image"], samples.references(row), lvlm)
        texts.append(prompts.chat(processor, prompt))
        pictures.append([roots.open(name) for name in prompt.images])
    batch = processing.encode(processor, texts, pictures, padding_side="left", lvlm=lvlm)
    made = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    assert answers == list(ANSWERS[:4])


def test_gradients_of_a_batch_are_the_sum_over_its_samples(job):
    from transformers import AutoModelForImageTextToText

    settings = job()
    lvlm, images = settings["lvlm"], settings["images"]
    processor = processing.load_processor(lvlm)
    model = AutoModelForImageTextToText.from_pretrained(lvlm.model, dtype=torch.float32).eval()
    made, _ = samples.make_samples(rows(4), processor, settings["finetune"], lvlm, images)

    def gradients(chosen):
        model.zero_grad()
        batch = samples.collate(chosen, processor=processor, lvlm=lvlm, images=images)
        tokens = int((batch["labels"] != -100).sum())
        assert tokens == sum(len(sample.answer_ids) for sample in chosen)
        (model(**batch).loss * tokens).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together = gradients(made)
    alone = [gradients([sample]) for sample in made]
    for number, whole in enumerate(together):
        torch.testing.assert_close(whole, sum(one[number] for one in alone), rtol=1e-3, atol=1e-5)


def test_stopped_run_goes_on_and_ends_in_the_same_weights(job, tmp_path, monkeypatch, caplog):
    settings = job(accumulation=2)  # 2 steps an epoch, of 2 batches each
    settings["finetune"] = settings["finetune"].model_copy(update={"epochs": 4, "save_steps": 3})
    unharmed = settings | {"out": tmp_path / "unharmed"}
    finetune.train(**unharmed)

    batches = []

    def interrupted(*args, **keywords):
        batches.append(0)
        if len(batches) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return samples.collate(*args, **keywords)

    monkeypatch.setattr(finetune, "collate", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        finetune.train(**settings)
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(finetune, "collate", samples.collate)
    out = settings["out"]
    assert not (out / "model.json").exists()
    whole = sorted(path.parent.name for path in (out / "_checkpoints").glob("checkpoint-*/_whole"))
    assert whole in (["checkpoint-3", "checkpoint-4"], ["checkpoint-3", "checkpoint-5"])
    torn = out / "_checkpoints" / "checkpoint-7"
    torn.mkdir()

    caplog.set_level("INFO", "surf")
    finetune.train(**settings)
    assert f"going on from {out / '_checkpoints' / whole[-1]}" in caplog.text
    assert "step 3/8" not in caplog.text
    assert same(weights(out), weights(unharmed["out"]))
    assert (out / "model.json").read_bytes() == (unharmed["out"] / "model.json").read_bytes()

    # a finished run is not trained further, but what Snakemake deleted comes back
    before = (out / "model.safetensors").stat().st_mtime_ns
    (out / "model.json").unlink()
    finetune.train(**settings)
    assert (out / "model.json").read_bytes() == (unharmed["out"] / "model.json").read_bytes()
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_images_from_workers_give_the_same_model(job, tmp_path):
    settings = job(count=8, epochs=1)
    plain = settings | {"out": tmp_path / "plain"}
    finetune.train(**plain)
    finetune.train(**settings | {"finetune": settings["finetune"].model_copy(update={"workers": 2})})
    assert same(weights(settings["out"]), weights(plain["out"]))
    broken = [row | {"image": "gone.png"} if row["round_id"] == "c1#0" else row for row in rows(4)]
    with pytest.raises(SurfError) as error:
        finetune.train(**job(table=broken))
    assert str(error.value).startswith("image gone.png of round c1#0: there is no such image")


def test_checkpoints_of_another_run_are_not_used(job, caplog):
    settings = job(epochs=1)
    stale = settings["out"] / "_checkpoints" / "checkpoint-2"
    stale.mkdir(parents=True)
    (stale / "_whole").touch()
    store.write_json(stale.parent / "run.json", {"fingerprint": "another", "result": None})
    shard = settings["out"] / "model-00001-of-00003.safetensors"
    shard.touch()
    caplog.set_level("INFO", "surf")
    finetune.train(**settings)
    assert "step 1/4" in caplog.text
    assert not stale.exists()
    assert not shard.exists()


def test_bfloat16_without_deepspeed_saves_bfloat16(job):
    settings = job(count=4, epochs=1, dtype="bfloat16")
    finetune.train(**settings)
    assert {weight.dtype for weight in weights(settings["out"]).values()} == {torch.bfloat16}
    assert json.loads((settings["out"] / "config.json").read_text())["dtype"] == "bfloat16"


def test_mistakes_of_users(job, tmp_path):
    with pytest.raises(SurfError, match=r"finetune\.train.*multi_modal_projector"):
        finetune.train(**job(train=["no_such_part"]))
    with pytest.raises(SurfError, match="torchrun --nnodes 1 --nproc-per-node 2"):
        finetune.train(**job(processes=2))
    with pytest.raises(SurfError, match=r"gone\.png of round c1#0"):
        finetune.train(**job(table=[row | {"image": "gone.png"} if row["round_id"] == "c1#0" else row for row in rows(4)]))
    with pytest.raises(SurfError, match="at least one training sample"):
        finetune.train(**job(max_tokens=10))
    settings = job()
    store.write_table(settings["pairs"], store.table_of([], "pairs"), "pairs")
    with pytest.raises(SurfError, match="has no rows"):
        finetune.train(**settings)


def test_killed_zero3_of_two_processes_ends_like_one_plain_process(job, tmp_path):
    """One comparison for three things: sharding, adding up over processes, and going on after SIGKILL."""
    settings = job(epochs=3, batch_size=2, processes=2, zero_stage=3, learning_rate=1e-3)
    sections = {name: settings[name] for name in ("finetune", "lvlm", "images")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "surf.finetune"]
    command += ["--pairs", str(settings["pairs"]), "--out", str(settings["out"]), "--seed", "7"]
    command += shlex.split(cli.flags(**sections) + " " + cli.knobs(**sections))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = finetune.Path(finetune.__file__).parent.parent
    checkpoints = settings["out"] / "_checkpoints"
    with open(tmp_path / "log", "w") as log:
        victim = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        while victim.poll() is None and not (checkpoints / "checkpoint-6" / "_whole").exists():
            time.sleep(0.01)
        killed = [victim, *psutil.Process(victim.pid).children(recursive=True)] if victim.poll() is None else []
        for process in killed:
            process.kill()
        victim.wait()
    assert killed, (tmp_path / "log").read_text()
    assert not (settings["out"] / "model.json").exists()
    psutil.wait_procs(killed[1:], timeout=30)

    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"going on from {checkpoints}/checkpoint-" in done.stderr
    assert "step 6/12" not in done.stderr
    assert "step 12/12" in done.stderr

    plain = settings | {"out": tmp_path / "plain"}
    plain["finetune"] = settings["finetune"].model_copy(update={"batch_size": 4, "processes": 1, "zero_stage": 0})
    finetune.train(**plain)
    one, two = read(plain["out"]), read(settings["out"])
    assert [entry["step"] for entry in two["loss_curve"]] == list(range(1, 13))
    assert [entry["lr"] for entry in two["loss_curve"]] == pytest.approx([entry["lr"] for entry in one["loss_curve"]])
    losses = [[entry["loss"] for entry in written["loss_curve"]] for written in (one, two)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert one["trainable_parameters"] == two["trainable_parameters"]
    tuned, expected = weights(settings["out"]), weights(plain["out"])
    assert tuned.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(tuned[name], expected[name], rtol=0, atol=3e-3)
        assert (tuned[name] - expected[name]).abs().mean() < 1e-4, name
