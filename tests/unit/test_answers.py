"""First answers and re-answers, with a real transformers model of tiny size and random weights."""

import logging
import random
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from surf import cli, config, models, processing, prompts, store
from surf.answer import answer
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, lvlm, sampling
from surf.prompts import Reference
from surf.reanswer import Judge, _turns, asked_again, reanswer
from surf.shards import stable_hash


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def partial(tmp_path, dataset, **depends_on):
    return store.Partial(tmp_path / "part-00000-of-00001.parquet", dataset, **depends_on)


# --- answers -----------------------------------------------------------------------------------------------------------


def section(tiny_lvlm, **options):
    return config.Lvlm(model=str(tiny_lvlm), dtype="float32", **options)


@pytest.fixture(scope="module")
def responder(tiny_lvlm, pictures):
    return lvlm.load(section(tiny_lvlm), Images([str(pictures)]))


@pytest.fixture(scope="module")
def plain(responder, pictures):
    """The same model, answering by `generate` alone."""
    return lvlm.Lvlm(responder.model, responder.processor, Images([str(pictures)]), responder.options, share=False)


def requests_of(count, seed=0):
    words = ["What is this?", "Is there a red circle in the image, or two?", "Why?"]
    made = []
    for number in range(count):
        references = [Reference(f"{number % 7}.png", "a blue square " * (number % 4))] * (number % 3)
        made.append(Request(prompts.build(words[number % 3], f"{number % 11}.png", references), stable_hash(seed, number)))
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batches_and_order_change_no_answer(tiny_lvlm, pictures, responder, temperature):
    requests = requests_of(13)
    alone = [responder.respond([one], max_new_tokens=6, temperature=temperature)[0] for one in requests]
    assert responder.respond(requests, max_new_tokens=6, temperature=temperature) == alone
    assert responder.respond(requests[::-1], max_new_tokens=6, temperature=temperature) == alone[::-1]
    small = lvlm.load(section(tiny_lvlm, batch_size=3, batch_tokens=400), Images([str(pictures)]))
    assert small.respond(requests, max_new_tokens=6, temperature=temperature) == alone


def test_greedy_answers_are_those_of_plain_generate(tiny_lvlm, pictures, responder):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_lvlm).eval()
    processor = AutoProcessor.from_pretrained(tiny_lvlm)
    request = Request(prompts.build("What?", "3.png", [Reference("4.png", "a red circle")]))
    side = [Image.open(pictures / name).convert("RGB") for name in request.prompt.images]
    mean = tuple(int(value * 255) for value in processor.image_processor.image_mean)
    padded = []
    for image in side:
        canvas = Image.new("RGB", (48, 48), mean)
        canvas.paste(image, (0, 4))
        padded.append(canvas)
    inputs = processor(text=prompts.chat(processor, request.prompt), images=padded, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert responder.respond([request], max_new_tokens=8) == [expected]


def test_sampling_follows_the_seed(responder):
    prompt = prompts.build("What?", "0.png")
    draws = [
        responder.respond([Request(prompt, seed) for seed in seeds], max_new_tokens=2, temperature=1.5)
        for seeds in (range(20), range(20), range(20, 40))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_draws_from_the_softmax():
    import torch

    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -1.0, -8.0])
    uniform = torch.from_numpy(sampling.uniforms([stable_hash(seed) for seed in range(4000)], [3]))[:, 0]
    drawn = sampling.pick(logits.expand(4000, -1), 0.7, uniform)
    shares = torch.bincount(drawn, minlength=6) / 4000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=0.025, rtol=0)
    assert shares[3] == 0


def test_random_numbers_are_those_of_splitmix64():
    # first outputs of the generator for seed 1234567, as its authors' C program prints them
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert sampling.uniforms([1234567], range(4))[0].tolist() == [(value >> 11) / 2**53 for value in published]


@pytest.mark.parametrize("shared", [True, False])
def test_out_of_memory_halves_all_batches_that_follow(responder, plain, monkeypatch, shared):
    import torch

    model = responder if shared else plain
    requests = requests_of(9)
    expected = model.respond(requests, max_new_tokens=4)
    costs = []
    owner, name = (model.shared, "generate") if shared else (model, "_generate")
    whole = getattr(owner, name)

    def small_gpu(batch, *args):
        costs.append(sum(len(one.rows) for one in batch) if shared else len(batch))
        if costs[-1] > 3:
            raise torch.OutOfMemoryError
        return whole(batch, *args)

    monkeypatch.setattr(model, "budget", model.budget)
    monkeypatch.setattr(owner, name, small_gpu)
    assert model.respond(requests, max_new_tokens=4) == expected
    too_large = [cost for cost in costs if cost > 3]
    assert costs[: len(too_large)] == too_large and len(too_large) >= 1  # none after the first one that fitted
    model.budget = 1
    assert model.respond(requests, max_new_tokens=4) == expected


