"""The parts of the fine-tune: order of samples, loss, adapters, verdicts, cards, and switches that must change nothing."""

import json
import logging

import families
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_finetune import job, rows  # noqa: F401

from surf import checkpoints, config, finetune, prompts, samples
from surf.errors import SurfError
from surf.models import fused
from surf.processing import load_processor
from surf.training import network
from surf.training.loss import summed
from surf.training.order import schedule
from surf.training.speed import cost

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(lengths, st.integers(0, 2**60), st.integers(1, 9), st.booleans())
def test_every_epoch_holds_every_sample_once(lengths, seed, group, by_length):
    order = schedule(lengths, 3, seed, group=group, by_length=by_length)
    size = len(lengths)
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert order == schedule(lengths, 3, seed, group=group, by_length=by_length)
    assert order[:size] == schedule(lengths, 1, seed, group=group, by_length=by_length)
    assert len(schedule(lengths, 0.5, seed, group=group, by_length=by_length)) == -(-size // 2)


def test_steps_hold_samples_of_similar_length():
    lengths = [number * 37 % 101 for number in range(96)]

    def waste(by_length):
        order = schedule(lengths, 2, 0, group=8, by_length=by_length)
        steps = [[lengths[number] for number in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(step) - length for step in steps for length in step)

    assert waste(True) < waste(False) / 4
    first = schedule(lengths, 2, 0, group=8, by_length=True)[:8]
    assert max(lengths) in [lengths[number] for number in first]
    assert schedule(lengths, 2, 0, group=8, by_length=True) != schedule(lengths, 2, 1, group=8, by_length=True)


@pytest.mark.parametrize("chunk", [1, 3, 10, 100])
def test_chunked_cross_entropy_is_cross_entropy(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30)
    hidden, targets = torch.randn(10, 8, requires_grad=True), torch.randint(0, 30, (10,))
    inputs = (hidden, head.weight, head.bias)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    found = summed(head, hidden, targets, chunk)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_cost_counts_every_matrix_once(tiny_lvlm):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_lvlm)
    counted = cost(model)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    assert counted.vision == sum(size for name, size in sizes.items() if "vision_tower" in name)
    embedded = model.get_input_embeddings().weight.numel()
    assert counted.text == sum(sizes.values()) - counted.vision - embedded
    assert (counted.layers, counted.width) == (2, 64)
    sample = samples.Sample("c#0", "", (), (), length=100, image_tokens=12)
    assert counted.flops(sample) == 600 * counted.text + 6 * 2 * 64 * 100**2 + 24 * counted.vision


# --- compiled functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava-onevision", "gemma3"])
def test_compiled_functions_change_nothing_and_serve_all_layers(family, tmp_path, monkeypatch, caplog):
    from torch._dynamo.utils import counters
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(fused, "BACKEND", "aot_eager")  # the machine's compiler is not what is tested
    fused.compiled.cache_clear()
    torch.compiler.reset()
    caplog.set_level(logging.INFO, "surf")
    folder = tiny.build_lvlm(tmp_path / "model") if family == "llava" else families.build(family, tmp_path / "model")

    def measured(on):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if on:
            counters.clear()
            assert fused.enable(network._text(model), network.decoder(model))
        torch.manual_seed(0)
        losses = []
        for shape in ((1, 30), (3, 17), (2, 50)):
            ids = torch.randint(5, 60, shape)
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
        fused.disable(model)
        assert not any("forward" in module.__dict__ for module in model.modules())
        return torch.stack(losses), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    (plain, expected), (found, gradients) = measured(False), measured(True)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)
    if family == "gemma3":  # its norms add one to their weights, its activation is another
        assert "0 norms, 0 feed-forward blocks, rotary positions; as they are: Gemma3MLP, Gemma3RMSNorm" in caplog.text
    else:
        assert "compiled: 5 norms, 2 feed-forward blocks, rotary positions" in caplog.text
    assert counters["stats"]["unique_graphs"] == (1 if family == "gemma3" else 3)  # for all layers and lengths
    fused.compiled.cache_clear()


def test_without_a_compiler_nothing_is_changed(tiny_lvlm, monkeypatch, caplog):
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(fused, "BACKEND", "no such compiler")
    fused.compiled.cache_clear()
    model = AutoModelForImageTextToText.from_pretrained(tiny_lvlm)
    assert not fused.enable(network._text(model), network.decoder(model))
    assert "nothing is compiled (" in caplog.text and len(caplog.records) == 1
    assert not any("forward" in module.__dict__ for module in model.modules())
    fused.compiled.cache_clear()


# --- verdicts ----------------------------------------------------------------------------------------------------------


texts = st.text(max_size=30).filter(lambda text: prompts.clean(text) and "Ref" not in text)


