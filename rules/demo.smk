# The embedded example: draws a small world in the public formats. Only with a `demo` section in the config.
# out: images/, packed.parquet, corpus.json, sft.json, pope/*.json

if cfg.demo:

    rule demo:
        output:
            f"{cfg.demo.out}/sft.json",
            f"{cfg.demo.out}/packed.parquet",
            expand(f"{cfg.demo.out}/pope/coco_pope_{{split}}.json", split=["random", "popular", "adversarial"]),
            corpus=f"{cfg.demo.out}/corpus.json",
        log:
            f"{RESULTS}/logs/demo.log",
        params:
            scale=cfg.demo.scale,
            seed=cfg.seed,
        shell:
            "python -m surf.demo.world --out $(dirname {output.corpus}) --scale {params.scale} --seed {params.seed} >> {log} 2>&1"
