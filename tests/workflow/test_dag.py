"""What the DAG promises before anything runs."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_the_example_is_every_stage_over_its_shards(workflow):
    assert workflow.plan() == {
        "demo": 1,
        "resolved_config": 1,
        "catalog": 1,
        "embed": 2,
        "build_index": 1,
        "split": 2,
        "answer": 2,
        "retrieve": 2,
        "reanswer": 2,
        "score": 4,
        "merge": 7,
        "pair": 1,
        "finetune": 1,
        "variant_pair": 4,
        "variant_finetune": 4,
        "evaluate_questions": 1,
        "evaluate_retrieve": 1,
        "evaluate_candidates": 1,
        "evaluate_answer": 6,
        "pope": 1,
        "evidence": 1,
        "report": 1,
        "all": 1,
    }


def test_more_shards_more_jobs_and_nothing_else(workflow):
    few, many = workflow.plan(), workflow.plan(config={"shards": {"corpus": 3, "rounds": 5}})
    difference = {rule: many[rule] - few[rule] for rule in many if many[rule] != few[rule]}
    assert difference == {"embed": 1, "split": 3, "answer": 3, "retrieve": 3, "reanswer": 3, "score": 6}


@pytest.mark.parametrize(
    ("target", "includes", "excludes"),
    [
        ("embeddings", {"embed", "merge"}, {"answer", "split", "finetune"}),
        ("index", {"build_index"}, {"answer", "split"}),
        ("rounds", {"split"}, {"answer", "embed"}),
        ("answers", {"answer"}, {"embed", "reanswer"}),
        ("neighbors", {"retrieve", "build_index"}, {"answer", "reanswer"}),
        ("reanswers", {"reanswer", "answer", "retrieve"}, {"pair", "finetune"}),
        ("scores", {"score", "reanswer"}, {"pair"}),
        ("pairs", {"pair"}, {"finetune", "evaluate_answer"}),
        ("model", {"finetune"}, {"variant_finetune", "evaluate_answer"}),
        ("pope", {"pope", "finetune"}, {"report", "evidence"}),
        ("evidence", {"evidence", "finetune", "variant_finetune"}, {"report", "pope"}),
        ("report", {"report", "pope"}, set()),
        ("results/answers/part-00001-of-00002.parquet", {"answer"}, {"merge", "embed"}),
    ],
)
def test_targets_are_nouns(workflow, target, includes, excludes):
    rules = set(workflow.plan(target))
    assert includes <= rules
    assert not excludes & rules


def test_check_needs_neither_data_nor_other_jobs_and_fails_with_what_it_finds(workflow):
    assert workflow.plan("check") == {"check": 1, "resolved_config": 1}
    words = ["--configfile", "configs/llava-1.5-7b.yaml", "--config", "embed={model: 'local-dir:x'}"]
    done = workflow.run("check", *words, check=False)
    assert done.returncode != 0
    assert "data/images: there is no such image root" in done.output
    assert " wrong, " in done.output


def test_the_papers_run_shows_its_dag_without_data_and_says_what_is_missing_before_the_first_job(workflow):
    plan = workflow.plan("--configfile", "configs/llava-1.5-7b.yaml")
    assert (plan["embed"], plan["answer"], plan["finetune"], "demo" in plan) == (50, 64, 1, False)
    assert (plan["evaluate_questions"], plan["variant_finetune"]) == (7, 5)
    done = workflow.run("--configfile", "configs/llava-1.5-7b.yaml", check=False)
    assert done.returncode != 0
    for missing in ("data/images", "data/llava_v1_5_mix665k.json", "data/pope/coco_pope_random.json", "data/emoset/test.json"):
        assert missing in done.output
    assert "docs/data.md" in done.output
    assert not list((workflow.folder / "results/llava-1.5-7b").rglob("*.parquet"))


def test_a_misspelt_image_root_is_named_although_there_is_an_example_to_draw(workflow):
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["images"]["roots"] = ["example/imagse", "example/packed.parquet"]
    (workflow.folder / "mine.yaml").write_text(yaml.safe_dump(config))
    done = workflow.run("demo", "--configfile", "mine.yaml", check=False)
    assert done.returncode != 0
    assert "not there:\n  example/imagse\nnext: see docs/data.md" in done.output
    assert not (workflow.folder / "example").exists()


def test_a_config_file_takes_the_place_of_the_examples(workflow):
    """Snakemake would lay it over config.yaml, and the example's settings would shine through."""
    minimal = {
        "catalog": {"captions": ["c"]},
        "split": {"conversations": ["s"]},
        "evaluate": {"tasks": {"pope": {"kind": "pope", "files": {"only": "p"}}}},
    }
    (workflow.folder / "mine.yaml").write_text(yaml.safe_dump(minimal))
    output = workflow.run("-n", "-p", "--configfile", "mine.yaml").output
    assert "llava-hf/llava-1.5-7b-hf" in output
    assert "surf/demo" not in output


def test_an_empty_suffix_and_a_variant_s_random_negatives_reach_their_commands(workflow):
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["evaluate"]["tasks"] = {"captions": {"kind": "caption", "files": {"val": "c.json"}}}
    (workflow.folder / "mine.yaml").write_text(yaml.safe_dump(config))
    (workflow.folder / "c.json").touch()
    output = workflow.run("-n", "-p", "--configfile", "mine.yaml").output
    commands = [line for line in output.splitlines() if "-m surf." in line]
    suffixes = [line for line in commands if "--suffix" in line]
    assert suffixes and all("--suffix= --" in line or "--suffix= " in line for line in suffixes)
    pairs = {re.search(r"--out \S+", line)[0]: line for line in commands if "-m surf.pair" in line}
    random = pairs.pop("--out results/variants/random-negatives/pairs.parquet")
    assert "--unreadable results/quarantine/embeddings/part-" in random
    assert pairs and all("--unreadable  --out" in line for line in pairs.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("answer={temperature: hot}", "answer.temperature = 'hot': input should be a valid number"),
        ("shards={rounds: 0}", "shards.rounds = '0': input should be greater than 0"),
        ("anser=1", "anser = 1: there is no such key"),
    ],
)
def test_a_wrong_config_stops_before_any_job(workflow, value, message):
    done = workflow.run("-n", "--config", value, check=False)
    assert done.returncode != 0
    assert sum(message in line for line in done.output.splitlines()) == 1
    assert "Traceback" not in done.output


def test_rules_bring_no_retries_and_no_inline_code():
    """`retries:` in a rule multiplies inside a Slurm job; `run:` and `script:` cannot be pasted into a shell."""
    for path in (ROOT / "rules").glob("*.smk"):
        assert not re.search(r"^\s+(retries|run|script):", path.read_text(), re.M), path
        assert len(path.read_text().splitlines()) <= 120, path
