"""The plan's arithmetic on made-up rates, and where rates come from."""

import json
import math

import numpy as np
import pytest

from surf import calibrate, config, finished, plan, planevaluate, plantable, rates, schedule, store
from surf.errors import SurfError
from surf.methods import Method


def made_up(**sections):
    values = {
        "catalog": {"captions": ["c.json"]},
        "split": {"conversations": ["s.json"]},
        "evaluate": {
            "tasks": {"one": {"kind": "pope", "files": {"a": "p.json"}}, "two": {"kind": "vqa", "files": {"b": "q.json"}}},
            "methods": {"plain": {"model": "base"}, "tuned": {"model": "tuned", "references": 2}},
        },
        "shards": {"corpus": 4, "rounds": 5},
        "reanswer": {"right_share": 0.0},
        "pair": {"samples": 100, "harmed": 0.0},
        "finetune": {"processes": 2, "epochs": 2},
    }
    return config.parse({**values, **sections})


def known(spread=0.0, **more):
    """Every stage: 10 s to start and 0.1 s a row, measured three times."""

    def around(value):
        return rates.Measure(tuple(value * math.exp(spread * step) for step in (-1, 0, 1)), "calibration")

    names = ["embed", "answer", "score/answers", "score/reanswers", "reanswer", "finetune", "retrieve"]
    for task in ("one", "two"):
        names += [f"evaluate_retrieve/{task}", f"evaluate_candidates/gold/{task}"]
        names += [f"evaluate_answer/{task}/{count}" for count in (0, 2, 4)]
    stages = {name: rates.Stage(around(0.1), around(10)) for name in names}
    light = ["catalog", "split", "merge", "build_index", "pair", "pope", "evidence", "report"]
    stages.update({name: rates.Stage(start=around(1)) for name in light})
    return rates.Rates(stages, **{"wrong": (200, 1000), "pairs": (50, 100), "asked": around(4), **more})


DATA = plan.Data(
    pairs=10_000,
    corpus_bytes=10**6,
    rounds=1000,
    rounds_bytes=10**5,
    images=300,
    fresh=100,
    tasks={"one": planevaluate.Task(90, 60, 10, 10, 1000), "two": planevaluate.Task(40, 40, 20, 5, 500)},
    read_seconds={"catalog": 30.0, "split": 20.0},
)
SIZES = plan.Sizes(dim=8, parameters=1000, trained=600)


def lines(made):
    return {line.stage: line for line in made.lines}


@pytest.mark.parametrize("factory", ["auto", "Flat", "IVF65536,SQ8"])
def test_search_is_timed_with_every_kind_of_index(factory, monkeypatch):
    cfg = made_up(build_index={"factory": factory}, embed={"model": "local-dir:surf/demo/models/clip"})
    monkeypatch.setattr(calibrate, "_rows", lambda paths, what: [None] * 200)
    (seconds,) = calibrate.search(cfg, 1).row.values
    assert seconds > 0


def test_rows_jobs_and_times_are_those_of_the_formula():
    table = lines(plan.plan(made_up(), DATA, SIZES, known(), gpus=2, cores=4))
    embed = table["embed"]
    assert (embed.rows, embed.jobs) == (10_000, 4)
    assert embed.job_seconds == pytest.approx(10 + 2500 * 0.1)
    assert embed.gpu_hours == pytest.approx(4 * 260 / 3600)
    assert embed.wall_seconds == pytest.approx(2 * 260), "four jobs on two GPUs are two rounds"
    # 1000 rounds, a fifth wrong, four references each
    assert table["reanswer"].rows == table["score reanswers"].rows == 800
    assert table["answer"].rows == table["score answers"].rows == 1000
    # half of the 200 wrong rounds make a pair; two epochs, two processes share them
    assert table["finetune"].rows == 200
    assert table["finetune"].gpu_hours == pytest.approx(2 * (10 + 10) / 3600)
    base = table["evaluate_answer base"]
    assert (base.rows, base.jobs) == (100, 2), "one job a task; a prompt that stands in two splits is asked once"
    assert base.job_seconds == pytest.approx(10 + 60 * 0.1), "the longest"
    assert base.wall_seconds == pytest.approx(10 + 60 * 0.1), "both at once"
    assert base.gpu_hours == pytest.approx((20 + 100 * 0.1) / 3600)
    assert (table["evaluate_retrieve"].rows, table["retrieve"].rows) == (30, 300)
    # they read their whole files in every job
    assert table["catalog"].job_seconds == pytest.approx(31) and table["split"].job_seconds == pytest.approx(21)
    more = made_up(reanswer={"right_share": 0.25})
    assert lines(plan.plan(more, DATA, SIZES, known(), gpus=2, cores=4))["reanswer"].rows == (200 + 0.25 * 800) * 4
    assert table["merge"].jobs == 7 and table["evaluate_questions"].jobs == 2


