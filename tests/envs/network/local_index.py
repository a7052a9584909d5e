"""Stand-ins for what the proxy reaches outside: the three package indexes, and a documentation host behind TLS."""

import base64
import functools
import hashlib
import http.server
import io
import json
import pathlib
import ssl
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

OLD, FIX, NEW = "2020-05-01T00:00:00Z", "2021-06-01T12:00:00Z", "2021-06-01T12:00:00.000001Z"
MANUAL = "docs.python.org"


def wheel(name: str, version: str) -> bytes:
    """A wheel whose module says its version."""
    info, buffer = f"{name}-{version}.dist-info", io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in archive.namelist()) + f"{info}/RECORD,,\n")
    return buffer.getvalue()


@functools.cache  # the time of packing is in it
def npm_archive(name: str, version: str) -> bytes:
    """An npm package whose module says its version."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, text in (("package/package.json", json.dumps({"name": name, "version": version, "main": "index.js"})),
                           ("package/index.js", f"module.exports = {version!r};\n")):
            info = tarfile.TarInfo(path)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


# Project: its versions and when each was uploaded. What is "victim" is the package under test.
RELEASES = {"helper": {"1.0": NEW}, "victim": {"1.2.2": OLD, "1.2.3": FIX, "1.3.0": NEW}}
GO = {"v1.0.0": OLD, "v1.1.0": FIX, "v1.2.0": NEW}


class Index(http.server.BaseHTTPRequestHandler):
    """PyPI's JSON below /simple/, npm's registry below /npm/, Go's proxy below /go/; files below /files/."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.seen.append(self.path)
        kind, body = self.reply([part for part in self.path.split("/") if part])
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def reply(self, parts):
        here = f"http://127.0.0.1:{self.server.server_address[1]}"
        match parts:
            case ["simple", name] if name in RELEASES:
                files = [{"filename": f"{name}-{version}-py3-none-any.whl", "hashes": {}, "upload-time": moment,
                          "url": f"../../files/{name}-{version}-py3-none-any.whl"}
                         for version, moment in RELEASES[name].items()]
                body = {"meta": {"api-version": "1.1"}, "name": name, "versions": list(RELEASES[name]), "files": files}
                return "application/vnd.pypi.simple.v1+json", json.dumps(body).encode()
            case ["files", name] if name.endswith(".whl"):
                return "application/octet-stream", wheel(*name.split("-")[:2])
            case ["npm", name] if name in RELEASES:
                versions = {version: {"name": name, "version": version, "dist": {
                    "tarball": f"{here}/tarballs/{name}-{version}.tgz",
                    "integrity": "sha512-" + base64.b64encode(hashlib.sha512(npm_archive(name, version)).digest()).decode()}}
                    for version in RELEASES[name]}
                body = {"name": name, "dist-tags": {"latest": list(versions)[-1]}, "versions": versions}
                if "install-v1" not in self.headers["Accept"]:
                    body["time"] = {"created": OLD, **RELEASES[name]}
                return "application/json", json.dumps(body).encode()
            case ["tarballs", name]:
                return "application/octet-stream", npm_archive(*name.removesuffix(".tgz").split("-"))
            case ["go", *_, "@v", "list"]:
                return "text/plain", "\n".join(GO).encode()
            case ["go", *_, "@v", name]:
                version = name.rpartition(".")[0]
                stated = "module x\n" + "\ngo 1.20\n" * ("foreign" not in self.path)  # as the proxy makes up for a repository
                text = json.dumps({"Version": version, "Time": GO.get(version, NEW)}) if name.endswith("info") else stated
                return "text/plain", text.encode()
            case ["go", *_, "@latest"]:
                return "application/json", json.dumps({"Version": "v1.2.0", "Time": NEW}).encode()
        return "text/plain", None


class Tunnel(http.server.BaseHTTPRequestHandler):
    """What httpx takes for the way out: whatever host it asks for, it speaks TLS with MANUAL's certificate."""

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.server.seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        with self.server.context.wrap_socket(self.connection, server_side=True) as line:
            asked = line.recv(4096).decode()
            path = asked.split()[1]
            self.server.seen.append(path)
            if path == "/moved":
                line.sendall(b"HTTP/1.1 302 Found\r\nLocation: https://github.com/a/b\r\nContent-Length: 0\r\n\r\n")
            else:
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 9\r\n\r\n<p>re</p>")
        self.close_connection = True


@contextmanager
def serving(handler: type, **attributes) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server on this machine's loopback device; `seen` is what it was asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.seen = []
    vars(server).update(attributes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def certificate(folder: pathlib.Path) -> pathlib.Path:
    """A key and a certificate of MANUAL, in one file."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={MANUAL}",
                    "-addext", f"subjectAltName=DNS:{MANUAL}", "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder,
                   check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


@contextmanager
def outside(folder: pathlib.Path, environment) -> Iterator[http.server.ThreadingHTTPServer]:
    """Everything outside, and an environment (monkeypatch) in which it is found; yields the indexes' server."""
    both = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    with serving(Index) as index, serving(Tunnel, context=context) as tunnel:
        here = f"http://127.0.0.1:{index.server_address[1]}"
        for name, value in (("PIP_INDEX_URL", f"{here}/simple"), ("npm_config_registry", f"{here}/npm"),
                            ("GOPROXY", f"{here}/go,direct"), ("SSL_CERT_FILE", str(folder / "cert.pem")),
                            ("HTTPS_PROXY", f"http://127.0.0.1:{tunnel.server_address[1]}"), ("NO_PROXY", "127.0.0.1")):
            environment.setenv(name, value)
        index.tunnel = tunnel
        yield index
