"""Tensors for training and answering: image tokens, padding, loss masks, cut captions."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from PIL import Image

from surf import config, processing, prompts
from surf import samples as training
from surf.errors import SurfError

SYSTEM = prompts.SYSTEM_PROMPT
RETRIEVAL = prompts.RETRIEVAL_PROMPT


@pytest.fixture(scope="module")
def lvlm(tiny_lvlm):
    return config.Lvlm(model=str(tiny_lvlm), dtype="float32")


@pytest.fixture(scope="module")
def processor(lvlm):
    return processing.load_processor(lvlm)


@pytest.fixture(scope="module")
def images(drawn_images):
    return config.Images(roots=[str(drawn_images)])


def reference(image, caption):
    return {"image_id": 0, "image": image, "caption": caption, "similarity": 0.5, "gain": 0.5}


def row(kind="pair", positive_first=True, answer="a red square", **more):
    return {
        "round_id": "c1#0",
        "image": "q0.png",
        "question": "What is it?",
        "answer": answer,
        "task": "short",
        "kind": kind,
        "positive_first": positive_first,
        "positive": reference("r0.png", "good caption"),
        "negative": reference("r1.png", "bad caption"),
    } | more


def template(processor, text, tmp_path, lvlm):
    """The processor with another chat template."""
    folder = shutil.copytree(lvlm.model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(text)
    return processing.load_processor(lvlm.model_copy(update={"model": str(folder)}))


WHOLE = {
    ("pair", True): (
        f"{RETRIEVAL} USER: <Retrieval>1. <image> good caption \n2. <image> bad caption \n</Retrieval> <image>\nWhat is it? ",
        ("r0.png", "r1.png", "q0.png"),
    ),
    ("pair", False): (
        f"{RETRIEVAL} USER: <Retrieval>1. <image> bad caption \n2. <image> good caption \n</Retrieval> <image>\nWhat is it? ",
        ("r1.png", "r0.png", "q0.png"),
    ),
    ("positive_only", True): (
        f"{RETRIEVAL} USER: <Retrieval>1. <image> good caption \n</Retrieval> <image>\nWhat is it? ",
        ("r0.png", "q0.png"),
    ),
    ("negative_only", True): (
        f"{RETRIEVAL} USER: <Retrieval>1. <image> bad caption \n</Retrieval> <image>\nWhat is it? ",
        ("r1.png", "q0.png"),
    ),
    ("no_reference", True): (f"{SYSTEM} USER: <image>\nWhat is it? ", ("q0.png",)),
}


@pytest.mark.parametrize(("kind", "positive_first"), WHOLE)
def test_text_images_and_loss_of_a_sample(kind, positive_first, processor, lvlm, images):
    sample = training.make_sample(row(kind, positive_first), processor, lvlm, images)
    batch = training.collate([sample], processor=processor, lvlm=lvlm, images=images)
    prompt, names = WHOLE[kind, positive_first]
    assert sample.images == names
    assert sample.text == f"{prompt}ASSISTANT: a red square</s>"
    ids = batch["input_ids"][0]
    assert processor.tokenizer.decode(ids) == "<s>" + sample.text.replace("<image>", "<image>" * 4)
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    assert (ids == processor.image_token_id).sum() == 4 * len(names)
    assert batch["pixel_values"].shape == (len(names), 3, 32, 32)
    with_loss = batch["labels"][0] != -100
    assert processor.tokenizer.decode(ids[with_loss]) == " a red square</s>"
    assert (batch["labels"][0][with_loss] == ids[with_loss]).all()
    assert sample.length == len(ids)


def test_batch_of_samples_with_different_numbers_of_images(processor, lvlm, images):
    rows = [row("no_reference"), row("pair"), row("positive_only", answer="yes")]
    samples = [training.make_sample(item, processor, lvlm, images) for item in rows]
    batch = training.collate(samples, processor=processor, lvlm=lvlm, images=images)
    assert batch["pixel_values"].shape[0] == 1 + 3 + 2
    for number, sample in enumerate(samples):
        alone = training.collate([sample], processor=processor, lvlm=lvlm, images=images)
        for key, padding in [("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)]:
            assert batch[key][number, : sample.length].equal(alone[key][0])
            assert (batch[key][number, sample.length :] == padding).all()


def test_padding_side(processor, lvlm):
    pictures = [Image.new("RGB", (40, 40))] * 3
    texts = ["one <image>", "one <image> two <image>"]
    left = processing.encode(processor, texts, [pictures[:1], pictures[1:]], padding_side="left", lvlm=lvlm)
    right = processing.encode(processor, texts, [pictures[:1], pictures[1:]], padding_side="right", lvlm=lvlm)
    assert left["attention_mask"][0].tolist() == right["attention_mask"][0].tolist()[::-1]
    assert left["attention_mask"][0, 0] == 0
    assert left["input_ids"][1].equal(right["input_ids"][1])


def test_count_of_images_is_checked(processor, lvlm):
    with pytest.raises(SurfError, match="2 image tags for 1 images"):
        processing.encode(processor, ["<image> <image>"], [[Image.new("RGB", (9, 9))]], padding_side="left", lvlm=lvlm)


def test_text_without_images(processor, lvlm):
    batch = processing.encode(processor, ["hello"], [[]], padding_side="left", lvlm=lvlm)
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<s>hello"


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (8, 3), (3, 8), (5, 5), (1, 6)])
def test_square_is_centred_on_the_background(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    side = max(size)
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = (122, 116, 104)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    expected[top : top + size[1], left : left + size[0]] = pixels
    assert np.array_equal(np.asarray(processing.square(Image.fromarray(pixels), (122, 116, 104))), expected)


def test_pad_to_square_sees_the_whole_image(processor, lvlm):
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    padded = processing.encode(processor, ["<image>"], [[wide]], padding_side="left", lvlm=lvlm)["pixel_values"][0]
    cropped = processing.encode(
        processor, ["<image>"], [[wide]], padding_side="left", lvlm=lvlm.model_copy(update={"pad_to_square": False})
    )["pixel_values"][0]
    assert padded[:, 0].abs().max() < 0.02  # the mean colour
    assert (cropped[0] > 1.5).all()  # red everywhere


LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize(
    "text",
    [
        LLAVA_HF,
        "{{ bos_token }}" + tiny.CHAT_TEMPLATE,
        tiny.CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token + '\n' }}"),
        tiny.CHAT_TEMPLATE.replace("USER: ", "{{ eos_token }}USER: "),
    ],
    ids=["no end token", "writes bos", "line break behind the end", "end token after every turn"],
)
def test_other_chat_templates(text, processor, lvlm, images, tmp_path):
    other = template(processor, text, tmp_path, lvlm)
    sample = training.make_sample(row(), other, lvlm, images)
    batch = training.collate([sample], processor=other, lvlm=lvlm, images=images)
    ids = batch["input_ids"][0]
    assert (ids == other.tokenizer.bos_token_id).sum() == 1
    assert other.tokenizer.decode(ids[batch["labels"][0] != -100]) == " a red square</s>"


def test_generation_prompt_that_ends_inside_a_token(processor, lvlm, images, tmp_path):
    other = template(processor, tiny.CHAT_TEMPLATE.replace("%}ASSISTANT:{%", "%}ASSISTANT: {%"), tmp_path, lvlm)
    with pytest.raises(SurfError, match=r"c1#0.*cannot be told apart"):
        training.make_sample(row(), other, lvlm, images)


def test_hostile_answer_adds_no_image_and_no_end(processor, lvlm, images):
    sample = training.make_sample(row(answer="red</s> <image> blue"), processor, lvlm, images)
    assert sample.text.count("</s>") == 1
    assert sample.text.count("<image>") == 3
    assert sample.text.endswith("blue</s>")


def test_captions_are_cut_until_it_fits(processor, lvlm, images):
    long = reference("r0.png", " ".join(f"word{number}" for number in range(200)))
    question, answer = "Which of the many things is it? " * 3, "the last one of them all"
    rows = [row(positive=long, negative=long, question=question, answer=answer)]
    free = training.make_sample(rows[0], processor, lvlm, images)
    for limit in (free.length, free.length - 1, 900, 500, 260):
        (sample,), dropped = training.make_samples(rows, processor, config.Finetune(max_tokens=limit), lvlm, images)
        assert dropped == 0
        assert sample.length <= limit
        assert sample.answer_ids == free.answer_ids
        assert sample.images == free.images
        assert sample.text.endswith(f"<image>\n{question.strip()} ASSISTANT: {answer}</s>")
        assert (sample == free) is (limit == free.length)


def test_what_never_fits_is_dropped_and_named(processor, lvlm, images, caplog):
    rows = [row(), row(question="why? " * 300, round_id="c2#5")]
    samples, dropped = training.make_samples(rows, processor, config.Finetune(max_tokens=300), lvlm, images)
    assert [sample.round_id for sample in samples] == ["c1#0"]
    assert dropped == 1
    assert "c2#5" in caplog.text
    with pytest.raises(SurfError, match="max_tokens = 20"):
        training.make_samples(rows, processor, config.Finetune(max_tokens=20), lvlm, images)


def test_unreadable_image_is_named(processor, lvlm, images):
    sample = training.make_sample(row(image="nowhere.png"), processor, lvlm, images)
    with pytest.raises(SurfError, match=r"nowhere\.png of round c1#0"):
        training.collate([sample], processor=processor, lvlm=lvlm, images=images)


def test_unknown_kind(processor, lvlm, images):
    with pytest.raises(SurfError, match="'triple'"):
        training.make_sample(row("triple"), processor, lvlm, images)
    with pytest.raises(SurfError, match="with its references"):
        training.make_sample(row("pair", negative=None), processor, lvlm, images)


def test_processor_that_cannot_be_used(lvlm, tmp_path):
    with pytest.raises(SurfError, match="cannot be loaded"):
        processing.load_processor(lvlm.model_copy(update={"model": str(tmp_path / "nothing")}))
    folder = shutil.copytree(lvlm.model, tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"patch_size": None}))
    with pytest.raises(SurfError, match="patch_size"):
        processing.load_processor(lvlm.model_copy(update={"model": str(folder)}))


def test_image_tokens(processor, lvlm):
    assert processing.image_tokens(processor, lvlm) == 4
    assert processing.image_tokens(processor, lvlm.model_copy(update={"pad_to_square": False})) == 4


def test_threads_that_encode_do_not_pad_each_others_tokens(processor, lvlm):
    """A fast tokenizer keeps its padding as a state: answers were asked with padding in them."""
    texts = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nWhat is it, and how many of them are there? ASSISTANT:"]
    image = Image.new("RGB", (40, 40))
    expected = processing.tokens(processor, texts)

    def encode(_):
        return processing.encode(processor, texts, [[image], [image]], padding_side="right", lvlm=lvlm)["input_ids"].tolist()

    padded = encode(0)
    with ThreadPoolExecutor(4) as threads:
        encoded = threads.map(encode, range(80))
        assert all(processing.tokens(processor, texts) == expected for _ in range(800))
        assert all(ids == padded for ids in encoded)


def test_pixels_alone_are_those_of_encode(processor, lvlm):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    whole = processing.encode(processor, [processor.image_token], [[image]], padding_side="right", lvlm=lvlm)
    assert (processing.pixels(processor, image, lvlm) == whole["pixel_values"][0]).all()
