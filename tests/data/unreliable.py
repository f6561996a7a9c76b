"""A file system and a web server that fail."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Unreliable(MemoryFileSystem):
    """``faulty://``: files in memory. ``fault`` is called before every range read with its number, and may raise or shorten it."""

    protocol = "faulty"
    store: dict[str, Any] = {}
    fault: Callable[[int, bytes], bytes] = staticmethod(lambda number, content: content)
    ranges: list[tuple[int, int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("faulty://").strip("/")
        return f"/{path}" if path else ""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        assert start is not None
        assert end is not None
        type(self).ranges.append((start, end))
        return type(self).fault(len(self.ranges) - 1, super().cat_file(path, start, end))


@contextmanager
def unreliable(fault: Callable[[int, bytes], bytes]) -> Iterator[Unreliable]:
    """The file system, empty, with ``fault``."""
    fsspec.register_implementation("faulty", Unreliable, clobber=True)
    Unreliable.store, Unreliable.ranges, Unreliable.fault = {}, [], staticmethod(fault)
    yield fsspec.filesystem("faulty")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    draw: random.Random
    share: float
    failures: list[str]
    ranges = True
    refused: dict[str, int] = {}  # the status that a file is answered with
    lock: threading.Lock

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        with self.lock:
            fails, cuts = self.draw.random() < self.share, self.draw.random() < 0.5
        content = self.files.get(self.path.lstrip("/"))
        if self.path.lstrip("/") in self.refused:
            self._send(self.refused[self.path.lstrip("/")], b"no", {}, with_body=with_body)
            return
        if fails and not (cuts and with_body):
            self.failures.append(self.command)
            self._send(503, b"try later", {}, with_body=with_body)
            return
        if content is None:
            self._send(404, b"none", {}, with_body=with_body)
            return
        asked, size = self.headers.get("Range"), len(content)
        headers = {"ETag": f'"{hash(content)}"', "Accept-Ranges": "bytes"}
        status = 200
        if asked and self.ranges:
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if fails:
            self.failures.append("cut")
        self._send(status, content, headers, with_body=with_body, cut=fails)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def web_server(files: dict[str, bytes], *, share: float = 0.0, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serves ``files``; a ``share`` of the answers is an error or breaks off. Gives its URL and the failures so far."""
    failures: list[str] = []
    fields = {"files": files, "draw": random.Random(seed), "share": share, "failures": failures, "lock": threading.Lock()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), fields))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", failures
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
