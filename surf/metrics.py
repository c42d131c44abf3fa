"""Scoring rules as pure functions: POPE under five published rules, intervals, the image-blind line, boxes, short answers.

Nothing here opens a file. Every POPE rule is written anew from its published behaviour:

    surf           ours, the headline: "yes" or "no" as a word, whichever stands alone; anything else is unparsed and wrong
    official       AoiDragon/POPE evaluate.py, and the same in LLaVA's llava/eval/eval_pope.py
    lmms-eval      lmms_eval/tasks/pope/utils.py
    vlmevalkit     vlmeval/dataset/utils/yorn.py (without its optional judge model)
    surf-released  eval/eval_pope.py of the original SURf release; it looks at the label, so its numbers are no measurement
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from surf import intervals
from surf.intervals import Estimate, percentiles

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed")
HEADLINE = "surf"

_COUNTS = ("questions", "correct", "tp", "fp", "fn", "yes", "unparsed")  # columns of `outcomes`


# --- POPE: one answer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How a published script turns answers into counts.

    Args:
        parse: (answer, label) to the prediction, None for unparsed. Only surf-released looks at the label.
        unparsed_is_miss: an unparsed answer to a yes question counts as a false negative.
        yes_from_labels: the yes ratio is that of the labels, as lmms-eval reports it: a constant.
    """

    parse: Callable[[str, bool], bool | None]
    unparsed_is_miss: bool = True
    yes_from_labels: bool = False


def verdict(answer: str) -> bool | None:
    """True for yes, False for no, None if the answer holds neither or both as words. Case does not matter."""
    words = set(re.findall(r"[^\W_]+", answer.lower()))
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def _official(answer: str, label: bool) -> bool:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _lmms_eval(answer: str, label: bool) -> bool | None:
    return {"yes": True, "no": False}.get(answer.lower().strip())


def _vlmevalkit(answer: str, label: bool) -> bool | None:
    text = bare = answer.lower()
    grouped = re.search(r"\d,\d", text) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        # a mark that touches a blank anywhere is deleted everywhere, so "yes,no, I think" has neither word
        glue = grouped or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if glue else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", bare, count=32).split()  # 32: the script passes a flag in the count's place
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def _surf_released(answer: str, label: bool) -> bool:
    text = answer.lower().strip()
    return "yes" in text if label else "no" not in text


RULES: dict[str, Rule] = {
    "surf": Rule(lambda answer, label: verdict(answer)),
    "official": Rule(_official),
    "lmms-eval": Rule(_lmms_eval, unparsed_is_miss=False, yes_from_labels=True),
    "vlmevalkit": Rule(_vlmevalkit),
    "surf-released": Rule(_surf_released),
}


# --- POPE: many answers -----------------------------------------------------------------------------------------------


def outcomes(rule: str, answers: Sequence[str], labels: Sequence[bool]) -> np.ndarray:
    """What each answer adds to the counts of `rule` (a key of `RULES`).

    Unparsed answers are wrong in the accuracy; on a no question they are neither false positive nor true negative.
    VLMEvalKit reports no yes ratio; it gets the share of answers that it reads as yes.

    Returns:
        int64 [answers, 7]: questions (1), correct, tp, fp, fn, yes, unparsed; each 0 or 1.
    """
    how = RULES[rule]
    counts = np.zeros((len(answers), len(_COUNTS)), dtype=np.int64)
    for row, (answer, label) in enumerate(zip(answers, labels, strict=True)):
        label = bool(label)  # numpy's own booleans are not Python's
        found = how.parse(answer, label)
        counts[row] = (
            1,
            found is label,
            label and found is True,
            not label and found is True,
            label and (found is False or (found is None and how.unparsed_is_miss)),
            label if how.yes_from_labels else found is True,
            found is None,
        )
    return counts


def rates(counts: np.ndarray) -> np.ndarray:
    """`METRICS` from summed counts: float64 [..., 6] from [..., 7]. A division by zero gives 0.0, as in lmms-eval."""
    questions, correct, tp, fp, fn, yes, unparsed = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    f1 = _ratio(2 * precision * recall, precision + recall)
    shares = [_ratio(correct, questions), precision, recall, f1, _ratio(yes, questions), _ratio(unparsed, questions)]
    return np.stack(shares, axis=-1)


