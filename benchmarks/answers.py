"""First answers, re-answers and long answers by a LLaVA-1.5 of full size with random weights, on one GPU.

    python benchmarks/answers.py                      # LLaVA-1.5-7B, 336 px, bfloat16: an 80 GB GPU, some ten minutes
    python benchmarks/answers.py --rows re-answers    # one row alone
    python benchmarks/answers.py --tiny               # on any CPU with a tiny model: shows that it runs, and nothing else

Whole stages are timed, `answer` and `reanswer` as they run in a job: JPEG files of 640x480 random content are decoded, texts
tokenized, finished rows saved. Beside them, in the same run and on a sample of the rows that were answered: generation one
prompt at a time, and `generate` in batches of 64 prompts sorted by length.

A real part has tens of thousands of rows, and slices of `answer.flush_rows` but for the first few. So each stage gets more
images than it can answer, and is ended after `--seconds`; if no full-size slice is saved by then, it has up to three times as
long for one. Its rate is the rows from the first full-size slice to the last one, through the time from the save before them
(or the model's first batch, if there is none before) to that of the last: see `steady.py`. Only whole slices count, since a
slice begins with its longest answers. If no slice was full-size, all rows saved count, and the row says "with its ramp".

Rows, references and lengths of answers: see `mix.py`. Weights are random, so answers would ramble: each row is stopped at its
kind's length; a batch of `generate` goes on until its longest row is done. Turns of `reanswer` take many times the seconds
there are until rounds at all references meet in them, as they do in a long part; so they do from the start here
(`mix.at_all_ranks`): rounds that share an image and its reference get fewer from one reference to the next.

The limit is what the matrix products alone would take at the speed of a large product measured in the same run: two operations
a weight and token for the decoder, the image tower and the projector. "No reuse" reads each prompt in full; "reuse" reads each
prefix once. Attention and all else is not counted. Where the time goes is found in a second run on a part of these rows: see
`bounds.py`.
"""

import argparse
import functools
import logging
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import bounds
import llava
import mix
from common import machine, table
from steady import Saves, TimeUp

from surf import answer, config, prompts, reanswer, store
from surf.models import Request, decode, lvlm, shared
from surf.prompts import Reference, from_options
from surf.shards import stable_hash


class Sizes(NamedTuple):
    """How much is done."""

    images: int
    plain: int  # rows for `generate` in batches
    alone: int  # rows one at a time
    flush: int  # answer.flush_rows
    few: int = 150  # images to warm up with
    again: float = 30  # seconds, about, of the second run


class Run(NamedTuple):
    """What a stage did."""

    requests: list[Request]
    seconds: float
    slices: int  # full-size ones among the requests, if only the steady state counts


class Measured(NamedTuple):
    """A line of the first table, and the tables that explain it."""

    name: str
    cells: list[object]
    parts: list[list[object]]
    kernels: list[list[object]]


# (images, seed, length of all answers or None, seconds or None: to the end) to what was done
Stage = Callable[[int, int, int | None, float | None], Run]


class Stopped:
    """Makes each answer as long as `lengths` says, by the seed of its request."""

    def __init__(self, model: lvlm.Lvlm) -> None:
        self.lengths: dict[int, int] = {}
        self.check: Callable[[], None] = lambda: None  # called before each batch; what it raises ends the stage
        self.own = threading.local()
        if model.shared:
            model.shared.ends = frozenset()
        plain, keep = shared.generate, decode._keep

        def generate(*words: Any, seeds: Any, **options: Any) -> Any:
            self.check()
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


