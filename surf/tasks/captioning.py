"""Captioning metrics as the COCO evaluation server computes them (Chen et al. 2015, arXiv 1504.00325), without its Java.

CIDEr-D is written here from its paper: no kept library has it without Java. BLEU is sacrebleu's and ROUGE-L rests on
rapidfuzz's longest common subsequence; both belong to the extra `captions`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType

from surf.errors import SurfError
from surf.tasks.base import mean

_N = 4  # n-grams of one to four words, for CIDEr-D and BLEU
_SIGMA = 6.0  # words; width of CIDEr-D's length penalty
_BETA = 1.2  # ROUGE-L: weight of recall, as the COCO evaluation server sets it
Ngram = tuple[str, ...]
Vector = list[dict[Ngram, float]]  # by n: TF-IDF weight of each n-gram


def cider_d(responses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each response, in [0, 10] (Vedantam et al. 2015, arXiv 1411.5726).

    Inverse document frequencies come from the references of all images at hand, so a number holds for its set of images
    only, and a single image always gets 0.

    Args:
        responses: words of one caption for each image.
        references: words of the gold captions of each image.
    """
    frequency = Counter(gram for captions in references for gram in {gram for words in captions for gram in _ngrams(words)})
    idf = {gram: math.log(len(references) / count) for gram, count in frequency.items()}
    unseen = math.log(max(len(references), 1))
    values = []
    for response, captions in zip(responses, references, strict=True):
        said = _vector(response, idf, unseen)
        values.append(10 * mean([_penalty(response, words) * _cosine(said, _vector(words, idf, unseen)) for words in captions]))
    return values


def _penalty(response: Sequence[str], reference: Sequence[str]) -> float:
    return math.exp(-((len(response) - len(reference)) ** 2) / (2 * _SIGMA**2))


def _cosine(response: Vector, reference: Vector) -> float:
    """Mean over n of the cosines, with the response's weights clipped to the reference's; 0 for an n that one of them lacks."""
    cosines = []
    for said, wanted in zip(response, reference, strict=True):
        norm = math.hypot(*said.values()) * math.hypot(*wanted.values())
        shared = sum(min(weight, wanted[gram]) * wanted[gram] for gram, weight in said.items() if gram in wanted)
        cosines.append(shared / norm if norm else 0.0)
    return mean(cosines)


def _vector(words: Sequence[str], idf: Mapping[Ngram, float], unseen: float) -> Vector:
    vector: Vector = [{} for _ in range(_N)]
    for gram, count in _ngrams(words).items():
        vector[len(gram) - 1][gram] = count * idf.get(gram, unseen)
    return vector


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[start : start + n]) for n in range(1, _N + 1) for start in range(len(words) - n + 1))


def bleu(responses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """BLEU-4 of the whole, in [0, 1], by sacrebleu: no smoothing, the closest reference length."""
    sacrebleu = _captions("sacrebleu")
    most = max(len(captions) for captions in references)
    streams = [
        [" ".join(captions[place]) if place < len(captions) else None for captions in references] for place in range(most)
    ]
    scorer = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=_N, force=True)
    return float(scorer.corpus_score([" ".join(words) for words in responses], streams).score) / 100


def rouge_l(responses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Mean ROUGE-L, in [0, 1]: F with beta 1.2 of the best precision and the best recall over the references (Lin 2004)."""
    _captions("rapidfuzz")
    from rapidfuzz.distance import LCSseq

    values = []
    for response, captions in zip(responses, references, strict=True):
        shared = [LCSseq.similarity(response, reference) for reference in captions]
        precision = max(shared) / max(len(response), 1)
        recall = max(common / max(len(reference), 1) for common, reference in zip(shared, captions, strict=True))
        weighted = recall + _BETA**2 * precision
        values.append((1 + _BETA**2) * precision * recall / weighted if weighted else 0.0)
    return mean(values)


def _captions(module: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise SurfError(f"{module} is not installed", where="captions", next="pip install 'surf-rag[captions]'") from None


# --- words ------------------------------------------------------------------------------------------------------------

# What the evaluation server drops after the Penn Treebank's tokens.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "..", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me"}
_TOKEN = re.compile(
    r"""
      https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+       # addresses
    | (?:[a-z]\.){2,}                                   # u.s. p.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ave|blvd|rd|mt|ft|lt|gen|sgt|capt|prof|no(?=\.\s?\d))\.
    | '\d\ds?\b                                         # '90s
    | \d+(?:[.,:]\d+)+                                  # 1,000 2:50 3.5
    | 'n'
    | o'clock | ma'am
    | n't\b | '(?:s|re|ve|ll|d|m)\b
    | [^\W_]+?(?=n't\b) | [^\W_]+(?:[-/.][^\W_]+)*       # red-haired and/or
    | \.{2,} | -+ | [!?]+ | _+
    | \S
    """,
    re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """A caption's words as the evaluation server counts them: the Penn Treebank's tokens, lower case, without punctuation.

    It follows the tokenizer's rules that captions meet (endings such as 's and n't apart, hyphens within a word, numbers
    whole, abbreviations with their full stops), not all of its rules.
    """
    text = caption.lower().replace("’", "'").replace("‘", "'")
    text = re.sub(r"[“”\"]|``|''", " ", text)
    text = re.sub(r"[–—…]", " -- ", text)
    text = re.sub(rf"\b(?:{'|'.join(_SPLIT)})\b", lambda match: _SPLIT[match[0]], text)
    tokens = [_BRACKETS.get(token, token) for token in _TOKEN.findall(text)]
    return [token for token in tokens if token not in _DROPPED]
