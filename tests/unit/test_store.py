"""Parquet files: schema-checked, atomic, resumable; and manifests."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surf import merge, quarantine, shards, store
from surf.errors import SurfError


def catalog(*ids):
    rows = [{"image_id": i, "image": f"{i}.jpg", "caption": f"caption {i}"} for i in ids]
    return store.table_of(rows, "catalog")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    store.write_table(path, catalog(3, 1, 2), "catalog", {"version": 4, "flags": "--x 1"})
    assert store.rows(store.read_table(path, "catalog")) == store.rows(catalog(3, 1, 2))
    assert store.read_table(path, "catalog", ["image"]).column_names == ["image"]
    meta = store.footer(path)[1]
    assert (meta["dataset"], meta["version"], meta["flags"]) == ("catalog", "4", "--x 1")
    assert list(tmp_path.iterdir()) == [path]


def test_columns_are_checked_on_both_sides(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises((SurfError, KeyError)):
        store.write_table(path, pa.table({"image_id": [1]}), "catalog")
    assert not list(tmp_path.iterdir())
    store.write_table(path, catalog(1), "catalog")
    with pytest.raises(SurfError, match=r"is catalog; expected a part of dataset 'rounds'"):
        store.read_table(path, "rounds")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(SurfError, match="image_id = 7 stands 2 times"):
        store.write_table(tmp_path / "a.parquet", catalog(7, 1, 7), "catalog")


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_torn_file_is_named_and_the_way_out_is_told(tmp_path, keep):
    path = tmp_path / "a.parquet"
    store.write_table(path, catalog(1, 2, 3), "catalog")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SurfError, match=rf"a\.parquet: is no whole Parquet file.*next: rm {path}, then your snakemake command"):
        store.read_table(path, "catalog")


def test_the_manifest_of_a_torn_or_lost_part_goes_too_since_the_part_would_not_be_missed(tmp_path):
    part, manifest = tmp_path / "part-00000-of-00001.parquet", tmp_path / "_manifest.json"
    store.write_table(part, catalog(1, 2), "catalog", {"version": "1"})
    merge.merge("catalog", [part], manifest)
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(SurfError, match=f"next: rm {part} {manifest}, then your snakemake command again"):
        store.read_table(manifest, "catalog")
    part.unlink()
    with pytest.raises(SurfError, match=f"no such file; next: rm {manifest}, then your snakemake command again"):
        store.read_table(manifest, "catalog")
    manifest.unlink()
    with pytest.raises(SurfError, match="no such file; next: your snakemake command again"):
        store.read_table(part, "catalog")


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    path = tmp_path / "a.txt"
    store.write_text(path, "old")
    with pytest.raises(RuntimeError), store.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@given(st.lists(st.integers(0, 10**9), unique=True), st.integers(0, 5))
def test_digest_depends_on_content_alone(ids, cut):
    table = catalog(*ids)
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)]).replace_schema_metadata({"a": "b"})
    assert store.digest(pieces) == store.digest(table)
    if ids:
        assert store.digest(table.slice(1)) != store.digest(table)


def write_parts(folder, *tables, version=1):
    names = shards.part_names(len(tables))
    for name, table in zip(names, tables, strict=True):
        store.write_table(folder / f"{name}.parquet", table, "catalog", {"version": version})
    return [folder / f"{name}.parquet" for name in names]


def test_manifest_and_reading_through_it(tmp_path):
    parts = write_parts(tmp_path, catalog(0, 1), catalog(2))
    merge.merge("catalog", parts, tmp_path / "_manifest.json")
    table = store.read_table(tmp_path / "_manifest.json", "catalog")
    assert table["image_id"].to_pylist() == [0, 1, 2]
    content = store.read_json(tmp_path / "_manifest.json")
    assert (content["dataset"], content["version"], content["rows"]) == ("catalog", "1", 3)
    assert [part["rows"] for part in content["parts"]] == [2, 1]


def test_equal_content_gives_an_equal_manifest(tmp_path):
    out = tmp_path / "_manifest.json"
    made = []
    for seconds in (1.5, 2.5):
        path = tmp_path / "part-00000-of-00001.parquet"
        store.write_table(path, catalog(0, 1), "catalog", {"version": 1, "work_seconds": seconds})
        merge.merge("catalog", [path], out)
        made.append(out.read_bytes())
    assert made[0] == made[1]


def test_strays_are_never_read(tmp_path):
    parts = write_parts(tmp_path, catalog(0), catalog(1))
    stray = tmp_path / "part-00000-of-00003.parquet"
    store.write_table(stray, catalog(9), "catalog")
    with pytest.raises(SurfError, match=rf"1 parts are not part of this run; next: rm {stray}"):
        merge.merge("catalog", parts, tmp_path / "_manifest.json")


def test_a_key_in_two_parts_and_parts_of_two_versions_are_refused(tmp_path):
    with pytest.raises(SurfError, match="image_id = 1 stands 2 times"):
        merge.merge("catalog", write_parts(tmp_path / "a", catalog(0, 1), catalog(1)), tmp_path / "a/_manifest.json")
    parts = write_parts(tmp_path / "b", catalog(0), catalog(1))
    store.write_table(parts[1], catalog(1), "catalog", {"version": 2})
    with pytest.raises(SurfError, match=r"the parts have 2 stage versions; next: rm .*\.parquet, then your snakemake command"):
        merge.merge("catalog", parts, tmp_path / "b/_manifest.json")


def test_a_part_that_changed_after_the_merge_is_noticed(tmp_path):
    parts = write_parts(tmp_path, catalog(0), catalog(1))
    merge.merge("catalog", parts, tmp_path / "_manifest.json")
    store.write_table(parts[0], catalog(5), "catalog", {"version": 1})
    with pytest.raises(SurfError, match="differs from the manifest"):
        store.read_table(tmp_path / "_manifest.json", "catalog")
    parts[0].unlink()
    with pytest.raises(SurfError, match="there is no such file"):
        store.parts_of(tmp_path / "_manifest.json")


def answers(*ids):
    rows = [{"round_id": i, "rank": -1, "response": f"answer {i}"} for i in ids]
    return store.table_of(rows, "answers")


def test_unfinished_work_is_found_again_and_only_under_equal_settings(tmp_path):
    out = tmp_path / "part-00000-of-00001.parquet"
    partial = store.Partial(out, "answers", flags="--a 1")
    assert partial.read().num_rows == 0
    partial.save(answers("a", "b"))
    partial.save(answers("b", "c"))  # a second writer did b as well
    assert sorted(store.Partial(out, "answers", flags="--a 1").read()["round_id"].to_pylist()) == ["a", "b", "c"]
    assert store.Partial(out, "answers", flags="--a 2").read().num_rows == 0
    store.forget(out)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_keeps_rows_beside_a_part_that_may_be_older_than_they_are(tmp_path):
    swept, kept = (store.Partial(tmp_path / f"{name}.parquet", "answers", flags="") for name in ("declared", "method"))
    for partial, meta in ((swept, {}), (kept, {"depends": "other settings"})):
        store.write_table(partial.out, answers("a"), "answers", meta)
        partial.save(answers("b"))
    store.sweep(tmp_path)
    assert (swept.read().num_rows, kept.read().num_rows) == (0, 1)


def test_a_torn_piece_of_unfinished_work_is_made_anew(tmp_path):
    partial = store.Partial(tmp_path / "p.parquet", "answers", flags="")
    partial.save(answers("a"))
    partial.save(answers("b"))
    torn = sorted(partial.folder.iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:50])
    assert partial.read().num_rows == 1
    assert not torn.exists()


def test_quarantine_records_and_stops(tmp_path):
    path = tmp_path / "q.parquet"
    quarantine.settle(path, {"b": "torn", "a": "gone"}, dataset="answers", stage="answer", total=10, max_bad_share=0.2)
    assert [row["key"] for row in store.rows(store.read_table(path, "quarantine"))] == ["a", "b"]
    with pytest.raises(SurfError, match=r"2 of 10 rows are unusable \(b: torn; a: gone\).*images\.max_bad_share"):
        quarantine.settle(path, {"b": "torn", "a": "gone"}, dataset="answers", stage="answer", total=10, max_bad_share=0.1)
    refused = path.with_suffix(".refused.tsv")
    assert refused.read_text() == "a\tgone\nb\ttorn\n"
    with pytest.raises(SurfError, match="1 of 1"):
        quarantine.settle(path, {"a\tb\udc80": "no\nway"}, dataset="a", stage="answer", total=1, max_bad_share=0.1)
    assert refused.read_text() == "a\\tb\\udc80\tno\\nway\n"
    quarantine.settle(path, {"b": "torn"}, dataset="answers", stage="answer", total=10, max_bad_share=0.1)
    assert not refused.exists()


@given(st.integers(0, 1000), st.integers(1, 60))
def test_ranges_cover_every_row_once_and_evenly(rows, count):
    ranges = [shards.row_range(rows, index, count) for index in range(count)]
    assert [row for one in ranges for row in one] == list(range(rows))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.integers(0, 99), st.integers(1, 100))
def test_part_names_and_back(index, count):
    if index < count:
        assert shards.parse_part(shards.part_name(index, count)) == (index, count)


@pytest.mark.parametrize("name", ["part-1-of-2", "part-00002-of-00002", "part-00000-of-00001.parquet", ""])
def test_other_names_are_no_parts(name):
    with pytest.raises(SurfError, match="not a shard name"):
        shards.parse_part(name)


def test_hash_is_the_same_everywhere():
    assert shards.stable_hash(0, "round", -1) == 16234847542808644804
    assert shards.stable_hash("a", "bc") != shards.stable_hash("ab", "c")
