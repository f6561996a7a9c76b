"""An S3 server over HTTP, moto's, that fails or delays a share of all requests."""

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import Request, urlopen

import pytest

SLOW_SECONDS = 0.05


@dataclass
class S3Server:
    """``failing``, ``slow``: shares of the requests that are answered by 503, or late. ``counts``: requests by what became of them."""

    url: str = ""
    failing: float = 0.0
    slow: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: {"failed": 0, "slow": 0, "served": 0})

    def troubled(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """``app`` behind the troubles."""
        draw, lock = random.Random(0), threading.Lock()

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            with lock:
                number = draw.random()
                kind = "failed" if number < self.failing else "slow" if number < self.failing + self.slow else "served"
                self.counts[kind] += 1
            if kind == "failed":
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
            if kind == "slow":
                time.sleep(SLOW_SECONDS)
            return app(environ, start_response)

        return answer


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str = "bucket") -> Iterator[S3Server]:
    """A server with an empty ``bucket``; s3fs in this process and in those that it starts goes there, with made-up credentials."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = S3Server()
    app = server.troubled(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, app, threaded=True)
    server.url = f"http://127.0.0.1:{http.port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    names = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**names, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        urlopen(Request(f"{server.url}/moto-api/reset", method="POST")).close()  # its buckets are the process's
        s3fs.S3FileSystem().mkdir(bucket)
        yield server
    finally:
        http.shutdown()
        thread.join()
        s3fs.S3FileSystem.clear_instance_cache()
