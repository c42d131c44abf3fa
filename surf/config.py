"""The one configuration: a frozen, typed model of config.yaml.

A section belongs to the stage of the same name; `version` is bumped by hand when a change of the stage's code changes its
results, so that Snakemake reruns it. `surf.describe` makes the documentation of all keys from here.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from surf import yamlfile
from surf.errors import SurfError
from surf.methods import Evaluate
from surf.modelsettings import Embed as Embed  # the name of a section stands here, wherever it is made
from surf.modelsettings import Lvlm as Lvlm
from surf.sections import KNOB, WORKFLOW, Name, Positive, Section, Share, Word
from surf.training.settings import Finetune as Finetune
from surf.training.settings import Lora as Lora


class Images(Section):
    """Where image files are found. An image's name in the data is its path relative to one of the roots."""

    roots: list[Name] = Field(
        json_schema_extra=KNOB,
        default=["."],
        description="Folders, or Parquet files with columns image (string) and bytes (binary), searched in this order.",
    )
    max_pixels: Positive = Field(
        json_schema_extra=KNOB, default=100_000_000, description="Larger images, and very long strips, are refused (pixels)."
    )
    max_bad_share: Share = Field(
        json_schema_extra=KNOB,
        default=0.01,
        description="Share of unreadable images or rows in one shard (of all conversations, for split) above which a stage"
        " stops.",
    )


class Shards(Section):
    """Number of shards. One shard is one job; aim at 20 to 60 minutes each. No result depends on these numbers."""

    corpus: Positive = Field(json_schema_extra=WORKFLOW, default=1, description="Shards of catalog and embeddings.")
    rounds: Positive = Field(json_schema_extra=WORKFLOW, default=1, description="Shards of rounds and all that follows.")


class Catalog(Section):
    """The retrieval corpus: image-caption pairs."""

    captions: list[Name] = Field(
        min_length=1,
        description="ShareGPT4V-style JSON files: a list of {image, caption} or {image, conversations}.",
    )
    max_caption_chars: Positive = Field(
        default=20_000, description="Longer captions are cut at a word boundary; the cut is counted in the log."
    )


class BuildIndex(Section):
    """The FAISS index over the embeddings (inner product of unit vectors = cosine)."""

    factory: Name = Field(
        default="auto",
        description="FAISS factory string; Flat is exact. auto: Flat to 16 GiB, IVF,SQ8 to 128 GiB, then IVF,PQ.",
    )
    probes: Positive = Field(default=64, description="Inverted lists searched for a query; only IVF has any.")


class Split(Section):
    """Single question-answer rounds out of SFT conversations."""

    version: ClassVar[int] = 2

    conversations: list[Name] = Field(min_length=1, description="LLaVA SFT JSON files.")
    tasks: list[Literal["choice", "short", "box", "caption", "open"]] = Field(
        default=["choice", "short", "box", "caption", "open"], description="Rounds of other tasks are left out."
    )
    limit: Positive | None = Field(
        default=None, description="Keep at most this many rounds (whole images, chosen by hash); null keeps all."
    )


class Answer(Section):
    """First answers of the frozen model, without references."""

    temperature: float = Field(default=0.0, ge=0, description="0 is greedy. Above 0 each row has a seed of its own.")
    max_new_tokens: Positive = Field(default=100, description="Length limit of an answer (tokens).")
    gold_loglik: bool = Field(
        default=False, description="Also compute the mean log-likelihood of the gold answer (one more forward pass)."
    )
    flush_rows: Positive = Field(json_schema_extra=KNOB, default=4096, description="Rows between two saves of unfinished work.")


class Retrieve(Section):
    """The most similar corpus images of every query image."""

    references: Positive = Field(default=10, le=100, description="Neighbours kept for an image.")
    max_similarity: Share = Field(
        default=0.98, description="Neighbours at or above this cosine are taken for copies of the query and left out."
    )


class Reanswer(Section):
    """Answers to the wrongly answered rounds, and to some others, once with each reference, in order of similarity."""

    version: ClassVar[int] = 2

    references: Positive = Field(default=10, le=100, description="References tried for a round, at most.")
    stop_early: bool = Field(
        default=True, description="Leave a round as soon as one positive and one negative reference are found."
    )
    right_share: Share = Field(
        default=0.2,
        description="Of the rightly answered rounds this share, drawn by the seed, is asked again as well, for pair.harmed."
        " The paper's method: 0.",
    )


