"""Nearest neighbours by inner product: exact by torch over blocks of vectors, else by FAISS.

An exact index is searched by torch where there is a GPU. Blocks have one shape, padded, so that equal vectors get equal scores
wherever they lie.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from surf.errors import SurfError
from surf.store import AGAIN

BLOCK_ROWS = 262_144  # vectors of the corpus compared at a time: 0.8 GB of 768 float32 numbers
BLOCK_QUERIES = 4_096  # the scores of one step then take 4.3 GB
KEPT_QUERIES = 262_144  # queries that stay on the device: 0.4 GB of float16 numbers, the rest is copied for every block
GROUP = 64  # scores whose highest one is looked at first


def load(path: Path) -> Any:
    """The index in `path`, an object with ntotal, d and search(queries float32 [n, d], k) -> (similarity, ids).

    Where there is a GPU, a Flat index is searched there by torch, and another one that fits into memory by FAISS, if this FAISS
    was built for GPUs.

    Raises:
        SurfError: the index, or a file of codes beside it, is missing or torn.
    """
    import faiss

    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR)
    except RuntimeError as error:
        message = str(error).splitlines()[-1].split("Error: ")[-1]
        raise SurfError(f"cannot be read ({message})", where=str(path), next=f"rm {path}, then {AGAIN}") from None
    if not gpu():
        return index
    if (flat := Exact.of(index, "cuda")) is not None:
        return flat
    lists: Any = faiss.try_extract_index_ivf(index)
    on_disk = lists is not None and isinstance(faiss.downcast_InvertedLists(lists.invlists), faiss.OnDiskInvertedLists)
    if on_disk or not hasattr(faiss, "StandardGpuResources"):
        return index
    return faiss.index_cpu_to_all_gpus(index)


def gpu() -> bool:
    """Is there a GPU that torch can use? Where there is no driver, torch is not even imported."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


class Exact:
    """A Flat index on a torch device: ids int64 [n] and vectors float32 [n, d].

    Args:
        owner: whose memory the vectors are a view of; it lives as long as this object.
    """

    def __init__(self, ids: np.ndarray, vectors: np.ndarray, device: str, owner: Any = None) -> None:
        self.ids, self.vectors, self.device, self.owner = ids, vectors, device, owner
        self.ntotal, self.d = vectors.shape

    @classmethod
    def of(cls, index: Any, device: str) -> "Exact | None":
        """A FAISS Flat index with ids, its vectors not copied; None for any other index."""
        import faiss

        if not isinstance(index, faiss.IndexIDMap2):
            return None
        flat = faiss.downcast_index(index.index)
        if not isinstance(flat, faiss.IndexFlat):
            return None
        vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
        return cls(faiss.vector_to_array(index.id_map), vectors, device, owner=index)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As FAISS: (similarity float32 [n, k], ids int64 [n, k]); see `exact`."""
        starts = range(0, self.ntotal, BLOCK_ROWS)
        blocks = ((self.ids[i : i + BLOCK_ROWS], self.vectors[i : i + BLOCK_ROWS]) for i in starts)
        return exact(blocks, queries, k, self.device)


def exact(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], queries: np.ndarray, k: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """The k highest inner products of each query over all blocks; each block goes to the device once.

    Products are those of float32 numbers. Where all of these are float16 numbers, as `embed` stores them, a GPU multiplies
    them as such: each product is exact in float32, and so are the sums but for their rounding.

    Args:
        blocks: (ids int64 [rows], vectors float32 [rows, d]).
        queries: float32 [n, d].

    Returns:
        (similarity float32 [n, k], ids int64 [n, k]), highest first, equal ones by id; -inf and -1 where there are too few.
    """
    import torch

    asked = torch.from_numpy(queries)
    best = torch.full((len(queries), k), -torch.inf, device=device)
    found = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    size = 0
    with torch.inference_mode(), _full_precision():
        halves = device == "cuda" and all(_are_halves(part.to(device)) for part in asked.split(BLOCK_ROWS))
        kind = torch.float16 if halves else torch.float32
        parts = list(asked.split(BLOCK_QUERIES))
        kept = -(-KEPT_QUERIES // BLOCK_QUERIES)
        parts[:kept] = [part.to(device).to(kind) for part in parts[:kept]]
        for ids, vectors in blocks:
            size = max(size, -(-len(ids) // GROUP) * GROUP)  # the last block is the shortest one
            corpus = torch.zeros((size, queries.shape[1]), device=device)
            corpus[: len(ids)] = torch.from_numpy(vectors)
            number = torch.full((size,), -1, dtype=torch.int64, device=device)
            number[: len(ids)] = torch.tensor(ids, device=device)
            small = halves and _are_halves(corpus)
            if small:
                corpus = corpus.half()
            for start, part in zip(range(0, len(queries), BLOCK_QUERIES), parts, strict=False):
                rows = slice(start, start + BLOCK_QUERIES)
                own = part.to(device)
                scores = torch.mm(own.half(), corpus.T, out_dtype=torch.float32) if small else own.float() @ corpus.T
                scores[:, len(ids) :] = -torch.inf
                values, places = highest(scores, min(k, len(ids)))
                both = torch.cat([best[rows], values], 1)
                names = torch.cat([found[rows], number[places]], 1)
                top = both.topk(k)
                best[rows], found[rows] = top.values, names.gather(1, top.indices)
    similarity, result = best.cpu().numpy(), found.cpu().numpy()
    order = np.lexsort((result, -similarity), axis=1)
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(result, order, 1)


def highest(scores: Any, k: int) -> tuple[Any, Any]:
    """The k highest of each row [rows, size], highest first: (values, places), both [rows, k].

    The k highest stand in the k groups with the highest maxima: only these are sorted out, since `topk` reads what it is given
    many times.
    """
    import torch

    rows, size = scores.shape
    groups = size // GROUP
    if size % GROUP or groups < 2 * k:
        top = scores.topk(k)
        return top.values, top.indices
    near = scores.view(rows, GROUP, groups).amax(1).topk(k).indices
    places = (near[:, None] + groups * torch.arange(GROUP, device=scores.device)[:, None]).flatten(1)
    top = scores.gather(1, places).topk(k)
    return top.values, places.gather(1, top.indices)


def _are_halves(numbers: Any) -> bool:
    """Are these float32 numbers float16 ones?"""
    return bool((numbers.half().float() == numbers).all())


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 numbers as float32, not as TensorFloat-32."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
