"""What the answers of all methods to one task are worth: measures with intervals, as rows of `evidence/measures`.

    measure     what it is                                                                   against
    score       mean score of the questions                                                  –
    rescue      share of the questions that `against` gets wrong and the method right        zero-shot
    harm        share of the questions that `against` gets right and the method wrong        zero-shot
    difference  mean score minus that of `against`, paired; p by McNemar's exact test        zero-shot, vanilla, sweep's base
    changed     share of all questions of which one of the two is right and the other wrong  a sweep's base
    references  mean number of references in the prompt                                      –
    others      the task's own numbers of the whole (`Task.metrics`)                         –

A question is right if its score is at least 0.5; captions are neither right nor wrong, and have no rescue, harm, changed or p.
Two lines stand beside the methods: `image-blind` answers by what is mostly
true of the same question on other images, `chance` guesses.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surf import intervals, metrics
from surf.errors import SurfError
from surf.methods import Method
from surf.shards import stable_hash
from surf.tasks import KINDS

BLIND, CHANCE = "image-blind", "chance"
ALL = "all"
RIGHT = 0.5
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Answers of one method to one task. `how` is None for image-blind."""

    method: str
    how: Method | None
    responses: Sequence[str]
    scores: np.ndarray  # float64 [questions], in [0, 1]
    references: np.ndarray  # int64 [questions], number in the prompt

    @property
    def right(self) -> np.ndarray:
        """bool [questions]."""
        return self.scores >= RIGHT


def runs_of(kind: str, answers: Mapping[str, tuple[Method, Sequence[Row]]], task: str) -> tuple[list[Row], list[Run]]:
    """The questions, and a run of every method and of image-blind.

    Args:
        answers: method: its definition and rows of `evaluate/answers`.

    Raises:
        SurfError: two methods answered different questions.
    """
    first, (_, questions) = next(iter(answers.items()))
    asked = {row["question_id"]: (row["image"], row["question"], row["answers"]) for row in questions}
    runs = []
    for method, (how, rows) in answers.items():
        if {row["question_id"]: (row["image"], row["question"], row["answers"]) for row in rows} != asked:
            raise SurfError(
                f"methods {first!r} and {method!r} answered different questions",
                where=f"task {task}",
                expected="one question file for all methods",
                next="run snakemake evidence again: one of the answers is older than the questions",
            )
        by_id = {row["question_id"]: row for row in rows}
        ordered = [by_id[row["question_id"]] for row in questions]
        shown = np.array([len(row["references"]) for row in ordered])
        runs.append(_run(kind, method, how, [row["response"] for row in ordered], questions, shown))
    guesses = blind(kind, questions)
    if guesses is not None:
        runs.append(_run(kind, BLIND, None, guesses, questions, np.zeros(len(questions), np.int64)))
    return list(questions), runs


def _run(kind: str, method: str, how: Method | None, said: list[str], questions: Sequence[Row], shown: np.ndarray) -> Run:
    scores = np.asarray(KINDS[kind].score(said, questions), np.float64)  # type: ignore[arg-type]
    return Run(method, how, said, scores, shown)


def blind(kind: str, questions: Sequence[Row]) -> list[str] | None:
    """Answers that see no image: the commonest one to the same question on other images of the split, else to any question.

    For a yes/no question about an object it is `metrics.blind`. None for kinds whose questions all look alike.
    """
    if kind not in ("pope", "vqa"):
        return None
    said: dict[str, str] = {}
    for rows in _by(questions, "split").values():
        if kind == "pope":
            labels = [row["answers"] == ["yes"] for row in rows]
            found = metrics.blind([row["question"] for row in rows], labels, [row["image"] for row in rows])
            said.update((row["question_id"], "yes" if yes else "no") for row, yes in zip(rows, found, strict=True))
            continue
        same: dict[str, Counter[str]] = defaultdict(Counter)
        own: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for row in rows:
            for key in (" ".join(row["question"].lower().split()), ""):
                same[key].update(row["answers"])
                own[key, row["image"]].update(row["answers"])
        for row in rows:
            keys = (" ".join(row["question"].lower().split()), "")
            left = next((some for key in keys if (some := same[key] - own[key, row["image"]])), Counter([""]))
            said[row["question_id"]] = min(left, key=lambda answer: (-left[answer], answer))
    return [said[row["question_id"]] for row in questions]


def balanced(kind: str, questions: Sequence[Row]) -> np.ndarray:
    """bool [questions]: a part of each split in which every object is there as often as not, so that any prior scores 50 %.

    Which questions stay is drawn by the hash of their ids. Only yes/no questions can be balanced: elsewhere none is chosen.
    """
    chosen: set[str] = set()
    if kind == "pope":
        groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for row in questions:
            groups[row["split"], metrics.asked_object(row["question"])][row["answers"][0]].append(row["question_id"])
        for by_label in groups.values():
            few = min(len(ids) for ids in by_label.values()) if len(by_label) == 2 else 0
            for ids in by_label.values():
                chosen.update(sorted(ids, key=lambda key: (stable_hash("balanced", key), key))[:few])
    return np.array([row["question_id"] in chosen for row in questions], bool)


