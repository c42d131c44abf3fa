# What the frozen model says, without and with each reference, and what the judges say of it.
# in:  SFT conversations, image roots, index/, catalog/
# out: rounds/, answers/, neighbors/, reanswers/, scores/
# 1. split      conversations into single rounds
# 2. answer     every round without a reference
# 3. score      the first answers
# 4. retrieve   similar corpus images, once an image
# 5. reanswer   wrong rounds and a share of the others, once with each reference
# 6. score      the re-answers


rule split:
    input:
        source(cfg.split.conversations),
    output:
        part=f"{RESULTS}/rounds/{{part}}.parquet",
        quarantine=f"{RESULTS}/quarantine/rounds/{{part}}.parquet",
    log:
        f"{RESULTS}/logs/split/{{part}}.log",
    params:
        flags=flags("split"),
        version=version("split"),
    shell:
        "python -m surf.split --part {wildcards.part} --out {output.part} --quarantine {output.quarantine}"
        f" {{params.flags}}{knobs('split')} >> {{log}} 2>&1"


rule answer:
    input:
        f"{RESULTS}/rounds/{{part}}.parquet",
    output:
        part=f"{RESULTS}/answers/{{part}}.parquet",
        quarantine=f"{RESULTS}/quarantine/answers/{{part}}.parquet",
    log:
        f"{RESULTS}/logs/answer/{{part}}.log",
    resources:
        gpu=1,
    params:
        flags=flags("answer"),
        version=version("answer"),
        seed=cfg.seed,
    shell:
        "python -m surf.answer --rounds {input} --out {output.part} --quarantine {output.quarantine}"
        f" --seed {{params.seed}} {{params.flags}}{knobs('answer')} >> {{log}} 2>&1"


rule score:
    input:
        rounds=f"{RESULTS}/rounds/{{part}}.parquet",
        responses=f"{RESULTS}/{{responses}}/{{part}}.parquet",
    output:
        f"{RESULTS}/scores/{{responses}}/{{part}}.parquet",
    log:
        f"{RESULTS}/logs/score/{{responses}}/{{part}}.log",
    wildcard_constraints:
        responses="answers|reanswers",
    resources:
        gpu=1,
    params:
        flags=flags("score"),
        version=version("score"),
    shell:
        "python -m surf.score --rounds {input.rounds} --responses {input.responses} --dataset {wildcards.responses}"
        " --out {output} {params.flags} >> {log} 2>&1"


rule retrieve:
    input:
        queries=f"{RESULTS}/rounds/{{part}}.parquet",
        index=f"{RESULTS}/index/index.faiss",
        embeddings=manifest("embeddings"),
        catalog=manifest("catalog"),
    output:
        part=f"{RESULTS}/neighbors/{{part}}.parquet",
        quarantine=f"{RESULTS}/quarantine/neighbors/{{part}}.parquet",
    log:
        f"{RESULTS}/logs/retrieve/{{part}}.log",
    resources:
        gpu=1,
    params:
        flags=flags("retrieve"),
        version=version("retrieve"),
        dataset="rounds",
    shell:
        "python -m surf.retrieve --dataset {params.dataset} --queries {input.queries} --index {input.index}"
        " --embeddings {input.embeddings} --catalog {input.catalog} --out {output.part}"
        f" --quarantine {{output.quarantine}} {{params.flags}}{knobs('retrieve')} >> {{log}} 2>&1"


rule reanswer:
    input:
        rounds=f"{RESULTS}/rounds/{{part}}.parquet",
        scores=f"{RESULTS}/scores/answers/{{part}}.parquet",
        neighbors=f"{RESULTS}/neighbors/{{part}}.parquet",
        catalog=manifest("catalog"),
    output:
        part=f"{RESULTS}/reanswers/{{part}}.parquet",
        quarantine=f"{RESULTS}/quarantine/reanswers/{{part}}.parquet",
    log:
        f"{RESULTS}/logs/reanswer/{{part}}.log",
    resources:
        gpu=1,
    params:
        flags=flags("reanswer"),
        version=f"{version('reanswer')}.{version('answer')}",
        seed=cfg.seed,
    shell:
        "python -m surf.reanswer --rounds {input.rounds} --scores {input.scores} --neighbors {input.neighbors}"
        " --catalog {input.catalog} --out {output.part} --quarantine {output.quarantine} --seed {params.seed}"
        f" {{params.flags}}{knobs('reanswer')} >> {{log}} 2>&1"
