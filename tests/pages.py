"""The page in a headless Chromium, before a stand-in for the server or the real one; the fixtures for it."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install '.[test]')")
uvicorn = pytest.importorskip("uvicorn")
from fastapi import Depends, FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

import duoserve  # noqa: E402
from duoserve.api.live import snapshot  # noqa: E402
from duoserve.api.page import add_page  # noqa: E402
from duoserve.service import Service  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
thorough = pytest.mark.slow  # a second or two each, and a minute in all where the machine is busy
KEY = "a-key-of-some-length"


class Script:
    """What the stand-in server says: pieces of text, each after so many seconds; or an error."""

    def __init__(self) -> None:
        self.pieces: list[str] = ["Hello ", "there."]
        self.pause_s = 0.0
        self.hold = threading.Event()  # while set, the answer stays open
        self.refusal: tuple[int, str] | None = None
        self.key: str | None = None
        self.model = "stand-in"
        self.loading = False
        self.asked: list[dict[str, Any]] = []
        self.left = 0  # answers that the reader went away from

    async def events(self) -> AsyncIterator[str]:
        whole = False
        try:
            yield self._chunk({"role": "assistant"})
            for piece in list(self.pieces):
                await asyncio.sleep(self.pause_s)
                yield self._chunk({"content": piece})
            while self.hold.is_set():
                await asyncio.sleep(0.01)
                yield ": still here\n\n"
            yield self._chunk({}, "stop")
            usage = {"prompt_tokens": 7, "completion_tokens": len(self.pieces), "total_tokens": 7 + len(self.pieces)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            whole = True
        finally:
            self.left += not whole

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


def stand_in(script: Script, look: dict[str, Any]) -> FastAPI:
    """The routes that the page uses, without a model behind them."""

    def guard(request: Request) -> None:
        if script.key is not None and request.headers.get("authorization") != f"Bearer {script.key}":
            raise HTTPException(401, "the API key is missing or wrong; send one")

    app = FastAPI(dependencies=[Depends(guard)])
    add_page(app)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Any:
        return JSONResponse({"error": {"message": error.detail, "code": None}}, error.status_code)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": script.model}]}

    @app.get("/health")
    async def health() -> Any:
        return JSONResponse({"status": "loading", "progress": {"share": 0.25}}, 503)

    @app.get("/v1/expert-cache")
    async def live() -> Any:
        if script.loading:
            return JSONResponse({"error": {"message": "the server is loading; try again", "code": "loading"}}, 503)
        return look

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        script.asked.append(await request.json())
        if script.refusal is not None:
            status, message = script.refusal
            return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)
        return StreamingResponse(script.events(), media_type="text/event-stream")

    return app


class Running:
    """An application on a port of this machine, in a thread."""

    def __init__(self, app: Any, port: int):
        config = uvicorn.Config(
            app, host="127.0.0.1", port=port, log_level="error", http="h11", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()


def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    with duoserve.load(None, sequences=2) as engine:
        service = Service(engine)
        yield engine, service
        service.close()


@pytest.fixture(scope="module")
def look(demo: Any) -> dict[str, Any]:
    return snapshot(*demo)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Site:
    """A server, a browser's context, and what both must never see: foreign requests, script errors, broken policy."""

    def __init__(self, app: Any, browser: Any, at: int | None = None, **options: Any):
        """`at`: the port of a server that runs already, instead of an application."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = at or probe.getsockname()[1]
        self.app, self.url = app, f"http://127.0.0.1:{self.port}"
        self.server: Running | None = Running(app, self.port) if at is None else None
        self.context = browser.new_context(viewport={"width": 1360, "height": 860}, **options)
        self.context.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))

    def open(self) -> Any:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("console", self._heard)
        page.goto(self.url)
        page.wait_for_selector("#ideas button", state="attached")
        return page

    def _heard(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def stop(self) -> None:
        assert self.server is not None
        self.server.stop()
        self.server = None

    def start(self) -> None:
        self.server = Running(self.app, self.port)

    def close(self) -> None:
        self.context.close()
        if self.server is not None:
            self.stop()
        assert not [url for url in self.requests if not url.startswith(self.url)]
        assert not self.complaints


@pytest.fixture
def site(script: Script, look: dict[str, Any], browser: Any) -> Iterator[Site]:
    site = Site(stand_in(script, look), browser)
    yield site
    script.hold.clear()
    site.close()


def send(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page: Any, n: int = 1) -> str:
    """The text of the last answer, once `n` are whole."""
    page.wait_for_function(
        "n => document.querySelectorAll('.turn[data-role=assistant]:not([data-state=streaming])').length === n", arg=n
    )
    page.wait_for_selector("#send:not([hidden])")
    text: str = page.inner_text(".turn[data-role=assistant] >> nth=-1 >> .body")
    return text.strip()
