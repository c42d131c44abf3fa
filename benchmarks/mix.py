"""What `answers.py` and `engines.py` ask: rounds in the mix of LLaVA-1.5's training samples, and references for them.

The mix is that of the 665k samples (Liu et al. 2023, arXiv 2310.03744, table 7), less its texts without image. The table gives
samples. Rounds of a sample: VQAv2, GQA, OK-VQA and OCR-VQA from those datasets' own counts of questions and images; Visual
Genome 10 (ten annotations an image, same paper); one for A-OKVQA, TextCaps, details and reasoning; RefCOCO (below 10, same
paper) and LLaVA's conversations are set to 8 and 4. Lengths (tokens) of questions and answers are typical values of each kind,
set here, and so are the true answers, from which the stage guesses.

40 % of the rounds are wrong. A query image has 10 references with captions of 100 to 280 tokens (ShareGPT4V's are that long); a
reference is helpful with probability 0.3, and a round is left once a helpful and a misleading one are found.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import llava

from surf.prompts import Reference
from surf.shards import stable_hash

Row = dict[str, Any]

# kind: (samples in thousands, rounds of a sample, tokens of a question, tokens of an answer with its end)
MIX = {
    "conversation": (58, 4, 14, 60),
    "detail": (23, 1, 12, 100),
    "reasoning": (77, 1, 20, 100),
    "VQAv2": (83, 5, 18, 3),
    "GQA": (72, 13, 20, 3),
    "OK-VQA": (9, 1, 20, 3),
    "OCR-VQA": (80, 5, 18, 7),
    "A-OKVQA": (66, 1, 50, 2),
    "TextCaps": (22, 1, 30, 16),
    "RefCOCO": (48, 8, 30, 20),
    "Visual Genome": (86, 10, 35, 20),
}
LONGEST = 100  # tokens of an answer
WRONG, HELPFUL, REFERENCES = 0.4, 0.3, 10
TOKEN = "w000 "  # the true answers are made of it
CAPTION = range(100, 280)  # tokens


def rounds_of(images: int, seed: int, fixed: int | None = None) -> list[Row]:
    """Rows of `rounds` on so many images, in the mix; those of an image stand together.

    fixed: length (tokens) of all answers, if not that of their kinds.
    """
    draw = random.Random(seed)
    kinds = draw.choices(list(MIX), [samples for samples, *_ in MIX.values()], k=images)
    rows = []
    for image, kind in enumerate(kinds):
        _, rounds, question, length = MIX[kind]
        for number in range(rounds):
            # questions of one kind differ in length by a third
            text = _words(draw, max(3, round(question * draw.uniform(0.67, 1.33))))
            rows.append(
                {
                    "round_id": f"{seed}-{image}#{number}",
                    "image": f"q{seed}-{image}",
                    "question": text,
                    "answer": TOKEN * (fixed or length),
                    "task": "short",
                }
            )
    return rows


def lengths(rows: Iterable[Row], ranks: Sequence[int]) -> dict[int, int]:
    """Tokens of the answers to the rows, by the seed of their requests; rank −1 is the first answer."""
    return {stable_hash(0, row["round_id"], rank): len(row["answer"]) // len(TOKEN) for row in rows for rank in ranks}


def wrong_ones(rows: Iterable[Row]) -> list[Row]:
    """The rounds that were answered wrongly at first, as `reanswer` takes them."""
    return [{**row, "base": 0.0, "right": False} for row in rows if stable_hash("wrong", row["round_id"]) % 1000 < 1000 * WRONG]


def at_all_ranks(wrong: Iterable[Row]) -> list[Row]:
    """The rounds as the turns of a long part have them: each image once for every reference that it comes to.

    Under each it has the rounds that are not left by then. Images and rounds get new names, so that nothing is asked twice.
    """
    images: dict[str, list[Row]] = {}
    for row in wrong:
        images.setdefault(row["image"], []).append(row)
    made = []
    for name, rows in images.items():
        for rank in range(REFERENCES):
            rows = [row for row in rows if len({helps(row["round_id"], before) for before in range(rank)}) < 2]
            made += [{**row, "image": f"{name}@{rank}", "round_id": f"{row['round_id']}@{rank}"} for row in rows]
    return made


def references(rows: Iterable[Row], seed: int) -> dict[str, list[tuple[int, Reference]]]:
    """Image name to its (image id, reference) list."""
    draw = random.Random(seed)
    # captions are cut out of one long text: a random number for each of their words would take longer than the measurement
    text = [f"w{draw.randrange(llava.WORDS)}" for _ in range(100_000)]

    def caption() -> str:
        start = draw.randrange(len(text) - CAPTION.stop)
        return " ".join(text[start : start + draw.choice(CAPTION)])

    return {
        name: [(rank, Reference(f"r-{name}-{rank}", caption())) for rank in range(REFERENCES)]
        for name in dict.fromkeys(row["image"] for row in rows)
    }


class Judge:
    """Says of each reference of a round whether it helps, by hash."""

    def labels(self, answered: Sequence[tuple[Row, Row]]) -> list[bool | None]:
        """See `reanswer.Judge`."""
        return [helps(row["round_id"], response["rank"]) for row, response in answered]


def helps(round_id: str, rank: int) -> bool:
    """Whether a made-up reference helps."""
    return stable_hash("helps", round_id, rank) % 1000 < 1000 * HELPFUL


def _words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(llava.WORDS)}" for _ in range(count))
