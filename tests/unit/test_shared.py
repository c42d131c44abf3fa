"""Shared prefixes: the fast way to answers gives what the model's own `generate` and forward pass give."""

import random
from dataclasses import replace

import numpy as np
import pytest

from surf import config, prompts
from surf.errors import ImageError
from surf.images import Images
from surf.models import Request, decode, features, fused, lvlm, prefix, shared
from surf.models.features import Ahead, Features, pool
from surf.prompts import Reference
from surf.shards import stable_hash

WORDS = ["What", "is", "red", "circle", "two", "yes", "no"]


@pytest.fixture(scope="module")
def fast(tiny_lvlm, drawn_images):
    model = lvlm.load(config.Lvlm(model=str(tiny_lvlm), dtype="float32"), Images([str(drawn_images)]))
    assert model.shared is not None
    return model


@pytest.fixture(scope="module")
def slow(fast):
    return lvlm.Lvlm(fast.model, fast.processor, fast.images, fast.options, share=False)


def some(count, seed=0, references=3):
    """Requests with none to two references; some share image and references with others, some don't."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        pair = Reference(f"r{draw.randrange(3)}.png", "a blue square " * draw.randrange(4))
        question = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 14)))
        image = f"q{draw.randrange(2)}.png"
        made.append(Request(prompts.build(question, image, [pair] * draw.randrange(references)), stable_hash(seed, number)))
    return made


@pytest.mark.parametrize("limit", [1, 2, 9, 40])
def test_greedy_answers_are_those_of_generate(fast, slow, limit):
    requests = some(24)
    assert fast.respond(requests, max_new_tokens=limit) == slow.respond(requests, max_new_tokens=limit)


def test_sampled_answers_are_those_of_generate_in_any_order_and_batch(fast, slow):
    requests = some(18)
    expected = slow.respond(requests, max_new_tokens=12, temperature=0.9)
    assert fast.respond(requests, max_new_tokens=12, temperature=0.9) == expected
    assert fast.respond(requests[::-1], max_new_tokens=12, temperature=0.9) == expected[::-1]
    odd = fast.respond(requests[1::2], max_new_tokens=12, temperature=0.9)
    assert odd == expected[1::2]
    assert len(set(expected)) > 12


@pytest.mark.parametrize("layout", prompts.LAYOUTS)
def test_every_layout_shares_all_that_stands_before_the_question(fast, slow, layout):
    pair = [Reference("r1.png", "a red circle")]
    requests = [Request(prompts.build(question, "q1.png", pair, layout=layout)) for question in ("What?", "Is it two? yes", "")]
    read = []
    watched = shared.Prefill.prefix
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.Prefill, "prefix", lambda self, one, *rest: (read.append(one.groups), watched(self, one, *rest)))
        assert fast.respond(requests, max_new_tokens=6) == slow.respond(requests, max_new_tokens=6)
    assert read == [1]


def test_logliks_are_those_of_one_forward_pass(fast, slow):
    requests = some(14)
    golds = ["yes", "a red circle", "no two three", "blue", "a", "", "x"] * 2
    np.testing.assert_allclose(fast.loglik(requests, golds), slow.loglik(requests, golds), atol=1e-4)


def test_prompts_without_an_image_are_answered_too(fast, slow):
    texts = [Request(prompts.Prompt(prompts.SYSTEM_PROMPT, question, ())) for question in ("What is red?", "Why?")]
    mixed = [texts[0], *some(3), texts[1]]
    assert fast.respond(mixed, max_new_tokens=6) == slow.respond(mixed, max_new_tokens=6)
    assert fast.respond([], max_new_tokens=6) == [] and fast.loglik([], []) == []


def test_a_prompt_that_ends_with_its_image_has_no_suffix_and_goes_the_plain_way(fast, monkeypatch):
    request = Request(prompts.build("What?", "q1.png"))
    expected = fast.respond([request], max_new_tokens=3)
    asked = []
    plain = fast._generate
    monkeypatch.setattr(prefix, "split", lambda ids, image: (tuple(ids), ()))
    monkeypatch.setattr(fast, "_generate", lambda *args: asked.append(1) or plain(*args))
    assert fast.respond([request], max_new_tokens=3) == expected and asked == [1]


def test_finished_prompts_leave_the_batch(fast, slow, monkeypatch):
    requests = some(24)
    # answers stop at very different lengths when many tokens end them
    ends = frozenset(random.Random(1).sample(range(len(fast.processor.tokenizer)), 60)) | fast.shared.ends
    monkeypatch.setattr(fast.shared, "ends", ends)
    monkeypatch.setattr(slow.model.generation_config, "eos_token_id", sorted(ends))
    sizes = []
    forward = fast.shared.prefill.forward
    monkeypatch.setattr(fast.shared.prefill, "forward", lambda ids, *rest: (sizes.append(ids.numel()), forward(ids, *rest))[1])
    decode = fast._texts
    monkeypatch.setattr(slow, "_texts", lambda rows: decode([_until(row.tolist(), ends) for row in rows]))
    found = fast.respond(requests, max_new_tokens=40)
    assert found == slow.respond(requests, max_new_tokens=40)
    steps = sizes[1:]
    assert min(steps) <= max(steps) // 4 and steps[-1] < steps[0]


def _until(tokens, ends):
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def test_an_image_is_encoded_once_while_its_features_are_kept(fast, monkeypatch):
    seen = []
    encode = fast.shared.features.encode
    monkeypatch.setattr(fast.shared.features, "encode", lambda pixels: (seen.append(len(pixels)), encode(pixels))[1])
    fast.shared.features.clear()
    requests = some(20)
    names = {name for request in requests for name in request.prompt.images}
    first = fast.respond(requests, max_new_tokens=3)
    assert sum(seen) == len(names)
    assert fast.respond(requests, max_new_tokens=3) == first and sum(seen) == len(names)
    monkeypatch.setattr(fast.shared.features, "limit", 1)
    assert fast.respond(requests, max_new_tokens=3) == first and fast.shared.features.bytes == 0


def test_features_keep_the_latest_up_to_their_limit():
    import torch

    made = []
    kept = Features(lambda pixels: made.append(len(pixels)) or pixels * 2, limit=3 * 8)
    pixels = {name: torch.tensor([float(name), 0.0]) for name in "12345678"}
    assert [one[0].item() for one in kept(["1", "2", "1"], pixels)] == [2.0, 4.0, 2.0] and made == [2]
    assert [one[0].item() for one in kept(["2", "1"], {})] == [4.0, 2.0]
    kept(["3"], pixels)
    kept(["1"], pixels)  # now the latest
    kept(["4"], pixels)
    assert list(kept.kept) == ["3", "1", "4"] and kept.bytes == 24
    assert [one[0].item() for one in kept(["5", "6", "7", "8"], pixels)] == [10.0, 12.0, 14.0, 16.0]  # more than it holds
    assert list(kept.kept) == ["6", "7", "8"] and kept.bytes == 24


def test_images_are_decoded_ahead_and_errors_reach_the_asker():
    done = []

    def work(name):
        if name == "bad":
            raise ImageError("broken")
        done.append(name)
        return name.upper()

    with pool() as threads:
        ahead = Ahead(threads, work, ["a", "b", "bad", "a", "c"])
        assert ahead("b") == "B" and ahead("a") == "A" and ahead("d") == "D"
        with pytest.raises(ImageError, match="broken"):
            ahead("bad")
        assert ahead("c") == "C" and sorted(done) == ["a", "b", "c", "d"]
        ahead.close()


def test_images_ahead_wait_for_their_turn(monkeypatch):
    monkeypatch.setattr(features, "AHEAD", 2)
    begun = []
    with pool() as threads:
        ahead = Ahead(threads, lambda name: begun.append(name) or name, "abcdef")
        assert ahead("a") + ahead("b") == "ab" and begun == ["a", "b"]
        ahead.fill()
        assert ahead("d") == "d" and sorted(begun) == ["a", "b", "c", "d"]
        assert ahead("e") == "e" and ahead("c") == "c"  # nobody filled up: asking did
    assert sorted(begun) == ["a", "b", "c", "d", "e"]


def test_what_failed_ahead_is_tried_again_and_what_nobody_asks_for_makes_room(monkeypatch):
    monkeypatch.setattr(features, "AHEAD", 2)
    tries, known = [], {"c"}

    def work(name):
        tries.append(name)
        if tries.count(name) == 1 and name == "a":
            raise MemoryError
        return name

    with pool() as threads:
        ahead = Ahead(threads, work, "abcde", known.__contains__)
        assert ahead("a") == "a" and tries.count("a") == 2
        ahead.drop("b")
        ahead.fill()
        assert ahead("d") + ahead("e") == "de"
    assert sorted(tries) == ["a", "a", "b", "d", "e"]


def test_groups_and_batches():
    image = 9
    assert prefix.split([1, 9, 2, 9, 3, 4], image) == ((1, 9, 2, 9), (3, 4))
    assert prefix.split([1, 2], image) == ((), (1, 2)) and prefix.split([1, 9], image) == ((1, 9), ())
    asked = [(n, (1, 9), (5,) * (n % 3 + 1), (f"{n % 2}.png",), 10) for n in range(7)]
    asked += [(7, (1, 2, 9), (5,), ("0.png",), 3), (8, (1, 9), (5,), ("2.png",), 60)]
    groups = prefix.group(asked, image, 4)
    assert [(one.images[0], one.length, sorted(one.rows), one.tokens, one.new) for one in groups] == [
        ("2.png", 5, [8], 1, 60),  # answers of similar length stand together, the longest first
        ("0.png", 5, [0, 2, 4, 6], 1 + 3 + 2 + 1, 10),
        ("1.png", 5, [1, 3, 5], 2 + 1 + 3, 10),
        ("0.png", 6, [7], 1, 3),
    ]
    # whatever the budget, each prompt comes once, and a batch keeps to the budget unless it is one prompt
    for budget in (1, 100, 200, 10_000):
        for size in (1, 3, 100):
            left, rows = prefix.group(asked, image, 4), []
            while left:
                batch = prefix.take(left, budget, size)
                own = [row for one in batch for row in one.rows]
                assert len(own) == 1 or (prefix.cost(batch) <= budget and len(own) <= size)
                rows += own
            assert sorted(rows) == list(range(9))


def test_few_shapes_occur():
    made = {prefix.coarse(number, 8) for number in range(1, 129)}
    assert made == {8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128}
    assert all(number <= prefix.coarse(number, 8) <= 1.25 * number for number in range(8, 500) if number > 32)


def test_a_wrong_guess_at_the_length_costs_time_and_nothing_else(fast, slow, monkeypatch):
    requests = [replace(request, guess=1) for request in some(24)]
    monkeypatch.setattr(fast, "budget", 700)  # enough for short answers of several groups
    raised = []
    generate = fast.shared.generate

    def watched(*words):
        try:
            return generate(*words)
        except decode.Full:
            raised.append(1)
            raise

    monkeypatch.setattr(fast.shared, "generate", watched)
    assert fast.respond(requests, max_new_tokens=60) == slow.respond(requests, max_new_tokens=60)
    assert raised and fast.budget == 700


def test_who_may_share_prefixes(fast, monkeypatch):
    build = lambda **options: shared.Shared.build(  # noqa: E731
        fast.model, fast.processor, fast.images, fast.options, fast.image_tokens, **options
    )
    assert shared.why_not(fast.model) == ""
    with monkeypatch.context() as patch:
        patch.setattr(fast.model.config, "model_type", "qwen2_5_vl")
        assert "qwen2_5_vl" in shared.why_not(fast.model) and build(check=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(fast.model.generation_config, "repetition_penalty", 1.3)
        assert "repetition_penalty" in shared.why_not(fast.model)
    with monkeypatch.context() as patch:  # a model whose images attend both ways, say: the check finds out
        causal = shared.Layout.suffix_mask
        patch.setattr(shared.Layout, "suffix_mask", lambda self: causal(self) | True)
        assert build(check=True) is None and build(check=False) is not None


def test_compiled_functions_change_no_answer(fast, monkeypatch):
    import torch
    from torch._dynamo.utils import counters

    monkeypatch.setattr(fused, "BACKEND", "aot_eager")  # the machine's compiler is not what is tested
    fused.compiled.cache_clear()
    torch.compiler.reset()
    decoder = fast.model.model.language_model
    requests = some(6)
    expected = fast.respond(requests, max_new_tokens=5)
    try:
        counters.clear()
        assert fused.enable(decoder, list(decoder.layers), train=False)
        assert fast.respond(requests, max_new_tokens=5) == expected
        made = counters["stats"]["unique_graphs"]
        assert fast.respond(some(3), max_new_tokens=9) and counters["stats"]["unique_graphs"] - made <= 3  # one token is a case
    finally:
        fused.disable(decoder)
        fused.compiled.cache_clear()
        torch.compiler.reset()


def test_recorded_steps_are_run_again_for_equal_shapes_only(fast, slow, monkeypatch):
    """On the CPU nothing can be recorded: here a "graph" calls the step again, on the tensors that stayed in place."""

    class Graph:
        def __init__(self, work):
            self.replay = work

    recorded = []
    steps = fast.shared.steps
    steps.clear()
    monkeypatch.setattr(steps, "record", True)
    monkeypatch.setattr(steps, "capture", lambda work: recorded.append(1) or Graph(work))
    requests = some(12)
    expected = slow.respond(requests, max_new_tokens=12)
    assert [fast.respond(requests, max_new_tokens=12) for _ in range(3)] == [expected] * 3
    first = len(recorded)
    assert 0 < first == sum(step.graph is not None for step in steps.shapes.values())
    kept = {id(step) for step in steps.shapes.values()}
    more = some(60, seed=3)
    assert fast.respond(more, max_new_tokens=12) == slow.respond(more, max_new_tokens=12)  # the cache grows and moves
    assert not kept & {id(step) for step in steps.shapes.values()}


def test_a_step_that_cannot_be_recorded_runs_as_it_is(fast, slow, monkeypatch, caplog):
    steps = fast.shared.steps
    steps.clear()
    monkeypatch.setattr(steps, "record", True)  # there is no CUDA here
    requests = some(6)
    assert fast.respond(requests, max_new_tokens=9) == slow.respond(requests, max_new_tokens=9)
    assert not steps.record and "not recorded as CUDA graphs" in caplog.text