def test_loglik_is_the_mean_log_probability_of_the_gold_answer(responder):
    import torch

    requests = requests_of(5)
    golds = ["yes", "a red circle", "no", "three", "blue"]
    found = responder.loglik(requests, golds)
    for request, gold, value in zip(requests, golds, found, strict=True):
        text = prompts.chat(responder.processor, request.prompt)
        whole = responder._encode([request], [f"{text} {gold}{responder.processor.tokenizer.eos_token}"], "right")
        start = responder._encode([request], [text], "right")["input_ids"].shape[1]
        with torch.inference_mode():
            scores = responder.model(**whole).logits[0].log_softmax(-1)
        ids = whole["input_ids"][0]
        expected = np.mean([float(scores[place - 1, ids[place]]) for place in range(start, len(ids))])
        assert value == pytest.approx(expected, abs=1e-4)


def test_models_that_cannot_be_loaded(tmp_path, pictures, tiny_lvlm):
    import shutil

    images = Images([str(pictures)])
    with pytest.raises(SurfError, match=r"lvlm\.model"):
        lvlm.load(config.Lvlm(model=str(tmp_path / "nowhere")), images)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_lvlm, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(SurfError, match=r"expected a folder or a hub name with safetensors weights"):
        lvlm.load(config.Lvlm(model=str(pickled)), images)


def rounds(count):
    rows = [
        {"round_id": f"c{n}#0", "image": f"{n % 6}.png", "question": "What is it?", "answer": "yes", "task": "short"}
        for n in range(count)
    ]
    rows[1]["image"] = "broken.png"
    return store.table_of(rows, "rounds")


class Counting:
    """A responder that counts its rows and dies after `fuse` of them."""

    def __init__(self, inner, fuse=10**9):
        self.inner, self.fuse, self.rows = inner, fuse, 0

    def respond(self, requests, **options):
        if self.rows + len(requests) > self.fuse:
            raise KeyboardInterrupt
        self.rows += len(requests)
        return self.inner.respond(requests, **options)

    def loglik(self, requests, golds):
        return self.inner.loglik(requests, golds)


@pytest.mark.parametrize("gold_loglik", [False, True])
def test_first_answers_resume_without_doing_a_row_twice(tmp_path, tiny_lvlm, pictures, responder, gold_loglik):
    images = Images([str(pictures)])
    options = config.Answer(max_new_tokens=4, flush_rows=3, gold_loglik=gold_loglik)
    arguments = {"lvlm": section(tiny_lvlm), "options": options, "seed": 0}
    whole, errors = answer(rounds(10), responder, images, partial(tmp_path / "whole", "answers"), **arguments)
    assert list(errors) == ["c1#0"] and whole.num_rows == 9
    assert whole["round_id"].to_pylist() == [f"c{n}#0" for n in range(10) if n != 1]
    assert (whole["gold_loglik"].null_count == 9) is not gold_loglik
    killed = Counting(responder, fuse=6)
    with pytest.raises(KeyboardInterrupt):
        answer(rounds(10), killed, images, partial(tmp_path, "answers"), **arguments)
    second = Counting(responder)
    again, _ = answer(rounds(10), second, images, partial(tmp_path, "answers"), **arguments)
    assert again["response"].to_pylist() == whole["response"].to_pylist()
    assert killed.rows + second.rows == 9


class Scripted:
    """Answers right exactly with the references named in `helpful`; remembers what it was asked."""

    def __init__(self, helpful):
        self.helpful, self.asked = helpful, []

    def respond(self, requests, **_):
        self.asked += [request.prompt.images for request in requests]
        return ["yes" if request.prompt.images[0] in self.helpful else "no" for request in requests]

    def loglik(self, requests, golds):
        return [0.0] * len(requests)


def reask(tmp_path, pictures, responder, *, stop_early, references=6, wrong=3):
    rows = [{**row, "base": 0.0, "right": False} for row in store.rows(rounds(wrong + 2))]
    rows = [row for row in rows if row["image"] != "broken.png"][:wrong]
    names = [f"{n}.png" for n in (10, 11, 12, 13, 14, 15)]
    near = {row["image"]: [(100 + n, Reference(name, f"caption {n}")) for n, name in enumerate(names)] for row in rows}
    return reanswer(
        rows,
        near,
        responder,
        Images([str(pictures)]),
        Judge(config.Score()),
        partial(tmp_path, "reanswers", stop=stop_early),
        lvlm=config.Lvlm(model="unused"),
        answer=config.Answer(flush_rows=2),
        options=config.Reanswer(references=references, stop_early=stop_early),
        seed=0,
    )


