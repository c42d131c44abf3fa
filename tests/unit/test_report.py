"""The report page: its numbers against an independent count, hostile texts, missing images, determinism, nothing to show."""

import base64
import io
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from surf import cli, config, popetable, report, store
from surf.errors import SurfError
from surf.images import Images
from surf.metrics import verdict

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} https://example.org/x'
TASKS = ("choice", "short", "box", "caption", "open")


@pytest.fixture
def tree(tmp_path):
    """A small tree of results in two shards, with every kind of round; the answer key is `fates`."""
    return build(tmp_path)


def build(
    root: Path, *, fates: dict[str, tuple[str, str]] | None = None, pairs: bool = True, flips: bool = True
) -> report.Inputs:
    fates = make_fates() if fates is None else fates
    colours = {"a.png": (64, 64), "b.jpg": (900, 600), "c.png": (64, 64)}
    for number, (name, size) in enumerate(colours.items()):
        (root / "images").mkdir(exist_ok=True)
        Image.new("RGB", size, (40 * number, 90, 120)).save(root / "images" / name)
    keys = sorted(fates)
    shards = [keys[::2], keys[1::2]]
    for dataset in report.SHARDED:
        parts = []
        for number, shard in enumerate(shards):
            rows = [row for key in shard for row in rows_of(dataset, key, *fates[key])]
            parts.append(root / dataset / f"part-{number:05d}-of-00002.parquet")
            meta = {"flags": cli.flags(lvlm=config.Lvlm(model="some/model"))}
            store.write_table(parts[-1], store.table_of(rows, dataset), dataset, meta)
        manifest(root / dataset / "_manifest.json", dataset, parts)
    kept = [pair_of(key, fates[key][0]) for key in keys if fates[key][1] == "both"][1:] if pairs else []
    store.write_table(root / "pairs.parquet", store.table_of(kept, "pairs"), "pairs")
    catalog = [{"image_id": 0, "image": "a.png", "caption": EVIL}, {"image_id": 1, "image": "gone.png", "caption": "a dog"}]
    store.write_table(root / "catalog" / "part-0.parquet", store.table_of(catalog, "catalog"), "catalog")
    manifest(root / "catalog" / "_manifest.json", "catalog", [root / "catalog" / "part-0.parquet"])
    runs = pope_runs(flips)
    files = []
    for method, splits in runs.items():
        files.append(root / "evaluate" / "pope" / "answers" / f"{method}.parquet")
        table = store.table_of([row for rows in splits.values() for row in rows], "evaluate/answers")
        store.write_table(files[-1], table, "evaluate/answers", {"task": "pope", "kind": "pope", "method": method})
    measured = popetable.measure(runs, 50, 0)
    store.write_table(root / "pope" / "metrics.parquet", store.table_of(measured, "pope/metrics"), "pope/metrics")
    curve = [{"step": step, "loss": 2.0 / step, "lr": 1e-5} for step in range(1, 9)]
    store.write_json(root / "model.json", {"base_model": EVIL, "loss_curve": curve})
    bad = [{"dataset": "embeddings", "key": f"{EVIL} {number}", "stage": "embed", "error": EVIL} for number in range(30)]
    store.write_table(root / "quarantine.parquet", store.table_of(bad, "quarantine"), "quarantine")
    return report.Inputs(
        rounds=root / "rounds/_manifest.json",
        answers=root / "answers/_manifest.json",
        scores_answers=root / "scores/answers/_manifest.json",
        reanswers=root / "reanswers/_manifest.json",
        scores_reanswers=root / "scores/reanswers/_manifest.json",
        pairs=root / "pairs.parquet",
        metrics=root / "pope/metrics.parquet",
        pope_answers=files,
        catalog=root / "catalog/_manifest.json",
        model=root / "model.json",
        quarantine=[root / "quarantine.parquet"],
        resamples=50,
    )


def make_fates() -> dict[str, tuple[str, str]]:
    """Round: (task, what becomes of it)."""
    ends = ("unanswered", "right", "undecided", "wrong", "positive", "negative", "both", "both", "neither")
    return {f"r{number:03d}": (TASKS[number % 5], ends[number % 9]) for number in range(70)}