@given(texts, st.lists(st.booleans(), min_size=1, max_size=5))
def test_a_verdict_comes_off_again(answer, useful):
    answer = prompts.clean(answer)
    text = prompts.with_verdict(answer, useful)
    assert prompts.split_verdict(text) == (answer, useful)
    assert prompts.split_verdict(answer) == (answer, [])
    for end in range(len(answer) + 4, len(text)):  # cut off by the length limit
        assert prompts.split_verdict(text[:end])[0] == answer


def test_verdicts_follow_the_order_of_the_references(tiny_lvlm, drawn_images):
    lvlm = config.Lvlm(model=str(tiny_lvlm), dtype="float32")
    processor, images = load_processor(lvlm), config.Images(roots=[str(drawn_images)])
    texts = [samples.make_sample(row, processor, lvlm, images, verdict=True).text for row in rows(4)]
    assert texts[0].endswith(" a red square\nReferences: 1 useful, 2 not useful</s>")
    assert texts[1].endswith(" yes\nReferences: 1 useful</s>")
    assert texts[2].endswith("two green triangles</s>")
    assert texts[3].endswith(" no\nReferences: 1 not useful</s>")
    swapped = samples.make_sample(rows(1)[0] | {"positive_first": False}, processor, lvlm, images, verdict=True)
    assert swapped.text.endswith("\nReferences: 1 not useful, 2 useful</s>")


# --- ways to train -----------------------------------------------------------------------------------------------------


def weights(out):
    return load_file(out / "model.safetensors")


def test_switches_of_speed_change_no_result(job, tmp_path):  # noqa: F811
    plain = {"packing": False, "loss_chunk": 0, "gradient_checkpointing": False}
    switches = {
        "plain": plain,
        "fast": {},
        "kept": {"keep_layers": 1, "loss_chunk": 3},
        "grouped": {"group_by_length": True, "packing": False},
    }
    ends = {}
    for name, flags in switches.items():
        settings = job(count=8, epochs=2, learning_rate=1e-3, **flags) | {"out": tmp_path / name}
        finetune.train(**settings)
        ends[name] = weights(tmp_path / name)
        written = json.loads((tmp_path / name / "model.json").read_text())
        if name == "plain":
            curve = written["loss_curve"]
        elif name != "grouped":
            assert [one["loss"] for one in written["loss_curve"]] == pytest.approx([one["loss"] for one in curve], rel=1e-4)
    for name in ("fast", "kept"):
        for key, expected in ends["plain"].items():
            torch.testing.assert_close(ends[name][key], expected, rtol=0, atol=2e-4)
    assert any(not ends["grouped"][key].equal(ends["plain"][key]) for key in ends["plain"])


def test_broken_run_sees_the_same_samples_and_ends_in_the_same_bits(job, tmp_path, monkeypatch):  # noqa: F811
    settings = job(count=10, epochs=3, batch_size=2, accumulation=2, group_by_length=True, save_steps=2)
    seen = {}

    def recorded(out, broken_at=None):
        seen[out] = []

        def collate(chosen, **keywords):
            seen[out].append([sample.round_id for sample in chosen])
            if len(seen[out]) == broken_at:
                raise MemoryError
            return samples.collate(chosen, **keywords)

        monkeypatch.setattr(finetune, "collate", collate)
        finetune.train(**settings | {"out": tmp_path / out})

    recorded("whole")
    with pytest.raises(MemoryError):
        recorded("broken", broken_at=12)
    recorded("broken")
    assert len(seen["whole"]) == 15  # 30 samples, two a batch
    assert seen["broken"] == seen["whole"][-len(seen["broken"]) :]
    assert len(seen["broken"]) < 15
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(whole[key].equal(broken[key]) for key in whole)
    assert (tmp_path / "whole/model.json").read_bytes() == (tmp_path / "broken/model.json").read_bytes()


def break_off(settings, monkeypatch):
    """Train, and stop in the seventh batch as by Ctrl-C."""
    batches = []

    def broken(*args, **keywords):
        batches.append(0)
        if len(batches) == 7:
            raise KeyboardInterrupt
        return samples.collate(*args, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "collate", broken)
        finetune.train(**settings)