def test_a_model_is_asked_what_its_methods_ask_together():
    def asked(*methods):
        return dict(planevaluate.asked([Method(model="base", **keys) for keys in methods]))

    assert asked({}, {}) == {0: 1}
    assert asked({}, {"references": 2}, {"references": 2, "rerank": "caption"}, {"references": 4}) == {0: 1, 2: 2, 4: 1}
    # a gate asks without references first, and how likely the answer is; with them it asks what its twin asks
    assert asked({"references": 2}, {"references": 2, "gate": 0.9}) == {2: 1, 0: 2}
    assert asked({"references": 2, "gate": 0.5}, {"references": 2, "gate": 0.9}, {}) == {2: 1, 0: 2}


def test_every_use_of_a_model_is_a_job_a_task_and_waits_for_what_it_needs():
    cfg = made_up(
        variants={"other": {"pair": {"samples": 50}, "finetune": {"processes": 1, "epochs": 1}}},
        evaluate={
            "tasks": made_up().model_dump()["evaluate"]["tasks"],
            "methods": {
                "oracle": {"model": "base", "references": 2, "source": "oracle"},
                "random": {"model": "other", "references": 4, "source": "random"},
                "surf": {"model": "tuned", "references": 2},
            },
        },
    )
    made = {stage.name: stage for stage in plan.stages(cfg, DATA, known(), None)}
    after = {name: {before for before, _ in stage.after} for name, stage in made.items()}
    assert after["evaluate_answer base one"] == {
        "evaluate_questions one",
        "evaluate_retrieve one",
        "evaluate_candidates gold one",
    }
    assert after["evaluate_answer other two"] == {"evaluate_questions two", "variant_finetune other"}
    assert after["evaluate_answer tuned one"] == {"evaluate_questions one", "evaluate_retrieve one", "finetune"}
    assert made["evaluate_candidates gold one"].rows == 60 * cfg.retrieve.references
    assert after["pope"] == {f"evaluate_answer {model} one" for model in ("base", "other", "tuned")}
    assert len(after["evidence"]) == 6
    # fifty pairs, one epoch, one process, by the main fine-tune's rate
    assert (made["variant_finetune other"].rows, made["variant_finetune other"].gpus) == (50, 1)
    assert made["variant_finetune other"].seconds == pytest.approx(10 + 50 * 0.1)
    table = lines(plan.plan(cfg, DATA, SIZES, known(), gpus=1, cores=2, draws=20))
    assert {name for name in table if name.startswith("evaluate")} == {
        *("evaluate_questions", "evaluate_retrieve", "evaluate_candidates gold"),
        *("evaluate_answer base", "evaluate_answer other", "evaluate_answer tuned"),
    }


def test_a_job_with_several_gpus_fills_them_where_its_stage_can():
    one, four = (lines(plan.plan(made_up(), DATA, SIZES, known(), gpus=4, gpus_per_job=n, cores=8, draws=20)) for n in (1, 4))
    assert four["answer"].job_seconds == pytest.approx(10 + 200 * 0.1 / 4)
    assert four["answer"].gpu_hours == pytest.approx(5 * 4 * 15 / 3600)
    assert four["evaluate_answer base"].job_seconds < one["evaluate_answer base"].job_seconds
    assert four["score answers"].job_seconds == one["score answers"].job_seconds
    assert four["score answers"].wall_seconds == pytest.approx(5 * 30) and one["score answers"].wall_seconds == pytest.approx(
        60
    )


def test_shards_for_another_number_of_gpus_a_job():
    made = plan.plan(made_up(), DATA._replace(pairs=400_000), SIZES, known(), gpus=16, gpus_per_job=4, cores=20, draws=20)
    assert any("set shards.corpus to 5 (it is 4)" in note for note in made.notes) is False
    made = plan.plan(made_up(), DATA._replace(pairs=800_000), SIZES, known(), gpus=16, gpus_per_job=4, cores=20, draws=20)
    assert any("set shards.corpus to 9 (it is 4)" in note for note in made.notes), made.notes


