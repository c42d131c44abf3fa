"""Preflight: is all there and well formed, and what will the run take? Costs minutes and no GPU.

    python -m surf.check --configfile config.yaml [--gpus 8] [--near-duplicates] [--json plan.json]

One line for each thing that was looked at. Exit code 1 if anything is wrong; warnings do not fail. The stages' own readers read
the files, so what passes here passes there.
"""

import argparse
import logging
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from surf import (
    badshares,
    catalog,
    checkleaks,
    checksettings,
    config,
    finished,
    headers,
    plan,
    planevaluate,
    plantable,
    rates,
    sources,
    split,
    store,
    weights,
)
from surf.errors import SurfError
from surf.models import vllm
from surf.tasks import KINDS, Question
from surf.verdicts import Report

_SHOWN = 3  # names in a line
_REPEATED = re.compile(r"(.+)@\d+")  # `split` marks the second conversation under one id


@dataclass
class Found:
    """The data as the stages' readers give them: image names of all rows."""

    corpus: list[str] = field(default_factory=list)
    corpus_bytes: int = 0
    rounds: list[str] = field(default_factory=list)
    rounds_bytes: int = 0
    questions: dict[str, list[Question]] = field(default_factory=dict)  # by task
    seconds: dict[str, float] = field(default_factory=dict)

    def evaluation(self) -> list[str]:
        """Images of all questions, each once."""
        return list(dict.fromkeys(one["image"] for asked in self.questions.values() for one in asked))


def check(
    report: Report, cfg: config.Config, *, gpus: int, gpus_per_job: int, cores: int, near: bool, calibration: Path
) -> plan.Plan | None:
    """Look at everything that the config names, and make the plan. None if the data cannot be read, or do not exist yet."""
    drawn, whole = _files(report, cfg)
    folder = _models(report, cfg)
    checksettings.packages(report, cfg)
    checksettings.variants(report, cfg)
    known = _rates(report, cfg, calibration)
    if not drawn:
        checksettings.index(report, cfg, None)
        report.ok("example", f"is not drawn yet: the workflow draws it into {_demo(cfg)}/ first")
        report.ok("next", "snakemake demo --cores all && python -m surf.check   looks at its images and questions, and plans")
        return None
    found = Found()
    _corpus(report, cfg, found)
    checksettings.index(report, cfg, len(found.corpus) or None)
    _rounds(report, cfg, found)
    _questions(report, cfg, found)
    if whole:
        _images(report, cfg, found, cores, near)
    checkleaks.names(report, cfg, found.evaluation(), found.corpus, found.rounds)
    if not (found.corpus and found.rounds and found.questions.keys() == cfg.evaluate.tasks.keys()):
        return None
    sizes, cores = _sizes(cfg, folder), max(cores, gpus + 2)
    made = plan.plan(cfg, _data(found), sizes, known, gpus=gpus, gpus_per_job=gpus_per_job, cores=cores)
    _disk(report, cfg, made)
    for note in made.notes:
        report.warning("plan", note) if known.stages else report.ok("plan", note)
    return made


# --- one topic each ---------------------------------------------------------------------------------------------------


def _files(report: Report, cfg: config.Config) -> tuple[bool, bool]:
    """(the example is drawn or there is none, all named files and image roots are there)."""
    missing, later = sources.missing(cfg)
    for what, path in missing:
        report.wrong("files", f"{path}: there is no such {what if ' ' in what else f'file of {what}'}; next: see docs/data.md")
    if not missing and not later:
        report.ok("files", f"{len(sources.named(cfg))} files and image roots are there")
    return not later, not missing


def _models(report: Report, cfg: config.Config) -> Path | None:
    """Folder of the vision-language model, if it is here."""
    looks = {
        "lvlm.model": (cfg.lvlm.model, weights.lvlm),
        "embed.model": (cfg.embed.model, weights.clip),
        "score.bertscore_model": (cfg.score.bertscore_model, weights.bert),
    }
    folders = {}
    for key, (name, look) in looks.items():
        model = look(cfg)
        if model.folder:
            report.ok("models", f"{key} {name}: whole")
        elif model.downloadable:
            report.warning("models", f"{key} {name}: {model.problem}")
        else:
            report.wrong("models", f"{key} {name}: {model.problem}")
        folders[key] = model.folder
    if cfg.lvlm.engine == "vllm":
        report.attempt("models", vllm.require)
    if bert := folders["score.bertscore_model"]:
        checksettings.encoder(report, cfg, bert)
    if lvlm := folders["lvlm.model"]:
        checksettings.training(report, cfg, lvlm)
    return lvlm


