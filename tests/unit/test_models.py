"""Every family that docs/models.md lists, by config alone: answer, re-answer, fine-tune, POPE, with tiny real models."""

import families
import pytest
import tiny
import torch
from PIL import Image

from surf import adapters, config, evaluate, finetune, processing, prompts, samples, store
from surf.answer import answer
from surf.errors import SurfError
from surf.images import Images
from surf.methods import Method
from surf.models import Request, lvlm
from surf.prompts import Reference
from surf.reanswer import Judge, reanswer
from surf.training import network

ALL = ["llava", *families.FAMILIES]
SIZES = {"q0.png": (40, 40), "q1.png": (90, 33), "r0.png": (33, 90), "r1.png": (64, 64), "r2.png": (100, 130)}
REFERENCES = [Reference("r0.png", "a red circle\n"), Reference("r1.png", "\n\na blue square")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of such sizes that models which cut images up take different numbers of tokens for them."""
    folder = tiny.draw_images(tmp_path_factory.mktemp("pictures"), list(SIZES))
    for name, size in SIZES.items():
        Image.open(folder / name).resize(size).save(folder / name)
    return folder


@pytest.fixture(scope="module", params=ALL)
def options(request, tmp_path_factory):
    """The config's section for a tiny model of each family."""
    return config.Lvlm(model=str(families.build(request.param, tmp_path_factory.mktemp("model"))), dtype="float32")


@pytest.fixture(scope="module")
def processor(options):
    return processing.load_processor(options)


def row(number=0, **more):
    shown = [{"image_id": n, "image": ref.image, "caption": ref.caption} for n, ref in enumerate(REFERENCES)]
    made = {"round_id": f"c{number}#0", "image": f"q{number % 2}.png", "question": f"What is it, {number}?", "task": "short"}
    made |= {"answer": ["yes", "a red square", "two", "no"][number % 4], "kind": "pair", "positive_first": number % 2 == 0}
    scores = {"similarity": 0.5, "gain": 0.1}
    return made | {"positive": shown[0] | scores, "negative": shown[1] | scores} | more


def ids_of_the_answer_prompt(options, processor, pictures, prompt):
    opened = [[Image.open(pictures / name) for name in prompt.images]]
    text = prompts.chat(processor, prompt)
    return processing.encode(processor, [text], opened, padding_side="left", lvlm=options)["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", ["pair", "positive_only", "no_reference"])
def test_training_sees_the_tokens_of_the_answer_prompt(kind, options, processor, pictures):
    one = row(kind=kind)
    images = config.Images(roots=[str(pictures)])
    sample = samples.make_sample(one, processor, options, images)
    batch = samples.collate([sample], processor=processor, lvlm=options, images=images)
    prompt = prompts.from_options(one["question"], one["image"], samples.references(one), options)
    asked = ids_of_the_answer_prompt(options, processor, pictures, prompt)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids[: len(asked)] == asked
    assert labels == [-100] * len(asked) + ids[len(asked) :]
    assert ids[len(asked) :] == list(sample.answer_ids)
    assert len(ids) == sample.length
    assert ids[-1] == processing.end_id(processor)
    assert processor.tokenizer.decode(ids[len(asked) : -1], skip_special_tokens=False).strip() == "yes"


def test_prompt_in_the_words_and_images_of_the_layout(options, processor):
    prompt = prompts.from_options("Is it red?", "q0.png", REFERENCES, options)
    pieces = prompts.chat(processor, prompt).split(processor.image_token)
    for piece, words in zip(pieces, prompt.text.split(prompts.IMAGE), strict=True):
        assert words.strip() in piece
    assert prompt.system in pieces[0]


def test_tokens_of_every_size_are_the_processors_own(options, processor, pictures):
    for names in ([name] for name in SIZES):
        text = processor.image_token
        encoded = processing.encode(processor, [text], [[Image.open(pictures / names[0])]], padding_side="right", lvlm=options)
        counted = processing.image_tokens(processor, options, SIZES[names[0]])
        bare = len(processing.token_ids(processor, text)) - 1
        assert encoded["input_ids"].shape[1] == counted + bare


def test_batch_of_samples_is_its_samples(options, processor, pictures):
    """Other texts of the batch change neither tokens nor, beyond float noise, the loss."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()
    images = config.Images(roots=[str(pictures)])
    rows = [row(0, kind="no_reference"), row(1), row(2, kind="positive_only", image="r2.png")]
    made = [samples.make_sample(one, processor, options, images) for one in rows]

    def loss(chosen):
        batch = samples.collate(chosen, processor=processor, lvlm=options, images=images)
        with torch.no_grad():
            return model(**batch).loss.item() * int((batch["labels"] != -100).sum())

    assert loss(made) == pytest.approx(sum(loss([one]) for one in made), rel=2e-4)


@pytest.mark.parametrize("lever", ["chunked loss", "packing"])
def test_levers_change_neither_loss_nor_gradients(lever, options, processor, pictures):
    from transformers import AutoModelForImageTextToText

    adapter = adapters.of(processor)
    if lever == "packing" and not adapter.packs:
        pytest.skip("the family cannot be packed")
    images = config.Images(roots=[str(pictures)])
    rows = [row(0, kind="no_reference"), row(1), row(2, kind="positive_only", image="r2.png")]
    made = [samples.make_sample(one, processor, options, images) for one in rows]

    def measured(pulled):
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
        network._speed_up(
            model,
            config.Finetune(
                zero_stage=0,
                packing=pulled and lever == "packing",
                loss_chunk=5 if pulled and lever == "chunked loss" else 0,
                gradient_checkpointing=pulled,
                keep_layers=1,
            ),
            processor,
        )
        packed = pulled and lever == "packing"
        batch = samples.collate(made, processor=processor, lvlm=options, images=images, packed=packed)
        loss = model.train()(**batch).loss
        loss.backward()
        return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    (plain, expected), (pulled, found) = measured(False), measured(True)
    assert pulled == pytest.approx(plain, rel=1e-5)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_answers_alone_and_in_a_batch(options, pictures):
    responder = lvlm.load(options, Images([str(pictures)]))
    requests = [
        Request(prompts.from_options(f"What is it, {number}?", f"q{number % 2}.png", REFERENCES[:shown], options), number)
        for number, shown in enumerate([0, 2, 1])
    ]
    together = responder.respond(requests, max_new_tokens=6)
    assert together == [responder.respond([request], max_new_tokens=6)[0] for request in requests]
    golds = ["yes", "a red square", "no"]
    values = responder.loglik(requests, golds)
    alone = [responder.loglik([request], [gold])[0] for request, gold in zip(requests, golds, strict=True)]
    assert values == pytest.approx(alone, rel=1e-3)


def test_answer_reanswer_finetune_pope(options, pictures, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    images = Images([str(pictures)])
    rounds = [{key: row(number)[key] for key in ("round_id", "image", "question", "answer", "task")} for number in range(4)]
    partial = store.Partial(tmp_path / "part-00000-of-00001.parquet", "answers")
    first, errors = answer(
        store.table_of([one | {"conversation_id": one["round_id"], "turn": 0} for one in rounds], "rounds"),
        lvlm.load(options, images),
        images,
        partial,
        lvlm=options,
        options=config.Answer(max_new_tokens=4),
        seed=0,
    )
    assert first.num_rows == 4 and not errors

    wrong = [one | {"base": 0.0, "right": False} for one in rounds]
    references = {one["image"]: list(enumerate(REFERENCES)) for one in rounds}
    again, errors = reanswer(
        wrong,
        references,
        lvlm.load(options, images),
        images,
        Judge(config.Score()),
        store.Partial(tmp_path / "again.parquet", "reanswers"),
        lvlm=options,
        answer=config.Answer(max_new_tokens=4),
        options=config.Reanswer(references=2),
        seed=0,
    )
    assert 4 <= again.num_rows <= 8 and not errors

    pairs = tmp_path / "pairs.parquet"
    kinds = ["pair", "no_reference"]
    store.write_table(pairs, store.table_of([row(n, kind=kind) for n, kind in enumerate(kinds)], "pairs"), "pairs")
    out = tmp_path / "tuned"
    finetune.train(
        pairs,
        out,
        seed=0,
        finetune=config.Finetune(epochs=60, batch_size=2, zero_stage=0, learning_rate=5e-3, gradient_checkpointing=False),
        lvlm=options,
        images=config.Images(roots=[str(pictures)]),
    )
    written = store.read_json(out / "model.json")
    assert written["loss"] < 0.1 < written["loss_curve"][0]["loss"]

    tuned = lvlm.load(options, images, str(out))
    assert processing.end_id(tuned.processor) in _list(tuned.model.generation_config.eos_token_id)
    asked = [
        prompts.from_options(row(n)["question"], row(n)["image"], samples.references(row(n, kind=kind)), options)
        for n, kind in enumerate(kinds)
    ]
    answers = tuned.respond([Request(prompt, 0) for prompt in asked], max_new_tokens=8)
    assert answers == [row(n)["answer"] for n in range(2)]

    questions = [
        {"question_id": f"s#{n}", "split": "s", "image": f"q{n}.png", "question": "Is it red?", "answers": ["yes"]}
        for n in range(2)
    ]
    table = evaluate.answer(
        questions,
        {"s#0": list(enumerate(REFERENCES))},
        tuned,
        store.Partial(tmp_path / "pope.parquet", "evaluate/answers"),
        method=Method(model="tuned", references=2),
        lvlm=options,
        max_new_tokens=4,
    )
    assert table.num_rows == 2


def _list(ids):
    return ids if isinstance(ids, list) else [ids]


def test_template_that_moves_images_is_refused(tmp_path):
    folder = families.build("qwen2.5-vl", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(families.ONEVISION.replace("<image>", "<|image_pad|>"))
    with pytest.raises(SurfError, match="does not keep images and words in their order"):
        processing.load_processor(config.Lvlm(model=str(folder)))