def measure(
    task: str, kind: str, questions: Sequence[Row], runs: Sequence[Run], leaked: np.ndarray, resamples: int, seed: int
) -> list[Row]:
    """All rows of one task. `leaked`: bool [questions], the photograph is in the corpus too."""
    splits = {split: np.array([row["split"] == split for row in questions]) for split in _by(questions, "split")}
    everything = np.ones(len(questions), bool)
    parts = [(split, ALL, rows) for split, rows in splits.items()] if len(splits) > 1 else []
    parts += [(ALL, ALL, everything), (ALL, "leaked", leaked), (ALL, "unleaked", ~leaked)]
    parts += [(ALL, "balanced", balanced(kind, questions))]
    made = []
    for split, subset, rows in parts:
        if not rows.any() or (subset != ALL and rows.all()):
            continue
        place = {"task": task, "split": split, "subset": subset, "questions": int(rows.sum())}
        # on balanced questions a prior that leaves its own image out would always guess wrong
        shown = [run for run in runs if run.how or subset != "balanced"]
        made += [{**place, **one} for one in _paired(shown, rows, questions, kind != "caption", resamples, seed)]
        asked = [row for row, of in zip(questions, rows, strict=True) if of]
        chance = KINDS[kind].chance(asked)  # type: ignore[arg-type]
        if chance is not None:
            made.append({**place, "method": CHANCE, "measure": "score", "value": chance})
        if subset == ALL and kind != "pope":  # POPE has a table of its own, under five rules
            made += [{**place, **one} for run in shown for one in _own(kind, run, asked, rows)]
    return made


def _paired(
    runs: Sequence[Run], rows: np.ndarray, questions: Sequence[Row], judged: bool, resamples: int, seed: int
) -> list[Row]:
    """Measures that are ratios of sums over questions, of all runs at once: they share the draws. `judged`: right or wrong."""
    images = [row["image"] for row, of in zip(questions, rows, strict=True) if of]
    columns: list[tuple[Row, np.ndarray, np.ndarray]] = []
    one = np.ones(len(rows))
    zero, vanilla = baselines(runs)
    for run in runs:
        name = {"method": run.method}
        columns.append(({**name, "measure": "score"}, run.scores, one))
        if run.how is None:
            continue
        columns.append(({**name, "measure": "references"}, run.references.astype(float), one))
        if judged and zero is not None and run is not zero:
            against = {**name, "against": zero.method}
            columns.append(({**against, "measure": "rescue"}, (run.right & ~zero.right) * 1.0, ~zero.right * 1.0))
            columns.append(({**against, "measure": "harm"}, (~run.right & zero.right) * 1.0, zero.right * 1.0))
        base = next((other for other in runs if other.method == run.method.partition("@")[0] and other is not run), None)
        if judged and base is not None:
            columns.append(({**name, "against": base.method, "measure": "changed"}, (run.right != base.right) * 1.0, one))
        for other in {id(o): o for o in (zero, vanilla, base) if o is not None and o is not run}.values():
            changes = run.right.astype(int)[rows] - other.right.astype(int)[rows]
            p = intervals.mcnemar(changes, images) if judged else None
            about = {**name, "against": other.method, "measure": "difference", "p": p}
            columns.append((about, run.scores - other.scores, one))
    tops = np.stack([top[rows] for _, top, _ in columns], axis=1)
    bottoms = np.stack([bottom[rows] for _, _, bottom in columns], axis=1)
    found = intervals.ratios(tops, bottoms, images, resamples, seed)
    rated = zip(columns, found, strict=True)
    return [{**about, **estimate._asdict()} for (about, _, _), estimate in rated if np.isfinite(estimate.value)]


def _own(kind: str, run: Run, asked: Sequence[Row], rows: np.ndarray) -> list[Row]:
    """The task's own numbers."""
    said = [text for text, of in zip(run.responses, rows, strict=True) if of]

    def some(numbers: np.ndarray) -> dict[str, float]:
        return KINDS[kind].metrics([said[i] for i in numbers], [asked[i] for i in numbers])

    found = intervals.jackknife(some, [row["image"] for row in asked])
    return [{"method": run.method, "measure": name, **value._asdict()} for name, value in found.items()]


def baselines(runs: Sequence[Run]) -> tuple[Run | None, Run | None]:
    """The zero-shot run and the vanilla RAG run, by what they do: the base model alone, and with retrieved references."""
    plain = [run for run in runs if run.how and run.how.model == "base" and run.how.plain()]
    zero = next((run for run in plain if run.how and not run.how.references), None)
    return zero, next((run for run in plain if run.how and run.how.references), None)


def random_twin(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run of the same model with as many random references, shown the same way."""
    if run.how is None or not run.how.references or run.how.source == "random":
        return None
    twin = Method(model=run.how.model, references=run.how.references, source="random", show=run.how.show)
    return next((other for other in runs if other.how == twin), None)


def _by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups
