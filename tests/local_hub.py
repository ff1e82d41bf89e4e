"""A server that answers like the Hugging Face hub, for the models and data sets in local folders."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<rest>.*))?")
FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.*)")


class Hub:
    """The repositories, and what was asked for.

    models, datasets: name -> folder. stall_at: after so many bytes of a file the answer stops, until it is None again.
    requests: (method, path, range header) of each request.
    """

    def __init__(self, models: dict[str, Path], datasets: dict[str, Path]) -> None:
        self.repos = {"models": models, "datasets": datasets}
        self.stall_at: int | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.address = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer on a free port of this machine; the address for HF_ENDPOINT is hub.address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            if match := API.fullmatch(path):
                found = self._api(match["kind"], match["repo"], match["rest"] or "")
            elif match := FILE.fullmatch(path):
                return self._file(match["kind"] or "models", match["repo"], match["file"])
            else:
                found = None
            if found is None:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _api(self, kind: str, repo: str, rest: str) -> object:
            folder = hub.repos[kind].get(repo)
            if folder is None:
                return None
            files = sorted(each for each in folder.rglob("*") if each.is_file())
            entries = [
                {
                    "type": "file",
                    "path": str(each.relative_to(folder)),
                    "rfilename": str(each.relative_to(folder)),
                    "size": each.stat().st_size,
                    "oid": _digest(each),
                    "blobId": _digest(each),
                }
                for each in files
            ]
            if rest.startswith("tree/"):
                recursive = "recursive=true" in urlsplit(self.path).query
                under = folder.joinpath(*rest.split("/")[2:])
                folders = [] if recursive else sorted(each for each in under.glob("*") if each.is_dir())
                here = {str(each.relative_to(folder)) for each in (under.rglob("*") if recursive else under.glob("*"))}
                listed = [{"type": "directory", "path": str(each.relative_to(folder)), "oid": "0"} for each in folders]
                return listed + [each for each in entries if each["path"] in here]
            if rest == "" or rest.startswith("revision/"):
                return {"id": repo, "sha": _commit(repo), "siblings": entries, "private": False, "tags": []}
            return None

        def _file(self, kind: str, repo: str, name: str) -> None:
            file = hub.repos[kind].get(repo, Path("/nowhere")) / name
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _commit(repo)})
            content = file.read_bytes()
            headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": _commit(repo), "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted is None:
                return self._send(200, content, headers)
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._send(206, part, headers)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            at = hub.stall_at if hub.stall_at is not None and len(content) > hub.stall_at else len(content)
            self.wfile.write(content[:at])
            self.wfile.flush()
            while at < len(content) and hub.stall_at is not None:
                time.sleep(0.05)
            self.close_connection = at < len(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.stall_at = None
        server.shutdown()
        server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _commit(repo: str) -> str:
    return hashlib.sha1(repo.encode()).hexdigest()
