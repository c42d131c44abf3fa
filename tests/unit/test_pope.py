"""The POPE table of methods."""

import random

import pytest
from popedata import question_rows

from surf import pope, popetable, store
from surf.errors import SurfError

# --- table ------------------------------------------------------------------------------------------------------------


def runs_of(methods=("zero-shot", "surf"), splits=("random", "popular")):
    """Runs in which every second method is better."""
    runs = {}
    for number, method in enumerate(methods):
        for split in splits:
            rng = random.Random(f"{method} {split}")
            rows = []
            for row in question_rows(images=30):
                right = rng.random() < (0.6 + 0.3 * number)
                said = "Yes" if (row["label"] == "yes") == right else "There isn't one."
                rows.append(
                    {
                        "question_id": f"{split}#{row['question_id']}",
                        "image": row["image"],
                        "question": row["text"],
                        "split": split,
                        "label": row["label"] == "yes",
                        "answers": [row["label"]],
                        "response": said,
                        "references": [],
                    }
                )
            runs.setdefault(method, {})[split] = rows
    return runs


def write_runs(folder, runs, task="pope", kind="pope"):
    paths = []
    for method, splits in runs.items():
        rows = [row for rows in splits.values() for row in rows]
        paths.append(folder / f"{method}.parquet")
        meta = {"task": task, "kind": kind, "method": method}
        store.write_table(paths[-1], store.table_of(rows, "evaluate/answers"), "evaluate/answers", meta)
    return paths


def test_table_command_line(tmp_path):
    paths = write_runs(tmp_path, runs_of())
    out = ["--out", f"{tmp_path}/m.parquet", "--markdown", f"{tmp_path}/m.md", "--figure", f"{tmp_path}/m.svg"]
    flags = ["--answers", *map(str, paths), *out, "--resamples=200", "--seed", "3"]
    pope.main(["table", *flags])
    rows = store.rows(store.read_table(tmp_path / "m.parquet", "pope/metrics"))
    cells = {(row["method"], row["split"], row["rule"], row["metric"]): row for row in rows}
    assert len(cells) == 3 * 3 * 5 * 6
    for (method, split, rule, _), row in cells.items():
        assert row["questions"] == (360 if split == "mean" else 180)
        assert row["low"] <= row["value"] + 1e-9, (method, split, rule)
        assert row["value"] <= row["high"] + 1e-9, (method, split, rule)
    value = {key: row["value"] for key, row in cells.items()}
    parts = [value["surf", split, "surf", "f1"] for split in ("random", "popular")]
    assert value["surf", "mean", "surf", "f1"] == pytest.approx(sum(parts) / 2)
    assert value["surf", "random", "surf", "unparsed"] > 0.1
    assert value["image-blind", "random", "surf", "accuracy"] > 0.8  # the file's objects give their labels away
    text = (tmp_path / "m.md").read_text()
    assert f"| surf | mean | {100 * value['surf', 'mean', 'surf', 'accuracy']:.1f} (" in text
    assert "| surf | zero-shot | +" in text
    first = (tmp_path / "m.svg").read_bytes()
    assert b"image-blind" in first
    pope.main(["table", *flags])
    assert (tmp_path / "m.svg").read_bytes() == first


def test_a_method_that_lacks_a_split_gets_no_mean():
    runs = runs_of()
    del runs["surf"]["popular"]
    rows = popetable.measure(runs, 50, 0)
    assert {row["split"] for row in rows if row["method"] == "surf"} == {"random"}
    assert {row["split"] for row in rows if row["method"] == "zero-shot"} == {"random", "popular", "mean"}
    assert popetable.differences(runs, 50, 0) == []


def test_the_difference_between_methods_is_paired():
    runs = runs_of()
    (later, earlier, delta), *others = popetable.differences(runs, 300, 0)
    assert (later, earlier, others) == ("surf", "zero-shot", [])
    assert 0 < delta.low < delta.value < delta.high
    rows = {
        (row["method"], row["split"]): row
        for row in popetable.measure(runs, 300, 0)
        if row["metric"] == "accuracy" and row["rule"] == "surf"
    }
    assert delta.value == pytest.approx(rows["surf", "mean"]["value"] - rows["zero-shot", "mean"]["value"])


def test_methods_must_have_answered_the_same_questions():
    runs = runs_of()
    runs["surf"]["random"][5]["label"] = not runs["surf"]["random"][5]["label"]
    with pytest.raises(SurfError, match=r"split random.*'zero-shot' and 'surf' answered different questions"):
        popetable.measure(runs, 10, 0)


@pytest.mark.parametrize(("methods", "splits"), [(["image-blind"], ["random"]), (["surf"], ["mean"])])
def test_reserved_names_are_refused(methods, splits):
    with pytest.raises(SurfError, match="reserved"):
        popetable.measure(runs_of(methods, splits), 10, 0)


def test_answer_files_must_be_of_different_methods_and_to_yes_no_questions(tmp_path):
    runs = runs_of(["surf"])
    path = write_runs(tmp_path, runs)[0]
    with pytest.raises(SurfError, match="'surf' has two files for split 'popular'"):
        pope.read_runs([path, path])
    with pytest.raises(SurfError, match="answers a task of kind vqa"):
        pope.read_runs(write_runs(tmp_path, runs, kind="vqa"))


def test_splits_of_several_tasks_keep_apart(tmp_path):
    ours = write_runs(tmp_path / "coco", runs_of(["surf"]), task="coco")
    theirs = write_runs(tmp_path / "gqa", runs_of(["surf"]), task="gqa")
    found = pope.read_runs([*ours, *theirs])
    assert set(found["surf"]) == {"coco/random", "coco/popular", "gqa/random", "gqa/popular"}
    assert {row["label"] for row in found["surf"]["gqa/random"]} == {True, False}


@pytest.mark.parametrize("words", [[], ["questionz"]])
def test_an_unknown_subcommand_is_refused(words):
    with pytest.raises(SurfError, match="one of table, score"):
        pope.main(words)
