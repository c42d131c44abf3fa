"""Reading the public formats: ShareGPT4V captions and LLaVA's SFT mix, with all their quirks."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from surf import config, shards, store
from surf.catalog import catalog
from surf.errors import SurfError
from surf.split import CHOICE, SHORT, split, task_of
from surf.split import main as split_main


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def turns(*texts):
    return [{"from": "human" if number % 2 == 0 else "gpt", "value": text} for number, text in enumerate(texts)]


def read_catalog(tmp_path, rows, **options):
    return catalog(config.Catalog(captions=[write(tmp_path / "c.json", rows)], **options))


def read_split(tmp_path, rows, **options):
    return split(config.Split(conversations=[write(tmp_path / "s.json", rows)], **options))


def test_both_caption_formats(tmp_path):
    rows = [
        {"id": 1, "image": "a.jpg", "conversations": turns("<image>\nDescribe.", " A dog. ")},
        {"image": "b.jpg", "caption": "A cat."},
    ]
    table, errors = read_catalog(tmp_path, rows)
    assert table.to_pylist() == [
        {"image_id": 0, "image": "a.jpg", "caption": "A dog."},
        {"image_id": 1, "image": "b.jpg", "caption": "A cat."},
    ]
    assert errors == {}


def test_bad_caption_rows_are_counted_with_their_place(tmp_path):
    rows = [{"image": "a.jpg", "caption": "x"}, 7, {"caption": "x"}, {"image": "b.jpg"}, {"image": "c.jpg", "caption": "y"}]
    table, errors = read_catalog(tmp_path, rows)
    assert table["image_id"].to_pylist() == [0, 1]
    name = str(tmp_path / "c.json")
    assert errors == {f"{name}[1]": "is int, not an object", f"{name}[2]": "has no image", f"{name}[3]": "has no caption"}


def test_ids_run_on_over_several_files(tmp_path):
    files = [write(tmp_path / f"{n}.json", [{"image": f"{n}{i}.jpg", "caption": "x"} for i in range(2)]) for n in "ab"]
    table, _ = catalog(config.Catalog(captions=files))
    assert table["image"].to_pylist() == ["a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg"]


def test_huge_captions_are_cut(tmp_path):
    table, _ = read_catalog(tmp_path, [{"image": "a.jpg", "caption": "word " * 100_000}], max_caption_chars=50)
    assert table["caption"][0].as_py() == "word word word word word word word word word word"


@pytest.mark.parametrize("read", [read_catalog, read_split])
@pytest.mark.parametrize("text", ["", "[", "{}", "[]", '"text"', "null", '[{"a": 1'])
def test_files_that_are_no_list_of_rows(tmp_path, read, text):
    with pytest.raises(SurfError, match=r"\.json: (cannot be read|holds no rows)"):
        read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(SurfError, match=r"nowhere\.json: there is no such file"):
        catalog(config.Catalog(captions=[str(tmp_path / "nowhere.json")]))


def test_rounds_of_a_conversation(tmp_path):
    rows = [
        {
            "id": "c1",
            "image": "a.jpg",
            "conversations": turns(f"<image>\nWhat?\n{SHORT}", "Dog", "Colour?", "Red", "Tell all.", "It is."),
        },
        {"id": "text", "conversations": turns("Hello", "Hi")},
        {"id": "c2", "image": "a.jpg", "conversations": turns("Provide a one-sentence caption\n<image>", "A dog.")},
    ]
    rounds, errors, left_out = read_split(tmp_path, rows)
    assert [(one.round_id, one.question, one.answer, one.task) for one in rounds] == [
        ("c1#0", f"What?\n{SHORT}", "Dog", "short"),
        ("c1#1", f"Colour?\n{SHORT}", "Red", "short"),  # the suffix of round one is meant for all
        ("c1#2", f"Tell all.\n{SHORT}", "It is.", "short"),
        ("c2#0", "Provide a one-sentence caption", "A dog.", "caption"),
    ]
    assert errors == {} and left_out["text-only conversations"] == 1


def test_a_choice_suffix_is_carried_only_to_questions_with_options(tmp_path):
    first = f"<image>\nWhich?\nA. dog\nB. cat\n{CHOICE}"
    rounds, _, _ = read_split(
        tmp_path,
        [{"id": 1, "image": "a.jpg", "conversations": turns(first, "A", "And?\nA. cup\nB. bus", "B", "Why?", "Because.")}],
    )
    assert [one.task for one in rounds] == ["choice", "choice", "open"]
    assert rounds[1].question.endswith(CHOICE) and not rounds[2].question.endswith(CHOICE)


@pytest.mark.parametrize(
    ("question", "answer", "task"),
    [
        (f"Q\n{CHOICE}", "B", "choice"),
        (f"Q\n{SHORT}", "cat", "short"),
        ("Please provide the bounding box coordinate of the region this sentence describes: a cat.", "[0.1, 0.2,0.3,1]", "box"),
        ("Please provide a short description for this region: [0.1, 0.2, 0.3, 0.4].", "a cat", "caption"),
        ("Provide a one-sentence caption for the provided image.\nReference OCR token: X", "A sign.", "caption"),
        ("What is unusual about this image?", "A man irons on a car.", "open"),
    ],
)
def test_tasks_of_llavas_formats(question, answer, task):
    assert task_of(question, answer) == task


def test_one_id_on_several_conversations_gives_different_round_ids(tmp_path):
    rows = [{"id": "x", "image": "a.jpg", "conversations": turns("<image>\nQ?", str(n))} for n in range(3)]
    rounds, _, _ = read_split(tmp_path, rows)
    assert [one.round_id for one in rounds] == ["x#0", "x@2#0", "x@3#0"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"image": "a.jpg"}, "no list of question-answer pairs"),
        ({"image": "a.jpg", "conversations": turns("Q?", "A", "Q?")}, "no list of question-answer pairs"),
        ({"image": "a.jpg", "conversations": turns("A", "B")[::-1]}, "not from 'human'"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": turns("Q?", "A")}, "no file name"),
        ({"image": "a.jpg", "conversations": turns("<image><image>Q?", "A")}, "2 <image> tags"),
        ({"image": "a.jpg", "conversations": turns("<image>", "A")}, "is empty"),
        ({"image": "a.jpg", "conversations": [{"from": "human"}, {"from": "gpt"}]}, "has no text"),
        ("text", "is str"),
    ],
)
def test_bad_conversations_go_to_quarantine(tmp_path, row, error):
    good = {"id": "g", "image": "a.jpg", "conversations": turns("<image>\nQ?", "A")}
    rounds, errors, _ = read_split(tmp_path, [good, row])
    assert len(rounds) == 1
    assert list(errors) == [f"{tmp_path / 's.json'}[1]"] and error in errors[f"{tmp_path / 's.json'}[1]"]


def test_answers_cannot_pose_as_markup_either(tmp_path):
    rounds, errors, _ = read_split(
        tmp_path, [{"id": "g", "image": "a.jpg", "conversations": turns("Q?", "it is <image> a tag")}]
    )
    assert [one.answer for one in rounds] == ["it is   a tag"] and not errors


def many(images, rounds):
    return [
        {"id": f"{i}-{r}", "image": f"{i}.jpg", "conversations": turns("<image>\nQ?", "A", "R?", "B")}
        for r in range(rounds)
        for i in range(images)
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_hold_every_round_once_and_images_whole(tmp_path, count):
    rounds, _, _ = read_split(tmp_path, many(20, 3))
    parts = [[one for one in rounds if shards.shard_of(one.image, count) == index] for index in range(count)]
    assert sorted(one.round_id for part in parts for one in part) == sorted(one.round_id for one in rounds)
    where = Counter(image for part in parts for image in {one.image for one in part})
    assert set(where.values()) == {1}
    for part in parts:
        changes = sum(a.image != b.image for a, b in pairwise(part))
        assert changes == max(0, len({one.image for one in part}) - 1), "rounds of one image stand together"


def test_limit_keeps_whole_images_and_tasks_select(tmp_path):
    rounds, _, _ = read_split(tmp_path, many(20, 3), limit=25)
    assert len(rounds) == 24 and set(Counter(one.image for one in rounds).values()) == {6}
    with pytest.raises(SurfError, match="no round with an image"):
        read_split(tmp_path, many(2, 1), tasks=["box"])
    _, _, left_out = read_split(tmp_path, many(2, 1), tasks=["open"])
    assert left_out["rounds of other tasks"] == 0


def test_text_only_file_is_an_error(tmp_path):
    with pytest.raises(SurfError, match="no round with an image"):
        read_split(tmp_path, [{"id": 1, "conversations": turns("Hello", "Hi")}])


def test_the_wrong_format_says_what_was_found_and_what_is_expected(tmp_path):
    with pytest.raises(SurfError) as found:
        read_catalog(tmp_path, [{"file": f"{n}.jpg", "text": "x"} for n in range(5)])
    assert "c.json[2]: has no image)" in str(found.value) and 'expected rows {"image", "caption"}' in str(found.value)
    with pytest.raises(SurfError) as found:
        read_split(tmp_path, [{"image": "a.jpg", "turns": []}, {"id": 1, "conversations": turns("Hello", "Hi")}])
    text = str(found.value)
    assert "1 text-only conversations left out; 1 unusable, such as " in text
    assert "s.json[0]: conversations is no list" in text and 'expected rows {"id", "image", "conversations"' in text
    with pytest.raises(SurfError, match=r"4 rounds of other tasks left out.*split\.tasks"):
        read_split(tmp_path, many(2, 1), tasks=["box"])


@pytest.mark.parametrize("read", [read_catalog, read_split])
def test_json_lines_are_called_by_their_name(tmp_path, read):
    with pytest.raises(SurfError, match=r"\.json: looks like JSON lines.*next: jq -s \. "):
        read(tmp_path, '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "y"}\n')


def test_a_limit_below_the_first_image_names_the_smallest_that_works(tmp_path):
    with pytest.raises(SurfError, match=r"split\.limit is 5, .*expected at least 6"):
        read_split(tmp_path, many(20, 3), limit=5)
    assert len(read_split(tmp_path, many(20, 3), limit=6)[0]) == 6


@pytest.mark.parametrize(("share", "fails"), [(0.19, True), (0.2, False)])
def test_all_parts_come_to_one_verdict_about_the_share_of_bad_conversations(tmp_path, monkeypatch, share, fails):
    """One of five conversations is bad, in a part of its own; the others have two rounds each."""
    name, refused, keys = write(tmp_path / "s.json", [*many(4, 1), {"image": "a.jpg"}]), [], []
    for part in shards.part_names(7):
        out, bad = tmp_path / f"{part}.parquet", tmp_path / f"bad-{part}.parquet"
        words = f"--part {part} --out {out} --quarantine {bad} --images.max_bad_share {share} --split.conversations"
        monkeypatch.setattr("sys.argv", ["split", *words.split(), json.dumps([name])])
        try:
            split_main()
            keys += store.read_table(bad, "quarantine")["key"].to_pylist()
        except SurfError as error:
            refused.append(str(error))
    assert len(refused) == (7 if fails else 0) and all("1 of 5 rows are unusable" in text for text in refused)
    assert keys == ([] if fails else [f"{name}[4]"])
