"""Retrieval against a plain numpy search; copies of the query are left out wherever they rank. Indexes of every size."""

from pathlib import PurePosixPath

import faiss
import numpy as np
import plain
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surf import build_index as module
from surf import config, merge, search, store
from surf import retrieve as retrieval
from surf.build_index import build_index, choose, write
from surf.embed import _table
from surf.errors import SurfError
from surf.images import identity
from surf.retrieve import corpus_vectors, retrieve


def unit(rng, rows, dim=8):
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def index_of(vectors):
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    index.add_with_ids(vectors, np.arange(len(vectors)))
    return index


def options(references=5, max_similarity=0.98):
    return config.Retrieve(references=references, max_similarity=max_similarity)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 10))
def test_equals_a_plain_search(seed, size, references):
    rng = np.random.default_rng(seed)
    corpus, queries = unit(rng, size), unit(rng, 3)
    names = [f"{number}.jpg" for number in range(size)]
    table = retrieve(["q0.jpg", "1.jpg", "q2.jpg"], queries, index_of(corpus), names, options(references))
    for name, query in zip(["q0.jpg", "1.jpg", "q2.jpg"], queries, strict=True):
        similarity = corpus @ query
        allowed = [i for i in range(size) if names[i] != name and similarity[i] < 0.98]
        expected = sorted(allowed, key=lambda i: -similarity[i])[:references]
        rows = [row for row in store.rows(table) if row["query_id"] == name]
        assert [row["image_id"] for row in rows] == expected
        assert [row["rank"] for row in rows] == list(range(len(expected)))
        np.testing.assert_allclose([row["similarity"] for row in rows], similarity[expected], atol=1e-6)


def test_forty_copies_of_the_query_do_not_hide_the_neighbours():
    """The original dropped the first hit only, and fetched one more than it needed."""
    rng = np.random.default_rng(0)
    query = unit(rng, 1)
    others = unit(rng, 30)
    corpus = np.concatenate([np.repeat(query, 40, 0), others])
    names = [f"copy{number}.jpg" for number in range(40)] + [f"other{number}.jpg" for number in range(30)]
    table = retrieve(["q.jpg"], query, index_of(corpus), names, options(5))
    assert table.num_rows == 5
    assert min(table["image_id"].to_pylist()) >= 40


@given(st.text("ab./", max_size=8))
def test_a_name_is_its_path(name):
    assert identity(name) == str(PurePosixPath(name))


def test_the_same_photograph_under_another_name_is_left_out():
    vectors = unit(np.random.default_rng(1), 3)
    names = ["coco/train2017/000000000009.jpg", "coco/train2017/000000000025.jpg", "vg/VG_100K/1.jpg"]
    query = vectors[:1] * 0.5 + vectors[1:2] * 0.5
    query /= np.linalg.norm(query)
    table = retrieve(["COCO_val2014_000000000009.jpg"], query, index_of(vectors), names, options(3))
    assert sorted(table["image_id"].to_pylist()) == [1, 2]
    assert identity(names[0]) == identity("COCO_val2014_000000000009.jpg")


def test_ties_go_to_the_lower_id_and_one_photograph_is_taken_once():
    vector = unit(np.random.default_rng(2), 2)
    corpus = np.concatenate([vector[:1]] * 4)
    table = retrieve(["q.jpg"], vector[1:], index_of(corpus), ["d.jpg", "b.jpg", "d.jpg", "a.jpg"], options(4))
    assert table["image_id"].to_pylist() == [0, 1, 3]


def embeddings(folder, vectors, missing=()):
    paths = []
    for number, ids in enumerate(np.array_split(np.arange(len(vectors)), 2)):
        good = [int(i) for i in ids if i not in missing]
        table = _table(good, vectors[good])
        rows = store.rows(table) + [{"image_id": int(i), "embedding": None} for i in ids if i in missing]
        paths.append(folder / f"part-0000{number}-of-00002.parquet")
        rows.sort(key=lambda row: row["image_id"])
        store.write_table(paths[-1], pa.Table.from_pylist(rows, schema=table.schema), "embeddings", {"version": 1})
    merge.merge("embeddings", paths, folder / "_manifest.json")
    return folder / "_manifest.json"