def test_more_samples_than_pairs_are_not_trained_on():
    few = made_up(pair={"samples": 30, "harmed": 0.0})
    assert lines(plan.plan(few, DATA, SIZES, known(), gpus=1, cores=1))["finetune"].rows == 60


def test_retrieval_without_telemetry_is_embedding_what_is_new_and_searching_the_whole_corpus():
    have = known()
    stages = {key: stage for key, stage in have.stages.items() if "retrieve" not in key}
    stages["search"] = rates.Stage(rates.Measure((5.0,), "calibration"))
    table = lines(plan.plan(made_up(), DATA, SIZES, have._replace(stages=stages), gpus=1, cores=1))
    each = 100 / 300 * 0.1 + 5.0 * 10_000 / 1e6
    assert table["retrieve"].job_seconds == pytest.approx(10 + 300 / 5 * each)
    searched = 15 * 0.1 + 30 * 5.0 * 10_000 / 1e6  # fifteen of thirty are new
    assert table["evaluate_retrieve"].gpu_hours == pytest.approx((20 + searched) / 3600)


def stage(name, seconds, jobs=1, gpus=1, after=()):
    return schedule.Stage(name, 0, jobs, gpus, after, row=0.0, start=seconds)


@pytest.mark.parametrize(
    ("run", "gpus", "cores", "seconds"),
    [
        ([stage("a", 5, jobs=3)], 1, 8, 15),
        ([stage("a", 5, jobs=3)], 2, 8, 10),
        ([stage("a", 5, jobs=3)], 9, 8, 5),
        ([stage("a", 5, jobs=4, gpus=0)], 1, 2, 10),  # without GPUs the cores are the limit
        ([stage("a", 5), stage("b", 7, after=(("a", False),))], 2, 8, 12),
        ([stage("a", 5), stage("b", 7)], 2, 8, 7),
        # job i waits for job i alone: the second b runs beside nothing, the first beside the second a
        ([stage("a", 5, jobs=2, gpus=0), stage("b", 7, jobs=2, after=(("a", True),))], 1, 1, 5 + 5 + 7 + 7),
        ([stage("a", 5, jobs=2, gpus=0), stage("b", 7, jobs=2, after=(("a", True),))], 1, 2, 5 + 14),
        ([stage("a", 5, jobs=2), stage("b", 7, gpus=2, after=(("a", False),))], 2, 8, 12),
        ([stage("a", 5, gpus=8)], 2, 8, 5),  # Snakemake gives it what there is
    ],
)
def test_makespan(run, gpus, cores, seconds):
    assert schedule.makespan(run, gpus, cores) == pytest.approx(seconds)


def test_wall_time_of_all_falls_with_gpus_and_gpu_hours_do_not():
    one, four = (plan.plan(made_up(), DATA, SIZES, known(), gpus=count, cores=8, draws=20) for count in (1, 4))
    assert one.wall_seconds[1] > four.wall_seconds[1] > one.wall_seconds[1] / 4
    assert one.gpu_hours[1] == pytest.approx(four.gpu_hours[1])
    every = sum(line.gpu_hours or 0 for line in one.lines)
    assert one.gpu_hours[1] == pytest.approx(every)


def test_the_band_holds_the_typical_value_widens_with_the_spread_and_is_drawn_with_a_seed():
    sure, unsure = (plan.plan(made_up(), DATA, SIZES, known(spread), gpus=2, cores=4) for spread in (0.02, 0.4))
    for low, middle, high in (sure.wall_seconds, sure.gpu_hours, unsure.wall_seconds):
        assert low < middle < high
    assert unsure.wall_seconds[2] - unsure.wall_seconds[0] > 3 * (sure.wall_seconds[2] - sure.wall_seconds[0])
    again, once = (plan.plan(made_up(), DATA, SIZES, known(0.4), gpus=2, cores=4, draws=30) for _ in range(2))
    assert again == once


def test_few_judged_rounds_leave_the_share_open():
    many, few = (plan.plan(made_up(), DATA, SIZES, known(wrong=w), gpus=2, cores=4) for w in ((2000, 10_000), (2, 10)))
    assert few.gpu_hours[2] - few.gpu_hours[0] > many.gpu_hours[2] - many.gpu_hours[0]


def test_a_drawn_measure_stays_around_its_values():
    rng = np.random.default_rng(0)
    drawn = [rates.Measure((1.9, 2.0, 2.1), "x").draw(rng) for _ in range(500)]
    assert 1.9 < np.median(drawn) < 2.1 and np.quantile(drawn, 0.05) < 1.9 and np.quantile(drawn, 0.95) > 2.1


