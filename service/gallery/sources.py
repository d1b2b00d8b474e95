"""What shall go into a gallery: sources, read from a folder or from a manifest of lines.

Knows names, texts and where files lie; never opens a medium, so whether one can be embedded is for the build to find.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from adapters.config import Strict, describe
from adapters.errors import AdapterBankError, ConversionError, InvalidReference, UnsafePath
from service.gallery.files import canonical_json, stamp
from service.gallery.manifest import MAX_ID_CHARS, GalleryKind, check_item_id

_MEDIA_KINDS: dict[str, GalleryKind] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"), "video"),
}


@dataclass(frozen=True)
class Source:
    """One thing to embed: a media `file`, perhaps with a caption in `text`, or a `text` alone."""

    id: str
    kind: GalleryKind
    file: Path | None = None  # absolute; None for texts
    text: str | None = None
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)
    problem: str | None = None  # why it cannot go in, where that is known before its file is opened
    sha256: str | None = None  # what the file must be, sha256:...; None: whatever it is


class _Line(Strict):
    """One line of a source manifest."""

    model_config = ConfigDict(strict=True)

    id: str | None = None
    file: str | None = None
    text: str | None = None
    caption: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


def read_sources(path: Path, kind: GalleryKind | None = None) -> list[Source]:
    """What a folder or a manifest names, in order; every source is of one kind.

    A folder: all pictures or clips below it by extension, sorted by relative path (the id); hidden names are skipped, and so are files
    of another kind where `kind` is given. A file whose path cannot be an id (not UTF-8, say) gets an escaped one and a `problem`.
    A manifest, NAME.jsonl: lines {"file": ...} or {"text": ...} with optional "id", "metadata" and, for a file, "caption"; files are
    relative to the manifest's folder, ids default to the file as written or to the line number.
    Whether files exist is for the build to find: one that is missing is quarantined, not fatal.
    Raises: ConversionError, for a manifest with the line's number.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        placed = list(_folder_sources(path, kind))
    elif path.suffix == ".jsonl" and path.is_file():
        placed = list(_manifest_sources(path))
    else:
        raise ConversionError(f"{path.name} is neither a folder nor a .jsonl file", param="source")
    _check_unique(placed)
    kinds = {source.kind for _, source in placed}
    if not placed:
        raise ConversionError(f"{path.name} holds nothing to embed", param="source")
    if len(kinds) > 1 or (kind is not None and kinds != {kind}):
        wanted = f"{kind} items" if kind else "one kind of item"
        raise ConversionError(
            f"{path.name} holds {' and '.join(sorted(kinds))} items; a gallery holds {wanted}", param="source"
        )
    return [source for _, source in placed]


def allowed_path(wanted: str, folders: Sequence[Path]) -> Path:
    """The folder or manifest that a source names, links followed: an absolute path, or one below one of these folders.

    What lies elsewhere is refused alike, whether it exists or not.
    Raises: UnsafePath, ConversionError when it lies in one of the folders and is neither.
    """
    roots = [folder.resolve() for folder in folders]
    found = [path for root in roots if (path := _resolved(root / wanted)) is not None and _is_within(path, roots)]
    if not found:
        raise UnsafePath("the source lies outside the folders that BANK_GALLERY_SOURCES names", param="source")
    for path in found:
        if os.path.isdir(path) or (path.suffix == ".jsonl" and os.path.isfile(path)):
            return path
    raise ConversionError(f"{found[0].name[:MAX_ID_CHARS]} is neither a folder nor a .jsonl file", param="source")


def confined(sources: Iterable[Source], folders: Sequence[Path]) -> list[Source]:
    """Sources with links followed; one whose file lies outside of these folders gets a `problem`, and is not opened."""
    roots = [folder.resolve() for folder in folders]
    return [source if source.file is None else _confined(source, source.file, roots) for source in sources]


