# Functions that single rules need: resources and inputs that follow from the config.
import json

from surf.tasks import KINDS


def training_resources(processes):
    """Resources of a fine-tune, on each node; `processes` is a number, or a function of the wildcards. Over several nodes the
    command brings its own srun: `mpi`."""
    nodes = cfg.finetune.nodes
    several = {"mpi": "srun", "nodes": nodes, "tasks": nodes, "tasks_per_gpu": 0} if nodes > 1 else {}
    if callable(processes):
        return {"gpu": processes, "gres": lambda wildcards: f"gpu:{processes(wildcards)}", **several}
    return {"gpu": processes, "gres": f"gpu:{processes}", **several}


def variant_processes(wildcards):
    """Processes of a variant's fine-tune, on each node."""
    return variant(wildcards)[1].processes


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


def variant(wildcards):
    """Sections `pair` and `finetune` of a variant."""
    return cfg.variant(wildcards.variant)


def unreadable_images(wildcards):
    """Files with the images that `pair` must not draw as random negatives; none if it draws none."""
    pair = variant(wildcards)[0] if "variant" in wildcards.keys() else cfg.pair
    return parts("quarantine/embeddings", CORPUS) if pair.negatives == "random" else []


def task_files(wildcards):
    """Input of `evaluate_questions`."""
    return source(cfg.evaluate.tasks[wildcards.task].files.values())


def task_suffix(wildcards):
    """What is appended to the questions of a task."""
    task = cfg.evaluate.tasks[wildcards.task]
    return KINDS[task.kind].suffix if task.suffix is None else task.suffix


def candidate_flags(wildcards):
    """Flags of `evaluate_candidates`: captions are scored by CLIP, everything else by the language model."""
    return cli.flags(embed=cfg.embed) if wildcards.by == "caption" else cli.flags(lvlm=cfg.lvlm)


def methods_of(wildcards):
    """The methods that one model answers by."""
    return {name: method for name, method in METHODS.items() if method.model == wildcards.model}


def answer_methods(wildcards):
    """The same as JSON, for the command."""
    return json.dumps(
        {name: method.model_dump(exclude_defaults=True) for name, method in methods_of(wildcards).items()}
    )


def answer_inputs(wildcards):
    """Files that the methods of a model need beside the questions, by flag."""
    methods, folder = methods_of(wildcards).values(), f"{RESULTS}/evaluate/{wildcards.task}"
    found = {}
    if any(method.references and method.source != "random" for method in methods):
        found["neighbors"] = f"{folder}/neighbors.parquet"
    if any(method.references for method in methods):
        found["catalog"] = manifest("catalog")
    if scores := dict.fromkeys(by for method in methods for by in method.needs()):
        found["candidates"] = [f"{folder}/candidates/{by}.parquet" for by in scores]
    if wildcards.model != "base":
        found["model"] = (
            f"{RESULTS}/{'' if wildcards.model == 'tuned' else f'variants/{wildcards.model}/'}model/model.json"
        )
    return found


def answer_flags(wildcards):
    """The same as flags."""
    words = []
    for name, paths in answer_inputs(wildcards).items():
        value = paths if isinstance(paths, str) else " ".join(paths)
        words.append(f"--{name} {Path(value).parent if name == 'model' else value}")
    return " ".join(words)


def all_answers(tasks):
    """Answers of all methods to some tasks: the manifests."""
    models = dict.fromkeys(method.model for method in METHODS.values())
    return expand(f"{RESULTS}/evaluate/{{task}}/answers/{{model}}/_manifest.json", task=tasks, model=models)
