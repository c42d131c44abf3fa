"""Hard pairs, mixes, random negatives and the original's JSON."""

from collections import Counter

import numpy as np
import plain
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surf import config, labels, pair, store
from surf.errors import SurfError
from surf.images import identity

JUDGE = config.Score()


def shard(verdicts, metric="match", base=0.0, scores=None, right=()):
    """Rows of rounds, first scores, scores and neighbours; a round per entry of `verdicts` (round id → correct by rank).

    right: rounds whose first answer is.
    """
    rounds = [{"round_id": r, "image": f"{r}.jpg", "question": "Q?", "answer": "A", "task": "short"} for r in verdicts]
    first = [{"round_id": r, "rank": -1, "metric": metric, "score": base, "correct": r in right} for r in verdicts]
    again, near = [], []
    for r, flags in verdicts.items():
        for rank, flag in enumerate(flags):
            value = scores[rank] if scores else float(bool(flag))
            again.append({"round_id": r, "rank": rank, "metric": metric, "score": value, "correct": flag})
            near.append({"query_id": f"{r}.jpg", "rank": rank, "image_id": 100 + rank, "similarity": 1 - rank / 10})
    return rounds, first, list(reversed(again)), list(reversed(near))


def tables(rows):
    return [store.table_of(some, dataset) for some, dataset in zip(rows, labels.DATASETS, strict=True)]


def label(rows, judge=JUDGE):
    rounds, first, again, near = tables(rows)
    found = labels.label(rounds, first, again, judge)
    return labels.rows_of(found, np.arange(len(found.rounds)), rounds, again, near)


def expected(rows, judge=JUDGE):
    """The plain loop's, from what the tables store (float32)."""
    return list(plain.label(*map(store.rows, tables(rows)), judge))


def test_the_most_similar_of_each_kind_is_taken():
    (row,) = label(shard({"r": [False, False, True, False, True]}))
    assert (row["positive"]["image_id"], row["positive"]["gain"]) == (102, 1.0)
    assert row["positive"]["similarity"] == pytest.approx(0.8)
    assert (row["negative"]["image_id"], row["negative"]["gain"]) == (100, 0.0)


def test_undecided_references_are_neither():
    scores = [0.505, 0.52, 0.495, 0.3]
    (row,) = label(shard({"r": [None] * 4}, metric="bertscore", base=0.5, scores=scores))
    assert row["positive"]["image_id"] == 101 and row["negative"]["image_id"] == 103


def test_rounds_that_were_not_asked_again_are_no_candidates():
    rows = label(shard({"a": [], "b": [True]}))
    assert [(row["round_id"], row["positive"] is None, row["negative"]) for row in rows] == [("b", False, None)]


flags = st.lists(st.booleans(), min_size=1, max_size=6)
names = st.text("abcdef", min_size=1, max_size=3)


@given(
    st.dictionaries(names, st.lists(st.sampled_from([True, False, None]), max_size=6), max_size=12),
    st.sampled_from(["match", "iou", "bertscore", "loglik"]),
    st.lists(st.sampled_from([0.3, 0.49, 0.5, 0.505, 0.51, 0.7]), min_size=6, max_size=6),
    st.permutations(range(4)),
    st.sets(names),
)
def test_equals_the_plain_loop(verdicts, metric, scores, order, right):
    rows = shard(verdicts, metric=metric, base=0.5, scores=scores, right=right)
    rows = [[some[i] for i in sorted(range(len(some)), key=lambda i: order[i % 4])] for some in rows]
    assert label(rows) == expected(rows)


@given(st.dictionaries(names, flags, max_size=12))
def test_stopping_early_changes_no_pair(verdicts):
    def stop(values):
        seen = []
        for value in values:
            seen.append(value)
            if {True, False} <= set(seen):
                break
        return seen

    assert label(shard(verdicts)) == label(shard({r: stop(v) for r, v in verdicts.items()}))


def test_rows_that_fit_to_nothing_are_told():
    rounds, first, again, near = shard({"r": [True, False]})
    with pytest.raises(SurfError, match="'r' was answered again but is not in rounds"):
        label(([], first, again, near))
    with pytest.raises(SurfError, match="'r' was answered again but is not in scores/answers"):
        label((rounds, [], again, near))
    with pytest.raises(SurfError, match=r"'r\.jpg' has no neighbour of rank 1"):
        label((rounds, first, again, [row for row in near if row["rank"] == 0]))


@pytest.mark.parametrize("mix", [{}, {"positive_only": 0.3, "negative_only": 0.2, "no_reference": 0.1}, {"no_reference": 1.0}])
@pytest.mark.parametrize("harmed", [0.0, 0.4])
def test_what_is_kept_of_each_shard_is_enough(tmp_path, mix, harmed):
    """Only `samples` rounds of each kind are kept in memory; the samples are those that are chosen from all rounds."""
    rng = np.random.default_rng(0)
    everything, shards = [], []
    for number in range(3):
        verdicts = {f"r{number}-{i}": [bool(flag) for flag in rng.integers(0, 2, rng.integers(1, 4))] for i in range(60)}
        rows = shard(verdicts, right={name for name in verdicts if name.endswith(("3", "7"))})
        everything += expected(rows)
        paths = [tmp_path / f"{name.replace('/', '-')}-{number}.parquet" for name in labels.DATASETS]
        for path, table, dataset in zip(paths, tables(rows), labels.DATASETS, strict=True):
            store.write_table(path, table, dataset)
        shards.append(paths)
    options = config.Pair(samples=15, harmed=harmed, mix=config.Mix(**mix))
    kept, counts = labels.gather(shards, JUDGE, lambda round_id: pair.order(round_id, 1), options.samples)
    assert len(kept) <= 8 * 15 < len(everything) == sum(counts.values()) == 180
    assert pair.choose(kept, options, seed=1) == pair.choose(everything, options, seed=1)


