"""A chat server of the tests' own that misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def reply(text: str | None, *, tokens: int = 10) -> tuple[int, dict[str, str], bytes]:
    """A good answer."""
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": 2,
            "total_tokens": tokens + 2,
        },
    }
    return 200, {}, json.dumps(body).encode()


def failure(code: int, message: str = "no", **headers: str):
    body = json.dumps({"error": {"message": message}}).encode()
    return code, {k.replace("_", "-"): v for k, v in headers.items()}, body


class FakeChat:
    """`answer(body, n)` makes the reply to the n-th request of that conversation.

    It gives (status, headers, body), or None to hang until the server is closed.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Any]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.answered: Counter[str] = Counter()  # by last message
        self.came = threading.Condition()
        self.closing = threading.Event()
        seen: Counter[str] = Counter()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(data)
                talk = json.dumps(body["messages"])
                with fake.came:
                    n = seen[talk]
                    seen[talk] += 1
                    fake.bodies.append(body)
                    fake.keys.append(self.headers.get("Authorization", ""))
                    fake.came.notify_all()
                made = fake.answer(body, n)
                if made is None:
                    fake.closing.wait()
                    self.close_connection = True
                    return
                code, headers, text = made
                if code == 200:
                    with fake.came:
                        fake.answered[talk] += 1
                self.send_response(code)
                for name, value in {"Content-Type": "application/json"}.items():
                    if name not in headers:
                        self.send_header(name, value)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients that went away are no error here."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(
            target=self.server.serve_forever, args=(0.02,), daemon=True
        )
        self.thread.start()

    def wait_for(self, n: int) -> None:
        """Until there have been n requests."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.bodies) >= n, timeout=60)

    def __enter__(self) -> FakeChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
