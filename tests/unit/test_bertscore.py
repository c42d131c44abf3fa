"""Our BERTScore against the bert-score package, on a tiny random BERT."""

import random
import shutil
import string

import numpy as np
import pytest

from surf.bertscore import BertScore, _greedy
from surf.errors import SurfError

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "the", "red", "blue", "chair", "table", "in", "park", "near", "two", "people"]
LAYER = 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a random BERT with four layers, 40 positions and character pieces."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = list(string.ascii_lowercase)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), ".", *WORDS[1:]]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    # bert-score cannot do without a length limit
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=40).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    network = BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=40, initializer_range=0.5, **shape))
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(encoder):
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=encoder, num_layers=LAYER, device="cpu")
    return lambda candidates, references: scorer.score(candidates, references, batch_size=1)[2].numpy()


def sentences(count, seed):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        strange = ["".join(rng.choices(string.ascii_lowercase + ".", k=rng.randint(1, 9))) for _ in range(3)]
        made.append(" ".join(rng.choices([*WORDS, *strange], k=rng.randint(1, 30))))
    return made


def test_equals_the_reference_package(encoder, reference):
    candidates, references = sentences(60, 1), sentences(60, 2)
    found = BertScore(encoder, LAYER, device="cpu")(candidates, references)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(candidates, references), atol=1e-5)
    assert found.std() > 0.01  # a constant would agree with itself


def test_layers_differ_and_the_deepest_is_allowed(encoder):
    first, last = (BertScore(encoder, layer, device="cpu")(["a red dog"], ["the blue cat runs"]) for layer in (1, 4))
    assert abs(first - last) > 1e-3


def test_order_duplicates_and_batches_change_not_one_bit(encoder):
    candidates, references = sentences(40, 3), sentences(40, 4)
    whole = BertScore(encoder, LAYER, device="cpu")(candidates, references)
    alone = BertScore(encoder, LAYER, device="cpu")
    assert [alone([one], [other])[0] for one, other in zip(candidates, references, strict=True)] == whole.tolist()
    for seed, batch_tokens, chunk_chars in ((0, 50, 200), (1, 200, 1000), (2, 5000, 500_000)):
        order = random.Random(seed).choices(range(40), k=100)
        other = BertScore(encoder, LAYER, device="cpu", batch_tokens=batch_tokens, chunk_chars=chunk_chars)
        found = other([candidates[row] for row in order], [references[row] for row in order])
        assert found.tolist() == whole[order].tolist()


def test_padding_is_never_the_best_match():
    import torch

    up, one = torch.tensor([[1.0, 0.0]]), torch.ones(1)
    pairs = [(up, one), (up.repeat(5, 1), torch.ones(5))], [(-up, one), (up.repeat(7, 1), torch.ones(7))]
    assert _greedy(*pairs) == [pytest.approx(-1.0), pytest.approx(1.0)]


def test_each_string_is_embedded_once(encoder, monkeypatch):
    scorer = BertScore(encoder, LAYER, device="cpu")
    seen = []
    embed = BertScore._embed
    monkeypatch.setattr(BertScore, "_embed", lambda self, texts: seen.extend(texts) or embed(self, texts))
    scorer(["a dog", "a cat", "a dog", " a dog "], ["the cat", "the cat", "the cat", "a dog"])
    assert sorted(seen) == ["a cat", "a dog", "the cat"]


def test_empty_texts_score_zero_and_equal_texts_one(encoder):
    found = BertScore(encoder, LAYER, device="cpu")(["", "a dog", "  ", "a dog", "[SEP]"], ["a dog", "", "", "a dog", "a dog"])
    np.testing.assert_allclose(found, [0, 0, 0, 1, 0], atol=1e-5)


def test_no_pairs_and_empty_texts_load_no_model():
    scorer = BertScore("there/is/no/such/model", 9)
    assert scorer([], []).shape == (0,)
    assert scorer([""], ["gold"]).tolist() == [0.0]


def test_long_texts_are_cut_as_the_package_cuts_them(encoder, reference):
    long = " ".join(WORDS * 6)
    np.testing.assert_allclose(
        BertScore(encoder, LAYER, device="cpu")([long], ["a dog"]), reference([long], ["a dog"]), atol=1e-5
    )


def test_a_tokenizer_without_a_limit_is_cut_to_the_models_positions(encoder, tmp_path):
    import shutil

    from transformers import BertTokenizerFast

    shutil.copytree(encoder, tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "bert/vocab.txt")).save_pretrained(tmp_path / "bert")
    long = " ".join(WORDS * 6)
    found = BertScore(str(tmp_path / "bert"), LAYER, device="cpu")([long], ["a dog"])
    np.testing.assert_allclose(found, BertScore(encoder, LAYER, device="cpu")([long], ["a dog"]), atol=1e-6)


@pytest.mark.parametrize("layer", [5, 99])
def test_too_deep_a_layer_is_refused(encoder, layer):
    with pytest.raises(SurfError, match=f"has 4 layers, not {layer}.*expected 1 to 4"):
        BertScore(encoder, layer, device="cpu")(["a"], ["b"])


def test_a_missing_encoder_is_a_users_error(tmp_path):
    with pytest.raises(SurfError, match=r"score\.bertscore_model"):
        BertScore(str(tmp_path / "nothing"), 9)(["a"], ["b"])


def test_pickled_weights_are_refused_unread(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SurfError, match=r"score\.bertscore_model: .*expected .*safetensors"):
        BertScore(str(folder), LAYER, device="cpu")(["a"], ["b"])
