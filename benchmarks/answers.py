"""First answers, re-answers and long answers by a LLaVA-1.5 of full size with random weights, on one GPU.

    python benchmarks/answers.py            # LLaVA-1.5-7B, 336 px, bfloat16: an 80 GB GPU, several minutes
    python benchmarks/answers.py --tiny     # the same on any CPU with a tiny model: shows that it runs, and nothing else

Whole stages are timed, `answer` and `reanswer` as they run in a job: JPEG files of 640x480 random content are decoded, texts
tokenized, finished rows saved. Beside them, in the same run and on rows of the same mix: generation one prompt at a time, and
`generate` in batches of 64 prompts sorted by length.

The mix is that of LLaVA-1.5's 665k training samples (Liu et al. 2023, arXiv 2310.03744, table 7), less its texts without
image. The table gives samples. Rounds of a sample: VQAv2, GQA, OK-VQA and OCR-VQA from those datasets' own counts of
questions and images; Visual Genome 10 (ten annotations an image, same paper); one for A-OKVQA, TextCaps, details and
reasoning; RefCOCO (below 10, same paper) and LLaVA's conversations are set to 8 and 4. Lengths (tokens) of questions and
answers are typical values of each kind, set here, and so are the true answers, from which the stage guesses; answers end at
`answer.max_new_tokens` = 100. Weights are random, so answers would ramble: each row is stopped at its kind's length; a batch
of `generate` goes on until its longest row is done.

Re-answers: 40 % of the rounds are wrong; 10 references with captions of 100 to 280 tokens (ShareGPT4V's are that long); a
reference is helpful with probability 0.3, and a round is left once a helpful and a misleading one are found.

The limit is what the matrix products alone would take at the speed of a large product measured in the same run: two operations
a weight and token for the decoder, the image tower and the projector. "No reuse" reads each prompt in full; "reuse" reads each
prefix once. Attention and all else is not counted.
"""

import argparse
import functools
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llava
from common import machine, table

from surf import answer, config, reanswer, store
from surf.models import Request, decode, lvlm, shared
from surf.prompts import Reference, from_options
from surf.shards import stable_hash

# kind: (samples in thousands, rounds of a sample, tokens of a question, tokens of an answer with its end)
MIX = {
    "conversation": (58, 4, 14, 60),
    "detail": (23, 1, 12, 100),
    "reasoning": (77, 1, 20, 100),
    "VQAv2": (83, 5, 18, 3),
    "GQA": (72, 13, 20, 3),
    "OK-VQA": (9, 1, 20, 3),
    "OCR-VQA": (80, 5, 18, 7),
    "A-OKVQA": (66, 1, 50, 2),
    "TextCaps": (22, 1, 30, 16),
    "RefCOCO": (48, 8, 30, 20),
    "Visual Genome": (86, 10, 35, 20),
}
WRONG, HELPFUL, REFERENCES = 0.4, 0.3, 10


class Sizes(NamedTuple):
    """How much is done."""

    images: int
    plain: int  # rows for `generate` in batches
    alone: int  # rows one at a time
    flush: int


def rounds_of(images: int, seed: int, fixed: int | None = None) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """(rows of `rounds` on so many images, in the mix; answer lengths by the seed of the first answer's request).

    fixed: length of all answers, if not that of their kinds.
    """
    draw = random.Random(seed)
    kinds = draw.choices(list(MIX), [samples for samples, *_ in MIX.values()], k=images)
    rows, lengths = [], {}
    for image, kind in enumerate(kinds):
        _, rounds, question, length = MIX[kind]
        length = fixed or length
        for number in range(rounds):
            name = f"{seed}-{image}#{number}"
            # questions of one kind differ in length by a third
            text = _words(draw, max(3, round(question * draw.uniform(0.67, 1.33))))
            rows.append(
                {"round_id": name, "image": f"q{seed}-{image}", "question": text, "answer": "w000 " * length, "task": "short"}
            )
            for rank in range(-1, REFERENCES):
                lengths[stable_hash(0, name, rank)] = length
    return rows, lengths


