"""An S3 server (moto) and a proxy before it whose answers go wrong as it is told.

A program of its own, because the program that forks commands off must have no threads. It prints
its two ports and ends when its input does. Told by `PUT /_rules` with a JSON list of rules:
`{"fault": "503", "method": "GET", "path": "/texts/train/index.json", "times": 2}`, where `path` is
the start of paths, method `""` any, and `times` how often. `GET /_seen` gives the requests since.
"""

import http.client
import json
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote

STALL_SECONDS = 6.0
"""Longer than the clients' patience in these tests."""
OLDER = "older-"
"""A bucket of this name before it holds what stale answers show."""
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to the store, and spoils the answers that a rule names."""

    protocol_version = "HTTP/1.1"
    store: ClassVar[tuple[str, int]] = ("", 0)
    rules: ClassVar[list[dict[str, Any]]] = []
    seen: ClassVar[list[list[Any]]] = []
    lock: ClassVar[threading.Lock] = threading.Lock()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        if self.path.startswith("/_"):
            self._told(sent)
            return
        fault = self._fault()
        path = self.path
        if fault == "stale" and self.command in ("GET", "HEAD"):
            path = f"/{OLDER}{self.path.removeprefix('/')}"
        if fault == "cut" and self.command not in ("GET", "HEAD"):
            self.close_connection = True  # before the store has it
            return
        if fault.isdecimal():
            self._send(int(fault), [], SLOW_DOWN, fault)
            return
        upstream = http.client.HTTPConnection(*self.store, timeout=30)
        upstream.request(self.command, path, sent, dict(self.headers))
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._send(response.status, response.getheaders(), body, fault)

    def _fault(self) -> str:
        """What is to go wrong with this request; most of the time nothing."""
        path = unquote(self.path)
        with self.lock:
            fault = ""
            for rule in self.rules:
                if (
                    not fault
                    and rule["times"] > 0
                    and rule["method"] in ("", self.command)
                    and path.startswith(rule["path"])
                ):
                    rule["times"] -= 1
                    fault = str(rule["fault"])
            self.seen.append([self.command, path, fault])
        return fault

    def _told(self, sent: bytes) -> None:
        with self.lock:
            answer = json.dumps(self.seen)
            if self.command == "PUT":
                self.rules[:] = json.loads(sent)
                self.seen.clear()
        self._send(200, [], answer.encode(), "")

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str) -> None:
        with suppress(OSError):  # who asked has gone
            self.send_response(status)
            size: int | str = len(body)
            for key, value in headers:
                if key.lower() == "content-length" and self.command == "HEAD":
                    size = value
                if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "slow":
                step = max(1, len(body) // 10)
                for at in range(0, len(body), step):
                    self.wfile.write(body[at : at + step])
                    time.sleep(0.02)
            else:
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """No line for each request."""


def main() -> None:
    """Serve until the input ends."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    Proxy.store = server.get_host_and_port()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    print(json.dumps([Proxy.store[1], proxy.server_port]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
