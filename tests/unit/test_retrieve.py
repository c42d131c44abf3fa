"""Retrieval against a plain numpy search; copies of the query are left out wherever they rank."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surf import config, merge, store
from surf.build_index import build_index
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
        import pyarrow as pa

        paths.append(folder / f"part-0000{number}-of-00002.parquet")
        rows.sort(key=lambda row: row["image_id"])
        store.write_table(paths[-1], pa.Table.from_pylist(rows, schema=table.schema), "embeddings", {"version": 1})
    merge.merge("embeddings", paths, folder / "_manifest.json")
    return folder / "_manifest.json"


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
def test_index_holds_every_readable_image_under_its_id(tmp_path, factory):
    vectors = unit(np.random.default_rng(3), 100)
    manifest = embeddings(tmp_path, vectors, missing={4, 77})
    index, about = build_index(manifest, config.BuildIndex(factory=factory), seed=0)
    assert (about["ntotal"], about["dim"], about["factory"], about["metric"]) == (98, 8, factory, "inner_product")
    query = vectors[[10, 90]].astype(np.float16).astype(np.float32)
    similarity, ids = index.search(query, 1)
    assert ids[:, 0].tolist() == [10, 90]
    np.testing.assert_allclose(similarity[:, 0], 1, atol=2e-3)
    all_ids = index.search(query, 98)[1] if factory == "Flat" else np.array([[]])
    assert not {4, 77} & set(all_ids.ravel().tolist())


def test_index_errors(tmp_path):
    manifest = embeddings(tmp_path, unit(np.random.default_rng(4), 4), missing={0, 1, 2, 3})
    with pytest.raises(SurfError, match="not one image could be embedded"):
        build_index(manifest, config.BuildIndex(), seed=0)
    with pytest.raises(SurfError, match=r"build_index\.factory = 'Flta'"):
        build_index(manifest, config.BuildIndex(factory="Flta"), seed=0)


def test_vectors_that_the_corpus_has_are_reused(tmp_path):
    vectors = unit(np.random.default_rng(5), 10)
    manifest = embeddings(tmp_path, vectors, missing={3})
    found = corpus_vectors(manifest, {2: "two.jpg", 3: "three.jpg", 9: "nine.jpg"})
    assert sorted(found) == ["nine.jpg", "two.jpg"]
    np.testing.assert_allclose(found["nine.jpg"], vectors[9], atol=1e-3)
