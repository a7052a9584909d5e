"""The only way out of an agent's sandbox: a proxy in this process, on a socket that the sandbox's server made.

A sandbox has a network namespace with nothing but a loopback device in it. Its server listens there and hands the
listening socket out (inside/door.py); whoever connects inside is answered here, and neither the sandbox nor its server
has any other way to the network. The proxy answers while a command of an agent runs, for that command's workspace: it
serves package indexes below its own address and documentation as an HTTP proxy, by GET and HEAD alone, and opens no
tunnel (behind a tunnel's name a client may speak to any other host of the same network).
"""

import collections
import http.server
import socket
import threading
import urllib.parse
from typing import Any

import httpx

from qcn_jax.envs.network import policy
from qcn_jax.envs.network.indexes import Document, File, Indexes, Unanswered
from qcn_jax.envs.network.policy import Refused, Withheld

MAX_CONNECTIONS = 64  # of one sandbox at a time; the others wait
MAX_REDIRECTS = 5  # from an index's file to where it lies
MAX_BYTES = 2 << 30  # that one command may fetch
IDLE, TIMEOUT = 30.0, 60.0  # seconds without a request on a connection, and of one request outside


class Visit:
    """One command's use of a gate, to be entered while it runs; `counts` says what came of its requests."""

    def __init__(self, gate: "Gate", about: Withheld):
        self.gate, self.about = gate, about
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self._lock = threading.Lock()

    def count(self, what: str, size: int = 0) -> None:
        """Counts a request, or bytes."""
        with self._lock:
            self.bytes += size
            if what:
                self.counts[what] += 1

    def __enter__(self) -> "Visit":
        self.gate.visit = self
        return self

    def __exit__(self, *_: Any) -> None:
        self.gate.visit = None


class Outside:
    """What gates share: connections to the indexes, and what is known of them."""

    def __init__(self) -> None:
        self.client = httpx.Client(timeout=TIMEOUT, headers={"User-Agent": "qcn_jax"})
        self.indexes = Indexes(self.client)

    def close(self) -> None:
        """Ends the connections."""
        self.client.close()


class Gate(http.server.ThreadingHTTPServer):
    """Answers on one sandbox's socket until it is closed; nobody but during a visit."""

    daemon_threads, block_on_close = True, False

    def __init__(self, listener: socket.socket, outside: Outside):
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.outside = listener, outside
        self.here = "http://{}:{}".format(*listener.getsockname()[:2])
        self.visit: Visit | None = None
        self._slots, self._closed = threading.BoundedSemaphore(MAX_CONNECTIONS), False
        threading.Thread(target=self._serve, daemon=True, name="sandbox-network").start()

    def open(self, about: Withheld) -> Visit:
        """A visit, during which what is not withheld is served."""
        return Visit(self, about)

    def _serve(self) -> None:
        while not self._closed:
            self._slots.acquire()
            try:
                connection, address = self.socket.accept()
            except OSError:
                return
            self.process_request(connection, address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a connection; see socketserver."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no fault."""

    def close(self) -> None:
        """Refuses everything from here on."""
        if not self._closed:
            self._closed = True
            try:
                self.socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
            except OSError:
                pass
            self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "qcn", "", IDLE
    server: Gate

    def log_message(self, *_: Any) -> None:  # noqa: D102
        pass

    def do_GET(self) -> None:
        """Serves what is allowed."""
        visit = self.server.visit
        if visit is None:
            self.close_connection = True
            self._text(403, "refused: nothing is served now")
            return
        try:
            answer = self._find(visit)
            visit.count("served", len(answer.body) if isinstance(answer, Document) else 0)
            if isinstance(answer, Document):
                self._begin(200, {"Content-Type": answer.kind, "Content-Length": str(len(answer.body))})
                self._body(answer.body)
            else:
                self._pass_on(answer, visit)
        except Refused as error:
            visit.count(f"refused/{error.rule}")
            self._text(403, str(error))
        except Unanswered as error:
            self._text(error.status, str(error))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            self._text(502, f"no answer: {type(error).__name__}")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        """Any other method: nothing can be sent out, and no tunnel is opened."""
        self.close_connection = True  # a body may follow
        visit, rule, said = self.server.visit, "method", f"refused: {self.command}: only GET and HEAD are served"
        if self.command == "CONNECT":
            try:
                policy.check_host((urllib.parse.urlsplit(f"//{self.path}").hostname or "").lower())
                rule, host = "tunnel", self.path.split(":")[0]
                said = f"refused: no tunnels; write http://{host}/, which is fetched by HTTPS"
            except (Refused, ValueError) as error:
                rule, said = getattr(error, "rule", "other_host"), str(error)
        if visit is not None:
            visit.count(f"refused/{rule}")
        self._text(403, said)

    do_CONNECT = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _find(self, visit: Visit) -> Document | File:
        if visit.bytes > MAX_BYTES:
            raise Refused("bytes", f"refused: one command may fetch {MAX_BYTES >> 20} MiB")
        if self.path.startswith(self.server.here + "/"):
            self.path = self.path[len(self.server.here):]
        if self.path.startswith("/"):
            return self.server.outside.indexes.answer(self.path, self.headers.get("Accept", ""), visit.about,
                                                      self.server.here)
        try:
            return File(policy.documentation(self.path, visit.about))
        except ValueError as error:  # what is no address at all
            raise Refused("other_host", "refused: no address") from error

    def _pass_on(self, file: File, visit: Visit) -> None:
        headers, url = {"Accept-Encoding": "identity", "Accept": "*/*"}, file.url
        for _ in range(MAX_REDIRECTS):
            with self.server.outside.client.stream("GET", url, headers=headers) as reply:
                if not (file.index and reply.has_redirect_location):
                    self._relay(reply, url, visit)
                    return
                url = policy.check_file(urllib.parse.urljoin(url, reply.headers["location"]), file.index)
        raise Unanswered(502, "the package index leads from one place to the next")

    def _relay(self, reply: httpx.Response, url: str, visit: Visit) -> None:
        """Passes an answer on as it comes."""
        passed = {name: reply.headers[name] for name in ("Content-Type", "Content-Length") if name in reply.headers}
        if "location" in reply.headers:
            where = urllib.parse.urljoin(url, reply.headers["location"])
            passed["Location"] = where.replace("https://", "http://", 1)
        if "Content-Length" not in passed:
            passed["Connection"] = "close"
            self.close_connection = True
        self._begin(reply.status_code, passed)
        for part in reply.iter_raw(1 << 16):
            visit.count("", len(part))
            if visit.bytes > MAX_BYTES:
                self.close_connection = True
                return
            self._body(part)

    def _text(self, status: int, message: str) -> None:
        body = (message + "\n").encode("utf-8", "replace")
        self._begin(status, {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)),
                             **({"Connection": "close"} if self.close_connection else {})})
        self._body(body)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _body(self, data: bytes) -> None:
        if self.command != "HEAD":
            self.wfile.write(data)
