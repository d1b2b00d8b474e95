"""Packages from elsewhere: the files of one, below any URL that fsspec opens."""

import os
from pathlib import Path

from adapters.artifacts.objects import open_objects
from adapters.errors import ArtifactNotFound, InvalidPackage
from adapters.package import FILES, REQUIRED_FILES, write_files


def fetch_package(url: str, target: str | os.PathLike[str], *, max_bytes: int) -> None:
    """Copy the package below a URL into the new folder `target`; other files there stay where they are.

    What the files say is left to `read_package`.
    Raises: InvalidReference for a URL nothing opens; ArtifactNotFound when a file is missing; InvalidPackage when they
    are too large; ArtifactUnavailable; Conflict when `target` is taken.
    """
    objects = open_objects(url)
    there = {name: info for name, info in objects.find("").items() if name in FILES}
    missing = [name for name in REQUIRED_FILES if name not in there]
    if missing:
        raise ArtifactNotFound(f"{objects.url} holds no {', '.join(missing)}", param="source")
    num_bytes = sum(info.num_bytes for info in there.values())
    if num_bytes > max_bytes:
        raise InvalidPackage(f"the package is larger than {max_bytes} bytes", param="source")
    files = {name: b"".join(objects.chunks(name, info.num_bytes)) for name, info in there.items()}
    write_files(Path(target), files)
