"""Judge answers against the gold answers of their rounds.

    python -m surf.score --rounds ROUNDS_PART --responses ANSWERS_PART --dataset answers --out SCORES_PART --score.iou 0.5

One judge is used twice: on the first answers it finds the wrong ones, on the re-answers it labels the references. `reanswer`
and `pair` use `judge` and `label` as functions.

    task            metric      score                     correct
    choice, short   match       1.0 or 0.0                score is 1.0
    box             iou         intersection over union   score >= score.iou
    caption, open   bertscore   F1                        True from score.right_above, False below score.wrong_below, else null
    any, loglik     loglik      answer's gold_loglik      as above, by the answer's text
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from surf import cli, config, metrics, store
from surf.bertscore import BertScore
from surf.errors import SurfError
from surf.telemetry import Clock

log = logging.getLogger("surf")

# (candidates, references) to F1 of each pair, float32 [pairs]
Scorer = Callable[[Sequence[str], Sequence[str]], np.ndarray]


class Judgement(NamedTuple):
    """How one answer was judged; see the table above. `correct` is None where it is undecided."""

    metric: str
    score: float
    correct: bool | None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the stage."""
    args = cli.parse(
        argv,
        prog="score",
        about="Judge answers against the gold answers of their rounds.",
        sections=["score"],
        paths=["rounds", "responses", "out"],
        extras={"dataset": {"choices": ["answers", "reanswers"], "required": True, "help": "what --responses holds"}},
    )
    clock = Clock()
    rounds = store.read_table(args.rounds, "rounds", ["round_id", "answer", "task"])
    responses = store.read_table(args.responses, args.dataset)
    bert = scorer(args.score, progress=True)
    texts = {row["round_id"] for row in store.rows(rounds) if row["task"] in ("caption", "open")}
    if any(row["round_id"] in texts and row["response"].strip() for row in store.rows(responses)):
        bert(["text"], ["text"])  # loads the encoder
    clock.loaded()
    table = score(rounds, responses, args.score, bert, where=str(args.responses))
    meta = {"stage": "score", "version": args.score.version, "flags": cli.flags(score=args.score)}
    store.write_table(args.out, table, f"scores/{args.dataset}", meta)
    clock.note(args.out, table.num_rows)
    correct = table.column("correct").to_pylist()
    log.info(
        "%d answers: %d right, %d wrong, %d undecided",
        len(correct),
        correct.count(True),
        correct.count(False),
        correct.count(None),
    )


def scorer(options: config.Score, *, progress: bool = False) -> Scorer:
    """BERTScore as the config says. The encoder is loaded when the first text needs it, and never if none does."""
    bert = BertScore(options.bertscore_model, options.bertscore_layer)
    return lambda candidates, references: bert(candidates, references, progress=progress)


def score(
    rounds: pa.Table, responses: pa.Table, options: config.Score, scorer: Scorer, *, where: str = "responses"
) -> pa.Table:
    """Scores of all responses, in their order; joined to the rounds by round_id.

    Args:
        rounds: columns round_id, answer, task.
        responses: a table of dataset answers or reanswers.
        where: name of the responses in error messages.

    Raises:
        SurfError: a response belongs to no round; judge loglik without log-likelihoods.
    """
    golds = {row["round_id"]: (row["task"], row["answer"]) for row in rounds.to_pylist()}
    rows = store.rows(responses)
    strays = sorted({row["round_id"] for row in rows} - golds.keys())
    if strays:
        raise SurfError(
            f"{len(strays)} of its rounds are not among the rounds, the first is {strays[0]!r}",
            where=where,
            expected="answers to the rounds of the same part",
            next="check that --rounds and --responses name the same part",
        )
    judged = judge(
        [golds[row["round_id"]][0] for row in rows],
        [row["response"] for row in rows],
        [golds[row["round_id"]][1] for row in rows],
        options,
        scorer,
        [row["gold_loglik"] for row in rows],
    )
    out = [
        {"round_id": row["round_id"], "rank": row["rank"], **judgement._asdict()}
        for row, judgement in zip(rows, judged, strict=True)
    ]
    return store.table_of(out, "scores/answers")


