"""The words of the embedded world: random scenes, their captions, and questions about them in LLaVA's wording."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from surf.demo.draw import COLORS, KINDS, PLACES, SMALL, Item, Scene, Style

SHORT = "Answer the question using a single word or phrase."
RELEVANCE = (  # the words of surf.prompts.relevance
    "Would the retrieved image-caption pair help to answer the following question about the last image?\n{}\n"
    "Answer with yes or no."
)
LEAVE_OUT = "Leave out image-caption pairs that do not show the scene of the last image."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_REFERENCES = SYSTEM + (
    " There may be some helpful information in the retrieved image-caption pairs, "
    "the assistant can refer to them before answering a question."
)
WHERE = {"park": "in the park", "street": "on the street", "kitchen": "in the kitchen", "beach": "on the beach"}
OWN_SHARE = 0.65  # chance that an object belongs to the scene's place: this makes objects co-occur
PLACE_WEIGHTS = (5, 4, 3, 2)  # of a place's four objects: this makes some objects frequent


@dataclass(frozen=True)
class Round:
    """One question turn: kind is yesno, color, place, choice, caption, relevance, same, agree or shown; suffix
    is LLaVA's answer format line."""

    kind: str
    question: str
    suffix: str
    answer: str

    @property
    def text(self) -> str:
        return "\n".join(part for part in (self.question, self.suffix) if part)


def sample_scene(rng: random.Random, fewest: int = 1, style: Style = SMALL) -> Scene:
    """Draw a scene of at least `fewest` objects of different kinds, mostly those of its place."""
    place = rng.choice(tuple(PLACES))
    count = max(fewest, rng.choices(style.counts, weights=style.weights)[0])
    kinds: list[str] = []
    while len(kinds) < count:
        kind = sample_kind(rng, place)
        if kind not in kinds:
            kinds.append(kind)
    cells = rng.sample(range(len(style.cells)), count)
    colors = rng.choices(style.colors, k=count)
    return Scene(place, tuple(Item(*parts) for parts in zip(kinds, colors, cells, strict=True)))


def sample_kind(rng: random.Random, place: str) -> str:
    home = place if rng.random() < OWN_SHARE else rng.choice(tuple(PLACES))
    return rng.choices(PLACES[home], weights=PLACE_WEIGHTS)[0]


def pick_hidden(scene: Scene, rng: random.Random, share: float, style: Style = SMALL) -> dict[str, str]:
    """Choose the objects that a query image hides, each with probability `share`, and how."""
    return {kind: rng.choice(style.hidings) for kind in scene.kinds if rng.random() < share}


def look_alike(scene: Scene, rng: random.Random, hidden: dict[str, str]) -> Scene:
    """Return the scene with one or two objects swapped for others that fit the place.

    Mostly what the query image hides is swapped, so that the look-alike is as near to it as a true re-render.
    """
    items = list(scene.items)
    swaps = 2 if len(items) > 2 and rng.random() < 0.25 else 1
    order = sorted(range(len(items)), key=lambda index: rng.random() - (0.8 if items[index].kind in hidden else 0.0))
    for index in order[:swaps]:
        taken = {item.kind for item in items} | set(scene.kinds)
        kind = items[index].kind
        while kind in taken:
            kind = sample_kind(rng, scene.place)
        color = items[index].color if rng.random() < 0.7 else rng.choice(tuple(COLORS))
        items[index] = replace(items[index], kind=kind, color=color)
    return Scene(scene.place, tuple(items))


