"""The lines of `surf.check` about leakage: evaluation images among the data that teach, see `surf.leaks`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from surf import config, leaks
from surf.images import Images
from surf.verdicts import Report

_SHOWN = 3  # names in a line


def names(report: Report, cfg: config.Config, asked: Sequence[str], corpus: Sequence[str], rounds: Sequence[str]) -> None:
    """By the photographs' identity, and by what is known of neighbours already; all arguments are image names."""
    if not asked:
        return
    _leak(report, asked, "are in the corpus (retrieve leaves them out)", leaks.by_identity(asked, corpus))
    _leak(report, asked, "are in the rounds (they may be trained on)", leaks.by_identity(asked, rounds))
    parts = [path for task in cfg.evaluate.tasks if (path := Path(cfg.results, "evaluate", task, "neighbors.parquet")).exists()]
    read = report.attempt("leakage", lambda: leaks.by_neighbors(parts, cfg.retrieve.max_similarity)) if parts else None
    if read:
        near, most = read
        limit = f"retrieve.max_similarity = {cfg.retrieve.max_similarity}"
        if near:
            text = ", ".join(f"{name} ({value:.4f})" for name, value in near[:_SHOWN])
            report.warning("leakage", f"{len(near)} evaluation images have a neighbour at or above {limit}: {text}")
        else:
            report.ok("leakage", f"no reference of an evaluation image reaches {limit}; the most similar has {most:.4f}")


def looks(
    report: Report,
    cfg: config.Config,
    hashes: Mapping[str, int],
    asked: Sequence[str],
    corpus: Sequence[str],
    rounds: Sequence[str],
) -> None:
    """By their looks; `hashes` are those of all readable images, by name."""
    opened = Images(cfg.images.roots, cfg.images.max_pixels)
    mine = _only(hashes, asked)
    _leak(report, mine, "look like images of the corpus", leaks.by_looks(mine, _only(hashes, corpus), opened))
    _leak(report, mine, "look like images of the rounds", leaks.by_looks(mine, _only(hashes, rounds), opened))


def _leak(report: Report, asked: Sequence[str] | dict[str, int], what: str, pairs: Sequence[leaks.Pair]) -> None:
    text = f"{len(pairs):,} of {len(asked):,} evaluation images {what}"
    if pairs:
        examples = ", ".join(f"{one.evaluation} = {one.other}" for one in pairs[:_SHOWN])
        report.warning("leakage", f"{text}: {examples}{', …' if len(pairs) > _SHOWN else ''}")
    else:
        report.ok("leakage", text)


def _only(hashes: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    return {name: hashes[name] for name in dict.fromkeys(names) if name in hashes}
