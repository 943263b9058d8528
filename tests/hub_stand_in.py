"""What of the Hugging Face Hub's HTTP interface an upload and a download need, on this machine.

Repositories are lists of commits, each a whole tree of files; branches name commits. Large files go
by Git LFS, as `.gitattributes` of the Hub's repositories has it for model files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".pt2", ".safetensors")
Tree = dict[str, bytes]


class Hub:
    """What it holds, and what it was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.trees: dict[str, dict[str, Tree]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: dict[str, str | None] = {}
        """By path, but for uploads to the signed addresses of LFS."""

    def head(self, repo: str) -> Tree:
        return self.trees[repo][self.branches[repo]["main"]]

    def commit(self, repo: str, branch: str, tree: Tree) -> str:
        found = f"{len(self.trees[repo])}{sorted((n, len(b)) for n, b in tree.items())}"
        name = hashlib.sha1(  # noqa: S324 - as git names commits
            f"{repo}{found}".encode()
        ).hexdigest()
        self.trees[repo][name] = tree
        self.branches[repo][branch] = name
        return name

    def create(self, repo: str) -> None:
        if repo not in self.trees:
            self.trees[repo], self.branches[repo] = {}, {}
            self.commit(repo, "main", {".gitattributes": b"*.pt2 filter=lfs\n"})

    def resolve(self, repo: str, revision: str) -> str | None:
        found = self.branches[repo].get(revision, revision)
        return found if found in self.trees[repo] else None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.asked.append((self.command, path))
        for method, pattern, handle in ROUTES:
            if self.command == method and (found := re.fullmatch(pattern, path)):
                if handle is not Handler.put:
                    self.hub.tokens[path] = self.headers.get("Authorization")
                handle(self, body, *found.groups())
                return
        self.answer(404, {"error": "no such path"})

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815 - as http.server calls them

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        there = repo in self.hub.trees
        self.hub.create(repo)
        self.answer(409 if there else 200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def at(self, repo: str, revision: str) -> str | None:
        """The commit; None after an answer that there is none."""
        if repo not in self.hub.trees:
            self.answer(404, {"error": "x"}, X_Error_Code="RepoNotFound")
        elif (commit := self.hub.resolve(repo, revision)) is None:
            self.answer(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
        else:
            return commit
        return None

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        if commit := self.at(repo, revision):
            files = self.hub.trees[repo][commit].items()
            self.answer(
                200, [{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files]
            )

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.at(repo, revision):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        del repo
        objects = [
            {
                **one,
                "actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}},
            }
            for one in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not (before := self.at(repo, revision)):
            return
        tree = dict(self.hub.trees[repo][before])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        made = self.hub.commit(repo, revision, tree)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made})

    def file(self, _: bytes, repo: str, revision: str, name: str) -> None:
        if not (commit := self.at(repo, revision)):
            return
        data = self.hub.trees[repo][commit].get(name)
        if data is None:
            self.answer(404, {"error": "x"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, X_Repo_Commit=commit)


Handle = Callable[..., None]
ROUTES: list[tuple[str, str, Handle]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/models/([^/]+/[^/]+)/tree/([^/]+)", Handler.tree),
    ("POST", "/api/models/([^/]+/[^/]+)/preupload/([^/]+)", Handler.preupload),
    ("POST", "/api/models/([^/]+/[^/]+)/commit/([^/]+)", Handler.commit),
    ("POST", "/([^/]+/[^/]+).git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/([0-9a-f]+)", Handler.put),
    ("HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.file),
    ("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.file),
]


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A Hub that listens."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
