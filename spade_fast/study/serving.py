"""The pages of a study: a small web server, on this machine unless told otherwise.

Starlette and uvicorn underneath: a well-kept HTTP parser with limits, routing, and a clean end on Ctrl-C, where
Python's own ``http.server`` warns of its use. Pages are whole documents without cookies, and work without JavaScript.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.files import held_file
from spade_fast.study.bundle import OpenBundle, Task, open_bundle
from spade_fast.study.journal import LONGEST, Choice, Journal, Participant, answers_file
from spade_fast.study.schedule import Question

_PORT = 8765
_MOST_BODY = 2048  # bytes of a form: the largest holds three short fields
_MOST_SECONDS = 10.0  # for sending a request
_MOST_HEADERS = 16 * 1024
_MOST_CONNECTIONS = 1024  # a browser has up to six; half of the files that the system allows, where those are fewer
_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def serve(
    bundle: str | os.PathLike[str],
    answers: str | os.PathLike[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = _PORT,
    public_name: str | None = None,
    most_participants: int = 1000,
    started: Callable[[str], None] | None = None,
) -> Journal:
    """Put the questions of a study to people, by their browsers, until Ctrl-C or SIGTERM.

    Every answer is on the disk before the next page is shown: a server that is killed and started again goes on where
    it was. Nothing is kept of a participant but a random code, which the participant can go on with, and how long each
    answer took.

    Parameters
    ----------
    bundle
        The folder that :func:`spade_fast.study.build` wrote.
    answers
        The file that answers are added to, one server at a time. Default: ``answers.jsonl`` in the bundle.
    host
        Address to listen at. Any other than this machine's own lets everybody in the network take part, unencrypted.
    port
        0 for any that is free.
    public_name
        The name by which people reach it, ``"study.example.org"``, where a proxy stands before it: requests that ask
        for it are answered as well.
    most_participants
        When so many people have come, nobody else is let in.
    started
        Called with the address of the first page, once people can come.

    Returns
    -------
    Journal
        All participants and answers.

    Raises
    ------
    InvalidInputError
        If the bundle or the answers cannot be used, another server writes to them, or the address cannot be had.
    """
    check_whole("most_participants", most_participants, 1)
    if check_whole("port", port, 0) > 65535:
        raise InvalidInputError(f"port must be within 0..65535, got {port}")
    if not isinstance(host, str) or not host:
        raise InvalidInputError(f"host must be an address, got {host!r}")
    study = open_bundle(bundle)
    file = answers_file(study, answers)
    hosts = None if public_name is None and not is_local(host) else _Hosts(public_name)
    with held_file(file), _listening(host, port) as listener, _ended_by_sigterm():
        journal = Journal(file, study)
        config = uvicorn.Config(
            make_app(study, journal, hosts=hosts, most_participants=most_participants),
            log_level="warning",
            access_log=False,  # which would keep addresses
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=_most_connections(),
            h11_max_incomplete_event_size=_MOST_HEADERS,
            http=_Connection,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        if started is not None:
            started(_address(listener, host))
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn passes on when it has ended
            uvicorn.Server(config).run(sockets=[listener])
        return journal


def make_app(
    study: OpenBundle, journal: Journal, *, hosts: Container[str] | None = None, most_participants: int = 1000
) -> ASGIApp:
    """The study as an ASGI application, for a server of one's own; see :func:`spade_fast.study.serve`.

    Parameters
    ----------
    study, journal
        What is asked, and what takes the answers: the file must be this process's alone.
    hosts
        Names by which it may be asked for, so that pages of other sites cannot reach it by names of theirs. Default:
        all.
    most_participants
        When so many people have come, nobody else is let in.
    """
    site = _Site(study, journal, most_participants, _templates())
    pages = resources.files("spade_fast") / "pages"
    routes = [
        Route("/", site.welcome, methods=["GET"]),
        Route("/join", site.join, methods=["POST"]),
        Route("/resume", site.resume, methods=["POST"]),
        Route("/p/{code}", site.question, methods=["GET"]),
        Route("/p/{code}", site.answer, methods=["POST"]),
        Route("/media/{medium}", site.picture, methods=["GET"]),
        Route("/favicon.ico", _file(b"", "image/x-icon"), methods=["GET"]),
        Route("/study.css", _file((pages / "study.css").read_bytes(), "text/css"), methods=["GET"]),
        Route("/study.js", _file((pages / "study.js").read_bytes(), "text/javascript"), methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: site.problem, InvalidInputError: site.unwritten}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)


@dataclass(frozen=True)
class _Site:
    """What the addresses answer."""

    study: OpenBundle
    journal: Journal
    most_participants: int
    templates: jinja2.Environment

    async def welcome(self, _: Request) -> Response:
        return self._page("welcome.html", questions=self._count(), is_full=self._is_full())

    async def join(self, request: Request) -> Response:
        await _form(request)
        participant = await run_in_threadpool(self.journal.join, most=self.most_participants)
        if participant is None:
            raise HTTPException(403, "This study has all the participants it needs. Thank you for your interest.")
        return _see(participant)

    async def resume(self, request: Request) -> Response:
        code = (await _form(request)).get("code", "")
        participant = self.journal.find(code)
        if participant is None:
            return self._page(
                "welcome.html", status=404, questions=self._count(), is_full=self._is_full(), unknown=code[:32]
            )
        return _see(participant)

    async def question(self, request: Request) -> Response:
        participant = self._participant(request)
        number = participant.next_question
        code = participant.joined.participant
        if number is None:
            return self._page("finished.html", code=_spelt(code), questions=len(participant.joined.questions))
        asked = participant.joined.questions[number]
        task = self.study.bundle.tasks[asked.task]
        sides = (task.high, task.low) if asked.left == "high" else (task.low, task.high)
        return self._page(
            "question.html",
            code=_spelt(code),
            number=number,
            questions=len(participant.joined.questions),
            photo=task.photo,
            patches=sides,
            visualization=_shown_medium(task, asked),
        )

    async def answer(self, request: Request) -> Response:
        participant = self._participant(request)
        fields = await _form(request)
        choice = next((each for each in get_args(Choice) if each == fields.get("choice")), None)
        if choice is None or not _is_count(fields.get("question", "")):
            raise HTTPException(400, "This is no answer to the question. Please go back and choose once more.")
        time = fields.get("milliseconds", "")
        milliseconds = int(time) if _is_count(time) and int(time) <= LONGEST else None
        await run_in_threadpool(self.journal.answer, participant, int(fields["question"]), choice, milliseconds)
        return _see(participant)

    async def picture(self, request: Request) -> Response:
        try:
            png = await run_in_threadpool(self.study.picture, request.path_params["medium"])
        except InvalidInputError as error:
            raise HTTPException(404, "There is no such picture.") from error
        return Response(png, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})

    async def problem(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = error.detail if error.detail.endswith(".") else "There is no such page."
        page = self._page("problem.html", told=told, status=error.status_code)
        page.headers["connection"] = "close"  # what is still to come of the request is not waited for
        return page

    async def unwritten(self, _: Request, error: Exception) -> Response:
        """What went wrong is the researcher's to know, by the terminal, and not the participant's."""
        logging.getLogger("uvicorn.error").error("%s", error)
        told = "This could not be saved. Please tell those who run the study, and go back and try again."
        return self._page("problem.html", told=told, status=500)

    def _participant(self, request: Request) -> Participant:
        participant = self.journal.find(request.path_params["code"])
        if participant is None:
            raise HTTPException(404, "Nobody has this code. Please check it, and type it in once more.")
        return participant

    def _is_full(self) -> bool:
        return self.journal.people() >= self.most_participants

    def _count(self) -> int:
        return len(self.study.bundle.tasks) + self.study.bundle.checks

    def _page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        html = self.templates.get_template(template).render(**values)
        return HTMLResponse(html, status_code=status, headers={"cache-control": "no-store"})


class _Guard:
    """Adds headers to every answer, and refuses requests that only a page of another site would send."""

    def __init__(self, app: ASGIApp, hosts: Container[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        if scope["type"] != "http":
            return
        if refusal := self._refusal(Request(scope)):
            answer = Response(refusal, status_code=421, media_type="text/plain", headers={"connection": "close"})
            await answer(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> str | None:
        host = _hostname(f"//{request.headers.get('host', '')}")
        if self.hosts is not None and host not in self.hosts:
            return "This server is not for that name: ask for it by the address that it printed."
        origin = request.headers.get("origin")
        if request.method == "POST" and origin is not None and _hostname(origin) != host:
            own = self.hosts is not None and _hostname(origin) in self.hosts
            return None if own else "This comes from a page of another site."
        return None


class _Connection(H11Protocol):
    """A connection that is closed where a request does not come, or does not end, in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_MOST_SECONDS, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.more_body:
            self.transport.close()
        else:
            self.loop.call_later(_MOST_SECONDS, self._look)


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class _Hosts:
    """Names of this machine, as it knows itself, and one by which others know it."""

    def __init__(self, public_name: str | None) -> None:
        self._public_name = None if public_name is None else public_name.lower()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (is_local(name) or name == self._public_name)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end the server as Ctrl-C does; uvicorn passes it on when it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _most_connections() -> int:
    if resource is None:
        return _MOST_CONNECTIONS
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_CONNECTIONS if allowed < 0 else max(8, min(_MOST_CONNECTIONS, allowed // 2))


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, which is small and comes soon."""

    async def read() -> bytes:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BODY:
                raise HTTPException(413, "This is more than any answer needs.")
        return body

    try:
        body = await asyncio.wait_for(read(), _MOST_SECONDS)
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=8))
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise HTTPException(408, "Your answer did not arrive in time. Please go back and try again.") from error
    except (ValueError, ClientDisconnect) as error:
        raise HTTPException(400, "This is no form of this study. Please go back and try again.") from error


def _shown_medium(task: Task, question: Question) -> str:
    """The picture that stands where participants look for the network's reasons."""
    return {"dense": task.dense, "spade": task.spade, "high": task.high.medium, "low": task.low.medium}[question.shown]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12


def _see(participant: Participant) -> Response:
    return RedirectResponse(f"/p/{participant.joined.participant}", status_code=303)


def _spelt(code: str) -> str:
    return f"{code[:4]}-{code[4:]}"


def _file(content: bytes, media_type: str) -> Callable[[Request], Any]:
    async def answer(_: Request) -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return answer


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("spade_fast", "pages"), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot listen at {host!r}, port {port} ({reason}): choose another") from error


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(listener: socket.socket, host: str) -> str:
    if host in ("0.0.0.0", "::"):  # all that this machine has
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
