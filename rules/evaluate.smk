# Every method answers the questions of every task.
# in:  question files, index/, catalog/, model/, variants/*/model/
# out: evaluate/TASK/…
# 1. evaluate_questions   read a task's question files
# 2. evaluate_retrieve    candidates: similar corpus images of the questions' images
# 3. evaluate_candidates  further scores of the candidates, where a method needs them
# 4. evaluate_answer      all methods of one model on one task, a file for each method


rule evaluate_questions:
    input:
        task_files,
    output:
        f"{RESULTS}/evaluate/{{task}}/questions.parquet",
    log:
        f"{RESULTS}/logs/evaluate/{{task}}/questions.log",
    params:
        version=version("evaluate"),
        kind=lambda wildcards: cfg.evaluate.tasks[wildcards.task].kind,
        files=lambda wildcards: json.dumps(cfg.evaluate.tasks[wildcards.task].files),
    shell:
        "python -m surf.evaluate questions --task {wildcards.task} --kind {params.kind} --files {params.files:q}"
        " --out {output} >> {log} 2>&1"


use rule retrieve as evaluate_retrieve with:
    input:
        queries=f"{RESULTS}/evaluate/{{task}}/questions.parquet",
        index=f"{RESULTS}/index/index.faiss",
        embeddings=manifest("embeddings"),
        catalog=manifest("catalog"),
    output:
        part=f"{RESULTS}/evaluate/{{task}}/neighbors.parquet",
        quarantine=f"{RESULTS}/quarantine/evaluate/{{task}}.parquet",
    log:
        f"{RESULTS}/logs/evaluate/{{task}}/neighbors.log",
    params:
        flags=flags("retrieve"),
        version=version("retrieve"),
        dataset="evaluate/questions",


rule evaluate_candidates:
    input:
        questions=f"{RESULTS}/evaluate/{{task}}/questions.parquet",
        neighbors=f"{RESULTS}/evaluate/{{task}}/neighbors.parquet",
        catalog=manifest("catalog"),
    output:
        f"{RESULTS}/evaluate/{{task}}/candidates/{{by}}.parquet",
    log:
        f"{RESULTS}/logs/evaluate/{{task}}/candidates/{{by}}.log",
    resources:
        gpu=1,
    params:
        flags=candidate_flags,
        version=version("evaluate"),
        suffix=task_suffix,
    shell:
        "python -m surf.candidates --by {wildcards.by} --questions {input.questions} --neighbors {input.neighbors}"
        f" --catalog {{input.catalog}} --out {{output}} --suffix={{params.suffix:q}} {{params.flags}}{knobs('candidates')}"
        " >> {log} 2>&1"


# Only the manifest is declared: the methods' files survive a rerun, and those that are still right are not made again.
rule evaluate_answer:
    input:
        unpack(answer_inputs),
        questions=f"{RESULTS}/evaluate/{{task}}/questions.parquet",
    output:
        f"{RESULTS}/evaluate/{{task}}/answers/{{model}}/_manifest.json",
    log:
        f"{RESULTS}/logs/evaluate/{{task}}/answers/{{model}}.log",
    resources:
        gpu=1,
    params:
        flags=flags("evaluate"),
        version=version("evaluate"),
        seed=cfg.seed,
        methods=answer_methods,
        inputs=answer_flags,
        suffix=task_suffix,
        max_new_tokens=lambda wildcards: cfg.evaluate.tasks[wildcards.task].max_new_tokens,
    shell:
        "python -m surf.evaluate answer --questions {input.questions} --methods {params.methods:q}"
        " {params.inputs} --out {output} --suffix={params.suffix:q} --max-new-tokens {params.max_new_tokens}"
        f" --seed {{params.seed}} {{params.flags}}{knobs('evaluate')} >> {{log}} 2>&1"