def rows_of(dataset: str, key: str, task: str, end: str) -> list[dict]:
    metric = {"box": "iou", "caption": "bertscore", "open": "bertscore"}.get(task, "match")
    base = 0.5 if metric == "bertscore" else 0.0
    if dataset == "rounds":
        return [{"round_id": key, "image": "b.jpg", "question": f"{EVIL} {key}", "answer": "yes", "task": task}]
    if end == "unanswered":
        return []
    if dataset == "answers":
        return [{"round_id": key, "rank": -1, "image_id": None, "response": f"first {key}"}]
    if dataset == "scores/answers":
        correct = {"right": True, "undecided": None}.get(end, False)
        return [{"round_id": key, "rank": -1, "metric": metric, "score": base, "correct": correct}]
    labels = {"positive": [True], "negative": [False, False], "both": [False, True, False], "neither": [None]}.get(end, [])
    if dataset == "reanswers":
        return [
            {"round_id": key, "rank": rank, "image_id": rank, "response": f"again {key} {rank}"} for rank in range(len(labels))
        ]
    gains = {True: 0.3, False: -0.3, None: 0.001}
    return [
        {"round_id": key, "rank": rank, "metric": metric}
        | (
            {"score": base + gains[label], "correct": None}
            if metric == "bertscore"
            else {"score": label or 0.0, "correct": label}
        )
        for rank, label in enumerate(labels)
    ]


def pair_of(key: str, task: str) -> dict:
    positive = {"image_id": 1, "image": "a.png", "caption": EVIL + " word" * 200, "similarity": 0.9, "gain": 1.0}
    negative = {"image_id": 0, "image": "../gone.png", "caption": "a dog", "similarity": 0.95, "gain": 0.0}
    row = {"round_id": key, "image": "b.jpg", "question": f"{EVIL} {key}", "answer": "yes", "task": task}
    return row | {"kind": "pair", "positive_first": True, "positive": positive, "negative": negative}


def pope_runs(flips: bool) -> dict[str, dict[str, list[dict]]]:
    """Zero-shot says yes to everything, or what surf says; surf errs on every fifth question."""
    runs: dict[str, dict[str, list[dict]]] = {"zero-shot": {}, "surf": {}}
    for split in ("random", "popular"):
        for method, rows in ((method, runs[method].setdefault(split, [])) for method in runs):
            for number in range(20):
                label = number % 2 == 0
                said = "yes" if method == "zero-shot" and flips else "yes" if label != (number % 5 == 0) else "no"
                row = {"question_id": f"{split}#{number}", "image": f"{'abc'[number % 3]}.png", "question": f"{EVIL} {number}"}
                row |= {"split": split, "label": label, "answers": ["yes" if label else "no"], "response": said}
                rows.append(row | {"references": [0, 1, 99] if method == "surf" else []})
    return runs


def manifest(path: Path, dataset: str, parts: list[Path]) -> None:
    entries = []
    for part in parts:
        metadata, meta = store.footer(part)
        entries.append({"file": part.name, "rows": metadata.num_rows, "bytes": 0, "digest": meta["digest"]})
    rows = sum(entry["rows"] for entry in entries)
    store.write_json(path, {"dataset": dataset, "version": "1", "schema": [], "rows": rows, "parts": entries})


def page(inputs: report.Inputs, samples: int = 4) -> str:
    images = Images([str(inputs.pairs.parent / "images")])
    return report.report(inputs, config.Report(samples=samples), config.Score(), images)


