"""The gate before a second engine, with engines that are not there."""

import pytest

from surf import config, models, prompts
from surf.errors import SurfError
from surf.models import Request, parity, vllm


class Fixed:
    """Answers with the question's last letter; `wrong` questions differently."""

    def __init__(self, wrong=()):
        self.wrong, self.asked = wrong, []

    def respond(self, requests, *, max_new_tokens, temperature=0.0):
        self.asked.append(([request.prompt.text for request in requests], max_new_tokens, temperature))
        texts = [request.prompt.text[-1] for request in requests]
        return ["odd" if text in self.wrong else text for text in texts]

    def loglik(self, requests, golds):
        return [-1.0] * len(requests)


def requests_of(letters):
    return [Request(prompts.build(letter, "a.png")) for letter in letters]


def gate_of(wrong="", **options):
    loaded = []
    engines = {"reference": Fixed(), "engine": Fixed(wrong)}

    def load(name):
        loaded.append(name)
        return engines[name]

    section = config.Lvlm(engine="vllm", **options)
    return parity.Gate(lambda: load("reference"), lambda: load("engine"), section), engines, loaded


def test_engines_that_agree_are_loaded_once_one_after_the_other():
    gate, engines, loaded = gate_of(parity_prompts=3)
    assert gate.respond([], max_new_tokens=9) == [] and gate.loglik([], []) == [] and loaded == []
    requests = requests_of("abcdef")
    assert gate.respond(requests, max_new_tokens=9, temperature=0.5) == list("abcdef")
    assert gate.respond(requests[:2], max_new_tokens=9) == ["a", "b"]
    assert gate.loglik(requests[:2], ["x", "y"]) == [-1.0, -1.0]
    assert loaded == ["reference", "engine"]
    ((sample, limit, temperature),) = engines["reference"].asked
    assert len(sample) == 3 and limit == parity.TOKENS and temperature == 0.0  # greedy, whatever the run does
    assert engines["engine"].asked[0] == (sample, limit, temperature)
    assert engines["engine"].asked[1][1:] == (9, 0.5)


def test_log_likelihoods_pass_the_gate_too():
    gate, _, loaded = gate_of(wrong="ab", parity_prompts=2)
    with pytest.raises(SurfError, match="2 of 2"):
        gate.loglik(requests_of("ab"), ["x", "y"])
    assert loaded == ["reference", "engine"]


def test_too_many_different_answers_stop_the_job():
    gate, _, _ = gate_of(wrong="ab", parity_prompts=4, parity_limit=0.25)
    with pytest.raises(SurfError) as caught:
        gate.respond(requests_of("abcd"), max_new_tokens=9)
    text = str(caught.value)
    assert "2 of 4 prompts" in text and "lvlm.engine = 'vllm'" in text and "lvlm.parity_limit" in text
    assert "'odd' instead of 'a'" in text or "'odd' instead of 'b'" in text
    assert "next: set lvlm.engine: transformers" in text


def test_a_share_of_different_answers_is_let_through():
    gate, _, _ = gate_of(wrong="a", parity_prompts=4, parity_limit=0.25)
    assert gate.respond(requests_of("abcd"), max_new_tokens=9) == ["odd", "b", "c", "d"]


def test_one_of_very_few_prompts_may_differ():
    gate, _, _ = gate_of(wrong="a", parity_limit=0.25)
    assert gate.respond(requests_of("ab"), max_new_tokens=9) == ["odd", "b"]
    strict, _, _ = gate_of(wrong="a", parity_limit=0.0)
    with pytest.raises(SurfError, match="1 of 2"):
        strict.respond(requests_of("ab"), max_new_tokens=9)


def test_an_engine_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SurfError, match=r"vLLM is not installed.*next: pip install"):
        models.load_responder(config.Lvlm(engine="vllm"), None)
