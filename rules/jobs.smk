# Functions that single rules need: checks before the first job, resources and inputs that follow from the config.
from surf import summary


def check_sources():
    """Before the first job: name every file that the user still has to bring. `check` does so itself."""
    if set(workflow.dag_settings.targets) == {"check"}:
        return
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


def sweep():
    """After a run: saved rows of finished parts, and what killed writers left, are no longer needed."""
    from surf import store  # only here: it loads pyarrow

    if count := store.sweep(Path(RESULTS)):
        print(f"{count} files of killed jobs were removed from {RESULTS}", file=sys.stderr)


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
    for flag, path in zip(["--neighbors", "--catalog"], pope_neighbors(wildcards)):
        words += [flag, path]
    if method.model == "tuned":
        words += ["--model", f"{RESULTS}/model"]
    return " ".join(words)


def pope_file(wildcards):
    """Input of `pope_questions`."""
    return source([pope_path(wildcards)])


def pope_path(wildcards):
    """The question file of a split, whether it is there or not."""
    return cfg.pope.questions[wildcards.split]
