"""What a change reruns, and what it leaves alone: dry runs after a run whose stages only touched their files."""

import shutil

import pytest
from flow import TRIGGERS, Workflow

from surf import store

CHEAP = {"merge", "all", "report", "pope", "evidence", "resolved_config"}
TUNED = {"finetune", "variant_pair", "variant_finetune", "evaluate_answer"}  # what follows from the scores


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workflow whose jobs are all done, in Snakemake's eyes: `--touch` records them without running them."""
    folder = tmp_path_factory.mktemp("finished")
    made = Workflow(folder)
    listing = made.run("-n", "--detailed-summary").stdout
    for line in listing.splitlines()[1:]:
        name = line.split("\t")[0]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    made.run("--touch", "--forceall", *TRIGGERS)
    assert made.plan() == {}
    return made


def changed(finished, **config):
    """Expensive stages that a change of the config would rerun."""
    return set(finished.plan(config=config)) - CHEAP


def test_nothing_changed_nothing_to_do(finished):
    done = finished.run("-n", *TRIGGERS)
    assert "Nothing to be done" in done.output


def test_code_without_a_version_bump_reruns_nothing(finished):
    """`git checkout` gives every source file a new time stamp."""
    snakefile = finished.folder / "Snakefile"
    content = snakefile.read_text()
    snakefile.unlink()
    snakefile.write_text(content + "\n\n# a comment, and a new time stamp\n")
    assert finished.plan() == {}


def test_answer_temperature(finished):
    rules = changed(finished, answer={"temperature": 0.5})
    assert rules == {"answer", "score", "reanswer", "pair"} | TUNED
    plan = finished.plan(config={"answer": {"temperature": 0.5}})
    assert plan["evaluate_answer"] == 5, "only the tuned models' answers"


def test_embed_model(finished):
    rules = changed(finished, embed={"model": "ViT-B-32", "pretrained": "openai"})
    assert {"embed", "build_index", "retrieve", "evaluate_retrieve", "evaluate_candidates", "reanswer"} <= rules
    assert not rules & {"catalog", "split", "answer"}
    assert finished.plan(config={"embed": {"model": "ViT-B-32", "pretrained": "openai"}})["evaluate_answer"] == 6


def test_pair_samples(finished):
    assert changed(finished, pair={"samples": 10}) == {"pair"} | TUNED


def test_finetune_learning_rate(finished):
    assert changed(finished, finetune={"learning_rate": 1e-6}) == TUNED - {"variant_pair"}


def test_a_new_method_is_answered_and_no_other_model_asked(finished):
    plan = finished.plan(config={"evaluate": {"methods": {"one": {"model": "base", "references": 1}}}})
    assert plan["evaluate_answer"] == 1 and not set(plan) - CHEAP - {"evaluate_answer"}


def test_a_sweep_is_a_line_of_config(finished):
    plan = finished.plan(config={"evaluate": {"sweeps": {"source": ["random", "oracle"], "k": [1, 4]}}})
    assert plan["evaluate_answer"] == 2 and plan["evaluate_candidates"] == 1, "of two models; by the gold answer's likelihood"
    assert not set(plan) - CHEAP - {"evaluate_answer", "evaluate_candidates"}


def test_another_interval_asks_no_model(finished):
    assert changed(finished, evaluate={"resamples": 100}) == set()


def test_a_variant_is_trained_and_no_other(finished):
    change = {"variants": {"long": {"finetune": {"epochs": 9}}}, "evaluate": {"methods": {"long": {"model": "long"}}}}
    plan = finished.plan(config=change)
    assert {name: plan[name] for name in TUNED if plan[name]} == {
        "variant_pair": 1,
        "variant_finetune": 1,
        "evaluate_answer": 1,
    }


@pytest.mark.parametrize(
    "knobs",
    [
        {"lvlm": {"batch_size": 3, "batch_tokens": 999}},
        {"embed": {"batch_size": 3, "workers": 5}},
        {"images": {"max_bad_share": 0.5}},
        {"answer": {"flush_rows": 7}},
    ],
    ids=str,
)
def test_knobs_rerun_nothing(finished, knobs):
    assert changed(finished, **knobs) == set()


def test_one_part_lost_and_asked_for_by_name(finished):
    lost = finished.folder / "results/answers/part-00001-of-00002.parquet"
    aside = finished.folder / "aside"
    shutil.move(lost, aside)
    try:
        assert finished.plan("results/answers/part-00001-of-00002.parquet") == {"answer": 1}
        assert finished.plan("answers") == {"answer": 1, "merge": 1, "answers": 1}
    finally:
        shutil.move(aside, lost)


def test_version_bump_reruns_its_stage(finished, monkeypatch):
    """A stage's version stands in its `params`."""
    from surf import config

    text = (finished.folder / "rules").resolve().joinpath("responses.smk").read_text()
    assert text.count("version=") == 5
    assert config.Answer.version >= 1
    store.write_text(finished.folder / "bump.smk", "import surf.config as settings\nsettings.Answer.version = 99\n")
    snakefile = finished.folder / "Snakefile"
    plain = snakefile.read_text()
    snakefile.unlink()
    snakefile.write_text(plain.replace('include: "rules/common.smk"', 'include: "bump.smk"\ninclude: "rules/common.smk"'))
    try:
        assert set(finished.plan()) - CHEAP == {"answer", "score", "reanswer", "pair"} | TUNED
    finally:
        snakefile.write_text(plain)
