"""The plan's arithmetic on made-up rates, and where rates come from."""

import json
import math

import numpy as np
import pytest

from surf import config, plan, plantable, rates, store
from surf.errors import SurfError


def made_up(**sections):
    values = {
        "catalog": {"captions": ["c.json"]},
        "split": {"conversations": ["s.json"]},
        "pope": {
            "questions": {"one": "p.json", "two": "q.json"},
            "methods": {"plain": {"model": "base", "references": 0}, "tuned": {"model": "tuned", "references": 2}},
        },
        "shards": {"corpus": 4, "rounds": 5},
        "pair": {"samples": 100},
        "finetune": {"processes": 2, "epochs": 2},
    }
    return config.parse({**values, **sections})


def known(spread=0.0, **more):
    """Every stage: 10 s to start and 0.1 s a row, measured three times."""

    def around(value):
        return rates.Measure(tuple(value * math.exp(spread * step) for step in (-1, 0, 1)), "calibration")

    names = ["embed", "answer", "score/answers", "score/reanswers", "reanswer", "finetune", "retrieve", "pope_retrieve"]
    names += ["pope_answer/0", "pope_answer/2"]
    stages = {name: rates.Stage(around(0.1), around(10)) for name in names}
    light = ["catalog", "split", "merge", "build_index", "pair", "pope_questions", "pope", "report"]
    stages.update({name: rates.Stage(start=around(1)) for name in light})
    return rates.Rates(stages, **{"wrong": (200, 1000), "pairs": (50, 100), "asked": around(4), **more})


DATA = plan.Data(
    pairs=10_000,
    corpus_bytes=10**6,
    rounds=1000,
    rounds_bytes=10**5,
    images=300,
    fresh=100,
    questions={"one": (60, 10, 10), "two": (40, 20, 5)},
    read_seconds={"catalog": 30.0, "split": 20.0},
)
SIZES = plan.Sizes(dim=8, parameters=1000, trained=600)


def lines(made):
    return {line.stage: line for line in made.lines}


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
    # half of the 200 wrong rounds make a pair; two epochs
    assert table["finetune"].rows == 200
    assert table["finetune"].gpu_hours == pytest.approx(2 * (10 + 20) / 3600)
    assert table["pope_answer plain"].rows == 100 and table["pope_answer plain"].jobs == 2
    assert (table["pope_retrieve"].rows, table["retrieve"].rows) == (30, 300)
    # both read their whole files in every job
    assert table["catalog"].job_seconds == pytest.approx(31) and table["split"].job_seconds == pytest.approx(21)
    assert table["merge"].jobs == 7


def test_more_samples_than_pairs_are_not_trained_on():
    assert lines(plan.plan(made_up(pair={"samples": 30}), DATA, SIZES, known(), gpus=1, cores=1))["finetune"].rows == 60


def test_retrieval_without_telemetry_is_embedding_what_is_new_and_searching_the_whole_corpus():
    have = known()
    stages = {key: stage for key, stage in have.stages.items() if "retrieve" not in key}
    stages["search"] = rates.Stage(rates.Measure((5.0,), "calibration"))
    table = lines(plan.plan(made_up(), DATA, SIZES, have._replace(stages=stages), gpus=1, cores=1))
    each = 100 / 300 * 0.1 + 5.0 * 10_000 / 1e6
    assert table["retrieve"].job_seconds == pytest.approx(10 + 300 / 5 * each)
    each = 15 / 30 * 0.1 + 5.0 * 10_000 / 1e6
    assert table["pope_retrieve"].job_seconds == pytest.approx(10 + 30 / 2 * each)


def stage(name, seconds, jobs=1, gpus=1, after=()):
    return plan.Stage(name, 0, jobs, gpus, after, row=0.0, start=seconds)


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
    assert plan.makespan(run, gpus, cores) == pytest.approx(seconds)


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
    assert plan.shards_that_fit(plan.Stage("x", 665_000, 200, 1, row=0.1, start=9), gpus=1) == 28  # docs/cluster.md


def test_more_gpus_asked_for_than_there_are():
    assert any("finetune asks for 2 GPUs" in note for note in plan.plan(made_up(), DATA, SIZES, known(), gpus=1, cores=1).notes)
    assert not any("finetune asks" in note for note in plan.plan(made_up(), DATA, SIZES, known(), gpus=2, cores=1).notes)


def test_disk_counts_vectors_and_checkpoints():
    table = lines(plan.plan(made_up(), DATA, SIZES, known(), gpus=1, cores=1))
    assert table["embed"].disk_bytes == 10_000 * (2 * 8 + 8)
    assert table["build_index"].disk_bytes == 10_000 * (4 * 8 + 16)
    assert table["finetune"].disk_bytes == 2 * 1000 + 3 * (2 * 1000 + 12 * 600)


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
    cfg = made_up(results=str(tmp_path))

    def part(dataset, name, rows, **figures):
        table = store.table_of(rows, dataset)
        store.write_table(tmp_path / dataset / f"{name}.parquet", table, dataset)
        store.write_json(tmp_path / dataset / "_telemetry" / f"{name}.json", {"rows": len(rows), **figures})

    verdicts = [{"round_id": str(n), "rank": -1, "metric": "match", "score": 0.0, "correct": n >= 2} for n in range(8)]
    answers = [{"round_id": str(n), "rank": -1, "response": ""} for n in range(8)]
    again = [{"round_id": str(n % 2), "rank": n // 2, "image_id": n, "response": ""} for n in range(6)]
    part("answers", "part-0", answers, work_seconds=4.0, start_seconds=7.0, load_seconds=5.0)
    part("answers", "part-1", answers, work_seconds=8.0, load_seconds=5.0)  # telemetry of an older surf
    part("scores/answers", "part-0", verdicts, work_seconds=1.0, start_seconds=2.0)
    part("reanswers", "part-0", again, work_seconds=3.0, start_seconds=7.0)
    for dataset, start in (("embeddings", 7.0), ("neighbors", 5.0), ("pope/neighbors", 11.0)):
        figures = {"rows": 4, "start_seconds": start, "work_seconds": 2.0}
        store.write_json(tmp_path / dataset / "_telemetry/part-0.json", figures)
        store.write_text(tmp_path / dataset / "part-0.parquet", "")
    (tmp_path / "answers/_telemetry/lost.json").write_text('{"rows": 1, "work_seconds": 99}')
    log = "10:00:00 step 1/3  loss 2  lr 1e-5  1.00 samples/s  0:00:09 left\n"
    log += "10:00:04 step 3/3  loss 1  lr 0e-5  4.00 samples/s  0:00:00 left\n"
    store.write_text(tmp_path / "logs/finetune/finetune.log", log)
    found = rates.of_results(cfg)
    assert found.stages["answer"].row.values == (0.5, 1.0)
    assert found.stages["answer"].start.values == (7.0, 5.0)
    assert found.stages["reanswer"].row.values == (0.5,)
    assert found.stages["finetune"].row.values == (0.25,)
    assert found.wrong == (2, 8) and found.asked.values == (3.0,)
    # retrieve: as long in all as it was, and no longer start than embed's
    both = [found.stages[key] for key in ("retrieve", "pope_retrieve")]
    assert [one.start.values[0] for one in both] == pytest.approx([7.0, 7.0])
    assert [one.row.values[0] for one in both] == pytest.approx([0.0, 1.5])
    assert "finetune" in found.stages and "score/reanswers" not in found.stages
    assert rates.of_results(made_up(results=str(tmp_path / "nothing"))) == rates.Rates({}, None, None, None)
