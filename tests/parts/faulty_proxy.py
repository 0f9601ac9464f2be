"""Stands before an HTTP server and spoils the requests that it is told to: silence, a 500, a cut, a lost answer."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("silence", "500", "cut", "lost answer")
SILENCE_S = 2.0

Wanted = Callable[[str, str], str | None]
"""(method, path) to the fault of a request, or None."""


class FaultyProxy:
    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.fault_of: Wanted = lambda method, path: None
        self.spoiled: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spoil_once(self, fault: str, method: str, part: str) -> None:
        """The next request of this method whose path has `part` in it."""
        left = [fault]

        def wanted(its_method: str, path: str) -> str | None:
            return left.pop() if left and its_method == method and part in path else None

        self.fault_of = wanted

    def fault(self, method: str, path: str) -> str | None:
        with self._lock:
            found = self.fault_of(method, path)
            if found:
                self.spoiled.append((found, method, path))
            return found

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def asked_for(proxy: FaultyProxy, method: str) -> list[str]:
    """The paths of requests from here on."""
    asked: list[str] = []

    def note(its_method: str, path: str) -> str | None:
        if its_method == method:
            asked.append(path)
        return None

    proxy.fault_of = note
    return asked


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        fault = self.proxy.fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        upstream = http.client.HTTPConnection(self.proxy.upstream.hostname or "", self.proxy.upstream.port)
        with contextlib.closing(upstream):
            if fault == "cut" and length:
                self._cut(upstream, length)
                return
            body = self.rfile.read(length) if length else None
            if fault == "silence":
                time.sleep(SILENCE_S)
            if fault in ("silence", "cut"):
                self._hang_up()
                return
            if fault == "500":
                self._answer(500, [], b"<Error><Code>InternalError</Code></Error>")
                return
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            answer = upstream.getresponse()
            data = answer.read()
            if fault == "lost answer":
                self._hang_up()
                return
            self._answer(answer.status, answer.getheaders(), data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _cut(self, upstream: http.client.HTTPConnection, length: int) -> None:
        """Half of an upload goes through, then both connections end."""
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders()
        upstream.send(self.rfile.read(length // 2))
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response_only(status)
            kept = [(name, value) for name, value in headers if name.lower() not in ("transfer-encoding", "connection")]
            if not any(name.lower() == "content-length" for name, _ in kept):
                kept.append(("Content-Length", str(len(data))))
            for name, value in kept:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
