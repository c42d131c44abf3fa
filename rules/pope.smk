# POPE: object questions, answered by every method and scored under five rules; and the page that shows it all.
# in:  POPE question files, index/, catalog/, model/
# out: pope/questions/, pope/neighbors/, pope/METHOD/SPLIT.parquet, pope/metrics.*, report.html
# 1. pope_questions  read a split's question file
# 2. pope_retrieve   references of the evaluation images
# 3. pope_answer     one method on one split
# 4. pope            the table
# 5. report          the page


rule pope_questions:
    input:
        pope_file,
    output:
        f"{RESULTS}/pope/questions/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/pope/questions/{{split}}.log",
    params:
        version=version("pope"),
        file=pope_path,
    shell:
        "python -m surf.pope questions --file {params.file} --split {wildcards.split} --out {output} >> {log} 2>&1"


use rule retrieve as pope_retrieve with:
    input:
        queries=f"{RESULTS}/pope/questions/{{split}}.parquet",
        index=f"{RESULTS}/index/index.faiss",
        embeddings=manifest("embeddings"),
        catalog=manifest("catalog"),
    output:
        part=f"{RESULTS}/pope/neighbors/{{split}}.parquet",
        quarantine=f"{RESULTS}/quarantine/pope/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/pope/neighbors/{{split}}.log",
    params:
        flags=flags("retrieve"),
        version=version("retrieve"),
        dataset="pope/questions",


rule pope_answer:
    input:
        questions=f"{RESULTS}/pope/questions/{{split}}.parquet",
        references=pope_neighbors,
        model=pope_model,
    output:
        f"{RESULTS}/pope/{{method}}/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/pope/{{method}}/{{split}}.log",
    resources:
        gpu=1,
    params:
        flags=flags("pope"),
        version=version("pope"),
        seed=cfg.seed,
        method=pope_method,
    shell:
        "python -m surf.pope answer --method {wildcards.method} --questions {input.questions} {params.method}"
        f" --out {{output}} --seed {{params.seed}} {{params.flags}}{knobs('pope')} >> {{log}} 2>&1"


rule pope:
    input:
        expand(f"{RESULTS}/pope/{{method}}/{{split}}.parquet", method=METHODS, split=SPLITS),
    output:
        metrics=f"{RESULTS}/pope/metrics.parquet",
        table=report(f"{RESULTS}/pope/metrics.md", caption="report/pope_table.rst", category="POPE"),
        figure=report(f"{RESULTS}/pope/metrics.svg", caption="report/pope_figure.rst", category="POPE"),
    log:
        f"{RESULTS}/logs/pope/table.log",
    params:
        version=version("pope"),
        resamples=cfg.pope.resamples,
        seed=cfg.seed,
    shell:
        "python -m surf.pope table --answers {input} --out {output.metrics} --markdown {output.table}"
        " --figure {output.figure} --pope.resamples {params.resamples} --seed {params.seed} >> {log} 2>&1"


rule report:
    input:
        rounds=manifest("rounds"),
        answers=manifest("answers"),
        scores_answers=manifest("scores/answers"),
        reanswers=manifest("reanswers"),
        scores_reanswers=manifest("scores/reanswers"),
        catalog=manifest("catalog"),
        pairs=f"{RESULTS}/pairs.parquet",
        metrics=f"{RESULTS}/pope/metrics.parquet",
        pope_answers=expand(f"{RESULTS}/pope/{{method}}/{{split}}.parquet", method=METHODS, split=SPLITS),
        model=f"{RESULTS}/model/model.json",
        quarantine=[
            f"{RESULTS}/quarantine/catalog.parquet",
            parts("quarantine/embeddings", CORPUS),
            [parts(f"quarantine/{name}", ROUNDS) for name in ["rounds", "answers", "neighbors", "reanswers"]],
            expand(f"{RESULTS}/quarantine/pope/{{split}}.parquet", split=SPLITS if RETRIEVING else []),
        ],
    output:
        report(f"{RESULTS}/report.html", caption="report/page.rst", category="Report"),
    log:
        f"{RESULTS}/logs/report/report.log",
    params:
        flags=flags("report"),
        version=version("report"),
        resamples=cfg.pope.resamples,
        seed=cfg.seed,
    shell:
        "python -m surf.report --rounds {input.rounds} --answers {input.answers} --scores-answers {input.scores_answers}"
        " --reanswers {input.reanswers} --scores-reanswers {input.scores_reanswers} --catalog {input.catalog}"
        " --pairs {input.pairs} --metrics {input.metrics} --pope-answers {input.pope_answers} --model {input.model}"
        f" --quarantine {{input.quarantine}} --out {{output}}"
        f" --resamples {{params.resamples}} --seed {{params.seed}} {{params.flags}}{knobs('report')} >> {{log}} 2>&1"
