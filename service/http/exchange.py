"""One request and its reply: what the middleware begins, handlers add to and response headers tell."""

import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Scope

from service.auth import NOBODY
from service.config import Settings
from service.http.errors import RefusedRequest
from service.types import AdapterInfo, RequestContext

REQUEST_ID_HEADER = "X-Request-Id"
ROUTING_HEADER = "X-Routing-Key"
MAX_ROUTING_CHARS = 200  # what follows does not count
TIMEOUT_HEADER = "X-Request-Timeout-Ms"


@dataclass(slots=True)
class Exchange:
    """A request under way. `adapter` is set by handlers once it is known which one answered."""

    context: RequestContext
    adapter: AdapterInfo | None = None
    started_at: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, scope: Scope, settings: Settings) -> "Exchange":
        """With the client's request id where it sent a sane one, and the default deadline. Nobody asks until `Door` says who."""
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", given) else uuid.uuid4().hex
        client = scope["client"][0] if scope.get("client") else ""
        deadline = time.monotonic() + settings.default_timeout_ms / 1000
        context = RequestContext(deadline=deadline, client=client, request_id=request_id, principal=NOBODY)
        routing_key = Headers(scope=scope).get(ROUTING_HEADER)
        context.routing_key = request_id if routing_key is None else routing_key[:MAX_ROUTING_CHARS]
        return cls(context)

    def read_timeout(self, scope: Scope, settings: Settings) -> None:
        """Take the deadline the client asks for, capped. Raises: RefusedRequest when it is no positive number."""
        given = Headers(scope=scope).get(TIMEOUT_HEADER)
        if given is None:
            return
        if not re.fullmatch(r"[0-9]{1,12}", given) or int(given) == 0:
            raise RefusedRequest("must be a whole number of milliseconds above 0", param=TIMEOUT_HEADER)
        self.context.deadline = self.started_at + min(int(given), settings.max_timeout_ms) / 1000

    def headers(self) -> dict[str, str]:
        """What the reply tells besides its body."""
        headers = {REQUEST_ID_HEADER: self.context.request_id}
        if self.adapter is not None:
            version = "" if self.adapter.version is None else f"@{self.adapter.version}"
            headers["X-Adapter"] = self.adapter.name + version
        for stage, spent_ms in self.context.stage_ms.items():
            headers[f"X-Stage-{stage.replace('_', '-').title()}-Ms"] = f"{spent_ms:.2f}"
        timing = [f"{stage};dur={spent_ms:.2f}" for stage, spent_ms in self.context.stage_ms.items()]
        total_ms = 1000 * (time.monotonic() - self.started_at)
        headers["Server-Timing"] = ", ".join([*timing, f"total;dur={total_ms:.2f}"])
        return headers