class Score(Section):
    """The judges: what counts as right, and how much better counts as better."""

    version: ClassVar[int] = 2
    judge: Literal["answer", "loglik"] = Field(
        default="answer",
        description="answer: judge texts by task. loglik: gain in log-likelihood of the gold answer.",
    )
    iou: Share = Field(default=0.5, description="A box is right at this intersection over union.")
    bertscore_model: Name = Field(default="google-bert/bert-base-uncased", description="Encoder of BERTScore, or a path.")
    bertscore_layer: Positive = Field(default=9, description="Hidden layer used (9 for bert-base-uncased).")
    wrong_below: float = Field(default=0.7, ge=-1, le=1, description="Captions and open answers: wrong below this F1.")
    right_above: float = Field(default=0.9, ge=-1, le=1, description="Captions and open answers: right from this F1.")
    margin: float = Field(default=0.01, ge=0, description="Gain (loss) of F1 that makes a reference positive (negative).")
    loglik_margin: float = Field(default=0.1, ge=0, description="The same for judge loglik (nats a token).")

    @model_validator(mode="after")
    def _ordered(self) -> "Score":
        if self.wrong_below > self.right_above:
            raise ValueError("score.wrong_below must not exceed score.right_above")
        return self


class Mix(Section):
    """Shares of further kinds of training samples; the rest are pairs of one positive and one negative."""

    positive_only: Share = Field(default=0.0, description="One helpful reference.")
    negative_only: Share = Field(default=0.0, description="One misleading reference.")
    no_reference: Share = Field(default=0.0, description="No reference.")

    @model_validator(mode="after")
    def _at_most_all(self) -> "Mix":
        if self.positive_only + self.negative_only + self.no_reference > 1:
            raise ValueError("the shares of pair.mix must not add up to more than 1")
        return self


class Pair(Section):
    """Training samples: the most similar positive and the most similar negative reference of a round."""

    version: ClassVar[int] = 2

    samples: Positive = Field(default=2000, description="Training samples, at most (the original's default).")
    order: Literal["shuffled", "positive_first"] = Field(
        default="shuffled", description="positive_first is the original's fixed order: it teaches to trust number one."
    )
    negatives: Literal["hard", "random"] = Field(
        default="hard", description="random: a corpus image drawn by the seed takes the place of the hard negative."
    )
    rounds: Literal["any", "both"] = Field(
        default="any",
        description="Rounds that samples of other kinds come from. both: only those with a positive and a negative, so that all"
        " mixes are made of the same questions.",
    )
    harmed: Share = Field(
        default=0.5,
        description="This share of the samples, of every kind, is made of rounds that are answered rightly without references."
        " Their negative makes the answer wrong. Needs reanswer.right_share. The paper's method: 0.",
    )
    mix: Mix = Field(default=Mix(), description="Shares of other kinds of samples.")


class Variant(Section):
    """A further fine-tune, as a control: keys of `pair` and `finetune` that differ from the main one."""

    pair: dict[str, Any] = Field(json_schema_extra=WORKFLOW, default={}, description="Keys of `pair` that differ.")
    finetune: dict[str, Any] = Field(
        json_schema_extra=WORKFLOW, default={}, description="Keys of `finetune` that differ; of `lora` its keys."
    )


class Report(Section):
    """The HTML page."""

    samples: int = Field(json_schema_extra=KNOB, default=12, ge=0, description="Sample pairs shown with their images.")


class Demo(Section):
    """The embedded example: a made-up world. Leave this section out when you bring your own data."""

    out: Name = Field(json_schema_extra=WORKFLOW, default="example", description="Folder for the world's images and questions.")
    scale: float = Field(default=1.0, gt=0, description="Size of the world.")


