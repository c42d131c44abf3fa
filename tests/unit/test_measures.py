"""Measures against slow counts: rescue, harm, paired differences, balance, leaks, intervals, McNemar; and their tables."""

import json
import math
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from popedata import question_rows

from surf import evidence, evidencetable, intervals, measures, store
from surf.errors import SurfError
from surf.methods import Method

METHODS = {
    "zero-shot": Method(model="base"),
    "vanilla-rag": Method(model="base", references=2),
    "surf": Method(model="tuned", references=2),
    "vanilla-rag@random": Method(model="base", references=2, source="random"),
    "surf@reversed": Method(model="tuned", references=2, order="reversed"),
    "surf@k4": Method(model="tuned", references=4),
}
SHARES = dict(zip(METHODS, (0.6, 0.7, 0.9, 0.5, 0.85, 0.88), strict=True))


def questions(splits=("random", "popular"), images=30):
    return [
        {
            "question_id": f"{split}#{row['question_id']}",
            "split": split,
            "image": row["image"],
            "question": row["text"],
            "answers": [row["label"]],
        }
        for split in splits
        for row in question_rows(images=images)
    ]


def answers(rows, methods=METHODS):
    found = {}
    for name, how in methods.items():
        rng = random.Random(name)
        said = [row["answers"][0] if rng.random() < SHARES.get(name, 0.7) else "I cannot see" for row in rows]
        shown = [[1, 2][: how.references] for _ in rows]
        found[name] = (how, [{**row, "response": s, "references": ids} for row, s, ids in zip(rows, said, shown, strict=True)])
    return found


@pytest.fixture(scope="module")
def measured():
    """Rows of `evidence/measures` by (split, subset, method, measure, against), the questions and the runs."""
    asked, runs = measures.runs_of("pope", answers(questions()), "pope")
    leaked = np.array([row["image"].endswith(("1.jpg", "2.jpg")) for row in asked])
    rows = measures.measure("pope", "pope", asked, runs, leaked, 300, 0)
    cells = {(r["split"], r["subset"], r["method"], r["measure"], r.get("against")): r for r in rows}
    assert len(cells) == len(rows)
    return cells, asked, {run.method: run for run in runs}, leaked


def test_rescue_and_harm_are_shares_of_what_zero_shot_got_wrong_and_right(measured):
    cells, _, runs, _ = measured
    before, after = runs["zero-shot"].right.tolist(), runs["surf"].right.tolist()
    counts = Counter(zip(before, after, strict=True))
    rescue = counts[False, True] / (counts[False, True] + counts[False, False])
    harm = counts[True, False] / (counts[True, False] + counts[True, True])
    for name, value in (("rescue", rescue), ("harm", harm)):
        cell = cells["all", "all", "surf", name, "zero-shot"]
        assert cell["value"] == pytest.approx(value)
        assert cell["low"] < value < cell["high"]
    assert ("all", "all", "zero-shot", "rescue", "zero-shot") not in cells


def test_differences_are_paired_and_against_both_baselines(measured):
    cells, _, runs, _ = measured
    for other in ("zero-shot", "vanilla-rag"):
        cell = cells["all", "all", "surf", "difference", other]
        assert cell["value"] == pytest.approx((runs["surf"].scores - runs[other].scores).mean())
        assert 0 < cell["low"] < cell["value"] < cell["high"] and cell["p"] < 0.01
    same = cells["random", "all", "vanilla-rag", "difference", "zero-shot"]
    assert same["questions"] == 180
    assert cells["all", "all", "surf@reversed", "changed", "surf"]["value"] == pytest.approx(
        (runs["surf"].right != runs["surf@reversed"].right).mean()
    )


def test_questions_that_a_second_split_repeats_make_nothing_more_certain():
    one, two = (answers(questions(splits), {name: METHODS[name] for name in ("zero-shot", "surf")}) for splits in (["a"], "ab"))
    for _, rows in two.values():  # the second split repeats the first
        for first, again in zip(rows[:180], rows[180:], strict=True):
            again["response"] = first["response"]
    found = []
    for given_answers in (one, two):
        asked, runs = measures.runs_of("pope", given_answers, "pope")
        rows = measures.measure("pope", "pope", asked, runs, np.zeros(len(asked), bool), 50, 0)
        found.append(next(r["p"] for r in rows if r["measure"] == "difference" and r["split"] == "all"))
    assert found[0] == pytest.approx(found[1])


def test_leaked_and_other_images_add_up(measured):
    cells, _, runs, leaked = measured
    inside, outside = (cells["all", subset, "surf", "score", None] for subset in ("leaked", "unleaked"))
    assert inside["questions"] == leaked.sum() and inside["questions"] + outside["questions"] == 360
    assert inside["value"] == pytest.approx(runs["surf"].scores[leaked].mean())
    whole = (inside["value"] * inside["questions"] + outside["value"] * outside["questions"]) / 360
    assert whole == pytest.approx(cells["all", "all", "surf", "score", None]["value"])


