"""The configuration: what is refused and how, flags and back, the schema that editors use."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from surf import cli, config, describe, prompts
from surf.errors import SurfError
from surf.methods import Method

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "catalog": {"captions": ["c.json"]},
    "split": {"conversations": ["s.json"]},
    "evaluate": {"tasks": {"pope": {"kind": "pope", "files": {"random": "p.json"}}}},
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


def test_the_documentation_names_the_words_that_a_key_allows():
    text = describe.keys()
    assert "One of `transformers`, `vllm`. |" in text and "Any of `tensorboard`, `wandb`, `mlflow`. |" in text
    assert "judges relevant. Or the word `judged`. |" in text
    assert "## demo\n" in text and "| `scale`" in text


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
        (with_(reanswer={"right_share": 0.0}), "pair.harmed: needs reanswer.right_share"),
        (
            with_(reanswer={"right_share": 0.0}, pair={"harmed": 0.0}, variants={"x": {"pair": {"harmed": 0.5}}}),
            "variants.x.pair.harmed: needs reanswer.right_share",
        ),
        (with_(evaluate={"methods": {"a b": {"model": "base"}}}), "evaluate.methods.a b"),
        (with_(evaluate={"methods": {"x": {"model": "best"}}}), "evaluate.methods.x.model = 'best'"),
        (with_(evaluate={"methods": {"image-blind": {"model": "base"}}}), "this name is taken"),
        (with_(evaluate={"methods": {"chance": {"model": "base"}}}), "this name is taken"),
        (with_(evaluate={"tasks": {"x": {"kind": "pope", "files": {"mean": "f"}}}}), "files.mean: this name is taken"),
        (with_(evaluate={"methods": {"x": {"model": "base", "references": 11}}}), "must not exceed retrieve.references"),
        (with_(evaluate={"methods": {"x": {"model": "base", "gate": 0.5}}}), "evaluate.methods.x: gate without references"),
        (
            with_(evaluate={"methods": {"x": {"model": "base", "references": 1, "source": "random", "keep": 0.5}}}),
            "choose among retrieved references, not random ones",
        ),
        (with_(evaluate={"tasks": {}}), "evaluate.tasks must name at least one task"),
        (with_(evaluate={"tasks": {"x": {"kind": "pope", "files": {"all": "f"}}}}), "this name is taken"),
        (with_(evaluate={"sweeps": {"of": ["zero-shot"]}}), "'zero-shot' is no method with references"),
        (
            with_(
                evaluate={
                    "methods": {"r": {"model": "base", "references": 1, "rerank": "caption"}},
                    "sweeps": {"of": ["r"], "source": ["random"]},
                }
            ),
            "evaluate.sweeps: r@random: rerank and keep choose",
        ),
        (with_(variants={"tuned": {}}), "variants.tuned: this name is taken"),
        (with_(variants={"x": {"pair": {"smaples": 1}}}), "variants.x.pair.smaples = 1: there is no such key"),
        (with_(variants={"x": {"finetune": {"nodes": 2}}}), "variants.x.finetune.nodes"),
        ({}, "catalog: is missing"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_expectation(values, message):
    with pytest.raises(SurfError) as error:
        config.parse(values)
    lines = [line for line in str(error.value).splitlines() if message in line]
    assert len(lines) == 1


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("answer: {temperature: 0.5}\nsplit: {conversations: [s]}\nanswer: {max_new_tokens: 5}\n")
    with pytest.raises(SurfError, match=r"the key 'answer' stands twice[\s\S]*line 3"):
        config.load(path)


def test_a_variant_changes_single_keys_of_a_section_within_its_section():
    lora = {"rank": 8, "alpha": 16}
    cfg = config.parse(with_(finetune={"lora": lora}, variants={"x": {"finetune": {"lora": {"rank": 4}}}}))
    made = cfg.variant("x")[1].lora
    assert (made.rank, made.alpha) == (4, 16)
    own = {"pair": {"mix": {"positive_only": 0.3}}, "variants": {"x": {"pair": {"mix": {"negative_only": 0.8}}}}}
    assert config.parse(with_(**own)).variant("x")[0].mix == config.Mix(negative_only=0.8)  # a mix is one thing
    with pytest.raises(SurfError) as error:
        config.parse(with_(variants={"x": {"pair": {"ordr": 1}, "finetune": {"lerning_rate": 1}}}))
    assert "variants.x.pair.ordr = 1" in str(error.value) and "variants.x.finetune.lerning_rate = 1" in str(error.value)


def test_a_variant_is_the_main_fine_tune_but_for_its_keys():
    values = with_(pair={"samples": 7}, variants={"x": {"pair": {"mix": {"no_reference": 1}}, "finetune": {"epochs": 1}}})
    pair, finetune = config.parse(values).variant("x")
    assert (pair.samples, pair.mix.no_reference, finetune.epochs, finetune.learning_rate) == (7, 1, 1, 1e-5)


def test_sweeps_make_methods_that_differ_in_one_key():
    methods = {
        "zero-shot": {"model": "base"},
        "rag": {"model": "base", "references": 2},
        "filter": {"model": "base", "references": 2, "keep": 0.5},
        "surf": {"model": "tuned", "references": 2},
        "wild": {"model": "tuned", "references": 2, "source": "random"},
    }
    sweeps = {"k": [1, 2], "source": ["random", "oracle"], "order": ["reversed"], "show": ["image"]}
    found = config.parse(with_(evaluate={"methods": methods, "sweeps": sweeps})).evaluate.all_methods()
    of_rag = {"rag@k1", "rag@random", "rag@oracle", "rag@reversed", "rag@image"}
    of_surf = {"surf@k1", "surf@oracle", "surf@reversed", "surf@image"}  # surf@random is there already: wild
    assert set(found) == set(methods) | of_rag | of_surf
    assert found["rag@k1"] == Method(model="base", references=1)
    assert found["surf@oracle"] == Method(model="tuned", references=2, source="oracle")
    one = config.parse(with_(evaluate={"methods": methods, "sweeps": {"of": ["filter"], "order": ["shuffled"]}}))
    assert set(one.evaluate.all_methods()) == set(methods) | {"filter@shuffled"}


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
        layout=st.sampled_from(prompts.LAYOUTS),
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
