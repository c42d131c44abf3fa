"""The embedded example through `snakemake --profile slurm` on a cluster of four nodes: is it what a local run gives?

    python tests/slurm/example.py          (or: make slurm-test)

Everything happens in a copy of the project in /var/tmp, which is removed in the end.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from cluster import Cluster, copy_of_the_project, install, obstacle

GPU_STAGES = {"embed", "retrieve", "score", "answer", "reanswer", "finetune"}
GPU_STAGES |= {"evaluate_retrieve", "evaluate_candidates", "evaluate_answer", "variant_finetune"}
CPU_STAGES = {"build_index", "pair", "variant_pair"}
TWO_NODES = ["--config", "finetune={nodes: 2, processes: 1}"]


def main() -> None:
    """Command line."""
    if why := obstacle():
        sys.exit(f"error: {why}")
    install()
    base = Path(tempfile.mkdtemp(prefix="surf-example-", dir="/var/tmp"))
    try:
        print("the local run", flush=True)
        local = copy_of_the_project(base / "local")
        ours = shutil.copytree(local, base / "slurm", symlinks=True)
        run_locally(local)
        with Cluster() as cluster:
            print("the cluster's run: snakemake --profile slurm", flush=True)
            jobs = watch(cluster, ours, "--profile", "slurm")
            check_jobs(jobs)
            compare(local, ours)
            print(f"fine-tune over two nodes: snakemake model --profile slurm {' '.join(TWO_NODES)}", flush=True)
            weights = ours / "results/model/model.safetensors"
            before, since = weights.read_bytes(), weights.stat().st_mtime_ns
            jobs = watch(cluster, ours, "model", "--profile", "slurm", *TWO_NODES)
            check_two_nodes(jobs)
            expect(weights.stat().st_mtime_ns != since, "two nodes trained nothing")
            expect(weights.read_bytes() == before, "the weights of two nodes differ from those of one node with two processes")
            print("  its weights are those of one node with two processes, bit for bit")
    finally:
        shutil.rmtree(base, ignore_errors=True)


def run_locally(folder: Path) -> None:
    """The example with the local profile."""
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--resources", "gpu=2"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: the local run failed\n{(done.stdout + done.stderr)[-5000:]}")
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)


def watch(cluster: Cluster, folder: Path, *words: str) -> dict[str, dict[str, str]]:
    """Run snakemake to its end; what Slurm said of each job meanwhile: {id: {field: value}}."""
    seen: dict[str, dict[str, str]] = {}
    before = set(cluster.jobs("all"))
    begin = time.monotonic()
    process = cluster.snakemake(folder, *words)
    while process.poll() is None:
        lines = cluster.call(
            "squeue", "-h", "-t", "all", "-O", "JobID:|,Comment:|,tres-per-node:|,NodeList:|,NumNodes:|"
        ).stdout
        for line in lines.splitlines():
            number, comment, gres, nodes, count, *_ = (word.strip() for word in line.split("|"))
            if number in before:
                continue
            rule = comment.removeprefix("rule_").split("_wildcards_")[0]
            seen[number] = {"rule": rule, "gres": gres, "nodes": nodes or seen.get(number, {}).get("nodes", ""), "count": count}
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"error: snakemake {' '.join(words)} failed\n{(folder / 'output.txt').read_text()[-5000:]}")
    print(f"  {time.monotonic() - begin:.0f} s, {len(seen)} jobs", flush=True)
    return seen


def check_jobs(jobs: dict[str, dict[str, str]]) -> None:
    """GPU stages asked for GPUs, CPU stages did not, local rules were no jobs, and all nodes had work."""
    gres, count, nodes = defaultdict(set), Counter(), Counter()
    for job in jobs.values():
        gres[job["rule"]].add(job["gres"])
        count[job["rule"]] += 1
        nodes[job["nodes"]] += 1
    for rule in sorted(count):
        print(f"  {rule:14} {count[rule]:2} jobs, each with {', '.join(gres[rule])}")
    print(f"  jobs on each node: {dict(sorted(nodes.items()))}", flush=True)
    expect(set(count) == GPU_STAGES | CPU_STAGES, f"jobs of {set(count) ^ (GPU_STAGES | CPU_STAGES)}")
    for rule in GPU_STAGES:
        wanted = "gres:gpu:2" if rule == "finetune" else "gres:gpu:1"
        expect(gres[rule] == {wanted}, f"{rule} asked for {gres[rule]}")
    for rule in CPU_STAGES:
        expect(not any("gpu" in value for value in gres[rule]), f"{rule} asked for {gres[rule]}")


def check_two_nodes(jobs: dict[str, dict[str, str]]) -> None:
    """One job, on two nodes."""
    trained = [job for job in jobs.values() if job["rule"] == "finetune" and job["count"] == "2"]
    expect(len(trained) == 1, f"jobs were {jobs}")
    print(f"  one job on {trained[0]['nodes']}, each with {trained[0]['gres']}", flush=True)


def compare(local: Path, ours: Path) -> None:
    """Every dataset, byte for byte."""
    names = [path.relative_to(local) for path in sorted((local / "results").rglob("*.parquet"))]
    names += [Path("results/pairs.json"), Path("results/index/index.faiss"), Path("results/pope/metrics.md")]
    names += [Path("results/evidence/table.md"), Path("results/evidence/index.html")]
    other = [str(name) for name in names if (local / name).read_bytes() != (ours / name).read_bytes()]
    print(
        f"  {len(names) - len(other)} of {len(names)} files are byte for byte those of the local run {other or ''}", flush=True
    )
    expect(not other, "the others are not")


def expect(true: bool, message: str) -> None:
    """Stop with a message, unless it is true."""
    if not true:
        sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
