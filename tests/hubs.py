"""A real HTTP server that speaks the part of the hub's API that huggingface_hub uses, and that can cut connections, lie
about lengths, corrupt bytes, stay silent and refuse.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT, OLDER = "a" * 40, "b" * 40


@dataclass
class Fault:
    """What goes wrong with the next `times` answers about `file`: "cut", "short", "long", "flip", "500", "stall"."""

    kind: str
    file: str
    at: int = 0  # the byte where it happens
    times: int = 1


@dataclass
class Hub:
    """Repositories by name: commits by name, each a folder. `heard` keeps what was asked for."""

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)  # of a repository: answer and X-Error-Code
    faults: list[Fault] = field(default_factory=list)
    heard: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, range
    big: dict[str, int] = field(default_factory=dict)  # sizes to list instead of the true ones
    url: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def fault(self, file: str, *kinds: str) -> Fault | None:
        for fault in self.faults:
            if fault.file == file and fault.times > 0 and fault.kind in kinds:
                fault.times -= 1
                return fault
        return None


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def blob(path: Path) -> str:
    data = path.read_bytes()
    if is_large(path.name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        try:
            if parts[:2] == ["api", "models"]:
                self.info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
            elif parts[2:3] == ["resolve"]:
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
            else:
                self.refuse(404, "EntryNotFound")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def folder(self, repo: str, revision: str) -> tuple[str, Path] | None:
        if repo in self.hub.status:
            self.refuse(*self.hub.status[repo])
        elif repo not in self.hub.repos:
            self.refuse(401, "RepoNotFound")
        else:
            commit = self.hub.refs.get(revision, revision)
            if commit in self.hub.repos[repo]:
                return commit, self.hub.repos[repo][commit]
            self.refuse(404, "RevisionNotFound")
        return None

    def info(self, repo: str, revision: str) -> None:
        self.hub.heard.append(("INFO", repo, revision))
        if (found := self.folder(repo, revision)) is None:
            return
        files = [path for path in sorted(found[1].rglob("*")) if path.is_file()]
        siblings = [self.sibling(path, path.relative_to(found[1]).as_posix()) for path in files]
        text = json.dumps({"id": repo, "sha": found[0], "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def sibling(self, path: Path, name: str) -> dict[str, Any]:
        size = self.hub.big.get(name, path.stat().st_size)
        entry = {"rfilename": name, "size": size, "blobId": hashlib.sha1(name.encode()).hexdigest()}
        if is_large(name):
            return entry | {"lfs": {"sha256": blob(path), "size": size, "pointerSize": 1}}
        return entry | {"blobId": blob(path)}

    def file(self, repo: str, revision: str, name: str, body: bool) -> None:
        span = self.headers.get("Range", "")
        self.hub.heard.append((self.command, name, span))
        if (found := self.folder(repo, revision)) is None:
            return
        path = found[1] / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        data = path.read_bytes()
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        fault = self.hub.fault(name, "cut", "short", "flip", "500", "stall") if body else self.hub.fault(name, "long")
        if fault and fault.kind == "stall":
            self.hub.stalled.set()
            self.hub.go_on.wait(60)
        if fault and fault.kind == "500":
            return self.refuse(500, "")
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{blob(path)}"')
        self.send_header("X-Repo-Commit", found[0])
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        sent = data[start:]
        if fault and fault.kind == "flip":
            at = fault.at % len(data)
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            sent = data[start:]
        if fault and fault.kind == "short":  # says so, and so is not caught by the transport
            sent = sent[: fault.at % max(1, len(sent))]
        extra = 7 if fault and fault.kind == "long" else 0
        self.send_header("Content-Length", str(len(sent) + extra))
        self.end_headers()
        if not body:
            return
        if fault and fault.kind == "cut":
            self.wfile.write(sent[: fault.at % max(1, len(sent))])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(sent)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        http.shutdown()
        http.server_close()


def reach(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path, offline: bool = False) -> None:
    """Let huggingface_hub in this process ask `hub`, with its cache in `home`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
