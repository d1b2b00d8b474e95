"""Who may call which route: the one table of scopes, and the middleware that keeps it before a body is read.

A route that is not in the table is refused to everybody. Which adapters a key may use is checked here where the path names
one, and further below, where references are resolved: a handler cannot forget it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi.routing import RouteContext
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service import auth
from service.auth import LOCAL, NOBODY, Keychain, Principal
from service.config import Settings
from service.errors import Forbidden, Unauthenticated
from service.http.exchange import ROUTING_HEADER, Exchange
from service.metrics import Metrics

log = logging.getLogger(__name__)

KEY_HEADER = "X-API-Key"


@dataclass(frozen=True)
class Access:
    """What a route asks for: one of the scopes (`admin` is as good as any), or none where nothing private is given out.

    `whole`: it tells of all adapters, and is for keys that may use them all.
    """

    scopes: frozenset[auth.Scope] = frozenset()
    whole: bool = False


OPEN: Final = Access()
ASK: Final = Access(frozenset({"infer"}))
LIST: Final = Access(frozenset({"infer", "deploy"}))
DEPLOY: Final = Access(frozenset({"deploy"}))
ADMIN: Final = Access(frozenset({"admin"}), whole=True)
METRICS: Final = Access(frozenset({"metrics"}), whole=True)
ANY_KEY: Final = Access(frozenset(auth.SCOPES))

ADAPTER_PATH: Final = "/v1/adapters/{name}"  # what such a path names, the key must be allowed to use

ACCESS: Mapping[str, Access] = {
    "POST /vqa": ASK,
    "POST /v1/vqa": ASK,
    "POST /caption": ASK,
    "POST /v1/caption": ASK,
    "POST /retrieve": ASK,
    "POST /v1/retrieve": ASK,
    "GET /v1/adapters": LIST,
    "GET /v1/adapters/{name}": LIST,
    "PUT /v1/adapters/{name}": DEPLOY,
    "POST /v1/adapters/{name}/aliases/{alias}": DEPLOY,
    "POST /v1/adapters/{name}/aliases/{alias}/rollback": DEPLOY,
    "DELETE /v1/adapters/{name}/aliases/{alias}/canary": DEPLOY,
    "POST /v1/adapters/{name}/versions/{version}/retire": DEPLOY,
    "POST /v1/adapters/{name}/versions/{version}/reinstate": DEPLOY,
    "DELETE /v1/adapters/{name}/versions/{version}": DEPLOY,
    "POST /v1/adapters/{name}/versions/{version}/unload": DEPLOY,
    "GET /v1/operations": DEPLOY,
    "GET /v1/operations/{operation}": DEPLOY,
    "DELETE /v1/operations/{operation}": DEPLOY,
    "GET /v1/audit": ADMIN,
    "GET /v1/replicas": Access(frozenset({"deploy"}), whole=True),
    "GET /v1/galleries": LIST,
    "GET /v1/galleries/{name}": LIST,
    "POST /v1/galleries/{name}/builds": DEPLOY,
    "POST /v1/galleries/{name}/rebuild": DEPLOY,
    "DELETE /v1/galleries/{name}": DEPLOY,
    "DELETE /v1/galleries/{name}/versions/{version}": DEPLOY,
    "GET /v1/galleries/{name}/items": ASK,
    "GET /v1/galleries/{name}/items/{item_id}": ASK,
    "GET /v1/galleries/{name}/items/{item_id}/thumbnail": ASK,
    "GET /v1/galleries/{name}/items/{item_id}/media": ASK,
    "GET /metrics": METRICS,
    "GET /health/live": OPEN,
    "GET /health/ready": OPEN,  # its details are for those with a key
    "GET /openapi.json": OPEN,
    "GET /docs": OPEN,
    "GET /": OPEN,
    "GET /console/{path}": OPEN,
}


def access_of(method: str, path: str) -> Access | None:
    """What a route asks for, by its path as OpenAPI writes it; None when nobody said."""
    return ACCESS.get(f"{'GET' if method == 'HEAD' else method} {path}")


def open_keychain(settings: Settings) -> Keychain | None:
    """The keys of the settings; None when there are to be none. Raises: InvalidKeys."""
    if settings.api_keys_file is not None:
        return Keychain.of_file(settings.api_keys_file)
    return None if settings.api_keys is None else Keychain.of_text(settings.api_keys)


class Door:
    """Finds out who asks, and lets in whom the table lets in. Without keys everybody is `LOCAL`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Callable[[], Iterable[RouteContext]],
        keys: Keychain | None,
        metrics: Callable[[], Metrics],
    ) -> None:
        self.app = app
        self._routes = routes
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: Unauthenticated, Forbidden."""
        if scope["type"] == "websocket":  # there are none, so none has a scope
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
            await self.app(scope, receive, send)
        except (Unauthenticated, Forbidden) as error:  # of handlers too
            self._metrics().auth_failures.labels(error.reason).inc()
            raise

    def _admit(self, scope: Scope) -> None:
        """Note who asks, and with which fairness they are served. Raises: Unauthenticated, Forbidden."""
        route, parameters = self._route(scope)
        path = "" if route is None else route.path_format or ""
        needed: Access | None = ANY_KEY  # not even what is missing is for strangers
        if route is not None:
            scope["route"] = route  # for the metrics of a refusal
            needed = access_of(scope["method"], path)
        exchange: Exchange = scope["state"]["exchange"]
        principal = exchange.context.principal = self._principal(Headers(scope=scope), needed)
        if self._keys is not None and principal.is_known:
            exchange.context.client = principal.id
            if ROUTING_HEADER not in Headers(scope=scope):
                exchange.context.routing_key = principal.id
        if needed is None:
            log.error(
                "%s %s is refused: service/http/access.py declares no scope for it", scope["method"], scope["path"]
            )
            raise Forbidden("nobody may use this route: it has no declared scope", reason="scope")
        if needed.scopes and not principal.has_any(needed.scopes):
            raise Forbidden(f"this needs a key with the scope {' or '.join(sorted(needed.scopes))}", reason="scope")
        if needed.whole and not principal.sees_all:
            raise Forbidden("this tells of every adapter, and the key may use some", reason="pattern")
        if path.startswith(ADAPTER_PATH):
            principal.check_adapter(parameters["name"], param="name")

    def _route(self, scope: Scope) -> tuple[RouteContext | None, Mapping[str, Any]]:
        """The route that will answer, found as the router finds it, and the parameters in its path."""
        for route in self._routes():
            match, found = route.matches(scope)
            if match is Match.FULL:
                return route, found["path_params"]
        return None, {}

    def _principal(self, headers: Headers, needed: Access | None) -> Principal:
        """Who asks. On an open route a key that is not valid is as good as none. Raises: Unauthenticated."""
        if self._keys is None:
            return LOCAL
        try:
            return self._keys.authenticate(shown_key(headers))
        except Unauthenticated:
            if needed == OPEN:
                return NOBODY
            raise
        finally:
            self._metrics().api_keys_stale.set(self._keys.error is not None)


def shown_key(headers: Headers) -> str | None:
    """The key that a request shows, by `Authorization: Bearer` or `X-API-Key`. Raises: Unauthenticated for two that differ."""
    bearers = [value.partition(" ") for value in headers.getlist("authorization")]
    shown = {rest.strip() for scheme, _, rest in bearers if scheme.lower() == "bearer"}
    shown |= {value.strip() for value in headers.getlist(KEY_HEADER)}
    if len(shown) > 1:
        raise Unauthenticated("two different API keys were sent", reason="unknown")
    return next(iter(shown), None)