def hide_some(scene: Scene, rng: random.Random, style: Style) -> dict[str, str]:
    """Choose half of the objects (rounded down) to hide, and how: enough is left to know the scene by."""
    return {kind: rng.choice(style.hidings) for kind in rng.sample(scene.kinds, len(scene.items) // 2)}


def mislead(scene: Scene, rng: random.Random, hidden: dict[str, str], tells: int, style: Style) -> Scene:
    """Return a scene that shows other objects in place of all hidden ones, and `tells` changes of what is in plain sight.

    A tell is another colour, now and then another kind: who compares the images can know that they are not of one scene.
    """
    items = list(scene.items)
    plain = [index for index, item in enumerate(items) if item.kind not in hidden]
    told = rng.sample(plain, min(tells, len(plain)))
    for index, item in enumerate(items):
        if item.kind in hidden or (index in told and rng.random() < 0.25):
            taken = {other.kind for other in items} | set(scene.kinds)
            kind = sample_kind(rng, scene.place)
            while kind in taken:
                kind = rng.choice(KINDS) if rng.random() < 0.2 else sample_kind(rng, scene.place)
            items[index] = replace(item, kind=kind)
        elif index in told:
            items[index] = replace(item, color=rng.choice([color for color in style.colors if color != item.color]))
    return Scene(scene.place, tuple(items))


def glimpse(scene: Scene, rng: random.Random, hidden: dict[str, str]) -> Scene:
    """Return the scene without two things in plain sight: true, but less like the query image than a look-alike."""
    plain = [item for item in scene.items if item.kind not in hidden]
    kept = rng.sample(plain, max(1, len(plain) - 2))
    return Scene(scene.place, tuple(item for item in scene.items if item.kind in hidden or item in kept))


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(scene: Scene, rng: random.Random) -> str:
    """Name every object with its colour, in random order, and the place."""
    names = [article(f"{item.color} {item.kind}") for item in rng.sample(scene.items, len(scene.items))]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    start = rng.choice(("A photo of ", "A photo of ", "A picture of ", ""))
    text = f"{start}{listed} {WHERE[scene.place]}."
    return text[0].upper() + text[1:]


def absent_kind(scene: Scene, rng: random.Random, but: tuple[str, ...] = ()) -> str:
    """Pick a kind that is not in the scene, half of the time one that fits the place."""
    fitting = [kind for kind in PLACES[scene.place] if kind not in scene.kinds + but]
    others = [kind for kind in KINDS if kind not in scene.kinds + but]
    return rng.choice(fitting if fitting and rng.random() < 0.5 else others)


def ask_yes_no(kind: str, scene: Scene) -> Round:
    return Round("yesno", f"Is there {article(kind)} in the image?", SHORT, "Yes" if kind in scene.kinds else "No")


def ask_color(scene: Scene, rng: random.Random) -> Round:
    item = rng.choice(scene.items)
    return Round("color", f"What color is the {item.kind} in the image?", SHORT, item.color)


def ask_place(scene: Scene) -> Round:
    return Round("place", "Where was this photo taken?", SHORT, scene.place)


def ask_choice(scene: Scene, rng: random.Random) -> Round:
    right = rng.choice(scene.kinds)
    first = absent_kind(scene, rng)
    options = [right, first, absent_kind(scene, rng, but=(first,))]
    rng.shuffle(options)
    lines = "\n".join(f"{letter}. {kind}" for letter, kind in zip("ABC", options, strict=True))
    return Round("choice", f"Which object is in the image?\n{lines}", LETTER, "ABC"[options.index(right)])


def ask_relevance(one: Round, helps: bool) -> Round:
    return Round("relevance", RELEVANCE.format(one.text), "", "Yes" if helps else "No")


def ask_same(number: int, same: bool) -> Round:
    """Of one reference among several: is it of the scene that is asked about?"""
    text = f"Does image-caption pair {number} show the scene of the last image?\nAnswer with yes or no."
    return Round("same", text, "", "Yes" if same else "No")


def ask_agree(number: int, kind: str, same: bool) -> Round:
    """Of one thing in a reference: is it there too, in the same colour?"""
    text = f"Does image-caption pair {number} show the same {kind} as the last image?\nAnswer with yes or no."
    return Round("agree", text, "", "Yes" if same else "No")


def ask_shown(number: int, color: str, kind: str, shown: bool) -> Round:
    """Of one thing: is it in a reference?"""
    text = f"Does image-caption pair {number} show {article(f'{color} {kind}')}?\nAnswer with yes or no."
    return Round("shown", text, "", "Yes" if shown else "No")


def told_to_leave_out(one: Round) -> Round:
    """The question, by someone who asks to leave out wrong references."""
    return replace(one, suffix="\n".join(part for part in (one.suffix, LEAVE_OUT) if part))


def ask_caption(scene: Scene, rng: random.Random) -> Round:
    return Round("caption", "", CAPTION, caption(scene, rng))


def yes_no_rounds(scene: Scene, rng: random.Random, each: int) -> list[Round]:
    """Return up to `each` questions about present objects and as many about absent ones, shuffled."""
    present = rng.sample(scene.kinds, min(each, len(scene.kinds)))
    absent: list[str] = []
    while len(absent) < len(present):
        absent.append(absent_kind(scene, rng, but=tuple(absent)))
    rounds = [ask_yes_no(kind, scene) for kind in present + absent]
    rng.shuffle(rounds)
    return rounds


def other_round(scene: Scene, rng: random.Random) -> Round:
    """Return a question of another kind: colour, place, choice or caption."""
    kind = rng.choice(("color", "color", "place", "choice", "choice", "caption"))
    if kind == "color":
        return ask_color(scene, rng)
    if kind == "place":
        return ask_place(scene)
    return ask_choice(scene, rng) if kind == "choice" else ask_caption(scene, rng)