class Config(BaseModel):
    """The whole of config.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: Name = Field(default="results", description="Folder for everything that surf writes.")
    seed: int = Field(default=0, ge=0, description="Seeds of rows and samples derive from this number.")
    demo: Demo | None = Field(default=None, description="The embedded example; null with your own data.")
    images: Images = Images()
    shards: Shards = Shards()
    catalog: Catalog
    embed: Embed = Embed()
    build_index: BuildIndex = BuildIndex()
    split: Split
    lvlm: Lvlm = Lvlm()
    answer: Answer = Answer()
    retrieve: Retrieve = Retrieve()
    reanswer: Reanswer = Reanswer()
    score: Score = Score()
    pair: Pair = Pair()
    finetune: Finetune = Finetune()
    variants: dict[Word, Variant] = Field(default={}, description="Further fine-tunes: {name: {pair: …, finetune: …}}.")
    evaluate: Evaluate
    report: Report = Report()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.reanswer.references > self.retrieve.references:
            raise ValueError("reanswer.references must not exceed retrieve.references")
        if not self.evaluate.tasks:
            raise ValueError("evaluate.tasks must name at least one task")
        for name, task in self.evaluate.tasks.items():
            for split in {"all", "mean"} & task.files.keys():
                raise ValueError(f"evaluate.tasks.{name}.files.{split}: this name is taken, choose another")
        for name in self.evaluate.sweeps.of:
            if name not in self.evaluate.methods or not self.evaluate.methods[name].references:
                raise ValueError(f"evaluate.sweeps.of: {name!r} is no method with references")
        pairs = {"pair": self.pair}
        for name in self.variants:
            if name in ("base", "tuned"):
                raise ValueError(f"variants.{name}: this name is taken, choose another")
            pairs[f"variants.{name}.pair"], _ = self.variant(name)
        for name, method in self.evaluate.all_methods().items():
            if name in ("image-blind", "chance"):
                raise ValueError(f"evaluate.methods.{name}: this name is taken, choose another")
            if method.model not in ("base", "tuned", *self.variants):
                raise ValueError(
                    f"evaluate.methods.{name}.model = {method.model!r}: should be base, tuned or a name in variants"
                )
            if method.source != "random" and method.references > self.retrieve.references:
                raise ValueError(f"evaluate.methods.{name}.references must not exceed retrieve.references")
        for name, pair in pairs.items():
            if pair.harmed and not self.reanswer.right_share:
                raise ValueError(f"{name}.harmed: needs reanswer.right_share above 0: else only wrong rounds are asked again")
        if self.score.judge == "loglik" and not self.answer.gold_loglik:
            raise ValueError("score.judge: loglik needs answer.gold_loglik: true")
        return self

    def variant(self, name: str) -> tuple[Pair, Finetune]:
        """Sections `pair` and `finetune` of a variant.

        Raises:
            ValueError: a key or value that these sections do not take.
        """
        one = self.variants[name]
        if one.finetune.keys() & {"nodes"}:
            raise ValueError(f"variants.{name}.finetune.nodes: all fine-tunes run on finetune.nodes nodes")
        made: list[Any] = []
        wrong: list[str] = []
        for section, own, changes in (("pair", self.pair, one.pair), ("finetune", self.finetune, one.finetune)):
            try:
                values = {**own.model_dump(), **changes}
                if isinstance(lora := changes.get("lora"), dict):
                    values["lora"] = {**own.model_dump()["lora"], **lora}
                made.append(type(own).model_validate(values))
            except ValidationError as error:
                wrong += [f"variants.{name}.{section}.{line.strip()}" for line in explain(error).splitlines()]
        if wrong:
            raise ValueError("\n  ".join(wrong))
        return made[0], made[1]


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def parse(values: dict[str, Any], source: str = "config.yaml") -> Config:
    """Check `values` and freeze them.

    Raises:
        SurfError: with one line for every wrong key: the key, the value, what was expected.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise SurfError(explain(error), where=source, next=f"edit {source}; docs/config.md lists every key") from None


def load(path: str | Path) -> Config:
    """Read a YAML file; see `parse`."""
    values = yamlfile.read(path)
    if not isinstance(values, dict):
        raise SurfError("is no mapping of keys to values", where=str(path), expected="sections such as `embed:`")
    return parse(values, str(path))


def explain(error: ValidationError) -> str:
    """One line for each thing pydantic found: `answer.temperature = 'hot': input should be a valid number`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{key} = {_short(item['input'])}: there is no such key")
        elif item["type"] == "missing":
            lines.append(f"{key}: is missing")
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            lines.append(text if text.startswith(key.split(".")[0]) else f"{key}: {text}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{key} = {_short(item['input'])}: {message}")
    return "\n  ".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
