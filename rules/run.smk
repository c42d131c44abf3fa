# What happens before the first job, after the last, and when one has failed.
from surf import sources, summary, watch


def check_sources():
    """Before the first job: name every file that is neither there nor drawn by `demo`. `check` does so itself."""
    if set(workflow.dag_settings.targets) == {"check"}:
        return
    missing, _ = sources.missing(cfg)
    if missing:
        lines = "\n  ".join(path for _, path in missing)
        raise WorkflowError(
            f"these files are named in the config but are not there:\n  {lines}\nnext: see docs/data.md"
        )


def check_leftovers():
    """Before the first job: jobs that a killed run left in the queue would do the work a second time."""
    if workflow.executor_plugin.name == "slurm" and (left := summary.leftovers(Path(workflow.workdir_init))):
        raise WorkflowError(left)


def look_out(log):
    """From now on: stop when all jobs that are waited for are gone from the queue."""
    if workflow.executor_plugin.name == "slurm":
        try:
            watch.start(Path(log if isinstance(log, str) else log[0]))
        except SurfError as error:
            raise WorkflowError(str(error)) from None


def sweep():
    """After a run: saved rows of finished parts, and what killed writers left, are no longer needed."""
    from surf import store  # only here: it loads pyarrow

    if count := store.sweep(Path(RESULTS)):
        print(f"{count} files of killed jobs were removed from {RESULTS}", file=sys.stderr)


onstart:
    check_sources()
    check_leftovers()
    look_out(log)


onsuccess:
    sweep()


onerror:
    summary.show(log)
