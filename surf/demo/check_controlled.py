"""Measure whether the trained models suit the controlled experiment, on fresh scenes drawn as `surf.demo.controlled` does.

    python -m surf.demo.check_controlled --models models [--images 150] [--murk 255] [--tune 1000] [--rate 1e-4 3e-4] …

What must hold, and what to change where it does not:

    row                                   should be                            else
    no reference                          0.70 to 0.90                         murk: how much is seen through fog
    two re-renders                        well above                           more image_steps: captions are not read
    two look-alikes, miscaptioned         well below                           trust nearer to 1: the model judges already
    relevance, same: each role            above 0.8: the difference is seen    more image_steps, or a larger share judged
    told to leave out: look-alike         near no reference: it can judge      more image_steps, or a larger share told
    retrieved: helps, misleads            like the rows above                  CLIP: more clip_steps
    the same, tuned                       helps kept, misleads near none       nothing to learn from

The tuning is a short trial with a true and a false reference for each question; with --both-false, a share of the questions
has two false ones. It is not the pipeline's.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surf import tables
from surf.demo import controlled
from surf.demo import questions as q
from surf.demo.check import View, neighbors, pope_questions, respond, tune
from surf.demo.recipes import retriever_of

Prompt = tuple[q.Round, list[View]]  # references first, the query view last


@dataclass(frozen=True)
class Query:
    """A query view, the kinds that it hides, and its references by role."""

    view: View
    hidden: tuple[str, ...]
    references: dict[str, list[View]]


def draw_queries(options: controlled.Options, split: str, count: int) -> list[Query]:
    """Return `count` queries; roles are re-render, look-alike, miscaptioned, glimpse."""
    from PIL import Image

    found = []
    for number in range(count):
        first, *others = controlled.draw(options, (split, number))
        by_role: dict[str, list[View]] = {}
        for one in others:
            image = Image.open(io.BytesIO(one.data)).convert("RGB")
            for row in one.listings:
                if (row.case, row.role) != ("helps", "look-alike"):  # those have two tells; here are the harder ones
                    by_role.setdefault(row.role, []).append(View(one.scene, image, row.caption, number, row.role))
        view = View(first.scene, Image.open(io.BytesIO(first.data)).convert("RGB"), "", number)
        found.append(Query(view, first.hidden, by_role))
    return found


def conditions(queries: list[Query], asked: list[tuple[int, q.Round]], found: list[list[View]]) -> Iterator[tuple[str, Any]]:
    """Yield name and prompts of every condition. found: the two nearest references of each query, helped ones first half."""
    rng = random.Random("conditions")

    def shown(*roles: str) -> list[Prompt]:
        kept = []
        for number, one in asked:
            own = [queries[number].references.get(role, [])[:2] for role in roles]
            if all(own):
                views = own[0] if len(roles) == 1 else [views[0] for views in own]
                kept.append((one, [*rng.sample(views, len(views)), queries[number].view]))
        return kept

    bare = [(one, [queries[number].view]) for number, one in asked]
    yield "no reference", bare
    kinds = {(n, one): kind_of(one) in queries[n].hidden for n, one in asked}
    yield "no reference, what is hidden", [prompt for prompt, key in zip(bare, asked, strict=True) if kinds[key]]
    yield "two re-renders", shown("re-render")
    yield "two look-alikes", shown("look-alike")
    yield "two miscaptioned", shown("miscaptioned")
    yield "a re-render and a look-alike", shown("re-render", "look-alike")
    for roles in (("re-render",), ("look-alike",), ("re-render", "look-alike")):
        told = [(q.told_to_leave_out(one), views) for one, views in shown(*roles)]
        yield f"told to leave out: {' and '.join(roles)}", told
    half = len(queries) // 2
    for name, part in (("retrieved, helps", range(half)), ("retrieved, misleads", range(half, len(queries)))):
        yield name, [(one, [*found[n], queries[n].view]) for n, one in asked if n in part]
    for role in ("re-render", "look-alike", "miscaptioned"):
        prompts = []
        for query in queries:
            if role in query.references:
                views = [query.references["re-render"][-1]]
                place = rng.randrange(2)  # of the one that is asked about
                views.insert(place, query.references[role][0])
                prompts.append((q.ask_same(place + 1, role == "re-render"), [*views, query.view]))
        yield f"same of two, {role}", prompts
    for role in ("re-render", "look-alike", "miscaptioned", "glimpse"):
        some = [(n, one, queries[n].references[role][0]) for n, one in asked[::2] if role in queries[n].references]
        good = role in controlled.GOOD
        yield f"relevance, {role}", [(q.ask_relevance(one, good), [view, queries[n].view]) for n, one, view in some]


def kind_of(asked: q.Round) -> str:
    """The object that a yes/no question asks about."""
    return asked.question.split()[3]


def retrieved(clip: Any, preprocess: Any, queries: list[Query], options: controlled.Options) -> list[list[View]]:
    """Return the two nearest references; the first half of the queries is helped, the others are misled."""
    half = len(queries) // 2
    corpus = [view for one in queries[:half] for view in one.references["re-render"]]
    corpus += [v for one in queries[half:] for role, views in one.references.items() if role != "re-render" for v in views]
    corpus += [query.view for query in strangers(options, 10 * len(queries))]
    found = [[corpus[i] for i in row] for row in neighbors(clip, preprocess, [one.view for one in queries], corpus, 2)]
    for name, part in (("helps", range(half)), ("misleads", range(half, len(queries)))):
        own = [view.role if view.query == n else "unrelated" for n in part for view in found[n]]
        print(f"nearest two, {name}: " + ", ".join(f"{role} {own.count(role) / len(own):.2f}" for role in sorted(set(own))))
    return found


def strangers(options: controlled.Options, count: int) -> list[Query]:
    """Return unrelated corpus images, as queries without references."""
    from PIL import Image

    drawn = [controlled.draw(options, ("unrelated", number))[0] for number in range(count)]
    views = [View(one.scene, Image.open(io.BytesIO(one.data)), one.listings[0].caption, -1, "unrelated") for one in drawn]
    return [Query(view, (), {}) for view in views]


def table(lvlm: Any, processor: Any, cases: list[tuple[str, list[Prompt]]]) -> dict[str, str]:
    """Return accuracy, share of Yes and number of questions of every condition, as text."""
    rows = {}
    for name, prompts in cases:
        answers = respond(lvlm, processor, [(one.text, views) for one, views in prompts])
        right = sum(answer == one.answer for answer, (one, _) in zip(answers, prompts, strict=True))
        size = max(1, len(prompts))
        rows[name] = f"{right / size:.3f} (yes {sum(answer == 'Yes' for answer in answers) / size:.2f}, n {len(prompts)})"
    return rows


def tuning_samples(queries: list[Query], count: int, both_false: float = 0.0) -> list[tuple[str, list[View], str]]:
    """Return questions with one true and one false reference in random order, or two false ones, and the right answer."""
    rng = random.Random("tuning")
    asked = pope_questions([one.view for one in queries], rng)
    samples = []
    for number, one in rng.sample(asked, min(count, len(asked))):
        roles = queries[number].references
        false = [*roles["look-alike"], *roles.get("miscaptioned", [])]
        pair = [rng.choice(false) if rng.random() < both_false else roles["re-render"][0], rng.choice(false)]
        samples.append((one.text, [*rng.sample(pair, 2), queries[number].view], one.answer))
    return samples


def main() -> None:
    import open_clip
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--murk", type=int, default=controlled.Options.murk)
    parser.add_argument("--tune", type=int, default=0, help="samples of a trial fine-tune; 0: none")
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-4], help="learning rates, a trial with each")
    parser.add_argument("--both-false", type=float, default=0.0, help="share of the trial's samples with two false references")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    options = controlled.Options(murk=args.murk)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{retriever_of(args.models)}")

    def load() -> Any:
        network = AutoModelForImageTextToText.from_pretrained(args.models / "lvlm", dtype=torch.float32)
        return network.to(args.device).eval()

    processor = AutoProcessor.from_pretrained(args.models / "lvlm")
    queries = draw_queries(options, "check", args.images)
    found = retrieved(clip.eval(), preprocess, queries, options)
    cases = list(conditions(queries, pope_questions([one.view for one in queries], random.Random("check")), found))
    columns = {"base": table(load(), processor, cases)}
    show(columns, args.murk)
    if args.tune:
        samples = tuning_samples(draw_queries(options, "check tuning", args.tune // 4 + 1), args.tune, args.both_false)
        for rate in args.rate:
            lvlm = load()
            tune(lvlm, processor, samples, 2, rate)
            columns[f"tuned on {len(samples)}, {rate:g}"] = table(lvlm, processor, cases)
        show(columns, args.murk)


def show(columns: dict[str, dict[str, str]], murk: int) -> None:
    """Print the conditions as rows, the models as columns."""
    names = next(iter(columns.values()))
    body = [[name, *(rows[name] for rows in columns.values())] for name in names]
    print(tables.table([f"condition, murk {murk}", *columns], body, padded=True), flush=True)


if __name__ == "__main__":
    main()
