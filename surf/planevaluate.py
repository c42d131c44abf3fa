"""The evaluation's part of the plan: its jobs, what each of them asks, and how fast finished ones were.

A model asks no prompt of a task twice (`surf.once`), so the work of `evaluate_answer` is a number of different prompts. It is
what a job asks at most: methods may choose equal references for a question, and `keep` and `gate` may show none.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from surf import rates, telemetry
from surf.config import Config
from surf.methods import Method
from surf.schedule import Stage
from surf.tasks import Question


class Task(NamedTuple):
    """What the files of an evaluation task hold. Images that the corpus lacks are `fresh`: retrieval embeds them."""

    questions: int
    prompts: int  # different pairs of image and question
    images: int
    fresh: int
    text_bytes: int


def task(asked: Sequence[Question], corpus: Collection[str]) -> Task:
    """Its size; `corpus`: the names of all corpus images."""
    images = {one["image"] for one in asked}
    return Task(
        questions=len(asked),
        prompts=len({(one["image"], one["question"]) for one in asked}),
        images=len(images),
        fresh=sum(name not in corpus for name in images),
        text_bytes=sum(len(text) for one in asked for text in (one["image"], one["question"], *one["answers"])),
    )


def stages(cfg: Config, tasks: Mapping[str, Task]) -> list[Stage]:
    """All jobs from question files to pages; they wait for stages of the rest of the plan by their names."""
    found, answers = [], []
    models = by_model(cfg)
    for name, size in tasks.items():
        questions, neighbors = f"evaluate_questions {name}", f"evaluate_retrieve {name}"
        found.append(Stage(questions, size.questions, 1, 0, rates=(("merge", 0),), line="evaluate_questions"))
        if any(map(retrieves, cfg.evaluate.all_methods().values())):
            inputs, key = ((questions, False), ("build_index", False)), ((f"evaluate_retrieve/{name}", size.images),)
            found.append(Stage(neighbors, size.images, 1, 1, inputs, key, size.fresh, line="evaluate_retrieve"))
        for by in needed(cfg.evaluate.all_methods().values()):
            stage, rows = f"evaluate_candidates {by} {name}", size.prompts * cfg.retrieve.references
            key = ((f"evaluate_candidates/{by}/{name}", rows),)
            found.append(Stage(stage, rows, 1, 1, ((neighbors, False),), key, line=f"evaluate_candidates {by}"))
        for model, methods in models.items():
            after = (
                (questions, False),
                *[(neighbors, False)] * any(map(retrieves, methods.values())),
                *[(f"evaluate_candidates {by} {name}", False) for by in needed(methods.values())],
                *[(finetune(model), False)] * (model != "base"),
            )
            work = tuple((answer_key(name, count), times * size.prompts) for count, times in asked(methods.values()).items())
            stage, rows = f"evaluate_answer {model} {name}", sum(rows for _, rows in work)
            found.append(Stage(stage, rows, 1, 1, after, work, line=f"evaluate_answer {model}"))
            answers.append((name, (stage, False)))
    pope = tuple(stage for name, stage in answers if cfg.evaluate.tasks[name].kind == "pope")
    found += [Stage("pope", 0, 1, 0, pope)] * bool(pope)
    found.append(Stage("evidence", 0, 1, 0, tuple(stage for _, stage in answers)))
    found.append(Stage("report", 0, 1, 0, (("pope", False),) if pope else (("finetune", False),)))
    return found


def disk(cfg: Config, tasks: Mapping[str, Task]) -> dict[str, int]:
    """Bytes that each stage will have written, at most."""
    room = {}
    for name, size in tasks.items():
        room[f"evaluate_questions {name}"] = size.text_bytes + size.questions * 64
        room[f"evaluate_retrieve {name}"] = size.images * cfg.retrieve.references * 24
        for by in needed(cfg.evaluate.all_methods().values()):
            room[f"evaluate_candidates {by} {name}"] = size.questions * cfg.retrieve.references * 48
        response = 128 + 5 * cfg.evaluate.tasks[name].max_new_tokens  # bytes: ids, and five letters a token
        for model, methods in by_model(cfg).items():
            room[f"evaluate_answer {model} {name}"] = len(methods) * (size.text_bytes + size.questions * response)
    return room


def finished(cfg: Config, source: str, folders: Mapping[str, Iterable[str]] | None = None) -> dict[str, rates.Stage]:
    """The rates of finished parts, from their telemetry, by key.

    Args:
        folders: where each task lies below `evaluate/`; by default under its name.
    """
    found = {}
    methods = cfg.evaluate.all_methods()
    for name, places in (folders or {name: [name] for name in cfg.evaluate.tasks}).items():
        here = [Path(cfg.results, "evaluate", place) for place in places]
        for by in ("caption", "relevance", "gold"):
            figures = [one for folder in here for one in telemetry.figures(folder / "candidates", by)]
            found[f"evaluate_candidates/{by}/{name}"] = rates.of_figures(figures, source)
        by_count: dict[int, list[dict[str, float]]] = {}
        for folder in here:
            for method, one in methods.items():
                # the others ask prompts with fewer references too, or shorter ones
                if one.gate is None and one.keep is None and one.show == "both":
                    by_count.setdefault(one.references, []).extend(telemetry.figures(folder / "answers" / one.model, method))
        for count, figures in by_count.items():
            most = max((one["rows"] for one in figures), default=0)  # methods that had little left to ask say little
            figures = [one for one in figures if one["rows"] >= most / 4]
            found[answer_key(name, count)] = rates.of_figures(figures, source)
    return found


# --- what methods need ------------------------------------------------------------------------------------------------


def by_model(cfg: Config) -> dict[str, dict[str, Method]]:
    """The methods of each model: one job for a task answers by all of them."""
    found: dict[str, dict[str, Method]] = {}
    for name, method in cfg.evaluate.all_methods().items():
        found.setdefault(method.model, {})[name] = method
    return found


def asked(methods: Iterable[Method]) -> Counter[int]:
    """How often one model is asked each question of a task: by number of references in the prompt."""
    every = list(methods)
    counts = Counter(one.references for one in {one.model_copy(update={"gate": None}) for one in every if one.references})
    gated = any(one.gate is not None for one in every)
    # a gate asks without references, and then how likely that answer is: at most as long again
    counts[0] = int(gated or any(not one.references for one in every)) + gated
    return +counts


def retrieves(method: Method) -> bool:
    """Does it choose among the neighbours of the questions' images?"""
    return bool(method.references) and method.source != "random"


def needed(methods: Iterable[Method]) -> list[str]:
    """Scores of candidates that some of the methods choose by."""
    return list(dict.fromkeys(by for method in methods for by in method.needs()))


def finetune(model: str) -> str:
    """The stage that makes a model."""
    return "finetune" if model == "tuned" else f"variant_finetune {model}"


def answer_key(task: str, references: int) -> str:
    """Key of a rate: a prompt of this task with so many references."""
    return f"evaluate_answer/{task}/{references}"
