"""The short way from a request to its handler, past FastAPI's routing and its solving of dependencies.

A handler is declared once, as FastAPI wants it, and described from that; but what FastAPI does around a call costs
several times what a look-up of a job does. So a request for a route that needs nothing else solved, without a query or
with one taken as the text that it is, is matched by a dictionary and its arguments are taken by functions made at the
start. All others go FastAPI's way, and both give the same answers.

May import `errors`, `problems`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import FastAPI, Request, Response
from fastapi.params import Depends, Path, Query
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

import problems

Handler = Callable[[Request], Awaitable[Any]]


def handler_of(function: Callable[..., Any]) -> tuple[Handler, bool | None] | None:
    """`function` as one of the request alone, or None when it needs more; and whether what it takes of the request's
    query is nothing but plain text, None for nothing at all.

    It may take the request, parameters of the path that are text, parameters of the query that have a default, and what
    other such functions give.
    """
    if not inspect.iscoroutinefunction(function):
        return None
    plain: list[bool] = []
    hints = get_type_hints(function, include_extras=True)
    constants: dict[str, Any] = {}
    of_path: list[str] = []
    requests: list[str] = []
    of_query: list[str] = []
    asked: list[tuple[str, Handler]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        kind, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if kind is Request:
            requests.append(name)
        elif len(extra) == 1 and isinstance(extra[0], Path) and kind is str and not extra[0].metadata:
            of_path.append(name)
        elif len(extra) == 1 and isinstance(extra[0], Query) and parameter.default is not parameter.empty:
            constants[name] = parameter.default
            of_query.append(name)
            plain.append(kind == (str | None) and not extra[0].metadata)
        elif len(extra) == 1 and isinstance(extra[0], Depends) and extra[0].dependency is not None:
            found = handler_of(extra[0].dependency)
            if found is None:
                return None
            asked.append((name, found[0]))
            plain += [found[1]] if found[1] is not None else []
        else:
            return None

    async def handle(request: Request) -> Any:
        arguments = dict(constants)
        for name in requests:
            arguments[name] = request
        for name in of_path:
            arguments[name] = request.scope["path_params"][name]
        if request.scope["query_string"]:
            arguments.update({name: request.query_params[name] for name in of_query if name in request.query_params})
        for name, handler in asked:
            arguments[name] = await handler(request)
        return await function(**arguments)

    return handle, all(plain) if plain else None


class Direct:
    """An ASGI layer around the app: answers what can go the short way, and hands on the rest.

    Matched are paths without parameters and those whose one parameter is what follows the last slash.
    """

    def __init__(self, app: FastAPI, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes: dict[tuple[str, str], tuple[APIRoute, str, Handler, bool | None]] = {}
        for route in routes:
            if not isinstance(route, APIRoute):
                continue
            start, _, parameter = route.path.partition("{")
            described = handler_of(route.endpoint)
            if described is None or (
                parameter and (not start.endswith("/") or parameter.find("}") != len(parameter) - 1)
            ):
                continue
            for method in route.methods or ():
                self._routes[method, start] = (route, parameter[:-1], *described)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, value = scope["path"], ""
        found = self._routes.get((scope["method"], path))
        if found is None:
            cut = path.rfind("/") + 1
            path, value = path[:cut], path[cut:]
            found = self._routes.get((scope["method"], path))
        if found is None or bool(found[1]) != bool(value) or (scope["query_string"] and not found[3]):
            await self._app(scope, receive, send)
            return
        route, parameter, handler, _ = found
        scope["app"] = self._app
        scope["route"] = route
        scope["path_params"] = {parameter: value} if parameter else {}
        request = Request(scope, receive, send)
        try:
            response: Response = await handler(request)
        except Exception as error:
            answer = problems.answer(request, error)
            if answer is None:
                await problems.unexpected(request)(scope, receive, send)
                raise
            response = answer
        await response(scope, receive, send)
