"""Bad input ends in one paragraph that names the file and the remedy, and exit code 2: never in a traceback."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from surf import catalog, cli, evaluate, merge, pair, reanswer, retrieve, score, split, store

QUESTION = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a few good files."""
    monkeypatch.chdir(tmp_path)
    rows = [{"image_id": n, "image": f"{n}.jpg", "caption": "x"} for n in range(3)]
    store.write_table(tmp_path / "part-00000-of-00001.parquet", store.table_of(rows, "catalog"), "catalog", {"version": 1})
    rows = [{"round_id": "r#0", "image": "a.jpg", "question": "Q?", "answer": "A", "task": "short"}]
    store.write_table(tmp_path / "rounds.parquet", store.table_of(rows, "rounds"), "rounds", {"version": 1})
    return tmp_path


def fail(capsys, main, words):
    """Run a stage that must fail as a user's mistake; its message."""
    sys.argv = ["surf", *words.split()]
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert "Traceback" not in message
    return message


CATALOG = "--out out --quarantine q.parquet --shards 1 --catalog.captions"
SPLIT = "--part part-00000-of-00001 --out out.parquet --quarantine q.parquet --split.conversations"
QUESTIONS = "questions --task pope --kind pope --out out.parquet --files"


@pytest.mark.parametrize("text", ["", "[1, 2", "{}", "[]", "null", "\x00\x01\x02"])
@pytest.mark.parametrize(("main", "words"), [(catalog.main, CATALOG), (split.main, SPLIT)])
def test_json_files_that_hold_no_rows(here, capsys, main, words, text):
    (here / "bad.json").write_text(text)
    message = fail(capsys, main, f'{words} ["bad.json"]')
    assert "error: bad.json: " in message and "expected a list of" in message


@pytest.mark.parametrize(("main", "words"), [(catalog.main, CATALOG), (split.main, SPLIT)])
def test_missing_files(here, capsys, main, words):
    assert "gone.json: there is no such file" in fail(capsys, main, f'{words} ["gone.json"]')


def test_a_corpus_of_bad_rows(here, capsys):
    (here / "c.json").write_text(json.dumps([{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg"}, {"caption": "y"}]))
    message = fail(capsys, catalog.main, f'{CATALOG} ["c.json"]')
    assert "2 of 3 rows are unusable (c.json[1]: has no caption; c.json[2]: has no image)" in message
    assert "images.max_bad_share" in message and not (here / "out").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--catalog.captions []", "catalog.captions = []: list should have at least 1 item"),
        ("--catalog.captions [1]", "catalog.captions.0 = 1: input should be a valid string"),
        (
            '--catalog.captions ["c.json"] --images.max_bad_share 2',
            "images.max_bad_share = 2: input should be less than or equal",
        ),
    ],
)
def test_flags_of_the_wrong_value(here, capsys, flag, message):
    assert message in fail(capsys, catalog.main, f"--out out --quarantine q.parquet --shards 1 {flag}")


def test_an_unknown_flag(here, capsys):
    assert "unrecognized arguments: --catalog.caption" in fail(
        capsys, catalog.main, f'{CATALOG} ["c.json"] --catalog.caption 1'
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([QUESTION, QUESTION], "question_id"),
        ([{**QUESTION, "label": "maybe"}], "label"),
        ([{"question_id": 1, "image": "a.jpg", "label": "yes"}], "text"),
        (["{broken"], "1"),
    ],
)
def test_question_files(here, capsys, lines, message):
    (here / "p.json").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    found = fail(capsys, evaluate.main, f'{QUESTIONS} {{"random":"p.json"}}')
    assert "p.json" in found and message in found


def test_a_torn_parquet_part(here, capsys):
    whole = here / "part-00000-of-00001.parquet"
    (here / "c").mkdir()
    part = here / "c" / whole.name
    part.write_bytes(whole.read_bytes()[:100])
    message = fail(capsys, merge.main, f"--dataset catalog --out c/_manifest.json --parts {part}")
    assert "is no whole Parquet file" in message and f"rm {part}, then your snakemake command" in message


def test_a_parquet_file_of_somebody_else(here, capsys):
    (here / "c").mkdir()
    pq.write_table(pa.table({"a": [1]}), here / "c/part-00000-of-00001.parquet")
    message = fail(capsys, merge.main, "--dataset catalog --out c/_manifest.json --parts c/part-00000-of-00001.parquet")
    assert "is a file that surf did not write; expected a part of dataset 'catalog'" in message


def test_a_stray_part(here, capsys):
    store.write_table(here / "part-00000-of-00002.parquet", store.table_of([], "catalog"), "catalog")
    words = "--dataset catalog --out _manifest.json --parts part-00000-of-00001.parquet rounds.parquet"
    assert "next: rm part-00000-of-00002.parquet" in fail(capsys, merge.main, words)


def test_answers_of_other_rounds(here, capsys):
    rows = [{"round_id": "other#0", "rank": -1, "response": "A"}]
    store.write_table(here / "answers.parquet", store.table_of(rows, "answers"), "answers", {"version": 1})
    words = "--rounds rounds.parquet --responses answers.parquet --dataset answers --out s.parquet"
    assert "'other#0'" in fail(capsys, score.main, words)


def test_answers_in_place_of_rounds(here, capsys):
    words = "--rounds part-00000-of-00001.parquet --responses rounds.parquet --dataset answers --out s.parquet"
    assert "expected a part of dataset 'rounds'" in fail(capsys, score.main, words)


def test_manifests_that_are_none(here, capsys):
    (here / "m.json").write_text("{")
    words = "--queries rounds.parquet --dataset rounds --index i --embeddings m.json --out o --quarantine q"
    words += " --catalog _manifest.json"
    assert "_manifest.json: there is no such file" in fail(capsys, retrieve.main, words)
    words = "--rounds m.json --scores-answers m.json --scores-reanswers m.json --neighbors m.json --catalog m.json"
    assert "m.json: cannot be read" in fail(capsys, pair.main, f"{words} --out p.parquet --json p.json")


def test_a_part_name_that_is_none(here, capsys):
    (here / "s.json").write_text("[]")
    words = '--part part-5-of-2 --out o.parquet --quarantine q.parquet --split.conversations ["s.json"]'
    assert "'part-5-of-2' is not a shard name" in fail(capsys, split.main, words)


def test_image_roots_that_are_none(here, capsys):
    rows = [{"round_id": "r#0", "rank": -1, "metric": "match", "score": 0.0, "correct": True}]
    store.write_table(here / "scores.parquet", store.table_of(rows, "scores/answers"), "scores/answers", {"version": 1})
    store.write_table(here / "near.parquet", store.table_of([], "neighbors"), "neighbors", {"version": 1})
    merge.merge("catalog", [here / "part-00000-of-00001.parquet"], here / "c/_manifest.json")
    (here / "part-00000-of-00001.parquet").rename(here / "c/part-00000-of-00001.parquet")
    words = "--rounds rounds.parquet --scores scores.parquet --neighbors near.parquet --catalog c/_manifest.json"
    message = fail(capsys, reanswer.main, f'{words} --out o.parquet --quarantine q.parquet --images.roots ["nowhere"]')
    assert "images.roots: there is no image root nowhere" in message
