"""The embedded example from images to the report, with two and with five shards."""

import json
import shutil

import pytest
from flow import ROOT, Workflow

from surf import store
from surf.schemas import SCHEMAS

pytestmark = pytest.mark.timeout(1800)  # the whole example
PROFILE = ["--profile", "profiles/local", "--resources", "gpu=2"]
METHODS = ("zero-shot", "vanilla-rag", "rerank-rag", "surf")  # the others differ by what unit tests look at
SHARDED = ["catalog", "embeddings", "rounds", "answers", "neighbors", "reanswers", "scores/answers", "scores/reanswers"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The example, run with the shards of config.yaml."""
    made = Workflow(tmp_path_factory.mktemp("example"), methods=METHODS)
    made.run(*PROFILE)
    return made


def jobs(done):
    """Rules that a run started, in order."""
    return [line.split()[-1].rstrip(":") for line in done.output.splitlines() if line.startswith(("rule ", "localrule "))]


def test_every_dataset_is_there_with_its_manifest(finished):
    results = finished.folder / "results"
    for dataset in SHARDED:
        manifest = json.loads((results / dataset / "_manifest.json").read_text())
        table = store.read_table(results / dataset / "_manifest.json", dataset)
        assert (manifest["dataset"], manifest["rows"], len(manifest["parts"])) == (dataset, table.num_rows, 2)
        assert table.num_rows > 0
        if dataset != "embeddings":
            assert table.schema.equals(SCHEMAS[dataset])
    for name in ("pairs.parquet", "pairs.json", "index/index.faiss", "index/index.json", "model/model.json", "config.json"):
        assert (results / name).stat().st_size > 0
    assert not list(results.rglob("*.tmp")) and not list(results.rglob("_partial"))


def test_nothing_is_lost_on_the_way(finished):
    """Every row is accounted for: in the next dataset, or in quarantine with a reason."""
    results = finished.folder / "results"

    def rows(dataset):
        return store.rows(store.read_table(results / dataset / "_manifest.json", dataset))

    def quarantined(dataset):
        return {row["key"] for path in (results / "quarantine" / dataset).glob("*.parquet") for row in read(path)}

    def read(path):
        return store.rows(store.read_table(path, "quarantine"))

    unreadable = [row for row in rows("embeddings") if row["embedding"] is None]
    assert len(unreadable) == len(quarantined("embeddings")) == 2, "the world has a torn and a missing image"
    rounds = {row["round_id"] for row in rows("rounds")}
    answered = {row["round_id"] for row in rows("answers")}
    assert rounds == answered | quarantined("answers") and not answered & quarantined("answers")
    assert quarantined("answers"), "the world has a conversation about a missing image"
    wrong = {row["round_id"] for row in rows("scores/answers") if row["correct"] is False}
    right = {row["round_id"] for row in rows("scores/answers") if row["correct"]}
    again = {row["round_id"] for row in rows("reanswers")}
    assert wrong < again < wrong | right, "all wrong rounds, and a share of the right ones"
    assert 0.1 < len(again - wrong) / len(right) < 0.3, "reanswer.right_share"
    assert len(rows("scores/answers")) == len(answered) and len(rows("scores/reanswers")) == len(rows("reanswers"))


def test_references_are_never_the_query_itself(finished):
    results = finished.folder / "results"
    corpus = {
        row["image_id"]: row["image"] for row in store.rows(store.read_table(results / "catalog/_manifest.json", "catalog"))
    }
    near = store.rows(store.read_table(results / "neighbors/_manifest.json", "neighbors"))
    queries = {row["query_id"] for row in near}
    assert queries & set(corpus.values()), "the world has query images that are in the corpus as well"
    assert all(corpus[row["image_id"]] != row["query_id"] and row["similarity"] < 0.999 for row in near)


def test_pairs_in_the_originals_format(finished):
    samples = json.loads((finished.folder / "results/pairs.json").read_text())
    assert len(samples) > 50
    for sample in samples:
        assert list(sample) == ["id", "image", "conversations", "images", "labels"]
        human, gpt = sample["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<Retrieval>1. <image> ") and "\n</Retrieval> <image>\n" in human["value"]
        assert human["value"].count("<image>") == len(sample["images"]) + 1 == 3
        assert sorted(sample["labels"]) == [0, 1]
    assert {sample["labels"][0] for sample in samples} == {0, 1}, "the order is shuffled"


def test_the_table_holds_every_method_split_and_rule(finished):
    rows = store.rows(store.read_table(finished.folder / "results/pope/metrics.parquet", "pope/metrics"))
    found = {(row["method"], row["split"], row["rule"]) for row in rows if row["metric"] == "accuracy"}
    for method in METHODS:
        for split in ("random", "popular", "adversarial"):
            assert {(method, split, rule) for rule in ("surf", "official", "lmms-eval", "vlmevalkit", "surf-released")} <= found
    assert any(method == "image-blind" for method, _, _ in found)
    headline = {(r["method"], r["split"]): r for r in rows if r["rule"] == "surf" and r["metric"] == "accuracy"}
    base = headline["zero-shot", "random"]
    assert 0.6 < base["low"] < base["value"] < base["high"] < 0.95, "clearly better than chance and clearly imperfect"


def test_the_evidence_holds_every_method_and_the_lines_beside_them(finished):
    folder = finished.folder / "results/evidence"
    rows = store.rows(store.read_table(folder / "measures.parquet", "evidence/measures"))
    whole = {(r["method"], r["measure"], r["against"]): r for r in rows if (r["split"], r["subset"]) == ("all", "all")}
    for method in (*METHODS, "image-blind", "chance"):
        assert 0 < whole[method, "score", None]["value"] < 1
    for measure in ("rescue", "harm", "difference"):
        row = whole["surf", measure, "zero-shot"]
        assert row["low"] <= row["value"] <= row["high"]
    for name in ("scores.parquet", "measures.csv", "table.md", "pope.svg"):
        assert (folder / name).stat().st_size > 0
    page = (folder / "index.html").read_text()
    assert page.count("data:image/") > 10 and "https://" not in page and "<script" not in page


def test_the_model_is_a_plain_hugging_face_folder(finished):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = finished.folder / "results/model"
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert AutoProcessor.from_pretrained(folder).chat_template
    card = json.loads((folder / "model.json").read_text())
    curve = [point["loss"] for point in card["loss_curve"]]
    assert sum(curve[-5:]) < sum(curve[:5]), "it has learnt something"
    base = AutoModelForImageTextToText.from_pretrained(ROOT / "surf/demo/models/lvlm")
    tower = "model.vision_tower"
    same = [
        (a == b).all() for (n, a), (_, b) in zip(model.named_parameters(), base.named_parameters(), strict=True) if tower in n
    ]
    assert same and all(same), "the vision tower is frozen"


def test_the_report_needs_no_network(finished):
    page = (finished.folder / "results/report.html").read_text()
    assert "https://" not in page and "http://" not in page.replace("http://www.w3.org/", "") and "<script" not in page
    assert page.count("data:image/") > 20


def test_snakemakes_own_report(finished):
    done = finished.run("--report", "report.zip")
    assert (finished.folder / "report.zip").stat().st_size > 0, done.output


def test_a_second_run_has_nothing_to_do(finished):
    assert "Nothing to be done" in finished.run(*PROFILE, "-n").output


def test_a_lost_part_is_that_job_and_its_merge_and_nothing_after_it(finished):
    part = finished.folder / "results/answers/part-00001-of-00002.parquet"
    before = part.read_bytes()
    part.unlink()
    assert jobs(finished.run("results/answers/part-00001-of-00002.parquet", *PROFILE)) == ["answer"]
    assert part.read_bytes() == before
    assert "Nothing to be done" in finished.run(*PROFILE, "-n").output
    part.unlink()
    assert jobs(finished.run("answers", *PROFILE)) == ["answer", "merge", "answers"]
    assert "Nothing to be done" in finished.run(*PROFILE, "-n").output


def test_parts_of_another_number_of_shards_are_named_and_never_read(finished):
    stray = finished.folder / "results/rounds/part-00000-of-00004.parquet"
    shutil.copy(finished.folder / "results/rounds/part-00000-of-00002.parquet", stray)
    (finished.folder / "results/rounds/_manifest.json").unlink()
    done = finished.run("rounds", *PROFILE, check=False)
    assert done.returncode != 0
    assert f"rm {stray.relative_to(finished.folder)}" in done.output
    stray.unlink()
    finished.run("rounds", *PROFILE)
    assert "Nothing to be done" in finished.run(*PROFILE, "-n").output


def test_five_shards_give_the_same_pairs_and_the_same_answers(finished, tmp_path_factory):
    other = Workflow(tmp_path_factory.mktemp("five"), methods=METHODS)
    other.run("pairs", *PROFILE, "--config", 'shards={"corpus": 5, "rounds": 5}')
    ours, theirs = finished.folder / "results", other.folder / "results"
    assert (theirs / "pairs.parquet").read_bytes() == (ours / "pairs.parquet").read_bytes()
    assert (theirs / "pairs.json").read_bytes() == (ours / "pairs.json").read_bytes()
    for dataset in ("answers", "reanswers", "neighbors"):
        tables = [store.rows(store.read_table(folder / dataset / "_manifest.json", dataset)) for folder in (ours, theirs)]
        tables = [sorted(rows, key=lambda row: (str(next(iter(row.values()))), row["rank"])) for rows in tables]
        assert tables[0] == tables[1]
