"""POPE question files, and scoring a published answers file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from popedata import answer_rows, question_rows, write_lines

from surf import evaluate, metrics, pope, store
from surf.errors import SurfError

PUBLISHED = Path(__file__).parents[2].parent / "shared/data/pope"


@pytest.fixture
def question_file(tmp_path):
    return write_lines(tmp_path / "questions.json", question_rows())


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_become_a_table(tmp_path, question_file):
    files = json.dumps({"random": str(question_file)})
    evaluate.main(["questions", "--task", "pope", "--kind", "pope", "--files", files, "--out", str(tmp_path / "out.parquet")])
    rows = store.rows(store.read_table(tmp_path / "out.parquet", "evaluate/questions"))
    assert len(rows) == 48
    first = question_rows()[0]
    assert rows[0] == {
        "question_id": "random#1",
        "image": first["image"],
        "question": first["text"],
        "answers": [first["label"]],
        "split": "random",
        "choices": None,
        "category": None,
    }
    meta = store.footer(tmp_path / "out.parquet")[1]
    assert (meta["task"], meta["kind"], list(json.loads(meta["sources"]))) == ("pope", "pope", ["random"])


@pytest.mark.parametrize("layout", ["list", "crlf", "bom", "blank lines"])
def test_other_layouts_of_a_question_file_read_alike(tmp_path, question_file, layout):
    text = question_file.read_text()
    content = {
        "list": json.dumps(question_rows(), indent=1),
        "crlf": text.replace("\n", "\r\n"),
        "bom": "\ufeff" + text,
        "blank lines": "\n" + text.replace("\n", "\n\n"),
    }[layout]
    (tmp_path / "other.json").write_bytes(content.encode())
    assert pope.read_questions(tmp_path / "other.json") == pope.read_questions(question_file)


def test_labels_may_be_in_capitals(tmp_path):
    rows = [
        {"question_id": 1, "image": "a", "text": "q", "label": "Yes"},
        {"question_id": "2", "image": "a", "text": "q", "label": "NO "},
    ]
    assert [row.label for row in pope.read_questions(write_lines(tmp_path / "q.json", rows))] == [True, False]


GOOD = '{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}\n'
BAD_FILES = {
    "": "is empty",
    "\n \n": "is empty",
    "[]": "is empty",
    GOOD + "{oops}\n": "line 2: is no JSON",
    GOOD + "\n[1]\n": r"line 3: is \[1\]; expected a JSON object",
    GOOD + GOOD: "line 2: question_id 1 stands twice",
    GOOD.replace("yes", "maybe"): "line 1: label is 'maybe'",
    GOOD.replace('"yes"', "true"): "line 1: label is True",
    GOOD.replace("label", "lable"): "line 1: has no label",
    GOOD.replace("image", "picture"): "line 1: has no image",
    GOOD.replace("a.jpg", ""): "line 1: image is ''",
    GOOD.replace("text", "txt"): "line 1: has no text",
    GOOD.replace("question_id", "id"): "line 1: has no question_id",
    GOOD.replace("1", "1.5"): r"line 1: question_id is 1\.5",
    "[" + GOOD + "]": None,
    "[" + GOOD + "," + GOOD + "]": "row 2: question_id 1 stands twice",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_question_files_are_named_by_line(tmp_path, content):
    (tmp_path / "q.json").write_text(content)
    if BAD_FILES[content] is None:
        assert len(pope.read_questions(tmp_path / "q.json")) == 1
    else:
        with pytest.raises(SurfError, match=rf"q\.json.*{BAD_FILES[content]}"):
            pope.read_questions(tmp_path / "q.json")


def test_bytes_that_are_no_text_and_no_file_at_all(tmp_path):
    (tmp_path / "q.json").write_bytes(b'{"question_id": "\xff"}')
    with pytest.raises(SurfError, match="line 1: is no JSON"):
        pope.read_questions(tmp_path / "q.json")
    with pytest.raises(SurfError, match="cannot be read"):
        pope.read_questions(tmp_path / "none.json")


# --- score ------------------------------------------------------------------------------------------------------------


def scored(question_file, answers, folder, **options):
    path = write_lines(folder / "answers.jsonl", answers)
    rows = pope.score(question_file, path, "random", 100, **options)
    return {(row["method"], row["rule"], row["metric"]): row["value"] for row in rows}


def test_the_originals_answer_format(tmp_path, question_file):
    answers = answer_rows(question_rows(), flip={1, 2, 3, 4, 5, 6})
    random.Random(0).shuffle(answers)  # joined by id, not by row
    found = scored(question_file, answers, tmp_path)
    for rule in metrics.RULES:
        assert found["answers", rule, "accuracy"] == pytest.approx(42 / 48)
        assert found["answers", rule, "unparsed"] == 0
    assert found["image-blind", "surf", "accuracy"] > 0.7


@pytest.mark.parametrize(
    "change",
    [
        lambda row, question: {"question_id": str(row["question_id"]), "prediction": row["text"], "answer": "the label"},
        lambda row, question: {"question_id": row["question_id"], "answer": row["text"], "question": question["text"]},
        lambda row, question: {"question_id": row["question_id"], "text": question["text"], "answer": row["text"]},
        lambda row, question: {
            **row,
            "prompt": f"<image>\n{question['text']}\nAnswer the question using a single word or phrase.",
        },
        lambda row, question: {**row, "prompt": question["text"].replace("image", "imange").upper()},
        lambda row, question: {**row, "image": f"val2014/{question['image']}"},
        lambda row, question: {**row, "image": f"val2017/{question['image'][-16:]}"},
    ],
)
def test_other_answer_formats(tmp_path, question_file, change):
    questions = question_rows()
    rows = [change(row, question) for row, question in zip(answer_rows(questions), questions, strict=True)]
    assert scored(question_file, rows, tmp_path)["answers", "surf", "accuracy"] == 1.0


def test_the_typo_of_older_question_files_is_tolerated(tmp_path):
    typo = [{**row, "text": row["text"].replace("image", "imange")} for row in question_rows()]
    path = write_lines(tmp_path / "old.json", typo)
    assert scored(path, answer_rows(question_rows()), tmp_path)["answers", "surf", "accuracy"] == 1.0


def swap(rows, key, number, value):
    rows[number][key] = value
    return rows


BAD_ANSWERS = {
    "missing": (lambda rows: rows[:-2], "2 of 48 questions have no answer: question_id 47, 48;"),
    "unknown": (
        lambda rows: [*rows, {"question_id": 99, "text": "Yes"}],
        "line 49: question_id 99 is not in the question file",
    ),
    "twice": (lambda rows: [*rows, rows[3]], "line 49: question_id 4 stands twice"),
    "other question": (
        lambda rows: swap(rows, "prompt", 4, "Is there a cat in the image?"),
        "line 5: prompt is .*under question_id 5",
    ),
    "other image": (
        lambda rows: swap(rows, "image", 4, "COCO_val2014_000000000999.jpg"),
        "line 5: image is .*under question_id 5",
    ),
    "no answer": (lambda rows: swap(rows, "text", 0, None), "line 1: text is None"),
    "no id": (lambda rows: [{"text": "Yes"}], "line 1: has no question_id"),
    "no key": (lambda rows: [{"question_id": 1}], "line 1: has no answer"),
    "two answers": (lambda rows: swap(rows, "answer", 0, "No"), "line 1: has both text and answer"),
    "other question, text": (
        lambda rows: [{"question_id": row["question_id"], "text": "Is there a cow?", "prediction": "Yes"} for row in rows],
        "line 1: has both text and prediction, and text is 'Is there a cow",
    ),
    "question file": (
        lambda rows: question_rows(),
        "line 1: looks like a question.*expected an answer.*next: check that --ans",
    ),
    "questions of another split": (
        lambda rows: [{**row, "text": "Is there a cow?"} for row in question_rows()],
        "line 1: looks like a question, and has no answer: text is 'Is there a cow",
    ),
    "questions without labels": (
        lambda rows: [{"question_id": row["question_id"], "text": row["text"]} for row in question_rows()],
        "line 1: looks like a question",
    ),
    "empty": (lambda rows: [], "is empty"),
}


@pytest.mark.parametrize("fault", BAD_ANSWERS)
def test_bad_answer_files_are_refused(tmp_path, question_file, fault):
    change, message = BAD_ANSWERS[fault]
    with pytest.raises(SurfError, match=message):
        scored(question_file, change(answer_rows(question_rows())), tmp_path)


def test_an_empty_answer_is_an_answer(tmp_path, question_file):
    found = scored(question_file, answer_rows(question_rows(), text=""), tmp_path)
    assert found["answers", "surf", "unparsed"] == 1.0
    assert found["answers", "official", "yes_ratio"] == 1.0


def test_score_command_line(tmp_path, question_file):
    answers = write_lines(tmp_path / "answers.jsonl", answer_rows(question_rows(), flip={1}))
    command = [sys.executable, "-m", "surf.pope", "score", "--questions", str(question_file), "--answers", str(answers)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json"), "--resamples", "50"], capture_output=True, text=True, check=True
    )
    names = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert names == ["rule", *metrics.RULES, "image-blind"]
    assert "97.9 (" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())[0]["value"] == pytest.approx(47 / 48)
    write_lines(answers, answer_rows(question_rows()[1:]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "question_id 1;" in done.stderr


# --- the published files ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published POPE files are not beside this checkout")
@pytest.mark.parametrize(("split", "accuracy"), [("random", 0.675), ("popular", 0.869), ("adversarial", 0.692)])
def test_the_image_blind_line_of_the_published_files(split, accuracy):
    rows = pope.read_questions(PUBLISHED / f"coco_pope_{split}.json")
    assert len(rows) == 3000
    said = metrics.blind([row.text for row in rows], [row.label for row in rows], [row.image for row in rows])
    right = sum(guess is row.label for guess, row in zip(said, rows, strict=True)) / len(rows)
    assert right == pytest.approx(accuracy, abs=0.001)
