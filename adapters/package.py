"""An adapter package: a folder of four plain files, its rules and its digests.

    adapter_config.json         what the adapter is (adapters.config)
    adapter_model.safetensors   its tensors, heads included
    README.md                   model card
    probe.safetensors           a few inputs and the outputs they must give; may be absent

Knows files and tensors; knows neither registries nor stores. A package is read into memory once, so what is digested,
checked and used are the same bytes. Nothing here executes what a package holds.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import safetensors.torch
import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import (
    BackboneMismatch,
    Conflict,
    InvalidPackage,
    MissingPart,
    NonFiniteTensor,
    TensorMismatch,
    UnsafePath,
)
from adapters.families import family_of
from adapters.families.base import BackboneDims

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
PROBE_FILE = "probe.safetensors"
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE, README_FILE)
FILES = (*REQUIRED_FILES, PROBE_FILE)

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROBE_DTYPES = (*WEIGHT_DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool)
MAX_MEMBERS = 16  # of a tar: the files, their folder, and room for a tool that lists it twice
MAX_NAMED = 5  # tensors or files an error message spells out


@dataclass(frozen=True, eq=False)
class Package:
    """A package that passed every check. `path` is None while it was only ever in memory.

    `weights_digest` covers what changes numbers (tensors and `config.numeric()`), `package_digest` every file. `probe` is
    its tensors as stored (`adapters.probe` says what they must be), None where there is none.
    """

    path: Path | None
    config: AdapterConfig
    tensors: dict[str, Tensor]
    weights_digest: str
    package_digest: str
    probe: dict[str, Tensor] | None = None


def read_package(path: str | os.PathLike[str], *, dims: BackboneDims | None = None) -> Package:
    """Read and check the package in folder `path`; against a backbone's sizes too where `dims` are given.

    Raises: InvalidPackage or one of its kinds, naming what is wrong.
    """
    folder = Path(path)
    return replace(parse_package(read_files(folder), dims=dims), path=folder)


def write_package(
    path: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    readme: str,
    probe: Mapping[str, Tensor] | None,
) -> Package:
    """Write a package: all of it or nothing, and nothing that `read_package` would refuse. Same input, same bytes.

    Raises: Conflict when `path` exists and is not an empty folder; InvalidPackage.
    """
    files = package_files(config, tensors, readme)
    if probe is not None:
        files = with_probe(files, probe)
    package = parse_package(files)
    write_files(Path(path), files)
    return replace(package, path=Path(path))


def package_files(config: AdapterConfig, tensors: Mapping[str, Tensor], readme: str) -> dict[str, bytes]:
    """The files of a package without a probe, by name. Same input, same bytes. Raises: InvalidPackage."""
    check_tensors(config, tensors)
    return {
        CONFIG_FILE: _config_bytes(config),
        WEIGHTS_FILE: _tensor_bytes(tensors),
        README_FILE: readme.encode(),
    }


def with_probe(files: Mapping[str, bytes], probe: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The same files with this probe, in place of the one they had. Raises: InvalidPackage."""
    _check_probe(probe)
    return {**files, PROBE_FILE: _tensor_bytes(probe)}


