"""A small form of the embedded example in a folder of its own: its jobs, its saved rows, how it differs from another one."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from surf import store
from surf.errors import SurfError
from surf.schemas import KEYS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "faults.yaml"
SNAKEMAKE = ["--profile", "profiles/local", "--resources", "gpu=2", "--configfile", CONFIG]
LOOK_SECONDS = 0.2
# no results: what jobs say and remember, and the time that they took
ASIDE = ("logs/", "_telemetry", "_partial", "_checkpoints")


@dataclass(frozen=True)
class Job:
    """One job of the workflow: its rule, what it makes first, and its shell command."""

    rule: str
    output: str
    command: str


class Example:
    """A folder with a run of the example, and what was seen of its unfinished work."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self._rows: dict[Path, Counter] = {}  # saved rows of every piece
        self._looked_at: set[tuple[Path, int, int]] = set()  # files: path, inode, time
        self._next_look = 0.0
        self.half_written: list[str] = []  # files that had their name before they were whole

    def create(self, scale: float, shards: int = 2) -> "Example":
        """Links to the project, and a config file that makes the example small and saves often."""
        folder = self.folder
        folder.mkdir(parents=True)
        for name in ("Snakefile", "rules", "surf", "profiles", "config.yaml"):
            (folder / name).symlink_to(ROOT / name)
        config = yaml.safe_load((ROOT / "config.yaml").read_text())
        config["demo"]["scale"] = scale
        config["shards"] = {"corpus": shards, "rounds": shards}
        config["answer"]["flush_rows"] = 8
        config["lvlm"]["batch_size"] = 4
        config["embed"]["batch_size"] = 8
        config["images"]["max_bad_share"] = 0.6  # one image is missing already, and one more will be
        config["finetune"] |= {"save_steps": 1, "epochs": 1, "batch_size": 2}
        config["pair"]["samples"] = 64
        config["variants"], evaluate = {}, config["evaluate"]
        pope = evaluate["tasks"]["pope"]
        pope["files"] = {"random": pope["files"]["random"]}
        pope["suffix"] = " Answer with a single word."  # one line, as `jobs` reads commands
        evaluate["methods"] = {name: evaluate["methods"][name] for name in ("zero-shot", "vanilla-rag", "rerank-rag", "surf")}
        evaluate["sweeps"] = {}
        (folder / CONFIG).write_text(yaml.safe_dump(config))
        return self

    def jobs(self, *targets: str) -> list[Job]:
        """What a run would do, in an order that works: Snakemake's own dry run says it."""
        command = [sys.executable, "-m", "snakemake", *targets, "-n", "-p", "-F", "--configfile", CONFIG]
        text = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True).stdout
        found = []
        for block in re.split(r"^(?:local)?rule (?=\w+:$)", text, flags=re.M)[1:]:
            fields, _, rest = block.partition("\nShell command: ")
            if rest and not rest.startswith("None\n"):
                command = re.split(r"\n(?:\n|\[|Job stats)", rest)[0].strip()
                found.append(Job(fields.split(":")[0], re.search(r"output: ([^,\n]+)", fields)[1], command))
        return found

    def look(self) -> None:
        """Remember what unfinished work is saved now; a few times a second also look whether every new file is whole."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self._look_at_files()
        for path in self._files():
            if path.parts[-4] == "_partial" and path.suffix == ".parquet" and path not in self._rows:
                try:
                    table, keys = pq.read_table(path, partitioning=None), KEYS[store.footer(path)[1]["dataset"]]
                except (OSError, pa.ArrowException, SurfError):  # gone by now, or truncated on purpose
                    continue
                self._rows[path] = Counter(map(str, table.select(keys).to_pylist()))

    def _look_at_files(self) -> None:
        for path in self._files():
            if path.suffix not in (".parquet", ".json") or "_checkpoints" in path.parts:
                continue
            try:
                with open(path, "rb") as file:
                    about, content = os.fstat(file.fileno()), file.read()
            except OSError:  # gone by now
                continue
            if (one := (path, about.st_ino, about.st_mtime_ns)) not in self._looked_at:
                self._looked_at.add(one)
                try:
                    json.loads(content) if path.suffix == ".json" else pq.read_table(pa.BufferReader(content))
                except (ValueError, pa.ArrowException):
                    self.half_written.append(str(path.relative_to(self.results)))

    def _files(self) -> list[Path]:
        """All files that have their names; folders may vanish meanwhile, which `Path.rglob` does not bear."""
        found = ((Path(folder), names) for folder, _, names in os.walk(self.results))
        return [folder / name for folder, names in found for name in names if not name.startswith(".")]

    def looked_at(self) -> int:
        """How many files were found whole, or not, soon after they had got their name."""
        return len(self._looked_at)

    def truncate(self, path: Path, size: int) -> None:
        """Tear a file on purpose."""
        os.truncate(path, size)
        about = path.stat()
        self._looked_at.add((path, about.st_ino, about.st_mtime_ns))

    def saved(self, part: Path) -> set[str]:
        """Rounds of a part that are saved as unfinished work."""
        pieces = (part.parent / "_partial" / part.stem).rglob("[!.]*.parquet")
        return {row for path in pieces for row in pq.read_table(path, partitioning=None)["round_id"].to_pylist()}

    def made_twice(self) -> int:
        """Rows that were saved and then made again."""
        total: Counter = Counter()
        for path, rows in self._rows.items():
            total.update((path.parent, key) for key in rows.elements())
        return total.total() - len(total)

    def kept(self) -> int:
        """Rows that later attempts found saved, by their logs."""
        logs = "".join(path.read_text(errors="replace") for path in self.results.glob("logs/**/*.log"))
        return sum(map(int, re.findall(r"(\d+) rows are saved already", logs)))

    def files(self) -> dict[str, bytes]:
        """All results by name, the weights as well."""
        names = [path for path in self.results.rglob("*") if path.is_file()]
        names = [path for path in names if not any(part in str(path.relative_to(self.results)) for part in ASIDE)]
        return {str(path.relative_to(self.results)): path.read_bytes() for path in names}

    def keys(self) -> Counter:
        """How often each key stands in each dataset."""
        found: Counter = Counter()
        for path in self.results.rglob("*.parquet"):
            name = str(path.relative_to(self.results))
            if not any(part in name for part in ASIDE):
                dataset = store.footer(path)[1]["dataset"]
                found.update(f"{dataset}: {row}" for row in pq.read_table(path, columns=KEYS[dataset]).to_pylist())
        return found

    def strays(self) -> list[str]:
        """Temporary files and unfinished work."""
        found = [*self.results.rglob("*.tmp"), *self.results.rglob("_partial"), *self.results.rglob("_result")]
        return [str(path.relative_to(self.results)) for path in found]

    def processes(self) -> dict[int, list[str]]:
        """Stages at work in this folder, orphans too: {process id: words of its command}."""
        found = {}
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                words = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
                zombie = (proc / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                if not zombie and (proc / "cwd").resolve() == self.folder and int(proc.name) != os.getpid():
                    found[int(proc.name)] = words
            except OSError:
                continue
        return found


@dataclass(frozen=True)
class Difference:
    """How a harmed run's results differ from those of an unharmed one."""

    lost: int
    doubled: int
    files: list[str]
    strays: list[str]

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.files or self.strays)


def difference(truth: Example, ours: Example) -> Difference:
    """Compare all rows, then all files byte for byte."""
    wanted, found = truth.keys(), ours.keys()
    one, two = truth.files(), ours.files()
    files = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return Difference((wanted - found).total(), (found - wanted).total(), files, ours.strays())
