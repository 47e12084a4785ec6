"""A small HTTP server that speaks enough of the Hub's protocol for huggingface_hub and transformers to push and load.

It keeps repositories in memory, takes faults to play (`Fault`), and records which files were visible after each
request, so that a test can show that a push is never half visible.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# Token -> may write. Any other token is an expired one.
TOKENS = {"hf_writer": True, "hf_reader": False}


@dataclass
class Repo:
    private: bool = False
    # Branch or pull request -> path -> content; `commits` counts them for the commit ids.
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict] = field(default_factory=list)

    def sha(self, revision: str) -> str:
        listing = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[revision].items())
        return hashlib.sha1(json.dumps([revision, listing]).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The branch that a branch name or a commit id means."""
        names = {name: name for name in self.branches} | {self.sha(name): name for name in self.branches}
        return names.get(revision)


@dataclass
class Fault:
    """Goes wrong `times` times where method and path match: 'drop' closes the connection, a number is a status.

    A dataset's file is read in several requests: `skip` of them go well before.
    """

    method: str
    path: str
    kind: str | int
    times: int = 1
    skip: int = 0


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.visible: list[frozenset[str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        server = self.server
        with server.lock:
            server.requests.append(f"{self.command} {path}")
            fault = next(
                (f for f in server.faults if f.times and f.method == self.command and re.search(f.path, path)), None
            )
            if fault:
                fault.times -= 1
                if fault.kind == "drop":
                    # Read a little, then hang up in the middle of the upload.
                    self.rfile.read(min(1024, int(self.headers.get("Content-Length") or 0)))
                    self.close_connection = True
                    self.connection.close()
                    return
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault:
            return self.answer({"error": "the server is on fire"}, fault.kind)
        with server.lock:
            self.dispatch(path, body)
            server.visible.append(
                frozenset(f"{name}/{file}" for name, repo in server.repos.items() for file in repo.branches["main"])
            )

    def dispatch(self, path: str, body: bytes) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if "/upload/" not in path and token and token not in TOKENS:
            return self.answer({"error": "User Access Token has expired"}, 401)
        self.writer = TOKENS.get(token, False)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, body, **match.groupdict())
        return self.answer({"error": f"no such route: {self.command} {path}"}, 404)

    def answer(self, content: dict | list | bytes, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status >= 400 and not isinstance(content, bytes) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repo(self, name: str, revision: str | None = None, write: bool = False) -> tuple[Repo, str] | None:
        """A repository and the branch meant, or None after an error was sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if write and not self.writer:
            return self.answer({"error": "You do not have rights to write to this repository"}, 403)
        branch = repo.find(revision or "main")
        if branch is None:
            return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        return repo, branch

    def whoami(self, body: bytes) -> None:
        role = "write" if self.writer else "read"
        self.answer({"type": "user", "name": "user", "auth": {"accessToken": {"role": role}}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        if not self.writer:
            return self.answer({"error": "You do not have the rights to create a model here"}, 403)
        if name in self.server.repos:
            return self.answer(
                {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409
            )
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repos[name] = Repo(private=bool(private))
        return self.answer({"url": f"{self.server.url}/{name}"})

    def branch(self, body: bytes, name: str, revision: str) -> None:
        if not (found := self.repo(name, write=True)):
            return
        if revision in found[0].branches:
            return self.answer({"error": "Reference already exists"}, 409)
        found[0].branches[revision] = dict(found[0].branches["main"])
        self.answer({})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if found := self.repo(name, revision):
            repo, branch = found
            siblings = [{"rfilename": path} for path in sorted(repo.branches[branch])]
            self.answer(
                {"id": name, "sha": repo.sha(branch), "private": repo.private, "siblings": siblings, "tags": []}
            )

    def refs(self, body: bytes, name: str) -> None:
        if found := self.repo(name):
            repo = found[0]
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": repo.sha(branch)}
                for branch in repo.branches
            ]
            self.answer({"branches": branches, "tags": [], "converts": []})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if found := self.repo(name, revision):
            repo, branch = found
            self.answer(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in sorted(repo.branches[branch].items())
                ]
            )

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if found := self.repo(name, revision, write=True):
            repo, branch = found
            files = []
            for file in json.loads(body)["files"]:
                data = repo.branches[branch].get(file["path"])
                mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
                blob = data is not None and (
                    hashlib.sha256(data) if mode == "lfs" else hashlib.sha1(b"blob %d\0" % len(data) + data)
                )
                oid = blob.hexdigest() if blob else None
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.repo(name, write=True):
            objects = []
            for item in json.loads(body)["objects"]:
                actions = {
                    "upload": {"href": f"{self.server.url}/upload/{item['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/verify/{name}", "header": {}},
                }
                objects.append(item | ({} if item["oid"] in self.server.objects else {"actions": actions}))
            self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "the content is not what its name says"}, 400)
        self.server.objects[oid] = body
        self.answer({})

    def verify(self, body: bytes, name: str) -> None:
        self.answer({}, 200 if json.loads(body)["oid"] in self.server.objects else 404)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not (found := self.repo(name, revision, write=True)):
            return
        repo, branch = found
        files, summary = dict(repo.branches[branch]), {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                summary = value
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        pull = None
        if self.query.get("create_pr") == ["1"]:
            branch = f"refs/pr/{sum(each.startswith('refs/pr/') for each in repo.branches) + 1}"
            pull = f"{self.server.url}/{name}/discussions/{branch.rpartition('/')[2]}"
        repo.branches[branch] = files
        repo.commits.append(summary | {"branch": branch, "files": sorted(files)})
        oid = repo.sha(branch)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull})

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if not (found := self.repo(name, revision)):
            return
        repo, branch = found
        data = repo.branches[branch].get(file)
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(data, X_Repo_Commit=repo.sha(branch), ETag=etag, Accept_Ranges="none")

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = (
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), f"/api/models/{NAME}/branch/(?P<revision>.+)", Handler.branch),
    (("POST",), f"/api/models/{NAME}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/(?P<revision>.+)", Handler.commit),
    (("GET",), f"/api/models/{NAME}/tree/(?P<revision>.+)", Handler.tree),
    (("GET",), f"/api/models/{NAME}/refs", Handler.refs),
    (("GET",), f"/api/models/{NAME}/revision/(?P<revision>.+)", Handler.info),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/upload/(?P<oid>[0-9a-f]+)", Handler.upload),
    (("POST",), f"/verify/{NAME}", Handler.verify),
    (("GET", "HEAD"), f"/{NAME}/resolve/(?P<revision>(?:refs/pr/)?[^/]+)/(?P<file>.+)", Handler.resolve),
)