def _corpus(report: Report, cfg: config.Config, found: Found) -> None:
    start = time.monotonic()
    read = report.attempt("captions", lambda: catalog.catalog(cfg.catalog))
    if read is None:
        return
    found.seconds["catalog"] = time.monotonic() - start
    table, errors = read
    found.corpus = table["image"].to_pylist()
    found.corpus_bytes = table.nbytes
    _unusable(report, cfg, "captions", f"{table.num_rows:,} image-caption pairs", errors, table.num_rows)
    _twice(report, "captions", "images stand more than once in the corpus", Counter(found.corpus))


def _rounds(report: Report, cfg: config.Config, found: Found) -> None:
    start = time.monotonic()
    read = report.attempt("conversations", lambda: split.read(cfg.split))
    if read is None:
        return
    conversations, errors, left_out = read
    rounds = report.attempt("conversations", lambda: split.choose(conversations, errors, left_out, cfg.split))
    if rounds is None:
        return
    found.seconds["split"] = time.monotonic() - start
    found.rounds = [one.image for one in rounds]
    found.rounds_bytes = sum(len(text) for one in rounds for text in vars(one).values())
    words = "".join(f", {count:,} {what} left out" for what, count in left_out.items() if count)
    _unusable(report, cfg, "conversations", f"{len(rounds):,} rounds{words}", errors, len(conversations))
    ids = {one.round_id.rpartition("#")[0] for one in rounds}
    again = [match[1] for name in ids if (match := _REPEATED.fullmatch(name)) and match[1] in ids]
    _twice(report, "conversations", "conversation ids stand more than once (told apart by @2, @3, …)", Counter([*ids, *again]))


def _questions(report: Report, cfg: config.Config, found: Found) -> None:
    for name, task in cfg.evaluate.tasks.items():
        start = time.monotonic()
        parts = [_asked(report, task.kind, name, part, path) for part, path in task.files.items()]
        if all(part is not None for part in parts):
            found.questions[name] = [one for part in parts for one in part or ()]
            found.seconds[f"evaluate_questions {name}"] = time.monotonic() - start


def _asked(report: Report, kind: str, task: str, part: str, path: str) -> list[Question] | None:
    if not Path(path).exists():  # the files' own line says so
        return None
    read: list[Question] | None = report.attempt("questions", lambda: KINDS[kind].read(Path(path), part))
    if read is not None:
        report.ok("questions", f"{task} {part}: {len(read):,} questions on {len({one['image'] for one in read}):,} images")
    return read


def _images(report: Report, cfg: config.Config, found: Found, cores: int, near: bool) -> None:
    """Every image that the data name; by data set, because each has its own share of bad ones."""
    names = {"corpus": found.corpus, "rounds": found.rounds, "questions": found.evaluation()}
    every = list(dict.fromkeys(name for group in names.values() for name in group))
    start = time.monotonic()
    roots, limit = cfg.images.roots, cfg.images.max_pixels
    seen = report.attempt("images", lambda: headers.look(every, roots, limit, processes=cores, hashes=near))
    if seen is None:
        return
    seconds = max(time.monotonic() - start, 1e-9)
    what = "headers and difference hashes" if near else "headers"
    report.ok("images", f"{what} of {len(every):,} images read, {len(every) / seconds:,.0f} a second on {cores} cores")
    parts = {
        "corpus": badshares.corpus(found.corpus, seen.errors, cfg.shards.corpus),
        "rounds": badshares.rounds(found.rounds, seen.errors, cfg.shards.rounds),
    }
    for group, own in names.items():
        unique = list(dict.fromkeys(own))
        bad = [name for name in unique if name in seen.errors]
        if not bad:
            report.ok("images", f"{group}: all {len(unique):,} are readable")
            continue
        examples = "; ".join(f"{name}: {seen.errors[name]}" for name in bad[:_SHOWN])
        text = f"{group}: {len(bad):,} of {len(unique):,} cannot be used ({examples}{'; …' if len(bad) > _SHOWN else ''})"
        if group == "questions":
            report.wrong("images", f"{text}; an evaluation must be complete; next: mend images.roots")
            continue
        worst = badshares.worst(parts[group])
        text += f"; {worst.stage} will meet {worst.bad:,} of {worst.total:,} in {worst.name}"
        _judge(report, cfg, "images", text, worst.bad, worst.total, "mend the images")
    if near:
        checkleaks.looks(report, cfg, seen.hashes, found.evaluation(), found.corpus, found.rounds)


