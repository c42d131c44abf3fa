"""Evaluation tasks: public file formats in small, and what their scorers promise."""

import base64
import io
import json
import logging
import pickle
import sys
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from popedata import question_rows, write_lines

from surf.errors import SurfError
from surf.images import Images
from surf.tasks import KINDS, Question
from surf.tasks.caption import QUESTION
from surf.tasks.captioning import cider_d, words
from surf.tasks.choice import chosen, options
from surf.tasks.packed import CIFAR10
from surf.tasks.unpack import main as unpack
from surf.tasks.vqa import normalised

FEW = settings(max_examples=60, deadline=None)


def question(*answers, choices=None, category=None):
    return Question(question_id="q", image="i", question="?", answers=list(answers), choices=choices, category=category)


def score(kind, response, *answers, choices=None):
    return KINDS[kind].score([response], [question(*answers, choices=choices)])[0]


def jpeg(colour):
    sink = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(sink, "JPEG")
    return sink.getvalue()


def write(path, content):
    path.write_text(json.dumps(content))
    return path


# --- files in their public formats ------------------------------------------------------------------------------------

VIZWIZ = [
    {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Can you tell me what this medicine is please?",
        "answers": [{"answer_confidence": "yes", "answer": "night time"}] * 9
        + [{"answer_confidence": "maybe", "answer": "unanswerable"}],
        "answer_type": "other",
        "answerable": 1,
    },
    {
        "image": "VizWiz_val_00000001.jpg",
        "question": "What is this?",
        "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}] * 10,
        "answer_type": "unanswerable",
        "answerable": 0,
    },
]


def test_vizwiz_answers_are_read_in_order_with_all_ten_answers(tmp_path):
    first, second = KINDS["vqa"].read(write(tmp_path / "val.json", VIZWIZ), "val")
    assert first["question_id"] == "val#VizWiz_val_00000000" and first["image"] == "VizWiz_val_00000000.jpg"
    assert first["answers"] == ["night time"] * 9 + ["unanswerable"]
    assert (first["category"], second["category"]) == ("other", "unanswerable")
    found = KINDS["vqa"].metrics(["Night time.", "red"], [first, second])
    assert found == {"accuracy": 0.5, "accuracy (other)": 1.0, "accuracy (unanswerable)": 0.0}
    # one of ten says so on the first question, all of them on the second: (9 * 1/3 / 10 + 1) / 2
    assert KINDS["vqa"].chance([first, second]) == pytest.approx((0.3 + 1) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("answers"), "row 2: has no answers.*val.json"),
        (lambda row: row.pop("question"), "row 2: has no question"),
        (lambda row: row.update(image=7), "row 2: image is 7"),
        (lambda row: row.update(image="VizWiz_val_00000000.jpg"), "row 2: question_id VizWiz_val_00000000 stands twice"),
        (lambda row: row.update(answers=[]), "row 2, answers: holds no rows"),
        (lambda row: row.update(answers=[{"answer": None}]), "row 2, answers, row 1: answer is None"),
    ],
)
def test_a_fault_in_vizwiz_names_its_place(tmp_path, change, message):
    rows = [VIZWIZ[0], dict(VIZWIZ[1])]
    change(rows[1])
    with pytest.raises(SurfError, match=message):
        KINDS["vqa"].read(write(tmp_path / "val.json", rows), "val")


