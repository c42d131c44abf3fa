"""Measure how fast the stages are here, on a sample of the user's own data with the user's own models.

    python -m surf.calibrate --configfile config.yaml [--jobs 2] [--images 256 --rounds 128 --questions 96 --repeats 3]

Runs the real workflow on the sample, in a folder of its own: each stage over `repeats` shards, one after the other, so that
every rate is measured `repeats` times on different rows. The file that it writes is what `python -m surf.check` plans with.
"""

import argparse
import importlib.metadata
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from surf import build_index, cli, config, finished, planevaluate, rates, store, weights, workers
from surf.errors import SurfError
from surf.shards import stable_hash
from surf.tasks import KINDS

log = logging.getLogger("surf")
Row = dict[str, Any]

_VERSIONS = ("torch", "transformers", "open_clip_torch", "faiss-cpu", "deepspeed", "snakemake")
_TRAINED_STEPS = 6  # the later half is timed
_TARGETS = ["embeddings", "rounds", "answers", "neighbors", "reanswers", "scores", "evidence"]


def calibrate(cfg: config.Config, folder: Path, *, jobs: int, repeats: int, images: int, rounds: int, questions: int) -> Row:
    """The content of a calibration file, measured below `folder`, which is emptied before and after.

    Args:
        jobs: GPU jobs at a time; as many as will share this machine in the real run.
        images, rounds, questions: rows of one repeat of `embed`, of `answer`, and of each evaluation task.

    Raises:
        SurfError: the data cannot be read, or a stage fails; its log is named, and the folder stays.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder = folder.absolute()
    folder.mkdir(parents=True)
    queried = search(cfg, repeats)
    small = sample(cfg, folder, repeats=repeats, images=images, rounds=rounds, questions=questions)
    scores = planevaluate.needed(cfg.evaluate.all_methods().values())
    candidates = [f"{small.results}/evaluate/{task}/candidates/{by}.parquet" for task in small.evaluate.tasks for by in scores]
    _snakemake(folder, small, [*_TARGETS, *candidates], jobs)
    found = finished.read(small, "calibration")
    # a small corpus says nothing of the real one: see "search"; what else there is of evaluation is there once a repeat
    stages = {key: stage for key, stage in found.stages.items() if "retrieve" not in key and "evaluate" not in key}
    stages["search"] = queried
    places = {task: _places(task, repeats) for task in cfg.evaluate.tasks}
    evaluation = planevaluate.finished(small, "calibration", places)
    stages.update({key: stage for key, stage in evaluation.items() if stage.row})
    pairs = None
    if (without := _untrainable(cfg)) is None:
        stages["finetune"], pairs = _finetune(folder, small, jobs)
    else:
        log.warning("finetune is not measured: %s", without)
    stages.update(_light(folder))
    measured = rates.Rates(stages, found.wrong, pairs, found.asked)
    shutil.rmtree(folder)
    return {"machine": machine(), "config": rates.settings(cfg), "repeats": repeats, "jobs": jobs, **rates.to_json(measured)}


def sample(cfg: config.Config, folder: Path, *, repeats: int, images: int, rounds: int, questions: int) -> config.Config:
    """Write samples of the user's files into `folder`; returns the config that runs the workflow on them."""
    corpus, chats = folder / "corpus.json", folder / "sft.json"
    store.write_json_rows(corpus, _pick(_rows(cfg.catalog.captions, "captions"), images * repeats))
    talks = [row for row in _rows(cfg.split.conversations, "conversations") if isinstance(row, dict) and "image" in row]
    store.write_json_rows(chats, _pick(talks, rounds * repeats))  # at least one round each; `split.limit` cuts
    values = cfg.model_dump(mode="json")
    values.pop("demo")
    values["results"] = str(folder / "results")
    values["shards"] = {"corpus": repeats, "rounds": repeats}
    values["catalog"]["captions"], values["split"]["conversations"] = [str(corpus)], [str(chats)]
    values["split"]["limit"] = rounds * repeats
    values["variants"] = {}
    values["evaluate"]["tasks"] = {
        place: task for name in cfg.evaluate.tasks for place, task in _tasks(cfg, name, folder, questions, repeats).items()
    }
    counts = sorted({0, *(count for one in planevaluate.by_model(cfg).values() for count in planevaluate.asked(one.values()))})
    values["evaluate"]["methods"] = {f"with-{count}": _method(count, cfg.retrieve.references) for count in counts}
    values["evaluate"]["sweeps"] = {}
    # a broken image more or less is no reason to stop here; no checkpoint falls into the timed steps
    values["images"] = {**values["images"], "max_bad_share": 1.0, "roots": [_absolute(root) for root in cfg.images.roots]}
    values["finetune"]["save_steps"] = 10**9
    values["pair"]["mix"] = {}
    values["build_index"]["factory"] = "auto"  # lists for the real corpus cannot be trained on a few images
    values["lvlm"]["model"] = _absolute(cfg.lvlm.model)
    values["score"]["bertscore_model"] = _absolute(cfg.score.bertscore_model)
    kind, local, path = cfg.embed.model.rpartition("local-dir:")
    values["embed"]["model"] = f"{kind}{local}{_absolute(path)}" if local else cfg.embed.model
    return config.parse(values)


