"""Search: order, ties, subsets, threads, files."""

import threading

import faiss
import numpy as np
import pytest

from adapters.errors import DigestMismatch, NonFiniteTensor
from service.gallery.frames import normalise
from service.gallery.index import VectorIndex


def unit(seed, *shape):
    return normalise(np.random.default_rng(seed).standard_normal(shape))


def reference(vectors, query, k, positions=None):
    """float64 scores rounded once, sorted by (-score, position)."""
    positions = np.arange(len(vectors)) if positions is None else np.asarray(positions)
    scores = (vectors[positions].astype(np.float64) * query).sum(axis=1).astype(np.float32)
    order = sorted(range(len(positions)), key=lambda i: (-scores[i], positions[i]))[:k]
    return scores[order], positions[order]


@pytest.mark.parametrize("num_queries", [1, 7, 40])  # FAISS computes few and many queries in different ways
def test_flat_search_equals_the_reference_exactly(num_queries):
    vectors, queries = unit(0, 500, 48), unit(1, num_queries, 48)
    scores, positions = VectorIndex.build(vectors).search(queries, 12)
    assert scores.dtype == np.float32 and positions.dtype == np.int64
    for row, query in enumerate(queries):
        expected_scores, expected_positions = reference(vectors, query, 12)
        np.testing.assert_array_equal(positions[row], expected_positions)
        np.testing.assert_array_equal(scores[row], expected_scores)


def test_hits_depend_neither_on_k_nor_on_the_other_queries():
    vectors, queries = unit(0, 300, 32), unit(1, 64, 32)
    index = VectorIndex.build(vectors)
    together = index.search(queries, 20)
    alone = index.search(queries[9:10], 5)
    np.testing.assert_array_equal(together.scores[9, :5], alone.scores[0])
    np.testing.assert_array_equal(together.positions[9, :5], alone.positions[0])


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_k_above_the_size_returns_everything(kind):
    vectors = unit(0, 30, 8)
    scores, positions = VectorIndex.build(vectors, kind).search(vectors[:2], 1000)
    assert positions.shape == (2, 30)
    assert sorted(positions[1]) == list(range(30))
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("num_copies", [5, 400])  # 400: far more equal hits than are asked for beyond k
def test_ties_take_the_lower_positions_however_many_there_are(num_copies):
    vectors = unit(0, 600, 32)
    query = unit(5, 1, 32)
    copies = np.sort(np.random.default_rng(2).permutation(600)[:num_copies])
    vectors[copies] = query
    for k in (1, 3, num_copies - 1, num_copies + 2):
        positions = VectorIndex.build(vectors).search(np.repeat(query, 30, axis=0), k).positions
        expected = reference(vectors, query[0], k)[1]
        assert expected[: min(k, num_copies)].tolist() == copies[:k].tolist()
        assert all(row.tolist() == expected.tolist() for row in positions)


def test_ties_among_a_subset_take_the_lower_positions():
    vectors = np.repeat(unit(0, 1, 16), 200, axis=0)
    allowed = np.arange(199, 20, -3)
    positions = VectorIndex.build(vectors).search(vectors[:1], 4, allow=allowed).positions
    assert positions[0].tolist() == sorted(allowed.tolist())[:4]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_subsets_are_searched_completely(kind):
    vectors, queries = unit(0, 400, 16), unit(1, 3, 16)
    index = VectorIndex.build(vectors, kind)
    allow, exclude = np.arange(0, 400, 37), np.array([37, 74, 5])
    left = sorted(set(allow) - set(exclude))
    scores, positions = index.search(queries, 100, allow=allow, exclude=exclude)
    for row, query in enumerate(queries):
        expected = reference(vectors, query, 100, left)
        np.testing.assert_array_equal(positions[row], expected[1])
        np.testing.assert_array_equal(scores[row], expected[0])
    assert set(exclude).isdisjoint(index.search(queries, 400, exclude=exclude).positions.ravel())
    assert index.search(queries, 3, allow=[]).positions.shape == (3, 0)


def test_hnsw_finds_nearly_all_and_ef_search_holds_for_its_call_only():
    vectors, queries = unit(0, 1500, 24), unit(1, 50, 24)
    flat, hnsw = VectorIndex.build(vectors), VectorIndex.build(vectors, "hnsw")
    exact = flat.search(queries, 10).positions

    def recall(**settings):
        found = hnsw.search(queries, 10, **settings).positions
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])

    default = recall()
    assert recall(ef_search=500) > 0.98
    assert recall(ef_search=1) <= default
    assert recall() == default > 0.8


