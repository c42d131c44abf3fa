"""Vision-language models by vLLM, as an optional second engine. Prompts, images and answers go through the code of the first.

vLLM batches by itself, shares the prefixes of prompts and keeps the features of images; nothing of that is done here. Drawn
answers follow the row's own seed as they do in the first engine, but other random numbers come of it.
"""

import atexit
import importlib.util
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from surf import config, processing
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, Responder, lvlm, parity
from surf.models.features import AHEAD, Ahead, pool

STEP_TOKENS = 16_384  # tokens of a step: more of them fill no GPU better, and hold up the answers under way
MEMORY = 0.85  # share of the GPU's memory that vLLM takes; the rest is for the judge of `reanswer` and the images


def checked(options: config.Lvlm, images: Images, model: str | None = None) -> Responder:
    """`load`, behind the parity gate if the config wants it; then nothing is loaded before the first prompts come.

    Raises:
        SurfError: vLLM is not installed, or cannot load the model.
    """
    require()
    if not options.parity_prompts:
        return load(options, images, model)
    plain = options.model_copy(update={"engine": "transformers", "compile": False})
    return parity.Gate(lambda: lvlm.load(plain, images, model), lambda: load(options, images, model), options)


def require() -> None:
    """Raise a SurfError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise SurfError(
            "vLLM is not installed",
            where="lvlm.engine = 'vllm'",
            expected="vLLM in the Python environment of the jobs",
            next="pip install 'surf-rag[vllm]', or set lvlm.engine: transformers",
        )


def load(options: config.Lvlm, images: Images, model: str | None = None, **more: Any) -> "Vllm":
    """The model of the config's `lvlm` section (or the one in folder `model`), on the GPU if vLLM was built for one.

    Args:
        more: further arguments of `vllm.LLM`.

    Raises:
        SurfError: vLLM cannot load the model.
    """
    from transformers import AutoConfig
    from vllm import LLM

    name = model or options.model
    processor = processing.load_processor(options.model_copy(update={"model": name}))
    try:
        context = processing.context_of(AutoConfig.from_pretrained(name))
        engine = LLM(
            **{
                "model": name,
                "load_format": "safetensors",  # a pickle could run code
                "dtype": options.dtype,
                "max_model_len": context,
                "max_num_batched_tokens": min(STEP_TOKENS, options.batch_tokens),
                "max_num_seqs": options.batch_size,
                "enable_prefix_caching": True,
                "enforce_eager": not options.compile,
                "gpu_memory_utilization": MEMORY,
                **more,
            }
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SurfError(
            f"vLLM cannot load the model ({shorten(str(error), 300)})",
            where=f"lvlm.model = {name!r}",
            expected="a folder or a hub name with safetensors weights of a model that vLLM supports",
            next="see vLLM's own lines above, or set lvlm.engine: transformers",
        ) from error
    return Vllm(engine, processor, images, options, context)


class Vllm:
    """A `Responder`. One of two threads prepares its prompts while the other one uses the model."""

    def __init__(self, engine: Any, processor: Any, images: Images, options: config.Lvlm, context: int) -> None:
        self.context = context
        self.engine, self.processor, self.images, self.options = engine, processor, images, options
        self.end = processing.end_id(processor)
        self.lock = threading.Lock()
        self.threads = pool()
        # nothing but an order ends vLLM's own process for sure: neither garbage collection nor the end of this process does
        atexit.register(self.close)
        self.guard = _guard()

    def close(self) -> None:
        """End vLLM and give its memory back."""
        self.engine.llm_engine.engine_core.shutdown()
        if self.guard:
            self.guard.kill()
            self.guard.wait()
        atexit.unregister(self.close)

    def respond(self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """See `surf.models.Responder`."""
        if not requests:
            return []
        requests, texts, ids = self._fitted(requests, [max_new_tokens] * len(requests))
        wanted = [self.sampling(one, max_new_tokens, temperature) for one in requests]
        made = [list(output.outputs[0].token_ids) for output in self._run(requests, texts, ids, wanted)]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(made, skip_special_tokens=True)]

    def sampling(self, request: Request, max_new_tokens: int, temperature: float) -> Any:
        """How vLLM shall write one answer."""
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            seed=request.seed if temperature else None,
            stop_token_ids=[self.end],
            detokenize=False,
        )

    def loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        """See `surf.models.Responder`."""
        from vllm import SamplingParams

        requests, *_ = self._fitted(requests, [size + 1 for size in processing.answer_tokens(self.processor, golds)])
        whole, ids, sizes = processing.answered(self.processor, [request.prompt for request in requests], golds)
        wanted = [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False) for _ in requests]
        means = []
        for size, own, output in zip(sizes, ids, self._run(requests, whole, ids, wanted), strict=True):
            scores = output.prompt_logprobs[-size:]  # of each place, a dictionary by token
            means.append(sum(at[token].logprob for at, token in zip(scores, own[-size:], strict=True)) / size)
        return means

    def _fitted(self, requests: Sequence[Request], new: Sequence[int]) -> tuple[list[Request], list[str], list[list[int]]]:
        return processing.fitted(self.processor, requests, self.options, self.images, self.context, new)

    def _run(
        self, requests: Sequence[Request], texts: Sequence[str], ids: Sequence[Sequence[int]], wanted: Sequence[Any]
    ) -> list[Any]:
        """vLLM's output for each text, given with its `tokens`. It starts on the first ones while the images of others are
        still decoded."""
        # neighbours share prefixes: they are found in the cache before others push them out
        order = sorted(range(len(requests)), key=lambda row: (requests[row].prompt.images, texts[row]))
        outputs: list[Any] = [None] * len(requests)
        with self.lock:
            opened = Ahead(self.threads, self._open, [name for row in order for name in requests[row].prompt.images])
            try:
                for start in range(0, len(order), AHEAD):
                    rows = order[start : start + AHEAD]
                    names = dict.fromkeys(name for row in rows for name in requests[row].prompt.images)
                    pictures = {name: opened(name) for name in names}
                    given = [_given(ids[row], requests[row].prompt.images, pictures) for row in rows]
                    opened.fill()
                    self.engine.enqueue(given, [wanted[row] for row in rows], use_tqdm=False)
            finally:
                opened.close()
            for row, output in zip(order, self.engine.wait_for_completion(use_tqdm=False), strict=True):
                outputs[row] = output
        return outputs

    def _open(self, name: str) -> Any:
        return processing.squared(self.processor, self.images.open(name), self.options)


def _guard() -> "subprocess.Popen[bytes] | None":
    """A process that ends vLLM's when this one is killed, and cannot do it: they would hold the GPU's memory for ever."""
    engines = [str(one.pid) for one in multiprocessing.active_children() if one.name.startswith("EngineCore")]
    if not engines:  # vLLM runs in this process
        return None
    # its end of the pipe is closed when this process is gone, whatever ended it
    code = "import os, sys\nsys.stdin.read()\nfor pid in sys.argv[1:]: os.kill(int(pid), 9)"
    return subprocess.Popen(
        [sys.executable, "-c", code, *engines],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _given(ids: Sequence[int], names: Sequence[str], pictures: dict[str, Any]) -> dict[str, Any]:
    """A prompt as vLLM takes it: one token an image; an image's name stands for its content in all caches."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
    if names:
        prompt["multi_modal_data"] = {"image": [pictures[name] for name in names]}
        prompt["multi_modal_uuids"] = {"image": list(names)}
    return prompt