def search(cfg: config.Config, repeats: int) -> rates.Stage:
    """Seconds of one query against a million vectors, by the config's kind of index; a smaller one is timed and scaled.

    Lists of an IVF are so few that they can be trained, and the same share of them is looked at.
    """
    rng = np.random.default_rng(0)
    dim, size = weights.dim(cfg) or 768, 40_000
    vectors = rng.standard_normal((size, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    options, few = cfg.build_index, size // 100
    factory = options.factory
    if factory == "auto":
        factory = build_index.choose(len(_rows(cfg.catalog.captions, "captions")), dim)
    if (lists := re.search(r"IVF(\d+)", factory)) and int(lists[1]) > few:
        factory = factory.replace(lists[0], f"IVF{few}", 1)
        options = options.model_copy(update={"probes": max(1, round(options.probes * few / int(lists[1])))})
    index = build_index.new_index(factory, dim, options)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    seconds = []
    for _ in range(repeats + 1):
        start = time.monotonic()
        index.search(vectors[:256], cfg.retrieve.references + 16)
        seconds.append((time.monotonic() - start) / 256 * 1e6 / size)
    return rates.Stage(rates.Measure(tuple(seconds[1:]), "calibration"))


def machine() -> Row:
    """Processor, cores, GPUs and versions; no name, no path."""
    import torch

    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "versions": {"python": platform.python_version(), **versions},
    }


# --- the sample -------------------------------------------------------------------------------------------------------


def _rows(paths: Sequence[str], what: str) -> list[Any]:
    return [row for path in paths for row in store.read_rows(Path(path), f"a list of {what}")]


def _tasks(cfg: config.Config, name: str, folder: Path, questions: int, repeats: int) -> Row:
    """A task for each repeat of a task. All are of kind vqa, whose files can hold the questions of any kind."""
    task = cfg.evaluate.tasks[name]
    every = [one for part, path in task.files.items() for one in KINDS[task.kind].read(Path(path), part)]
    suffix = KINDS[task.kind].suffix if task.suffix is None else task.suffix
    chosen, made = _pick(every, questions * repeats), {}
    for repeat, place in enumerate(_places(name, repeats)):
        path = folder / f"{place}.json"
        keys = ("question_id", "image", "question", "answers")
        store.write_json_rows(path, [{key: one[key] for key in keys} for one in chosen[repeat::repeats]])
        made[place] = {"kind": "vqa", "files": {"sample": str(path)}, "suffix": suffix, "max_new_tokens": task.max_new_tokens}
    return made


def _method(references: int, most: int) -> Row:
    """A method of the base model; the most that can be retrieved are `most`."""
    return {"model": "base", "references": references, "source": "random" if references > most else "retrieved"}


def _places(task: str, repeats: int) -> list[str]:
    """Names of the tasks that stand for a task in the sample."""
    return [f"{task}-{repeat}" for repeat in range(repeats)]


def _pick(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` rows, drawn by the hash of their place; all if there are fewer."""
    chosen = sorted(range(len(rows)), key=lambda place: stable_hash("calibrate", place))[:count]
    return [rows[place] for place in sorted(chosen)]


def _absolute(name: str) -> str:
    """A path that stays right in another folder; a hub's name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


# --- the run ----------------------------------------------------------------------------------------------------------


def _snakemake(folder: Path, cfg: config.Config, targets: Sequence[str], jobs: int) -> None:
    """Run the workflow for `targets`, in `folder`.

    Raises:
        SurfError: a job fails.
    """
    here = Path("Snakefile")
    snakefile = (here if here.exists() else Path(__file__).parents[1] / "Snakefile").absolute()
    configfile = folder / "config.yaml"
    store.write_text(configfile, yaml.safe_dump(cfg.model_dump(mode="json")))
    options = ["--resources", f"gpu={jobs}", "--cores", str(max(jobs, cfg.finetune.processes)), "--quiet", "host"]
    command = [sys.executable, "-m", "snakemake", *targets, "--snakefile", str(snakefile), "--directory", str(folder)]
    output = folder / "snakemake.log"
    alone = {**os.environ, workers.COUNT: "1"}  # rates are those of one worker on one GPU
    command += ["--configfile", str(configfile), *options]
    with open(output, "ab") as sink:
        done = subprocess.run(command, stdout=sink, stderr=sink, env=alone, check=False)
    if done.returncode:
        raise SurfError("the sample run failed", where=str(output), next=f"see the log that {output} names at its end")


def _finetune(folder: Path, cfg: config.Config, jobs: int) -> tuple[rates.Stage, tuple[int, int] | None]:
    """Train for a few steps on the sample's pairs: the stage's rate, and the share of re-answered rounds that made a pair."""
    try:
        _snakemake(folder, cfg, ["pairs"], jobs)
    except SurfError:
        log.warning("finetune is not measured: the sample has no pair; a larger --rounds may help")
        return rates.Stage(), None
    count = store.footer(Path(cfg.results) / "pairs.parquet")[0].num_rows
    group = cfg.finetune.processes * cfg.finetune.batch_size * cfg.finetune.accumulation
    epochs = max(1, math.ceil(_TRAINED_STEPS * group / count))
    longer = cfg.model_copy(update={"finetune": cfg.finetune.model_copy(update={"epochs": epochs})})
    _snakemake(folder, longer, ["model"], jobs)
    found = finished.read(longer, "calibration")
    training = found.stages.get("finetune", rates.Stage()).row
    if training is None:
        return rates.Stage(), found.pairs
    wall = _walls(folder).get("finetune", [0.0])[0]
    start = max(0.0, wall - training.typical / cfg.finetune.processes * count * epochs)
    return rates.Stage(training, rates.Measure((start,), "calibration")), found.pairs


def _untrainable(cfg: config.Config) -> str | None:
    """Why the fine-tune cannot be tried here; None if it can."""
    gpus = machine()["gpus"]
    if cfg.finetune.nodes > 1:
        return "it takes several nodes"
    if gpus and gpus < cfg.finetune.processes:
        return f"finetune.processes is {cfg.finetune.processes}, and this machine has {gpus} GPUs"
    return None


def _light(folder: Path) -> dict[str, rates.Stage]:
    """Rules without telemetry: how long their jobs took as a whole."""
    names = ("catalog", "split", "merge", "build_index", "pair", "evidence")
    walls = _walls(folder)
    stages = {name: rates.Stage(start=rates.Measure(tuple(walls[name]), "calibration")) for name in names if name in walls}
    stages.setdefault("pair", stages["merge"])
    stages["pope"] = stages["report"] = stages["evidence"]  # pages and tables alike
    return stages


def _walls(folder: Path) -> dict[str, list[float]]:
    """Seconds of each job, by rule, from Snakemake's own records."""
    found: dict[str, dict[float, float]] = {}
    for path in sorted((folder / ".snakemake/metadata").rglob("*")):
        if path.is_file():
            record = store.read_json(path)
            if record.get("starttime") and record.get("endtime"):
                # a job has several outputs and one start; its last output ends it
                ends = found.setdefault(record["rule"], {})
                key = round(record["starttime"], 2)
                ends[key] = max(ends.get(key, 0.0), record["endtime"] - record["starttime"])
    return {rule: [seconds for seconds in ends.values() if seconds > 0] for rule, ends in found.items() if any(ends.values())}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m surf.calibrate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"), help="default: config.yaml")
    parser.add_argument("--out", type=Path, help="default: calibration.json in the results folder, where check looks for it")
    parser.add_argument("--jobs", type=int, default=1, help="GPU jobs at a time, as in the real run on this machine")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each stage")
    parser.add_argument("--images", type=int, default=256, help="corpus images of one repeat")
    parser.add_argument("--rounds", type=int, default=128, help="rounds of one repeat")
    parser.add_argument("--questions", type=int, default=96, help="questions of one repeat, of each evaluation task")
    args = parser.parse_args(argv)
    cfg = config.load(args.configfile)
    out = args.out or rates.place(cfg)
    started = time.monotonic()
    log.info("the sample runs in %s; its stages log there", out.parent / "_calibration")
    content = calibrate(
        cfg,
        out.parent / "_calibration",
        jobs=args.jobs,
        repeats=args.repeats,
        images=args.images,
        rounds=args.rounds,
        questions=args.questions,
    )
    store.write_json(out, content)
    log.info("%s written, after %.0f s", out, time.monotonic() - started)


if __name__ == "__main__":
    cli.run(main)