def test_hnsw_survives_a_file_and_needs_its_vectors(tmp_path):
    vectors, queries = unit(0, 500, 16), unit(1, 9, 16)
    index = VectorIndex.build(vectors, "hnsw")
    index.save(tmp_path / "index.faiss")
    assert (tmp_path / "index.faiss").stat().st_size < vectors.nbytes * 10
    loaded = VectorIndex.load(tmp_path / "index.faiss", vectors)
    np.testing.assert_array_equal(loaded.search(queries, 10).positions, index.search(queries, 10).positions)
    with pytest.raises(DigestMismatch, match="shape"):
        VectorIndex.load(tmp_path / "index.faiss", vectors[:-1])
    with pytest.raises(ValueError, match="nothing else to save"):
        VectorIndex.build(vectors).save(tmp_path / "flat")


@pytest.mark.parametrize("content", [b"", b"no index at all", None])
def test_a_file_that_is_no_index_is_refused(tmp_path, content):
    path = tmp_path / "index.faiss"
    if content is None:
        VectorIndex.build(unit(0, 500, 16), "hnsw").save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"index\.faiss"):
        VectorIndex.load(path, unit(0, 500, 16))


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(kind, value):
    vectors = unit(0, 20, 8)
    vectors[13, 2] = value
    with pytest.raises(NonFiniteTensor, match="row 13"):
        VectorIndex.build(vectors, kind)
    with pytest.raises(NonFiniteTensor, match="row 13"):
        VectorIndex.build(unit(0, 20, 8), kind).search(vectors, 1)


def test_vectors_and_arguments_of_the_wrong_form_are_refused():
    index = VectorIndex.build(unit(0, 20, 8))
    with pytest.raises(ValueError, match="row 1 is not of unit length"):
        VectorIndex.build(unit(0, 2, 8) * np.float32([[1], [1.1]]))
    for call in (
        lambda: VectorIndex.build(np.ones(8, np.float32)),
        lambda: index.search(unit(0, 1, 7), 1),
        lambda: index.search(unit(0, 1, 8), 0),
        lambda: index.search(unit(0, 1, 8), 1, allow=[20]),
        lambda: index.search(unit(0, 1, 8), 1, exclude=[-1]),
    ):
        with pytest.raises(ValueError):
            call()


def test_an_empty_index_answers_with_nothing():
    index = VectorIndex.build(np.empty((0, 8), np.float32))
    assert index.search(unit(0, 2, 8), 3).positions.shape == (2, 0)
    assert VectorIndex.build(unit(0, 3, 8)).search(np.empty((0, 8), np.float32), 2).scores.shape == (0, 2)


def test_changing_the_array_after_the_build_changes_nothing():
    vectors = unit(0, 50, 8)
    index, query = VectorIndex.build(vectors), vectors[:1].copy()
    before = index.search(query, 5)
    vectors[:] = 0
    np.testing.assert_array_equal(index.search(query, 5).scores, before.scores)


def test_the_thread_count_is_the_calling_threads_own():
    index, seen = VectorIndex.build(unit(0, 50, 8)), []
    here = faiss.omp_get_max_threads()

    def search():
        index.search(unit(1, 1, 8), 1, num_threads=here + 3)
        seen.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert seen == [here + 3] and faiss.omp_get_max_threads() == here


def test_searching_while_the_reference_is_swapped_gives_whole_answers():
    kinds = ("flat", "hnsw")
    queries = unit(9, 4, 16)
    arrays = [unit(seed, 100 + 30 * seed, 16) for seed in range(4)]
    expected = {len(a): [reference(a, q, 5)[1].tolist() for q in queries] for a in arrays}
    current = VectorIndex.build(arrays[0])
    stop, wrong, counts = threading.Event(), [], [0] * 2

    def search(worker):
        while not stop.is_set():
            index = current
            found = index.search(queries, 5, num_threads=1).positions.tolist()
            counts[worker] += 1
            if index.kind == "flat" and found != expected[index.num_vectors]:
                wrong.append(found)

    threads = [threading.Thread(target=search, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for step in range(500):
        current = VectorIndex.build(arrays[step % 4], kinds[step % 2])
        if step >= 12 and min(counts) > 5:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and min(counts) > 0
