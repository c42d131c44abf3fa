# surf: teach a vision-language model to use retrieved image-caption pairs selectively.
#
#   snakemake -n                          what would run
#   snakemake --profile profiles/local    run it here
#   snakemake --profile slurm             run it on a cluster
#   snakemake pairs | model | evidence …  just that dataset and what it needs

from snakemake.utils import min_version

min_version("9.3")

# A config file on the command line takes the place of the example's; the two are never mixed.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


# Nothing in the workflow needs a container; a site that wants one names it here, and runs with --sdm apptainer.
container: "docker://python:3.11-slim"


include: "rules/common.smk"
include: "rules/jobs.smk"


rule all:
    input:
        [manifest(name) for name in ["catalog", "embeddings", "rounds", "answers", "neighbors", "reanswers"]],
        [manifest(f"scores/{name}") for name in ["answers", "reanswers"]],
        f"{RESULTS}/pairs.json",
        f"{RESULTS}/model/model.json",
        [f"{RESULTS}/pope/metrics.parquet"] if POPE else [],
        f"{RESULTS}/evidence/index.html",
        f"{RESULTS}/config.json",
        f"{RESULTS}/report.html",


include: "rules/demo.smk"
include: "rules/database.smk"
include: "rules/responses.smk"
include: "rules/training.smk"
include: "rules/evaluate.smk"
include: "rules/evidence.smk"
include: "rules/targets.smk"
include: "rules/run.smk"
