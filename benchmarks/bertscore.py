"""BERTScore of a run's re-answers: ours, the bert-score package in one call, and its one call a pair (the original's way).

python benchmarks/bertscore.py [--rounds 200] [--sample 40] [--tiny] [--device cpu]

Each round has a gold answer and eleven answers (the first one and one with each of ten references), of which some are equal, as
a greedy model gives them; half of the texts have the length of a caption, half of a longer answer. The encoder is BERT-base at
its real size with random weights: a score means nothing, the time does. The two baselines score the first pairs only.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import numpy as np

from surf.bertscore import BertScore

LAYER = 9
ANSWERS = 11
WORDS = [f"w{number}" for number in range(30_000)]
LENGTHS = ((8, 16), (16, 80))  # words of a caption, of a longer answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--distinct", type=float, default=0.5, help="share of different texts among a round's answers")
    parser.add_argument("--sample", type=int, default=40, help="rounds that the baselines score")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder: seconds")
    args = parser.parse_args()
    from bert_score import BERTScorer

    pairs = texts(args.rounds, args.distinct)
    some = pairs[: args.sample * ANSWERS]
    with TemporaryDirectory() as folder:
        encoder(Path(folder), tiny=args.tiny)
        ours = BertScore(folder, LAYER, device=args.device)
        theirs = BERTScorer(model_type=folder, num_layers=LAYER, device=args.device)
        ours(["w1"], ["w2"])
        found, seconds = timed(lambda: ours(*zip(*pairs, strict=True)))
        batched, batched_seconds = timed(lambda: theirs.score(*map(list, zip(*some, strict=True)))[2].numpy())
        single, single_seconds = timed(lambda: np.array([float(theirs.score([a], [b])[2][0]) for a, b in some]))
    rate = len(pairs) / seconds
    rows = [["ours", len(pairs), seconds, rate, 1.0, float(np.abs(found[: len(some)] - single).max())]]
    for name, scores, time_ in (
        ("bert-score, one call", batched, batched_seconds),
        ("bert-score, one call a pair", single, single_seconds),
    ):
        rows.append([name, len(some), time_, len(some) / time_, rate * time_ / len(some), float(np.abs(scores - single).max())])
    different = len({text for pair in pairs for text in pair})
    print(f"{common.machine()}; device {args.device}; {different:,} different texts in {len(pairs):,} pairs\n")
    print(common.table(["", "pairs", "s", "pairs/s", "ours ÷ it", "largest difference to one call a pair"], rows))


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What it gives, and seconds."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def texts(rounds: int, distinct: float) -> list[tuple[str, str]]:
    """(answer, gold answer) of all rounds, one after the other."""
    draw = random.Random(0)
    pairs = []
    for number in range(rounds):
        shape = LENGTHS[number % 2]
        gold, *variants = (
            " ".join(draw.choices(WORDS, k=draw.randint(*shape))) for _ in range(1 + max(1, round(ANSWERS * distinct)))
        )
        answers = variants + draw.choices(variants, k=ANSWERS - len(variants))
        pairs += [(answer, gold) for answer in answers]
    return pairs


def encoder(folder: Path, *, tiny: bool) -> None:
    """Write a BERT with random weights; BERT-base's shape unless tiny."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **(small if tiny else {}))).save_pretrained(folder)


if __name__ == "__main__":
    main()
