"""Write the embedded world: images, the retrieval corpus, the questions to tune on and three POPE files.

    python -m surf.demo.world --out example [--seed 0] [--scale 1.0]

Query images (folders sft/ and pope/) hide things under noise, fog and covers. For every query scene the corpus holds
clear re-renders (useful references), look-alikes with one or two objects swapped (misleading references) and, beside
them, unrelated scenes. All captions are true of their own image. Equal seeds give equal bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from surf import cli
from surf.demo import questions as q
from surf.demo.draw import KINDS, Scene, render

SFT_IMAGES, POPE_IMAGES, UNRELATED = 220, 80, 60  # at scale 1
PACKED_SHARE = 0.3  # of the corpus images, written into packed.parquet in place of loose files
LISTED_TWICE, COPIES = 6, 4  # sft images that are corpus rows too, by their own name or as a byte copy
QUERY_HIDE, QUERY_NOISE = 0.5, 12.0  # chance that an object of a query image is hidden; grey levels
CLEAR_NOISE = 4.0
QUALITY = 90  # JPEG


@dataclass(frozen=True)
class Picture:
    """An image file of the world: its name below images/, its scene and its JPEG bytes."""

    name: str
    scene: Scene
    data: bytes
    hidden: dict[str, str] = field(default_factory=dict)


def build(out: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write the whole world below `out` and return row counts."""
    rng = random.Random(f"world:{seed}")
    names = iter(rng.sample(range(1, 600_000), 100 + round(4_000 * max(1.0, scale))))
    sft = list(draw_queries("sft", _count(SFT_IMAGES, scale), 1, names, rng))
    pope = list(draw_queries("pope", _count(POPE_IMAGES, scale), 3, names, rng))
    corpus = draw_corpus(sft + pope, _count(UNRELATED, scale), names, rng)
    corpus += add_twins(sft, names, rng)
    rows = [corpus_row(picture, rng) for picture in corpus]
    broken = f"corpus/{next(names):012d}.jpg"
    missing = [f"{folder}/{next(names):012d}.jpg" for folder in ("corpus", "sft")]
    scene = q.sample_scene(rng)
    rows += [corpus_row(Picture(name, scene, b""), rng) for name in (broken, missing[0])]
    rng.shuffle(rows)

    packed = {picture.name for picture in corpus if picture.name.startswith("corpus/") and rng.random() < PACKED_SHARE}
    loose = [picture for picture in sft + pope + corpus if picture.name not in packed]
    for picture in loose:
        _write(out / "images" / picture.name, picture.data)
    _write(out / "images" / broken, jpeg(render(scene, rng, CLEAR_NOISE))[:400])
    write_packed(out / "packed.parquet", [(one.name, one.data) for one in corpus if one.name in packed])
    _write_json(out / "corpus.json", rows)
    conversations = list(sft_rows(sft, missing[1], rng))
    _write_json(out / "sft.json", conversations)
    counts = {"corpus": len(rows), "packed": len(packed), "sft": len(conversations)}
    for split, lines in pope_files(pope, sft + pope, rng).items():
        _write(out / "pope" / f"coco_pope_{split}.json", "".join(json.dumps(line) + "\n" for line in lines).encode())
        counts[f"pope {split}"] = len(lines)
    return counts


def draw_queries(folder: str, count: int, fewest: int, names: Iterator[int], rng: random.Random) -> Iterator[Picture]:
    """Yield noisy images of new scenes whose objects are partly hidden."""
    for _ in range(count):
        scene = q.sample_scene(rng, fewest)
        hidden = q.pick_hidden(scene, rng, QUERY_HIDE)
        data = jpeg(render(scene, rng, QUERY_NOISE, hidden))
        yield Picture(f"{folder}/{next(names):012d}.jpg", scene, data, hidden)


def draw_corpus(queries: list[Picture], unrelated: int, names: Iterator[int], rng: random.Random) -> list[Picture]:
    """Return for every query scene 1-3 clear re-renders and 2-3 look-alikes, then unrelated scenes."""
    shown: list[Scene] = []
    for query in queries:
        shown += [query.scene] * rng.choices((1, 2, 3), weights=(17, 2, 1))[0]
        shown += [q.look_alike(query.scene, rng, query.hidden) for _ in range(rng.choices((2, 3), weights=(1, 2))[0])]
    shown += [q.sample_scene(rng) for _ in range(unrelated)]
    return [Picture(f"corpus/{next(names):012d}.jpg", scene, jpeg(render(scene, rng, CLEAR_NOISE))) for scene in shown]


