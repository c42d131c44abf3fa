# From scores to a tuned model.
# in:  rounds/, scores/, neighbors/, catalog/
# out: pairs.parquet, pairs.json, model/; the same of every variant in variants/NAME/
# 1. pair      hard positive and negative references, mixed and cut to size
# 2. finetune  DeepSpeed through torchrun, on one node or several
# Variants are further fine-tunes, the controls of an evaluation: some keys of `pair` and `finetune` differ.


rule pair:
    input:
        rounds=manifest("rounds"),
        scores_answers=manifest("scores/answers"),
        scores_reanswers=manifest("scores/reanswers"),
        neighbors=manifest("neighbors"),
        answers=manifest("answers"),
        reanswers=manifest("reanswers"),
        catalog=manifest("catalog"),
        unreadable=unreadable_images,
    output:
        pairs=report(f"{RESULTS}/pairs.parquet", caption="report/pairs.rst", category="Training data"),
        json=f"{RESULTS}/pairs.json",
    log:
        f"{RESULTS}/logs/pair/pair.log",
    params:
        flags=flags("pair"),
        version=version("pair"),
        seed=cfg.seed,
    shell:
        "python -m surf.pair --rounds {input.rounds} --scores-answers {input.scores_answers}"
        " --scores-reanswers {input.scores_reanswers} --neighbors {input.neighbors} --catalog {input.catalog}"
        " --unreadable {input.unreadable} --out {output.pairs} --json {output.json} --seed {params.seed} {params.flags} >> {log} 2>&1"


# Only model.json is declared: weights and checkpoints survive a retry, and the run goes on from the last checkpoint.
rule finetune:
    input:
        f"{RESULTS}/pairs.parquet",
    output:
        f"{RESULTS}/model/model.json",
    log:
        f"{RESULTS}/logs/finetune/finetune.log",
    threads: cfg.finetune.processes
    resources:
        **training_resources(cfg.finetune.processes),
    params:
        flags=flags("finetune"),
        version=version("finetune"),
        seed=cfg.seed,
        processes=cfg.finetune.processes,
    shell:
        "export OMP_NUM_THREADS=$(( {threads} / {params.processes} > 0 ? {threads} / {params.processes} : 1 )); "
        f"{torchrun()} --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600"
        " --nproc-per-node {params.processes} -m surf.finetune --pairs {input} --out $(dirname {output})"
        f" --seed {{params.seed}} {{params.flags}}{knobs('finetune')} >> {{log}} 2>&1"


use rule pair as variant_pair with:
    output:
        pairs=f"{RESULTS}/variants/{{variant}}/pairs.parquet",
        json=f"{RESULTS}/variants/{{variant}}/pairs.json",
    log:
        f"{RESULTS}/logs/pair/{{variant}}.log",
    params:
        flags=lambda wildcards: cli.flags(pair=variant(wildcards)[0], score=cfg.score),
        version=version("pair"),
        seed=cfg.seed,


use rule finetune as variant_finetune with:
    input:
        f"{RESULTS}/variants/{{variant}}/pairs.parquet",
    output:
        f"{RESULTS}/variants/{{variant}}/model/model.json",
    log:
        f"{RESULTS}/logs/finetune/{{variant}}.log",
    threads: variant_processes
    resources:
        **training_resources(variant_processes),
    params:
        flags=lambda wildcards: cli.flags(finetune=variant(wildcards)[1], lvlm=cfg.lvlm, images=cfg.images),
        version=version("finetune"),
        seed=cfg.seed,
        processes=variant_processes,