def test_reanswers_ask_every_reference_alone_or_stop_when_both_kinds_are_found(tmp_path, pictures):
    every = Scripted({"12.png"})
    table, errors = reask(tmp_path / "a", pictures, every, stop_early=False)
    assert table.num_rows == 18 and errors == {}
    assert all(len(images) == 2 for images in every.asked)
    early = Scripted({"12.png"})
    short, _ = reask(tmp_path / "b", pictures, early, stop_early=True)
    assert [row["rank"] for row in store.rows(short)] == [0, 1, 2] * 3
    kept = [row for row in store.rows(table) if row["rank"] < 3]
    assert store.rows(short) == kept


def test_wrong_rounds_and_a_drawn_share_of_the_right_ones_are_asked_again(tmp_path):
    kinds = [False, None, True, True]
    rows = store.rows(rounds(200))
    first = [{"round_id": row["round_id"], "metric": "match", "correct": kinds[n % 4]} for n, row in enumerate(rows)]
    first = [{**row, "rank": -1, "score": float(row["correct"] is True)} for row in first]
    paths = tmp_path / "rounds.parquet", tmp_path / "scores.parquet"
    for path, some, dataset in zip(paths, (rows, first), ("rounds", "scores/answers"), strict=True):
        store.write_table(path, store.table_of(some, dataset), dataset)
    verdicts = {row["round_id"]: row["correct"] for row in first}

    def ask(share, seed=0):
        again = asked_again(*paths, share, seed)
        assert all(row["right"] is verdicts[row["round_id"]] and row["base"] == float(row["right"]) for row in again)
        return [row["round_id"] for row in again]

    wrong, right = ([key for key, value in verdicts.items() if value is kind] for kind in (False, True))
    some = ask(0.3)
    assert ask(0.0) == wrong
    assert sorted(ask(1.0)) == sorted(wrong + right)
    assert set(wrong) < set(some) and 15 < len(some) - len(wrong) < 50 and some != ask(0.3, seed=1)
    assert [key for key in verdicts if key in set(some)] == some  # in the order of the rounds


def test_reanswers_resume_without_doing_a_row_twice(tmp_path, pictures):
    whole, _ = reask(tmp_path / "whole", pictures, Scripted({"13.png"}), stop_early=True)
    killed = Counting(Scripted({"13.png"}), fuse=5)
    with pytest.raises(KeyboardInterrupt):
        reask(tmp_path, pictures, killed, stop_early=True)
    second = Counting(Scripted({"13.png"}))
    again, _ = reask(tmp_path, pictures, second, stop_early=True)
    assert store.rows(again) == store.rows(whole)
    assert killed.rows + second.rows == whole.num_rows


def test_a_reference_that_vanished_goes_to_quarantine_and_the_next_is_asked(tmp_path, pictures):
    hidden = pictures / "11.png"
    data = hidden.read_bytes()
    hidden.unlink()
    try:
        table, errors = reask(tmp_path, pictures, Scripted(set()), stop_early=True, wrong=2)
    finally:
        hidden.write_bytes(data)
    assert sorted(errors) == ["c0#0#1", "c2#0#1"]
    assert sorted({row["rank"] for row in store.rows(table)}) == [0, 2, 3, 4, 5]


def test_a_round_whose_own_image_vanished_goes_to_quarantine(tmp_path, pictures):
    gone = {row["image"] for row in store.rows(rounds(5))} - {"broken.png"}
    elsewhere = tmp_path / "references"
    shutil.copytree(pictures, elsewhere)
    for name in gone:
        (elsewhere / name).unlink()
    table, errors = reask(tmp_path, elsewhere, Scripted(set()), stop_early=True, references=2)
    assert table.num_rows == 0 and len(errors) == 3 * 2


def test_a_signal_ends_reanswers_between_two_turns_of_one_lot(tmp_path, pictures, monkeypatch):
    asked = []

    class Signalled(Scripted):
        def respond(self, requests, **options):
            monkeypatch.setattr(cli, "_asked", [signal.SIGTERM])
            asked.append(len(requests))
            return super().respond(requests, **options)

    with pytest.raises(cli.Stopped):
        reask(tmp_path, pictures, Signalled(set()), stop_early=False, wrong=1)
    assert len(asked) < 3  # of six turns


