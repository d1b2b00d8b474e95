"""Nearest unit vectors by inner product, through FAISS. Knows positions and scores, nothing of items, names or files of a gallery.

A `VectorIndex` never changes once made, so any number of threads search it without a lock (adding to a FAISS index under search
crashes the process). To change a collection, build another index and swap the reference.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss as typed_faiss
import numpy as np
import numpy.typing as npt

from adapters.errors import DigestMismatch, NonFiniteTensor
from service.gallery.frames import Floats, Ints

IndexKind = Literal["flat", "hnsw"]

faiss: Any = typed_faiss  # the stubs it ships describe another API than the module has (search parameters, selectors)

_HNSW_NEIGHBOURS = 32
_HNSW_EF_CONSTRUCTION = 200
_MIN_EF_SEARCH = 64
_SPARE_HITS = 8  # asked for beyond k, so that most ties at the k-th place are seen at once
_UNIT_TOLERANCE = 1e-3
_ROWS_AT_ONCE = 16_384  # bounds the float64 copies of scans: 32 MiB at 256 dimensions


class SearchResult(NamedTuple):
    """Best first. k' = min(k, number of positions searched)."""

    scores: Floats  # [Q, k']
    positions: Ints  # [Q, k']


class VectorIndex:
    """N unit vectors [N, E]: `flat` compares with all of them, `hnsw` walks a graph and may miss some.

    Scores of hits are recomputed from the vectors in float64 and rounded once, so they depend neither on k nor on the other queries
    of a call, and equal vectors score alike. Order is by (-score, position): of equal scores the lower position comes
    first **and is the one kept at the k-th place**. `flat` keeps that promise for any number of ties; `hnsw` among the hits its walk met.
    """

    def __init__(self, index: Any, flat: Any, kind: IndexKind) -> None:
        self.kind = kind
        self.num_vectors = int(flat.ntotal)
        self.dimension = int(flat.d)
        self._index = index
        self._flat = flat
        self._vectors = _view(flat)  # never handed out: valid only while the two above live
        # FAISS sums E products in float32: its scores of unit vectors are off by less than E half-epsilons; twice that, for good measure.
        self._slack = self.dimension * float(np.finfo(np.float32).eps)

    @classmethod
    def build(cls, vectors: Floats, kind: IndexKind = "flat", *, num_threads: int | None = None) -> "VectorIndex":
        """Copy `vectors` [N, E] float32 into a new index.

        Raises: NonFiniteTensor for NaN or infinities, ValueError for vectors that are not of unit length.
        """
        _check_vectors(vectors)
        _use_threads(num_threads)
        if kind == "flat":
            flat = _flat_index(vectors)
            return cls(flat, flat, kind)
        graph = faiss.IndexHNSWFlat(vectors.shape[1], _HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = _HNSW_EF_CONSTRUCTION
        graph.add(np.ascontiguousarray(vectors, np.float32))
        return cls(graph, faiss.downcast_index(graph.storage), kind)

    @classmethod
    def load(cls, path: Path, vectors: Floats) -> "VectorIndex":
        """The `hnsw` index saved at `path` over the vectors it was built from. A `flat` index is simply built again.

        Raises: DigestMismatch for a file that is no graph over this many vectors.
        """
        try:
            graph = faiss.read_index(str(path))
        except RuntimeError as error:
            raise DigestMismatch(f"{path.name} is not a readable index", param=path.name) from error
        fits = isinstance(graph, faiss.IndexHNSWFlat) and (graph.ntotal, graph.d) == vectors.shape
        if not fits or graph.storage is not None:
            raise DigestMismatch(f"{path.name} is no hnsw index over vectors of shape {vectors.shape}", param=path.name)
        _check_vectors(vectors)
        flat = _flat_index(vectors)
        graph.storage, graph.own_fields = flat, False  # `flat` stays ours to free
        return cls(graph, flat, "hnsw")

    def save(self, path: Path) -> None:
        """Write the graph without the vectors, which the gallery keeps anyway. Only for `hnsw`."""
        if self.kind != "hnsw":
            raise ValueError("a flat index is its vectors: there is nothing else to save")
        faiss.write_index(self._index, str(path), faiss.IO_FLAG_SKIP_STORAGE)

    def search(
        self,
        queries: Floats,
        k: int,
        *,
        ef_search: int | None = None,
        allow: npt.ArrayLike | None = None,
        exclude: npt.ArrayLike | None = None,
        num_threads: int | None = None,
    ) -> SearchResult:
        """The k best positions for each of `queries` [Q, E] (unit length).

        `allow` and `exclude` are positions: search only these, never those. `ef_search` (`hnsw` only): how many candidates
        the walk keeps, more being slower and surer. `num_threads` is set for the calling thread, where it stays: FAISS keeps one count
        per thread.
        """
        queries = self._checked_queries(queries)
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        allowed = self._allowed(allow, exclude)
        num_allowed = self.num_vectors if allowed is None else int(allowed.sum())
        k = min(k, num_allowed)
        if k == 0 or len(queries) == 0:
            return SearchResult(np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64))
        _use_threads(num_threads)
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        num_asked = min(k + _SPARE_HITS, num_allowed)
        parameters = self._parameters(selector, num_asked, ef_search)
        raw_scores, raw_positions = self._index.search(queries, num_asked, params=parameters)
        rows = []
        for query, worst, found in zip(queries, raw_scores[:, -1], raw_positions, strict=True):
            if found[-1] < 0:  # the walk ended before it had met enough: look at everything
                rows.append(self._scan(query, k, allowed))
                continue
            hits = self._ranked(query, found, k)
            if self.kind == "flat" and num_asked < num_allowed and worst + self._slack >= hits[0][-1]:
                hits = self._with_all_ties(query, float(hits[0][-1]), k, selector)
            rows.append(hits)
        return SearchResult(np.stack([scores for scores, _ in rows]), np.stack([positions for _, positions in rows]))

    def _parameters(self, selector: object, num_asked: int, ef_search: int | None) -> Any:
        """Settings of one call. The shared index itself is never touched."""
        if self.kind == "flat":
            return faiss.SearchParameters(sel=selector)
        ef_search = max(_MIN_EF_SEARCH, 2 * num_asked) if ef_search is None else max(ef_search, num_asked)
        return faiss.SearchParametersHNSW(sel=selector, efSearch=ef_search)

    def _with_all_ties(self, query: Floats, kth_score: float, k: int, selector: object) -> tuple[Floats, Ints]:
        """Rank everything that may reach the k-th score: FAISS keeps any of many equal hits, not the lowest positions."""
        parameters = faiss.SearchParameters(sel=selector)
        _, _, found = self._flat.range_search(query[None], kth_score - self._slack, params=parameters)
        return self._ranked(query, found, k)

    def _scan(self, query: Floats, k: int, allowed: npt.NDArray[np.bool_] | None) -> tuple[Floats, Ints]:
        return self._ranked(query, np.arange(self.num_vectors) if allowed is None else np.flatnonzero(allowed), k)

    def _ranked(self, query: Floats, positions: Ints, k: int) -> tuple[Floats, Ints]:
        scores = np.empty(len(positions), np.float32)
        for start in range(0, len(positions), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            products = self._vectors[positions[rows]].astype(np.float64) * query
            scores[rows] = products.sum(axis=1)
        best = np.lexsort((positions, -scores))[:k]
        return scores[best], positions[best].astype(np.int64)

    def _checked_queries(self, queries: Floats) -> Floats:
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"queries must be [Q, {self.dimension}], not {list(queries.shape)}")
        _check_unit(queries, "queries")
        return np.ascontiguousarray(queries, np.float32)

    def _allowed(self, allow: npt.ArrayLike | None, exclude: npt.ArrayLike | None) -> npt.NDArray[np.bool_] | None:
        if allow is None and exclude is None:
            return None
        allowed = np.full(self.num_vectors, allow is None)
        if allow is not None:
            allowed[self._checked_positions(allow)] = True
        if exclude is not None:
            allowed[self._checked_positions(exclude)] = False
        return allowed

    def _checked_positions(self, positions: npt.ArrayLike) -> Ints:
        checked = np.asarray(positions, np.int64).reshape(-1)
        if ((checked < 0) | (checked >= self.num_vectors)).any():
            raise ValueError(f"positions must be from 0 to {self.num_vectors - 1}")
        return checked


def _check_vectors(vectors: Floats) -> None:
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"vectors must be [N, E], not {list(vectors.shape)}")
    _check_unit(vectors, "vectors")


def _flat_index(vectors: Floats) -> Any:
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(np.ascontiguousarray(vectors, np.float32))
    return flat


def _view(flat: Any) -> Floats:
    """[N, E] over the index's own memory."""
    if flat.ntotal == 0:
        return np.empty((0, flat.d), np.float32)
    view: Floats = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    return view


def _check_unit(vectors: Floats, what: str) -> None:
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        norms = np.linalg.norm(np.asarray(vectors[start : start + _ROWS_AT_ONCE], np.float64), axis=1)
        finite = np.isfinite(norms)
        if not finite.all():
            raise NonFiniteTensor(f"{what}: row {start + int(finite.argmin())} holds NaN or an infinity", param=what)
        errors = np.abs(norms - 1)
        if (errors > _UNIT_TOLERANCE).any():
            raise ValueError(f"{what}: row {start + int(errors.argmax())} is not of unit length")


def _use_threads(num_threads: int | None) -> None:
    if num_threads is not None and num_threads != faiss.omp_get_max_threads():
        faiss.omp_set_num_threads(num_threads)