def test_funnel_equals_an_independent_count(tree):
    fates = make_fates()
    reaches = {
        "rounds": {"unanswered", "right", "undecided", "wrong", "positive", "negative", "both", "neither"},
        "answered": {"right", "undecided", "wrong", "positive", "negative", "both", "neither"},
        "wrong": {"wrong", "positive", "negative", "both", "neither"},
        "reanswered": {"positive", "negative", "both", "neither"},
        "positive": {"positive", "both"},
        "negative": {"negative", "both"},
        "both": {"both"},
    }
    steps = report.funnel(tree, config.Score())["steps"]
    for step, ends in reaches.items():
        expected = Counter(task for task, end in fates.values() if end in ends)
        assert steps[step]["tasks"] == expected, step
        assert steps[step]["total"] == expected.total()
    assert steps["pairs"]["total"] == steps["both"]["total"] - 1
    assert steps["wrong"]["share"] == steps["wrong"]["total"] / steps["answered"]["total"]
    text = page(tree)
    assert "<code>some/model</code>" in text
    for step in steps.values():
        assert f"<b>{step['total']}</b>" in text


def test_the_margin_decides_what_a_gain_is(tree):
    before = report.funnel(tree, config.Score())["steps"]
    after = report.funnel(tree, config.Score(margin=0.5))["steps"]
    for task in ("caption", "open"):
        assert before["both"]["tasks"][task] > 0
        assert after["both"]["tasks"][task] == 0
    assert after["both"]["tasks"]["short"] == before["both"]["tasks"]["short"]


def test_shards_that_do_not_fit_together_are_refused(tree):
    part = tree.rounds.parent / "part-00000-of-00002.parquet"
    manifest(tree.rounds, "rounds", [part])
    with pytest.raises(SurfError, match="numbers of shards differ: rounds 1"):
        report.funnel(tree, config.Score())
    manifest(tree.rounds, "rounds", [part, part])
    with pytest.raises(SurfError, match="is not in this shard"):
        report.funnel(tree, config.Score())


def test_the_page_is_one_file_and_hostile_text_stays_text(tree):
    text = page(tree)
    assert "<script" not in text.lower()
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "{{ 7 * 7 }}" in text  # a template in a caption is text too
    tags = re.findall(r"<[a-z][^>]*>", text)
    assert not [tag for tag in tags if re.search(r"\son\w+\s*=|https?:|url\(|javascript:", re.sub(r'alt="[^"]*"', "", tag))]
    assert {tag.split('"')[1][:5] for tag in re.findall(r'src="[^"]*"', text)} == {"data:"}
    assert set(re.findall(r'href="([^"])', text)) == {"#"}
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_links_stand_nowhere_but_in_the_data(tree):
    text = page(tree)
    assert text.count("https://") == text.count("https://example.org/x")
    assert "http://" not in text


def test_images_are_embedded_small_and_missing_ones_leave_a_placeholder(tree):
    text = page(tree)
    assert 'aria-label="Negative reference ../gone.png: not available"' in text
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', text)
    sizes = {(kind, Image.open(io.BytesIO(base64.b64decode(data))).size) for kind, data in found}
    assert sizes == {("jpeg", (256, 171)), ("png", (64, 64))}
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", text))


def test_samples_show_each_reference_with_its_reanswer(tree):
    keys = {row["round_id"] for row in report.samples(tree, 3)}
    assert len(keys) == 3
    text = page(tree, samples=3)
    for key in keys:
        for said in (f"first {key}", f"again {key} 0", f"again {key} 1"):
            assert said in text


def test_rescues_and_harms_are_counted_by_split(tree):
    found = report.flips(tree, 3)
    before, after = pope_runs(True)["zero-shot"]["random"], pope_runs(True)["surf"]["random"]
    right = [tuple(verdict(row["response"]) == row["label"] for row in rows) for rows in zip(before, after, strict=True)]
    expected = {"rescued": right.count((False, True)), "harmed": right.count((True, False)), "both": right.count((True, True))}
    assert {kind: found["counts"]["random"][kind] for kind in expected} == expected
    assert len(found["rescued"]) == 3
    assert len({row["question"] for row in found["rescued"]}) == 3  # one question of two splits stands once
    assert [pair.image for pair in found["rescued"][0]["pairs"]] == ["a.png", "gone.png"]
    assert found["delta"].value == pytest.approx((expected["rescued"] - expected["harmed"]) / 20)


