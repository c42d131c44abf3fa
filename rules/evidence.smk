# What the answers are worth, and the page about the run.
# in:  evaluate/TASK/answers/, and every dataset for the page
# out: pope/, evidence/, report.html
# 1. pope      POPE under five rules
# 2. evidence  every measure of every method, with intervals, plots and cases
# 3. report    the page about the run


rule pope:
    input:
        all_answers(POPE),
    output:
        metrics=f"{RESULTS}/pope/metrics.parquet",
        table=report(f"{RESULTS}/pope/metrics.md", caption="report/pope_table.rst", category="POPE"),
        figure=report(f"{RESULTS}/pope/metrics.svg", caption="report/pope_figure.rst", category="POPE"),
    log:
        f"{RESULTS}/logs/pope/table.log",
    params:
        version=version("evaluate"),
        resamples=cfg.evaluate.resamples,
        seed=cfg.seed,
        methods=list(METHODS),
    shell:
        "python -m surf.pope table --answers {input} --methods {params.methods} --out {output.metrics} --markdown {output.table}"
        " --figure {output.figure} --resamples {params.resamples} --seed {params.seed} >> {log} 2>&1"


rule evidence:
    input:
        answers=all_answers(TASKS),
        catalog=manifest("catalog"),
    output:
        scores=f"{RESULTS}/evidence/scores.parquet",
        measures=f"{RESULTS}/evidence/measures.parquet",
        csv=f"{RESULTS}/evidence/measures.csv",
        table=report(f"{RESULTS}/evidence/table.md", caption="report/evidence_table.rst", category="Evidence"),
        figures=expand(f"{RESULTS}/evidence/{{task}}.svg", task=TASKS),
        page=report(f"{RESULTS}/evidence/index.html", caption="report/evidence_page.rst", category="Evidence"),
    log:
        f"{RESULTS}/logs/evidence/evidence.log",
    params:
        version=version("evaluate"),
        resamples=cfg.evaluate.resamples,
        examples=cfg.evaluate.examples,
        seed=cfg.seed,
        methods=list(METHODS),
    shell:
        "python -m surf.evidence --answers {input.answers} --catalog {input.catalog} --out $(dirname {output.page})"
        f" --methods {{params.methods}} --resamples {{params.resamples}} --examples {{params.examples}} --seed {{params.seed}}{knobs('evidence')} >> {{log}} 2>&1"


rule report:
    input:
        rounds=manifest("rounds"),
        answers=manifest("answers"),
        scores_answers=manifest("scores/answers"),
        reanswers=manifest("reanswers"),
        scores_reanswers=manifest("scores/reanswers"),
        catalog=manifest("catalog"),
        pairs=f"{RESULTS}/pairs.parquet",
        metrics=f"{RESULTS}/pope/metrics.parquet" if POPE else [],
        pope_answers=all_answers(POPE),
        model=f"{RESULTS}/model/model.json",
        quarantine=[
            f"{RESULTS}/quarantine/catalog.parquet",
            parts("quarantine/embeddings", CORPUS),
            [parts(f"quarantine/{name}", ROUNDS) for name in ["rounds", "answers", "neighbors", "reanswers"]],
            expand(f"{RESULTS}/quarantine/evaluate/{{task}}.parquet", task=TASKS if RETRIEVING else []),
        ],
    output:
        report(f"{RESULTS}/report.html", caption="report/page.rst", category="Report"),
    log:
        f"{RESULTS}/logs/report/report.log",
    params:
        flags=flags("report"),
        version=version("report"),
        resamples=cfg.evaluate.resamples,
        seed=cfg.seed,
        methods=list(METHODS),
    shell:
        "python -m surf.report --rounds {input.rounds} --answers {input.answers} --scores-answers {input.scores_answers}"
        " --reanswers {input.reanswers} --scores-reanswers {input.scores_reanswers} --catalog {input.catalog}"
        " --pairs {input.pairs} --metrics {input.metrics} --pope-answers {input.pope_answers} --model {input.model}"
        f" --quarantine {{input.quarantine}} --out {{output}} --methods {{params.methods}}"
        f" --resamples {{params.resamples}} --seed {{params.seed}} {{params.flags}}{knobs('report')} >> {{log}} 2>&1"
