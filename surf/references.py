"""Which references a method shows with a question: a choice among candidates, and draws from the whole corpus."""

import logging
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from surf import prompts, store
from surf.answer import unreadable
from surf.errors import SurfError
from surf.images import Images, identity
from surf.methods import Method
from surf.reanswer import lookup
from surf.shards import stable_hash

log = logging.getLogger("surf")
SPARE = 16  # random images drawn beyond those asked for, as some cannot be opened
Row = dict[str, Any]
Shown = Mapping[str, Sequence[tuple[int, prompts.Reference]]]  # question id: what stands in its prompt, in its order
Candidates = Sequence[tuple[int, float]]  # (image id, cosine), most similar first
Scores = Mapping[str, Mapping[int, float]]  # caption | relevance | gold: score by image id, higher is better


class Files(NamedTuple):
    """Where the candidates lie: neighbours of the questions' images, the catalog's manifest, further scores by name."""

    neighbors: Path | None = None
    catalog: Path | None = None
    candidates: Mapping[str, Path] = {}


def choose(method: Method, candidates: Candidates, scores: Scores, key: str, seed: int = 0) -> list[int]:
    """Image ids of the references in the prompt, in its order; at most `method.references`, perhaps none.

    First the best come first: by similarity, by `rerank`, or by the gold answer's likelihood; ties go to the more similar
    one. Then those that `keep` refuses fall out, the first `references` stay, and `order` puts them in their places.

    Args:
        candidates: what there is to choose from.
        scores: those that `method.needs` names, of this question.
        key: what the shuffled order is drawn by.
    """
    ranked = list(candidates)
    if method.source in ("oracle", "adversarial"):
        sign = 1 if method.source == "oracle" else -1
        ranked.sort(key=lambda one: -sign * scores["gold"][one[0]])
    elif method.rerank is not None:
        by = scores[method.rerank]
        ranked.sort(key=lambda one: -by[one[0]])
    if method.keep == "judged":
        ranked = [one for one in ranked if scores["relevance"][one[0]] > 0]
    elif method.keep is not None:
        ranked = [one for one in ranked if one[1] >= method.keep]
    ids = [image_id for image_id, _ in ranked[: method.references]]
    if method.order == "reversed":
        ids.reverse()
    elif method.order == "shuffled":
        ids.sort(key=lambda image_id: stable_hash(seed, "order", key, image_id))
    return ids


def candidates_of(neighbors: Path) -> dict[str, list[tuple[int, float]]]:
    """The retrieved (image id, cosine) of every query image, most similar first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(store.rows(store.read_table(neighbors, "neighbors")), key=lambda row: row["rank"]):
        found.setdefault(row["query_id"], []).append((row["image_id"], row["similarity"]))
    return found


def scores_of(files: Mapping[str, Path]) -> dict[str, dict[str, dict[int, float]]]:
    """Question id, name of the score: score by image id. `files`: the file of `evaluate/candidates` of each score."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, path in files.items():
        for row in store.rows(store.read_table(path, "evaluate/candidates")):
            found.setdefault(row["question_id"], {}).setdefault(name, {})[row["image_id"]] = row["score"]
    return found


def draw(name: str, count: int, corpus: int, seed: int = 0) -> list[int]:
    """`count` different image ids below `corpus`, drawn by the query image's name; fewer if the corpus is smaller."""
    return random.Random(stable_hash(seed, "random", name)).sample(range(corpus), min(count, corpus))


def shown(rows: Sequence[Row], method: Method, files: Files, images: Images, seed: int) -> Shown:
    """What the method shows with each of `rows` (of `evaluate/questions`).

    Raises:
        SurfError: a file that the method needs is not named, or holds nothing on these questions.
    """
    if not method.references:
        return {}
    catalog = _needed(files.catalog, "catalog", method)
    if method.source == "random":
        by_image = _random(sorted({row["image"] for row in rows}), method.references, catalog, images, seed)
        return {row["question_id"]: by_image[row["image"]] for row in rows}
    neighbors = _needed(files.neighbors, "neighbors", method)
    near = candidates_of(neighbors)
    scores = scores_of({by: _needed(files.candidates.get(by), f"candidates …/{by}.parquet", method) for by in method.needs()})
    if not near.keys() & {row["image"] for row in rows}:
        raise SurfError("holds no neighbour of any image of the questions", where=str(neighbors))
    chosen = {
        row["question_id"]: choose(
            method,
            near.get(row["image"], ()),
            scores.get(row["question_id"], {}),
            f"{row['image']} {row['question']}",  # not its id: the same question of another split is the same question
            seed,
        )
        for row in rows
    }
    short = sum(len(ids) < method.references for ids in chosen.values())
    if short:
        log.info("%d of %d questions have fewer than %d references", short, len(rows), method.references)
    pairs = lookup(catalog, {image_id for ids in chosen.values() for image_id in ids})
    return {key: [(image_id, pairs[image_id]) for image_id in ids] for key, ids in chosen.items()}


def _random(
    names: Sequence[str], count: int, catalog: Path, images: Images, seed: int
) -> dict[str, list[tuple[int, prompts.Reference]]]:
    """Random references of each image: neither the photograph itself nor one that cannot be opened."""
    corpus = int(store.read_json(catalog)["rows"])
    drawn = {name: draw(name, count + SPARE, corpus, seed) for name in names}
    pairs = lookup(catalog, {image_id for ids in drawn.values() for image_id in ids})

    def usable(name: str, reference: prompts.Reference) -> bool:
        return identity(reference.image) != identity(name) and not unreadable(images, [reference.image])

    return {name: list(islice(((i, pairs[i]) for i in ids if usable(name, pairs[i])), count)) for name, ids in drawn.items()}


def _needed(path: Path | None, flag: str, method: Method) -> Path:
    if path is None:
        raise SurfError(f"needs --{flag}", where=f"method {method.model_dump_json(exclude_defaults=True)}")
    return path
