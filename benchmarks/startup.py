"""What a job costs before its first row: imports, model load, Snakemake.

python benchmarks/startup.py [--config config.yaml] [--repeats 3]

Each figure is the fastest of the repeats, each in a new process: seconds on the clock, and of the processor, which other
jobs on the machine disturb less. The models are those of the config.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import common

from surf import config

STAGES = (
    *("catalog", "embed", "build_index", "split", "answer", "score", "retrieve", "reanswer", "pair", "finetune", "pope"),
    *("report", "merge"),
)

# Libraries that a model job imports; then the model, loaded as the stage loads it. `cfg` and `images` are at hand.
MODELS = {
    "embed": ("import torch, open_clip", "from surf.models import clip; clip.load(cfg.embed, images)"),
    "answer": (
        "import torch; from transformers import AutoModelForImageTextToText, AutoProcessor",
        "from surf.models import lvlm; lvlm.load(cfg.lvlm, images)",
    ),
    "score": (
        "import torch; from transformers import AutoModel, AutoTokenizer",
        "from surf.bertscore import BertScore; "
        "BertScore(cfg.score.bertscore_model, cfg.score.bertscore_layer)(['a dog'], ['a cat'])",
    ),
    "retrieve": ("import faiss", ""),
}
TIMED = """
import time, json, sys
start = time.perf_counter()
from surf import config
from surf.images import Images
cfg = config.load({config!r})
images = Images(["."])
light = time.perf_counter()
{imports}
heavy = time.perf_counter()
{load}
print(json.dumps([light - start, heavy - light, time.perf_counter() - heavy, time.process_time()]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config.load(common.ROOT / args.config)
    print(f"{common.machine()}\n")
    rows = [(stage, *fastest(args.repeats, lambda stage=stage: help_of(stage))) for stage in STAGES]
    print(common.table(["start of a stage to `--help`", "s", "CPU s"], rows), "\n", flush=True)
    rows = []
    for stage, (imports, load) in MODELS.items():
        *parts, busy = min((timed(args.config, imports, load) for _ in range(args.repeats)), key=lambda times: sum(times[:3]))
        rows.append((stage, *parts, sum(parts), busy))
    print(common.table(["model job", "surf, s", "libraries, s", "model, s", "sum, s", "CPU s"], rows), "\n", flush=True)
    print(common.table(["Snakemake", "s", "CPU s"], snakemake(args.config, args.repeats)))


def fastest(repeats: int, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds and processor seconds of the fastest run in child processes."""
    times = []
    for _ in range(repeats):
        start, busy = time.perf_counter(), children()
        run()
        times.append((time.perf_counter() - start, children() - busy))
    return min(times)


def children() -> float:
    """Processor seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def help_of(stage: str) -> None:
    common.python("-m", f"surf.{stage}", "--help")


def timed(config_file: str, imports: str, load: str) -> list[float]:
    """Seconds for surf's own modules, the libraries, the model; processor seconds of it all. In a new process."""
    return json.loads(common.python("-c", TIMED.format(config=config_file, imports=imports, load=load)))


def snakemake(config_file: str, repeats: int) -> list[tuple[str, float, float]]:
    """Seconds for the dry run of the config's whole workflow, into an empty results folder."""
    try:
        import snakemake as _  # noqa: F401
    except ImportError:
        return []
    with TemporaryDirectory() as folder:
        empty = Path(folder) / "results"
        words = ["-m", "snakemake", "-n", "--quiet", "all", "--configfile", config_file, "--config", f"results={empty}"]
        return [
            ("`--version` (imports)", *fastest(repeats, lambda: common.python("-m", "snakemake", "--version"))),
            ("`-n` of the whole workflow", *fastest(repeats, lambda: common.python(*words))),
        ]


if __name__ == "__main__":
    main()
