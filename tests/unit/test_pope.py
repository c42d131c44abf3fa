"""Answering POPE questions, and the table of methods."""

import json
import random

import pytest
from PIL import Image
from popedata import question_rows, write_lines

from surf import config, metrics, pope, popetable, prompts, store
from surf.errors import SurfError
from surf.images import Images


@pytest.fixture
def question_file(tmp_path):
    return write_lines(tmp_path / "questions.json", question_rows())


# --- answer -----------------------------------------------------------------------------------------------------------


class FakeResponder:
    """Says yes to questions that name a dog; may die after some calls."""

    def __init__(self, calls=None):
        self.calls, self.prompts, self.settings = calls, [], set()

    def respond(self, requests, *, max_new_tokens, temperature=0.0):
        if self.calls is not None:
            if self.calls == 0:
                raise KeyboardInterrupt
            self.calls -= 1
        self.prompts += [request.prompt for request in requests]
        self.settings.add((max_new_tokens, temperature))
        return ["Yes." if "dog" in request.prompt.text else "I cannot see" for request in requests]

    def loglik(self, requests, golds):
        raise AssertionError("POPE needs no likelihoods")


OPTIONS = config.Pope(questions={"random": "x"}, suffix="\nBriefly.", max_new_tokens=7)


def asked(question_file):
    return store.rows(pope.questions(question_file, "random"))


def partial_for(tmp_path):
    return store.Partial(tmp_path / "pope" / "random.parquet", "pope/answers", flags="x")


def test_answers_are_parsed_and_keep_their_references(tmp_path, question_file):
    rows = asked(question_file)
    near = {rows[0]["image"]: [(7, prompts.Reference("r7.png", "a dog")), (3, prompts.Reference("r3.png", "a car"))]}
    responder = FakeResponder()
    table = pope.answer(rows, near, responder, partial_for(tmp_path), lvlm=config.Lvlm(), options=OPTIONS)
    found = store.rows(table)
    assert [row["question_id"] for row in found] == [row["question_id"] for row in rows]
    assert [row["references"] for row in found] == [[7, 3]] * 6 + [[]] * 42
    # the first image's references speak of a dog, and so do all its prompts
    assert [row["prediction"] for row in found[:8]] == [True] * 6 + [True, None]
    assert responder.settings == {(7, 0.0)}
    assert responder.prompts[0].images == ("r7.png", "r3.png", rows[0]["image"])
    assert responder.prompts[6] == prompts.build(rows[6]["question"] + "\nBriefly.", rows[6]["image"])


