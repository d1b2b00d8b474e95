"""Every error the project raises on purpose, rooted in one class.

    AdapterBankError
    ├── InvalidReference        a reference, name or alias is not of the allowed form
    ├── NotFound                a name, version, alias or digest that nobody registered
    │   ├── AdapterNotFound
    │   ├── BackboneNotFound
    │   └── ArtifactNotFound    a digest whose files are not in the store
    ├── Conflict                a write that lost against another one
    ├── InvalidPackage          an adapter package (or checkpoint) that must not be used
    │   ├── UnsafePath          a path or name that would leave its folder
    │   ├── TensorMismatch      a tensor is missing, unexpected or of the wrong shape
    │   ├── NonFiniteTensor     a tensor holds NaN or an infinity
    │   ├── DigestMismatch      the bytes are not the ones the digest names
    │   ├── BackboneMismatch    made for another backbone
    │   └── ProbeFailed         it does not compute what its probe says, or a tuned part of it does nothing
    ├── MissingPart             the backbone lacks a part (a decoder, say) the task needs
    ├── RankTooLarge            no slot bucket is wide enough for the adapter's rank
    ├── ConversionError         a foreign checkpoint or folder that cannot become ours
    ├── ArtifactUnavailable     the artifact store cannot be read or written now
    └── RegistryUnavailable     the registry cannot be read or written now
        └── RegistryLost        it is empty, or went back, or is another one than before

`service.errors` adds what only a running server meets. Inner layers raise these and know no HTTP; one table turns them into a status and a code.
"""


class AdapterBankError(Exception):
    """Root of every domain error. `param` names the offending field or argument, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidReference(AdapterBankError):
    """A reference, name or alias does not have the allowed form."""


class NotFound(AdapterBankError):
    """Something asked for by name does not exist."""


class AdapterNotFound(NotFound):
    """No such adapter name, version, alias or digest."""


class BackboneNotFound(NotFound):
    """No backbone folder where one was named."""


class ArtifactNotFound(NotFound):
    """A digest is registered but its files are not in the artifact store."""


class Conflict(AdapterBankError):
    """A write lost: the state it expected is no longer the state."""


class InvalidPackage(AdapterBankError):
    """A package or checkpoint breaks a rule and must not be used."""


class UnsafePath(InvalidPackage):
    """A file name or link would leave the folder it belongs to."""


class TensorMismatch(InvalidPackage):
    """A tensor is missing, unexpected, or has another shape or dtype than its family and config demand."""


class NonFiniteTensor(InvalidPackage):
    """A tensor holds NaN or an infinity."""


class DigestMismatch(InvalidPackage):
    """Stored bytes differ from the digest they are kept under."""


class BackboneMismatch(InvalidPackage):
    """An adapter belongs to another backbone, or a backbone part differs from the one it names."""


class ProbeFailed(InvalidPackage):
    """An adapter carries no probe, does not give the outputs its probe names, or has a tuned part that changes nothing."""


class MissingPart(AdapterBankError):
    """The backbone holds no such part, so it cannot serve the task."""


class RankTooLarge(AdapterBankError):
    """The adapter's rank is above the largest slot bucket."""


class ConversionError(AdapterBankError):
    """A foreign checkpoint or folder cannot be converted."""


class ArtifactUnavailable(AdapterBankError):
    """The artifact store cannot be read or written at the moment: no network, no driver for it, no room on the disk."""


class RegistryUnavailable(AdapterBankError):
    """The registry cannot be read or written at the moment."""


class RegistryLost(RegistryUnavailable):
    """The registry is empty, went back to an earlier state, or is another one: it must be restored, and nothing else may be written."""