MMSTAR = {
    "index": [0, 1, 2],
    "question": [
        "Which option describe the object relationship in the image correctly?\n"
        "Options: A: The suitcase is on the book., B: The suitcase is beneath the cat., C: Both, A and B, D: None",
        "Hint: Please provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How many snowmen are there?\nChoices:\n(A) 10\n(B) 1,500",
        "What is shown here?",
    ],
    "image": [
        {"bytes": jpeg("red"), "path": None},
        {"bytes": jpeg("blue"), "path": None},
        {"bytes": jpeg("red"), "path": None},
    ],
    "answer": ["A", "B", "C"],
    "category": ["coarse perception", "math", "math"],
    "l2_category": ["image scene and topic", "numeric commonsense and calculation", "geometry"],
    "meta_info": [{"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}] * 3,
}


def mmstar(path, **changes):
    pq.write_table(pa.table(MMSTAR | changes), path)
    return path


def mmstar_tsv(path, **columns):
    """As VLMEvalKit publishes it: base64 images, and options in columns where other benchmarks have them."""
    table = {key: value for key, value in MMSTAR.items() if key != "meta_info"} | columns
    table["image"] = [base64.b64encode(image["bytes"]).decode() for image in MMSTAR["image"]]
    table["image"][2] = "0"  # the image of the row with index 0
    quoted = [[f'"{value}"' for value in column] for column in table.values()]
    path.write_text("\n".join("\t".join(row) for row in [list(table), *zip(*quoted, strict=True)]) + "\n")
    return path


def test_mmstar_parquet_and_tsv_hold_the_same_questions(tmp_path):
    rows = KINDS["choice"].read(mmstar(tmp_path / "mmstar.parquet"), "val")
    assert rows == KINDS["choice"].read(mmstar_tsv(tmp_path / "MMStar.tsv"), "val")
    assert [row["question_id"] for row in rows] == ["val#0", "val#1", "val#2"]
    assert rows[0]["choices"] == ["The suitcase is on the book.", "The suitcase is beneath the cat.", "Both, A and B", "None"]
    assert rows[1]["choices"] == ["10", "1,500"] and rows[2]["choices"] is None
    assert rows[0]["image"] == rows[2]["image"] != rows[1]["image"]  # one photograph has one name
    found = KINDS["choice"].metrics(["The suitcase is on the book", "A", "C"], rows)
    assert found == {"accuracy": 2 / 3, "accuracy (coarse perception)": 1.0, "accuracy (math)": 0.5, "unparsed": 0.0}


def test_options_in_columns_join_the_question(tmp_path):
    rows = KINDS["choice"].read(mmstar_tsv(tmp_path / "x.tsv", A=["", "", "cat"], B=["", "", "dog"], C=["", "", "bird"]), "val")
    assert rows[2]["question"] == "What is shown here?\nA. cat\nB. dog\nC. bird" and rows[2]["choices"] == [
        "cat",
        "dog",
        "bird",
    ]
    assert "\nA. " not in rows[0]["question"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": ["A", "C", "C"]}, "row 2: answer is 'C'; expected a letter from A to B"),
        ({"answer": ["A", "", "C"]}, "row 2: answer is ''"),
        ({"answer": ["A", "AB", "C"]}, "row 2: answer is 'AB'"),
        ({"index": [0, 1, 1]}, "row 3: question_id 1 stands twice"),
        ({"image": [{"bytes": b"x"}, {"bytes": None}, {"bytes": b"y"}]}, "row 2: image is .*the image's bytes"),
        ({"image": pa.nulls(3)}, "row 1: image is None"),
    ],
)
def test_a_fault_in_mmstar_names_its_place(tmp_path, changes, message):
    with pytest.raises(SurfError, match=message):
        KINDS["choice"].read(mmstar(tmp_path / "mmstar.parquet", **changes), "val")


def test_a_tsv_without_an_image_names_its_row(tmp_path):
    path = mmstar_tsv(tmp_path / "MMStar.tsv")
    path.write_text(path.read_text().replace('\t"0"\t"C"', '\t"???"\t"C"'))
    with pytest.raises(SurfError, match=r"row 3: image is '\?\?\?'"):
        KINDS["choice"].read(path, "val")


COCO = {
    "info": {},
    "images": [
        {"id": 139, "file_name": "000000000139.jpg", "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg"},
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
    ],
    "annotations": [
        {"image_id": 42, "id": 641613, "caption": "A shoe rack with some shoes and a dog sleeping on them"},
        {"image_id": 139, "id": 1, "caption": "A woman stands in the dining area at the table."},
        {"image_id": 42, "id": 2, "caption": "Various slides and other footwear rest in a metal basket outdoors."},
    ],
}


def test_coco_captions_are_grouped_by_image(tmp_path):
    first, second = KINDS["caption"].read(write(tmp_path / "captions.json", COCO), "val")
    assert first["image"] == "val2017/000000000139.jpg" and first["question_id"] == "val#139"
    assert second["image"] == "COCO_val2014_000000000042.jpg" and len(second["answers"]) == 2
    assert first["question"] == QUESTION and KINDS["caption"].chance([first]) is None


def test_vizwiz_captions_lose_rejected_ones_and_say_so(tmp_path, caplog):
    images = [{"file_name": f"VizWiz_val_{n:08d}.jpg", "id": n, "text_detected": True} for n in range(3)]
    flags = [(0, False, False), (0, True, False), (1, False, True), (2, False, False)]
    annotations = [
        {
            "caption": f"caption {n}",
            "image_id": image,
            "is_precanned": canned,
            "is_rejected": bad,
            "id": n,
            "text_detected": True,
        }
        for n, (image, bad, canned) in enumerate(flags)
    ]
    with caplog.at_level(logging.INFO, logger="surf"):
        rows = KINDS["caption"].read(write(tmp_path / "val.json", {"images": images, "annotations": annotations}), "val")
    assert [row["answers"] for row in rows] == [["caption 0"], ["caption 3"]]
    assert "2 captions are marked" in caplog.text and "1 images have no other" in caplog.text


def test_a_karpathy_file_gives_the_images_of_one_split(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{n:012d}.jpg",
            "split": split,
            "cocoid": n,
            "imgid": n,
            "sentences": [{"raw": f"A dog {n}.", "tokens": ["a", "dog"], "imgid": n, "sentid": n}],
        }
        for n, split in enumerate(["test", "val", "test"])
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert [row["question_id"] for row in KINDS["caption"].read(path, "test")] == ["test#0", "test#2"]
    with pytest.raises(SurfError, match="has no split 'dev'; expected one of test, val"):
        KINDS["caption"].read(path, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds \\[\\]"),
        ({"images": []}, "images: holds no rows"),
        ({**COCO, "annotations": COCO["annotations"][:1]}, "images, row 1: image 139 has no caption"),
        ({**COCO, "annotations": [{"image_id": 7, "caption": "x"}]}, "annotations, row 1: image_id 7 is not among the images"),
        ({**COCO, "annotations": [{"image_id": 42, "caption": None}]}, "annotations, row 1: caption is None"),
        ({**COCO, "images": [{"id": 42}, *COCO["images"]]}, "file_name"),
    ],
)
def test_a_fault_in_captions_names_its_place(tmp_path, content, message):
    with pytest.raises(SurfError, match=message):
        KINDS["caption"].read(write(tmp_path / "captions.json", content), "val")


