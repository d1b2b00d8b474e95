"""What is where in a home folder, and how its registry is opened. Light: no torch, no server."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters import registry
from adapters.registry import Registry
from service.config import Settings

PUSH_PREFIX = "adapter-bank-push-"


@dataclass(frozen=True)
class HomeFolders:
    """Where a home keeps what."""

    root: Path

    @property
    def registry(self) -> Path:
        """The SQLite file."""
        return self.root / "registry.sqlite"

    @property
    def registry_memory(self) -> Path:
        """What this host remembers of the registry."""
        return self.root / "registry-memory"

    @property
    def artifacts(self) -> Path:
        """Packages by digest."""
        return self.root / "artifacts"

    @property
    def artifact_cache(self) -> Path:
        """Packages that were read from a remote store."""
        return self.root / "artifact-cache"

    @property
    def galleries(self) -> Path:
        """Galleries by name."""
        return self.root / "galleries"


def open_registry(settings: Settings) -> Registry:
    """The registry of the settings, begun if there is none yet. Raises: RegistryUnavailable."""
    folders = HomeFolders(settings.home)
    settings.home.mkdir(parents=True, exist_ok=True)
    return registry.open_registry(settings.registry_url or folders.registry, memory=folders.registry_memory)


@contextmanager
def push_folder(home: Path) -> Iterator[Path]:
    """A folder for what is being pushed, gone when the block ends. That of a process which was killed is left behind."""
    with tempfile.TemporaryDirectory(prefix=PUSH_PREFIX, dir=home) as folder:
        with (Path(folder) / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)


def remove_abandoned_pushes(home: Path) -> None:
    """Remove what pushes left behind whose process is dead: nobody holds their lock."""
    for folder in home.glob(f"{PUSH_PREFIX}*"):
        with suppress(OSError), (folder / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
