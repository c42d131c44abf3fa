# Targets are nouns: `snakemake pairs` makes that dataset and what it needs. `catalog`, `pope` and `report` are rules already.


# The whole configuration, defaults filled in, beside what it made.
rule resolved_config:
    output:
        f"{RESULTS}/config.json",
    log:
        f"{RESULTS}/logs/resolved_config.log",
    params:
        config=cfg.model_dump_json(indent=1),
    shell:
        "printf '%s\\n' {params.config:q} > {output} 2> {log}"


rule embeddings:
    input:
        manifest("embeddings"),


rule index:
    input:
        f"{RESULTS}/index/index.faiss",


rule rounds:
    input:
        manifest("rounds"),


rule answers:
    input:
        manifest("answers"),


rule neighbors:
    input:
        manifest("neighbors"),


rule reanswers:
    input:
        manifest("reanswers"),


rule scores:
    input:
        manifest("scores/answers"),
        manifest("scores/reanswers"),


rule pairs:
    input:
        f"{RESULTS}/pairs.parquet",


rule model:
    input:
        f"{RESULTS}/model/model.json",
