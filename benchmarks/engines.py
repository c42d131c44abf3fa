"""The same answers by surf's own engine and by vLLM, on one GPU: the mix of `answers.py`, side by side.

    python benchmarks/engines.py            # LLaVA-1.5-7B, 336 px, bfloat16: an 80 GB GPU, some 6 minutes
    python benchmarks/engines.py --parity   # not speed: do both give the same answers? With the example's trained model
    python benchmarks/engines.py --tiny     # both on any CPU: shows that it runs, and nothing else

Rounds, references, lengths and photographs are those of `answers.py` (see `mix.py`), and so is the work: the stages `answer`
and `reanswer` as they run in a job, which hand out their rows in slices; here they run to their end, ramp and all. Both engines
get the same requests; random weights would ramble, so that each answer is stopped at its kind's length. "One call" is the same
requests in a single call, with all caches emptied before: what the engine does without the stage around it.

vLLM goes first and ends before surf's engine is loaded, since either one wants the GPU for itself. Its weights are random too,
but other ones.
"""

import argparse
import importlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import answers
import llava
import mix
from answers import Bench, Sizes, Stage
from common import machine, table

from surf import config, prompts
from surf.demo import MODELS
from surf.models import Request, lvlm, vllm
from surf.shards import stable_hash

QUESTIONS = ("What is in the image?", "Is there a circle in the image?", "How many are there?", "What colour is it?")


class Served(Bench):
    """The stages of `Bench`, answered by vLLM."""

    def __init__(self, tiny: bool, options: config.Lvlm, sizes: Sizes, folder: Path) -> None:
        self.options, self.sizes = options, sizes
        self.images: Any = llava.Pictures()
        named = options.model_copy(update={"model": str(llava.write_card(folder, tiny))})
        self.model: Any = vllm.load(named, self.images, load_format="dummy")
        self.model.sampling = self._stopping
        self.stopped: Any = self
        self.lengths: dict[int, int] = {}  # of the answers, by the seeds of their requests

    def _stopping(self, request: Request, _limit: int, _temperature: float) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=self.lengths[request.seed], ignore_eos=True, temperature=0.0, detokenize=False)


def forget(model: Any) -> None:
    """Empty an engine's caches."""
    if isinstance(model, vllm.Vllm):
        model.engine.reset_prefix_cache()
        model.engine.reset_mm_cache()
    else:
        model.shared.features.clear()


def measure(bench: Bench, work: Stage, images: int, fixed: int | None) -> tuple[float, float, int]:
    """(answers a second by the stage, and in one call; their number)."""
    few = max(min(images, 6), images // 4)
    work(few, 1, fixed, None)  # shapes are recorded, functions compiled, caches full of other images
    requests, seconds, _ = work(images, 2, fixed, None)
    forget(bench.model)
    limit = fixed or mix.LONGEST
    alone, _ = answers._timed(lambda: bench.model.respond(requests, max_new_tokens=limit))
    return len(requests) / seconds, len(requests) / alone, len(requests)


def works(bench: Bench) -> list[tuple[str, Stage, int, int | None]]:
    """(name, stage, images, length of all answers or None) of each line."""
    images = bench.sizes.images
    part = max(1, images // 3)
    return [
        ("first answers", bench.first, images, None),
        ("re-answers, 10 references, early stop", bench.again, part, None),
        ("answers of 64 tokens", bench.first, part, 64),
    ]


def speed(tiny: bool, options: config.Lvlm, sizes: Sizes) -> str:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(tiny, options, sizes, Path(folder))
        theirs = [measure(served, *one) for _, *one in works(served)]
        served.model.close()
    bench = Bench(tiny, options, sizes)
    rows = []
    for (name, *one), (rate, alone, number) in zip(works(bench), theirs, strict=True):
        own, own_alone, own_number = measure(bench, *one)
        assert own_number == number, "the engines were asked different things"
        rows.append([name, number, own, rate, own / rate, own_alone, alone, own_alone / alone])
    head = ["samples a second", "rows", "surf", "vLLM", "surf ÷ vLLM", "surf, one call", "vLLM, one call", "surf ÷ vLLM"]
    return table(head, rows)


def parity(options: config.Lvlm, model: Path, count: int) -> str:
    """How many greedy answers to made-up prompts are the same."""
    images: Any = llava.Pictures()
    named = options.model_copy(update={"model": str(model)})
    requests = [_request(number, named) for number in range(count)]
    served = vllm.load(named, images)
    found = served.respond(requests, max_new_tokens=16)
    served.close()
    expected = lvlm.load(named, images).respond(requests, max_new_tokens=16)
    same = sum(one == other for one, other in zip(expected, found, strict=True))
    return table(
        ["prompts", "different answers", "answered alike"], [[count, len(set(expected)), f"{100 * same / count:.0f} %"]]
    )


def _request(number: int, options: config.Lvlm) -> Request:
    shown = [prompts.Reference(f"r{number}", "a red circle and a blue square")] * (number % 3)
    question = QUESTIONS[stable_hash("question", number) % len(QUESTIONS)]
    return Request(prompts.from_options(question, f"q{number}", shown, options))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows, for the CPU")
    parser.add_argument("--parity", action="store_true", help="compare answers, not speed")
    parser.add_argument("--model", type=Path, default=MODELS / "lvlm", help="with --parity: the model's folder")
    parser.add_argument("--images", type=int, default=600, help="images of the first row; the others take a part of it")
    parser.add_argument("--no-compile", action="store_true", help="lvlm.compile: false")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = config.Lvlm(
        engine="vllm", dtype="float32" if args.tiny else "bfloat16", compile=not (args.no_compile or args.tiny)
    )
    if args.tiny:
        options = options.model_copy(update={"batch_tokens": 4096, "batch_size": 32})
    if args.parity:
        made = parity(options, args.model, 16 if args.tiny else 256)
    else:
        made = speed(args.tiny, options, Sizes(6, 8, 2, 16) if args.tiny else Sizes(args.images, 256, 24, 2048))
    print(f"\n{machine()}, vLLM {importlib.import_module('vllm').__version__}\n\n{made}")


if __name__ == "__main__":
    main()