def _words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(llava.WORDS)}" for _ in range(count))


# (images, seed, length of all answers or None) to the requests that were made
Stage = Callable[[int, int, int | None], list[Request]]


class Stopped:
    """Makes each answer as long as `lengths` says, by the seed of its request."""

    def __init__(self, model: lvlm.Lvlm) -> None:
        self.lengths: dict[int, int] = {}
        self.own = threading.local()
        if model.shared:
            model.shared.ends = frozenset()
        plain, keep = shared.generate, decode._keep

        def generate(*words: Any, seeds: Any, **options: Any) -> Any:
            self.own.limits = [[self.lengths[seed] for seed in row] for row in seeds]
            return plain(*words, seeds=seeds, **options)

        def stopping(ids: Any, names: Any, made: Any, ends: Any, limit: int) -> int:
            keep(ids, names, made, ends, limit)
            for own in names:
                for place, (g, r) in enumerate(own):
                    if g >= 0 and len(made[g][r]) >= self.own.limits[g][r]:
                        own[place] = (-1, -1)
            return sum(name != (-1, -1) for own in names for name in own)

        shared.generate, decode._keep = generate, stopping  # type: ignore[assignment]


class Judge:
    """Says of each reference of a round whether it helps, by hash."""

    def labels(self, answered: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[bool | None]:
        """See `reanswer.Judge`."""
        return [helps(row["round_id"], response["rank"]) for row, response in answered]


def helps(round_id: str, rank: int) -> bool:
    """Whether a made-up reference helps."""
    return stable_hash("helps", round_id, rank) % 1000 < 1000 * HELPFUL


class Bench:
    """All measurements of one model."""

    def __init__(self, tiny: bool, options: config.Lvlm, sizes: Sizes) -> None:
        self.options, self.sizes = options, sizes
        network, processor = llava.responder(tiny)
        self.images: Any = llava.Pictures()
        self.model = lvlm.Lvlm(network, processor, self.images, options)
        self.baseline = lvlm.Lvlm(network, processor, self.images, options, share=False)
        self.stopped = Stopped(self.model)
        self.peak_flops = _matmul_flops(network)
        self.gpu = network.device.type == "cuda"

    def first(self, images: int, seed: int, fixed: int | None) -> list[Request]:
        """The stage `answer`; the requests that it made."""
        rows, lengths = rounds_of(images, seed, fixed)
        limit = fixed or 100
        self.stopped.lengths.update(lengths)
        with tempfile.TemporaryDirectory() as folder:
            answer.answer(
                store.table_of(rows, "rounds"),
                self.model,
                self.images,
                store.Partial(Path(folder) / "part.parquet", "answers"),
                lvlm=self.options,
                options=config.Answer(max_new_tokens=limit, flush_rows=self.sizes.flush),
                seed=0,
            )
        return [
            Request(from_options(row["question"], row["image"], [], self.options), stable_hash(0, row["round_id"], -1))
            for row in rows
        ]

    def again(self, images: int, seed: int, _: int | None) -> list[Request]:
        """The stage `reanswer`; the requests that it made."""
        rows, lengths = rounds_of(images, seed)
        self.stopped.lengths.update(lengths)
        wrong = [row for row in rows if stable_hash("wrong", row["round_id"]) % 1000 < 1000 * WRONG]
        draw = random.Random(seed)
        near = {
            name: [(rank, Reference(f"r-{name}-{rank}", _words(draw, draw.randrange(100, 280)))) for rank in range(REFERENCES)]
            for name in dict.fromkeys(row["image"] for row in wrong)
        }
        lvlm_options = self.options.model_copy(update={"caption_chars": 10_000})
        with tempfile.TemporaryDirectory() as folder:
            done, _errors = reanswer.reanswer(
                [{**row, "base": 0.0} for row in wrong],
                near,
                self.model,
                self.images,
                Judge(),  # type: ignore[arg-type]
                store.Partial(Path(folder) / "part.parquet", "reanswers"),
                lvlm=lvlm_options,
                answer=config.Answer(flush_rows=self.sizes.flush),
                options=config.Reanswer(references=REFERENCES),
                seed=0,
            )
        by_id = {row["round_id"]: row for row in wrong}
        asked = [(by_id[row["round_id"]], row["rank"]) for row in store.rows(done)]
        return [
            Request(
                from_options(row["question"], row["image"], [near[row["image"]][rank][1]], lvlm_options),
                stable_hash(0, row["round_id"], rank),
            )
            for row, rank in asked
        ]

    def row(self, name: str, work: Stage, images: int, fixed: int | None) -> tuple[list[object], list[object]]:
        """One line of the table, and one of the table of times."""
        import torch

        engine = self.model.shared
        assert engine is not None
        few = max(min(images, 6), images // 8)
        work(few, 1, fixed)  # shapes are recorded, functions compiled
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, requests = _timed(lambda: work(images, 2, fixed))
        ours = len(requests) / seconds
        print(f"{name}: {ours:.4g} samples a second ({len(requests)} in {seconds:.4g} s)", flush=True)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else float("nan")
        engine.timed, engine.seconds = True, {}
        whole, _ = _timed(lambda: work(few, 3, fixed))
        engine.timed = False
        parts = [engine.seconds.get(part, 0.0) / whole for part in ("image", "vision", "prefix", "suffix", "decode")]
        engine.clear()
        if self.gpu:
            torch.cuda.empty_cache()
        draw = random.Random(0)
        some = draw.sample(requests, min(self.sizes.plain, len(requests)))
        alone = some[: self.sizes.alone]
        batched = len(some) / self._batched(some)
        single = len(alone) / _timed(lambda: self._plain(alone, 1))[0]
        without, reused = self._limits(requests)
        rivals = [cell for rate in (single, batched) for cell in (rate, ours / rate)]
        bounds = [cell for rate in (without, reused) for cell in (rate, f"{100 * ours / rate:.0f} %")]
        times = [f"{100 * part:.0f} %" for part in (*parts, 1 - sum(parts))]
        return [name, ours, *rivals, *bounds, peak], [name, *times]

    def profile(self, work: Stage, images: int, fixed: int | None) -> list[list[object]]:
        """The GPU's kernels that take most time in a small run: (name, calls, share of all kernels' time)."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            work(max(6, images // 40), 4, fixed)
        kernels = sorted(found.key_averages(), key=lambda one: -one.self_device_time_total)
        whole = sum(one.self_device_time_total for one in kernels)
        return [[one.key[:90], one.count, f"{one.self_device_time_total / whole:.1%}"] for one in kernels[:16]]

    def _batched(self, requests: Sequence[Request]) -> float:
        """Seconds of `generate` in batches of 64, or of fewer where memory does not suffice."""
        import torch

        for size in (64, 32, 16):
            try:
                return _timed(functools.partial(self._plain, requests, size))[0]
            except torch.OutOfMemoryError:
                print(f"generate: out of memory with batches of {size}", flush=True)
                torch.cuda.empty_cache()
        raise torch.OutOfMemoryError("generate: not even batches of 16")

    def _plain(self, requests: Sequence[Request], size: int) -> None:
        """`generate`, in batches of `size` prompts sorted by length; a batch is as long as its longest answer."""
        from surf import prompts

        texts = [prompts.chat(self.baseline.processor, request.prompt) for request in requests]
        order = sorted(range(len(requests)), key=lambda row: len(texts[row]))
        network = self.baseline.model
        ends, network.generation_config.eos_token_id = network.generation_config.eos_token_id, None
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            longest = max(self.stopped.lengths[requests[row].seed] for row in rows)
            self.baseline._generate([requests[row] for row in rows], [texts[row] for row in rows], longest, 0.0)
        network.generation_config.eos_token_id = ends

    def _limits(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Samples a second if nothing but matrix products took time: (each prompt read in full, each prefix read once)."""
        from surf import processing, prompts
        from surf.models.prefix import split

        network, image = self.model.model, self.model.processor.image_token_id
        decoder = 2 * sum(own.numel() for layer in network.model.language_model.layers for own in layer.parameters())
        head = 2 * network.get_output_embeddings().weight.numel()
        tower = 2 * sum(own.numel() for own in network.model.vision_tower.parameters()) * (self.model.image_tokens + 1)
        tower += 2 * sum(own.numel() for own in network.model.multi_modal_projector.parameters()) * self.model.image_tokens
        prefixes: dict[Any, int] = {}
        images: set[str] = set()
        whole = rest = 0
        for request in requests:
            ids = processing.token_ids(self.model.processor, prompts.chat(self.model.processor, request.prompt))
            first, suffix = split(ids, image)
            new = self.stopped.lengths[request.seed]
            length = len(first) + len(request.prompt.images) * (self.model.image_tokens - 1)
            prefixes[first, request.prompt.images] = length
            images.update(request.prompt.images)
            own = (len(suffix) + new - 1) * decoder + new * head
            rest += own
            whole += own + length * decoder + len(request.prompt.images) * tower
        reused = rest + sum(prefixes.values()) * decoder + len(images) * tower
        return len(requests) * self.peak_flops / whole, len(requests) * self.peak_flops / reused


def _matmul_flops(network: Any) -> float:
    """Operations a second of a large matrix product in the model's arithmetic."""
    import torch

    side = 8192 if network.device.type == "cuda" else 512
    a = torch.randn(side, side, device=network.device, dtype=network.dtype)
    times = 50 if network.device.type == "cuda" else 5

    def work() -> None:
        for _ in range(times):
            a @ a

    _timed(work)
    return times * 2 * side**3 / _timed(work)[0]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows, for the CPU")
    parser.add_argument("--images", type=int, default=1200, help="images of the first row; the others take a part of it")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="lvlm.batch_tokens")
    parser.add_argument("--batch-size", type=int, default=1024, help="lvlm.batch_size")
    parser.add_argument("--no-compile", action="store_true", help="lvlm.compile: false")
    parser.add_argument(
        "--profile", action="store_true", help="also the kernels that take most of the first row's time (on a GPU)"
    )
    args = parser.parse_args()
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = Sizes(6, 8, 2, 16) if args.tiny else Sizes(args.images, 64, 6, 4096)
    options = config.Lvlm(
        dtype="float32" if args.tiny else "bfloat16",
        batch_tokens=args.batch_tokens,
        batch_size=args.batch_size,
        compile=not args.no_compile,
    )
    bench = Bench(args.tiny, options, sizes)
    if bench.model.shared is None:
        raise SystemExit("the model answers without shared prefixes: see the line above")
    work: list[tuple[str, Stage, int, int | None]] = [
        ("first answers", bench.first, sizes.images, None),
        ("re-answers, 10 references, early stop", bench.again, max(1, sizes.images // 4), None),
        ("answers of 64 tokens", bench.first, max(1, sizes.images // 3), 64),
    ]
    made, profiles = [], []
    for name, stage, images, fixed in work:
        made.append(bench.row(name, stage, images, fixed))
        print(*made[-1], flush=True)
        if args.profile and not profiles:
            profiles.append((name, bench.profile(stage, images, fixed)))
            print(*profiles[-1][1], sep="\n", flush=True)
    print(f"\n{machine()}; matrix products at {bench.peak_flops / 1e12:.3g} TFLOP/s\n")
    head = ["samples a second", "surf", "batch 1", "×", "generate, batch 64", "×", "limit, no reuse", "share"]
    print(table([*head, "limit, reuse", "share", "peak GiB"], [cells for cells, _ in made]))
    parts = ["waiting for images", "vision", "prefixes", "suffixes", "new tokens", "host"]
    print(f"\n{table(['time goes to', *parts], [times for _, times in made])}")
    for name, kernels in profiles:
        print(f"\n{table([f'{name}: kernel', 'calls', 'share'], kernels)}")


if __name__ == "__main__":
    main()