def test_random_negatives_are_other_readable_photographs():
    corpus = ["coco/train2017/000000000001.jpg", "p.jpg", "bad.jpg", "n.jpg", "m.jpg"]

    def rows():
        reference = {"image_id": 1, "similarity": 0.5, "gain": 1.0}
        image = "COCO_train2014_000000000001.jpg"
        return [{"round_id": f"r{n}", "image": image, "positive": reference, "negative": reference} for n in range(50)]

    chosen, again, other = rows(), rows(), rows()
    pair.random_negatives(chosen, corpus, {"bad.jpg"}, seed=0)
    pair.random_negatives(again[::-1], corpus, {"bad.jpg"}, seed=0)
    pair.random_negatives(other, corpus, {"bad.jpg"}, seed=1)
    assert {row["negative"]["image_id"] for row in chosen} == {3, 4}
    assert chosen == again != other
    assert chosen[0]["negative"]["similarity"] is None and chosen[0]["positive"]["image_id"] == 1
    with pytest.raises(SurfError, match="no random negative"):
        pair.random_negatives(rows(), corpus[:3], {"bad.jpg"}, seed=0)
    none = [{"round_id": "r", "image": "i.jpg", "positive": None, "negative": None}]
    pair.random_negatives(none, corpus, set(), seed=0)
    assert none[0]["negative"] is None
    assert identity(corpus[0]) == identity(rows()[0]["image"])


def labelled(both=0, positive=0, negative=0, right=0):
    """Rounds with such references; `right` more with both kinds that were right without any."""
    reference = {"image_id": 1, "similarity": 0.5, "gain": 1.0}
    kinds = [(reference, reference)] * both + [(reference, None)] * positive + [(None, reference)] * negative
    flags = [False] * len(kinds) + [True] * right
    kinds += [(reference, reference)] * right
    one = {"image": "i.jpg", "question": "Q?", "answer": "A", "task": "short"}
    return [
        {"round_id": f"r{n}", **one, "right": flag, "positive": p, "negative": q}
        for n, ((p, q), flag) in enumerate(zip(kinds, flags, strict=True))
    ]


def test_samples_are_cut_to_size_and_do_not_depend_on_the_order_of_the_rows():
    rows = labelled(both=50)
    options = config.Pair(samples=20, harmed=0.0)
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
    chosen = pair.choose(rows, config.Pair(samples=40, harmed=0.0, mix=config.Mix(**mix)), seed=0)
    assert Counter(row["kind"] for row in chosen) == expected
    assert len({row["round_id"] for row in chosen}) == len(chosen), "no round is used twice"
    for row in chosen:
        shown = [positive for positive, _ in pair.ordered_references(row)]
        assert (
            sorted(shown)
            == {"pair": [False, True], "positive_only": [True], "negative_only": [False], "no_reference": []}[row["kind"]]
        )


@pytest.mark.parametrize("samples", [3, 5, 2003])
def test_shares_are_rounded_together(samples):
    rows = labelled(both=3 * samples, positive=0, negative=0)
    mix = config.Mix(positive_only=0.5, negative_only=0.5)
    chosen = pair.choose(rows, config.Pair(samples=samples, harmed=0.0, mix=mix), seed=0)
    counts = Counter(row["kind"] for row in chosen)
    assert len(chosen) == samples and abs(counts["positive_only"] - counts["negative_only"]) == 1 and "pair" not in counts


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


@pytest.mark.parametrize("mix", [{}, {"no_reference": 0.25}, {"positive_only": 1.0}])
def test_the_harmed_share_of_every_kind_is_of_rounds_that_were_right(mix):
    rows = labelled(both=100, right=100)
    was_right = {row["round_id"] for row in rows if row["right"]}
    chosen = pair.choose(rows, config.Pair(samples=80, harmed=0.25, mix=mix), seed=0)
    kinds = Counter((row["kind"], row["round_id"] in was_right) for row in chosen)
    shares = {"pair": 1 - sum(mix.values()), **mix}
    for kind, share in shares.items():
        assert (kinds[kind, False], kinds[kind, True]) == (60 * share, 20 * share)


def test_too_few_harmed_samples_are_told_and_not_filled_up(caplog):
    chosen = pair.choose(labelled(both=100, right=5), config.Pair(samples=40, harmed=0.5), seed=0)
    assert len(chosen) == 25 and "pair.harmed: 5 of 20 samples" in caplog.text
    assert len(pair.choose(labelled(both=10, right=50), config.Pair(harmed=0.0), seed=0)) == 10


def test_the_harmed_share_is_kept_where_there_are_few_wrong_rounds():
    chosen = pair.choose(labelled(both=12, right=90), config.Pair(samples=100, harmed=0.25), seed=0)
    assert len(chosen) == 12 + 4
    assert len(pair.choose(labelled(right=90), config.Pair(samples=20, harmed=1.0), seed=0)) == 20


def test_mixes_can_be_made_of_the_same_questions():
    verdicts = {f"b{n}": [True, False] for n in range(6)} | {f"p{n}": [True] for n in range(6)}
    labelled = label(shard(verdicts))
    pairs = {row["round_id"] for row in pair.choose(labelled, config.Pair(), 0)}
    for kind in ("positive_only", "no_reference"):
        options = config.Pair(rounds="both", mix={kind: 1.0})
        chosen = pair.choose(labelled, options, 0)
        assert {row["round_id"] for row in chosen} == pairs and {row["kind"] for row in chosen} == {kind}