def _confined(source: Source, file: Path, roots: Sequence[Path]) -> Source:
    path = _resolved(file)
    if path is not None and _is_within(path, roots):
        return replace(source, file=path)
    problem = source.problem or "its file lies outside the folders that galleries may be built from"
    return replace(source, file=None, problem=problem)


def _resolved(path: Path) -> Path | None:
    """With links followed; None where that leads nowhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop, or a name no file can have
        return None


def _is_within(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def sources_digest(sources: Iterable[Source]) -> str:
    """A digest, sha256:..., of ids, texts, metadata, and path, size, time and expected digest of files: changes when a build would."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(canonical_json([*_describe_source(source), *stamp(source.file)]) + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _folder_sources(folder: Path, kind: GalleryKind | None) -> Iterator[tuple[str, Source]]:
    """(where it was found, source), sorted by relative path."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    for file in sorted(found, key=lambda file: file.relative_to(folder).as_posix()):
        media_kind = _MEDIA_KINDS.get(file.suffix.lower())
        if media_kind is None or media_kind != (kind or media_kind):
            continue
        source = _file_source(file.relative_to(folder).as_posix(), media_kind, file)
        yield source.id, source


def _file_source(relative: str, kind: GalleryKind, file: Path) -> Source:
    try:
        return Source(check_item_id(relative), kind, file)
    except InvalidReference as error:
        problem = error.message if _is_utf8(relative) else "its name is not UTF-8"
        return Source(_escaped(relative), kind, file, problem=problem)


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _escaped(name: str) -> str:
    """An id that shows a name which cannot be one: the byte e9 as `\\xe9`, a line feed as `\\n`, and a digest for what has to be cut off."""
    raw = os.fsencode(name)
    text = raw.decode("utf-8", "backslashreplace")
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if len(text) <= MAX_ID_CHARS:
        return text
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return f"{text[: MAX_ID_CHARS - 1 - len(digest)]}…{digest}"


def _manifest_sources(manifest: Path) -> Iterator[tuple[str, Source]]:
    for number, line in enumerate(manifest.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            place = f"{manifest.name} line {number}"
            with _source_errors(place):
                yield place, _line_source(_Line.model_validate_json(line), number, manifest.parent)


def _line_source(line: _Line, number: int, folder: Path) -> Source:
    canonical_json(line.metadata)  # refuses NaN and lone surrogates
    if (line.file is None) == (line.text is None):
        raise ConversionError("needs either 'file' or 'text'")
    if line.file is None:
        if line.caption is not None:
            raise ConversionError("'caption' belongs to a file; a text is its own")
        if not (line.text or "").strip():
            raise ConversionError("'text' is empty")
        return Source(
            check_item_id(str(number) if line.id is None else line.id), "text", None, line.text, line.metadata
        )
    kind = _MEDIA_KINDS.get(PurePosixPath(line.file).suffix.lower())
    if kind is None or "\0" in line.file:
        raise ConversionError(f"{line.file!a} has no extension of a picture or clip we read")
    item_id = line.id if line.id is not None else PurePosixPath(line.file).as_posix()
    return Source(check_item_id(item_id), kind, Path(os.path.abspath(folder / line.file)), line.caption, line.metadata)


@contextmanager
def _source_errors(place: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConversionError(f"{place}: {describe(error)}", param="source") from error
    except AdapterBankError as error:
        raise ConversionError(f"{place}: {error.message}", param="source") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{place}: {error}", param="source") from error


def _check_unique(placed: Sequence[tuple[str, Source]]) -> None:
    seen: dict[str, str] = {}
    for place, source in placed:
        if source.id in seen:
            raise ConversionError(f"{seen[source.id]} and {place} both have the id {source.id!r}", param="source")
        seen[source.id] = place


def _describe_source(source: Source) -> list[JsonValue]:
    file = None if source.file is None else os.fsencode(source.file).hex()
    return [source.id, source.kind, file, source.text, dict(source.metadata), source.sha256]
