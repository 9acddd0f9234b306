"""A file server on loopback that fails as it is told, and remembers what it was asked."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` (name -> bytes) under any folder.

    Attributes:
        plan: what to do at each GET, in order; the last entry stays. See `Handler.answer`.
        seen: one dictionary a request: method, path, headers.
        sent: bytes of files that went out.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], plan: tuple[str, ...] = ("whole",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan = dict(files), list(plan)
        self.seen: list[dict] = []
        self.sent = 0
        self.delay = 0.0  # seconds between pieces of 4 KiB
        self.head = 200  # status for HEAD, as the Hub's client asks first
        self.stated = ""  # SHA-256 that HEAD states; "": the true one
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[dict]:
        return [request for request in self.seen if request["method"] == "GET"]

    def handle_error(self, request, client_address) -> None:
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *args) -> None:
        pass

    def note(self) -> str:
        with self.server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.seen.append({"method": self.command, "path": self.path, **headers})
            plan = self.server.plan
            return plan[0] if len(plan) == 1 or self.command == "HEAD" else plan.pop(0)

    def do_HEAD(self) -> None:
        self.note()
        body = self.server.files.get(self.path.rsplit("/", 1)[-1])
        status = self.server.head if body is not None else 404
        self.send_response(status)
        if status in (401, 404):
            self.send_header("X-Error-Code", "EntryNotFound" if status == 404 else "RepoNotFound")
        elif status == 200:
            self.send_header("ETag", f'"{self.server.stated or hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        self.answer(self.note())

    def answer(self, how: str) -> None:
        body = self.server.files.get(self.path.rsplit("/", 1)[-1].split("?")[0])
        if body is None or how.isdigit():
            return self.refuse(int(how) if body is not None else 404)
        if how.startswith("redirect"):  # redirect:301:/elsewhere/ or another server's address
            _, status, where = how.split(":", 2)
            self.send_response(int(status))
            self.send_header("Location", where + self.path.rsplit("/", 1)[-1])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if how == "page":
            return self.send(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>sign in</html>")
        if how == "hang up":
            self.close_connection = True
            return None
        if how == "huge":
            self.send_response(200)
            self.send_header("Content-Length", str(10**16))
            return self.end_headers()
        if how == "unknown length":  # HTTP/1.0's way: the end of the connection is the end of the file
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            return self.write(body)
        etag = '"2"' if "changed" in how else '"1"'
        if "changed" in how:
            body = body[::-1]
        headers = {"ETag": ("W/" if "weak" in how else "") + etag} if "nameless" not in how else {}
        start, status = 0, 200
        asked = self.headers.get("Range")
        same = self.headers.get("If-Range", etag) == etag
        if asked and same and "no ranges" not in how:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(body):
                return self.refuse(416, {"Content-Range": f"bytes */{len(body)}"})
            shown = start + 1 if "shifted" in how else start
            headers["Content-Range"] = f"bytes {shown}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        shown = rest
        if "half" in how:
            shown = rest[: (len(rest) + 1) // 2]
        elif "third" in how:
            shown = rest[: len(body) // 3]
        self.send(status, headers, shown, promised=len(rest))
        if "stall" in how:
            time.sleep(3)
        if len(shown) < len(rest):
            self.close_connection = True
        return None

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send(status, headers or {}, b"")

    def send(self, status: int, headers: dict[str, str], body: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.write(body)

    def write(self, body: bytes) -> None:
        for begin in range(0, len(body), 4096):
            self.wfile.write(body[begin : begin + 4096])
            with self.server.lock:
                self.server.sent += len(body[begin : begin + 4096])
            if self.server.delay:
                self.wfile.flush()
                time.sleep(self.server.delay)