Part = tuple[np.ndarray, Sequence[str]]  # outcomes [answers, 7], and the image of each answer


def summary(parts: Sequence[Part], resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
    """Each of `METRICS` with its 95 % interval; of several parts (splits) the plain mean over the parts."""
    values = np.mean([rates(counts.sum(axis=0)) for counts, _ in parts], axis=0)
    drawn = bootstrap(parts, resamples, seed)
    return {name: percentiles(float(values[column]), drawn[:, column]) for column, name in enumerate(METRICS)}


def difference(a: Sequence[Part], b: Sequence[Part], resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
    """`a` minus `b` in each of `METRICS`. Both see the same resampled images: the interval is that of paired runs.

    Args:
        a, b: parts over the same images; the caller makes sure of that.
    """
    values = [np.mean([rates(counts.sum(axis=0)) for counts, _ in parts], axis=0) for parts in (a, b)]
    drawn = bootstrap(a, resamples, seed) - bootstrap(b, resamples, seed)
    delta = values[0] - values[1]
    return {name: percentiles(float(delta[column]), drawn[:, column]) for column, name in enumerate(METRICS)}


def bootstrap(parts: Sequence[Part], resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """`METRICS` of resampled images: float64 [resamples, 6], means over the parts; no rows if there is but one image.

    A cluster bootstrap (Cameron, Gelbach and Miller 2008): POPE asks six questions about an image and their errors hang
    together, so whole images are drawn with replacement, with all their questions in all parts. The draws depend on the
    seed and the set of images alone, so two methods over one set of images are resampled alike.
    """
    names = sorted({image for _, images in parts for image in images})
    if len(names) < 2:
        return np.zeros((0, len(METRICS)))
    place = {name: number for number, name in enumerate(names)}
    sums = np.zeros((len(parts), len(names), len(_COUNTS)))
    for part, (counts, images) in zip(sums, parts, strict=True):
        np.add.at(part, [place[image] for image in images], counts)
    block = max(1, intervals.BLOCK // len(names))
    starts = range(0, resamples, block)
    drawn = [
        rates(intervals.draw(len(names), min(block, resamples - start), seed, start) @ sums).mean(axis=0) for start in starts
    ]
    return np.concatenate(drawn)


def blind(questions: Sequence[str], labels: Sequence[bool], images: Sequence[str]) -> list[bool]:
    """Predictions that see no pixel: the commonest label of the same object over all OTHER images of the file.

    A tie, or an object that no other image is asked about, gives no. On the MS-COCO files this line reaches accuracies of
    .675 (random), .869 (popular) and .691 (adversarial): what a method gains above it is what it sees.
    """
    keys = [asked_object(question) for question in questions]
    balance: Counter[str] = Counter()
    own: Counter[tuple[str, str]] = Counter()
    for key, label, image in zip(keys, labels, images, strict=True):
        balance[key] += 1 if label else -1
        own[key, image] += 1 if label else -1
    return [balance[key] - own[key, image] > 0 for key, image in zip(keys, images, strict=True)]


def asked_object(question: str) -> str:
    """What a question asks for: `Is there a dining table in the image?` asks for a dining table; else the whole question."""
    text = " ".join(question.lower().split())
    match = re.match(r"(?:is|are) there (?:an? |the |any )?(.+?)(?: in (?:the|this) \w+)?\W*$", text)
    return match[1] if match else text


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0)


# --- boxes ------------------------------------------------------------------------------------------------------------

_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"
_LIST = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*,\s*{_NUMBER})*(?!\w)")


def box(text: str) -> tuple[float, float, float, float] | None:
    """The first box `[x1, y1, x2, y2]` of a text, in the text's own units, or None. Corners are put in order."""
    lists = (match[0].split(",") for match in _LIST.finditer(text))
    corners = next((numbers for numbers in lists if len(numbers) == 4), None)
    if corners is None:
        return None
    x1, y1, x2, y2 = map(float, corners)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def iou(response: str, gold: str) -> float:
    """Intersection over union, in [0, 1], of the first boxes of two texts; 0.0 without a box or an area."""
    a, b = box(response), box(gold)
    if a is None or b is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    value = shared / union if union > 0 else 0.0
    return min(value, 1.0) if math.isfinite(value) else 0.0


# --- short answers and choices ----------------------------------------------------------------------------------------

_ARTICLES = {"a", "an", "the"}
# Number words as in the VQA evaluation (Antol et al. 2015), which also reads "none" as 0.
_NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"} | {
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_WORD = re.compile(r"(?<!\w)-?\d+(?:\.\d+)?(?!\w)|[^\W_]+(?:'[^\W_]+)*")
_NEGATIONS = {"no", "not", "never", "neither", "nor", "without", "cannot"}


def words(text: str) -> list[str]:
    """The words of a short answer, normalised as in the VQA evaluation: lower case, no punctuation, no articles, digits.

    A text of nothing but articles keeps them, so that the answer "A" stays one.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    found = _WORD.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    found = [_NUMBER_WORDS.get(word, word) for word in found]
    return [word for word in found if word not in _ARTICLES] or found


def short_match(response: str, gold: str) -> bool:
    """Does the response give the gold answer, as whole words?

    The gold words must stand side by side in the response. Never the other way round, and never inside words: "woman" is
    no "man", "10" no "1", an empty answer nothing. Yes and no are judged by `verdict`. A response that negates ("not a
    dog"), hedges ("dog or cat") or counts otherwise ("2 or 3", gold 3) does not match unless the gold does the same.
    """
    said, wanted = words(response), words(gold)
    if not wanted:  # punctuation alone, as OCR answers may be
        return bool(gold.strip()) and response.strip() == gold.strip()
    if said == wanted:
        return True
    if wanted in (["yes"], ["no"]):
        return verdict(response) is (wanted == ["yes"])
    if _hedges(said) - _hedges(wanted):
        return False
    if len(wanted) == 1 and _is_number(wanted[0]) and {word for word in said if _is_number(word)} != set(wanted):
        return False
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


def choice_match(response: str, gold: str) -> bool:
    """Do both name the same option? A gold answer that is no letter is matched as a short answer."""
    wanted = letter(gold)
    return short_match(response, gold) if wanted is None else letter(response) == wanted


_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LETTER = [
    re.compile(r"(?:^|[\s,;])[(\[*\"']*([A-Z])(?=[.:](?:\s|$))"),  # B. dog
    re.compile(r"(?:^|[\s,;])[(\[*\"']*([A-Za-z])(?=[)\]])"),  # (b) dog
    re.compile(r"(?m)^[*\"']*([A-Z])[*\"']*$"),  # B on a line of its own
    re.compile(r"^[*\"']*([A-Z])[*\"']* is\b"),  # B is correct
    re.compile(  # the answer is B; an A or I before another word is no letter but an article or a pronoun
        r"\b(?i:answer|option|choice|letter)\b(?: is|:)?(?: (?i:option|choice|letter))? ?"
        r"[(\[*\"']*((?![AI] \w)[A-Z])\b(?!'\w)"
    ),
]


def letter(text: str) -> str | None:
    """The option letter that an answer names, or None if it names none or several.

    Read as B: `B`, `b.`, `(B)`, `B. dog`, `B) dog`, `B: dog`, `The answer is B.`, `Option B`, `B is correct`. The article
    in `A dog` is no letter, nor is the one in `The answer is a dog`.
    """
    text = "\n".join(" ".join(line.split()) for line in text.strip().splitlines())
    alone = _ALONE.fullmatch(text)
    if alone:
        return alone[1].upper()
    found = {match[1].upper() for pattern in _LETTER for match in pattern.finditer(text)}
    return found.pop() if len(found) == 1 else None


def _hedges(said: Sequence[str]) -> set[str]:
    found = {word for word in said if word == "or"}
    if any(word in _NEGATIONS or word.endswith("n't") for word in said):
        found.add("not")
    return found


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?", word) is not None
