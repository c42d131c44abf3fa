# Targets are nouns: `snakemake pairs` makes that dataset and what it needs. `catalog`, `pope`, `evidence` and `report` are rules already.
# Sharded datasets name their parts too: a lost part is made again, although the manifest is there.


# The whole configuration, defaults filled in, beside what it made.
rule resolved_config:
    output:
        f"{RESULTS}/config.json",
    log:
        f"{RESULTS}/logs/resolved_config.log",
    params:
        config=cfg.model_dump_json(indent=1),
    shell:
        "printf '%s\\n' {params.config:q} > {output}.tmp 2> {log}; mv {output}.tmp {output}"


# Before any GPU is spent: `python -m surf.check --help` has more to offer.
rule check:
    input:
        f"{RESULTS}/config.json",
    log:
        f"{RESULTS}/logs/check/check.log",
    shell:
        "python -m surf.check --configfile {input} 2>&1 | tee {log}"


rule embeddings:
    input:
        manifest("embeddings"),
        parts("embeddings", CORPUS),


rule index:
    input:
        f"{RESULTS}/index/index.faiss",


rule rounds:
    input:
        manifest("rounds"),
        parts("rounds", ROUNDS),


rule answers:
    input:
        manifest("answers"),
        parts("answers", ROUNDS),


rule neighbors:
    input:
        manifest("neighbors"),
        parts("neighbors", ROUNDS),


rule reanswers:
    input:
        manifest("reanswers"),
        parts("reanswers", ROUNDS),


rule scores:
    input:
        manifest("scores/answers"),
        manifest("scores/reanswers"),
        parts("scores/answers", ROUNDS),
        parts("scores/reanswers", ROUNDS),


rule pairs:
    input:
        f"{RESULTS}/pairs.parquet",


rule model:
    input:
        f"{RESULTS}/model/model.json",
