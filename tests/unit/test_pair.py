"""Hard pairs, mixes and the original's JSON."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surf import config, pair

JUDGE = config.Score()


def shard(verdicts, metric="match", base=0.0, scores=None):
    """One round per entry of `verdicts` (round id → correct flags by rank)."""
    rounds = [{"round_id": r, "image": f"{r}.jpg", "question": "Q?", "answer": "A", "task": "short"} for r in verdicts]
    first = [{"round_id": r, "rank": -1, "metric": metric, "score": base, "correct": False} for r in verdicts]
    again, near = [], []
    for r, flags in verdicts.items():
        for rank, flag in enumerate(flags):
            value = scores[rank] if scores else float(bool(flag))
            again.append({"round_id": r, "rank": rank, "metric": metric, "score": value, "correct": flag})
            near.append({"query_id": f"{r}.jpg", "rank": rank, "image_id": 100 + rank, "similarity": 1 - rank / 10})
    return rounds, first, list(reversed(again)), list(reversed(near))


def test_the_most_similar_of_each_kind_is_taken():
    (row,) = pair.label(*shard({"r": [False, False, True, False, True]}), JUDGE)
    assert row["positive"] == {"image_id": 102, "similarity": 0.8, "gain": 1.0}
    assert row["negative"] == {"image_id": 100, "similarity": 1.0, "gain": 0.0}


def test_undecided_references_are_neither():
    scores = [0.505, 0.52, 0.495, 0.3]
    (row,) = pair.label(*shard({"r": [None] * 4}, metric="bertscore", base=0.5, scores=scores), JUDGE)
    assert row["positive"]["image_id"] == 101 and row["negative"]["image_id"] == 103


def test_rounds_that_were_not_asked_again_are_no_candidates():
    rows = list(pair.label(*shard({"a": [], "b": [True]}), JUDGE))
    assert [(row["round_id"], row["positive"] is None, row["negative"]) for row in rows] == [("b", False, None)]


flags = st.lists(st.booleans(), min_size=1, max_size=6)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), flags, max_size=12))
def test_stopping_early_changes_no_pair(verdicts):
    def stop(values):
        seen = []
        for value in values:
            seen.append(value)
            if {True, False} <= set(seen):
                break
        return seen

    whole = list(pair.label(*shard(verdicts), JUDGE))
    early = list(pair.label(*shard({r: stop(v) for r, v in verdicts.items()}), JUDGE))
    assert whole == early


def labelled(both=0, positive=0, negative=0):
    reference = {"image_id": 1, "similarity": 0.5, "gain": 1.0}
    kinds = [(reference, reference)] * both + [(reference, None)] * positive + [(None, reference)] * negative
    return [
        {"round_id": f"r{n}", "image": "i.jpg", "question": "Q?", "answer": "A", "task": "short", "positive": p, "negative": q}
        for n, (p, q) in enumerate(kinds)
    ]


def test_samples_are_cut_to_size_and_do_not_depend_on_the_order_of_the_rows():
    rows = labelled(both=50)
    options = config.Pair(samples=20)
    chosen = pair.choose(rows, options, seed=1)
    assert len(chosen) == 20
    assert chosen == pair.choose(rows[::-1], options, seed=1)
    assert chosen != pair.choose(rows, options, seed=2)


def test_order_is_shuffled_by_seed_or_fixed_as_the_original():
    rows = labelled(both=200)
    first = Counter(row["positive_first"] for row in pair.choose(rows, config.Pair(), seed=0))
    assert 60 < first[True] < 140
    assert all(row["positive_first"] for row in pair.choose(rows, config.Pair(order="positive_first"), seed=0))


def test_without_a_mix_only_rounds_with_both_kinds_are_kept():
    chosen = pair.choose(labelled(both=3, positive=5, negative=7), config.Pair(), seed=0)
    assert Counter(row["kind"] for row in chosen) == {"pair": 3}
    assert pair.choose(labelled(positive=5), config.Pair(), seed=0) == []


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ({"positive_only": 0.25, "negative_only": 0.25}, {"pair": 20, "positive_only": 10, "negative_only": 10}),
        ({"no_reference": 0.5}, {"pair": 20, "no_reference": 20}),
        ({"positive_only": 0.5, "no_reference": 0.5}, {"positive_only": 20, "no_reference": 20}),
    ],
)
def test_mix_has_the_configured_shares(mix, expected):
    rows = labelled(both=60, positive=15, negative=15)
    chosen = pair.choose(rows, config.Pair(samples=40, mix=config.Mix(**mix)), seed=0)
    assert Counter(row["kind"] for row in chosen) == expected
    assert len({row["round_id"] for row in chosen}) == len(chosen), "no round is used twice"
    for row in chosen:
        shown = [positive for positive, _ in pair.ordered_references(row)]
        assert (
            sorted(shown)
            == {"pair": [False, True], "positive_only": [True], "negative_only": [False], "no_reference": []}[row["kind"]]
        )


def sample(positive_first, kind="pair"):
    def reference(name):
        return {"image_id": 1, "image": f"{name}.jpg", "caption": f"Caption {name}", "similarity": 0.5, "gain": 1.0}

    row = {"round_id": "c#0", "image": "q.jpg", "question": "What?", "answer": "Dog", "task": "short", "kind": kind}
    row |= {"positive_first": positive_first, "positive": reference("p"), "negative": reference("n")}
    if kind == "no_reference":
        row |= {"positive": None, "negative": None}
    return row


def test_json_is_the_original_readmes_format():
    assert pair.original_json(sample(True)) == {
        "id": "c#0",
        "image": "q.jpg",
        "conversations": [
            {"from": "human", "value": "<Retrieval>1. <image> Caption p \n2. <image> Caption n \n</Retrieval> <image>\nWhat?"},
            {"from": "gpt", "value": "Dog"},
        ],
        "images": ["p.jpg", "n.jpg"],
        "labels": [1, 0],
    }
    assert pair.original_json(sample(False))["labels"] == [0, 1]
    assert pair.original_json(sample(False))["images"] == ["n.jpg", "p.jpg"]
    none = pair.original_json(sample(True, "no_reference"))
    assert none["images"] == none["labels"] == [] and none["conversations"][0]["value"] == "<image>\nWhat?"


def test_mixes_can_be_made_of_the_same_questions():
    verdicts = {f"b{n}": [True, False] for n in range(6)} | {f"p{n}": [True] for n in range(6)}
    labelled = list(pair.label(*shard(verdicts), JUDGE))
    pairs = {row["round_id"] for row in pair.choose(labelled, config.Pair(), 0)}
    for kind in ("positive_only", "no_reference"):
        options = config.Pair(rounds="both", mix={kind: 1.0})
        chosen = pair.choose(labelled, options, 0)
        assert {row["round_id"] for row in chosen} == pairs and {row["kind"] for row in chosen} == {kind}
