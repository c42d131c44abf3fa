"""Split SFT conversations into single question-answer rounds; write one part of `rounds`.

    python -m surf.split --part part-00000-of-00004 --out results/rounds/part-….parquet --quarantine … FLAGS

All rounds of one image stand in one part, next to each other.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surf import cli, config, prompts, quarantine, store
from surf.errors import SurfError, first_of
from surf.shards import parse_part, shard_of, stable_hash

log = logging.getLogger("surf")

# Format prompts of LLaVA-1.5's SFT mix (LLaVA, docs/Data.md and docs/Evaluation.md); the original routes by the same words.
SHORT = "Answer the question using a single word or phrase."
CHOICE = "Answer with the option's letter from the given choices directly."
_CAPTION = ("provide a short description for", "one-sentence caption")
_BOX = re.compile(r"\s*\[\s*-?\d*\.?\d+\s*(?:,\s*-?\d*\.?\d+\s*){3}\]\s*")
_OPTIONS = re.compile(r"^\(?A[.):]\s", re.MULTILINE)


@dataclass(frozen=True)
class Round:
    """One question and its answer."""

    round_id: str
    image: str
    question: str
    answer: str
    task: str


def split(options: config.Split) -> tuple[list[Round], dict[str, str], Counter[str]]:
    """All rounds of all files, what could not be used, and counts of what was left out on purpose.

    Raises:
        SurfError: a file is missing, no JSON, no list, or not one round is left.
    """
    conversations, errors, left_out = read(options)
    return choose(conversations, errors, left_out, options), errors, left_out


def read(options: config.Split) -> tuple[list[list[Round]], dict[str, str], Counter[str]]:
    """The rounds of each conversation with an image, as `split`; `errors` counts the conversations that could not be used."""
    conversations: list[list[Round]] = []
    errors: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for name in options.conversations:
        for number, row in enumerate(store.read_rows(Path(name), "a list of conversations (split.conversations)")):
            if isinstance(row, dict) and "image" not in row:
                left_out["text-only conversations"] += 1
                continue
            try:
                image, turns = _check(row)
            except ValueError as error:
                errors[f"{name}[{number}]"] = str(error)
                continue
            conversation = str(row.get("id", number))
            seen[conversation] += 1
            if seen[conversation] > 1:  # LLaVA's mix uses one id for several conversations on one image
                conversation += f"@{seen[conversation]}"
            conversations.append(list(_split_one(conversation, image, turns)))
    return conversations, errors, left_out


def choose(
    conversations: Sequence[Sequence[Round]], errors: Mapping[str, str], left_out: Counter[str], options: config.Split
) -> list[Round]:
    """The rounds that `options` keep, those of an image next to each other; counts the others in `left_out`."""
    rounds = [one for rounds in conversations for one in rounds]
    kept = [one for one in rounds if one.task in options.tasks]
    left_out["rounds of other tasks"] += len(rounds) - len(kept)
    if not kept:
        found = [f"{count} {what} left out" for what, count in left_out.items() if count]
        found += [f"{len(errors)} unusable, such as {first_of(errors)}"] if errors else []
        raise SurfError(
            f"there is no round with an image ({'; '.join(found)})",
            where=", ".join(options.conversations),
            expected='rows {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, …]}',
            next="see docs/data.md, then mend the file, split.conversations or split.tasks",
        )
    return sorted(_limit(kept, options.limit), key=lambda one: one.image)


def task_of(question: str, answer: str) -> str:
    """How the answer is judged: choice, short, box, caption or open."""
    lower = question.lower()
    if "letter from the given" in lower:
        return "choice"
    if _BOX.fullmatch(answer):
        return "box"
    if "a single word or phrase" in lower:
        return "short"
    if any(words in lower for words in _CAPTION):
        return "caption"
    return "open"


def _split_one(conversation: str, image: str, turns: Sequence[tuple[str, str]]) -> Iterator[Round]:
    """Rounds of one conversation. A format prompt that stands only in the first question is meant for all of them."""
    first = turns[0][0]
    carried = next((suffix for suffix in (SHORT, CHOICE) if suffix.lower() in first.lower()), None)
    for number, (question, answer) in enumerate(turns):
        fits = carried == SHORT or (carried == CHOICE and _OPTIONS.search(question))
        if number and carried and fits and task_of(question, answer) == "open":
            question = f"{question}\n{carried}"
        yield Round(f"{conversation}#{number}", image, question, answer, task_of(question, answer))


def _check(row: Any) -> tuple[str, list[tuple[str, str]]]:
    """(image, [(question, answer), …]) of one SFT row; raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object")
    image, turns = row["image"], row.get("conversations")
    if not isinstance(image, str) or not image.strip():
        raise ValueError("image is no file name")
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        raise ValueError("conversations is no list of question-answer pairs")
    pairs = []
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        for turn, role in ((human, "human"), (gpt, "gpt")):
            if not isinstance(turn, dict) or turn.get("from") != role or not isinstance(turn.get("value"), str):
                raise ValueError(f"a turn is not from {role!r}, or has no text")
        pairs.append((human["value"], gpt["value"]))
    tags = sum(question.count(prompts.IMAGE) for question, _ in pairs)
    if tags > 1:
        raise ValueError(f"has {tags} <image> tags for one image")
    pairs = [(prompts.clean(question.replace(prompts.IMAGE, "")), prompts.clean(answer)) for question, answer in pairs]
    if not all(question and answer for question, answer in pairs):
        raise ValueError("a question or an answer is empty")
    return image, pairs


def _limit(rounds: list[Round], limit: int | None) -> list[Round]:
    """Whole images, in the order of their hash, until the limit is reached; SurfError if the first one exceeds it."""
    if limit is None or len(rounds) <= limit:
        return rounds
    by_image = Counter(one.image for one in rounds)
    kept: set[str] = set()
    total = 0
    for image in sorted(by_image, key=lambda name: (stable_hash(name), name)):
        if total + by_image[image] > limit:
            if not kept:
                raise SurfError(
                    f"split.limit is {limit}, and the first image has {by_image[image]} rounds, which stay together",
                    expected=f"at least {by_image[image]}",
                    next="raise split.limit in the config",
                )
            break
        kept.add(image)
        total += by_image[image]
    return [one for one in rounds if one.image in kept]


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="split",
        about=__doc__ or "",
        sections=["split", "images"],
        paths=["out", "quarantine"],
        extras={"part": {"required": True}},
    )
    index, count = parse_part(args.part)
    conversations, errors, left_out = read(args.split)
    rounds = choose(conversations, errors, left_out, args.split)
    for what, number in left_out.items():
        log.info("%d %s left out", number, what)
    mine = [vars(one) for one in rounds if shard_of(one.image, count) == index]
    # The share is one of all conversations, so that every part comes to the same verdict.
    total, share = len(conversations) + len(errors), args.images.max_bad_share
    if len(errors) <= share * total:
        errors = {key: error for key, error in errors.items() if shard_of(key, count) == index}
    quarantine.settle(args.quarantine, errors, dataset="rounds", stage="split", total=total, max_bad_share=share)
    meta = {"stage": "split", "version": args.split.version, "flags": cli.flags(split=args.split), "left_out": left_out}
    store.write_table(args.out, store.table_of(mine, "rounds"), "rounds", meta)
    log.info("%d of %d rounds in %s", len(mine), len(rounds), args.part)


if __name__ == "__main__":
    cli.run(main)