def test_captions_are_cut_where_the_context_is_too_short(tiny_lvlm, pictures, responder, caplog, monkeypatch):
    monkeypatch.setattr(responder.model.config.get_text_config(), "max_position_embeddings", 150)
    captions = ("a red circle", "四" * 200)
    asked = [models.request("What?", "3.png", [Reference("4.png", caption)], responder.options) for caption in captions]
    seen = []
    chat = prompts.chat
    monkeypatch.setattr(prompts, "chat", lambda processor, prompt, *rest: seen.append(prompt) or chat(processor, prompt, *rest))
    with caplog.at_level(logging.INFO, "surf"):
        responder.respond(asked, max_new_tokens=4)
    assert "captions of 1 prompts were cut further, to fit into the model's 150 tokens" in caplog.text
    assert seen[0] == asked[0].prompt and 0 < seen[-1].text.count("四") < 200
    length = len(processing.token_ids(responder.processor, chat(responder.processor, seen[-1]))) + 2 * 3 + 4
    assert 75 < length <= 150
    monkeypatch.setattr(responder.model.config.get_text_config(), "max_position_embeddings", 20)
    with pytest.raises(SurfError, match=r"takes \d+ tokens without captions.*at most 20 together.*fewer references"):
        responder.respond(asked[:1], max_new_tokens=4)


def test_how_far_captions_are_cut_for_a_gold_answer_is_the_row_s_own_business(tiny_lvlm, responder, caplog, monkeypatch):
    monkeypatch.setattr(responder.model.config.get_text_config(), "max_position_embeddings", 120)
    reference = Reference("4.png", "a red circle beside a blue square " * 4)
    asked = [models.request("What?", "3.png", [reference], responder.options)] * 2
    alone, beside = responder.loglik(asked[:1], ["red"]), responder.loglik(asked, ["red", "a long answer " * 3])
    assert beside[0] == pytest.approx(alone[0], abs=1e-5)
    with caplog.at_level(logging.INFO, "surf"):
        responder.loglik(asked, ["red", "a long answer " * 3])
    assert "captions of" in caplog.text


def test_the_first_turns_of_reanswers_are_short():
    """A slow model must not work for long before it saves for the first time."""
    turns = _turns([{"round_id": f"c{n}#0"} for n in range(5000)], lambda one: one.rank < 3, 4096)
    sizes = []
    for lot in turns:
        sizes.append(len(lot))
        for one in lot:
            one.rank += 1
    assert sizes[0] <= cli.FIRST_SLICE and sizes[1] <= 4 * cli.FIRST_SLICE and sum(sizes) == 3 * 5000


@pytest.mark.parametrize("stop_early", [True, False])
def test_reanswers_in_turns_are_those_of_one_round_after_the_other(tmp_path, pictures, stop_early):
    """Rounds of different images stop at different ranks; turns stay full, and every reference is asked as if alone."""
    draw = random.Random(0)
    rows = [
        {"round_id": f"c{n}#0", "image": f"{n // 3}.png", "question": "What?", "answer": "yes", "task": "short"}
        for n in range(30)
    ]
    rows = [{**row, "base": 0.0, "right": False} for row in rows]
    near = {f"{n}.png": [(r, Reference(f"{10 + r}.png", "x")) for r in range(draw.randrange(0, 7))] for n in range(10)}
    helpful = {(row["round_id"], rank) for row in rows for rank in range(6) if draw.random() < 0.4}
    numbers = {stable_hash(0, row["round_id"], rank): (row["round_id"], rank) for row in rows for rank in range(6)}
    sizes = []

    class Seeing(Scripted):
        def respond(self, requests, **_):
            sizes.append(len(requests))
            return ["yes" if numbers[request.seed] in helpful else "no" for request in requests]

    expected = []
    for row in rows:
        kinds = set()
        for rank in range(min(6, len(near[row["image"]]))):
            if stop_early and len(kinds) == 2:
                break
            kinds.add((row["round_id"], rank) in helpful)
            expected.append((row["round_id"], rank, "yes" if (row["round_id"], rank) in helpful else "no"))
    table, errors = reanswer(
        rows,
        near,
        Seeing(()),
        Images([str(pictures)]),
        Judge(config.Score()),
        partial(tmp_path, "reanswers"),
        lvlm=config.Lvlm(model="unused"),
        answer=config.Answer(flush_rows=6),
        options=config.Reanswer(references=6, stop_early=stop_early),
        seed=0,
    )
    assert [(row["round_id"], row["rank"], row["response"]) for row in store.rows(table)] == expected and errors == {}
    assert sorted(sizes)[len(sizes) // 2] >= 4  # rounds that are done are replaced: most turns are full
