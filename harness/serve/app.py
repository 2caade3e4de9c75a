"""The ASGI app of the live page: a few files, a few questions about runs, and their reports. It writes nothing.

An answer has an ETag, and where nothing changed since the page asked last, it is empty (304).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import lru_cache
from hashlib import blake2b
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from klab.grid import UserError
from klab.harness.serve import answers
from klab.harness.serve.guard import LOOPBACK, App, Guard
from klab.harness.serve.live_run import LiveRun
from klab.harness.serve.report_files import POLICY, open_report, pieces
from klab.harness.serve.runs_folder import RunsFolder
from klab.harness.serve.table import View
from klab.harness.serve.text import clipped

_STATIC = {
    "": ("klab.harness.serve", "static/index.html", "text/html; charset=utf-8"),
    "static/page.css": ("klab.reports", "templates/page.css", "text/css; charset=utf-8"),
    "static/live.css": ("klab.harness.serve", "static/live.css", "text/css; charset=utf-8"),
    **{
        f"static/{name}.js": ("klab.harness.serve", f"static/{name}.js", "text/javascript; charset=utf-8")
        for name in ("live", "overview", "run", "cell", "table", "curves", "dom")
    },
}
"""By path: package, file in it, type. The look is that of reports."""


def app(folder: RunsFolder, hosts: Collection[str] = LOOPBACK, addresses: bool = False, secret: str = "") -> App:
    """The app that shows a runs folder; `hosts`, `addresses` and `secret` as in `Guard`."""

    def about_run(ask: Callable[[LiveRun, Request], Any]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            def found() -> Any:
                live = folder.run(request.path_params["run"])
                with live.lock:
                    live.refresh()
                    return ask(live, request)

            return _answer(request, found)

        return endpoint

    def overview(request: Request) -> Response:
        view = View.from_query(request.query_params)
        return _answer(request, lambda: folder.overview(" ".join(view.words), view.page))

    def report(request: Request) -> Response:
        try:
            live = folder.run(request.path_params["run"])
            file, size, kind = open_report(live.run.path, request.path_params["path"])
        except (FileNotFoundError, NotADirectoryError):
            return _problem(404, "there is no such file in a report")
        except UserError as error:
            return _problem(403, str(error))
        headers = {"content-security-policy": POLICY, "content-length": str(size)}
        if kind == "application/pdf":
            headers["content-disposition"] = "attachment"
        return StreamingResponse(pieces(file, size), media_type=kind, headers=headers)

    routes = [
        *(Route(f"/{path}", _static(*where)) for path, where in _STATIC.items()),
        Route("/api/runs", overview),
        Route("/api/runs/{run}", about_run(lambda live, request: answers.run_answer(live))),
        Route("/api/runs/{run}/cells", about_run(lambda live, request: answers.cells_answer(live, _view(request)))),
        Route(
            "/api/runs/{run}/configurations",
            about_run(lambda live, request: answers.configurations_answer(live, _view(request))),
        ),
        Route("/api/runs/{run}/curves", about_run(_curves)),
        Route("/api/runs/{run}/completions", about_run(lambda live, request: answers.completions_answer(live))),
        Route("/api/runs/{run}/cells/{cell}", about_run(_cell)),
        Route("/runs/{run}/report", lambda request: RedirectResponse("report/")),
        Route("/runs/{run}/report/{path:path}", report),
    ]
    return Guard(Starlette(routes=routes), hosts, addresses, secret)


def _view(request: Request) -> View:
    return View.from_query(request.query_params, request.query_params.getlist("axis"))


def _curves(live: LiveRun, request: Request) -> Any:
    ids = request.query_params.getlist("id")
    return answers.curves_answer(live, request.query_params.get("by") == "cell", ids)


def _cell(live: LiveRun, request: Request) -> Any:
    found = answers.cell_answer(live, request.path_params["cell"])
    if found is None:
        raise FileNotFoundError(request.path_params["cell"])
    return found


def _answer(request: Request, find: Callable[[], Any]) -> Response:
    """What is found as JSON; nothing where the page has it already."""
    try:
        body = json.dumps(find(), separators=(",", ":"), allow_nan=False).encode()
    except FileNotFoundError:
        return _problem(404, "there is no such run or cell")
    except UserError as error:
        return _problem(422, str(error))
    except OSError as error:
        return _problem(503, f"cannot be read: {error}")
    except Exception as error:  # a stranger's files may be wrong in any way; other runs go on being shown
        return _problem(500, f"the files of this run cannot be read ({type(error).__name__})")
    return _tagged(request, body, "application/json")


def _problem(status: int, text: str) -> Response:
    return Response(json.dumps({"problem": clipped(text, 2000)}), status, media_type="application/json")


def _static(package: str, name: str, kind: str) -> Callable[[Request], Response]:
    return lambda request: _tagged(request, _resource(package, name), kind)


def _tagged(request: Request, body: bytes, kind: str) -> Response:
    tag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"etag": tag})
    return Response(body, media_type=kind, headers={"etag": tag})


@lru_cache(maxsize=32)
def _resource(package: str, name: str) -> bytes:
    return files(package).joinpath(name).read_bytes()
