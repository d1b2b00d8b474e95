"""Errors only a running server meets. Below `adapters.errors.AdapterBankError`:

AdapterBankError
├── Unauthenticated     no key was shown, or one that is unknown or has expired
├── Forbidden           the key is known, and not for this
├── Overloaded          no budget for this request now; come back after `retry_after_s`
├── TooLarge            this request alone exceeds a limit, whenever it comes
├── DeadlineExceeded    the request's deadline passed before its answer was ready
├── NoFreeSlot          every slot of the bucket is leased
├── NotReady            the server is starting, draining or lost its device
├── BadMedia            the picture, clip or sound cannot be used
│   ├── UnsupportedMedia    not a format we read
│   ├── CorruptMedia        bytes that claim a format and break it
│   ├── MediaTooLarge       above a limit of bytes, pixels, frames or duration
│   └── MediaTimeout        decoding took longer than allowed and was killed
├── BadQuery            text that cannot be encoded (empty, too long, unknown option)
├── GalleryNotFound     no such gallery, version or item (below NotFound)
├── GalleryBusy         another process is building it (below Conflict)
├── IndexStale          a query's embedding key is not the gallery's (below Conflict)
├── MissingMedia        a gallery item's media file is gone or changed
├── InsufficientRoom    no disk or memory for what was asked
├── AdapterDamaged      a registered adapter's stored files are gone or broken
├── GalleryDamaged      a gallery version's stored files are gone, broken or another version's
└── EngineFailed        the device thread met an error that is not the request's fault
"""

from typing import Literal

from adapters.errors import AdapterBankError, Conflict, NotFound


class Unauthenticated(AdapterBankError):
    """Nobody known asks. `reason` is for counting."""

    def __init__(self, message: str, *, reason: Literal["missing", "unknown", "expired"]) -> None:
        super().__init__(message)
        self.reason = reason


class Forbidden(AdapterBankError):
    """Somebody known asks for what they may not do (`scope`), or with an adapter they may not use (`pattern`)."""

    def __init__(self, message: str, *, reason: Literal["scope", "pattern"], param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.reason = reason


class Overloaded(AdapterBankError):
    """No budget for this request now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(AdapterBankError):
    """One request above a whole budget or byte limit: waiting would not help."""


class DeadlineExceeded(AdapterBankError):
    """The deadline passed before the answer was ready."""


class NoFreeSlot(AdapterBankError):
    """Every slot of the adapter's rank bucket is leased at this moment."""


class NotReady(AdapterBankError):
    """The server is starting, draining, or cannot run its device."""


class BadMedia(AdapterBankError):
    """The picture, clip or sound cannot be used.

    `worker_died`: nobody looked at it to the end, for the process that did was killed or crashed. Mostly the medium's fault,
    and sometimes that of whoever killed it: the same medium may be fine at another try.
    """

    def __init__(self, message: str, *, param: str | None = None, worker_died: bool = False) -> None:
        super().__init__(message, param=param)
        self.worker_died = worker_died


class UnsupportedMedia(BadMedia):
    """The bytes are in no format we read."""


class CorruptMedia(BadMedia):
    """The bytes claim a format and break it, or hold nothing to look at."""


class MediaTooLarge(BadMedia):
    """A limit of bytes, pixels, frames or duration is exceeded."""


class MediaTimeout(BadMedia):
    """Decoding did not end in time; its worker was killed."""


class BadQuery(AdapterBankError):
    """Text that cannot be encoded, or an option the adapter does not offer."""


class GalleryNotFound(NotFound):
    """No such gallery, gallery version or item."""


class GalleryBusy(Conflict):
    """Another process holds the gallery's build lock."""


class IndexStale(Conflict):
    """The query would be embedded with another key than the gallery's vectors."""


class MissingMedia(AdapterBankError):
    """A gallery item's media file is gone, or its bytes changed since it was embedded."""


class InsufficientRoom(AdapterBankError):
    """There is not enough disk or memory for what was asked."""


class AdapterDamaged(AdapterBankError):
    """A registered adapter cannot be loaded: its stored files are gone or broken. The server's fault, not the request's."""


class GalleryDamaged(AdapterBankError):
    """A gallery version cannot be opened: its stored files are gone, broken or another version's. The server's fault."""


class EngineFailed(AdapterBankError):
    """The device thread failed for a reason that is not this request's."""