@pytest.mark.parametrize(
    ("factory", "kind", "exact"),
    [("Flat", "Flat", True), ("auto", "Flat", True), ("IVF2,Flat", "IVF2,Flat", True), ("IVF2,SQ8", "IVF2,SQ8", False)],
)
def test_index_holds_every_readable_image_under_its_id(tmp_path, factory, kind, exact):
    vectors = unit(np.random.default_rng(3), 100)
    manifest = embeddings(tmp_path, vectors, missing={4, 77})
    index, about = build_index(manifest, config.BuildIndex(factory=factory), seed=0, out=tmp_path / "index.faiss")
    assert (about["ntotal"], about["dim"], about["factory"], about["metric"]) == (98, 8, kind, "inner_product")
    assert about["recall_at_10"] == 1.0 if exact else 0.9 < about["recall_at_10"] < 1.0
    query = vectors[[10, 90]].astype(np.float16).astype(np.float32)
    similarity, ids = index.search(query, 98)
    assert ids[:, 0].tolist() == [10, 90]
    np.testing.assert_allclose(similarity[:, 0], 1, atol=2e-2)
    assert not {4, 77} & set(ids.ravel().tolist())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([5, 64, 100, 640, 1000, 3200]), st.integers(1, 30))
def test_the_highest_are_found_by_their_groups(seed, rows, size, k):
    import torch

    k = min(k, size)
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(rows * size).reshape(rows, size).astype(np.float32))
    values, places = search.highest(scores, k)
    expected = scores.topk(k)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


def test_recall_falls_with_the_lists_that_are_searched(tmp_path):
    manifest = embeddings(tmp_path, unit(np.random.default_rng(6), 400))
    options = [config.BuildIndex(factory="IVF8,Flat", probes=probes) for probes in (1, 4, 8)]
    found = [build_index(manifest, one, seed=0, out=tmp_path / "index.faiss")[1] for one in options]
    shares = [about["recall_at_10"] for about in found]
    assert shares[0] < shares[1] < shares[2] == 1.0
    assert [about["probes"] for about in found] == [1, 4, 8]