def test_rescues_of_several_tasks_are_counted_apart(tree):
    files = list(tree.pope_answers)
    for path in files:  # a second task with the same question ids, and fewer of them
        rows = store.rows(store.read_table(path, "evaluate/answers"))[:8]
        meta = {**store.footer(path)[1], "task": "gqa"}
        other = path.parent.parent.parent / "gqa" / path.name
        store.write_table(other, store.table_of(rows, "evaluate/answers"), "evaluate/answers", meta)
        files = [*files, other]
    alone, both = report.flips(tree, 3), report.flips(replace(tree, pope_answers=files), 3)
    assert both["counts"]["pope/random"] == alone["counts"]["random"] and sum(both["counts"]["gqa/random"].values()) == 8


@pytest.mark.parametrize(
    ("hows", "order", "pair"),
    [
        ({"plain": {"model": "base"}, "ours": {"model": "tuned", "references": 2}}, "", "plain ours"),
        ({"plain": {"model": "base"}, "b": {"model": "tuned"}, "c": {"model": "tuned", "references": 1}}, "", "plain c"),
        ({"a": {"model": "base"}, "b": {"model": "base"}, "c": {"model": "mine"}}, "c b a", "b c"),
        ({"a": {"model": "base"}, "b": {"model": "base", "references": 2}}, "", "a b"),
        ({"zero-shot": {"model": "base"}, "a": {"model": "tuned"}, "surf": {"model": "mine"}}, "a", "zero-shot surf"),
        ({"a": {"model": "base"}}, "", "a surf"),
    ],
)
def test_methods_of_other_names_are_compared_by_what_they_do(tree, hows, order, pair):
    files = []
    for method, how in hows.items():
        files.append(tree.pope_answers[0].with_name(f"{method}.parquet"))
        rows = store.table_of(pope_runs(True)["zero-shot"]["random"], "evaluate/answers")
        meta = {"task": "pope", "kind": "pope", "method": method, "how": how}
        store.write_table(files[-1], rows, "evaluate/answers", meta)
    found = report.compared(replace(tree, pope_answers=files, methods=order.split()))
    assert f"{found.baseline} {found.tuned}" == pair
    counted = report.flips(found, 3)["counts"]
    assert bool(counted) is (set(pair.split()) <= hows.keys())
    if counted:
        assert f"before ({found.baseline}) and after ({found.tuned})" in page(
            replace(tree, pope_answers=files, methods=order.split())
        )


def test_equal_results_give_equal_bytes(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert page(build(tmp_path / "one")) == page(build(tmp_path / "two"))


@pytest.mark.parametrize("samples", [0, 4])
def test_nothing_to_show_still_makes_a_page(tmp_path, samples):
    inputs = build(tmp_path, fates={}, pairs=False, flips=False)
    store.write_json(inputs.model, {})
    empty = store.table_of([], "quarantine")
    store.write_table(inputs.quarantine[0], empty, "quarantine")
    text = page(inputs, samples)
    for words in ("There are no pairs to show", "None to show", "No loss curve was kept", "every row and image could be used"):
        assert words in text
    bare = report.Inputs(**{name: getattr(inputs, name) for name in list(vars(inputs))[:7]})
    store.write_table(bare.metrics, store.table_of([], "pope/metrics"), "pope/metrics")
    text = page(bare, samples)
    assert "There are no POPE scores" in text
    assert "There are no answers of both methods" in text


def test_a_method_without_intervals_or_predictions_renders(tree):
    rows = [row | {"low": None, "high": None} for row in store.rows(store.read_table(tree.metrics, "pope/metrics"))]
    store.write_table(tree.metrics, store.table_of(rows, "pope/metrics"), "pope/metrics")
    assert "POPE: does it see" in page(tree)


def test_command_line_writes_the_page(tree, monkeypatch):
    out = tree.pairs.parent / "report.html"
    words = []
    for name, value in vars(tree).items():
        if isinstance(value, list | tuple):
            words += [f"--{name.replace('_', '-')}", *map(str, value)]
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    flags = ["--images.roots", f'["{tree.pairs.parent}/images"]', "--report.samples", "4"]
    monkeypatch.setattr(sys, "argv", ["report", *words, "--out", str(out), *flags])
    cli.run(report.main)
    assert out.read_text(encoding="utf-8") == page(tree)
