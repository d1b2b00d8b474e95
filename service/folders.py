"""What is where in a home folder, and how its registry is opened. Light: no torch, no server."""

from dataclasses import dataclass
from pathlib import Path

from adapters import registry
from adapters.registry import Registry
from service.config import Settings


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
