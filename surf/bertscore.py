"""BERTScore F1 (Zhang et al. 2020, arXiv 1904.09675): how much two texts mean the same, by matching their word vectors.

No idf weights and no baseline rescaling, as the original SURf labels references. A pair gets the number that the
`bert-score` package gives it alone; there, padding may change the scores of a batch (masked similarities count as 0, so a
word whose best match is negative gets 0 beside longer texts), here the batch never matters: on the CPU not for one bit, on a
GPU but for rounding. Each string is embedded once and an empty string scores 0.0.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from surf.errors import SurfError

# Where models keep their list of hidden layers.
_LAYERS = ("encoder.layer", "transformer.layer", "encoder.block", "encoder.layers", "layers", "layer", "h")
_UNBOUNDED = 1_000_000  # tokenizers without a length limit say 1e30
_GPU_TOKENS = 16_384  # tokens in a forward pass that keep a GPU busy
_CORE_TOKENS = 512  # on the CPU for each thread: what stays in its cache is twice as fast as large batches
# On the CPU the last bits of a sum follow the shapes of the matrices that it is part of. So the shape of a text is its own: its
# tokens, rounded up to a multiple of this, and all of a batch are of one shape. How many they are does not matter, since blocks
# of this height leave the products' kernels no remainder (blocks of 8 do, where three threads share a product).
_STEP = 16


class BertScore:
    """F1 of text pairs. The encoder is loaded at the first pair that needs it.

    Args:
        model: Hugging Face encoder, name or path.
        layer: hidden layer whose vectors are compared; the layers above it are dropped.
        device: torch device; None takes a GPU if there is one.
        batch_tokens: tokens (padding included) in one forward pass; None takes what suits the device.
        chunk_chars: characters of new text whose word vectors are held at one time. A token is about four characters
            and its vector 3 KiB at 768 dimensions, so the default holds some 400 MB.
    """

    def __init__(
        self,
        model: str,
        layer: int,
        *,
        device: str | None = None,
        batch_tokens: int | None = None,
        chunk_chars: int = 500_000,
    ) -> None:
        self.model, self.layer, self.device = model, layer, device
        self._batch_tokens, self.chunk_chars = batch_tokens, chunk_chars
        self._encoder: Any = None
        self._tokenizer: Any = None

    def __call__(self, candidates: Sequence[str], references: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """F1 of each candidate against its reference.

        Returns:
            float32 [pairs], at most 1 (up to rounding); in the order given.

        Raises:
            SurfError: the encoder cannot be loaded, or has fewer than `layer` layers.
        """
        # one row for each different pair; by reference, so that a chunk holds all answers to one gold text
        texts = [(reference.strip(), candidate.strip()) for candidate, reference in zip(candidates, references, strict=True)]
        pairs = sorted({pair for pair in texts if all(pair)})
        found: dict[tuple[str, str], float] = {}
        if pairs:
            self._load()
        interval = 0.5 if sys.stderr.isatty() else 10.0
        quiet = not progress or not pairs
        with tqdm(total=len(pairs), desc="bertscore", unit=" pairs", mininterval=interval, disable=quiet) as bar:
            for chunk in _chunks(pairs, self.chunk_chars):
                found.update(zip(chunk, self._score(chunk), strict=True))
                bar.update(len(chunk))
        return np.array([found.get(pair, 0.0) for pair in texts], dtype=np.float32)

    def _score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        vectors = self._embed(sorted({text for pair in pairs for text in pair}))
        shapes = [tuple(_padded(len(vectors[text][1])) for text in pair) for pair in pairs]
        scores = [0.0] * len(pairs)
        for batch in _batches(shapes, self.batch_tokens // 2):
            values = _greedy([vectors[pairs[row][1]] for row in batch], [vectors[pairs[row][0]] for row in batch])
            for row, value in zip(batch, values, strict=True):
                scores[row] = value
        return scores

    def _embed(self, texts: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """For each text (unit vectors [tokens, dim], weights [tokens]); special tokens weigh 0 but may be matched."""
        import torch

        special = {self._tokenizer.cls_token_id, self._tokenizer.sep_token_id}
        tokens = [self._tokenizer.encode(text, truncation=True, max_length=self._limit) for text in texts]
        pad = self._tokenizer.pad_token_id or 0
        shapes = [(min(_padded(len(row)), self._limit),) for row in tokens]
        vectors = {}
        with torch.inference_mode():
            for batch in _batches(shapes, self.batch_tokens):
                (size,) = shapes[batch[0]]
                ids = torch.tensor([tokens[row] + [pad] * (size - len(tokens[row])) for row in batch], device=self.device)
                mask = torch.tensor([[1] * len(tokens[row]) + [0] * (size - len(tokens[row])) for row in batch])
                hidden = self._hidden(ids, mask.to(self.device))
                hidden = torch.nn.functional.normalize(hidden.float(), dim=-1)
                for place, row in enumerate(batch):
                    weights = [0.0 if token in special else 1.0 for token in tokens[row]]
                    unit = hidden[place, : len(weights)].clone()  # a view would keep the whole batch alive
                    vectors[texts[row]] = (unit, torch.tensor(weights, device=self.device))
        return vectors

    def _hidden(self, ids: Any, mask: Any) -> Any:
        if self._cut:
            return self._encoder(ids, attention_mask=mask)[0]
        return self._encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]

    def _load(self) -> None:
        if self._encoder is not None:
            return
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        suiting = _CORE_TOKENS * torch.get_num_threads() if self.device == "cpu" else _GPU_TOKENS
        self.batch_tokens = self._batch_tokens or suiting
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            encoder = AutoModel.from_pretrained(self.model, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise SurfError(
                f"{self.model} cannot be loaded ({str(error).splitlines()[0]})",
                where="score.bertscore_model",
                expected="a Hugging Face encoder with safetensors weights and its tokenizer, or a folder that holds both",
                next="set score.bertscore_model, or download the model on a machine with a network",
            ) from None
        if encoder.config.is_encoder_decoder:
            encoder = encoder.get_encoder()
        layers = _layer_list(encoder)
        depth = len(layers[1]) if layers else encoder.config.num_hidden_layers
        if self.layer > depth:
            raise SurfError(
                f"{self.model} has {depth} layers, not {self.layer}", where="score.bertscore_layer", expected=f"1 to {depth}"
            )
        self._cut = layers is not None
        if layers:
            setattr(*layers[0], layers[1][: self.layer])
        self._limit = _length_limit(tokenizer, encoder.config)
        self._tokenizer, self._encoder = tokenizer, encoder.eval().to(self.device)


def _greedy(candidates: Sequence[tuple[Any, Any]], references: Sequence[tuple[Any, Any]]) -> list[float]:
    """Equations 2 to 4 of the paper for a batch of pairs: every token is matched to its most similar counterpart.

    A side is (unit vectors [tokens, dim], weights [tokens]) for each pair.
    """
    import torch

    with torch.inference_mode():
        (a, a_weight, a_real), (b, b_weight, b_real) = (
            (
                _stack([unit for unit, _ in side]),
                _stack([weight for _, weight in side]),
                _stack([torch.ones_like(weight, dtype=torch.bool) for _, weight in side]),
            )
            for side in (candidates, references)
        )
        similarity = torch.bmm(a, b.transpose(1, 2)).masked_fill(~(a_real.unsqueeze(2) & b_real.unsqueeze(1)), -2.0)
        precision = (similarity.amax(2) * a_weight).sum(1) / a_weight.sum(1)
        recall = (similarity.amax(1) * b_weight).sum(1) / b_weight.sum(1)
        f1 = 2 * precision * recall / (precision + recall)
        return torch.nan_to_num(f1, nan=0.0).tolist()  # nan: a text of special tokens alone


def _stack(rows: Sequence[Any]) -> Any:
    """Tensors [tokens, …] as one [rows, padded tokens, …], zeros behind them."""
    size = _padded(max(map(len, rows)))
    made = rows[0].new_zeros((len(rows), size, *rows[0].shape[1:]))
    for row, one in zip(made, rows, strict=True):
        row[: len(one)] = one
    return made


def _padded(tokens: int) -> int:
    """Length of a text of so many tokens with its padding, whatever its company."""
    return -(-tokens // _STEP) * _STEP


def _chunks(pairs: Sequence[tuple[str, str]], limit: int) -> Iterator[list[tuple[str, str]]]:
    """Consecutive pairs whose different texts have about `limit` characters."""
    chunk: list[tuple[str, str]] = []
    seen: set[str] = set()
    size = 0
    for pair in pairs:
        new = set(pair) - seen
        size += sum(map(len, new))
        if chunk and size > limit:
            yield chunk
            chunk, seen = [], set()
            new = set(pair)
            size = sum(map(len, new))
        chunk.append(pair)
        seen |= new
    if chunk:
        yield chunk


def _batches(shapes: Sequence[tuple[int, ...]], budget: int) -> Iterator[list[int]]:
    """Rows of equal shape, smaller ones first, whose longest sides add up to `budget` at most; at least one row."""
    batch: list[int] = []
    for row in sorted(range(len(shapes)), key=lambda row: shapes[row]):
        if batch and (shapes[row] != shapes[batch[0]] or max(shapes[row]) * (len(batch) + 1) > budget):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _layer_list(encoder: Any) -> tuple[tuple[Any, str], Any] | None:
    """((the module that holds the list of layers, the list's name), the list), or None in an unknown architecture."""
    import torch

    for path in _LAYERS:
        owner: Any = encoder
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        layers = getattr(owner, name, None)
        if isinstance(layers, torch.nn.ModuleList):
            return (owner, name), layers
    return None


def _length_limit(tokenizer: Any, config: Any) -> int:
    """Longest text in tokens: the tokenizer's limit, else the number of the model's positions."""
    if tokenizer.model_max_length < _UNBOUNDED:
        return int(tokenizer.model_max_length)
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    # RoBERTa counts its positions from behind the padding token's number
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
