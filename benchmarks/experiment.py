"""The controlled experiment: does the fine-tune teach selectivity where the share of misleading references is known?

    python benchmarks/experiment.py --models models --work WORK --out TABLES [--seeds 0] [--minutes 9]
    python benchmarks/experiment.py --tiny --work WORK --out TABLES

Draws a world for every seed (`surf.demo.controlled`), writes a config for every cell (share × seed), runs Snakemake on all
cells side by side, each on one of the GPUs, and keeps the answers of those that are finished: questions.parquet and
right.parquet, from which `experiment_tables.py` makes the tables. Run it again after a kill, or after --minutes: it goes on.
Models come from `surf.demo.train --size large`; --tiny takes the embedded ones and a small world, on a CPU: it shows that
all runs, and its figures mean nothing.
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

import experiment_tables
import warm
import yaml
from experiment_tables import Cell

from surf.demo.questions import LEAVE_OUT
from surf.demo.recipes import retriever_of

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "surf" / "demo" / "models"
SPLITS = ("random", "popular", "adversarial")
MAIN, MAIN_SHARE = 2000, 0.5  # pairs of the main fine-tune; where the extra variants and sweeps run

VARIANTS: dict[str, dict[str, Any]] = {  # in every cell
    "sft": {"pair": {"rounds": "both", "mix": {"no_reference": 1.0}}},  # the questions that SURf learns from
    "positives-only": {"pair": {"rounds": "both", "mix": {"positive_only": 1.0}}},
    "mixed": {"pair": {"mix": {"positive_only": 0.15, "negative_only": 0.25, "no_reference": 0.15}}},
    "harmed": {"pair": {"harmed": 0.5}},
}
EXTRA_VARIANTS: dict[str, dict[str, Any]] = {  # at MAIN_SHARE
    "fixed-order": {"pair": {"order": "positive_first"}},
    "random-negatives": {"pair": {"negatives": "random"}},
    "verdict": {"finetune": {"verdict": True}},
    "sft-harmed": {"pair": {"rounds": "both", "harmed": 0.5, "mix": {"no_reference": 1.0}}},
    **{f"pairs-{size}": {"pair": {"samples": size}} for size in (250, 500, 1000, 4000)},
}
METHODS: dict[str, dict[str, Any]] = {  # in every cell, beside one for each variant
    "zero-shot": {"model": "base"},
    "vanilla-rag": {"model": "base", "references": 2},
    "told-rag": {"model": "base", "references": 2, "say": LEAVE_OUT},  # what the base model was taught to follow
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
SWEEPS = {
    "of": ["vanilla-rag", "surf", "harmed"],
    "k": [1, 4],
    "source": ["random", "oracle", "adversarial"],
    "order": ["reversed"],
}


@dataclass(frozen=True)
class Scale:
    """How large all is."""

    size: str = "large"
    images: int = 10_000
    test_images: int = 600
    corpus: int = 100_000
    murk: int = 255
    miscaptioned: float = 0.25
    limit: int = 25_000  # rounds answered in a cell; twice as many at MAIN_SHARE, whose sweep needs more pairs
    shards: int = 4
    unit: int = 1  # pairs of all fine-tunes are divided by it
    shares: tuple[float, ...] = (0.2, 0.5, 0.8)
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "bfloat16"
    max_new_tokens: int = 48
    learning_rate: float = 1e-4


TINY = Scale("small", 60, 12, 400, 205, 0.25, 120, 1, 100, (0.5,), (0,), "float32", 24)


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
    methods |= {name: {"model": name, "references": references(one)} for name, one in variants.items()}
    pope = {"kind": "pope", "files": {name: f"{world}/pope/coco_pope_{name}.json" for name in SPLITS}, "max_new_tokens": 4}
    return {
        "results": "results",
        "seed": cell.seed,
        "images": {"roots": [f"{world}/images.parquet"]},
        "shards": {"corpus": scale.shards, "rounds": scale.shards},
        "catalog": {"captions": [f"{world}/corpus-{cell.share:g}.json"]},
        "embed": {"model": f"local-dir:{retriever_of(models)}", "pretrained": None, "workers": 2},
        "split": {"conversations": [f"{world}/sft.json"], "limit": scale.limit * (1 + extra)},
        "lvlm": {  # not compiled: its jobs are shorter than that would take
            "model": f"{models}/lvlm",
            "dtype": scale.dtype,
            "pad_to_square": False,
            "batch_tokens": 32_768,
            "compile": False,
        },
        "answer": {"max_new_tokens": scale.max_new_tokens, "gold_loglik": not full},
        "retrieve": {"references": 6, "max_similarity": 1.0},
        "reanswer": {"references": 6, "right_share": 0.2},
        "score": {
            "judge": cell.labels,
            "bertscore_model": f"{models}/bert",
            "bertscore_layer": 2,
            "wrong_below": 0.85,
            "right_above": 0.95,
        },
        "pair": {"samples": MAIN // scale.unit, "harmed": 0.0},  # the paper's; see the variant "harmed"
        "finetune": {
            "learning_rate": scale.learning_rate,
            "zero_stage": 0,
            "accumulation": 4,  # 62 steps for 2,000 pairs: more of them make a model that is tuned on its errors unlearn
            **{"gradient_checkpointing": False, "packing": False},  # at this size every launch counts
            "compile": False,  # a fine-tune takes less time than that
            "workers": 2 if scale.dtype == "bfloat16" else 0,
            "save_steps": 100_000,  # it takes less time to train again
        },
        "variants": variants,
        "evaluate": {
            "tasks": {"pope": pope},
            "methods": methods,
            "sweeps": SWEEPS if extra else {},
            "resamples": 100,
            "examples": 4,
        },
    }


def references(variant: dict[str, Any]) -> int:
    """References in the prompts of a variant's method: as many as it learns with."""
    return 0 if variant.get("pair", {}).get("mix", {}).get("no_reference") == 1.0 else 2


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
        flags |= {"corpus": scale.corpus, "murk": scale.murk, "miscaptioned": scale.miscaptioned, "workers": processes}
        shares = [f"{share:g}" for share in sorted({*scale.shares, MAIN_SHARE})]
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        subprocess.run(
            python("surf.demo.controlled", "--out", str(world), *words, "--misleading", *shares), check=True, env=env()
        )
        (world / "done").touch()


