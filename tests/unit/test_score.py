"""Judging answers and labelling references."""

import numpy as np
import pytest

from surf import cli, config, score, store
from surf.errors import SurfError

OPTIONS = config.Score()
ROUNDS = [
    {"round_id": "c#0", "image": "a.jpg", "question": "?", "answer": "B", "task": "choice"},
    {"round_id": "c#1", "image": "a.jpg", "question": "?", "answer": "dog", "task": "short"},
    {"round_id": "c#2", "image": "a.jpg", "question": "?", "answer": "[0, 0, 1, 1]", "task": "box"},
    {"round_id": "c#3", "image": "a.jpg", "question": "?", "answer": "A dog on a mat.", "task": "caption"},
    {"round_id": "c#4", "image": "a.jpg", "question": "?", "answer": "Because it is late.", "task": "open"},
]


class FakeScorer:
    """BERTScore by a table; keeps what it was asked."""

    def __init__(self, values=None):
        self.values, self.calls = values or {}, []

    def __call__(self, candidates, references):
        self.calls.append(list(zip(candidates, references, strict=True)))
        return np.array([self.values[text] for text in candidates], dtype=np.float32)


def no_scorer(candidates, references):
    raise AssertionError("no text needs BERTScore here")


def responses(*rows, dataset="answers"):
    keys = ("round_id", "rank", "image_id", "response", "gold_loglik")
    return store.table_of([dict(zip(keys, row, strict=True)) for row in rows], dataset)


def rounds(keep=ROUNDS):
    return store.table_of(keep, "rounds")


def test_each_task_has_its_judge_and_rows_are_joined_by_round():
    scorer = FakeScorer({"A cat.": 0.5, "It is night.": 0.8})
    table = responses(
        ("c#4", -1, None, "It is night.", None),
        ("c#2", -1, None, "[0, 0, 1, 0.6]", None),
        ("c#0", -1, None, "(B) a thing", None),
        ("c#3", -1, None, "A cat.", None),
        ("c#1", -1, None, "woman", None),
    )
    rows = store.rows(score.score(rounds(), table, OPTIONS, scorer))
    found = [(row["round_id"], row["rank"], row["metric"], round(row["score"], 4), row["correct"]) for row in rows]
    assert found == [
        ("c#4", -1, "bertscore", 0.8, None),
        ("c#2", -1, "iou", 0.6, True),
        ("c#0", -1, "match", 1.0, True),
        ("c#3", -1, "bertscore", 0.5, False),
        ("c#1", -1, "match", 0.0, False),
    ]
    assert scorer.calls == [[("It is night.", "Because it is late."), ("A cat.", "A dog on a mat.")]]


@pytest.mark.parametrize(("value", "correct"), [(0.69, False), (0.7, None), (0.89, None), (0.9, True)])
def test_text_answers_have_an_undecided_middle(value, correct):
    assert score.judge(["open"], ["x"], ["gold"], OPTIONS, FakeScorer({"x": value}))[0].correct is correct


def test_no_box_is_never_right():
    options = config.Score(iou=0.0)
    assert score.judge(["box"], ["no idea"], ["[0, 0, 1, 1]"], options, no_scorer)[0] == ("iou", 0.0, False)


def test_short_answers_load_no_encoder():
    options = config.Score(bertscore_model="there/is/no/such/model")
    judged = score.judge(["short", "choice"], ["dog", ""], ["dog", "A"], options, score.scorer(options))
    assert judged == [("match", 1.0, True), ("match", 0.0, False)]


def test_judge_loglik_scores_by_likelihood_and_still_decides_by_text():
    options = config.Score(judge="loglik")
    table = responses(("c#1", -1, None, "dog", -0.25), ("c#0", -1, None, "A", -2.5))
    rows = store.rows(score.score(rounds(), table, options, no_scorer))
    assert [(row["metric"], row["score"], row["correct"]) for row in rows] == [("loglik", -0.25, True), ("loglik", -2.5, False)]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_judge_loglik_without_likelihoods_is_refused(value):
    table = responses(("c#1", -1, None, "dog", -0.25), ("c#0", -1, None, "A", value))
    with pytest.raises(SurfError, match=r"1 of 2 responses have no gold_loglik.*answer\.gold_loglik"):
        score.score(rounds(), table, config.Score(judge="loglik"), no_scorer)


def test_an_answer_without_a_round_is_refused():
    table = responses(("c#1", -1, None, "dog", None), ("x#7", -1, None, "dog", None))
    with pytest.raises(SurfError, match=r"here\.parquet.*'x#7'"):
        score.score(rounds(), table, OPTIONS, no_scorer, where="here.parquet")