@pytest.mark.parametrize(
    ("shards", "gpus", "note"),
    [
        (1, 1, "will take 67 min, more than 60 minutes; next: set shards.corpus to 2 (it is 1)"),
        (2, 1, None),
        (40, 1, "less than 20 minutes; next: set shards.corpus to 2 (it is 40)"),
        (40, 16, "less than 20 minutes; next: set shards.corpus to 16 (it is 40)"),
        (16, 16, None),  # short, but each GPU has one
    ],
)
def test_parts_that_are_too_long_or_too_short_are_named_with_the_number_that_fits(shards, gpus, note):
    cfg = made_up(shards={"corpus": shards, "rounds": 1})
    notes = plan.plan(cfg, DATA._replace(pairs=40_000), SIZES, known(), gpus=gpus, cores=9, draws=20).notes
    found = [text for text in notes if "shards.corpus" in text]
    assert len(found) == (note is not None) and all(note in text for text in found)
    assert plan.shards_that_fit(schedule.Stage("x", 665_000, 200, 1, row=0.1, start=9), 1) == 28  # docs/cluster.md


def test_more_gpus_asked_for_than_there_are():
    assert any("finetune asks for 2 GPUs" in note for note in plan.plan(made_up(), DATA, SIZES, known(), gpus=1, cores=1).notes)
    assert not any("finetune asks" in note for note in plan.plan(made_up(), DATA, SIZES, known(), gpus=2, cores=1).notes)


def test_disk_counts_vectors_and_checkpoints():
    table = lines(plan.plan(made_up(), DATA, SIZES, known(), gpus=1, cores=1))
    assert table["embed"].disk_bytes == 10_000 * (2 * 8 + 8)
    assert table["build_index"].disk_bytes == 10_000 * (4 * 8 + 16)
    assert table["finetune"].disk_bytes == 2 * 1000 + 3 * (2 * 1000 + 12 * 600)
    cfg = made_up(variants={"other": {"finetune": {"zero_stage": 0}}})
    one, two = (lines(plan.plan(cfg, DATA, SIZES, known(), gpus=count, cores=1, draws=20)) for count in (2, 4))
    assert one["variant_finetune other"].disk_bytes == 4 * 1000, "when it begins the first one's checkpoints are gone"
    assert two["variant_finetune other"].disk_bytes == 4 * 1000 + 3 * (4 * 1000 + 8 * 600)


def test_without_rates_there_are_rows_jobs_and_disk():
    made = plan.plan(made_up(), DATA, SIZES, rates.Rates(), gpus=1, cores=1)
    assert made.wall_seconds is None and made.gpu_hours is None and made.disk_bytes > 0
    assert lines(made)["embed"].jobs == 4 and lines(made)["embed"].job_seconds is None
    text = plantable.table(made, 1)
    assert "| embed " in text and "surf.calibrate" in text
    assert json.loads(json.dumps(plantable.as_json(made, 1)))["lines"][1]["rows"] == 10_000


def test_table_has_one_width():
    text = plantable.table(plan.plan(made_up(), DATA, SIZES, known(0.1), gpus=2, cores=4, draws=20), 2)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and "90 % between" in text


# --- where rates come from --------------------------------------------------------------------------------------------


def test_finished_parts_beat_the_calibration_stage_by_stage():
    better = rates.Rates({"embed": rates.Stage(rates.Measure((0.2,), "finished parts"), None)})
    merged = better.over(known())
    assert merged.stages["embed"].row.source == "finished parts"
    assert merged.stages["embed"].start.source == merged.stages["answer"].row.source == "calibration"
    assert merged.wrong == (200, 1000)
    table = lines(plan.plan(made_up(), DATA, SIZES, merged, gpus=1, cores=1))
    assert (table["embed"].source, table["answer"].source) == ("finished parts", "calibration")


def test_a_calibration_file_reads_back_as_it_was_written(tmp_path):
    text = json.dumps(rates.to_json(known(0.1)))
    back = rates.of_json(json.loads(text), tmp_path)
    assert back.stages == known(0.1).stages and back[1:] == known(0.1)[1:]
    for broken in ({}, [], {"stages": {"embed": {"row": "fast"}}, "shares": {}}, {"stages": {"embed": {"speed": [1]}}}):
        with pytest.raises(SurfError, match=r"no calibration file.*surf\.calibrate"):
            rates.of_json(broken, tmp_path / "calibration.json")