def run(cells: list[Cell], work: Path, target: str, processes: int, deadline: float) -> bool:
    """Run Snakemake for every cell, all at a time; stop them at the deadline. Return whether all are finished."""
    running = {}
    with warm_start(work) as environment:
        for cell, (gpu, cores) in placed(cells, gpus(), processes).items():
            folder = work / cell.name
            words = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--directory", str(folder)]
            words += ["--cores", str(cores), "--resources", f"gpu={cores}", "--scheduler", "greedy", "--keep-going", "--nolock"]
            words += ["--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input", "--", target]
            with (folder / "snakemake.log").open("ab") as log:
                running[cell] = subprocess.Popen(
                    python("snakemake", *words),
                    cwd=folder,
                    env={**environment, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        began, ended = time.monotonic(), dict[Cell, float]()
        try:
            while len(ended) < len(running) and time.monotonic() < deadline:
                ended |= {
                    c: time.monotonic() - began for c, one in running.items() if one.poll() is not None and c not in ended
                }
                time.sleep(0.5)
        finally:
            stop([process for process in running.values() if process.poll() is None])
    for cell, process in running.items():
        log_file = work / cell.name / "snakemake.log"
        words_ = f"finished, {ended[cell]:.0f} s" if process.returncode == 0 else f"not finished, see {log_file}"
        print(f"{cell.name}: {words_}", flush=True)
    return all(process.returncode == 0 for process in running.values())


def gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; [""] without any."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    found = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return found or [""]


def placed(cells: list[Cell], names: list[str], processes: int) -> dict[Cell, tuple[str, int]]:
    """GPU and jobs at a time of every cell: each to the GPU that has least to do, and jobs by what there is to do."""
    weights = {cell: 3 if cell.labels == "answer" and cell.share == MAIN_SHARE else 1 for cell in cells}
    loads, found = dict.fromkeys(names, 0), {}
    for cell in sorted(cells, key=lambda cell: -weights[cell]):
        name = min(loads, key=loads.__getitem__)
        loads[name] += weights[cell]
        found[cell] = name, max(1, round(1.5 * processes * weights[cell] / sum(weights.values())))
    return found


@contextlib.contextmanager
def warm_start(work: Path) -> Iterator[dict[str, str]]:
    """The environment in which stages start without their imports, see `warm`."""
    path, functions = work / "warm.socket", work / "warm.sh"
    functions.write_text(warm.shell_functions(path))
    path.unlink(missing_ok=True)
    with (work / "warm.log").open("ab") as log:
        server = subprocess.Popen([sys.executable, warm.__file__, str(path)], env=env(), stdout=log, stderr=log)
    end = time.monotonic() + 300
    while not path.exists() and server.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    print(f"stages start {'warm' if path.exists() else 'cold: their imports took over five minutes'}", flush=True)
    try:
        yield {**env(), "BASH_ENV": str(functions)} if path.exists() else env()
    finally:
        server.terminate()
        server.wait()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for worlds and runs; kept between calls")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answers and tables")
    parser.add_argument("--models", type=Path, default=DEMO)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--target", default="evidence", help="Snakemake target; pairs or model stop earlier; or world")
    parser.add_argument("--seeds", type=int, nargs="*", help="only cells of these seeds; --out keeps what it has of others")
    parser.add_argument("--cells", nargs="*", help="only the cells of these names, such as answer-0.5-0")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop the runs after this time")
    parser.add_argument("--murk", type=int, help="see surf.demo.controlled")
    parser.add_argument("--miscaptioned", type=float, help="see surf.demo.controlled")
    parser.add_argument("--learning-rate", type=float, help="of all fine-tunes")
    parser.add_argument("--leave-out", nargs="*", default=[], help="variants that are not run")
    parser.add_argument("--raw", action="store_true", help="keep the answers, make no tables: another machine may do that")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    scale = TINY if args.tiny else Scale()
    names = ("murk", "miscaptioned", "learning_rate")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    scale = replace(scale, **changes, seeds=tuple(args.seeds) if args.seeds else scale.seeds)
    work, models = args.work.resolve(), args.models.resolve()
    processes = len(os.sched_getaffinity(0))
    draw_worlds(scale, work, processes)
    if args.target == "world":
        return
    cells = [cell for cell in cells_of(scale) if not args.cells or cell.name in args.cells]
    for cell in cells:
        folder = work / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        made = config(cell, scale, models, work / cell.world, args.leave_out)
        (folder / "config.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    finished = run(cells, work, args.target, processes, deadline)
    if experiment_tables.keep(cells, work, args.out) and not args.raw:
        experiment_tables.write(args.out)
    if not finished:
        sys.exit("not all cells are finished; run the same command again")


if __name__ == "__main__":
    main()
