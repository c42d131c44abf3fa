"""The controlled experiment: its cells are valid configs, its tables say what the answers say, its stages start warm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surf import config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import experiment  # noqa: E402
import experiment_tables as tables  # noqa: E402


@pytest.mark.parametrize("scale", [experiment.Scale(), experiment.TINY])
def test_every_cell_is_a_config(scale: experiment.Scale, tmp_path: Path) -> None:
    cells = experiment.cells_of(scale)
    assert len(cells) == len({cell.name for cell in cells}) == (len(scale.shares) + 1) * len(scale.seeds)
    for cell in cells:
        made = experiment.config(cell, scale, tmp_path, tmp_path, [])
        parsed = config.parse(json.loads(json.dumps(made)), "config.yaml")
        assert {"zero-shot", "vanilla-rag", "surf"} <= parsed.evaluate.all_methods().keys()
        assert ("surf@k4" in parsed.evaluate.all_methods()) == (cell.share == 0.5 and cell.labels == "answer")


def test_cells_are_shared_out_over_gpus() -> None:
    cells = [cell for cell in experiment.cells_of(experiment.Scale()) if cell.seed == 0]
    found = experiment.placed(cells, ["0", "1"], 32)
    of_main = found[tables.Cell(0.5, 0)][0]
    assert [gpu for cell, (gpu, _) in found.items() if gpu == of_main] == [of_main]  # it has as much to do as all others
    assert len({gpu for gpu, _ in found.values()}) == 2 and all(cores >= 1 for _, cores in found.values())


def made_up(seed: int, share: float, right: dict[str, tuple[float, float]]) -> tables.Answers:
    """Answers on 200 images, two questions each; methods are right with one chance where references help, else another."""
    random = np.random.default_rng(seed)
    images = [f"{number // 2}.jpg" for number in range(400)]
    misled = np.arange(400) // 2 < 200 * share
    drawn = {name: random.random(400) < np.where(misled, bad, good) for name, (good, bad) in right.items()}
    return tables.Answers(tables.Cell(share, seed), [str(n) for n in range(400)], images, misled, ~misled, drawn)


def test_tables_say_what_the_answers_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same after the answers were written in two turns, as they are when seeds run one after the other."""
    chances = {"zero-shot": (0.6, 0.6), "vanilla-rag": (0.9, 0.2), "surf": (0.95, 0.6)}
    answers = {one.cell: one for seed in (0, 1) for one in [made_up(seed, 0.5, chances)]}
    monkeypatch.setattr(tables, "read", lambda cell, work: answers.get(cell))
    for cell in answers:
        tables.keep([cell], tmp_path, tmp_path)
    tables.write(tmp_path)
    rows = list(tables.measure(list(answers.values())))
    text = (tmp_path / "tables.md").read_text()
    assert text == tables.markdown(rows)
    assert "surf against zero-shot: above, intervals apart" in text and "2 seeds" in text
    look = tables.Lookup(rows)
    both = np.concatenate([one.right["surf"] * 1.0 - one.right["vanilla-rag"] for one in answers.values()])
    found = look.estimate("answer", 0.5, "all", "surf", "vanilla-rag")
    assert found is not None and found.value == pytest.approx(both.mean()) and (found.low or 0) > 0
    p = look.rows["answer", 0.5, "all", "surf", "vanilla-rag"]["p"]
    assert p < 0.001 < look.rows["answer", 0.5, "misleads", "surf", "zero-shot"]["p"]


def test_no_answers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(tables.SurfError, match=r"experiment\.py"):
        tables.write(tmp_path)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An environment in which bash starts stages from a warm process, which loads nothing here."""
    folder = tmp_path_factory.mktemp("warm")
    path, functions = folder / "socket", folder / "functions.sh"
    functions.write_text(experiment.warm.shell_functions(path))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import warm; warm.MODULES = (); warm.serve({str(path)!r})"
    server = subprocess.Popen([sys.executable, "-c", code], env=experiment.env())
    while not path.exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield {**experiment.env(), "BASH_ENV": str(functions)}
    server.terminate()
    server.wait()


def bash(command: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_a_stage_started_warm_does_what_it_does_cold(warm: dict[str, str], tmp_path: Path) -> None:
    """Also by a shell that ends at the first error, with an exit code and errors of its own."""
    cold = {name: value for name, value in warm.items() if name != "BASH_ENV"}
    cold["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{cold['PATH']}"
    for command in ("python -m surf.describe keys", "set -euo pipefail; python -m surf.merge --out x 2>&1; echo unreached"):
        first, second = bash(command, warm, tmp_path), bash(command, cold, tmp_path)
        said = [text.stdout.partition("begins on")[2].partition("\n")[2] or text.stdout for text in (first, second)]
        assert said[0] == said[1] and said[0] and "unreached" not in said[0]
        assert first.returncode == second.returncode
    assert bash("python -c 'print(1 + 1)'", warm, tmp_path).stdout == "2\n"  # no stage: runs as ever


def test_a_stage_that_is_told_to_stop_stops(warm: dict[str, str], tmp_path: Path) -> None:
    """Told as a process group is, like Snakemake's jobs; its stream is closed when the stage itself has ended."""
    os.mkfifo(tmp_path / "endless")
    command = (
        f"python -m surf.split --split.conversations='{json.dumps([str(tmp_path / 'endless')])}' --part part-00000-of-00001"
    )
    command += " --out out.parquet --quarantine bad.parquet"
    with subprocess.Popen(
        ["bash", "-c", command], env=warm, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as shell:
        assert shell.stderr is not None
        assert "begins on" in shell.stderr.readline()
        os.killpg(shell.pid, signal.SIGTERM)
        assert "stopped by SIGTERM" in shell.communicate(timeout=60)[1]
