"""The configuration: what is refused and how, flags and back, the schema that editors use."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from surf import cli, config, describe
from surf.errors import SurfError

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "catalog": {"captions": ["c.json"]},
    "split": {"conversations": ["s.json"]},
    "pope": {"questions": {"random": "p.json"}},
}


def with_(**sections):
    values = json.loads(json.dumps(MINIMAL))
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


@pytest.mark.parametrize("path", [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))], ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    assert config.load(path).results


def test_shipped_schema_is_up_to_date():
    assert (ROOT / "surf/config.schema.json").read_text() == describe.schema(), (
        "run: python -m surf.describe schema > surf/config.schema.json"
    )


def test_documentation_of_the_keys_is_up_to_date():
    assert (ROOT / "docs/config.md").read_text() == describe.keys(), "run: python -m surf.describe keys > docs/config.md"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_(anser={}), "anser = {}: there is no such key"),
        (with_(answer={"temprature": 1}), "answer.temprature = 1: there is no such key"),
        (with_(answer={"temperature": "hot"}), "answer.temperature = 'hot': input should be a valid number"),
        (with_(answer={"temperature": -1}), "answer.temperature = -1: input should be greater than or equal to 0"),
        (with_(answer={"temperature": float("nan")}), "answer.temperature = nan: input should be a finite number"),
        (with_(shards={"rounds": 0}), "shards.rounds = 0: input should be greater than 0"),
        (with_(shards={"rounds": 2.5}), "shards.rounds = 2.5: input should be a valid integer"),
        (with_(lvlm={"layout": "reamde"}), "lvlm.layout = 'reamde': input should be 'readme'"),
        (with_(catalog={"captions": []}), "catalog.captions = []: list should have at least 1 item"),
        (with_(reanswer={"references": 11}), "reanswer.references must not exceed retrieve.references"),
        (with_(score={"wrong_below": 0.95}), "score.wrong_below must not exceed score.right_above"),
        (with_(score={"judge": "loglik"}), "score.judge: loglik needs answer.gold_loglik: true"),
        (with_(pair={"mix": {"positive_only": 0.6, "no_reference": 0.6}}), "must not add up to more than 1"),
        (with_(pope={"methods": {"a b": {"model": "base", "references": 0}}}), "pope.methods.a b"),
        (with_(pope={"methods": {"x": {"model": "best", "references": 0}}}), "pope.methods.x.model = 'best'"),
        (with_(pope={"methods": {"neighbors": {"model": "base", "references": 0}}}), "this name is taken"),
        (with_(pope={"questions": {}}), "pope.questions must name at least one question file"),
        ({}, "catalog: is missing"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_expectation(values, message):
    with pytest.raises(SurfError) as error:
        config.parse(values)
    lines = [line for line in str(error.value).splitlines() if message in line]
    assert len(lines) == 1


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        config.parse(MINIMAL).answer.temperature = 1.0


@pytest.mark.parametrize("text", ["- a list", "catalog: [", ""])
def test_a_file_that_is_no_mapping(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SurfError, match=r"c\.yaml"):
        config.load(tmp_path / "c.yaml")


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)


@given(
    lvlm=st.builds(
        config.Lvlm,
        model=texts,
        layout=st.sampled_from(config.LAYOUTS),
        system_prompt=texts,
        pad_to_square=st.booleans(),
        batch_size=st.integers(1, 1000),
    ),
    answer=st.builds(config.Answer, temperature=st.floats(0, 2), max_new_tokens=st.integers(1, 500)),
    images=st.builds(config.Images, roots=st.lists(texts, min_size=1), max_bad_share=st.floats(0, 1)),
    embed=st.builds(config.Embed, pretrained=st.none() | texts.filter(lambda text: text != "null")),
)
def test_flags_and_back(lvlm, answer, images, embed):
    sections = {"lvlm": lvlm, "answer": answer, "images": images, "embed": embed}
    argv = shlex.split(cli.flags(**sections)) + shlex.split(cli.knobs(**sections))
    args = cli.parse(argv, prog="x", about="", sections=list(sections))
    assert {name: getattr(args, name) for name in sections} == sections


def test_knobs_are_not_among_the_flags_that_rerun_a_stage():
    lvlm = config.Lvlm(batch_size=7)
    assert "batch_size" not in cli.flags(lvlm=lvlm) and "--lvlm.batch_size=7" in cli.knobs(lvlm=lvlm)
    assert "--lvlm.model" in cli.flags(lvlm=lvlm) and "--lvlm.model" not in cli.knobs(lvlm=lvlm)


def test_every_key_says_what_it_is_for():
    for name, section in config.SECTIONS.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key} has no description"


def test_command_line_refuses_a_wrong_value():
    with pytest.raises(SurfError, match=r"answer\.temperature = 'hot'"):
        cli.parse(["--answer.temperature", "hot"], prog="x", about="", sections=["answer"])


def test_paper_config_holds_the_originals_settings():
    cfg = config.parse(yaml.safe_load((ROOT / "configs/llava-1.5-7b.yaml").read_text()))
    tune = cfg.finetune
    assert (tune.epochs, tune.learning_rate, tune.warmup_ratio, tune.weight_decay) == (2, 1e-5, 0.03, 0)
    assert tune.processes * tune.batch_size * tune.accumulation == 128
    assert (tune.max_tokens, tune.zero_stage, cfg.pair.samples, cfg.retrieve.references) == (4096, 3, 2000, 10)
    assert (cfg.embed.model, cfg.embed.pretrained) == ("ViT-L-14-quickgelu", "openai")
