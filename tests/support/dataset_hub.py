"""The small Hub with datasets: folders of this machine, read with byte ranges, and a count of the bytes that were sent.

What is sent counts as the server writes it to the connection. One that is closed by the reader in the middle of a file,
as when a tar is streamed, may have taken some bytes that nobody read.
"""

import hashlib
import re
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_server import Fault, Handler, HubServer

CHUNK = 1 << 14


class DatasetHub(HubServer):
    """A Hub whose datasets `user/name` are folders."""

    def __init__(self) -> None:
        super().__init__(DatasetHandler)
        self.datasets: dict[str, Path] = {}
        self.sent = 0

    def settled(self) -> int:
        """Return how many bytes were sent, once none are any more: of a tar some are after its reader has left."""
        before = -1
        while before != self.sent:
            before = self.sent
            time.sleep(0.3)
        return before

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a reader that hung up, as one does that has enough of a file."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def files(self, name: str) -> dict[str, Path]:
        folder = self.datasets[name]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, name: str) -> str:
        stamps = [(path, file.stat().st_size, file.stat().st_mtime_ns) for path, file in self.files(name).items()]
        return hashlib.sha1(repr(stamps).encode()).hexdigest()

    def size(self, name: str) -> int:
        return sum(file.stat().st_size for file in self.files(name).values())


class DatasetHandler(Handler):
    """Answers for datasets, and leaves models to the Hub that it extends."""

    server: DatasetHub

    def do_GET(self) -> None:
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        if not re.match(r"/(api/)?datasets/", path):
            return super().route()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            fault = self.fault(path)
        if fault:
            return self.answer({"error": "the server is on fire"}, int(fault.kind))
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, path):
                return action(self, body, **match.groupdict())
        return self.answer({"error": f"no such route: {self.command} {path}"}, 404)

    def fault(self, path: str) -> Fault | None:
        """The fault to play, once `skip` requests that it fits have been answered."""
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                if fault.skip:
                    fault.skip -= 1
                else:
                    fault.times -= 1
                    return fault
        return None

    def found(self, name: str) -> bool:
        if name in self.server.datasets:
            return True
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return False

    def dataset_info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if self.found(name):
            siblings = [{"rfilename": path} for path in self.server.files(name)]
            self.answer(
                {"id": name, "sha": self.server.commit(name), "private": False, "siblings": siblings, "tags": []}
            )

    def listing(self, body: bytes, name: str, revision: str, folder: str | None = None) -> None:
        if not self.found(name):
            return
        prefix, files = f"{folder}/" if folder else "", self.server.files(name)
        entries = {path: entry(path, file) for path, file in files.items() if path.startswith(prefix)}
        folders = {str(parent) for path in entries for parent in Path(path).parents if str(parent) not in (".", folder)}
        folders = {each for each in folders if each.startswith(prefix)}
        entries |= {each: {"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in folders}
        if self.query.get("recursive") not in (["True"], ["true"]):
            entries = {path: each for path, each in entries.items() if "/" not in path.removeprefix(prefix)}
        self.answer([entries[path] for path in sorted(entries)])

    def paths_info(self, body: bytes, name: str, revision: str) -> None:
        if self.found(name):
            files = self.server.files(name)
            asked = parse_qs(body.decode()).get("paths", [])
            self.answer([entry(path, files[path]) for path in asked if path in files])

    def content(self, body: bytes, name: str, revision: str, file: str) -> None:
        if not self.found(name):
            return
        path = self.server.files(name).get(file)
        if path is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop, status = int(match[1]), min(int(match[2] or size) + bool(match[2]), size), 206
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(str(path).encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit(name))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            self.send_part(path, start, stop)

    def send_part(self, path: Path, start: int, stop: int) -> None:
        with open(path, "rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(CHUNK, stop - start))
                try:
                    self.wfile.write(data)
                except ConnectionError:  # the reader has what it wants
                    self.close_connection = True
                    return
                start += len(data)
                with self.server.lock:
                    self.server.sent += len(data)


def entry(path: str, file: Path) -> dict:
    """A file as the Hub lists it."""
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": hashlib.sha1(path.encode()).hexdigest()}


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = (
    (f"/api/datasets/{NAME}", DatasetHandler.dataset_info),
    (f"/api/datasets/{NAME}/revision/(?P<revision>[^/]+)", DatasetHandler.dataset_info),
    (f"/api/datasets/{NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", DatasetHandler.listing),
    (f"/api/datasets/{NAME}/paths-info/(?P<revision>[^/]+)", DatasetHandler.paths_info),
    (f"/datasets/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", DatasetHandler.content),
)
