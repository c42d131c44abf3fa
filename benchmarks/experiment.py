"""The controlled experiment: does the fine-tune teach selectivity where the share of misleading references is known?

    python benchmarks/experiment.py --models models --work WORK --out TABLES [--minutes 9]
    python benchmarks/experiment.py --tiny --work WORK --out TABLES

Draws a world for every seed (`surf.demo.controlled`), writes a config for every cell (share × seed), runs Snakemake on all
cells side by side, and collects what is finished: questions.parquet and right.parquet (every answer), tables.parquet and
tables.md. Run it again after a kill, or after --minutes: it goes on. Models come from `surf.demo.train --size large`; --tiny
takes the embedded ones and a small world, on a CPU: it shows that all runs, and its figures mean nothing.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "surf" / "demo" / "models"
SPLITS = ("random", "popular", "adversarial")
MAIN, MAIN_SHARE = 2000, 0.5  # pairs of the main fine-tune; where the extra variants and sweeps run

VARIANTS: dict[str, dict[str, Any]] = {  # in every cell
    "sft": {"pair": {"mix": {"no_reference": 1.0}}},
    "positives-only": {"pair": {"mix": {"positive_only": 1.0}}},
    "mixed": {"pair": {"mix": {"positive_only": 0.15, "negative_only": 0.25, "no_reference": 0.15}}},
}
EXTRA_VARIANTS: dict[str, dict[str, Any]] = {  # at MAIN_SHARE
    "fixed-order": {"pair": {"order": "positive_first"}},
    "random-negatives": {"pair": {"negatives": "random"}},
    "verdict": {"finetune": {"verdict": True}},
    **{f"pairs-{size}": {"pair": {"samples": size}} for size in (250, 500, 1000, 4000)},
}
METHODS: dict[str, dict[str, Any]] = {  # in every cell, beside one for each variant
    "zero-shot": {"model": "base"},
    "vanilla-rag": {"model": "base", "references": 2},
    "rerank-caption": {"model": "base", "references": 2, "rerank": "caption"},
    "rerank-relevance": {"model": "base", "references": 2, "rerank": "relevance"},
    "filter-judged": {"model": "base", "references": 2, "keep": "judged"},
    "surf": {"model": "tuned", "references": 2},
    "surf-gated": {"model": "tuned", "references": 2, "gate": 0.9},
}
EXTRA_METHODS: dict[str, dict[str, Any]] = {
    "caption-only": {"model": "tuned", "references": 2, "show": "caption"},
    "image-only": {"model": "tuned", "references": 2, "show": "image"},
}
SWEEPS = {"of": ["vanilla-rag", "surf"], "k": [1, 4], "source": ["random", "oracle", "adversarial"], "order": ["reversed"]}


@dataclass(frozen=True)
class Scale:
    """How large all is."""

    size: str = "large"
    images: int = 10_000
    test_images: int = 1500
    corpus: int = 100_000
    murk: int = 225
    limit: int = 25_000  # rounds answered in a cell; twice as many at MAIN_SHARE, whose sweep needs more pairs
    unit: int = 1  # pairs of all fine-tunes are divided by it
    shares: tuple[float, ...] = (0.2, 0.5, 0.8)
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "bfloat16"
    max_new_tokens: int = 40
    learning_rate: float = 1e-4


TINY = Scale("small", 60, 12, 400, 205, 120, 100, (0.5,), (0,), "float32", 24)


@dataclass(frozen=True)
class Cell:
    """One run of the pipeline. labels: the judge of `score`, answer or loglik."""

    share: float
    seed: int
    labels: str = "answer"

    @property
    def name(self) -> str:
        return f"{self.labels}-{self.share:g}-{self.seed}"


def cells_of(scale: Scale) -> list[Cell]:
    """Return all cells, the largest first."""
    main = [Cell(share, seed) for share in scale.shares for seed in scale.seeds]
    judged = [Cell(MAIN_SHARE, seed, "loglik") for seed in scale.seeds]
    return sorted([*main, *judged], key=lambda cell: (cell.share != MAIN_SHARE, cell.labels))


def config(cell: Cell, scale: Scale, models: Path, world: Path, left_out: list[str]) -> dict[str, Any]:
    """Return the cell's config.yaml."""
    full = cell.labels == "answer"
    extra = full and cell.share == MAIN_SHARE
    variants = {**VARIANTS, **(EXTRA_VARIANTS if extra else {})} if full else {}
    variants = {name: sized(one, scale) for name, one in variants.items() if name not in left_out}
    methods = {**METHODS, **(EXTRA_METHODS if extra else {})}
    if not full:
        methods = {name: methods[name] for name in ("zero-shot", "vanilla-rag", "surf")}
    methods |= {name: {"model": name, "references": 0 if name == "sft" else 2} for name in variants}
    pope = {"kind": "pope", "files": {name: f"{world}/pope/coco_pope_{name}.json" for name in SPLITS}, "max_new_tokens": 4}
    return {
        "results": "results",
        "seed": cell.seed,
        "images": {"roots": [f"{world}/images.parquet"]},
        "shards": {"corpus": 2, "rounds": 2},
        "catalog": {"captions": [f"{world}/corpus-{cell.share:g}.json"]},
        "embed": {"model": f"local-dir:{models}/clip", "pretrained": None, "workers": 2},
        "split": {"conversations": [f"{world}/sft.json"], "limit": scale.limit * (1 + extra)},
        "lvlm": {  # not compiled: its jobs are shorter than that would take
            "model": f"{models}/lvlm",
            "dtype": scale.dtype,
            "pad_to_square": False,
            "batch_tokens": 32_768,
            "compile": False,
        },
        "answer": {"max_new_tokens": scale.max_new_tokens, "gold_loglik": not full},
        "retrieve": {"references": 8, "max_similarity": 1.0},
        "reanswer": {"references": 8},
        "score": {
            "judge": cell.labels,
            "bertscore_model": f"{models}/bert",
            "bertscore_layer": 2,
            "wrong_below": 0.85,
            "right_above": 0.95,
        },
        "pair": {"samples": MAIN // scale.unit},
        "finetune": {"learning_rate": scale.learning_rate, "zero_stage": 0, "gradient_checkpointing": False},
        "variants": variants,
        "evaluate": {"tasks": {"pope": pope}, "methods": methods, "sweeps": SWEEPS if extra else {}, "examples": 4},
    }


def sized(variant: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """Return the variant with its number of pairs divided by scale.unit."""
    pair = dict(variant.get("pair", {}))
    if "samples" in pair:
        pair["samples"] = max(2, pair["samples"] // scale.unit)
    return {**variant, "pair": pair}


def draw_worlds(scale: Scale, work: Path, processes: int) -> None:
    """Draw the world of every seed that is not there yet."""
    for seed in scale.seeds:
        world = work / f"world-{seed}"
        if (world / "done").exists():
            continue
        flags = {"seed": seed, "size": scale.size, "images": scale.images, "test-images": scale.test_images}
        flags |= {"corpus": scale.corpus, "murk": scale.murk, "workers": processes}
        shares = [f"{share:g}" for share in sorted({*scale.shares, MAIN_SHARE})]
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        subprocess.run(
            python("surf.demo.controlled", "--out", str(world), *words, "--misleading", *shares), check=True, env=env()
        )
        (world / "done").touch()


def run(cells: list[Cell], work: Path, target: str, processes: int, deadline: float) -> bool:
    """Run Snakemake for every cell, all at a time; stop them at the deadline. Return whether all are finished."""
    each = max(1, round(1.5 * processes / len(cells)))
    running = {}
    for cell in cells:
        folder = work / cell.name
        words = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--directory", str(folder)]
        words += ["--cores", str(each), "--resources", f"gpu={each}", "--scheduler", "greedy", "--keep-going", "--nolock"]
        words += ["--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input", "--"]
        with (folder / "snakemake.log").open("ab") as log:
            command = python("snakemake", *words, target)
            running[cell] = subprocess.Popen(
                command, cwd=folder, env=env(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    try:
        while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        stop([process for process in running.values() if process.poll() is None])
    for cell, process in running.items():
        log = work / cell.name / "snakemake.log"
        print(f"{cell.name}: {'finished' if process.returncode == 0 else f'not finished, see {log}'}", flush=True)
    return all(process.returncode == 0 for process in running.values())


def stop(running: list[subprocess.Popen[bytes]]) -> None:
    """End the process groups: stages save what they have when they are told to stop."""
    for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        end = time.monotonic() + patience
        while time.monotonic() < end and any(process.poll() is None for process in running):
            time.sleep(0.2)


def python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def env() -> dict[str, str]:
    """Environment of all commands: this repository's code, one thread each, nothing from the network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **wanted, "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a cell's methods answered. right: bool [questions] by method; misled, hidden: bool [questions], of the truth."""

    cell: Cell
    ids: list[str]
    images: list[str]
    misled: np.ndarray
    hidden: np.ndarray
    right: dict[str, np.ndarray]


def read(cell: Cell, work: Path) -> Answers | None:
    """Return a finished cell's answers."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = work / cell.name / "results" / "evidence" / "scores.parquet"
    if not path.exists():
        return None
    truth = pq.read_table(work / f"world-{cell.seed}" / "truth.parquet", columns=["query", "level", "hidden"]).to_pylist()
    level, hides = ({row["query"]: row[name] for row in truth} for name in ("level", "hidden"))
    asked = pq.read_table(next((work / cell.name / "results" / "evaluate").glob("*/questions.parquet"))).to_pylist()
    place = {row["question_id"]: number for number, row in enumerate(asked)}
    scores = pq.read_table(path, columns=["method", "question_id", "score"])
    right: dict[str, np.ndarray] = {}
    for method in dict.fromkeys(scores["method"].to_pylist()):
        own = scores.filter(pc.equal(scores["method"], method))
        right[method] = np.zeros(len(asked), bool)
        right[method][[place[key] for key in own["question_id"].to_pylist()]] = own["score"].to_numpy() >= 0.5
    images = [row["image"] for row in asked]
    misled = np.array([level[image] < cell.share for image in images])
    hidden = np.array([row["question"].split()[3] in hides[row["image"]] for row in asked])
    return Answers(cell, list(place), images, misled, hidden, right)


def measure(found: list[Answers], resamples: int = 2000) -> Iterator[dict[str, Any]]:
    """Yield accuracies and paired differences: of each cell and of all seeds together, of all questions and of parts of them.

    Intervals are 95 %, of a bootstrap of images; p is McNemar's.
    """
    from surf import intervals

    groups: dict[tuple[str, float, str], list[Answers]] = {}
    for one in found:
        for seed in ("all", str(one.cell.seed)):
            groups.setdefault((one.cell.labels, one.cell.share, seed), []).append(one)
    for (labels, share, seed), some in groups.items():
        images = [f"{one.cell.seed}/{image}" for one in some for image in one.images]
        misled, hidden = (np.concatenate([getattr(one, name) for one in some]) for name in ("misled", "hidden"))
        methods = [name for name in some[0].right if all(name in one.right for one in some)]
        right = {name: np.concatenate([one.right[name] for one in some]) for name in methods}
        for part, rows in {"all": misled | True, "helps": ~misled, "misleads": misled, "hidden": hidden}.items():
            if not rows.any():
                continue
            keys = [(name, None) for name in methods]
            keys += [
                (name, other)
                for name in methods
                for other in ("zero-shot", "vanilla-rag", "surf")
                if other in right and other != name
            ]
            tops = np.stack([right[a][rows] - (0.0 if b is None else right[b][rows] * 1.0) for a, b in keys], axis=1)
            clusters = [image for image, of in zip(images, rows, strict=True) if of]
            for (name, other), value in zip(
                keys, intervals.ratios(tops, np.ones_like(tops), clusters, resamples, 0), strict=True
            ):
                row = {"labels": labels, "share": share, "seed": seed, "part": part, "method": name, "against": other}
                p = None
                if other is not None:
                    a, b = right[name][rows], right[other][rows]
                    p = intervals.mcnemar(int((a & ~b).sum()), int((~a & b).sum()))
                yield {**row, **value._asdict(), "p": p, "questions": int(rows.sum())}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the tables as text: all seeds together."""
    place = {(r["labels"], r["share"], r["seed"], r["part"], r["method"], r["against"]): r for r in rows}
    shares = sorted({row["share"] for row in rows})
    lines = ["# The controlled experiment", ""]

    def text(key: tuple[Any, ...], sign: str = "") -> str:
        row = place.get(key)
        if row is None or row["low"] is None:
            return ""
        words = (format(100 * row[name], f"{sign}.1f") for name in ("value", "low", "high"))
        return "{} ({} to {})".format(*words)

    for labels in sorted({row["labels"] for row in rows}):
        methods = list(dict.fromkeys(row["method"] for row in rows if row["labels"] == labels and row["against"] is None))
        for part in ("all", "helps", "misleads"):
            lines += [f"## Accuracy (%), labels by {labels}, questions: {part}", ""]
            body = [[m, *(text((labels, share, "all", part, m, None)) for share in shares)] for m in methods]
            lines += [table(["Method", *(f"{share:g} mislead" for share in shares)], body), ""]
        for other in ("zero-shot", "vanilla-rag", "surf"):
            lines += [f"## Minus {other} (points), labels by {labels}, all questions", ""]
            body = [[m, *(text((labels, s, "all", "all", m, other), "+") for s in shares)] for m in methods if m != other]
            lines += [table(["Method", *(f"{share:g} mislead" for share in shares)], body), ""]
    lines += ["## Goals", ""]
    for share in shares:
        ours = place.get(("answer", share, "all", "all", "surf", None))
        for other in ("zero-shot", "vanilla-rag"):
            theirs = place.get(("answer", share, "all", "all", other, None))
            if ours and theirs and ours["low"] is not None and theirs["high"] is not None:
                verdict = "above, intervals apart" if ours["low"] > theirs["high"] else "not above with intervals apart"
                lines.append(f"- {share:g} mislead: surf against {other}: {verdict}")
        loss = text(("answer", share, "all", "misleads", "surf", "zero-shot"), "+")
        lines.append(f"- {share:g} mislead: surf minus zero-shot where references mislead: {loss} points (goal: above -1)")
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def kept(out: Path) -> list[Answers]:
    """Return the answers that an earlier call wrote to `out`, perhaps on another machine."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not (out / "right.parquet").exists():
        return []
    questions, answered = (pq.read_table(out / f"{name}.parquet") for name in ("questions", "right"))
    found = []
    for name in dict.fromkeys(questions["cell"].to_pylist()):
        labels, share, seed = name.rsplit("-", 2)
        asked = questions.filter(pc.equal(questions["cell"], name)).to_pydict()
        own = answered.filter(pc.equal(answered["cell"], name))
        methods = dict.fromkeys(own["method"].to_pylist())
        right = {one: np.array(own.filter(pc.equal(own["method"], one))["right"]) for one in methods}
        truth = np.array(asked["misled"]), np.array(asked["hidden"])
        cell = Cell(float(share), int(seed), labels)
        found.append(Answers(cell, asked["question_id"], asked["image"], *truth, right))
    return found


def collect(cells: list[Cell], work: Path, out: Path) -> None:
    """Write right.parquet, questions.parquet, tables.parquet and tables.md of all finished cells, and of those in `out`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [one for cell in cells if (one := read(cell, work)) is not None]
    fresh = {one.cell for one in found}
    found = sorted([*found, *(one for one in kept(out) if one.cell not in fresh)], key=lambda one: one.cell.name)
    if not found:
        return
    out.mkdir(parents=True, exist_ok=True)
    questions: list[pa.Table] = []
    right: list[pa.Table] = []
    for one in found:
        size = len(one.ids)
        about = {"question_id": one.ids, "image": one.images, "misled": one.misled, "hidden": one.hidden}
        questions.append(pa.table({"cell": [one.cell.name] * size, **about}))
        for name, rows in one.right.items():
            right.append(pa.table({"cell": [one.cell.name] * size, "method": [name] * size, "right": rows}))
    for name, tables in (("questions", questions), ("right", right)):
        pq.write_table(pa.concat_tables(tables), out / f"{name}.parquet", compression="zstd")
    rows = list(measure(found))
    pq.write_table(pa.Table.from_pylist(rows), out / "tables.parquet", compression="zstd")
    (out / "tables.md").write_text(markdown(rows))
    print(f"tables of {len(found)} cells: {out / 'tables.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for worlds and runs; kept between calls")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--models", type=Path, default=DEMO)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--target", default="evidence", help="Snakemake target; pairs or model stop earlier")
    parser.add_argument("--seeds", type=int, nargs="*", help="only cells of these seeds; --out keeps what it has of others")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop the runs after this time")
    parser.add_argument("--murk", type=int, help="see surf.demo.controlled")
    parser.add_argument("--learning-rate", type=float, help="of all fine-tunes")
    parser.add_argument("--leave-out", nargs="*", default=[], help="variants that are not run")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    scale = TINY if args.tiny else Scale()
    changes = {name: getattr(args, name) for name in ("murk", "learning_rate") if getattr(args, name) is not None}
    scale = replace(scale, **changes, seeds=tuple(args.seeds) if args.seeds else scale.seeds)
    work, models = args.work.resolve(), args.models.resolve()
    processes = len(os.sched_getaffinity(0))
    draw_worlds(scale, work, processes)
    cells = cells_of(scale)
    for cell in cells:
        folder = work / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        made = config(cell, scale, models, work / f"world-{cell.seed}", args.leave_out)
        (folder / "config.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    finished = run(cells, work, args.target, processes, deadline)
    collect(cells, work, args.out)
    if not finished:
        sys.exit("not all cells are finished; run the same command again")


if __name__ == "__main__":
    main()
