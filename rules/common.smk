# Everything that is a function: the checked config, names of files, flags of stages.

import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from surf import cli, summary
from surf import config as schema
from surf.errors import SurfError
from surf.shards import part_names

# `python` in the rules is the interpreter that runs snakemake, also when its environment is not activated.
shell.prefix(f"set -euo pipefail; export PATH={Path(sys.executable).parent}:$PATH; ")

try:
    cfg = schema.parse(dict(config), " ".join(map(str, workflow.overwrite_configfiles)) or "config.yaml")
except SurfError as error:
    raise WorkflowError(str(error)) from None

RESULTS = cfg.results
CORPUS = part_names(cfg.shards.corpus)
ROUNDS = part_names(cfg.shards.rounds)
SPLITS = list(cfg.pope.questions)
METHODS = list(cfg.pope.methods)
# methods with references, and so with neighbours
RETRIEVING = [name for name, method in cfg.pope.methods.items() if method.references]

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
    "pope": ["pope", "lvlm", "images"],
    "report": ["report", "score", "images"],
}


wildcard_constraints:
    part=r"part-\d{5}-of-\d{5}",
    dataset=r"embeddings|rounds|answers|neighbors|reanswers|scores/answers|scores/reanswers",
    split="|".join(SPLITS),
    method="|".join(METHODS),


localrules:
    all,
    demo,
    catalog,
    split,
    merge,
    pope_questions,
    pope,
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
    return [path for path in paths if Path(path).exists() or cfg.demo]


def check_sources():
    """Before the first job: name every file that the user still has to bring."""
    paths = [*cfg.catalog.captions, *cfg.split.conversations, *cfg.pope.questions.values(), *cfg.images.roots]
    missing = [path for path in paths if not Path(path).exists()]
    if missing and not cfg.demo:
        lines = "\n  ".join(missing)
        raise WorkflowError(
            f"these files are named in the config but are not there:\n  {lines}\nnext: see docs/data.md"
        )


def check_leftovers():
    """Before the first job: jobs that a killed run left in the queue would do the work a second time."""
    if workflow.executor_plugin.name == "slurm" and (left := summary.leftovers(Path(workflow.workdir_init))):
        raise WorkflowError(left)


def training_resources():
    """Resources of `finetune`, on each node. Over several nodes the command brings its own srun: `mpi`."""
    count, nodes = cfg.finetune.processes, cfg.finetune.nodes
    several = {"mpi": "srun", "nodes": nodes, "tasks": nodes, "tasks_per_gpu": 0} if nodes > 1 else {}
    return {"gpu": count, "gres": f"gpu:{count}", **several}


def torchrun():
    """How the command of `finetune` begins: one torchrun here, or one on each node, which meet on the first node."""
    if cfg.finetune.nodes == 1:
        return "torchrun --standalone"
    return (
        ': "${{SLURM_JOB_ID:?is not set: finetune.nodes > 1 needs --profile slurm}}"; '
        "nodes=$(squeue --noheader --jobs $SLURM_JOB_ID --format %N); head=$(scontrol show hostnames $nodes | sed -n 1p); "
        "srun --nodes {resources.nodes} --ntasks {resources.tasks} --ntasks-per-node 1 --cpus-per-task {threads}"
        " --gres {resources.gres} --kill-on-bad-exit=1 torchrun --nnodes {resources.nodes} --rdzv-backend c10d"
        " --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $head:$((20000 + SLURM_JOB_ID % 10000))"
    )


def pope_model(wildcards):
    """Input of a POPE job: the tuned model, where its method uses it."""
    return f"{RESULTS}/model/model.json" if cfg.pope.methods[wildcards.method].model == "tuned" else []


def pope_neighbors(wildcards):
    """Input of a POPE job: neighbours and catalog, where its method uses references."""
    if not cfg.pope.methods[wildcards.method].references:
        return []
    return [f"{RESULTS}/pope/neighbors/{wildcards.split}.parquet", manifest("catalog")]


def pope_method(wildcards):
    """Flags of a POPE job that follow from its method."""
    method = cfg.pope.methods[wildcards.method]
    words = ["--references", str(method.references)]
    if method.references:
        words += [
            "--neighbors",
            f"{RESULTS}/pope/neighbors/{wildcards.split}.parquet",
            "--catalog",
            manifest("catalog"),
        ]
    if method.model == "tuned":
        words += ["--model", f"{RESULTS}/model"]
    return " ".join(words)


def pope_file(wildcards):
    """Input of `pope_questions`."""
    return source([cfg.pope.questions[wildcards.split]])


def pope_path(wildcards):
    """The question file of a split, whether it is there or not."""
    return cfg.pope.questions[wildcards.split]
