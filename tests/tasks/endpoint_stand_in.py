"""An OpenAI-compatible endpoint on loopback that does as a script says."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]
Script = Callable[[str, int], Reply]
"""Prompt and how often it came -> status and body."""


def completion(text: Any, reason: str = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"total_tokens": 100}}


@contextmanager
def endpoint(script: Script) -> Iterator[tuple[str, Counter[str]]]:
    """Address of a server that follows the script, and how often each prompt came."""
    asked: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert content["model"] == "m"
            assert self.path == "/v1/chat/completions"
            prompt = content["messages"][0]["content"]
            with lock:
                asked[prompt] += 1
                times = asked[prompt]
            status, body = script(prompt, times)
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)
            except OSError:
                assert body == b"late"  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's word
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
