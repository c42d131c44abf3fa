"""The config's section `evaluate`: tasks, methods, and sweeps that make methods from methods."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from surf.sections import WORKFLOW, Name, Positive, Section, Share, Word


class Method(Section):
    """One way to answer the questions of an evaluation. From the retrieved candidates to the prompt: source, rerank, keep,
    references, order, show; at last the gate."""

    model: Word = Field(description="base: lvlm.model. tuned: the model that finetune wrote. Or the name of a variant.")
    references: int = Field(default=0, ge=0, le=100, description="References in the prompt, at most; 0 for none.")
    source: Literal["retrieved", "random", "oracle", "adversarial"] = Field(
        default="retrieved",
        description="Where references come from: the retrieved ones by similarity, any of the corpus, or the retrieved ones"
        " under which the base model finds the gold answer most (oracle) or least (adversarial) likely.",
    )
    rerank: Literal["caption", "relevance"] | None = Field(
        default=None,
        description="A second score that orders the retrieved references: cosine of query image and caption (CLIP), or the base"
        " model's own yes to the question whether a reference is relevant.",
    )
    keep: Annotated[float, Field(ge=-1, le=1)] | Literal["judged"] | None = Field(
        default=None, description="Only references with at least this cosine, or those that the base model judges relevant."
    )
    order: Literal["similarity", "reversed", "shuffled"] = Field(
        default="similarity", description="similarity: as chosen, the best first. reversed: the best last."
    )
    show: Literal["both", "caption", "image"] = Field(default="both", description="What is shown of a reference.")
    say: str = Field(
        default="",
        description="A line behind each question that has references: is it enough to tell the model to leave out wrong ones?",
    )
    gate: Share | None = Field(
        default=None,
        description="References are shown only where the model's answer without them has a lower probability (geometric mean"
        " over its tokens).",
    )

    def plain(self) -> bool:
        """Are the most similar references, if any, shown as they are?"""
        return self == Method(model=self.model, references=self.references)

    def needs(self) -> list[str]:
        """The scores of candidates that it chooses by, beyond similarity: of caption, relevance and gold."""
        found = {
            "caption": self.rerank == "caption",
            "relevance": self.rerank == "relevance" or self.keep == "judged",
            "gold": self.source in ("oracle", "adversarial"),
        }
        return [name for name, needed in found.items() if needed]

    @model_validator(mode="after")
    def _makes_sense(self) -> "Method":
        choosing = [key for key in ("rerank", "keep", "gate") if getattr(self, key) is not None]
        known = type(self).model_fields
        changed = [key for key in ("source", "order", "show", "say") if getattr(self, key) != known[key].default]
        if not self.references and choosing + changed:
            raise ValueError(f"{', '.join(choosing + changed)} without references")
        if self.source != "retrieved" and set(choosing) & {"rerank", "keep"}:
            raise ValueError(f"rerank and keep choose among retrieved references, not {self.source} ones")
        return self


class EvaluationTask(Section):
    """One task: questions with known answers, in one or several splits."""

    kind: Literal["pope", "vqa", "choice", "caption", "classify"] = Field(
        description="Format of the files, and how answers score."
    )
    files: dict[Word, Name] = Field(min_length=1, description="The file of each split.")
    suffix: str | None = Field(default=None, description="Appended to every question; null: what is usual for the kind.")
    max_new_tokens: Positive = Field(default=16, description="Length limit of an answer (tokens).")


class Sweeps(Section):
    """Further methods made from others: one key of the method is changed at a time. `surf@k4` is surf with four references,
    `surf@random` is surf with random references. Empty lists make none."""

    of: list[Word] = Field(default=[], description="Methods to vary; empty: all that retrieve by similarity alone.")
    k: list[Positive] = Field(default=[], description="Numbers of references.")
    source: list[Literal["random", "oracle", "adversarial"]] = Field(default=[], description="Sources.")
    order: list[Literal["reversed", "shuffled"]] = Field(default=[], description="Orders: how much the position matters.")
    show: list[Literal["caption", "image"]] = Field(default=[], description="What is shown.")


class Evaluate(Section):
    """Evaluation: every method on every task, in one table."""

    version: ClassVar[int] = 2

    tasks: dict[Word, EvaluationTask] = Field(json_schema_extra=WORKFLOW, default={}, description="Tasks by name.")
    methods: dict[Word, Method] = Field(
        json_schema_extra=WORKFLOW,
        default={
            "zero-shot": Method(model="base"),
            "vanilla-rag": Method(model="base", references=2),
            "surf": Method(model="tuned", references=2),
        },
        min_length=1,
        description="Methods by name.",
    )
    sweeps: Sweeps = Field(json_schema_extra=WORKFLOW, default=Sweeps(), description="Further methods made from these.")
    resamples: Positive = Field(
        json_schema_extra=WORKFLOW, default=2000, description="Bootstrap resamples of the 95 % intervals."
    )
    examples: int = Field(
        json_schema_extra=WORKFLOW,
        default=8,
        ge=0,
        description="Rescued and harmed questions shown with their images, of each kind.",
    )

    def all_methods(self) -> dict[str, Method]:
        """The methods by name, those of the sweeps included; of two that do the same the first is kept."""
        made = dict(self.methods)
        retrieving = [name for name, one in made.items() if one.plain() and one.references]
        for name in self.sweeps.of or retrieving:
            base = self.methods[name]
            changes = [(f"k{k}", {"references": k}) for k in self.sweeps.k]
            changes += [(value, {key: value}) for key in ("source", "order", "show") for value in getattr(self.sweeps, key)]
            for word, change in changes:
                try:
                    varied = Method.model_validate({**base.model_dump(), **change})
                except ValidationError as error:
                    what = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"evaluate.sweeps: {name}@{word}: {what}") from None
                if varied not in made.values():
                    made[f"{name}@{word}"] = varied
        return made
