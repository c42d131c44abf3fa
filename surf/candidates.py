"""Score the retrieved candidates of every evaluation question: what methods rerank, filter and choose by, beyond similarity.

    python -m surf.candidates --by gold --questions QUESTIONS --neighbors PART --catalog MANIFEST --out OUT FLAGS

    by         score                                                                          model
    caption    cosine of the query image and the candidate's caption                          CLIP (embed.model)
    relevance  log p(yes) − log p(no), nats a token, to: would this reference help?            lvlm.model
    gold       mean log-likelihood (nats a token) of the gold answer with this one reference   lvlm.model

The models are the untuned ones: all methods choose among the same scores, so that what differs is what they do with them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from surf import cli, config, prompts, store
from surf.evaluate import FLUSH_ROWS, check_images
from surf.images import Images
from surf.models import Responder, load_responder, request
from surf.reanswer import lookup
from surf.references import candidates_of
from surf.telemetry import Clock

BY = ("caption", "relevance", "gold")
VERSION = 1
Row = dict[str, Any]
Asked = tuple[Row, int, prompts.Reference]  # question, image id of the candidate, the candidate


def by_caption(asked: Sequence[Asked], encoder: Any) -> list[float]:
    """Cosine of each question's image and its candidate's caption. CLIP reads a caption's first 77 tokens."""
    names = list(dict.fromkeys(row["image"] for row, _, _ in asked))
    captions = list(dict.fromkeys(prompts.clean(reference.caption) for _, _, reference in asked))
    images = dict(zip(names, encoder.encode(names)[0], strict=True))
    texts = dict(zip(captions, encoder.encode_texts(captions), strict=True))
    return [float(np.dot(images[row["image"]], texts[prompts.clean(reference.caption)])) for row, _, reference in asked]


def by_relevance(asked: Sequence[Asked], responder: Responder, lvlm: config.Lvlm) -> list[float]:
    """Log-odds of yes against no, each a mean over its tokens."""
    requests = [request(prompts.relevance(row["question"]), row["image"], [reference], lvlm) for row, _, reference in asked]
    yes, no = (responder.loglik(requests, [word] * len(requests)) for word in ("Yes", "No"))
    return [float(a - b) for a, b in zip(yes, no, strict=True)]


def by_gold(asked: Sequence[Asked], responder: Responder, lvlm: config.Lvlm, suffix: str, kind: str) -> list[float]:
    """Mean log-likelihood of the gold answer with one reference."""
    requests = [request(row["question"] + suffix, row["image"], [reference], lvlm) for row, _, reference in asked]
    return list(responder.loglik(requests, [gold(row, kind) for row, _, _ in asked]))


def gold(row: Row, kind: str) -> str:
    """The answer that most annotators gave, as a model would write it."""
    answer: str = Counter(row["answers"]).most_common(1)[0][0]
    return answer.capitalize() if kind == "pope" else answer


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = cli.parse(
        argv,
        prog="candidates",
        about="Score the retrieved candidates of every evaluation question.",
        sections=["embed", "lvlm", "images"],
        paths=["questions", "neighbors", "catalog", "out"],
        extras={"by": {"choices": BY, "required": True}, "suffix": {"default": "", "help": "appended to every question"}},
    )
    clock = Clock()
    table = store.read_table(args.questions, "evaluate/questions")
    rows, near = store.rows(table), candidates_of(args.neighbors)
    pairs = lookup(args.catalog, {image_id for row in rows for image_id, _ in near.get(row["image"], ())})
    asked = [(row, image_id, pairs[image_id]) for row in rows for image_id, _ in near.get(row["image"], ())]
    images = Images(args.images.roots, args.images.max_pixels, cached=1024)
    check_images(images, [row["image"] for row in rows], [] if args.by == "caption" else [one.image for _, _, one in asked])
    flags = cli.flags(embed=args.embed) if args.by == "caption" else cli.flags(lvlm=args.lvlm)
    inputs = [store.digest(table), store.footer(args.neighbors)[1]["digest"], store.read_json(args.catalog)]
    depends = {"by": args.by, "flags": flags, "version": VERSION, "suffix": args.suffix, "inputs": inputs}
    partial = store.Partial(args.out, "evaluate/candidates", **depends)
    done = {(row["question_id"], row["image_id"]): row["score"] for row in store.rows(partial.read())}
    kind = store.footer(args.questions)[1]["kind"]
    model: Any
    if args.by == "caption":
        from surf.models import clip

        model = clip.load(args.embed, images)
    else:
        model = load_responder(args.lvlm, images)
    clock.loaded()
    # one question may stand in several splits: it is asked once
    places: dict[tuple[Any, ...], list[Asked]] = {}
    for one in asked:
        if (one[0]["question_id"], one[1]) not in done:
            places.setdefault((one[0]["image"], one[0]["question"], gold(one[0], kind), one[1]), []).append(one)
    for chunk in cli.chunks(list(places.values()), FLUSH_ROWS, desc="candidates", unit="candidate"):
        first = [same[0] for same in chunk]
        if args.by == "caption":
            values = by_caption(first, model)
        elif args.by == "relevance":
            values = by_relevance(first, model, args.lvlm)
        else:
            values = by_gold(first, model, args.lvlm, args.suffix, kind)
        fresh = {(row["question_id"], i): value for same, value in zip(chunk, values, strict=True) for row, i, _ in same}
        partial.save(store.table_of(_rows(fresh), "evaluate/candidates"))
        done.update(fresh)
    ordered = {(row["question_id"], image_id): done[row["question_id"], image_id] for row, image_id, _ in asked}
    meta = {"stage": "candidates", "version": VERSION, "by": args.by, "flags": flags}
    store.write_table(args.out, store.table_of(_rows(ordered), "evaluate/candidates"), "evaluate/candidates", meta)
    clock.note(args.out, len(places))


def _rows(scores: dict[tuple[str, int], float]) -> list[Row]:
    return [{"question_id": key, "image_id": image_id, "score": value} for (key, image_id), value in scores.items()]


if __name__ == "__main__":
    cli.run(main)
