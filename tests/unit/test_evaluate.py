"""Answering the questions of a task: what stands in the prompt, gates, filters, kills, and the command lines."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from popedata import question_rows, write_lines

from surf import candidates, config, evaluate, once, prompts, references, store, telemetry
from surf.errors import SurfError
from surf.images import Images
from surf.methods import Method


@pytest.fixture
def question_file(tmp_path):
    return write_lines(tmp_path / "questions.json", question_rows())


def asked(question_file, *splits):
    return store.rows(evaluate.read("pope", {split: str(question_file) for split in splits or ("random",)}))


class FakeResponder:
    """Says yes to prompts that name a dog, without references no; is sure of short questions; may die after some calls."""

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
        """Sure of dogs (p = 0.9), unsure of anything else (p = 0.5)."""
        return [math.log(0.9 if "dog" in request.prompt.text else 0.5) for request in requests]


def partial_for(tmp_path):
    return store.Partial(tmp_path / "answers" / "surf.parquet", "evaluate/answers", flags="x")


def answer(rows, shown, responder, partial, method=None, **options):
    method = method or Method(model="base", references=2)
    return store.rows(evaluate.answer(rows, shown, responder, partial, method=method, lvlm=config.Lvlm(), **options))


REFERENCES = [(7, prompts.Reference("r7.png", "a dog")), (3, prompts.Reference("r3.png", "a car"))]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_keep_their_questions_and_references(tmp_path, question_file):
    rows = asked(question_file)
    shown = {row["question_id"]: REFERENCES for row in rows[:6]}
    responder = FakeResponder()
    found = answer(rows, shown, responder, partial_for(tmp_path), suffix="\nBriefly.", max_new_tokens=7)
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    assert [row["references"] for row in found] == [[7, 3]] * 6 + [[]] * 42
    assert [row["response"] for row in found[:8]] == ["Yes."] * 7 + ["I cannot see"]  # the first image's references name a dog
    assert {row["confidence"] for row in found} == {None}
    assert responder.settings == {(7, 0.0)}
    assert prompts.build(rows[6]["question"] + "\nBriefly.", rows[6]["image"]) in responder.prompts
    assert responder.prompts[0].images == ("r7.png", "r3.png", rows[0]["image"])


def test_a_prompt_of_several_splits_and_methods_is_asked_once(tmp_path, question_file):
    rows = asked(question_file, "random", "popular")
    responder = FakeResponder()
    shared = once.Once(responder)
    found = answer(rows, {}, shared, partial_for(tmp_path))
    assert len(responder.prompts) == 48 and len(found) == 96
    shown = {rows[0]["question_id"]: REFERENCES}
    again = answer(rows, shown, shared, partial_for(tmp_path / "other"))
    assert len(responder.prompts) == 49 and again[1:] == found[1:]
    gated = answer(rows, shown, shared, partial_for(tmp_path / "gate"), Method(model="base", references=2, gate=0.95))
    assert len(responder.prompts) == 49 and gated[0]["response"] == again[0]["response"]
    assert [row["response"] for row in found[:48]] == [row["response"] for row in found[48:]]
    assert {row["split"] for row in found[48:]} == {"popular"}


def test_a_killed_job_goes_on_where_it_stopped(tmp_path, question_file, monkeypatch):
    monkeypatch.setattr(evaluate, "FLUSH_ROWS", 10)
    rows = asked(question_file)
    whole = answer(rows, {}, FakeResponder(), partial_for(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        answer(rows, {}, FakeResponder(calls=2), partial_for(tmp_path))
    second = FakeResponder()
    assert answer(rows, {}, second, partial_for(tmp_path)) == whole
    assert len(second.prompts) == 28


def test_rows_come_in_the_order_of_the_questions_whatever_was_finished_first(tmp_path, question_file):
    rows = asked(question_file)
    partial = partial_for(tmp_path)
    early = [{**row, "response": "No", "references": []} for row in rows[30:20:-1]]
    partial.save(store.table_of(early, "evaluate/answers"))
    responder = FakeResponder()
    found = answer(rows, {}, responder, partial)
    assert [row["question_id"] for row in found] == [row["question_id"] for row in rows]
    assert [row["response"] for row in found[21:31]] == ["No"] * 10
    assert len(responder.prompts) == 38


def test_the_gate_shows_references_only_where_the_model_is_unsure_without(tmp_path, question_file):
    rows = asked(question_file)[:6]
    shown = {row["question_id"]: REFERENCES for row in rows}
    responder = FakeResponder()
    found = answer(rows, shown, responder, partial_for(tmp_path), Method(model="base", references=2, gate=0.8))
    sure = ["dog" in row["question"] for row in rows]
    assert [row["confidence"] for row in found] == pytest.approx([0.9 if one else 0.5 for one in sure])
    assert [row["references"] for row in found] == [[] if one else [7, 3] for one in sure]
    assert [row["response"] for row in found] == ["Yes."] * 6, "where references were shown they name a dog"
    assert len(responder.prompts) == 6 + 5
    with_all = answer(rows, shown, FakeResponder(), partial_for(tmp_path / "1"), Method(model="base", references=2, gate=1.0))
    assert all(row["references"] == [7, 3] for row in with_all)


@pytest.mark.parametrize(
    ("show", "images", "text"),
    [
        ("caption", 1, "<Retrieval>1. a dog \n2. a car \n</Retrieval> <image>\n"),
        ("image", 3, "<Retrieval>1. <image> \n2. <image> \n</Retrieval> <image>\n"),
    ],
)
def test_captions_alone_and_images_alone(tmp_path, question_file, show, images, text):
    rows = asked(question_file)[:1]
    responder = FakeResponder()
    method = Method(model="base", references=2, show=show)
    answer(rows, {rows[0]["question_id"]: REFERENCES}, responder, partial_for(tmp_path), method)
    assert len(responder.prompts[0].images) == images
    assert responder.prompts[0].text == text + rows[0]["question"]


def test_a_line_is_said_only_where_references_are_shown(tmp_path, question_file):
    rows = asked(question_file)[:2]
    responder = FakeResponder()
    method = Method(model="base", references=2, say="Leave out what does not fit.")
    answer(rows, {rows[0]["question_id"]: REFERENCES}, responder, partial_for(tmp_path), method, suffix="\nYes or no?")
    ends = {"</Retrieval>" in prompt.text: prompt.text.partition("Yes or no?")[2] for prompt in responder.prompts}
    assert ends == {True: "\nLeave out what does not fit.", False: ""}
    with pytest.raises(ValueError, match="say without references"):
        Method(model="base", say="Leave out what does not fit.")


# --- references -------------------------------------------------------------------------------------------------------

NEAR = [(10, 0.9), (11, 0.8), (12, 0.7), (13, 0.6)]
SCORES = {
    "caption": {10: 0.1, 11: 0.4, 12: 0.3, 13: 0.2},
    "relevance": {10: -1.0, 11: 0.5, 12: -0.1, 13: 2.0},
    "gold": {10: -2.0, 11: -3.0, 12: -1.0, 13: -4.0},
}


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({}, [10, 11]),
        ({"references": 9}, [10, 11, 12, 13]),
        ({"rerank": "caption"}, [11, 12]),
        ({"rerank": "relevance"}, [13, 11]),
        ({"keep": 0.8}, [10, 11]),
        ({"keep": 0.85}, [10]),
        ({"keep": 0.95}, []),
        ({"keep": "judged"}, [11, 13]),
        ({"keep": 0.65, "rerank": "relevance"}, [11, 12]),
        ({"source": "oracle"}, [12, 10]),
        ({"source": "adversarial"}, [13, 11]),
        ({"order": "reversed"}, [11, 10]),
        ({"rerank": "caption", "order": "reversed"}, [12, 11]),
    ],
)
def test_a_method_chooses_its_references(keys, ids):
    assert references.choose(Method(**{"model": "base", "references": 2, **keys}), NEAR, SCORES, "q") == ids


def test_equal_scores_keep_the_order_of_similarity():
    same = {"caption": dict.fromkeys((10, 11, 12, 13), 0.5)}
    assert references.choose(Method(model="base", references=3, rerank="caption"), NEAR, same, "q") == [10, 11, 12]


@given(st.integers(0, 9), st.text(max_size=5))
def test_shuffling_moves_references_and_changes_none(seed, key):
    method = Method(model="base", references=3, order="shuffled")
    found = references.choose(method, NEAR, {}, key, seed)
    assert sorted(found) == [10, 11, 12]
    assert found == references.choose(method, NEAR, {}, key, seed)


def test_shuffling_makes_every_order():
    method = Method(model="base", references=3, order="shuffled")
    assert len({tuple(references.choose(method, NEAR, {}, str(key))) for key in range(60)}) == 6


@given(st.text(max_size=5), st.integers(1, 8), st.integers(1, 12))
def test_random_references_are_different_and_of_the_corpus(name, count, corpus):
    ids = references.draw(name, count, corpus)
    assert len(set(ids)) == len(ids) == min(count, corpus)
    assert all(0 <= image_id < corpus for image_id in ids)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, question_file, monkeypatch):
    """Images, neighbours, catalog and questions of a small job, and a function that runs it with a fake model."""
    rows = asked(question_file)
    images = sorted({row["image"] for row in rows})
    (tmp_path / "images").mkdir()
    for name in [*images, "r0.png", "r1.png", "r2.png"]:
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    files = json.dumps({"random": str(question_file)})
    evaluate.main(["questions", "--task", "pope", "--kind", "pope", "--files", files, "--out", f"{tmp_path}/q.parquet"])
    corpus = [{"image_id": number, "image": f"r{number}.png", "caption": f"thing {number}"} for number in range(3)]
    corpus += [{"image_id": 3, "image": images[0], "caption": "itself"}, {"image_id": 4, "image": "gone.png", "caption": "x"}]
    store.write_table(tmp_path / "catalog/part.parquet", store.table_of(corpus, "catalog"), "catalog")
    part = {"file": "part.parquet", "digest": store.footer(tmp_path / "catalog/part.parquet")[1]["digest"]}
    store.write_json(tmp_path / "catalog/_manifest.json", {"dataset": "catalog", "rows": 5, "parts": [part]})
    near = [
        {"query_id": name, "rank": rank, "image_id": 2 - rank, "similarity": 0.9 - 0.1 * rank}
        for name in images
        for rank in range(3)
    ]
    store.write_table(tmp_path / "near.parquet", store.table_of(near[::-1], "neighbors"), "neighbors")
    responder = FakeResponder()

    def run(how, *extra, near=True, **more):
        from surf.models import lvlm

        monkeypatch.setattr(lvlm, "load", lambda options, images, model=None: responder)
        flags = f"--questions {tmp_path}/q.parquet --out {tmp_path}/base/_manifest.json --max-new-tokens 5"
        if near:
            flags += f" --neighbors {tmp_path}/near.parquet --catalog {tmp_path}/catalog/_manifest.json"
        roots = f"--images.roots={json.dumps([str(tmp_path / 'images')])}"
        methods = {name: {"model": "base", **keys} for name, keys in {"rag": how, **more}.items()}
        evaluate.main(["answer", *flags.split(), "--methods", json.dumps(methods), roots, *extra])
        return store.rows(store.read_table(tmp_path / "base/rag.parquet", "evaluate/answers"))

    run.folder, run.responder, run.images = tmp_path, responder, images
    return run


def test_answer_command_line(job):
    rows = job({"references": 2}, "--suffix=\nOne word.")
    assert [row["references"] for row in rows] == [[2, 1]] * 48
    first = job.responder.prompts[0]
    assert first.images[:2] == ("r2.png", "r1.png") and "thing 2" in first.text and first.text.endswith("\nOne word.")
    assert job.responder.settings == {(5, 0.0)}
    meta = store.footer(job.folder / "base/rag.parquet")[1]
    assert (meta["stage"], meta["method"], meta["task"], meta["kind"]) == ("evaluate answer", "rag", "pope", "pope")
    assert Method.model_validate_json(meta["how"]) == Method(model="base", references=2)
    assert not (job.folder / "base/_partial").exists()


def test_a_new_method_leaves_the_answers_of_others_alone(job):
    job({"references": 2})
    first, asked_before = (job.folder / "base/rag.parquet").stat().st_mtime_ns, len(job.responder.prompts)
    job({"references": 2}, zero={})
    assert (job.folder / "base/rag.parquet").stat().st_mtime_ns == first
    assert len(job.responder.prompts) == asked_before + 48
    parts = store.parts_of(job.folder / "base/_manifest.json", "evaluate/answers")
    assert [path.name for path in parts] == ["rag.parquet", "zero.parquet"]
    job({"references": 2}, zero={}, near=True)
    assert len(job.responder.prompts) == asked_before + 48, "nothing to do, and no model is loaded"
    job({"references": 1}, zero={})
    assert len(job.responder.prompts) == asked_before + 96, "the changed one"
    job({"references": 1}, "--suffix= Briefly.", zero={})
    assert len(job.responder.prompts) == asked_before + 192, "both"


def test_two_workers_write_the_answers_of_one_process_and_ask_nothing_twice(job, crew, monkeypatch):
    """With a gate, equal prompts of several methods, and one that is answered already."""
    how, others = {"references": 2}, {"zero": {}, "gated": {"references": 1, "gate": 0.8}}
    names = ("rag", *others)

    def files():
        return [(job.folder / f"base/{name}.parquet").read_bytes() for name in names]

    job(how)
    job(how, **others)
    alone, asked = files(), sorted(prompt.text + str(prompt.images) for prompt in job.responder.prompts)
    for name in ("zero", "gated"):
        (job.folder / f"base/{name}.parquet").unlink()
    before, again = (job.folder / "base/rag.parquet").stat().st_mtime_ns, len(job.responder.prompts)
    lead = crew(lambda: job(how, **others))
    job(how, **others)
    assert 0 < lead[0] < lead[1] == 2 * 48, "both have work"
    assert files() == alone
    assert (job.folder / "base/rag.parquet").stat().st_mtime_ns == before
    fresh = sorted(prompt.text + str(prompt.images) for prompt in job.responder.prompts[again:])
    assert fresh == sorted(prompt for prompt in asked if "thing 2" not in prompt or "thing 1" not in prompt)
    assert not (job.folder / "base/_partial").exists()
    assert len(telemetry.figures(job.folder / "base")) == 3


def test_another_model_is_asked_again_and_the_same_one_is_not(job):
    card = job.folder / "model/model.json"
    store.write_json(card, {"loss": 1.0})
    job({}, "--model", str(card.parent))
    first = (job.folder / "base/rag.parquet").read_bytes()
    store.write_json(card, {"loss": 1.0})  # put back after a kill, or trained again to the same weights
    job({}, "--model", str(card.parent))
    assert len(job.responder.prompts) == 48
    store.write_json(card, {"loss": 1.1})
    job({}, "--model", str(card.parent))
    assert len(job.responder.prompts) == 96
    store.write_json(card, {"loss": 1.0})
    job({}, "--model", str(card.parent))
    assert (job.folder / "base/rag.parquet").read_bytes() == first, "equal models, equal bytes"


def test_without_references_none_are_used(job):
    assert {tuple(row["references"]) for row in job({}, near=False)} == {()}


def test_a_filter_may_keep_none(job):
    assert {tuple(row["references"]) for row in job({"references": 2, "keep": 0.95})} == {()}
    assert len(job.responder.prompts[0].images) == 1


def test_random_references_are_never_the_query_nor_unreadable(job):
    rows = job({"references": 3, "source": "random"})
    by_image = {row["image"]: row["references"] for row in rows}
    assert all(4 not in ids for ids in by_image.values()) and 3 not in by_image[job.images[0]]
    assert any(3 in ids for ids in by_image.values()) and len({tuple(ids) for ids in by_image.values()}) > 3


@pytest.mark.parametrize("by", ["gold", "relevance"])
def test_candidates_are_scored_by_the_model_itself(job, by, monkeypatch):
    """A model that finds the answer more likely with `thing 0`, and says yes to it."""

    class Partial(FakeResponder):
        def loglik(self, requests, golds):
            seen.update(golds)
            sign = [-1 if gold == "No" and by == "relevance" else 1 for gold in golds]
            return [s * (0.0 if "thing 0" in one.prompt.text else -1.0) for one, s in zip(requests, sign, strict=True)]

    from surf.models import lvlm

    seen = set()
    monkeypatch.setattr(lvlm, "load", lambda options, images, model=None: Partial())
    out = job.folder / by / f"{by}.parquet"
    words = f"--by {by} --questions {job.folder}/q.parquet --neighbors {job.folder}/near.parquet --out {out}"
    words += f" --catalog {job.folder}/catalog/_manifest.json"
    candidates.main([*words.split(), f"--images.roots={json.dumps([str(job.folder / 'images')])}"])
    rows = store.rows(store.read_table(out, "evaluate/candidates"))
    assert len(rows) == 48 * 3 and seen == {"Yes", "No"}
    assert {row["score"] for row in rows if row["image_id"] == 0} == {0.0}
    assert {row["score"] for row in rows if row["image_id"] != 0} == {-1.0 if by == "gold" else -2.0}
    how = {"gold": {"source": "oracle"}, "relevance": {"rerank": "relevance"}}[by]
    found = job({"references": 1, **how}, "--candidates", str(out))
    assert {tuple(row["references"]) for row in found} == {(0,)}


def test_candidates_are_scored_by_their_captions(job, monkeypatch):
    import numpy as np

    class Encoder:
        def encode(self, names):
            return np.tile(np.float32([1, 0]), (len(names), 1)), {}

        def encode_texts(self, texts):
            return np.float32([[int(text[-1]) / 10, 0] for text in texts])

    from surf.models import clip

    monkeypatch.setattr(clip, "load", lambda options, images: Encoder())
    out = job.folder / "caption.parquet"
    words = f"--by caption --questions {job.folder}/q.parquet --neighbors {job.folder}/near.parquet --out {out}"
    words += f" --catalog {job.folder}/catalog/_manifest.json"
    candidates.main([*words.split(), f"--images.roots={json.dumps([str(job.folder / 'images')])}"])
    rows = store.rows(store.read_table(out, "evaluate/candidates"))
    assert {row["image_id"]: round(row["score"], 3) for row in rows} == {0: 0.0, 1: 0.1, 2: 0.2}


def test_an_evaluation_image_that_cannot_be_opened_stops_the_job(job):
    (job.folder / "images" / job.images[3]).write_bytes(b"no image")
    with pytest.raises(SurfError, match=f"1 images of the evaluation cannot be opened, the first is '{job.images[3]}'"):
        job({}, near=False)
    assert job.responder.prompts == []


def test_references_that_cannot_be_opened_stop_the_job(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(SurfError, match=r"'gone\.png'"):
        evaluate.check_images(Images([str(tmp_path)]), ["a.png"], ["gone.png"])


@pytest.mark.parametrize(
    ("how", "near", "message"),
    [
        ({"references": 2}, False, "needs --catalog"),
        ({"references": 2, "rerank": "caption"}, True, r"needs --candidates …/caption\.parquet"),
        ({"references": 2, "keep": "judged"}, True, r"needs --candidates …/relevance\.parquet"),
        ({"references": 2, "gate": 7}, True, "methods.gate = 7"),
    ],
)
def test_what_a_method_lacks_is_named(job, how, near, message):
    with pytest.raises(SurfError, match=message):
        job(how, near=near)


@pytest.mark.parametrize("words", [[], ["questionz"]])
def test_an_unknown_subcommand_is_refused(words):
    with pytest.raises(SurfError, match="one of questions, answer"):
        evaluate.main(words)


def test_a_real_model_answers_in_the_end(tmp_path, question_file, tiny_lvlm):
    rows = asked(question_file)[:6]
    Image.new("RGB", (40, 30), "red").save(tmp_path / rows[0]["image"])
    meta = {"task": "pope", "kind": "pope"}
    store.write_table(tmp_path / "q.parquet", store.table_of(rows, "evaluate/questions"), "evaluate/questions", meta)
    flags = f"--questions {tmp_path}/q.parquet --out {tmp_path}/_manifest.json --model {tiny_lvlm}"
    flags += " --lvlm.dtype=float32 --max-new-tokens=3"
    methods = json.dumps({"out": {"model": "tuned"}})
    evaluate.main(["answer", *flags.split(), "--methods", methods, f"--images.roots={json.dumps([str(tmp_path)])}"])
    found = store.rows(store.read_table(tmp_path / "out.parquet", "evaluate/answers"))
    assert [row["question_id"] for row in found] == [row["question_id"] for row in rows]
    assert all(isinstance(row["response"], str) for row in found)
