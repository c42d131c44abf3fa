# What all rules share: the checked config, names of files, flags of stages. What single rules need stands in jobs.smk.

import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from surf import cli, sources, yamlfile
from surf import config as schema
from surf.errors import SurfError
from surf.shards import part_names

# `python` in the rules is the interpreter that runs snakemake, also when its environment is not activated.
shell.prefix(f"set -euo pipefail; export PATH={Path(sys.executable).parent}:$PATH; ")

try:
    for file in workflow.overwrite_configfiles or ["config.yaml"]:
        if Path(file).suffix != ".json":
            yamlfile.read(Path(workflow.workdir_init, file))  # Snakemake lets a key stand twice
    cfg = schema.parse(dict(config), " ".join(map(str, workflow.overwrite_configfiles)) or "config.yaml")
except SurfError as error:
    raise WorkflowError(str(error)) from None

RESULTS = cfg.results
CORPUS = part_names(cfg.shards.corpus)
ROUNDS = part_names(cfg.shards.rounds)
TASKS = list(cfg.evaluate.tasks)
POPE = [name for name, task in cfg.evaluate.tasks.items() if task.kind == "pope"]
METHODS = cfg.evaluate.all_methods()
# methods that choose among the neighbours of the questions' images
RETRIEVING = [name for name, method in METHODS.items() if method.references and method.source != "random"]

# The config sections that each stage reads, first its own.
SECTIONS = {
    "catalog": ["catalog", "images"],
    "embed": ["embed", "images"],
    "build_index": ["build_index"],
    "split": ["split", "images"],
    "answer": ["answer", "lvlm", "images"],
    "score": ["score"],
    "retrieve": ["retrieve", "embed", "images"],
    "reanswer": ["reanswer", "answer", "lvlm", "score", "images"],
    "pair": ["pair", "score"],
    "finetune": ["finetune", "lvlm", "images"],
    "candidates": ["embed", "lvlm", "images"],
    "evaluate": ["lvlm", "images"],
    "evidence": ["images"],
    "report": ["report", "score", "images"],
}


wildcard_constraints:
    part=r"part-\d{5}-of-\d{5}",
    dataset=r"embeddings|rounds|answers|neighbors|reanswers|scores/answers|scores/reanswers",
    task="|".join(TASKS),
    model="|".join(["base", "tuned", *cfg.variants]),
    variant="|".join(cfg.variants) or "none",
    by="caption|relevance|gold",


localrules:
    all,
    check,
    demo,
    catalog,
    split,
    merge,
    evaluate_questions,
    pope,
    evidence,
    report,
    resolved_config,


def flags(stage):
    """Flags of a stage that change its results. A change of `params` is what makes Snakemake rerun a job."""
    return cli.flags(**{name: getattr(cfg, name) for name in SECTIONS[stage]})


def knobs(stage):
    """Flags of a stage that change its speed only (batch sizes, image folders). They stand in the command but not in
    `params`: changing them reruns nothing."""
    text = cli.knobs(**{name: getattr(cfg, name) for name in SECTIONS[stage]})
    text = text.replace("{", "{{").replace("}", "}}")
    return f" {text}"


def version(stage):
    """Hand-bumped version of a stage's code."""
    return getattr(cfg, stage).version


def parts(dataset, names):
    """Files of a dataset's parts."""
    return [f"{RESULTS}/{dataset}/{name}.parquet" for name in names]


def parts_of(wildcards):
    """Input of `merge`: all parts of its dataset."""
    return parts(wildcards.dataset, CORPUS if wildcards.dataset == "embeddings" else ROUNDS)


def manifest(dataset):
    """The file that says a dataset is whole."""
    return f"{RESULTS}/{dataset}/_manifest.json"


def source(paths):
    """Files that the user brings. One that is missing is left out, so that -n can show the DAG; see `check_sources`."""
    return [path for path in paths if Path(path).exists() or sources.draws(cfg, path)]