def test_an_index_that_is_built_part_by_part_on_disk_equals_the_one_in_memory(tmp_path, monkeypatch):
    vectors = unit(np.random.default_rng(7), 300)
    manifest = embeddings(tmp_path, vectors, missing={5})
    options = config.BuildIndex(factory="IVF4,SQ8", probes=2)
    memory, _ = build_index(manifest, options, seed=0, out=tmp_path / "index.faiss")
    monkeypatch.setattr(module, "DISK_BYTES", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write", lambda index, path: write(index, path) if "00000-of" in path.name else killed())
        build_index(manifest, options, seed=0, out=tmp_path / "a/index.faiss")
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "write", lambda index, path: made.append(path.name) or write(index, path))
        disk, about = build_index(manifest, options, seed=0, out=tmp_path / "a/index.faiss")
    assert made == ["part-00001-of-00002.faiss"], "the first part had been finished before the kill"
    with monkeypatch.context() as patch:  # killed after the merge, and before the index was written
        patch.setattr(module, "write", lambda index, path: killed())
        disk, about = build_index(manifest, options, seed=0, out=tmp_path / "a/index.faiss")
    write(disk, tmp_path / "a/index.faiss")
    del disk
    (tmp_path / "a").rename(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["_partial", "index.faiss", "index.ivfdata"]
    found = search.load(tmp_path / "b/index.faiss")
    assert found.ntotal == about["ntotal"] == 299
    for one, other in zip(found.search(vectors, 12), memory.search(vectors, 12), strict=True):
        assert (one == other).all()
    (tmp_path / "b/index.ivfdata").unlink()
    with pytest.raises(SurfError, match=r"index\.faiss: cannot be read .*next: rm .*index\.faiss, then your snakemake command"):
        search.load(tmp_path / "b/index.faiss")


def killed():
    raise KeyboardInterrupt


def test_auto_goes_by_the_size_of_the_corpus():
    assert choose(1_250_000, 768) == "Flat"
    assert choose(10_000_000, 768) == "IVF16384,SQ8"
    assert choose(100_000_000, 768) == "IVF32768,SQ8"
    assert choose(1_000_000_000, 768) == "IVF131072,PQ96"
    assert choose(10**9, 1000).endswith(",PQ125")


def test_index_errors(tmp_path):
    manifest = embeddings(tmp_path, unit(np.random.default_rng(4), 4), missing={0, 1, 2, 3})
    with pytest.raises(SurfError, match="not one image could be embedded"):
        build_index(manifest, config.BuildIndex(), seed=0, out=tmp_path / "index.faiss")
    with pytest.raises(SurfError, match=r"build_index\.factory = 'Flta'"):
        build_index(manifest, config.BuildIndex(factory="Flta"), seed=0, out=tmp_path / "index.faiss")
    few = embeddings(tmp_path / "few", unit(np.random.default_rng(4), 40))
    with pytest.raises(SurfError, match=r"build_index\.factory = 'IVF64,Flat': FAISS cannot train it on 40 vectors"):
        build_index(few, config.BuildIndex(factory="IVF64,Flat"), seed=0, out=tmp_path / "index.faiss")


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 70), st.booleans())
def test_torch_finds_what_faiss_finds(seed, size, k, tied):
    """Also where vectors are equal: FAISS and torch may leave them in any order, `retrieve` sorts them by id."""
    rng = np.random.default_rng(seed)
    corpus = unit(rng, size)
    if tied:
        corpus = corpus[rng.integers(0, max(1, size // 4), size)]
    queries = unit(rng, 5)
    index = index_of(corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK_ROWS", 16)
        patch.setattr(search, "BLOCK_QUERIES", 2)
        patch.setattr(search, "KEPT_QUERIES", 2)
        similarity, ids = search.Exact.of(index, "cpu").search(queries, k)
    theirs, their_ids = index.search(queries, k)
    np.testing.assert_allclose(similarity[ids >= 0], theirs[ids >= 0], atol=1e-6)
    assert ((ids >= 0) == (their_ids >= 0)).all()
    assert (np.diff(similarity[:, : min(k, size)], axis=1) <= 0).all()
    if k >= size or not tied:
        assert [set(row) for row in ids.tolist()] == [set(row) for row in their_ids.tolist()]
    same = similarity[:, 1:] == similarity[:, :-1]
    assert (np.diff(ids, axis=1)[same & (ids[:, 1:] >= 0)] > 0).all(), "equal similarities stand by id"


def test_vectors_of_a_loaded_index_live_as_long_as_they_are_searched(tmp_path, monkeypatch):
    """Where there is a GPU torch reads FAISS's own memory, which must not be freed with the index."""
    import gc

    corpus = unit(np.random.default_rng(6), 2000)
    write(index_of(corpus), tmp_path / "index.faiss")
    monkeypatch.setattr(search, "gpu", lambda: True)
    of = search.Exact.of
    monkeypatch.setattr(search.Exact, "of", lambda index, device: of(index, "cpu"))
    found = search.load(tmp_path / "index.faiss")
    gc.collect()
    other = [np.full(corpus.shape, 7, np.float32) for _ in range(20)]  # takes what was freed
    assert (found.vectors == corpus).all() and len(other) == 20
    assert (found.search(corpus[:50], 1)[1][:, 0] == np.arange(50)).all()


copies = st.sampled_from(["a.jpg", "b.jpg", "c.jpg", "d.jpg", "val2017/000000000001.jpg", "train2017/000000000001.jpg"])


@given(st.integers(0, 2**31), st.integers(1, 5), st.lists(copies, min_size=1))
def test_picks_equal_the_plain_loop(seed, references, corpus):
    rng = np.random.default_rng(seed)
    names = ["a.jpg", "q.jpg", "COCO_train2014_000000000001.jpg"]
    ids = np.stack([rng.permutation(len(corpus)) for _ in names])
    ids[rng.random(ids.shape) < 0.1] = -1
    similarity = rng.choice(np.array([0.1, 0.5, 0.9, 0.98, 0.99], np.float32), ids.shape)
    rows, ranks, hits, scores = retrieval.pick(
        *retrieval._photographs(names, ids, corpus), ids, similarity, options(references)
    )
    for row, name in enumerate(names):
        expected = plain.pick(name, ids[row], similarity[row], corpus, options(references))
        assert list(zip(hits[rows == row].tolist(), scores[rows == row].tolist(), strict=True)) == expected
        assert ranks[rows == row].tolist() == list(range(len(expected)))


def test_no_queries_have_no_neighbours():
    table = retrieve([], np.zeros((0, 8), np.float32), index_of(unit(np.random.default_rng(0), 3)), ["a", "b", "c"], options())
    assert table.num_rows == 0 and table.schema.equals(store.table_of([], "neighbors").schema)


def test_vectors_that_the_corpus_has_are_reused(tmp_path):
    vectors = unit(np.random.default_rng(5), 10)
    manifest = embeddings(tmp_path, vectors, missing={3})
    found = corpus_vectors(manifest, {2: "two.jpg", 3: "three.jpg", 9: "nine.jpg"})
    assert sorted(found) == ["nine.jpg", "two.jpg"]
    np.testing.assert_allclose(found["nine.jpg"], vectors[9], atol=1e-3)
