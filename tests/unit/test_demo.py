"""The embedded world: equal seeds give equal bytes, the files keep their formats, the models load and answer in form."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from surf import config, prompts
from surf.demo import MODELS, controlled, tokens, world
from surf.demo import questions as q
from surf.demo.draw import KINDS, LARGE, SIZE, Scene, render
from surf.demo.lessons import Rows
from surf.demo.recipes import RECIPES
from surf.demo.train import draw_bank

SCALE = 0.1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    world.build(out, scale=SCALE)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_equal_seeds_give_equal_bytes(built: Path, tmp_path: Path) -> None:
    world.build(tmp_path / "again", scale=SCALE)
    world.build(tmp_path / "other", seed=1, scale=SCALE)
    assert digests(built) == digests(tmp_path / "again")
    assert digests(built)["sft.json"] != digests(tmp_path / "other")["sft.json"]


def test_corpus_rows_have_images_captions_and_two_broken_ones(built: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(built / "packed.parquet")
    assert [str(field.type) for field in table.schema] == ["string", "binary"]
    packed = dict(zip(*(table[name].to_pylist() for name in ("image", "bytes")), strict=True))
    rows = read(built / "corpus.json")
    plain = [row for row in rows if set(row) == {"image", "caption"}]
    turns = [row["conversations"] for row in rows if "conversations" in row]
    assert plain and len(plain) + len(turns) == len(rows)
    assert all([turn["from"] for turn in pair] == ["human", "gpt"] for pair in turns)
    missing, broken = [], []
    for row in rows:
        path = built / "images" / row["image"]
        if row["image"] in packed:
            assert not path.exists()
        elif not path.exists():
            missing.append(row["image"])
        else:
            try:
                assert Image.open(path).convert("RGB").size == (SIZE, SIZE)
            except OSError:
                broken.append(row["image"])
    assert len(missing) == len(broken) == 1


def test_some_sft_images_are_corpus_images_too(built: Path) -> None:
    names = {row["image"] for row in read(built / "corpus.json")}
    assert sum(name.startswith("sft/") for name in names) == world.LISTED_TWICE
    loose = Counter(digests(built / "images").values())
    packed_bytes = (built / "packed.parquet").read_bytes()
    sft = [path.read_bytes() for path in (built / "images" / "sft").iterdir()]
    twins = sum(loose[hashlib.sha256(data).hexdigest()] > 1 or data in packed_bytes for data in sft)
    assert twins == world.COPIES


def test_sft_rows_follow_llava(built: Path) -> None:
    rows = read(built / "sft.json")
    with_image = [row for row in rows if "image" in row]
    assert len(rows) - len(with_image) > 0
    questions = []
    for row in with_image:
        asked = [turn["value"] for turn in row["conversations"][::2]]
        assert asked[0].startswith("<image>\n") and not any("<image>" in text for text in asked[1:])
        questions += asked
    assert sum("Is there a" in text for text in questions) >= 0.6 * len(questions)
    assert sum(not (built / "images" / row["image"]).exists() for row in with_image) == 1


def test_pope_asks_three_present_and_three_absent_objects(built: Path) -> None:
    splits = {}
    for split in ("random", "popular", "adversarial"):
        lines = (built / "pope" / f"coco_pope_{split}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        labels = Counter((row["image"], row["label"]) for row in rows)
        assert set(labels.values()) == {3}
        assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
        splits[split] = {(row["image"], row["text"]) for row in rows}
    assert len({image for pairs in splits.values() for image, _ in pairs}) == len(labels) // 2
    assert splits["random"] != splits["popular"] != splits["adversarial"]


def test_no_world_image_is_a_training_image(built: Path) -> None:
    _, images = draw_bank(60, 0)
    trained = {image.tobytes() for image in images}
    rng = random.Random("world:0")
    assert rng.random() != random.Random("train:0").random()
    files = [*(built / "images" / "sft").iterdir(), *(built / "images" / "pope").iterdir()]
    assert all(np.asarray(Image.open(path)).tobytes() not in trained for path in files)


def test_look_alikes_differ_in_one_or_two_objects() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = q.sample_scene(rng)
        other = q.look_alike(scene, rng, q.pick_hidden(scene, rng, 0.5))
        assert other.place == scene.place and len(set(other.kinds)) == len(scene.kinds)
        assert 1 <= len(set(other.kinds) - set(scene.kinds)) <= 2


def test_every_kind_can_be_drawn() -> None:
    for kind in KINDS:
        scene = Scene("park", (q.Item(kind, "red", 0),))
        pixels = np.asarray(render(scene, random.Random(1), 0.0), dtype=int)
        bare = np.asarray(render(Scene("park", ()), random.Random(1), 0.0), dtype=int)
        assert (abs(pixels - bare).max(axis=2) > 40).sum() > 60, kind


def test_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "lvlm")
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "<image>\nQ"}]

    def text(messages: list[dict[str, Any]], more: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more))

    assert text(turns, True) == "S USER: <image>\nQ ASSISTANT:"
    assert text(turns[1:], True) == "USER: <image>\nQ ASSISTANT:"
    assert text([*turns, {"role": "assistant", "content": "A"}], False) == "S USER: <image>\nQ ASSISTANT: A</s>"
    items = [{"type": "image"}, {"type": "text", "text": "\nQ"}]
    assert text([{"role": "user", "content": items}], True) == "USER: <image>\nQ ASSISTANT:"
    assert tokenizer("any string: é 漢").input_ids[0] == tokens.BOS
    assert tokenizer.decode(tokenizer("any string: é 漢").input_ids, skip_special_tokens=True) == "any string: é 漢"


def test_the_weights_have_the_names_of_published_checkpoints() -> None:
    # vLLM 0.26 reads no others
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(MODELS / "lvlm" / "model.safetensors", "numpy") as weights:
        tower = [name for name in weights.keys() if name.startswith("vision_tower.")]  # noqa: SIM118 (it cannot be walked itself)
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)


def test_models_answer_in_the_right_form() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODELS / "lvlm").eval()
    processor = transformers.AutoProcessor.from_pretrained(MODELS / "lvlm")
    rng = random.Random("form")
    scene = q.sample_scene(rng, 3)
    image, text = render(scene, rng, world.QUERY_NOISE), q.caption(scene, rng)
    expected = {
        q.ask_yes_no("dog", scene).text: {"Yes", "No"},
        q.ask_color(scene, rng).text: set(q.COLORS),
        q.ask_place(scene).text: set(q.PLACES),
        q.ask_choice(scene, rng).text: set("ABC"),
    }
    for references in (0, 2):
        shown = tokens.layout("{}", [text] * references)
        system = q.SYSTEM_REFERENCES if references else q.SYSTEM
        prompts = [f"{system} USER: {shown.format(question)} ASSISTANT:" for question in (*expected, q.CAPTION)]
        images = [[image] * (references + 1)] * len(prompts)
        batch = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=40)
        answers = [a.strip() for a in processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]
        for answer, allowed in zip(answers, expected.values(), strict=False):
            assert answer in allowed
        assert answers[-1].endswith(".") and len(answers[-1].split()) >= 4


def test_clip_and_bert_load_and_match_pictures_with_words() -> None:
    open_clip = pytest.importorskip("open_clip")
    import torch
    from transformers import AutoModel, AutoTokenizer

    name = f"local-dir:{MODELS / 'clip'}"
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    rng = random.Random("match")
    scenes = [q.sample_scene(rng, 2) for _ in range(20)]
    with torch.no_grad():
        pixels = torch.stack([preprocess(render(scene, rng, world.CLEAR_NOISE)) for scene in scenes])
        image = clip.eval().encode_image(pixels, normalize=True)
        text = clip.encode_text(open_clip.get_tokenizer(name)([q.caption(s, rng) for s in scenes]), normalize=True)
    assert (image @ text.T).argmax(1).eq(torch.arange(20)).float().mean() > 0.7
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "bert")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(MODELS / "bert")(**tokenizer("A red dog.", return_tensors="pt")).last_hidden_state
    assert hidden.shape[2] == 64
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 8 * 2**20


# --- the controlled world ---------------------------------------------------------------------------------------------

SHARES = (0.2, 0.5, 1.0)
SIZES = controlled.Options(images=5, test_images=5, corpus=50)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("controlled")
    controlled.build(out, SHARES, SIZES)
    return out


def truth(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / "truth.parquet").to_pylist()


def test_any_number_of_workers_draws_the_same_world(known: Path, tmp_path: Path) -> None:
    import dataclasses

    controlled.build(tmp_path, SHARES, dataclasses.replace(SIZES, workers=2))
    assert digests(known) == digests(tmp_path)


@pytest.mark.parametrize("share", SHARES)
def test_the_share_of_misled_queries_is_the_one_asked_for(known: Path, share: float) -> None:
    """What the corpus lists for a misled query names nothing that it hides, but for one glimpse."""
    listed = {row["image"]: row["caption"] for row in read(known / f"corpus-{share:g}.json")}
    assert len(listed) == SIZES.corpus
    misled: Counter[str] = Counter()
    for query, rows in by_query(known).items():
        case = "misleads" if rows[0]["level"] < share else "helps"
        misled[rows[0]["split"]] += case == "misleads"
        own = [row for row in rows if row["case"] == case]
        assert len(own) == controlled.LISTED, query
        for row in own:
            words = listed[row["image"]].rstrip(".").replace(",", "").split()
            named = [kind in words for kind in row["hidden"]]
            assert all(named) if row["good"] else not any(named), (row, words)
        assert not any(row["image"] in listed for row in rows if row["image"] not in {one["image"] for one in own})
        assert Counter(row["good"] for row in own)[True] == (2 if case == "helps" else 1)
    assert misled == Counter({"sft": round(5 * share), "pope": round(5 * share)})


def by_query(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in truth(folder):
        rows.setdefault(row["query"], []).append(row)
    return rows


def test_a_misleading_reference_can_be_told_from_what_is_in_plain_sight() -> None:
    rng = random.Random(0)
    for tells in (1, 2):
        for _ in range(100):
            scene = q.sample_scene(rng, style=LARGE)
            hidden = q.hide_some(scene, rng, LARGE)
            other = q.mislead(scene, rng, hidden, tells, LARGE)
            plain = [item for item in scene.items if item.kind not in hidden]
            assert len(hidden) == 4 and len(q.glimpse(scene, rng, hidden).items) == 6
            assert sum(item not in other.items for item in plain) == tells < len(plain) + 1
            assert not set(other.kinds) & set(hidden) and len(set(other.kinds)) == len(scene.kinds)
            assert [item.cell for item in other.items] == [item.cell for item in scene.items]


def test_the_question_files_ask_about_images_outside_the_corpus(known: Path) -> None:
    asked = {json.loads(line)["image"] for line in (known / "pope" / "coco_pope_random.json").read_text().splitlines()}
    tuned = {row["image"] for row in read(known / "sft.json")}
    corpus = {row["image"] for share in SHARES for row in read(known / f"corpus-{share:g}.json")}
    assert len(asked) == len(tuned) == 5 and not asked & tuned and not (asked | tuned) & corpus


def test_training_teaches_to_believe_and_to_judge_apart() -> None:
    """Prompts that are answered hold true references alone, if trust is 1; others ask for nothing but their relevance."""
    import dataclasses

    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "lvlm")
    recipe = dataclasses.replace(RECIPES["large"], lvlm_batch=4, trust=1.0, image_steps=30, judged=0.5)
    bank, _ = draw_bank(6, 0, recipe.style)
    rows = Rows(bank, tokenizer, recipe, blind=False)
    first, again = rows[3], rows[3]
    assert [first.pop(name) for name in ("name", "kinds")] == [again.pop(name) for name in ("name", "kinds")]
    assert all(bool((first[name] == again[name]).all()) for name in first)
    drawn = [rows[step] for step in range(30)]
    assert {one["name"] for one in drawn} >= {"0 references", "2 references", "told"}
    assert {kind for one in drawn for kind in one["kinds"]} == set(range(5))
    seen: Counter[tuple[str, bool]] = Counter()
    rng = random.Random(0)
    for _ in range(40):
        answering = rows.answering(rng, 2)
        assert "Would the retrieved" not in tokenizer.decode(answering.ids)
        assert {image // 3 for image in answering.images} == {answering.images[-1] // 3}
        assert [image % 3 for image in answering.images] == [1, 1, 0]
        for judged in (rows.judging(rng), rows.telling_apart(rng, 2)):
            lesson = bank[judged.images[-1] // 3]
            text = " ".join(tokenizer.decode(judged.ids).replace("<image>", "").split())
            told, _, asked = text.partition("</Retrieval>")
            captions = re.split(r"\d\. ", told)[1:]
            shown = [{item for item in lesson.scene.items if f"{item.color} {item.kind} " in _words(one)} for one in captions]
            for question in asked.split("</s>")[:-1]:
                said = question.endswith("Yes")
                about = re.search(r"pair (\d) show (?:the same (\w+)|an? (\w+ \w+)\?|the scene)", question)
                number = int(about[1]) - 1 if about else 0
                if about and about[2]:
                    assert about[2] not in lesson.hidden
                    assert said == any(item.kind == about[2] for item in shown[number])
                elif about and about[3]:
                    assert said == (f"{about[3]} " in _words(captions[number]))
                else:
                    assert said == (len(shown[number]) == len(lesson.scene.items))
                    assert about or "Would the retrieved" in question
                seen[("agree" if about[2] else "shown" if about[3] else "same") if about else "relevance", said] += 1
    assert len(seen) == 8 and min(seen.values()) >= 10
    told = tokenizer.decode(rows.careful(rng, 2).ids)
    assert told.count("ASSISTANT:") == told.count(q.LEAVE_OUT) + 2  # two questions ask which references are of the scene


def _words(text: str) -> str:
    """Without punctuation, and a blank behind each word."""
    return re.sub(r"[.,]", " ", text) + " "


def test_each_process_draws_scenes_of_its_own() -> None:
    style = RECIPES["large"].style
    whole, images = draw_bank(4, 0, style)
    halves = [draw_bank(2, 0, style, first=rank, step=2) for rank in (0, 1)]
    assert [halves[number % 2][0][number // 2] for number in range(4)] == whole
    assert np.array_equal(halves[1][1][3:6], images[9:12])


def test_the_large_model_learns_to_judge_in_the_words_of_evaluation() -> None:
    reference = prompts.Reference("r.png", "a cup")
    asked = prompts.from_options(prompts.relevance("What?"), "q.png", [reference], config.Lvlm())
    assert asked.text.endswith(q.RELEVANCE.format("What?"))
