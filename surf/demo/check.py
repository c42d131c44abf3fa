"""Measure the tiny models on fresh scenes: without references, with good, bad and retrieved ones, before and after tuning.

    python -m surf.demo.check --models surf/demo/models [--images 160] [--tune-images 220]

A stand-alone experiment, not a stage of the pipeline. Its scenes come from a random stream of their own.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo import world
from surf.demo.draw import KINDS, Scene, render
from surf.demo.tokens import EOS, layout


@dataclass(frozen=True)
class View:
    """An image with its caption and, for corpus images, the number of the query whose scene it was made from."""

    scene: Scene
    image: Any
    caption: str
    query: int = -1
    role: str = "query"


def draw_views(images: int, fewest: int, seed: str) -> tuple[list[View], list[View]]:
    """Return query views and a corpus of re-renders, look-alikes and unrelated scenes, drawn as the world does."""
    rng = random.Random(seed)
    queries, corpus = [], []
    for number in range(images):
        scene = q.sample_scene(rng, fewest)
        hidden = q.pick_hidden(scene, rng, world.QUERY_HIDE)
        queries.append(View(scene, render(scene, rng, world.QUERY_NOISE, hidden), ""))
        shown = [(scene, "re-render")] * rng.choices((1, 2, 3), weights=(17, 2, 1))[0]
        shown += [(q.look_alike(scene, rng, hidden), "look-alike") for _ in range(rng.choices((2, 3), weights=(1, 2))[0])]
        corpus += [View(one, render(one, rng, world.CLEAR_NOISE), q.caption(one, rng), number, role) for one, role in shown]
    return queries, corpus


def neighbors(model: Any, preprocess: Any, queries: list[View], corpus: list[View], top: int) -> list[list[int]]:
    """Return the `top` corpus rows most similar to each query image, best first."""
    import torch

    def embed(views: list[View]) -> Any:
        with torch.no_grad():
            return model.encode_image(torch.stack([preprocess(view.image) for view in views]), normalize=True)

    similarity = embed(queries) @ embed(corpus).T
    order: list[list[int]] = similarity.topk(top).indices.tolist()
    return order


def respond(lvlm: Any, processor: Any, prompts: list[tuple[str, list[View]]], tokens: int = 4) -> list[str]:
    """Return greedy answers. A prompt is (question, references and last the query view)."""
    import torch

    answers: list[str] = []
    for start in range(0, len(prompts), 128):
        texts, images = [], []
        for question, views in prompts[start : start + 128]:
            texts.append(render_prompt(processor, question, views))
            images.append([view.image for view in views])
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt").to(lvlm.device)
        with torch.no_grad():
            out = lvlm.generate(**batch, max_new_tokens=tokens, do_sample=False)
        answers += processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def render_prompt(processor: Any, question: str, views: list[View]) -> str:
    captions = [view.caption for view in views[:-1]]
    system = q.SYSTEM_REFERENCES if captions else q.SYSTEM
    messages = [{"role": "system", "content": system}, {"role": "user", "content": layout(question, captions)}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def tune(lvlm: Any, processor: Any, samples: list[tuple[str, list[View], str]], epochs: int, rate: float) -> None:
    """Fine-tune the projector and language model on (question, views, answer); loss on the answer and `</s>`."""
    import torch

    rng = random.Random("tune")
    lvlm.train()
    trained = [p for name, p in lvlm.named_parameters() if "vision_tower" not in name]
    adam = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    batches = (len(samples) + 15) // 16
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=epochs * batches + 1, pct_start=0.1)
    for _ in range(epochs):
        order = rng.sample(samples, len(samples))
        for start in range(0, len(order), 16):
            part = order[start : start + 16]
            texts = [f"{render_prompt(processor, one, views)} {answer}</s>" for one, views, answer in part]
            images = [[view.image for view in views] for _, views, _ in part]
            batch = processor(text=texts, images=images, padding=True, return_tensors="pt").to(lvlm.device)
            labels = torch.full_like(batch["input_ids"], -100)
            for row, (_, _, answer) in enumerate(part):  # left padding: the answer ends every row
                length = len(processor.tokenizer(f" {answer}", add_special_tokens=False).input_ids) + 1
                labels[row, -length:] = batch["input_ids"][row, -length:]
            assert (labels[:, -1] == EOS).all()
            loss = lvlm(**batch, labels=labels).loss
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adam.step()
            schedule.step()
    lvlm.eval()


def pope_questions(queries: list[View], rng: random.Random) -> list[tuple[int, q.Round]]:
    """Return (query number, question): three present and three absent objects per image, absent as in `random`."""
    asked = []
    for number, view in enumerate(queries):
        absent = [kind for kind in KINDS if kind not in view.scene.kinds]
        near = [kind for kind in q.PLACES[view.scene.place] if kind in absent]
        wrong = rng.sample(near, min(1, len(near)))
        wrong += rng.sample([kind for kind in absent if kind not in wrong], 3 - len(wrong))
        asked += [(number, q.ask_yes_no(kind, view.scene)) for kind in rng.sample(view.scene.kinds, 3) + wrong]
    return asked


def accuracy(lvlm: Any, processor: Any, cases: list[tuple[q.Round, list[View]]]) -> str:
    """Return accuracy and share of Yes as text."""
    answers = respond(lvlm, processor, [(case.text, views) for case, views in cases])
    right = sum(answer == case.answer for answer, (case, _) in zip(answers, cases, strict=True))
    yes = sum(answer == "Yes" for answer in answers)
    return f"{right / len(cases):.3f} (yes {yes / len(cases):.2f}, n {len(cases)})"


def pair_samples(
    lvlm: Any, processor: Any, queries: list[View], found: list[list[View]], rng: random.Random
) -> list[tuple[str, list[View], str]]:
    """Make training samples as the pipeline does.

    They are rounds answered wrongly at first, with one reference that mends the answer and one that does not.
    """
    rounds = [(n, r) for n, view in enumerate(queries) for r in q.yes_no_rounds(view.scene, rng, 3)]
    rounds += [(n, q.other_round(view.scene, rng)) for n, view in enumerate(queries)]
    rounds = [(n, r) for n, r in rounds if r.kind != "caption"]
    first = respond(lvlm, processor, [(r.text, [queries[n]]) for n, r in rounds])
    wrong = [(n, r) for (n, r), answer in zip(rounds, first, strict=True) if answer != r.answer]
    again = respond(lvlm, processor, [(r.text, [view, queries[n]]) for n, r in wrong for view in found[n]])
    samples, top = [], len(found[0])
    for index, (n, r) in enumerate(wrong):
        marks = [answer == r.answer for answer in again[index * top : (index + 1) * top]]
        good = [view for view, mark in zip(found[n], marks, strict=True) if mark]
        bad = [view for view, mark in zip(found[n], marks, strict=True) if not mark]
        if good and bad:
            views = [good[0], bad[0]]
            rng.shuffle(views)
            samples.append((r.text, [*views, queries[n]], r.answer))
    print(f"  rounds {len(rounds)}, wrong at first {len(wrong)}, with both kinds of reference {len(samples)}")
    return samples


def simple_samples(queries: list[View], corpus: list[View], rng: random.Random) -> list[tuple[str, list[View], str]]:
    """Make training samples from the scenes themselves: a re-render and a look-alike in random order, gold answers."""
    samples = []
    for number, view in enumerate(queries):
        good = [one for one in corpus if one.query == number and one.role == "re-render"]
        bad = [one for one in corpus if one.query == number and one.role == "look-alike"]
        for one in q.yes_no_rounds(view.scene, rng, 1):
            pair = [rng.choice(good), rng.choice(bad)]
            rng.shuffle(pair)
            samples.append((one.text, [*pair, view], one.answer))
    return samples


def main() -> None:
    import open_clip
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--tune-images", type=int, default=220)
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-4, 1e-3])
    parser.add_argument("--epochs", type=int, nargs="*", default=[3])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{args.models / 'clip'}")
    clip.eval()

    def load() -> Any:
        return AutoModelForImageTextToText.from_pretrained(args.models / "lvlm").to(args.device).eval()

    lvlm, processor = load(), AutoProcessor.from_pretrained(args.models / "lvlm")
    rng = random.Random("check")
    queries, corpus = draw_views(args.images, 3, "check:pope")
    tuned_queries, tuned_corpus = draw_views(args.tune_images, 1, "check:sft")
    everything = corpus + tuned_corpus
    found = [[everything[i] for i in row] for row in neighbors(clip, preprocess, queries, everything, 5)]
    for rank in range(3):
        own = [row[rank].role for n, row in enumerate(found) if row[rank] in corpus and row[rank].query == n]
        good, near = own.count("re-render") / len(found), own.count("look-alike") / len(found)
        print(f"  neighbour {rank + 1}: re-render {good:.2f}, look-alike {near:.2f}, other {1 - good - near:.2f}")
    words = open_clip.get_tokenizer(f"local-dir:{args.models / 'clip'}")([view.caption for view in corpus[:200]])
    with torch.no_grad():
        texts = clip.encode_text(words, normalize=True)
        pictures = clip.encode_image(torch.stack([preprocess(view.image) for view in corpus[:200]]), normalize=True)
    print(f"  text to image recall@1 of 200: {(texts @ pictures.T).argmax(1).eq(torch.arange(len(texts))).float().mean():.2f}")

    asked = pope_questions(queries, rng)
    by_role = {
        role: {n: [v for v in corpus if v.query == n and v.role == role] for n in range(len(queries))}
        for role in ("re-render", "look-alike")
    }

    def conditions(label: str) -> None:
        sets = {
            "no reference": [(r, [queries[n]]) for n, r in asked],
            "re-render": [(r, [by_role["re-render"][n][0], queries[n]]) for n, r in asked],
            "look-alike": [(r, [by_role["look-alike"][n][0], queries[n]]) for n, r in asked],
            "re-render and look-alike": [
                (r, [*rng.sample([by_role[role][n][0] for role in by_role], 2), queries[n]]) for n, r in asked
            ],
            "top 1": [(r, [found[n][0], queries[n]]) for n, r in asked],
            "top 2": [(r, [*found[n][:2], queries[n]]) for n, r in asked],
            "two at random": [(r, [*rng.sample(everything, 2), queries[n]]) for n, r in asked],
        }
        for name, cases in sets.items():
            print(f"  {label}, {name}: {accuracy(lvlm, processor, cases)}", flush=True)

    start = time.time()
    conditions("base")
    print(f"  {time.time() - start:.0f} s")
    bare = [(q.Round(r.kind, r.question, "", r.answer), [queries[n]]) for n, r in asked]
    print(f"  base, bare question: {accuracy(lvlm, processor, bare)}")
    for kind, ask in (("color", q.ask_color), ("choice", q.ask_choice), ("place", lambda s, _: q.ask_place(s))):
        cases = [(ask(view.scene, rng), [view]) for view in queries]
        print(f"  base, {kind}: {accuracy(lvlm, processor, cases)}")
    for view in queries[:3]:
        print(f"  caption: {respond(lvlm, processor, [(q.CAPTION, [view])], 40)[0]!r}; truth {view.scene.kinds}")

    around = [[everything[i] for i in row] for row in neighbors(clip, preprocess, tuned_queries, everything, 5)]
    paired = pair_samples(lvlm, processor, tuned_queries, around, rng)
    plain = simple_samples(tuned_queries, tuned_corpus, rng)
    for epochs in args.epochs:
        for rate in args.rates:
            for name, samples in (("pipeline pairs", paired), ("scene pairs", plain)):
                lvlm = load()
                start = time.time()
                tune(lvlm, processor, samples, epochs, rate)
                print(f"  tuned on {len(samples)} {name}, {epochs} epochs, {rate}: {time.time() - start:.0f} s")
                conditions("tuned")


if __name__ == "__main__":
    main()