def test_telemetry_and_shares_of_finished_parts(tmp_path):
    methods = {
        "plain": {"model": "base"},
        "tuned": {"model": "tuned", "references": 2},
        "again": {"model": "tuned", "references": 2, "rerank": "caption"},
        "gated": {"model": "tuned", "references": 2, "gate": 0.5},
    }
    cfg = made_up(results=str(tmp_path), evaluate={**made_up().model_dump()["evaluate"], "methods": methods})

    def part(dataset, name, rows, **figures):
        table = store.table_of(rows, dataset)
        store.write_table(tmp_path / dataset / f"{name}.parquet", table, dataset)
        store.write_json(tmp_path / dataset / "_telemetry" / f"{name}.json", {"rows": len(rows), **figures})

    verdicts = [{"round_id": str(n), "rank": -1, "metric": "match", "score": 0.0, "correct": n >= 2} for n in range(8)]
    answers = [{"round_id": str(n), "rank": -1, "response": ""} for n in range(8)]
    again = [{"round_id": str(n % 2), "rank": n // 2, "image_id": n, "response": ""} for n in range(6)]
    part("answers", "part-0", answers, work_seconds=4.0, start_seconds=7.0, load_seconds=5.0)
    part("answers", "part-1", answers, work_seconds=8.0, load_seconds=5.0)  # telemetry of an older surf
    part("answers", "part-2", answers, work_seconds=2.0, start_seconds=7.0, workers=4)
    part("scores/answers", "part-0", verdicts, work_seconds=1.0, start_seconds=2.0)
    part("reanswers", "part-0", again, work_seconds=3.0, start_seconds=7.0)
    for dataset, start in (("embeddings", 7.0), ("neighbors", 5.0)):
        figures = {"rows": 4, "start_seconds": start, "work_seconds": 2.0}
        store.write_json(tmp_path / dataset / "_telemetry/part-0.json", figures)
        store.write_text(tmp_path / dataset / "part-0.parquet", "")
    for folder, part, rows, work, more in (
        ("evaluate/one", "neighbors", 4, 2.0, {"start_seconds": 11.0}),
        ("evaluate/one/candidates", "gold", 50, 5.0, {}),
        ("evaluate/one/answers/base", "plain", 40, 2.0, {}),
        ("evaluate/one/answers/tuned", "tuned", 40, 4.0, {}),
        ("evaluate/one/answers/tuned", "again", 2, 4.0, {}),
        ("evaluate/one/answers/tuned", "gated", 40, 9.0, {}),
    ):
        figures = {"rows": rows, "start_seconds": 7.0, "work_seconds": work, **more}
        store.write_json(tmp_path / folder / f"_telemetry/{part}.json", figures)
        store.write_text(tmp_path / folder / f"{part}.parquet", "")
    (tmp_path / "answers/_telemetry/lost.json").write_text('{"rows": 1, "work_seconds": 99}')
    log = "10:00:00 step 1/3  loss 2  lr 1e-5  1.00 samples/s  0:00:09 left\n"
    log += "10:00:04 step 3/3  loss 1  lr 0e-5  4.00 samples/s  0:00:00 left\n"
    store.write_text(tmp_path / "logs/finetune/finetune.log", log)
    found = finished.read(cfg)
    assert found.stages["answer"].row.values == (0.5, 1.0, 1.0), "those of four workers are one's"
    assert found.stages["answer"].start.values == (7.0, 5.0, 7.0)
    assert found.stages["reanswer"].row.values == (0.5,)
    assert found.stages["finetune"].row.values == (0.5,), "of one of two processes"
    assert found.wrong == (2, 8) and found.asked.values == (3.0,)
    # retrieve: as long in all as it was, and no longer start than embed's
    both = [found.stages[key] for key in ("retrieve", "evaluate_retrieve/one")]
    assert [one.start.values[0] for one in both] == pytest.approx([7.0, 7.0])
    assert [one.row.values[0] for one in both] == pytest.approx([0.0, 1.5])
    assert found.stages["evaluate_candidates/gold/one"].row.values == (0.1,)
    # neither a method whose prompts were asked already, nor one that asks several kinds
    assert found.stages["evaluate_answer/one/2"].row.values == (0.1,)
    assert found.stages["evaluate_answer/one/0"].row.values == (0.05,)
    assert "finetune" in found.stages and "score/reanswers" not in found.stages
    assert finished.read(made_up(results=str(tmp_path / "nothing"))) == rates.Rates({}, None, None, None)