def test_on_balanced_questions_no_prior_scores_more_than_half(measured):
    cells, asked, _, _ = measured
    chosen = [row for row, of in zip(asked, measures.balanced("pope", asked), strict=True) if of]
    assert len(chosen) == cells["all", "balanced", "surf", "score", None]["questions"] > 50
    for split in ("random", "popular"):
        by_object = {}
        for row in chosen:
            if row["split"] == split:
                by_object.setdefault(row["question"], []).append(row["answers"][0])
        assert all(said.count("yes") == said.count("no") for said in by_object.values())
    assert not any(key[1] == "balanced" and key[2] == measures.BLIND for key in cells)
    assert cells["all", "balanced", measures.CHANCE, "score", None]["value"] == 0.5


def test_image_blind_and_chance_stand_beside_the_methods(measured):
    cells = measured[0]
    assert cells["all", "all", measures.CHANCE, "score", None]["value"] < 0.6
    assert cells["all", "all", measures.BLIND, "score", None]["value"] > 0.8, "these questions give their answers away"


def test_the_image_blind_answer_to_an_open_question_is_that_of_other_images():
    rows = [
        {"question_id": str(i), "split": "val", "image": f"{image}.jpg", "question": question, "answers": said}
        for i, (image, question, said) in enumerate(
            [
                ("a", "What colour?", ["red", "red", "blue"]),
                ("b", "what  colour?", ["blue", "blue"]),
                ("c", "What colour?", ["red"]),
                ("c", "Who?", ["nobody"]),
            ]
        )
    ]
    assert measures.blind("vqa", rows) == ["blue", "red", "blue", "blue"]
    assert measures.blind("caption", rows) is None


def test_the_random_twin_is_the_same_model_with_random_references(measured):
    runs = measured[2]
    twin = measures.random_twin(runs["vanilla-rag"], list(runs.values()))
    assert twin is runs["vanilla-rag@random"] and measures.random_twin(runs["surf"], list(runs.values())) is None
    assert measures.random_twin(twin, list(runs.values())) is None


def test_methods_must_have_answered_the_same_questions():
    found = answers(questions())
    found["surf"][1][3]["answers"] = ["other"]
    with pytest.raises(SurfError, match="'zero-shot' and 'surf' answered different questions"):
        measures.runs_of("pope", found, "pope")


# --- intervals --------------------------------------------------------------------------------------------------------


def test_ratios_agree_with_drawing_images_one_by_one():
    rng = random.Random(0)
    images = [f"{number // 4}.jpg" for number in range(80)]
    tops = np.array([[rng.random() < 0.4] for _ in images], float)
    bottoms = np.array([[rng.random() < 0.8] for _ in images], float)
    (found,) = intervals.ratios(tops, bottoms, images, 4000, 0)
    slow = []
    for _ in range(4000):
        drawn = [4 * number + part for number in (rng.randrange(20) for _ in range(20)) for part in range(4)]
        slow.append(tops[drawn].sum() / bottoms[drawn].sum())
    assert found.value == tops.sum() / bottoms.sum()
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.02)


def test_a_ratio_without_questions_and_one_image_have_no_interval():
    nothing, one = np.zeros((4, 1)), np.ones((4, 1))
    assert math.isnan(intervals.ratios(nothing, nothing, list("abcd"), 10, 0)[0].value)
    assert intervals.ratios(one, one, ["a"] * 4, 10, 0)[0] == (1.0, None, None)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_of_one_question_an_image_is_the_binomial_test(rescued, harmed):
    n = rescued + harmed
    half = [math.comb(n, k) / 2**n for k in range(n + 1)]
    slow = sum(p for p in half if p <= half[rescued] * (1 + 1e-9))  # all outcomes that are no more likely
    changes = np.array([1] * rescued + [-1] * harmed + [0] * 3)
    assert intervals.mcnemar(changes, [str(n) for n in range(len(changes))]) == pytest.approx(slow)


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from([-1, 0, 1])), min_size=1, max_size=20))
def test_mcnemar_against_every_way_of_swapping_two_methods_on_whole_images(rows):
    sums = [sum(change for image, change in rows if image == one) for one in sorted({image for image, _ in rows})]
    totals = [sum(s * sign for s, sign in zip(sums, signs, strict=True)) for signs in product((1, -1), repeat=len(sums))]
    slow = sum(abs(total) >= abs(sum(sums)) for total in totals) / len(totals)
    found = intervals.mcnemar(np.array([change for _, change in rows]), [image for image, _ in rows])
    assert found == pytest.approx(slow)


def test_mcnemar_of_many_changes():
    names = [str(n) for n in range(4000)]
    assert intervals.mcnemar(np.array([1] * 2000 + [-1] * 2000), names) == 1.0
    assert 0.04 < intervals.mcnemar(np.array([1] * 2064 + [-1] * 1936), names) < 0.05
    assert intervals.mcnemar(np.ones(4000, int), names) < 1e-300