def judge(
    tasks: Sequence[str],
    responses: Sequence[str],
    golds: Sequence[str],
    options: config.Score,
    scorer: Scorer,
    logliks: Sequence[float | None] = (),
) -> list[Judgement]:
    """Judge each response against its gold answer, by task; see the table above.

    Args:
        tasks: choice, short, box, caption or open, for each response.
        scorer: BERTScore F1 of text pairs; called once, and only if a caption or an open answer is among the responses.
        logliks: mean log-likelihood of each gold answer (nats a token); only judge loglik looks at it.

    Raises:
        SurfError: an unknown task; judge loglik and a response without log-likelihood.
    """
    judged = [Judgement("match", 0.0, False)] * len(tasks)
    texts = []
    for row, (task, response, gold) in enumerate(zip(tasks, responses, golds, strict=True)):
        if task in ("choice", "short"):
            right = (metrics.choice_match if task == "choice" else metrics.short_match)(response, gold)
            judged[row] = Judgement("match", float(right), right)
        elif task == "box":
            overlap = metrics.iou(response, gold)
            judged[row] = Judgement("iou", overlap, overlap >= options.iou and overlap > 0)
        elif task in ("caption", "open"):
            texts.append(row)
        else:
            raise SurfError(f"there is no task {task!r}", expected="choice, short, box, caption or open")
    if texts:
        values = scorer([responses[row] for row in texts], [golds[row] for row in texts])
        for row, value in zip(texts, (round(float(value), 6) for value in values), strict=True):  # 0.9 is not 0.89999998
            right_or_not = True if value >= options.right_above else False if value < options.wrong_below else None
            judged[row] = Judgement("bertscore", value, right_or_not)
    if options.judge == "loglik":
        known = [value for value in logliks if value is not None and math.isfinite(value)]
        if len(known) != len(judged):
            raise SurfError(
                f"judge loglik: {len(judged) - len(known)} of {len(judged)} responses have no gold_loglik",
                where="score.judge",
                expected="a log-likelihood with every response",
                next="set answer.gold_loglik to true and run snakemake again",
            )
        judged = [Judgement("loglik", value, kept.correct) for value, kept in zip(known, judged, strict=True)]
    return judged


def label(metric: str, score: float, correct: bool | None, base: float, right: bool, options: config.Score) -> bool | None:
    """Did a reference help? True: a positive reference, False: a negative one, None: undecided. See `labels`."""
    judged = np.array([-1 if correct is None else correct])
    (found,) = labels(np.array([metric]), np.array([score]), judged, base, right, options)
    return None if found < 0 else bool(found)


def labels(
    metrics: np.ndarray,
    scores: np.ndarray,
    correct: np.ndarray,
    bases: np.ndarray | float,
    right: np.ndarray | bool,
    options: config.Score,
) -> np.ndarray:
    """Which references helped: int8, 1 for a positive reference, 0 for a negative one, -1 where it is undecided.

    By match and iou a reference is positive if the answer with it is right, and negative if it is wrong. By bertscore and
    loglik it must gain, or lose, at least the margin; but where the answer without it was right by bertscore, there is
    little to gain, and it counts whether the answer with it is right.

    Args:
        metrics, scores, correct: judgements of the answers with a reference; correct is 1, 0, or -1 where undecided.
        bases, right: scores of the answers without a reference, by the same metric, and whether those were right.

    Raises:
        SurfError: a metric that is not in the table above.
    """
    verdicts = np.isin(metrics, ["match", "iou"])
    margins = np.select([metrics == "bertscore", metrics == "loglik"], [options.margin, options.loglik_margin], np.nan)
    unknown = ~verdicts & np.isnan(margins)
    if unknown.any():
        raise SurfError(f"there is no metric {str(metrics[unknown][0])!r}", expected="match, iou, bertscore or loglik")
    # scores are stored as float32: a gain of 0.01 must not fall short of a margin of 0.01 by the rounding
    gains = np.round(np.asarray(scores, np.float64) - bases, 6)
    found = np.full(len(metrics), -1, np.int8)
    found[(gains >= margins) & (gains > 0)] = 1
    found[(gains <= -margins) & (gains < 0)] = 0
    verdicts |= right & (metrics == "bertscore")
    found[verdicts] = np.asarray(correct, np.int8)[verdicts]
    return found


if __name__ == "__main__":
    cli.run(main)