class Bench:
    """All measurements of one model."""

    def __init__(self, tiny: bool, options: config.Lvlm, sizes: Sizes, profile: bool = False) -> None:
        self.options, self.sizes, self.profile = options, sizes, profile
        network, processor = llava.responder(tiny)
        self.images: Any = llava.Pictures()
        self.model = lvlm.Lvlm(network, processor, self.images, options)
        self.baseline = lvlm.Lvlm(network, processor, self.images, options, share=False)
        self.stopped = Stopped(self.model)
        self.limits = bounds.limits(network)
        self.gpu = network.device.type == "cuda"

    def first(self, images: int, seed: int, fixed: int | None, seconds: float | None) -> Run:
        """The stage `answer`."""
        rows = mix.rounds_of(images, seed, fixed)
        self.stopped.lengths.update(mix.lengths(rows, [-1]))
        options = config.Answer(max_new_tokens=fixed or mix.LONGEST, flush_rows=self.sizes.flush)
        rounds = store.table_of(rows, "rounds")

        def work(saves: Saves) -> None:
            answer.answer(rounds, self.model, self.images, saves, lvlm=self.options, options=options, seed=0)

        done, spent, slices = self._stage("answers", work, seconds)
        by_id = {row["round_id"]: row for row in rows}
        return Run([_request(by_id[row["round_id"]], -1, [], self.options) for row in done], spent, slices)

    def again(self, images: int, seed: int, _: int | None, seconds: float | None) -> Run:
        """The stage `reanswer`. Without `seconds` all references of a round come in their turn, from the first one on."""
        wrong = mix.wrong_ones(mix.rounds_of(images, seed))
        if seconds is not None:
            wrong = mix.at_all_ranks(wrong)
        self.stopped.lengths.update(mix.lengths(wrong, range(mix.REFERENCES)))
        near = mix.references(wrong, seed)
        options = self.options.model_copy(update={"caption_chars": 10_000})

        def work(saves: Saves) -> None:
            reanswer.reanswer(
                wrong,
                near,
                self.model,
                self.images,
                mix.Judge(),  # type: ignore[arg-type]
                saves,
                lvlm=options,
                answer=config.Answer(flush_rows=self.sizes.flush),
                options=config.Reanswer(references=mix.REFERENCES),
                seed=0,
            )

        done, spent, slices = self._stage("reanswers", work, seconds)
        by_id = {row["round_id"]: row for row in wrong}
        made = [(by_id[row["round_id"]], row["rank"]) for row in done]
        return Run([_request(row, rank, [near[row["image"]][rank][1]], options) for row, rank in made], spent, slices)

    def _stage(self, dataset: str, work: Callable[[Saves], None], seconds: float | None) -> tuple[list[mix.Row], float, int]:
        """(rows, seconds, full-size slices) of a stage in its steady state; without `seconds`, of the whole stage."""
        with tempfile.TemporaryDirectory() as folder, suppress(TimeUp):
            saves = Saves(Path(folder) / "part.parquet", dataset, self.sizes.flush, seconds)
            self.stopped.check = saves.check
            whole, _ = _timed(lambda: work(saves))
        self.stopped.check = lambda: None
        if seconds is None:
            return [row for _, rows in saves.made for row in rows], whole, 0
        return saves.steady()

    def row(self, name: str, work: Stage, part: int, fixed: int | None, seconds: float) -> Measured:
        """What the tables say of a stage that has one `part`-th of the images."""
        import torch

        engine = self.model.shared
        assert engine is not None
        work(max(2, self.sizes.few // part), 1, fixed, None)  # shapes are recorded, functions compiled
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        requests, spent, slices = work(self.sizes.images // part, 2, fixed, seconds)
        ours = len(requests) / spent
        print(f"{name}: {ours:.4g} samples a second ({len(requests)} in {spent:.4g} s, {slices} full-size slices)", flush=True)
        if not slices:
            print(f"{name}: no slice of half of {self.sizes.flush} rows was saved: more --seconds", flush=True)
            name += ", with its ramp"
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else float("nan")
        some = requests[: min(self.sizes.flush, int(self.sizes.again * ours) + 1)]
        limit = fixed or mix.LONGEST
        parts = bounds.parts(self.model, some, self.stopped.lengths, limit, 1 / ours, self.limits)
        kernels = bounds.kernels(self.model, some[: len(some) // 4 + 1], limit) if self.profile and self.gpu else []
        engine.clear()
        if self.gpu:
            torch.cuda.empty_cache()
        draw = random.Random(0)
        some = draw.sample(requests, min(self.sizes.plain, len(requests)))
        alone = some[: self.sizes.alone]
        batched = len(some) / self._batched(some)
        single = len(alone) / _timed(lambda: self._plain(alone, 1))[0]
        least = bounds.products(self.model, requests, self.stopped.lengths)
        rivals = [cell for rate in (single, batched) for cell in (rate, ours / rate)]
        rates = [len(requests) * self.limits.flops / (least.unshared if whole else least.shared) for whole in (True, False)]
        cells = [cell for rate in rates for cell in (rate, f"{100 * ours / rate:.0f} %")]
        return Measured(name, [name, ours, *rivals, *cells, peak, slices], parts, kernels)

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
        texts = [prompts.chat(self.baseline.processor, request.prompt) for request in requests]
        order = sorted(range(len(requests)), key=lambda row: len(texts[row]))
        network = self.baseline.model
        ends, network.generation_config.eos_token_id = network.generation_config.eos_token_id, None
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            longest = max(self.stopped.lengths[requests[row].seed] for row in rows)
            self.baseline._generate([requests[row] for row in rows], [texts[row] for row in rows], longest, 0.0)
        network.generation_config.eos_token_id = ends


def _request(row: mix.Row, rank: int, shown: Sequence[Reference], options: config.Lvlm) -> Request:
    """What the stage asked."""
    return Request(from_options(row["question"], row["image"], shown, options), stable_hash(0, row["round_id"], rank))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


# name on the command line: (name in the table, stage, its part of the images is one such, length of all answers or None)
ROWS: dict[str, tuple[str, Callable[[Bench], Stage], int, int | None]] = {
    "first": ("first answers", lambda bench: bench.first, 1, None),
    "re-answers": ("re-answers, 10 references, early stop", lambda bench: bench.again, 2, None),
    "long": ("answers of 64 tokens", lambda bench: bench.first, 3, 64),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows, for the CPU")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="what is measured; all if left out")
    parser.add_argument("--seconds", type=float, default=75, help="time of each row's measured stage, about")
    parser.add_argument("--images", type=int, help="images of the first row, at most (6000); the others take a part of them")
    parser.add_argument("--flush-rows", type=int, help="answer.flush_rows: rows of a full-size slice")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="lvlm.batch_tokens")
    parser.add_argument("--batch-size", type=int, default=1024, help="lvlm.batch_size")
    parser.add_argument("--no-compile", action="store_true", help="lvlm.compile: false")
    parser.add_argument("--profile", action="store_true", help="also the kernels of most time (on a GPU)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = Sizes(24, 8, 2, 16, few=6) if args.tiny else Sizes(6000, 64, 6, config.Answer().flush_rows)
    sizes = sizes._replace(images=args.images or sizes.images, flush=args.flush_rows or sizes.flush)
    options = config.Lvlm(
        dtype="float32" if args.tiny else "bfloat16",
        batch_tokens=args.batch_tokens,
        batch_size=args.batch_size,
        compile=not args.no_compile,
    )
    bench = Bench(args.tiny, options, sizes, args.profile)
    if bench.model.shared is None:
        raise SystemExit("the model answers without shared prefixes: see the line above")
    made = []
    for name, stage, part, fixed in (ROWS[row] for row in args.rows):
        made.append(bench.row(name, stage(bench), part, fixed, args.seconds))
        print(*made[-1], sep="\n", flush=True)
    products, copies = (rate / 1e12 for rate in bench.limits)
    print(f"\n{machine()}; matrix products at {products:.3g} TFLOP/s, copies at {copies:.3g} TB/s\n")
    head = ["samples a second", "surf", "batch 1", "×", "generate, batch 64", "×", "limit, no reuse", "share"]
    print(table([*head, "limit, reuse", "share", "peak GiB", "full-size slices"], [one.cells for one in made]))
    for one in made:
        print(f"\n{table([one.name, 'ms a sample', 'share', 'least, ms', 'of it', 'bound by'], one.parts)}")
        if one.kernels:
            print(f"\n{table([f'{one.name}: kernel', 'calls', 'share'], one.kernels)}")


if __name__ == "__main__":
    main()
