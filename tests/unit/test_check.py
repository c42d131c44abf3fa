"""The preflight: what it must find, and that its short cut over image headers agrees with the stages' own reader."""

import importlib.util
import io
import json
import shutil

import families
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from surf import badshares, check, checksettings, headers, leaks, sources, store, weights
from surf.config import Finetune, parse
from surf.demo import MODELS, world
from surf.errors import ImageError, SurfError
from surf.images import Images
from surf.shards import part_name, shard_of
from surf.training import network
from surf.verdicts import Report

LIMIT = 100_000


def picture(width=120, height=90, seed=0):
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(soft, float) + rng.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8))


def saved(image, kind="JPEG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


@pytest.fixture(scope="module")
def oddities(tmp_path_factory):
    """A folder, its images packed, and all names: good ones of several kinds, and everything that can be wrong with one."""
    folder = tmp_path_factory.mktemp("oddities")
    exif = Image.Exif()
    exif[0x010E] = "x" * 40_000  # a description longer than the first look
    good = saved(picture())
    files = {
        "fine.jpg": good,
        "deep/down/fine.jpg": good,
        "progressive.jpg": saved(picture(), progressive=True),
        "grey.jpg": saved(picture().convert("L")),
        "long-header.jpg": saved(picture(), exif=exif),
        "garbage-behind.jpg": good + b"\0\0\0",
        "fine.png": saved(picture(), "PNG"),
        "fine.webp": saved(picture(), "WEBP"),
        "fine.gif": saved(picture(), "GIF"),
        "named-wrongly.png": good,
        "cut.jpg": good[:-200],
        "cut-in-header.jpg": good[:300],
        "cut.png": saved(picture(), "PNG")[:-40],
        "empty.jpg": b"",
        "text.jpg": b"<html>404</html>",
        "bomb.png": saved(Image.new("L", (1000, 1000)), "PNG"),
    }
    for name, content in files.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    (folder / "secret.jpg").write_bytes(good)
    (folder / "images/link-out.jpg").symlink_to(folder / "secret.jpg")
    (folder / "images/link-in.jpg").symlink_to("fine.jpg")
    (folder / "images/folder.jpg").mkdir()
    (folder / "images/out").symlink_to(folder)
    names = [*files, "link-out.jpg", "link-in.jpg", "folder.jpg", "out/secret.jpg", "missing.jpg", "fine.jpg/missing.jpg"]
    names += ["../secret.jpg", str(folder / "secret.jpg"), "..", "", "a\\b.jpg", "nul\0.jpg"]
    table = pa.table({"image": list(files), "bytes": list(files.values())})
    pq.write_table(table, folder / "packed.parquet", row_group_size=5, compression="none")
    return folder, names, list(files)


def by_decoding(names, roots):
    images = Images(roots, LIMIT)
    errors = {}
    for name in names:
        try:
            images.open(name)
        except ImageError as error:
            errors[name] = str(error)
    return errors


@pytest.mark.parametrize("place", ["folder", "packed", "both"])
@pytest.mark.parametrize("hashes", [False, True])
def test_headers_say_what_decoding_says(oddities, place, hashes):
    folder, names, packed = oddities
    roots = {"folder": ["images"], "packed": ["packed.parquet"], "both": ["packed.parquet", "images"]}[place]
    roots = [str(folder / root) for root in roots]
    names = [*packed, "missing.jpg"] if place == "packed" else names
    expected = by_decoding(names, roots)
    seen = headers.look(names, roots, LIMIT, hashes=hashes)
    assert seen.errors == expected
    assert {"cut.jpg", "bomb.png", "missing.jpg"} <= set(expected) and "long-header.jpg" not in expected
    assert set(seen.hashes) == (set(names) - set(expected) if hashes else set())


def test_several_processes_find_the_same(oddities, monkeypatch):
    folder, names, _ = oddities
    roots = [str(folder / "packed.parquet"), str(folder / "images")]
    monkeypatch.setattr(headers, "_FEW", 3)
    assert headers.look(names, roots, LIMIT, processes=2) == headers.look(names, roots, LIMIT)


def test_only_headers_are_decoded(oddities, monkeypatch):
    """The short cut is one: no image that is fine is opened in full."""
    folder, _, _ = oddities
    monkeypatch.setattr(Images, "_open", lambda *_: pytest.fail("opened in full"))
    names = ["fine.jpg", "progressive.jpg", "long-header.jpg", "fine.png", "deep/down/fine.jpg"]
    headers._images.cache_clear()
    assert headers.look(names, [str(folder / "images")], LIMIT).errors == {}


def test_copies_are_found_by_their_looks_and_others_are_not(tmp_path):
    original = picture(320, 240, seed=1)
    files = {
        "eval.jpg": saved(original, quality=90),
        "again.jpg": saved(original, quality=30),
        "half.jpg": saved(original.resize((160, 120)), quality=80),
        "png.png": saved(original, "PNG"),
        **{f"other-{seed}.jpg": saved(picture(320, 240, seed=seed)) for seed in range(2, 30)},
        "plain-1.jpg": saved(Image.new("RGB", (320, 240), (20, 20, 20))),
        "plain-2.jpg": saved(Image.new("RGB", (320, 240), (220, 220, 220))),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    hashes = headers.look(list(files), [str(tmp_path)], LIMIT, hashes=True).hashes
    images = Images([str(tmp_path)], LIMIT)
    asked = {"eval.jpg": hashes["eval.jpg"]}
    for copy in ("again.jpg", "half.jpg", "png.png"):
        assert leaks.by_looks(asked, {copy: hashes[copy]}, images) == [("eval.jpg", copy)]
    others = {name: value for name, value in hashes.items() if name.startswith("other")}
    assert leaks.by_looks(asked, others, images) == []
    plain = {"plain-1.jpg": hashes["plain-1.jpg"]}
    assert hashes["plain-1.jpg"] == hashes["plain-2.jpg"]
    assert leaks.by_looks(plain, {"plain-2.jpg": hashes["plain-2.jpg"]}, images) == [], "one hash, two colours"
    assert leaks.by_looks(asked, asked, images) == [], "the same name is found by identity"


def test_one_photograph_under_two_names():
    found = leaks.by_identity(["COCO_val2014_000000000009.jpg", "a.jpg"], ["coco/train2017/000000000009.jpg", "b.jpg"])
    assert found == [("COCO_val2014_000000000009.jpg", "coco/train2017/000000000009.jpg")]


# --- models -----------------------------------------------------------------------------------------------------------


MODEL = MODELS / "lvlm"


def with_model(folder):
    minimal = {
        "catalog": {"captions": ["c"]},
        "split": {"conversations": ["s"]},
        "evaluate": {"tasks": {"pope": {"kind": "pope", "files": {"one": "p"}}}},
    }
    return parse({**minimal, "lvlm": {"model": str(folder)}})


def test_a_models_folder_must_be_whole(tmp_path):
    assert weights.lvlm(with_model(MODEL)).folder == MODEL
    total, trained = weights.parameters(MODEL, ["language_model"])
    assert 0 < trained < total

    def damaged(name):
        folder = tmp_path / name
        shutil.copytree(MODEL, folder)
        return folder

    no_processor = damaged("no-processor")
    for path in [*no_processor.glob("*processor*")]:
        path.unlink()
    assert "has no processor" in weights.lvlm(with_model(no_processor)).problem
    cut = damaged("cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-1])
    assert "model.safetensors is cut off" in weights.lvlm(with_model(cut)).problem
    pickled = damaged("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickled" in weights.lvlm(with_model(pickled)).problem
    sharded = damaged("sharded")
    store.write_json(
        sharded / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "two.safetensors"}}
    )
    assert "has no two.safetensors" in weights.lvlm(with_model(sharded)).problem
    assert "no such folder" in weights.lvlm(with_model(tmp_path / "nothing")).problem


def test_parameters_are_called_as_the_stages_call_them(tmp_path):
    """The files of some families use other names than the loaded model, which `finetune.train` is compared with."""
    folder = families.build("qwen2.5-vl", tmp_path / "model")
    assert not any("language_model" in name for name in load_file(folder / "model.safetensors"))
    total, trained = weights.parameters(folder, ["language_model"])
    assert 0 < trained < total
    report = Report()
    checksettings.training(report, with_model(folder), folder)
    assert not report.counts["WRONG"]


def test_a_hub_name_that_is_not_in_the_cache_says_how_to_get_it(monkeypatch):
    found = weights.lvlm(with_model("nobody/no-such-model"))
    assert not found.downloadable and "HF_HUB_OFFLINE=0 hf download nobody/no-such-model" in found.problem
    monkeypatch.delenv("HF_HUB_OFFLINE")
    found = weights.lvlm(with_model("nobody/no-such-model"))
    assert found.downloadable and "will need a network; next: hf download nobody/no-such-model" in found.problem


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The embedded world, small."""
    folder = tmp_path_factory.mktemp("world")
    world.build(folder / "example", scale=0.05)
    return folder


@pytest.fixture
def run(drawn, tmp_path, capsys):
    """Runs the check on the world; `change` gets the config, and files of it can be put elsewhere."""

    def settings():
        example = drawn / "example"
        return {
            "results": str(tmp_path / "results"),
            "demo": {"out": str(example)},
            "images": {"roots": [str(example / "images"), str(example / "packed.parquet")], "max_bad_share": 0.2},
            "catalog": {"captions": [str(example / "corpus.json")]},
            "embed": {"model": f"local-dir:{MODELS / 'clip'}", "pretrained": None},
            "split": {"conversations": [str(example / "sft.json")]},
            "lvlm": {"model": str(MODELS / "lvlm"), "dtype": "float32"},
            "score": {"bertscore_model": str(MODELS / "bert"), "bertscore_layer": 2},
            "evaluate": {"tasks": {"pope": {"kind": "pope", "files": {"random": str(example / "pope/coco_pope_random.json")}}}},
        }

    def run(change=lambda values: None, *words):
        values = settings()
        change(values)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        code = check.main(["--configfile", str(tmp_path / "config.yaml"), "--cores", "1", *words])
        return code, capsys.readouterr().out

    return run


def test_the_example_passes_and_is_planned(run, tmp_path):
    code, output = run(lambda values: None, "--json", str(tmp_path / "plan.json"), "--near-duplicates")
    assert code == 0, output
    assert "WRONG" not in output and "0 wrong" in output
    # it has one broken and two missing images on purpose
    assert "corpus: 2 of" in output and "rounds: 1 of" in output
    assert "| answer " in output and "surf.calibrate" in output
    lines = {line["stage"]: line for line in json.loads((tmp_path / "plan.json").read_text())["lines"]}
    assert lines["evaluate_answer base"]["rows"] == 2 * lines["evaluate_answer tuned"]["rows"] > 0


def test_before_the_example_is_drawn_it_says_so_and_passes(run, tmp_path):
    def elsewhere(values):
        text = json.dumps(values).replace(values["demo"]["out"], str(tmp_path / "later"))
        values.update(json.loads(text))

    code, output = run(elsewhere)
    assert code == 0 and "is not drawn yet" in output and "snakemake demo" in output

    def misspelt(values):
        elsewhere(values)
        values["images"]["roots"][0] = str(tmp_path / "later/imagse")
        values["catalog"]["captions"].append("mine.json")

    code, output = run(misspelt)
    assert code == 1 and "is not drawn yet" in output
    assert "later/imagse: there is no such image root" in output and "mine.json: there is no such file of captions" in output


def test_what_the_example_will_draw_is_what_it_draws(drawn):
    minimal = {"split": {"conversations": ["s"]}, "catalog": {"captions": ["c"]}, "demo": {"out": str(drawn / "example")}}
    cfg = parse({**minimal, "evaluate": {"tasks": {"pope": {"kind": "pope", "files": {"one": "p"}}}}})
    made = [path for path in (drawn / "example").rglob("*") if path.suffix != ".jpg" and path.name != "pope"]
    made += list((drawn / "example").glob("pope/*"))
    assert made and all(sources.draws(cfg, str(path)) for path in made)
    assert not sources.draws(cfg, str(drawn / "example/images/mine"))
    assert not sources.draws(with_model(MODEL), str(drawn / "example/corpus.json")), "nothing is drawn without a section demo"


def rewrite(path, change, out):
    rows = json.loads(path.read_text())
    out.write_text(json.dumps(change(rows)))
    return str(out)


def test_each_fault_is_one_line_and_the_exit_code(run, drawn, tmp_path):
    example = drawn / "example"

    def says(change, *texts, verdict="WRONG"):
        code, output = run(change)
        lines = [line for line in output.splitlines() if line.startswith(verdict)]
        for text in texts:
            assert any(text in line for line in lines), (text, output)
        assert code == (verdict == "WRONG"), output

    says(lambda c: c["lvlm"].update(colour="red"), "lvlm.colour = 'red': there is no such key")
    says(lambda c: c.update(reanswer={"references": 50}), "must not exceed retrieve.references")
    says(lambda c: c["catalog"].update(captions=["nowhere.json"]), "nowhere.json: there is no such file of captions")
    says(lambda c: c["images"].update(roots=["nowhere"]), "nowhere: there is no such image root")
    says(lambda c: c["lvlm"].update(model="./nowhere"), "lvlm.model ./nowhere: there is no such folder")
    if importlib.util.find_spec("vllm") is None:
        says(lambda c: c["lvlm"].update(engine="vllm"), "lvlm.engine = 'vllm': vLLM is not installed")
    says(lambda c: c["images"].update(max_bad_share=0.0), "corpus: 2 of", "rounds: 1 of")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"image": ')
    says(lambda c: c["catalog"].update(captions=[str(broken)]), "broken.json: cannot be read")
    says(lambda c: c["split"].update(conversations=[str(broken)]), "broken.json: cannot be read")
    says(lambda c: c["evaluate"]["tasks"]["pope"].update(files={"a": str(broken)}), "broken.json")
    half = rewrite(
        example / "corpus.json", lambda rows: [row if n % 2 else {} for n, row in enumerate(rows)], tmp_path / "half.json"
    )
    says(lambda c: c["catalog"].update(captions=[half]), "rows cannot be used", "has no image")
    lines = (example / "pope/coco_pope_random.json").read_text().splitlines()
    twice = tmp_path / "twice.json"
    twice.write_text("\n".join([*lines, lines[0]]))
    says(lambda c: c["evaluate"]["tasks"]["pope"].update(files={"a": str(twice)}), "question_id 1 stands twice")
    gone = tmp_path / "gone.json"
    gone.write_text(json.dumps({**json.loads(lines[0]), "image": "gone.jpg"}))
    says(lambda c: c["evaluate"]["tasks"]["pope"].update(files={"a": str(gone)}), "questions: 1 of 1 cannot be used (gone.jpg")


def test_settings_that_would_stop_a_stage_after_hours(run, monkeypatch):
    def says(change, text):
        code, output = run(change)
        wrong = [line for line in output.splitlines() if line.startswith("WRONG")]
        assert code == 1 and len(wrong) == 1 and text in wrong[0], (text, output)

    def variant(values, **changes):
        values["variants"] = {"mine": changes}
        values["evaluate"]["methods"] = {"mine": {"model": "mine"}}

    def finetune(**changes):
        return lambda values: values.update(finetune=changes)

    nothing = "finetune.train: no parameter of the model has any of ['langauge_model'] in its name"
    says(finetune(train=["langauge_model"]), nothing)
    says(lambda values: variant(values, finetune={"train": ["langauge_model"]}), f"variants.mine.{nothing}")
    says(finetune(train=["lm_head", "norm"], method="lora"), "no linear layer of the model has any of")
    says(finetune(max_tokens=10), "finetune.max_tokens = 10: the shortest question with its images takes")
    says(lambda values: variant(values, finetune={"max_tokens": 10}), "variants.mine.finetune.max_tokens = 10")
    says(lambda values: values["lvlm"].update(layout="image_only"), "layout image_only takes one reference, not 2")
    says(lambda values: values.update(build_index={"factory": "Flatt"}), "build_index.factory = 'Flatt': FAISS refuses it")
    says(
        lambda values: values.update(build_index={"factory": "IVF5000,Flat"}), "needs 5,000 vectors to train on, the corpus has"
    )
    says(lambda values: values.update(build_index={"factory": "PQ8"}), "needs 256 vectors to train on, the corpus has")
    says(lambda values: values["score"].update(bertscore_layer=50), "has 2 layers, not 50; expected 1 to 2")


def test_the_lower_bound_of_a_training_text_is_one(run):
    """Nothing is called too short that a stage could use."""
    found = run(lambda values: values.update(finetune={"max_tokens": 10}))[1]
    least = int(found.split("with its images takes ")[1].split()[0])
    assert 3 * 16 < least < 3 * 16 + 100, "three images of 16 tokens, and the words of the prompt"
    assert run(lambda values: values.update(finetune={"max_tokens": least}))[0] == 0
    alone = {"finetune": {"max_tokens": least - 1}, "pair": {"mix": {"no_reference": 0.1}}}
    assert run(lambda values: values.update(alone))[0] == 0, "samples without references are shorter"


def test_packages_of_extras_are_asked_for_by_name(run, tmp_path, monkeypatch):
    captions = tmp_path / "captions.json"
    rows = {"images": [{"id": 1, "file_name": "gone.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    captions.write_text(json.dumps(rows))

    def change(values):
        values["finetune"] = {"method": "lora", "report_to": ["wandb"]}
        values["variants"] = {
            "four": {"finetune": {"method": "qlora", "zero_stage": 0}},
            "idle": {"finetune": {"method": "qlora"}},
        }
        values["variants"]["idle"]["finetune"]["zero_stage"] = 0
        values["evaluate"]["methods"] = {"four": {"model": "four"}}
        values["evaluate"]["tasks"]["said"] = {"kind": "caption", "files": {"val": str(captions)}}

    monkeypatch.setattr(checksettings, "find_spec", lambda name: None)
    output = run(change)[1]
    lines = [line.split(maxsplit=2)[2] for line in output.splitlines() if line.startswith("WRONG    packages")]
    assert lines == [
        "finetune.method: lora: peft is not installed; next: pip install 'surf-rag[lora]'",
        "finetune.report_to: wandb: wandb is not installed; next: pip install 'surf-rag[tracking]'",
        "variants.four.finetune.method: qlora: bitsandbytes is not installed; next: pip install 'surf-rag[qlora]'",
        "evaluate.tasks.said.kind: caption: sacrebleu is not installed; next: pip install 'surf-rag[captions]'",
        "evaluate.tasks.said.kind: caption: rapidfuzz is not installed; next: pip install 'surf-rag[captions]'",
    ]
    assert "variants.idle is never trained: no method has model: idle" in output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksettings, "find_spec", lambda name: True)
        assert "not installed" not in run(change)[1]


def test_a_fine_tune_without_its_packages_stops_before_it_loads_the_model(monkeypatch):
    lvlm = with_model("nowhere").lvlm
    for method, package in (("lora", "peft"), ("qlora", "bitsandbytes")):
        monkeypatch.setattr(network, "find_spec", lambda name, absent=package: None if name == absent else True)
        with pytest.raises(SurfError, match=rf"method: {method}: {package} is not installed; next: .*surf-rag\[{method}\]"):
            network.load(lvlm, Finetune(method=method, zero_stage=0), None, None, None)


def test_a_variant_that_no_method_uses_is_named(run):
    code, output = run(lambda values: values.update(variants={"idle": {"finetune": {"train": ["langauge_model"]}}}))
    assert code == 0, "what is never trained cannot fail"
    assert "warning  variants       variants.idle is never trained: no method has model: idle" in output


def test_bad_images_are_judged_by_part_as_the_stages_do(run, drawn, tmp_path):
    images = Images([str(drawn / "example/images"), str(drawn / "example/packed.parquet")], LIMIT)

    def readable(row):
        try:
            return images.open(row["image"]) is not None
        except ImageError:
            return False

    ordered = rewrite(drawn / "example/corpus.json", lambda rows: sorted(rows, key=readable), tmp_path / "ordered.json")
    rows = len(json.loads((tmp_path / "ordered.json").read_text()))

    def change(values, shards=1):
        values["catalog"]["captions"], values["shards"] = [ordered], {"corpus": shards}

    assert run(change)[0] == 0, "2 of all are few"
    code, output = run(lambda values: change(values, shards=rows // 4))
    wrong = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert code == 1 and len(wrong) == 1
    assert f"embed will meet 2 of 4 in part-00000-of-{rows // 4:05d}; 50.00%, images.max_bad_share is 20.00%" in wrong[0]


def test_bad_images_of_rounds_are_counted_where_their_parts_will_stand():
    names = [f"{number}.jpg" for number in range(40) for _ in range(3)]
    parts = badshares.rounds(names, {"7.jpg"}, 4)
    whole = {stage: [part for part in parts if part.stage == stage] for stage in ("answer", "retrieve")}
    assert sum(part.total for part in whole["answer"]) == 120 and sum(part.total for part in whole["retrieve"]) == 40
    (mine,) = [part for part in whole["retrieve"] if part.bad]
    assert mine.bad == 1 and mine.name == part_name(shard_of("7.jpg", 4), 4)
    assert badshares.worst(parts).name == mine.name
    assert [(part.bad, part.total) for part in badshares.corpus(["a", "a", "b", "c"], {"a"}, 2)] == [(1, 2), (0, 2)]


def test_what_only_deserves_a_warning(run, drawn, tmp_path):
    example = drawn / "example"
    asked = json.loads((example / "pope/coco_pope_random.json").read_text().splitlines()[0])["image"]
    corpus = rewrite(
        example / "corpus.json",
        lambda rows: [*rows, rows[0], {"image": asked, "caption": "leaked"}],
        tmp_path / "corpus.json",
    )
    chats = rewrite(example / "sft.json", lambda rows: [*rows, rows[0]], tmp_path / "sft.json")

    def change(values):
        values["catalog"]["captions"], values["split"]["conversations"] = [corpus], [chats]

    code, output = run(change)
    warnings = [line for line in output.splitlines() if line.startswith("warning")]
    assert code == 0
    for text in ("images stand more than once in the corpus", "conversation ids stand more than once", f"{asked} = {asked}"):
        assert any(text in line for line in warnings), output


def test_full_disk(run, monkeypatch):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    code, output = run()
    assert code == 1 and "10 B free" in output


def test_neighbours_of_evaluation_images_above_the_limit(run, tmp_path):
    rows = [{"query_id": "q.jpg", "rank": 0, "image_id": 1, "similarity": 0.985}]
    store.write_table(tmp_path / "results/evaluate/pope/neighbors.parquet", store.table_of(rows, "neighbors"), "neighbors")
    assert "1 evaluation images have a neighbour at or above retrieve.max_similarity = 0.98: q.jpg (0.9850)" in run()[1]
    assert "the most similar has 0.9850" in run(lambda c: c.update(retrieve={"max_similarity": 0.99}))[1]


def test_a_calibration_under_other_settings_is_named(run, tmp_path):
    content = {
        "config": {"lvlm.model": "other", "answer.max_new_tokens": 100},
        "machine": {"gpu": "H", "cores": 3},
        "stages": {"embed": {"row": [0.5], "start": [3.0]}},
        "shares": {"wrong": [1, 2], "pairs": None, "asked": None},
    }
    store.write_json(tmp_path / "results/calibration.json", content)
    output = run()[1]
    assert "H, 3 cores" in output and "was made with lvlm.model = 'other'" in output
    assert "| calibration" in output