def _rates(report: Report, cfg: config.Config, calibration: Path) -> rates.Rates:
    """Of finished parts, and below them those of the calibration file."""
    known = report.attempt("rates", lambda: finished.read(cfg)) or rates.Rates()
    if not calibration.exists():
        if not known.stages:
            command = f"python -m surf.calibrate --configfile … --out {calibration}"
            report.ok("rates", f"there is no {calibration}: the plan has rows, jobs and disk only; next: {command}")
        return known
    content = report.attempt("rates", lambda: store.read_json(calibration))
    read = report.attempt("rates", lambda: rates.of_json(content, calibration)) if content else None
    if read is None:
        return known
    machine = content.get("machine", {})
    report.ok("rates", f"{calibration}: {machine.get('gpu') or 'no GPU'}, {machine.get('cores')} cores")
    then, now = content.get("config", {}), rates.settings(cfg)
    for key in sorted(now):
        if key in then and then[key] != now[key]:
            report.warning("rates", f"{calibration} was made with {key} = {then[key]!r}, the config says {now[key]!r}")
    return known.over(read)


def _disk(report: Report, cfg: config.Config, made: plan.Plan) -> None:
    folder = Path(cfg.results)
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    there = sum(file.stat().st_size for file in files if file.exists())  # jobs may be at work: folders and files go meanwhile
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free, needed = shutil.disk_usage(existing).free, max(0, made.disk_bytes - there)
    text = f"{plantable.size(needed)} more at most, {plantable.size(free)} free at {cfg.results}"
    if needed <= free:
        return report.ok("disk", text)
    report.wrong("disk", f"{text}; next: another results folder, or room in this one")


# --- details ----------------------------------------------------------------------------------------------------------


def _demo(cfg: config.Config) -> str:
    return cfg.demo.out if cfg.demo else ""


def _unusable(report: Report, cfg: config.Config, topic: str, what: str, errors: dict[str, str], good: int) -> None:
    """The line of a file's rows, and whether too many of them are unusable."""
    if not errors:
        report.ok(topic, what)
        return
    examples = "; ".join(f"{key}: {error}" for key, error in list(errors.items())[:_SHOWN])
    text = f"{what}; {len(errors):,} rows cannot be used ({examples})"
    _judge(report, cfg, topic, text, len(errors), good + len(errors), "mend the file")


def _judge(report: Report, cfg: config.Config, topic: str, text: str, bad: int, total: int, mend: str) -> None:
    """The verdict that `surf.quarantine` will come to."""
    limit = cfg.images.max_bad_share
    text = f"{text}; {bad / max(total, 1):.2%}, images.max_bad_share is {limit:.2%}"
    if bad > limit * total:
        report.wrong(topic, f"{text}; next: {mend}, or raise it")
    else:
        report.warning(topic, text)


def _twice(report: Report, topic: str, what: str, counts: Counter[str]) -> None:
    again = [name for name, count in counts.items() if count > 1]
    if again:
        report.warning(topic, f"{len(again):,} {what}: {', '.join(again[:_SHOWN])}{', …' if len(again) > _SHOWN else ''}")


def _data(found: Found) -> plan.Data:
    corpus = set(found.corpus)
    images = set(found.rounds)
    return plan.Data(
        pairs=len(found.corpus),
        corpus_bytes=found.corpus_bytes,
        rounds=len(found.rounds),
        rounds_bytes=found.rounds_bytes,
        images=len(images),
        fresh=len(images - corpus),
        tasks={name: planevaluate.task(asked, corpus) for name, asked in found.questions.items()},
        read_seconds=found.seconds,
    )


def _sizes(cfg: config.Config, folder: Path | None) -> plan.Sizes:
    counts = (0, 0)
    if folder:
        with suppress(SurfError):  # its own line says so
            counts = weights.parameters(folder, cfg.finetune.train)
    return plan.Sizes(weights.dim(cfg) or 0, *counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m surf.check", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"), help="default: config.yaml")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs at a time, for the plan (default 1)")
    parser.add_argument("--gpus-per-job", type=int, default=1, help="GPUs that each GPU job sees, for the plan (default 1)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="processes here; default: all cores")
    parser.add_argument("--near-duplicates", action="store_true", help="decode all images to find look-alikes: much slower")
    parser.add_argument("--calibration", type=Path, help="default: calibration.json beside the results folder's content")
    parser.add_argument("--json", type=Path, help="also write the plan here")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    report = Report()
    cfg = report.attempt("config", lambda: config.load(args.configfile))
    made = None
    if cfg:
        report.ok("config", f"{args.configfile}: all keys are known and fit together")
        made = check(
            report,
            cfg,
            gpus=args.gpus,
            gpus_per_job=args.gpus_per_job,
            cores=args.cores,
            near=args.near_duplicates,
            calibration=args.calibration or rates.place(cfg),
        )
    if made:
        print(f"\n{plantable.table(made, args.gpus)}")
        if args.json:
            store.write_json(args.json, plantable.as_json(made, args.gpus))
    wrong = report.counts["WRONG"]
    print(f"\n{wrong} wrong, {report.counts['warning']} warnings, {report.counts['ok']} in order")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