def test_a_round_without_an_answer_and_no_answers_at_all_are_fine():
    assert score.score(rounds(), responses(), OPTIONS, no_scorer).num_rows == 0
    assert score.score(rounds(), responses(("c#1", -1, None, "", None)), OPTIONS, no_scorer).num_rows == 1


def test_an_unknown_task_is_refused():
    with pytest.raises(SurfError, match="no task 'rhyme'"):
        score.judge(["rhyme"], ["a"], ["b"], OPTIONS, no_scorer)


@pytest.mark.parametrize(
    ("metric", "value", "correct", "base", "expected"),
    [
        ("match", 1.0, True, 0.0, True),
        ("match", 0.0, False, 0.0, False),
        ("iou", 0.49, False, 0.1, False),  # nearer, but still wrong
        ("iou", 0.5, True, 0.4, True),
        ("bertscore", 0.62, False, 0.60, True),
        ("bertscore", 0.605, False, 0.60, None),
        ("bertscore", 0.595, None, 0.60, None),
        ("bertscore", 0.55, True, 0.60, False),
        ("bertscore", np.float32(0.61), None, np.float32(0.60), True),  # the margin itself, as float32 stores it
        ("bertscore", np.float32(0.60), None, np.float32(0.61), False),
        ("bertscore", float("nan"), None, 0.6, None),
        ("loglik", -1.0, True, -1.05, None),
        ("loglik", -1.0, False, -1.5, True),
        ("loglik", -2.0, True, -1.5, False),
    ],
)
def test_label(metric, value, correct, base, expected):
    assert score.label(metric, value, correct, base, False, OPTIONS) is expected


@pytest.mark.parametrize(
    ("metric", "value", "correct", "base", "expected"),
    [
        ("match", 1.0, True, 1.0, True),
        ("match", 0.0, False, 1.0, False),
        ("iou", 0.5, True, 0.9, True),  # worse, but still right
        ("bertscore", 0.95, True, 0.99, True),
        ("bertscore", 0.8, None, 0.99, None),
        ("bertscore", 0.6, False, 0.99, False),
        ("loglik", -0.5, True, -0.1, False),
    ],
)
def test_label_of_a_round_that_was_right_at_first(metric, value, correct, base, expected):
    assert score.label(metric, value, correct, base, True, OPTIONS) is expected


def test_without_a_margin_no_change_is_still_no_help():
    options = config.Score(margin=0.0)
    assert score.label("bertscore", 0.6, None, 0.6, False, options) is None
    assert score.label("bertscore", 0.601, None, 0.6, False, options) is True


def test_an_unknown_metric_is_refused():
    with pytest.raises(SurfError, match="no metric 'bleu'"):
        score.label("bleu", 1.0, True, 0.0, False, OPTIONS)


@pytest.mark.parametrize("dataset", ["answers", "reanswers"])
def test_command_line(tmp_path, dataset):
    store.write_table(tmp_path / "rounds.parquet", rounds(), "rounds")
    table = responses(("c#1", 0, 5, "a dog", None), ("c#1", 1, 6, "cat", None), dataset=dataset)
    store.write_table(tmp_path / "in.parquet", table, dataset)
    score.main(
        f"--rounds {tmp_path}/rounds.parquet --responses {tmp_path}/in.parquet --dataset {dataset}"
        f" --out {tmp_path}/out.parquet --score.iou 0.4 --score.bertscore_model there/is/no/such/model".split()
    )
    rows = store.rows(store.read_table(tmp_path / "out.parquet", f"scores/{dataset}"))
    assert [(row["round_id"], row["rank"], row["correct"]) for row in rows] == [("c#1", 0, True), ("c#1", 1, False)]
    meta = store.footer(tmp_path / "out.parquet")[1]
    assert meta["stage"] == "score"
    assert meta["version"] == str(config.Score.version)
    assert meta["flags"] == cli.flags(score=config.Score(iou=0.4, bertscore_model="there/is/no/such/model"))


def test_the_wrong_dataset_is_refused(tmp_path):
    store.write_table(tmp_path / "rounds.parquet", rounds(), "rounds")
    store.write_table(tmp_path / "in.parquet", responses(dataset="reanswers"), "reanswers")
    with pytest.raises(SurfError, match="expected a part of dataset 'answers'"):
        score.main(
            f"--rounds {tmp_path}/rounds.parquet --responses {tmp_path}/in.parquet --dataset answers --out {tmp_path}/o".split()
        )