def test_lora_merges_into_a_plain_folder_and_goes_on_after_a_kill(job, tmp_path, monkeypatch):  # noqa: F811
    from transformers import AutoModelForImageTextToText

    flags = {"method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}, "learning_rate": 1e-2, "save_steps": 2}
    settings = job(count=4, epochs=6, batch_size=2, **flags)
    finetune.train(**settings)
    out = settings["out"]
    base, tuned = weights(finetune.Path(settings["lvlm"].model)), weights(out)
    assert tuned.keys() == base.keys()
    assert not list(out.glob("adapter*"))
    changed = {name for name in base if not tuned[name].equal(base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight") and name.startswith("language_model")} | {
        name for name in base if name.startswith("multi_modal_projector") and name.endswith("weight")
    }
    _, loading = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]

    # the adapter alone gives the same logits, and a run that was broken off ends the same
    alone = settings | {"out": tmp_path / "alone"}
    alone["finetune"] = settings["finetune"].model_copy(update={"lora": config.Lora(rank=4, alpha=8, dropout=0.0, merge=False)})
    break_off(alone, monkeypatch)
    assert not (alone["out"] / "model.json").exists()
    finetune.train(**alone)
    assert (alone["out"] / "adapter_model.safetensors").exists() and not (alone["out"] / "model.safetensors").exists()
    with torch.no_grad():
        ids = {"input_ids": torch.arange(5, 25)[None]}
        merged = AutoModelForImageTextToText.from_pretrained(out)(**ids).logits
        beside = AutoModelForImageTextToText.from_pretrained(alone["out"])(**ids).logits
    torch.testing.assert_close(beside, merged, rtol=1e-3, atol=1e-4)


def test_a_model_takes_the_place_of_an_adapter(tmp_path):
    """transformers takes a folder with an adapter's config for one."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json", "notes.txt"):
        (tmp_path / name).write_text("old")

    def save(folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("new")

    checkpoints.publish(save, tmp_path, {"result": {"steps": 1}})
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert left == ["model.json", "model.safetensors", "notes.txt"]


def test_qlora_quantises_the_language_model_alone_and_goes_on_after_a_kill(job, tmp_path, monkeypatch):  # noqa: F811
    prepare, four = network.prepare, []

    def seen(model, *rest):
        four.extend(name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit")
        return prepare(model, *rest)

    monkeypatch.setattr(network, "prepare", seen)
    flags = {"method": "qlora", "zero_stage": 0, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}, "learning_rate": 1e-2}
    settings = job(count=4, epochs=6, batch_size=2, save_steps=2, **flags)
    finetune.train(**settings)
    assert four and all(name.startswith("model.language_model.layers.") for name in four)
    curve = json.loads((settings["out"] / "model.json").read_text())["loss_curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
    base, tuned = weights(finetune.Path(settings["lvlm"].model)), weights(settings["out"])
    assert tuned.keys() == base.keys(), "the adapter is added to the weights that were not quantised"
    assert all(tuned[name].dtype == base[name].dtype for name in base)

    alone = settings | {"out": tmp_path / "alone"}
    break_off(alone, monkeypatch)
    finetune.train(**alone)
    assert json.loads((alone["out"] / "model.json").read_text())["loss_curve"] == curve


def test_what_a_way_to_train_needs_is_told(job, monkeypatch):  # noqa: F811
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    with pytest.raises(SurfError, match=r"finetune\.method: qlora.*(\n.*)*surf-rag\[qlora\]"):
        finetune.train(**job(method="qlora"))
    with pytest.raises(SurfError, match="mlflow is not installed"):
        finetune.train(**job(report_to=["mlflow"]))
    with pytest.raises(ValueError, match=r"finetune\.offload: all needs finetune\.zero_stage"):
        config.Finetune(offload="all", zero_stage=0)
    with pytest.raises(ValueError, match="four-bit weights cannot be spread"):
        config.Finetune(method="qlora", zero_stage=3)


def test_every_step_is_one_line_and_the_card_says_what_made_the_model(job, caplog):  # noqa: F811
    caplog.set_level(logging.INFO, "surf")
    settings = job(count=4, epochs=3, batch_size=2)
    finetune.train(**settings)
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert len(lines) == 6
    assert all(part in lines[0] for part in ("step 1/6  loss ", "lr ", "samples/s", "waiting for data", " left"))
    out = settings["out"]
    written = json.loads((out / "model.json").read_text())
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    for fact in (written["pairs"], written["flags"].split()[0], f"{written['trainable_parameters']:,}", "| 6 | "):
        assert fact in card
    assert {"torch", "transformers", "deepspeed"} <= written["versions"].keys()
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"} <= names
    assert "surf_packed" not in (out / "config.json").read_text()


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 9, 1], [7]])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_attention_is_that_of_each_sample_alone(lengths, key_heads):
    from torch.nn.functional import scaled_dot_product_attention

    from surf.training.packing import _attention

    torch.manual_seed(0)
    made = [torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
    found = _attention(None, *made, None, pack_lengths=lengths)[0]
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), made)
    pieces = zip(*(one.split(lengths, 2) for one in made), strict=True)
    plain = [scaled_dot_product_attention(*own, is_causal=True, enable_gqa=key_heads != 4) for own in pieces]
    expected = torch.cat(plain, 2).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    for own, other in zip(ours, torch.autograd.grad((expected * weight).sum(), made), strict=True):
        torch.testing.assert_close(own, other)
