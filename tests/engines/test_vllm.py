"""vLLM as the second engine, on its CPU build: `make vllm-test` sets up an environment with it and runs this file."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-test runs this file")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process would import everything once more

import tiny

from surf import config, models, processing, prompts, store
from surf.answer import answer
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, lvlm, parity, vllm
from surf.prompts import Reference
from surf.shards import stable_hash


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    # the CPU build knows no attention heads of fewer than 32 numbers
    folder = tiny.build_lvlm(tmp_path_factory.mktemp("wide"), heads=2)
    return config.Lvlm(model=str(folder), dtype="float32", engine="vllm", compile=False, batch_tokens=1024, batch_size=16)


@pytest.fixture(scope="module")
def images(drawn_images):
    return Images([str(drawn_images)])


@pytest.fixture(scope="module")
def plain(options, images):
    """The first engine."""
    return lvlm.load(options, images)


@pytest.fixture(scope="module")
def engine(options, images):
    return vllm.load(options, images)


def requests_of(count):
    words = ["What is this?", "Is there a red circle in the image, or two?", "Why?"]
    made = []
    for number in range(count):
        references = [Reference(f"r{number % 7}.png", "a blue square " * (number % 4))] * (number % 3)
        made.append(Request(prompts.build(words[number % 3], f"q{number % 5}.png", references), stable_hash(0, number)))
    return made


def test_greedy_answers_are_those_of_the_first_engine(plain, engine):
    requests = requests_of(13)
    expected = plain.respond(requests, max_new_tokens=8)
    assert len(set(expected)) > 3
    assert engine.respond(requests, max_new_tokens=8) == expected
    assert engine.respond(requests[::-1], max_new_tokens=8) == expected[::-1]
    assert engine.respond([], max_new_tokens=8) == []


def test_drawn_answers_follow_the_seed_and_no_batch(engine):
    requests = requests_of(9)
    drawn = engine.respond(requests, max_new_tokens=4, temperature=1.5)
    assert [engine.respond([one], max_new_tokens=4, temperature=1.5)[0] for one in requests] == drawn
    again = [Request(one.prompt, stable_hash("other", one.seed)) for one in requests]
    assert engine.respond(again, max_new_tokens=4, temperature=1.5) != drawn


def test_log_likelihoods_are_those_of_the_first_engine(plain, engine):
    requests = requests_of(5)
    golds = ["yes", "a red circle", "no", "three", "blue"]
    assert engine.loglik(requests, golds) == pytest.approx(plain.loglik(requests, golds), abs=1e-4)


def test_an_answer_stops_at_the_end_token(engine, monkeypatch):
    requests = requests_of(4)
    texts = [prompts.chat(engine.processor, one.prompt) for one in requests]
    ids = processing.tokens(engine.processor, texts)
    made = engine._run(requests, texts, ids, [engine.sampling(requests[0], 8, 0.0)] * 4)
    whole = [list(one.outputs[0].token_ids) for one in made]
    assert [len(ids) for ids in whole] == [8] * 4
    monkeypatch.setattr(engine, "end", whole[0][3])
    short = whole[0][: whole[0].index(engine.end) + 1]
    assert engine.respond(requests, max_new_tokens=8)[0] == engine.processor.tokenizer.decode(short).strip()


def test_the_stage_answers_behind_the_gate(tmp_path, options, images, plain, engine, monkeypatch):
    monkeypatch.setattr(vllm, "load", lambda *_: engine)  # loaded already
    rows = [
        {"round_id": f"c{n}#0", "image": f"q{n % 6}.png", "question": "What?", "answer": "yes", "task": "short"}
        for n in range(7)
    ]
    rounds = store.table_of(rows, "rounds")
    arguments = {"lvlm": options, "options": config.Answer(max_new_tokens=6, flush_rows=3), "seed": 0}
    made = []
    for name, responder in (("gate", models.load_responder(options, images)), ("plain", plain)):
        partial = store.Partial(tmp_path / name / "part.parquet", "answers")
        made.append(answer(rounds, responder, images, partial, **arguments)[0])
    assert made[0].equals(made[1]) and made[0].num_rows == 7


def test_the_gate_stops_an_engine_with_other_weights(tmp_path, options, images, engine):
    other = tiny.build_lvlm(tmp_path / "other", seed=1, heads=2)
    section = options.model_copy(update={"model": str(other)})
    gate = parity.Gate(lambda: lvlm.load(section, images), lambda: engine, section)
    with pytest.raises(SurfError, match=r"of 8 prompts are answered differently"):
        gate.respond(requests_of(9), max_new_tokens=8)


def test_models_that_vllm_cannot_load(tmp_path, options, images):
    unknown = tmp_path / "unknown"
    shutil.copytree(options.model, unknown)
    card = unknown / "config.json"
    card.write_text(card.read_text().replace("LlavaForConditionalGeneration", "NobodysModel"))
    with pytest.raises(SurfError, match=r"vLLM cannot load the model .*NobodysModel"):
        vllm.load(options.model_copy(update={"model": str(unknown)}), images)


def test_no_process_of_vllm_outlives_its_job(tmp_path, options):
    program = tmp_path / "job.py"
    program.write_text(
        "import sys, time\n"
        "from surf import config\n"
        "from surf.models import vllm\n"
        "if __name__ == '__main__':\n"
        "    model = vllm.load(config.Lvlm.model_validate_json(sys.argv[1]), None)\n"
        "    print(*model.guard.args[3:], flush=True)\n"
        "    time.sleep(600)\n"
    )
    several = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    job = subprocess.Popen([sys.executable, program, options.model_dump_json()], env=several, stdout=subprocess.PIPE, text=True)
    engine = next(line.strip() for line in job.stdout if line.strip().isdecimal())
    assert _runs(engine)
    job.kill()
    job.wait()
    for _ in range(60):
        if not _runs(engine):
            return
        time.sleep(1)
    os.kill(int(engine), 9)
    pytest.fail("vLLM's process still runs a minute after its job was killed")


def _runs(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
