"""POPE rules against their published behaviour, intervals, the image-blind line, boxes, short answers, option letters."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surf import intervals, metrics

# What one answer does under each rule: (correct, tp, fp, fn) for a yes question, then for a no question.
YES = ((1, 1, 0, 0), (0, 0, 1, 0))
NO = ((0, 0, 0, 1), (1, 0, 0, 0))
MISS = ((0, 0, 0, 1), (0, 0, 0, 0))  # unparsed: a false negative, else nothing
LOST = ((0, 0, 0, 0), (0, 0, 0, 0))  # lmms-eval: unparsed is no false negative either
EITHER = ((1, 1, 0, 0), (1, 0, 0, 0))  # surf-released: right whatever the label
NEITHER = ((0, 0, 0, 1), (0, 0, 1, 0))  # surf-released: wrong whatever the label
EFFECTS = {
    #                                surf  official lmms-eval vlmevalkit surf-released
    "Yes": (YES, YES, YES, YES, YES),
    "No": (NO, NO, NO, NO, NO),
    "Yes.": (YES, YES, LOST, YES, YES),
    "No.": (NO, NO, LOST, NO, NO),
    "NO": (NO, YES, NO, NO, NO),
    " yes\n": (YES, YES, YES, YES, YES),
    "no\nThere is a table.": (NO, YES, LOST, NO, NO),
    "I am not sure": (MISS, NO, LOST, MISS, NO),
    "It is unknown": (MISS, YES, LOST, MISS, NO),
    "None": (MISS, YES, LOST, MISS, NO),
    "Nope": (MISS, YES, LOST, MISS, NO),
    "nothing": (MISS, YES, LOST, MISS, NO),
    "Snowboard": (MISS, YES, LOST, MISS, NO),
    "There isn't a dog.": (MISS, YES, LOST, MISS, NEITHER),
    "yes, but not a cat": (YES, NO, LOST, YES, EITHER),
    "": (MISS, YES, LOST, MISS, NEITHER),
    "I cannot see": (MISS, YES, LOST, MISS, NO),
    "yes and no": (MISS, NO, LOST, MISS, EITHER),
    "yes/no": (MISS, YES, LOST, MISS, EITHER),  # one word for POPE's own script
    "yes,no, well": (MISS, YES, LOST, MISS, EITHER),  # VLMEvalKit glues it into "yesno"
    "yes,it is, surely": (YES, YES, LOST, MISS, YES),  # and this into "yesit"
    "Well. No": (NO, YES, LOST, NO, NO),  # POPE's own script stops at the first full stop
}


@pytest.mark.parametrize("answer", EFFECTS)
@pytest.mark.parametrize("rule", metrics.RULES)
def test_effect_of_single_answers(rule, answer):
    expected = EFFECTS[answer][list(metrics.RULES).index(rule)]
    counts = metrics.outcomes(rule, [answer, answer], [True, False])
    assert [tuple(row) for row in counts[:, 1:5].tolist()] == list(expected)
    assert counts[:, 0].tolist() == [1, 1]
    assert counts[:, 6].tolist() == [int(expected in (MISS, LOST))] * 2


def test_lmms_eval_takes_its_yes_ratio_from_the_labels():
    counts = metrics.outcomes("lmms-eval", ["no"] * 4, [True, True, True, False])
    assert metrics.rates(counts.sum(axis=0))[4] == 0.75
    assert metrics.rates(metrics.outcomes("surf", ["no"] * 4, [True] * 4).sum(axis=0))[4] == 0.0


def test_the_labels_may_be_numpy_booleans():
    counts = metrics.outcomes("surf", ["yes", "no"], np.array([True, False]))
    assert counts[:, 1].tolist() == [1, 1]


def slow_words(answer):
    """Letters and digits that stand together, letter by letter."""
    words = [""]
    for letter in answer.lower():
        if letter.isalnum():
            words[-1] += letter
        else:
            words.append("")
    return words


def slow_vlmevalkit_words(answer):
    """VLMEvalKit's punctuation, letter by letter: a mark with a blank beside it anywhere, or any number with a comma in it,
    deletes the mark everywhere; else it becomes a blank. Full stops go, but not before a digit."""
    text = answer.lower()
    thousands = any(a.isdigit() and b == "," and c.isdigit() for a, b, c in zip(text, text[1:], text[2:], strict=False))
    out, stops = "", 0
    for letter in text:
        if letter in ';/[]"{}()=+\\_-><@`,?!':
            if not thousands and f"{letter} " not in text and f" {letter}" not in text:
                out += " "
        else:
            out += letter
    kept = ""
    for place, letter in enumerate(out):
        if letter == "." and stops < 32 and not out[place + 1 : place + 2].isdigit():
            stops += 1
        else:
            kept += letter
    return kept.split()


def plain_scores(rule, answers, labels):
    """The five scripts once more, slowly: dictionary of metrics."""
    tp = fp = fn = right = yes = unparsed = 0
    for answer, label in zip(answers, labels, strict=True):
        if rule == "official":
            head = answer[: answer.index(".")] if "." in answer else answer
            said = "no" if any(word in ("No", "no", "not") for word in head.replace(",", "").split(" ")) else "yes"
        elif rule == "lmms-eval":
            said = answer.strip().lower() if answer.strip().lower() in ("yes", "no") else None
        elif rule == "surf-released":
            if label:
                said = "yes" if answer.lower().find("yes") >= 0 else "no"
            else:
                said = "no" if answer.lower().find("no") >= 0 else "yes"
        else:
            tokens = slow_words(answer) if rule == "surf" else slow_vlmevalkit_words(answer)
            said = None if ("yes" in tokens) == ("no" in tokens) else "yes" if "yes" in tokens else "no"
        gold = "yes" if label else "no"
        right += said == gold
        tp += said == "yes" and label
        fp += said == "yes" and not label
        fn += label and (said == "no" or (said is None and rule != "lmms-eval"))
        yes += label if rule == "lmms-eval" else said == "yes"
        unparsed += said is None
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return [right / len(answers), precision, recall, f1, yes / len(answers), unparsed / len(answers)]


# answers like "Yes, there's no dog.": words, stuck together by whatever may stand between words
PIECES = ["yes", "Yes", "YES", "no", "No", "NO", "not", "none", "yesno", "snow", "dog", "isn't", "1,000", "3.5", "7"]
MARKS = ["", " ", "  ", ".", ". ", ",", ", ", " ,", "\n", "-", " - ", "/", "_", "!", "?", ";", ": ", "(", ") ", "'", '"', "\t"]
TEXTS = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(MARKS)), max_size=5).map(
    lambda pairs: "".join(part for pair in pairs for part in pair)
)
ANSWERS = st.lists(st.tuples(st.one_of(TEXTS, TEXTS, st.text(max_size=12)), st.booleans()), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(ANSWERS)
def test_rates_agree_with_a_slow_implementation(rows):
    answers, labels = [answer for answer, _ in rows], [label for _, label in rows]
    for rule in metrics.RULES:
        found = metrics.summary([(metrics.outcomes(rule, answers, labels), ["one image"] * len(rows))])
        assert [found[name].value for name in metrics.METRICS] == pytest.approx(plain_scores(rule, answers, labels))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_every_rule_reads_every_text(answer):
    for rule in metrics.RULES:
        counts = metrics.outcomes(rule, [answer] * 2, [True, False])
        assert set(np.unique(counts)) <= {0, 1}


# --- intervals --------------------------------------------------------------------------------------------------------


def sample(images=60, share=0.8, seed=0):
    rng = random.Random(seed)
    names = [f"{number}.jpg" for number in range(images) for _ in range(6)]
    labels = [number % 2 == 0 for number in range(len(names))]
    answers = ["yes" if label == (rng.random() < share) else "no" for label in labels]
    return metrics.outcomes("surf", answers, labels), names


def test_bootstrap_agrees_with_drawing_images_one_by_one():
    counts, names = sample(images=20)
    found = metrics.summary([(counts, names)], resamples=4000)["accuracy"]
    rng = random.Random(1)
    by_image = [counts[6 * number : 6 * number + 6] for number in range(20)]
    slow = []
    for _ in range(4000):
        drawn = np.concatenate([by_image[rng.randrange(20)] for _ in range(20)])
        slow.append(drawn[:, 1].sum() / drawn[:, 0].sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.012)
    assert found.low < found.value < found.high


def test_bootstrap_does_not_depend_on_row_order_but_on_the_seed():
    counts, names = sample()
    order = np.random.default_rng(3).permutation(len(names))
    once = metrics.bootstrap([(counts, names)], 50, seed=1)
    again = metrics.bootstrap([(counts[order], [names[row] for row in order])], 50, seed=1)
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, metrics.bootstrap([(counts, names)], 50, seed=2))


def test_bootstrap_in_blocks_draws_every_resample_anew(monkeypatch):
    monkeypatch.setattr(intervals, "BLOCK", 60 * 10)  # ten resamples a block
    drawn = metrics.bootstrap([sample()], 35)
    assert drawn.shape == (35, 6)
    assert len(np.unique(drawn[:, 0])) > 15


def test_answers_that_hang_together_widen_the_interval():
    names = [f"{number}.jpg" for number in range(50) for _ in range(6)]
    labels = [True, False] * 150
    lumped = ["yes" if label == (number // 6 % 5 > 0) else "no" for number, label in enumerate(labels)]
    spread = ["yes" if label == (number % 5 > 0) else "no" for number, label in enumerate(labels)]
    width = {}
    for kind, answers in (("lumped", lumped), ("spread", spread)):
        found = metrics.summary([(metrics.outcomes("surf", answers, labels), names)])["accuracy"]
        assert found.value == pytest.approx(0.8)
        width[kind] = found.high - found.low
    assert width["lumped"] > 1.8 * width["spread"]


def test_one_image_has_no_interval():
    counts = metrics.outcomes("surf", ["yes", "no"], [True, True])
    assert metrics.summary([(counts, ["a", "a"])])["accuracy"] == (0.5, None, None)


def test_mean_over_splits():
    a, b = sample(share=0.9), sample(share=0.6, seed=5)
    both, one, other = (metrics.summary(parts) for parts in ([a, b], [a], [b]))
    for name in metrics.METRICS:
        assert both[name].value == pytest.approx((one[name].value + other[name].value) / 2)
    assert both["accuracy"].high - both["accuracy"].low < one["accuracy"].high - one["accuracy"].low + 0.03


def test_paired_difference():
    better, worse = sample(share=0.9), sample(share=0.6, seed=5)
    found = metrics.difference([better], [worse])["accuracy"]
    assert found.value == pytest.approx(better[0][:, 1].mean() - worse[0][:, 1].mean())
    assert 0 < found.low < found.value < found.high
    assert metrics.difference([better], [better])["f1"] == (0.0, 0.0, 0.0)


# --- image-blind ------------------------------------------------------------------------------------------------------


def test_blind_uses_other_images_only_and_says_no_in_doubt():
    rows = [
        ("a.jpg", "Is there a dog in the image?", True),
        ("b.jpg", "Is there a dog in the imange?", True),
        ("c.jpg", "is there a DOG in the image?", False),
        ("c.jpg", "Is there an apple in the image?", True),
        ("a.jpg", "Is there a dining table in the image?", True),
        ("a.jpg", "Is there a dining table in the image?", True),
    ]
    found = metrics.blind([row[1] for row in rows], [row[2] for row in rows], [row[0] for row in rows])
    # a, b: one yes and one no elsewhere is a tie; c: two yes; apple: asked once; dining table: only on its own image
    assert found == [False, False, True, False, False, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a cat", "an owl"]), st.booleans()), max_size=15))
def test_blind_against_a_slow_implementation(rows):
    slow = []
    for image, thing, _ in rows:
        others = [label for other, what, label in rows if what == thing and other != image]
        slow.append(sum(others) > len(others) / 2)
    texts = [f"Is there {thing} in the image?" for _, thing, _ in rows]
    assert metrics.blind(texts, [row[2] for row in rows], [row[0] for row in rows]) == slow


# --- boxes ------------------------------------------------------------------------------------------------------------

CORNERS = st.tuples(*[st.floats(0, 1, width=16)] * 4)


def as_text(corners):
    return "[" + ", ".join(f"{value:.6f}" for value in corners) + "]"


@given(CORNERS, CORNERS)
def test_iou_is_symmetric_and_bounded(a, b):
    value = metrics.iou(as_text(a), as_text(b))
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(metrics.iou(as_text(b), as_text(a)))
    area = abs(float(f"{a[2]:.6f}") - float(f"{a[0]:.6f}")) * abs(float(f"{a[3]:.6f}") - float(f"{a[1]:.6f}"))
    assert metrics.iou(as_text(a), as_text(a)) == (pytest.approx(1.0) if area > 0 else 0.0)


@given(st.tuples(*[st.integers(0, 8)] * 4), st.tuples(*[st.integers(0, 8)] * 4))
def test_iou_against_counting_cells(a, b):
    def cells(box):
        xs, ys = sorted((box[0], box[2])), sorted((box[1], box[3]))
        return {(x, y) for x in range(*xs) for y in range(*ys)}

    union = cells(a) | cells(b)
    assert metrics.iou(str(list(a)), str(list(b))) == pytest.approx(len(cells(a) & cells(b)) / len(union) if union else 0.0)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("The dog is at [0.1,0.2,0.3,0.4].", (0.1, 0.2, 0.3, 0.4)),
        ("0.1, 0.2, 0.3, 0.4", (0.1, 0.2, 0.3, 0.4)),
        ("[.5, .6, .1, .2]", (0.1, 0.2, 0.5, 0.6)),
        ("[0, 0, 1, 1] or [0.5, 0.5, 1, 1]", (0.0, 0.0, 1.0, 1.0)),
        ("[0.1, 0.2, 0.3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[a, b, c, d]", None),
        ("", None),
    ],
)
def test_box(text, box):
    assert metrics.box(text) == box


def test_iou_of_absurd_numbers_is_zero():
    huge = "[0, 0, " + "9" * 400 + ", 1]"
    assert metrics.iou(huge, huge) == 0.0
    assert metrics.iou("no box", "[0, 0, 1, 1]") == 0.0


# --- short answers, letters -------------------------------------------------------------------------------------------

MATCH = [
    ("dog", "dog"), ("A dog.", "dog"), ("It is a brown dog", "dog"), ("two", "2"), ("2", "two"), ("Yes.", "yes"),
    ("No, there is no dog", "no"), ("1,000", "1000"), ("Coca-Cola", "coca cola"), ("none", "0"), ("3 dogs", "3"),
    ("the", "The"), ("+", "+"), ("no parking", "No Parking"), ("it says no parking", "no parking"),
    ("don’t walk", "don't walk"),
]  # fmt: skip
NO_MATCH = [
    ("", "no"), ("I do not know", "no"), ("woman", "man"), ("man", "woman"), ("10", "1"), ("1", "10"), ("A", "cat"),
    ("cat", "A"), ("", ""), ("dog", ""), ("not a dog", "dog"), ("It isn't a dog", "dog"), ("dog or cat", "dog"),
    ("2 dogs and 1 cat", "1"), ("-5", "5"), ("1.5", "1"), ("yes and no", "yes"), ("+", "-"), ("dog", "brown dog"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "gold"), MATCH)
def test_short_answers_that_match(response, gold):
    assert metrics.short_match(response, gold)


@pytest.mark.parametrize(("response", "gold"), NO_MATCH)
def test_short_answers_that_do_not_match(response, gold):
    assert not metrics.short_match(response, gold)


@given(
    st.lists(st.sampled_from(["red", "dog", "7", "left", "stop"]), min_size=1, max_size=4), st.sampled_from(["", ".", "!", " "])
)
def test_an_answer_matches_itself_in_any_case_and_never_inside_a_word(words, end):
    text = " ".join(words)
    assert metrics.short_match(text.upper() + end, text)
    assert not metrics.short_match("x".join(["", *words, ""]).replace(" ", ""), text)


LETTERS = {
    "B": "B", "b.": "B", "(B)": "B", "B. dog": "B", "(B) dog": "B", "B) dog": "B", "(b) dog": "B", "B: dog": "B",
    "The answer is B": "B", "The correct answer is (B) dog": "B", "Answer: B": "B", "Option B": "B", "B is correct": "B",
    "The answer is B because of its tail": "B", "**B**": "B", "B\ndog": "B", "The answer is\nB": "B", "I": "I",
    "A dog": None, "The answer is a dog": None, "The answer is A dog": None, "A or B": None, "A. cat B. dog": None,
    "": None, "cat": None, "I do not know": None, "The answer is not B": None, "1": None,
}  # fmt: skip


@pytest.mark.parametrize("text", LETTERS)
def test_letter(text):
    assert metrics.letter(text) == LETTERS[text]


@given(st.sampled_from("ABCDEFGH"), st.sampled_from(["{}", "{}.", "({})", "({}) it", "The answer is {}.", "{}. a thing"]))
def test_letter_is_found_in_every_usual_form(letter, form):
    assert metrics.letter(form.format(letter)) == letter


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("B. dog", "B", True),
        ("(b)", "B.", True),
        ("A", "B", False),
        ("cat", "A", False),
        ("", "A", False),
        ("A cat", "cat", True),
        ("A", "cat", False),
    ],
)
def test_choice(response, gold, right):
    assert metrics.choice_match(response, gold) is right