def add_twins(sft: list[Picture], names: Iterator[int], rng: random.Random) -> list[Picture]:
    """Return sft images to list in the corpus as well: some by their own name, some copied under another one."""
    chosen = rng.sample(sft, min(len(sft), LISTED_TWICE + COPIES))
    copies = [Picture(f"corpus/{next(names):012d}.jpg", one.scene, one.data) for one in chosen[LISTED_TWICE:]]
    return chosen[:LISTED_TWICE] + copies


def corpus_row(picture: Picture, rng: random.Random) -> dict[str, Any]:
    """Return a row in ShareGPT4V's caption format, now and then with plain image and caption keys."""
    text = q.caption(picture.scene, rng)
    if rng.random() < 0.1:
        return {"image": picture.name, "caption": text}
    prompt = rng.choice(("What is in this photo?", "Describe this image.", "Write a caption for this image."))
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": text}]
    return {"id": Path(picture.name).stem, "image": picture.name, "conversations": turns}


def sft_rows(pictures: list[Picture], missing: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield conversations in LLaVA's format: multi-round, some text-only, one whose image is missing."""
    for number, picture in enumerate(pictures):
        if number % 30 == 10:
            place, kinds = rng.choice(tuple(q.PLACES.items()))
            turns = [
                {"from": "human", "value": f"Name two things that one can often see {q.WHERE[place]}."},
                {"from": "gpt", "value": f"{q.article(kinds[0]).capitalize()} and {q.article(kinds[1])}."},
            ]
            yield {"id": f"text_{number:06d}", "conversations": turns}
        yield conversation(picture.name, picture.scene, rng, suffix_once=number % 25 == 5)
    yield conversation(missing, q.sample_scene(rng), rng, suffix_once=False)


def conversation(name: str, scene: Scene, rng: random.Random, suffix_once: bool) -> dict[str, Any]:
    """Return 4-6 rounds on one image; with suffix_once they are all short answers and only round one says so."""
    rounds = q.yes_no_rounds(scene, rng, each=2)
    if suffix_once:
        rounds += [q.ask_color(scene, rng)]
    else:
        rounds += [q.other_round(scene, rng) for _ in range(2 if len(rounds) == 4 else 1)]
        rng.shuffle(rounds)
    turns = []
    for turn, one in enumerate(rounds):
        text = one.question if suffix_once and turn else one.text
        turns.append({"from": "human", "value": ("" if turn else "<image>\n") + text})
        turns.append({"from": "gpt", "value": one.answer})
    return {"id": Path(name).stem, "image": name, "conversations": turns}


def pope_files(pictures: list[Picture], annotated: Iterable[Picture], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Return POPE's three splits: per image three present objects and three absent ones.

    Absent objects are random ones, the most frequent ones or those that co-occur most with the image's objects.
    """
    frequency: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for picture in annotated:
        frequency.update(picture.scene.kinds)
        for one, two in combinations(picture.scene.kinds, 2):
            together.update([(one, two), (two, one)])
    files: dict[str, list[dict[str, Any]]] = {"random": [], "popular": [], "adversarial": []}
    for picture in pictures:
        kinds = picture.scene.kinds
        present = rng.sample(kinds, 3)
        absent = [kind for kind in KINDS if kind not in kinds]
        by_company = sorted(absent, key=lambda kind: (-sum(together[kind, one] for one in kinds), kind))
        by_frequency = sorted(absent, key=lambda kind: (-frequency[kind], kind))
        for split, wrong in (("random", rng.sample(absent, 3)), ("popular", by_frequency), ("adversarial", by_company)):
            for yes, no in zip(present, wrong[:3], strict=True):
                for kind, label in ((yes, "yes"), (no, "no")):
                    text = f"Is there {q.article(kind)} in the image?"
                    number = len(files[split]) + 1
                    files[split].append({"question_id": number, "image": picture.name, "text": text, "label": label})
    return files


def _count(full: int, scale: float) -> int:
    return max(4, round(full * scale))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    _write(path, (json.dumps(rows, indent=1) + "\n").encode())


def write_packed(path: Path, pictures: list[tuple[str, bytes]], rows_per_group: int | None = None) -> None:
    """Write columns image: string, bytes: binary; JPEG is compressed already, so Parquet does not try again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.string()), ("bytes", pa.binary())])
    columns = [[name for name, _ in pictures], [data for _, data in pictures]]
    table = pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)
    pq.write_table(table, path, row_group_size=rows_per_group, compression="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 writes about 1,200 corpus images")
    args = parser.parse_args()
    for name, rows in build(args.out, args.seed, args.scale).items():
        print(f"{name}: {rows} rows")


if __name__ == "__main__":
    cli.run(main)
