"""The command `serve`: a server that answers /health while its model loads, and drains when it is told to end. Knows
uvicorn, signals and the command line; knows nothing of requests. Imports torch late.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve import flags
from duoserve.core import Refusal
from duoserve.flags import engine_options
from duoserve.pulse import pulsing

if TYPE_CHECKING:
    from uvicorn import Server

    from duoserve.api.host import Host

DRAIN_S, AFTER_S = 30.0, 3.0  # for those under way to end; for their last words to leave
SWITCH_S = 0.0005  # the model's thread lets the one that answers run: Python's 5 ms are longer than a layer
STALL_MS = 60_000  # how long a peer may leave what was sent unread before its connection is cut


@engine_options(ctx="Tokens of context of each request, such as 4096 or 32k.")
def serve(
    model: flags.Model = None,
    *,
    host: Annotated[str, typer.Option(help="Where to listen. Beyond this machine only with --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DUOSERVE_API_KEY", show_default=False, help="What callers must send.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=256, help="Requests answered at once; plans memory for each.")
    ] = 4,
    queue: Annotated[int, typer.Option(min=0, max=100_000, help="Requests that may wait.")] = 64,
    per_client: Annotated[
        int, typer.Option(min=1, max=100_000, help="Requests of one address (or of one `user` there) at once.")
    ] = 8,
    name: Annotated[str | None, typer.Option(help="What callers say in `model`. Default: as MODEL.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name that Host may have.")] = None,
    drain: Annotated[float, typer.Option(min=0, max=3600, help="Seconds for answers to end on SIGTERM.")] = DRAIN_S,
    options: dict[str, Any],
    predictor: flags.PredictorName = None,
) -> None:
    """Serve a model with OpenAI's API, /metrics and a page, on this machine unless told otherwise."""
    options["sequences"] = parallel
    sys.setswitchinterval(SWITCH_S)
    _check_key(host, api_key)
    with _listening(host, port) as listener:
        from duoserve.api.host import Host
        from duoserve.api.limits import door

        serving = Host(name or _name(model))
        limits = {"active": parallel, "queue": queue, "per_client": per_client}
        where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"{serving.name} on {where} (loading; Ctrl-C ends it)", file=sys.stderr, flush=True)
        guard = door(host, api_key, allow_host or ())
        _run(serving, guard, listener, drain, lambda: _load(serving, model, predictor, options, limits))


def _check_key(host: str, api_key: str | None) -> None:
    if api_key is not None and not (8 <= len(api_key) <= 512 and api_key.isascii() and api_key.isprintable()):
        raise Refusal("E_OPTION", f"the API key has {len(api_key)} characters", "give 8 to 512 of plain ASCII")
    from ipaddress import ip_address

    with contextlib.suppress(ValueError):
        if ip_address(host).is_loopback:
            return
    if host != "localhost" and api_key is None:
        raise Refusal("E_OPTION", f"--host {host} is reached by others, and 0 keys are asked for", "add --api-key KEY")


def _name(model: str | None) -> str:
    if model is None:
        return "demo"
    path = Path(model)
    return path.resolve().name if path.exists() else model


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bound before anything is loaded. A peer that leaves everything unread is cut off by the kernel."""
    listener: socket.socket | None = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        what = f"{host} port {port} cannot be listened on ({error.strerror or error})"
        raise Refusal("E_PORT", what, "give another --port, or stop what listens there", 2) from error
    with listener:
        yield listener


def _load(
    host: Host, model: str | None, predictor: str | None, options: dict[str, Any], limits: dict[str, int]
) -> None:
    with pulsing(f"loading {host.name}") as pulse:
        import duoserve.api.handlers  # noqa: F401  (so that the first request need not wait for it)
        from duoserve.api import grammar
        from duoserve.opening import load
        from duoserve.service import Limits, Service

        def progress(done: int, total: int, what: str) -> None:
            host.progress(done, total, what)
            pulse.tell(done, total, what)

        engine = load(model, progress=progress, predictor=predictor, **options)
    service = Service(engine, Limits(**limits))
    host.ready(engine, service)
    what = f"{limits['active']} at once, {limits['queue']} may wait"
    print(f"{host.name} is ready: {what}", file=sys.stderr, flush=True)
    if engine.tokenizer is not None:
        grammar.begin(engine.tokenizer, sorted(service.ends))


def _run(host: Host, door: Any, listener: socket.socket, drain_s: float, load: Callable[[], None]) -> None:
    """Serve until a signal; what loading raised is raised here."""
    from duoserve.api.app import make_app

    server = make_server(make_app(host, door), host, drain_s)

    async def main() -> None:
        loading = asyncio.create_task(asyncio.to_thread(load))
        loading.add_done_callback(lambda task: setattr(server, "should_exit", server.should_exit or _failed(task)))
        await server.serve([listener])
        if not loading.done():  # reading a model cannot be interrupted; files are written so that they may be cut
            os._exit(0)
        loading.result()

    asyncio.run(main())
    if host.loaded is not None:
        host.loaded.service.close()
        host.loaded.engine.close()


def _failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None


def make_server(app: Any, host: Host, drain_s: float) -> Server:
    """uvicorn on h11, which drains the service first when it is told to end."""
    import uvicorn

    from duoserve.api.turnstile import entrance

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit  # a second signal does not wait
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            host.draining = True
            ended = asyncio.create_task(asyncio.to_thread(_drain, host, drain_s))
            await super().shutdown(sockets)
            await ended

    config = uvicorn.Config(
        app,
        http=entrance(app.state.turnstile),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
        timeout_graceful_shutdown=int(drain_s + AFTER_S),
    )
    return Draining(config)


def _drain(host: Host, drain_s: float) -> None:
    if host.loaded is not None:
        host.loaded.service.drain(drain_s)


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)