def copy_package(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy the files of a package, unchecked but for which files there are.

    Raises: Conflict when `target` is taken; InvalidPackage, UnsafePath.
    """
    write_files(Path(target), read_files(Path(source)))


def read_probe(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """The probe of the package in folder `path`, or None when it carries none. Raises: InvalidPackage."""
    files = read_files(Path(path))
    return _parse_probe(files[PROBE_FILE]) if PROBE_FILE in files else None


class KnownDigests(NamedTuple):
    """What somebody else vouches for: the digest of the files, and that of their weights where they were parsed before."""

    package: str
    weights: str | None = None


def parse_package(
    files: Mapping[str, bytes], *, dims: BackboneDims | None = None, known: KnownDigests | None = None
) -> Package:
    """Check the files of a package, by name. Raises: see `read_package`.

    What is `known` of them saves reading all numbers once more, and twice again where they were parsed before.
    """
    _check_names(files)
    config = AdapterConfig.parse(files[CONFIG_FILE])
    tensors = _parse_tensors(files[WEIGHTS_FILE], WEIGHTS_FILE)
    check_names_and_shapes(config, tensors, dims)
    package, weights = known or (files_digest(files), None)
    if weights is None:
        _check_finite(tensors, WEIGHTS_FILE)
        weights = weights_digest(config, tensors)
    probe = _parse_probe(files[PROBE_FILE]) if PROBE_FILE in files else None
    return Package(None, config, tensors, weights, package, probe)


def check_tensors(config: AdapterConfig, tensors: Mapping[str, Tensor], dims: BackboneDims | None = None) -> None:
    """Refuse tensors that are not exactly those the config demands, in name, shape and dtype, or not finite.

    Raises: NonFiniteTensor; see `check_names_and_shapes`.
    """
    check_names_and_shapes(config, tensors, dims)
    _check_finite(tensors, WEIGHTS_FILE)


def check_names_and_shapes(
    config: AdapterConfig, tensors: Mapping[str, Tensor], dims: BackboneDims | None = None
) -> None:
    """Refuse tensors that are not exactly those the config demands, in name, shape and dtype.

    Raises: TensorMismatch; InvalidPackage for a wrong family, option or head; BackboneMismatch when `dims` are not the
    sizes the config names.
    """
    expected = expected_shapes(config, dims or family_of(config.family).derived_dims(config, tensors))
    wrong = [
        _listed("missing", expected.keys() - tensors.keys()),
        _listed("unexpected", tensors.keys() - expected.keys()),
        _listed(
            "of the wrong shape",
            (
                f"{name} {_shape(tensors[name].shape)} instead of {_shape(shape)}"
                for name, shape in expected.items()
                if name in tensors and tuple(tensors[name].shape) != shape
            ),
        ),
        _listed(
            "of a dtype other than float32, float16 and bfloat16",
            (f"{name} {_dtype(tensor)}" for name, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES),
        ),
    ]
    if any(wrong):
        raise TensorMismatch(f"tensors {'; '.join(filter(None, wrong))}", param=WEIGHTS_FILE)


def expected_shapes(config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a package of this config holds: the family's own and the heads it carries.

    Raises: InvalidPackage, BackboneMismatch.
    """
    if config.backbone.architecture != dims.architecture:
        raise BackboneMismatch(
            f"made for a backbone of kind {config.backbone.architecture}, not {dims.architecture}", param="backbone"
        )
    named = (config.backbone.width, config.backbone.layers)
    if named != (dims.width, dims.layers):
        raise BackboneMismatch(
            f"made for a backbone of width {named[0]} with {named[1]} layers, not width {dims.width} with {dims.layers}",
            param="backbone",
        )
    shapes = family_of(config.family).tensor_shapes(config, dims)
    heads = dims.head_shapes()
    for head in config.heads:
        if f"{head}.weight" not in heads:
            raise InvalidPackage(f"unknown head {head!r}", param="heads")
        shapes |= {name: heads[name] for name in (f"{head}.weight", f"{head}.bias")}
    if len(set(config.heads)) != len(config.heads):
        raise InvalidPackage("a head is listed twice", param="heads")
    return shapes


def check_backbone(config: AdapterConfig, parts: Mapping[str, str]) -> None:
    """Refuse an adapter unless the backbone's `parts` (name to digest) hold every part it was made for.

    Raises: MissingPart, BackboneMismatch; both name the part.
    """
    for part, digest in sorted(config.backbone.parts.items()):
        if part not in parts:
            raise MissingPart(f"the adapter needs the part {part!r}, which this backbone does not have", param=part)
        if parts[part] != digest:
            raise BackboneMismatch(
                f"the adapter was made for another {part!r}: {digest}, but the backbone's is {parts[part]}", param=part
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity.

    By its least and its largest number, which a NaN would be: on a CPU that takes a tenth of what `torch.isfinite` does.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    in_order = (
        tensor if tensor.ndim < 2 or tensor.is_contiguous() else tensor.mT
    )  # ten times as fast, if that is contiguous
    low, high = torch.aminmax(in_order.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and stored little-endian values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _frame(digest, json.dumps([name, _dtype(tensor), list(tensor.shape)]).encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        _frame(digest, flat.view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def weights_digest(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> str:
    """Digest of all that changes an adapter's numbers. Model card, provenance and probe are outside it."""
    digest = hashlib.sha256()
    _frame(digest, tensors_digest(tensors).encode())
    _frame(digest, json.dumps(config.numeric(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    return f"sha256:{digest.hexdigest()}"


def files_digest(files: Mapping[str, bytes]) -> str:
    """Digest of whole files: name, length and bytes of each, in the order of the names."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        _frame(digest, name.encode())
        _frame(digest, data)
    return f"sha256:{digest.hexdigest()}"


def read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of a package's files. Raises: InvalidPackage for other files or none, UnsafePath for a link."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        _check_names(entry.name for entry in entries)
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                raise UnsafePath(f"{entry.name} is not a regular file", param=entry.name)
        return {entry.name: _read_regular(entry.path) for entry in entries}
    except OSError as error:
        raise InvalidPackage(f"cannot read the package {str(folder)!r}: {error.strerror}", param="path") from error


def write_files(target: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `target` with these files, synced to disk, by one rename: it is there as a whole or not at all.

    Raises: Conflict when `target` exists and is not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise _taken(target)
    with _scratch_beside(target) as scratch:
        for name, data in files.items():
            _write_synced(scratch / name, data)
        _sync_folder(scratch)
        try:
            os.rename(scratch, target)
        except (FileExistsError, NotADirectoryError) as error:
            raise _taken(target) from error
        except OSError as error:
            if target.exists() and any(target.iterdir()):  # ENOTEMPTY: someone else was first
                raise _taken(target) from error
            raise
        _sync_folder(target.parent)


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Put one file of a package in the place of another, synced to disk: readers find the old or the new one, whole."""
    folder = folder.resolve()  # "." has no name to be beside
    with _scratch_beside(folder) as scratch:
        _write_synced(scratch / name, data)
        os.replace(scratch / name, folder / name)
        _sync_folder(folder)


def pack_tar(path: str | os.PathLike[str], stream: BinaryIO) -> None:
    """Write the package in folder `path` as an uncompressed tar: flat, without owner or times. Raises: InvalidPackage."""
    files = read_files(Path(path))
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        # The optional probe first: a tar cut short then always lacks a required file.
        for name in sorted(files, reverse=True):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, BytesIO(files[name]))


def unpack_tar(stream: BinaryIO, target: str | os.PathLike[str], *, max_bytes: int) -> None:
    """Unpack an uncompressed tar of one package, flat or in one top folder, into the new folder `target`.

    Reads at most `max_bytes` of the tar. What the files say is left to `read_package`.
    Raises: UnsafePath for links, devices and paths that leave the folder; InvalidPackage for any other file, a file
    given twice, a damaged tar or too many bytes; Conflict when `target` is taken.
    """
    limited = _Limited(stream, max_bytes)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, limited), mode="r|") as tar:
            files = _tar_files(tar)
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError) as error:
        raise InvalidPackage(f"not a readable tar: {error}") from error
    _check_names(files)
    write_files(Path(target), files)


class _Limited:
    """A stream that refuses to give more than `max_bytes`."""

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self.stream = stream
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.num_bytes += len(data)
        if self.num_bytes > self.max_bytes:
            raise InvalidPackage(f"the tar is larger than {self.max_bytes} bytes")
        return data


def _tar_files(tar: tarfile.TarFile) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    folder: list[str] | None = None
    for index, member in enumerate(tar):
        *parents, name = _member_parts(member)
        if index >= MAX_MEMBERS:
            raise InvalidPackage("the tar holds more members than a package has files")
        if member.isdir() and not parents:
            continue  # the top folder itself: no folder of the tar is ever made
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.issparse():
            raise UnsafePath(f"{member.name!r} in the tar is not a regular file", param=name)
        if len(parents) > 1 or (folder is not None and folder != parents):
            raise InvalidPackage("the tar must hold its files flat, or all in one folder")
        _check_known([name])
        if name in files:
            raise InvalidPackage(f"{name} is in the tar twice", param=name)
        folder = parents
        files[name] = _member_bytes(tar, member)
    return files


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = tar.extractfile(member)
    if source is None:  # a folder that bears the name of a file
        raise UnsafePath(f"{member.name!r} in the tar is not a regular file")
    return source.read()


def _member_parts(member: tarfile.TarInfo) -> list[str]:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        raise UnsafePath(f"{member.name!r} in the tar would leave its folder")
    return [part for part in parts if part not in ("", ".")] or [""]


def _check_names(names: Iterable[str]) -> None:
    present = set(names)
    _check_known(present)
    missing = [name for name in REQUIRED_FILES if name not in present]
    if missing:
        raise InvalidPackage(f"files {_listed('missing', missing)}", param=missing[0])


def _check_known(names: Iterable[str]) -> None:
    unexpected = sorted(set(names) - set(FILES))
    if unexpected:
        raise InvalidPackage(f"files {_listed('unexpected', map(repr, unexpected))}", param=unexpected[0])


def _parse_tensors(data: bytes, file: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, but also KeyError and TypeError for dtypes torch has no name for
        raise InvalidPackage(f"{file} is not a readable safetensors file: {error}", param=file) from error


def _parse_probe(data: bytes) -> dict[str, Tensor]:
    probe = _parse_tensors(data, PROBE_FILE)
    _check_probe(probe)
    return probe


def _check_probe(probe: Mapping[str, Tensor]) -> None:
    odd = _listed("of an unusual dtype", (name for name, tensor in probe.items() if tensor.dtype not in PROBE_DTYPES))
    if odd:
        raise TensorMismatch(f"tensors {odd}", param=PROBE_FILE)
    _check_finite(probe, PROBE_FILE)


def _check_finite(tensors: Mapping[str, Tensor], file: str) -> None:
    broken = _listed(
        "that hold NaN or an infinity", (name for name, tensor in tensors.items() if not is_finite(tensor))
    )
    if broken:
        raise NonFiniteTensor(f"tensors {broken}", param=file)


def _config_bytes(config: AdapterConfig) -> bytes:
    try:
        text = json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise InvalidPackage(f"{CONFIG_FILE}: {error}", param=CONFIG_FILE) from error
    return f"{text}\n".encode()


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    return safetensors.torch.save(own, metadata={"format": "pt"})


def _read_regular(path: str) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """An empty folder on the file system of `target`; whatever of it is left at the end goes away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _taken(target: Path) -> Conflict:
    return Conflict(f"{str(target)!r} exists and is not an empty folder", param="path")


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def _frame(digest: _Hash, data: bytes | memoryview) -> None:
    """Length before content, so that no two sequences of parts read alike."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _listed(what: str, items: Iterable[str]) -> str:
    """Like `missing: a, b and 3 more`; empty without items."""
    names = sorted(items)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{what}: {', '.join(names[:MAX_NAMED])}{more}" if names else ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
