"""What the tests' model servers share: a process of its own on a free port of 127.0.0.1, told what to do by JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class JsonHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None, length: int = 0) -> None:
        """Args: body: bytes as they are, anything else as JSON; length: what the header says, 0 = the body's."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)


class ServerProcess:
    """Starts a script that calls `serve`, and ends it with `close` or on exit."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=20)

    def control(self, **command: Any) -> dict[str, Any]:
        """What the script answers to a POST of the command to /control."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://127.0.0.1:{self.port}/control"
        with opener.open(url, data=json.dumps(command).encode(), timeout=20) as response:
            return json.load(response)


def serve(handler: type[JsonHandler]) -> None:
    """Serves until the process that started it is gone: its end of the pipe closes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve_forever()