def cifar(path, labels, seed=0):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(bytes([label]) + rng.bytes(3072) for label in labels))
    return path


def hub_cifar(path, labels):
    features = {"img": {"_type": "Image"}, "label": {"names": list(CIFAR10), "_type": "ClassLabel"}}
    table = pa.table({"img": [{"bytes": jpeg((n, 0, 0)), "path": None} for n in range(len(labels))], "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def test_cifar10_batches_unpack_to_the_images_that_the_reader_names(tmp_path):
    folder = cifar(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", [3, 8, 0]).parent
    for number in range(1, 6):
        cifar(folder / f"data_batch_{number}.bin", [number], seed=number)
    rows = KINDS["classify"].read(folder, "test")
    assert [row["answers"] for row in rows] == [["cat"], ["ship"], ["airplane"]]
    assert [row["answers"] for row in KINDS["classify"].read(folder, "train")] == [[CIFAR10[n]] for n in range(1, 6)]
    assert rows == KINDS["classify"].read(folder / "test_batch.bin", "test")
    unpack(["--file", str(folder / "test_batch.bin"), "--out", str(tmp_path / "images.parquet")])
    images = Images([str(tmp_path / "images.parquet")])
    raw = (folder / "test_batch.bin").read_bytes()[3073 + 1 : 2 * 3073]
    assert np.asarray(images.open(rows[1]["image"])).transpose(2, 0, 1).tobytes() == raw


def test_packed_images_are_kept_once_under_the_reader_s_names(tmp_path):
    for path in (mmstar(tmp_path / "mmstar.parquet"), mmstar_tsv(tmp_path / "MMStar.tsv")):
        unpack(["--file", str(path), "--out", str(tmp_path / "images.parquet")])
        table = pq.read_table(tmp_path / "images.parquet").to_pylist()
        assert [row["bytes"] for row in table] == [jpeg("red"), jpeg("blue")]
        assert [row["image"] for row in table] == [row["image"] for row in KINDS["choice"].read(path, "val")[:2]]


def test_a_hub_parquet_file_names_its_classes(tmp_path):
    rows = KINDS["classify"].read(hub_cifar(tmp_path / "test.parquet", [9, 0]), "test")
    assert [row["answers"][0] for row in rows] == ["truck", "airplane"] and rows[0]["choices"] == list(CIFAR10)
    assert len(KINDS["classify"].read(hub_cifar(tmp_path / "many.parquet", [1] * 300), "test")) == 300
    with pytest.raises(SurfError, match="row 2: label is 10"):
        KINDS["classify"].read(hub_cifar(tmp_path / "test.parquet", [9, 10]), "test")
    with pytest.raises(SurfError, match="does not name its classes"):
        KINDS["classify"].read(mmstar(tmp_path / "mmstar.parquet"), "test")


def test_emoset_and_folders_by_class(tmp_path):
    emoset = [
        ["amusement", "amusement_12865", "image/amusement/amusement_12865.jpg", "annotation/amusement/amusement_12865.json"]
    ]
    (row,) = KINDS["classify"].read(write(tmp_path / "test.json", emoset), "test")
    assert row["image"] == emoset[0][2] and row["answers"] == ["amusement"] and len(row["choices"]) == 8
    with pytest.raises(SurfError, match="row 1: emotion is 'joy'"):
        KINDS["classify"].read(write(tmp_path / "test.json", [["joy", *emoset[0][1:]]]), "test")
    with pytest.raises(SurfError, match="row 1: is \\['fear'\\]"):
        KINDS["classify"].read(write(tmp_path / "test.json", [["fear"]]), "test")

    for name in ("dining_table/1.jpg", "table/b.png", "table/a.jpg", "table/notes.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"")
    rows = KINDS["classify"].read(tmp_path / "folder", "test")
    assert [row["image"] for row in rows] == ["dining_table/1.jpg", "table/a.jpg", "table/b.png"]
    assert rows[0]["answers"] == ["dining table"] and rows[0]["choices"] == ["dining table", "table"]
    with pytest.raises(SurfError, match="holds 0 folders"):
        KINDS["classify"].read(tmp_path / "folder" / "table", "test")


class Trap:
    def __reduce__(self):
        return (sys.exit, (1,))


def test_a_pickle_is_refused_unread(tmp_path):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Trap(), protocol=2))
    for path in (tmp_path, tmp_path / "test_batch"):
        with pytest.raises(SurfError, match="test_batch: is a Python pickle"):
            KINDS["classify"].read(path, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", bytes(3072), "holds 3072 bytes; expected records of 3073 bytes"),
        ("test_batch.bin", bytes([10]) + bytes(3072), "record 1: has label 10"),
        ("nothing.bin", None, "cannot be read"),
        ("test.parquet", b"PAR1", "cannot be read.*a Parquet file"),
        ("nothing.json", None, "cannot be read"),
        ("torn.json", b"[1,", "is no JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SurfError, match=f"{name}.*{message}"):
        KINDS["classify"].read(tmp_path / name, "test")


def test_pope_is_scored_by_the_headline_rule(tmp_path):
    rows = KINDS["pope"].read(write_lines(tmp_path / "pope.json", question_rows()), "random")
    gold = [row["answers"][0] for row in rows]
    assert set(KINDS["pope"].score(gold, rows)) == {1.0}
    found = KINDS["pope"].metrics(["Yes"] * len(rows), rows)
    assert found["accuracy"] == found["yes_ratio"] * gold.count("yes") / len(gold) and found["recall"] == 1.0
    assert KINDS["pope"].chance(rows) == max(gold.count("yes"), gold.count("no")) / len(gold)


# --- scorers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # one case or more for each step that visualqa.org/evaluation lists
        ("The Dog.", "dog"),
        ("3.5", "3.5"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("its a girl's", "its girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red-white", "red white"),
        ("red, white!", "red white"),
        ("yes/no", "yes no"),
        ("what\nis  it?", "what is it"),
        ("what’s", "what's"),
        ("A", ""),
    ],
)
def test_answers_are_normalised_as_the_vqa_evaluation_says(text, expected):
    assert normalised(text) == expected


def test_a_gold_answer_of_nothing_but_an_article_or_a_mark_is_not_the_empty_answer():
    assert [score("vqa", response, *["A"] * 10) for response in ("a", "A.", "the", "")] == [1.0, 1.0, 0.0, 0.0]
    assert [score("vqa", response, *["?"] * 10) for response in ("?", "")] == [1.0, 0.0]


@pytest.mark.parametrize(("said", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_one_annotator_out(said, expected):
    assert score("vqa", "cat", *["cat"] * said, *["dog"] * (10 - said)) == pytest.approx(expected)


TEXT = st.text(st.sampled_from("abcdot eANS.,'?-_:\n13éß"), max_size=25)


@FEW
@given(TEXT, st.lists(TEXT, min_size=2, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_subsets(response, answers):
    assume(all(map(normalised, [response, *answers])))
    subsets = list(combinations([normalised(answer) for answer in answers], len(answers) - 1))
    expected = sum(min(subset.count(normalised(response)) / 3, 1) for subset in subsets) / len(subsets)
    assert score("vqa", response, *answers) == pytest.approx(expected)


@FEW
@given(
    st.lists(st.sampled_from(["dog", "red", "two", "Unanswerable", "3.5", "café"]), min_size=1, max_size=3), st.integers(1, 10)
)
def test_vqa_accuracy_ignores_case_articles_and_full_stops(parts, said):
    gold = [" ".join(parts)] * said + ["other"] * (10 - said)
    plain = score("vqa", " ".join(parts), *gold)
    for variant in (f"The {' '.join(parts)}", " a ".join(parts).upper(), f"{' '.join(parts)}.", f" {'  '.join(parts)} "):
        assert score("vqa", variant, *gold) == plain
    assert [plain] == KINDS["vqa"].score([" ".join(parts)], [question(*reversed(gold))])


OPTIONS = ["a dining table", "Tables", "table", "12", "a cat and a dog", "yes"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("The answer is D.", "D"),
        ("table", "C"),
        ("It is a dining table.", "A"),
        ("a cat and a dog", "E"),
        ("Yes.", "F"),
        ("There are 12 of them", "D"),
        ("Beautiful", None),
        ("Access denied", None),
        ("A dog", None),
        ("not a table", None),
        ("12 tables", None),
        ("B or C", None),
        ("Z", None),
        ("", None),
    ],
)
def test_an_option_is_read_from_its_letter_or_its_text(response, expected):
    assert chosen(response, OPTIONS) == expected


def test_the_text_of_an_option_that_ends_with_a_letter_is_that_option():
    options = ["Point C", "Point A", "Point B", "Point D"]
    assert [chosen(f"{text}{end}", options) for end in ("", ".") for text in options] == list("ABCDABCD")
    assert chosen("A. Point C", options) == "A"
    assert chosen("-3.5", ["3.5", "7.5"]) is None and chosen("A. dog", ["cat", "a dog"]) == "A"


@FEW
@given(st.lists(TEXT, min_size=2, max_size=6), st.data())
def test_the_right_letter_is_always_right(choices, data):
    letter = data.draw(st.sampled_from("ABCDEF"[: len(choices)]))
    form = data.draw(st.sampled_from(["{}", "{}.", "({})", "{}: it", "The answer is {}.", "Option {}", "**{}**"]))
    said = form.format(letter)
    assert score("choice", said, letter, choices=choices) == score("choice", said, letter) == 1.0
    wrong = next(other for other in "AB" if other != letter)
    assert score("choice", said, wrong, choices=choices) == 0.0


@FEW
@given(
    st.lists(st.sampled_from(["cat", "dog", "a", "red", "bird,", "two;", "three", "3", "(big)", "x"]), min_size=1, max_size=4),
    st.integers(2, 6),
    st.booleans(),
)
def test_options_are_found_in_both_layouts(parts, count, inline):
    texts = [f"{' '.join(parts)} {n}" for n in range(count)]
    marked = [f"{letter}: {text}" if inline else f"({letter}) {text}" for letter, text in zip("ABCDEF", texts, strict=False)]
    asked = f"What?\nOptions: {', '.join(marked)}" if inline else "Question: What?\nChoices:\n" + "\n".join(marked)
    assert options(asked) == texts


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("Airplane", "airplane", 1.0),
        ("It's a plane.", "airplane", 1.0),
        ("a car, or rather: an automobile", "automobile", 0.0),  # hedges
        ("A car. An automobile.", "automobile", 1.0),
        ("a cat and a dog", "cat", 0.0),
        ("not a cat", "cat", 0.0),
        ("category", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_a_class_must_be_named_alone(response, label, expected):
    assert score("classify", response, label, choices=list(CIFAR10)) == expected


NOUNS = ["a", "man", "the", "dog", "rides", "red", "bike", "on", "street"]
CAPTION = st.lists(st.sampled_from(NOUNS), min_size=1, max_size=9).map(" ".join)


@FEW
@given(st.lists(CAPTION, min_size=2, max_size=5), st.lists(CAPTION, min_size=5, max_size=5))
def test_a_gold_caption_scores_at_least_as_high_as_any_other(gold, others):
    rows = [question(caption) for caption in gold]
    best = KINDS["caption"].score([caption.upper() + "!" for caption in gold], rows)
    other = KINDS["caption"].score(others[: len(gold)], rows)
    assert all(0 <= low <= high + 1e-12 <= 1 + 1e-9 for low, high in zip(other, best, strict=True))


GOLD = [
    ["a man rides a red bike down the street", "the man is on a bike", "someone riding a bicycle"],
    ["a dog sleeps on a sofa", "a brown dog lying on the couch"],
    ["two cats look out of the window", "a pair of cats at a window", "cats sit by a window"],
]
SAID = ["a man riding a bike on the bike on the street", "a dog sleeps on a sofa", "a bird"]
CIDER_D, BLEU_4, ROUGE_L = 2.126382517462, 0.416839382630, 0.625411918415
CIDER_D_EACH = [0.990251409059, 5.388896143326, 0.000000000000]


def test_caption_metrics_equal_the_evaluation_server_s():
    """Golden values: pycocoevalcap 1.2 (Cider, Bleu, Rouge) on these captions."""
    rows = [question(*captions) for captions in GOLD]
    found = KINDS["caption"].metrics(SAID, rows)
    assert found == pytest.approx({"CIDEr-D": CIDER_D, "BLEU-4": BLEU_4, "ROUGE-L": ROUGE_L}, abs=1e-9)
    each = cider_d([words(text) for text in SAID], [[words(text) for text in captions] for captions in GOLD])
    assert each == pytest.approx(CIDER_D_EACH, abs=1e-9)
    assert KINDS["caption"].score(SAID, rows) == pytest.approx([value / 10 for value in CIDER_D_EACH], abs=1e-9)


@FEW
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_caption_metrics_stay_in_their_range(pairs):
    found = KINDS["caption"].metrics([said for said, _ in pairs], [question(*gold) for _, gold in pairs])
    assert 0 <= found["CIDEr-D"] <= 10 + 1e-9 and 0 <= found["BLEU-4"] <= 1 + 1e-9 and 0 <= found["ROUGE-L"] <= 1 + 1e-9


def test_a_missing_caption_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SurfError, match=r"sacrebleu is not installed.*pip install 'surf-rag\[captions\]'"):
        KINDS["caption"].metrics(SAID, [question(*captions) for captions in GOLD])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [  # as Stanford's tokenizer splits them and the evaluation server drops marks
        (
            "A man's red-haired dog doesn't eat, it's 3.5 lbs and 1,000 people!",
            "a man 's red-haired dog does n't eat it 's 3.5 lbs and 1,000 people",
        ),
        ('Two dogs (brown & white) on a "sofa"...', "two dogs -lrb- brown & white -rrb- on a sofa"),
        ("A cannot sign and/or 'quoted' text; gonna go.", "a can not sign and/or quoted text gon na go"),
        ("U.S. flag at 2:50 pm. The dogs' bowl", "u.s. flag at 2:50 pm the dogs bowl"),
        ("a $5.00 bill, 50% off #1", "a $ 5.00 bill 50 % off # 1"),
        ("Mr. Smith’s car — “another” T-shirt.", "mr. smith 's car another t-shirt"),
        ("", ""),
    ],
)
def test_captions_are_split_as_the_evaluation_server_does(caption, expected):
    assert " ".join(words(caption)) == expected


@FEW
@given(st.sampled_from(sorted(set(KINDS) - {"caption"})), TEXT | st.sampled_from(["yes", "A", "cat"]))
def test_scores_lie_between_0_and_1(kind, response):
    rows = [question(*answers, choices=["cat", "dog"]) for answers in (["yes"], ["A"], ["cat", "cat", "dog"])]
    assert all(0 <= value <= 1 for value in KINDS[kind].score([response] * 3, rows))


def test_a_quick_import():
    """`snakemake -n` imports the package: no numpy, no pyarrow."""
    import subprocess

    code = "import sys, surf.tasks; print(sorted({'numpy', 'pyarrow', 'PIL', 'sacrebleu', 'rapidfuzz'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
