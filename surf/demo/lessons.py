"""What the LLaVA learns from: prompts with references, laid out so that several questions share each prefix.

A batch row packs one prefix (system prompt, references, query image) and about ten questions behind it. The attention
mask lets each question see the prefix and itself only, so a row costs one prefix but teaches ten answers, and every
answer is learned under exactly the prompt that a single question gets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from surf.demo import questions as q
from surf.demo.draw import Scene
from surf.demo.tokens import BOS, EOS, IMAGE, PAD, layout

KINDS = ("answer", "relevance", "same", "agree", "shown")  # of questions, whose losses are told apart
CAPTION_WEIGHT = 0.25  # loss weight of a caption's tokens: they are many, the short answers few


class Lesson(NamedTuple):
    """A training scene, its look-alike, and the kinds that the scene's query view hides."""

    scene: Scene
    other: Scene
    hidden: tuple[str, ...]


Bank = list[Lesson]  # image 3 n is scene n's query view, 3 n + 1 its clear re-render, 3 n + 2 the clear look-alike


class Rows:
    """Training batches of one stage."""

    def __init__(self, bank: Bank, tokenizer: Any, recipe: Any, blind: bool) -> None:
        @cache
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False).input_ids)

        self.bank, self.encode, self.recipe, self.blind = bank, encode, recipe, blind
        self.steps = recipe.text_steps if blind else recipe.image_steps

    def __len__(self) -> int:
        return int(self.steps)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Batch number `step`, from random streams of its own: any number of processes may make batches. What kind of batch
        it is, all that train together agree on, so that none waits for another."""
        name = f"lvlm:{self.recipe.seed}:{self.blind}:{step}"
        return self.draw(random.Random(name), random.Random(f"{name}:{self.recipe.rank}"))

    def draw(self, kinds: random.Random, rng: random.Random) -> dict[str, Any]:
        """One number of references per batch: rows of equal length waste no padding."""
        recipe, size = self.recipe, self.recipe.lvlm_batch
        count = kinds.choice((1, 1, 2, 2, 3)) if self.blind or kinds.random() < recipe.reference_share else 0
        make: Callable[[random.Random], Row] = partial(self.answering, references=count)
        name = f"{count} references"
        if count and recipe.judged + recipe.told:
            drawn = kinds.random()
            if drawn < recipe.judged and self.blind:
                make, name = partial(self.reading, references=kinds.choice((2, 3))), "reading"
            elif drawn < recipe.judged:
                count = kinds.choice((1, 2, 2, 3))
                make = self.judging if count == 1 else partial(self.telling_apart, references=count)
            elif drawn < recipe.judged + recipe.told and not self.blind:
                make, name = partial(self.careful, references=kinds.choice((1, 2, 2, 3))), "told"
        return collate([make(rng) for _ in range(size)]) | {"name": name}

    def answering(self, rng: random.Random, references: int) -> Row:
        """Questions on an image, with references that are mostly true of it."""
        recipe, bank = self.recipe, self.bank
        number = rng.randrange(len(bank))
        scene, other, _ = bank[number]
        captions, images = [], []
        for _ in range(references):
            kind = rng.random()
            if kind < recipe.trust:
                shown, view = scene, 3 * number + 1
            elif kind < recipe.trust + recipe.stray:
                stranger = rng.randrange(len(bank))
                shown, view = bank[stranger][0], 3 * stranger + 1
            else:
                shown, view = other, 3 * number + 2
            captions.append(q.caption(shown, rng))
            images.append(view)
        return self.pack(captions, [*images, 3 * number], sample_rounds(scene, rng))

    def reading(self, rng: random.Random, references: int) -> Row:
        """What does each of several captions say? Whoever is asked about a reference has to find it first."""
        number = rng.randrange(len(self.bank))
        told = [self.one_to_judge(number, rng)[1] for _ in range(references)]
        rounds = [one for place in range(1, references + 1) for one in self.finding(place, told, 4, rng)]
        return self.pack([q.caption(one, rng) for one in told], [], rng.sample(rounds, len(rounds)))

    def finding(self, place: int, told: list[Scene], count: int, rng: random.Random) -> list[q.Round]:
        """Questions on what reference number `place` says, as many by Yes as by No; No is mostly true of another reference."""
        own = {(item.color, item.kind) for item in told[place - 1].items}
        others = sorted({(item.color, item.kind) for scene in told for item in scene.items} - own)
        painted = sorted((rng.choice(self.recipe.style.colors), item.kind) for item in told[place - 1].items)
        absent = rng.sample(others, min(len(others), count // 2)) or [one for one in painted if one not in own]
        asked = [*rng.sample(sorted(own), count // 2), *absent[: count // 2]]
        return [q.ask_shown(place, *one, one in own) for one in asked]

    def careful(self, rng: random.Random, references: int) -> Row:
        """Questions with references half of which are wrong, asked by someone who says: leave out what is of another scene."""
        number = rng.randrange(len(self.bank))
        scene = self.bank[number].scene
        shown = [self.one_to_judge(number, rng) for _ in range(references)]
        rounds = [q.told_to_leave_out(one) for one in sample_rounds(scene, rng)]
        if references > 1:
            rounds += [q.ask_same(place, same) for place, (_, _, same) in enumerate(shown, start=1)]
        captions = [q.caption(told, rng) for _, told, _ in shown]
        return self.pack(captions, [*(view for view, _, _ in shown), 3 * number], rounds)

    def judging(self, rng: random.Random) -> Row:
        """Is the one reference relevant? Half of the time it is."""
        number = rng.randrange(len(self.bank))
        view, told, helps = self.one_to_judge(number, rng)
        scene = self.bank[number][0]
        rounds = [q.ask_relevance(one, helps) for one in rng.sample(sample_rounds(scene, rng), 3)]
        rounds += self.comparing(number, 1, told, 4, rng)
        return self.pack([q.caption(told, rng)], [view, 3 * number], rounds)

    def telling_apart(self, rng: random.Random, references: int) -> Row:
        """Which of several references are of the scene? Each one half of the time."""
        number = rng.randrange(len(self.bank))
        shown = [self.one_to_judge(number, rng) for _ in range(references)]
        rounds = [q.ask_same(place, same) for place, (_, _, same) in enumerate(shown, start=1)]
        for place, (_, told, _) in enumerate(shown, start=1):
            rounds += self.comparing(number, place, told, 2, rng)
            rounds += self.finding(place, [one for _, one, _ in shown], 2, rng)
        captions = [q.caption(told, rng) for _, told, _ in shown]
        return self.pack(captions, [*(view for view, _, _ in shown), 3 * number], rng.sample(rounds, len(rounds)))

    def one_to_judge(self, number: int, rng: random.Random) -> tuple[int, Scene, bool]:
        """A reference for a scene: its image, the scene that its caption tells of, and whether it is the scene itself; else
        it is a look-alike, has a look-alike's caption, or shows another scene."""
        (scene, other, _), stranger = self.bank[number], rng.randrange(len(self.bank))
        cases = [(3 * number + 1, scene, True), (3 * number + 2, other, False), (3 * number + 1, other, False)]
        cases.append((3 * stranger + 1, self.bank[stranger][0], stranger == number))
        return rng.choices(cases, weights=(10, 5, 3, 2))[0]

    def comparing(self, number: int, place: int, told: Scene, count: int, rng: random.Random) -> list[q.Round]:
        """Questions on what is in plain sight, one thing each: is it the same in a reference? Up to half of them by No. Who can
        answer them has the steps in hand from which the judgement of a whole reference is made."""
        scene, _, hidden = self.bank[number]
        plain = [item for item in rng.sample(scene.items, len(scene.items)) if item.kind not in hidden]
        shown = {(item.kind, item.color) for item in told.items}
        same = {item: (item.kind, item.color) in shown for item in plain}
        differ = [item for item in plain if not same[item]][: count // 2]
        agree = [item for item in plain if same[item]][: count - len(differ)]
        return [q.ask_agree(place, item.kind, same[item]) for item in [*differ, *agree]]

    def pack(self, captions: list[str], images: list[int], rounds: list[q.Round]) -> Row:
        return pack(self.encode, captions, [] if self.blind else images, rounds, self.recipe.patches)


@dataclass
class Row:
    """One packed row. ids, segment (0 = prefix), position, weight, kind (of an answer's tokens, a place in KINDS): [length];
    weight > 0 marks tokens to predict."""

    ids: list[int]
    segment: list[int]
    position: list[int]
    weight: list[float]
    kind: list[int]
    images: list[int]  # rows of the feature bank, in order of the <image> tags


def pack(
    encode: Callable[[str], tuple[int, ...]], captions: list[str], images: list[int], rounds: list[q.Round], patches: int
) -> Row:
    """Lay out a prefix and its questions. captions: of the references, images: theirs and last the query image.

    patches: tokens of an image.
    """
    system = q.SYSTEM_REFERENCES if captions else q.SYSTEM
    prefix = f"{system} USER: {layout('', captions)}".removesuffix("\n")
    row = Row([BOS], [0], [0], [0.0], [0], images)
    parts = prefix.split("<image>")
    for number, part in enumerate(parts):
        ids = list(encode(part)) + ([IMAGE] * patches if images and number < len(parts) - 1 else [])
        _extend(row, ids, 0, 0.0, len(row.ids))
    start = len(row.ids)
    for number, one in enumerate(rounds, start=1):
        asked = encode(f"\n{one.text} ASSISTANT:")
        answer = (*encode(f" {one.answer}"), EOS)
        _extend(row, asked, number, 0.0, start)
        weight = CAPTION_WEIGHT if one.kind == "caption" else 1.0
        _extend(row, answer, number, weight, start + len(asked), KINDS.index(one.kind) if one.kind in KINDS else 0)
    return row


def _extend(row: Row, ids: Any, segment: int, weight: float, position: int, kind: int = 0) -> None:
    row.ids.extend(ids)
    row.segment.extend([segment] * len(ids))
    row.position.extend(range(position, position + len(ids)))
    row.weight.extend([weight] * len(ids))
    row.kind.extend([kind] * len(ids))


def sample_rounds(scene: Scene, rng: random.Random) -> list[q.Round]:
    """Return balanced yes/no questions, a colour and a choice, and now and then the place or a caption."""
    rounds = [*q.yes_no_rounds(scene, rng, 3), q.ask_color(scene, rng), q.ask_choice(scene, rng)]
    if rng.random() < 0.5:  # the place is learned at once and captions are long: both are rarer
        rounds.append(q.ask_caption(scene, rng) if rng.random() < 0.6 else q.ask_place(scene))
    # POPE's own files lack the format line: some questions are learned without it
    return [q.Round(r.kind, r.question, "", r.answer) if r.kind == "yesno" and rng.random() < 0.15 else r for r in rounds]


def collate(rows: list[Row]) -> dict[str, Any]:
    """Return padded tensors [rows, length] of the rows' fields, `images` as one int64 [images of all rows], `goal`: int64
    [tokens to predict], places in the flattened [rows, length - 1], and `kinds`, a list of those that occur; found here, they
    make no GPU wait."""
    import torch

    length = -(-max(len(row.ids) for row in rows) // 16) * 16  # attention with a mask is fast for such lengths

    def padded(name: str, fill: float, dtype: Any) -> Any:
        return torch.tensor([getattr(row, name) + [fill] * (length - len(row.ids)) for row in rows], dtype=dtype)

    batch = {"ids": padded("ids", PAD, torch.long), "segment": padded("segment", -1, torch.long)}
    batch |= {"position": padded("position", 0, torch.long), "weight": padded("weight", 0.0, torch.float32)}
    batch["kind"] = padded("kind", 0, torch.long)
    batch["images"] = torch.tensor([image for row in rows for image in row.images], dtype=torch.long)
    batch["goal"] = (batch["weight"][:, 1:] > 0).flatten().nonzero()[:, 0]
    return batch | {"kinds": sorted({kind for row in rows for kind, own in zip(row.kind, row.weight, strict=True) if own})}
