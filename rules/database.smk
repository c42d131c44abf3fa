# From the corpus to a searchable index.
# in:  caption JSON files, image roots
# out: catalog/, embeddings/, index/
# 1. catalog      number the image-caption pairs
# 2. embed        CLIP embeddings, one job a part
# 3. build_index  FAISS over all embeddings


rule catalog:
    input:
        source(cfg.catalog.captions),
    output:
        parts("catalog", CORPUS),
        manifest=manifest("catalog"),
        quarantine=f"{RESULTS}/quarantine/catalog.parquet",
    log:
        f"{RESULTS}/logs/catalog/catalog.log",
    params:
        flags=flags("catalog"),
        version=version("catalog"),
        shards=cfg.shards.corpus,
    shell:
        "python -m surf.catalog --out $(dirname {output.manifest}) --quarantine {output.quarantine} --shards {params.shards}"
        f" {{params.flags}}{knobs('catalog')} >> {{log}} 2>&1"


rule embed:
    input:
        f"{RESULTS}/catalog/{{part}}.parquet",
    output:
        part=f"{RESULTS}/embeddings/{{part}}.parquet",
        quarantine=f"{RESULTS}/quarantine/embeddings/{{part}}.parquet",
    log:
        f"{RESULTS}/logs/embed/{{part}}.log",
    resources:
        gpu=1,
    params:
        flags=flags("embed"),
        version=version("embed"),
    shell:
        "python -m surf.embed --catalog {input} --out {output.part} --quarantine {output.quarantine}"
        f" {{params.flags}}{knobs('embed')} >> {{log}} 2>&1"


rule build_index:
    input:
        manifest("embeddings"),
    output:
        index=f"{RESULTS}/index/index.faiss",
        about=f"{RESULTS}/index/index.json",
    log:
        f"{RESULTS}/logs/build_index/build_index.log",
    params:
        flags=flags("build_index"),
        version=version("build_index"),
        seed=cfg.seed,
    shell:
        "python -m surf.build_index --embeddings {input} --out {output.index} --seed {params.seed}"
        " {params.flags} >> {log} 2>&1"


# A dataset is whole when all its parts are; its manifest is what later stages wait for.
rule merge:
    input:
        parts_of,
    output:
        f"{RESULTS}/{{dataset}}/_manifest.json",
    log:
        f"{RESULTS}/logs/merge/{{dataset}}.log",
    shell:
        "python -m surf.merge --dataset {wildcards.dataset} --out {output} --parts {input} >> {log} 2>&1"