def test_the_jackknife_of_a_mean_is_the_usual_standard_error():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    found = intervals.jackknife(lambda rows: {"mean": float(values[rows].mean())}, [str(n) for n in range(2000)])["mean"]
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(2.093 * values.std() / math.sqrt(2000), rel=0.4)
    assert intervals.jackknife(lambda rows: {"mean": 1.0}, ["a", "b"])["mean"] == (1.0, None, None)


def test_a_category_in_one_group_of_images_has_no_interval():
    names = [str(n) for n in range(2000)]
    found = intervals.jackknife(lambda rows: {"all": float(len(rows))} | ({"rare": 1.0} if 7 in rows else {}), names)
    assert found["rare"] == (1.0, None, None) and found["all"].low is not None


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """Answer files of two tasks, their catalog and images."""
    asked = questions(images=25)
    (tmp_path / "images").mkdir()
    for name in {row["image"] for row in asked}:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    open_ended = [{**row, "split": "val", "question_id": f"val#{i}"} for i, row in enumerate(asked[:60])]
    paths = []
    for task, kind, rows in (("pope", "pope", asked), ("short", "vqa", open_ended)):
        for method, (how, said) in answers(rows).items():
            paths.append(tmp_path / task / f"{method}.parquet")
            meta = {"task": task, "kind": kind, "method": method, "how": how.model_dump_json()}
            store.write_table(paths[-1], store.table_of(said, "evaluate/answers"), "evaluate/answers", meta)
    caption = "<script>alert(1)</script> a dog"
    corpus = [{"image_id": i, "image": asked[0]["image"] if i == 0 else f"r{i}.png", "caption": caption} for i in range(3)]
    store.write_table(tmp_path / "catalog/part.parquet", store.table_of(corpus, "catalog"), "catalog")
    part = {"file": "part.parquet", "digest": store.footer(tmp_path / "catalog/part.parquet")[1]["digest"]}
    store.write_json(tmp_path / "catalog/_manifest.json", {"dataset": "catalog", "rows": 3, "parts": [part]})

    def run(out, *words):
        flags = f"--catalog {tmp_path}/catalog/_manifest.json --out {out} --resamples 100 --examples 3"
        roots = f"--images.roots={json.dumps([str(tmp_path / 'images')])}"
        evidence.main([*flags.split(), "--answers", *map(str, paths), roots, *words])
        return out

    run.paths = paths
    return run


def test_evidence_command_line(results, tmp_path):
    out = results(tmp_path / "out", "--methods", *METHODS)
    rows = store.rows(store.read_table(out / "measures.parquet", "evidence/measures"))
    assert {row["task"] for row in rows} == {"pope", "short"}
    scores = store.rows(store.read_table(out / "scores.parquet", "evidence/scores"))
    leaked = {row["image"] for row in scores if row["leaked"]}
    assert len(leaked) == 1 and len(scores) == (300 + 60) * (len(METHODS) + 1)
    own = {row["measure"] for row in rows if row["task"] == "short"}
    assert "accuracy" in own, "the task's own numbers"
    text = (out / "table.md").read_text()
    assert text.index("| zero-shot |") < text.index("| vanilla-rag |") < text.index("| surf |") < text.index("| image-blind |")
    value = next(
        row["value"]
        for row in rows
        if (row["task"], row["split"], row["subset"], row["method"], row["measure"]) == ("pope", "all", "all", "surf", "score")
    )
    assert f"| surf | {100 * value:.1f} (" in text
    page = (out / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert 6 < page.count('class="card flip"') <= 2 * 2 * 3  # of two tasks, rescued and harmed
    header = (out / "measures.csv").read_text().splitlines()[0].replace('"', "").split(",")
    assert header == store.SCHEMAS["evidence/measures"].names
    again = results(tmp_path / "again", "--methods", *METHODS)
    for name in ("scores.parquet", "measures.parquet", "measures.csv", "table.md", "pope.svg", "index.html"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name


def test_a_curve_joins_methods_that_differ_in_their_number_of_references_alone(results, tmp_path):
    _, runs = measures.runs_of("pope", answers(questions()), "pope")
    assert evidencetable.curves(runs) == {"surf": [(2, "surf"), (4, "surf@k4")]}  # not the one in another order
    more = answers(questions(), {**METHODS, "vanilla-rag@k1": Method(model="base", references=1)})
    assert evidencetable.curves(measures.runs_of("pope", more, "pope")[1])["vanilla-rag"] == [
        (0, "zero-shot"),
        (1, "vanilla-rag@k1"),
        (2, "vanilla-rag"),
    ]
    assert "references, at most" in (results(tmp_path / "out") / "pope.svg").read_text()


def test_one_method_cannot_have_two_files(results, tmp_path):
    results.paths.append(results.paths[0])
    with pytest.raises(SurfError, match="method 'zero-shot' has two files for task 'pope'"):
        results(tmp_path / "out")


@pytest.mark.parametrize(("p", "text"), [(1.0, "1.00"), (0.049, "0.05"), (0.004, "0.004"), (1e-9, "< 0.001")])
def test_probabilities_are_short(p, text):
    assert evidencetable.probability(p) == text
