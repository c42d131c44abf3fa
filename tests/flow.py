"""For tests: a copy of the repository's workflow in a folder of its own, and ways to run it."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TRIGGERS = ["--rerun-triggers", "mtime", "params", "input"]


class Workflow:
    """`snakemake` in a folder that links to the repository's Snakefile, rules, config and demo models."""

    def __init__(self, folder, methods=()):
        """`methods`: the evaluation is cut down to these, and to no variant that they do not use."""
        self.folder = folder
        for name in ("Snakefile", "rules", "config.yaml", "configs", "surf", "profiles"):
            (folder / name).symlink_to(ROOT / name)
        if methods:
            config = yaml.safe_load((ROOT / "config.yaml").read_text())
            found = {name: config["evaluate"]["methods"][name] for name in methods}
            config["evaluate"].update(methods=found, sweeps={})
            models = {method["model"] for method in found.values()}
            config["variants"] = {name: one for name, one in config["variants"].items() if name in models}
            (folder / "config.yaml").unlink()
            (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def run(self, *words, check=True):
        """Run it; the finished process, with its output in `.output`."""
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *words]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment, check=False)
        done.output = done.stdout + done.stderr
        if check:
            assert done.returncode == 0, done.output + self.logs()
        return done

    def logs(self):
        """The ends of all stage logs, for the message of a failed test."""
        return "".join(f"\n== {p}\n{p.read_text()[-1500:]}" for p in sorted(self.folder.rglob("logs/**/*.log")))

    def plan(self, *words, config=None):
        """Which rules a dry run would run, and how often: Counter."""
        extra = ["--config", *(f"{k}={json.dumps(v)}" for k, v in config.items())] if config else []
        output = self.run(*words, "-n", "-q", "host", *TRIGGERS, *extra).output
        return Counter({rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", output, re.M) if rule != "total"})