def test_a_killed_job_goes_on_where_it_stopped(tmp_path, question_file, monkeypatch):
    monkeypatch.setattr(pope, "FLUSH_ROWS", 10)
    rows = asked(question_file)
    whole = pope.answer(rows, {}, FakeResponder(), partial_for(tmp_path / "other"), lvlm=config.Lvlm(), options=OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        pope.answer(rows, {}, FakeResponder(calls=2), partial_for(tmp_path), lvlm=config.Lvlm(), options=OPTIONS)
    second = FakeResponder()
    again = pope.answer(rows, {}, second, partial_for(tmp_path), lvlm=config.Lvlm(), options=OPTIONS)
    assert len(second.prompts) == 28
    assert store.rows(again) == store.rows(whole)


def test_rows_come_in_the_order_of_the_questions_whatever_was_finished_first(tmp_path, question_file):
    rows = asked(question_file)
    partial = partial_for(tmp_path)
    early = [{**row, "response": "No", "prediction": False, "references": []} for row in rows[30:20:-1]]
    partial.save(store.table_of(early, "pope/answers"))
    responder = FakeResponder()
    found = store.rows(pope.answer(rows, {}, responder, partial, lvlm=config.Lvlm(), options=OPTIONS))
    assert [row["question_id"] for row in found] == [row["question_id"] for row in rows]
    assert [row["response"] for row in found[21:31]] == ["No"] * 10
    assert len(responder.prompts) == 38


@pytest.fixture
def answer_job(tmp_path, question_file, monkeypatch):
    """Images, neighbours, catalog and questions of a small job, and a function that runs it with a fake model."""
    rows = asked(question_file)
    images = sorted({row["image"] for row in rows})
    (tmp_path / "images").mkdir()
    for name in [*images, "r0.png", "r1.png", "r2.png"]:
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    store.write_table(tmp_path / "q.parquet", pope.questions(question_file, "random"), "pope/questions")
    corpus = [{"image_id": number, "image": f"r{number}.png", "caption": f"thing {number}"} for number in range(3)]
    store.write_table(tmp_path / "catalog/part.parquet", store.table_of(corpus, "catalog"), "catalog")
    part = {"file": "part.parquet", "digest": store.footer(tmp_path / "catalog/part.parquet")[1]["digest"]}
    store.write_json(tmp_path / "catalog/_manifest.json", {"dataset": "catalog", "parts": [part]})
    near = [
        {"query_id": name, "rank": rank, "image_id": 2 - rank, "similarity": 0.9 - 0.1 * rank}
        for name in images
        for rank in range(3)
    ]
    store.write_table(tmp_path / "near.parquet", store.table_of(near[::-1], "neighbors"), "neighbors")
    responder = FakeResponder()

    def run(*extra):
        from surf.models import lvlm

        monkeypatch.setattr(lvlm, "load", lambda options, images, model=None: responder)
        flags = f"--method rag --questions {tmp_path}/q.parquet --out {tmp_path}/rag/random.parquet --pope.max_new_tokens 5"
        pope.main(["answer", *flags.split(), f"--images.roots={json.dumps([str(tmp_path / 'images')])}", *extra])
        return store.rows(store.read_table(tmp_path / "rag/random.parquet", "pope/answers"))

    run.folder, run.responder = tmp_path, responder
    return run


def test_answer_command_line(answer_job):
    folder = answer_job.folder
    near = ["--neighbors", f"{folder}/near.parquet", "--catalog", f"{folder}/catalog/_manifest.json"]
    rows = answer_job("--references", "2", *near, "--pope.suffix=\nOne word.")
    assert [row["references"] for row in rows] == [[2, 1]] * 48
    assert answer_job.responder.prompts[0].images[:2] == ("r2.png", "r1.png")
    assert "thing 2" in answer_job.responder.prompts[0].text
    assert answer_job.responder.prompts[0].text.endswith("\nOne word.")
    assert answer_job.responder.settings == {(5, 0.0)}
    meta = store.footer(folder / "rag/random.parquet")[1]
    assert (meta["stage"], meta["method"]) == ("pope answer", "rag")
    assert store.sweep(folder) == 0 and not (folder / "rag/_partial").exists(), (
        "the end of a run removes what was saved on the way"
    )


def test_without_references_none_are_used(answer_job):
    assert {tuple(row["references"]) for row in answer_job()} == {()}


def test_an_evaluation_image_that_cannot_be_opened_stops_the_job(answer_job):
    name = question_rows()[20]["image"]
    (answer_job.folder / "images" / name).write_bytes(b"no image")
    with pytest.raises(SurfError, match=f"1 images of the evaluation cannot be opened, the first is '{name}'"):
        answer_job()
    assert answer_job.responder.prompts == []


def test_references_that_cannot_be_opened_stop_the_job(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    near = {"a.png": [(0, prompts.Reference("gone.png", "x"))]}
    with pytest.raises(SurfError, match=r"'gone\.png'"):
        pope.check_images(Images([str(tmp_path / "images")]), [{"image": "a.png"}], near)


def test_references_need_neighbours(answer_job):
    with pytest.raises(SurfError, match="--references 2 needs --neighbors"):
        answer_job("--references", "2")


def test_a_bad_setting_is_refused(answer_job):
    with pytest.raises(SurfError, match="max_new_tokens"):
        answer_job("--pope.max_new_tokens", "none")


def test_a_real_model_answers_in_the_end(tmp_path, question_file, tiny_lvlm):
    rows = asked(question_file)[:6]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / rows[0]["image"])
    store.write_table(tmp_path / "q.parquet", store.table_of(rows, "pope/questions"), "pope/questions")
    roots = json.dumps([str(tmp_path / "images")])
    paths = f"--questions {tmp_path}/q.parquet --out {tmp_path}/out.parquet --model {tiny_lvlm}"
    flags = f"--method tuned {paths} --lvlm.dtype=float32 --pope.max_new_tokens=3"
    pope.main(["answer", *flags.split(), f"--images.roots={roots}"])
    found = store.rows(store.read_table(tmp_path / "out.parquet", "pope/answers"))
    assert [row["question_id"] for row in found] == [row["question_id"] for row in rows]
    assert all(row["prediction"] is metrics.verdict(row["response"]) for row in found)


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
                        "label": row["label"] == "yes",
                        "response": said,
                        "prediction": metrics.verdict(said),
                        "references": [],
                    }
                )
            runs.setdefault(method, {})[split] = rows
    return runs


def write_runs(folder, runs):
    paths = []
    for method, splits in runs.items():
        for split, rows in splits.items():
            paths.append(folder / method / f"{split}.parquet")
            store.write_table(paths[-1], store.table_of(rows, "pope/answers"), "pope/answers", {"method": method})
    return paths


def test_table_command_line(tmp_path):
    paths = write_runs(tmp_path, runs_of())
    out = ["--out", f"{tmp_path}/m.parquet", "--markdown", f"{tmp_path}/m.md", "--figure", f"{tmp_path}/m.svg"]
    flags = ["--answers", *map(str, paths), *out, "--pope.resamples=200", "--seed", "3"]
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


def test_answer_files_must_be_of_one_method_and_split(tmp_path):
    runs = runs_of(["surf"])
    paths = write_runs(tmp_path, runs)
    with pytest.raises(SurfError, match="'surf' has two files for split 'random'"):
        pope.read_runs([paths[0], paths[0]])
    both = {"surf": {"both": runs["surf"]["random"] + runs["surf"]["popular"]}}
    with pytest.raises(SurfError, match=r"holds the splits \['popular', 'random'\]"):
        pope.read_runs(write_runs(tmp_path / "mixed", both))


@pytest.mark.parametrize("words", [[], ["questionz"]])
def test_an_unknown_subcommand_is_refused(words):
    with pytest.raises(SurfError, match="one of questions, answer, table, score"):
        pope.main(words)
