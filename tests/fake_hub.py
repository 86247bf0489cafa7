"""A Hub on this machine: as much of its HTTP interface as huggingface_hub calls to push a model and to load it again.

    with FakeHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path)})
        hub.files("someone/name")["README.md"]

huggingface_hub reads where the Hub is when it is imported, so what uses the fake runs in a process of its own. Big
files go the way of git LFS (`HF_HUB_DISABLE_XET`): Xet's storage speaks a protocol of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

USER, TOKEN = "someone", "hf_WriteSecret"
READ_TOKEN = "hf_ReadSecret"  # the same user's, which may not write
OTHER_TOKEN = "hf_OtherSecret"  # another user's


class Refused(Exception):
    """An answer that is an error, as the Hub gives it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    """A repository: its commits, the last of which each branch names."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        """A commit with these files; its 40 digits."""
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str:
        """The commit that a branch or its own digits name."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Asked:
    """One request: who asks for what."""

    method: str
    path: str
    body: bytes
    token: str | None
    revision: str = ""

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """Status, body (dicts and lists become JSON) and headers."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """Serves from a thread between `__enter__` and `__exit__`.

    Attributes:
        repos: by `user/name`.
        requests: (method, path, status) of all that were asked.
        url: where it is.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self._faults: list[list[Any]] = []
        self._lock = threading.RLock()

    def __enter__(self) -> FakeHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.storage = f"http://localhost:{self._server.server_address[1]}/storage"  # another host, as on the Hub
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that uses this Hub; `home` holds its downloads and stands for a home of its own."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}  # a busy machine is slow
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or "", "NO_PROXY": "127.0.0.1,localhost"}
        return variables

    def refuse(self, path: str, status: int | None, times: float = float("inf")) -> None:
        """Answer what matches `path`, a regular expression of method and path, with an error; None: hang up."""
        self._faults.append([path, status, times])

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    def answer(self, asked: Asked) -> Answer | None:
        """None: hang up."""
        with self._lock:
            for fault in self._faults:
                pattern, status, times = fault
                if times and re.search(pattern, f"{asked.method} {asked.path}"):
                    fault[2] -= 1
                    self.requests.append((asked.method, asked.path, status or 0))
                    return None if status is None else _refusal(Refused(status, "made up by the test"))
            try:
                made = self._route(asked)
            except Refused as error:
                made = _refusal(error)
            self.requests.append((asked.method, asked.path, made.status))
            return made

    def _route(self, asked: Asked) -> Answer:
        for method, pattern, call in ROUTES:
            found = re.fullmatch(pattern, asked.path)
            if found and asked.method in method:
                return call(self, asked, **{name: unquote(text) for name, text in found.groupdict().items() if text})
        raise Refused(404, f"no such page: {asked.method} {asked.path}")

    def user(self, asked: Asked) -> str:
        """Who asks."""
        users = {TOKEN: USER, READ_TOKEN: USER, OTHER_TOKEN: "other"}
        if asked.token not in users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return users[asked.token]

    def readable(self, asked: Asked, repo: str) -> Repo:
        """A repository that may be seen; a private one is not there for others."""
        found = self.repos.get(repo)
        mine = asked.token in (TOKEN, READ_TOKEN) and repo.startswith(f"{USER}/")
        if found is None or (found.private and not mine):
            raise Refused(404 if asked.token else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, asked: Asked, repo: str) -> Repo:
        """A repository that may be written."""
        user = self.user(asked)
        found = self.readable(asked, repo)
        if repo.partition("/")[0] != user or asked.token == READ_TOKEN:
            raise Refused(403, "you don't have write access to this repository")
        return found


def whoami(hub: FakeHub, asked: Asked) -> Answer:
    return Answer({"type": "user", "name": hub.user(asked), "orgs": [], "auth": {"type": "access_token"}})


def create(hub: FakeHub, asked: Asked) -> Answer:
    wanted, user = asked.json(), hub.user(asked)
    owner = wanted["organization"] or user
    if owner != user or asked.token == READ_TOKEN:
        raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    name = f"{owner}/{wanted['name']}"
    if name in hub.repos:
        return Answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
    hub.repos[name] = Repo(private=wanted.get("visibility") == "private")
    hub.repos[name].commit({".gitattributes": b""}, "main", "initial commit")
    return Answer({"url": f"{hub.url}/{name}", "name": name})


def validate_yaml(hub: FakeHub, asked: Asked) -> Answer:
    """The metadata of a card; its `model-index` has to be one."""
    try:
        metadata = yaml.safe_load(asked.json()["content"].split("---\n")[1])
        if "model-index" in metadata:
            model_index_to_eval_results(metadata["model-index"])
    except (IndexError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Answer({"errors": [], "warnings": []})


def preupload(hub: FakeHub, asked: Asked, repo: str, revision: str) -> Answer:
    """What is text goes with the commit, everything else by LFS; known files are told by what git calls them."""
    found = hub.writable(asked, repo)
    old = found.commits[found.find(revision)]
    files = []
    for file in asked.json()["files"]:
        big = b"\0" in base64.b64decode(file["sample"])
        oid = _git_oid(old[file["path"]]) if file["path"] in old and not big else None
        mode = {"path": file["path"], "uploadMode": "lfs" if big else "regular", "shouldIgnore": False}
        files.append({**mode, **({"oid": oid} if oid else {})})
    return Answer({"files": files})


def lfs_batch(hub: FakeHub, asked: Asked, repo: str) -> Answer:
    hub.writable(asked, repo)
    objects = []
    for wanted in asked.json()["objects"]:
        actions = {"upload": {"href": f"{hub.storage}/{wanted['oid']}"}}
        objects.append(wanted if wanted["oid"] in hub.objects else {**wanted, "actions": actions})
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(hub: FakeHub, asked: Asked, oid: str) -> Answer:
    if hashlib.sha256(asked.body).hexdigest() != oid:
        raise Refused(400, "the content is not what it is called")
    hub.objects[oid] = asked.body
    return Answer()


def lfs_get(hub: FakeHub, asked: Asked, oid: str) -> Answer:
    return Answer(hub.objects[oid])


def commit(hub: FakeHub, asked: Asked, repo: str, revision: str) -> Answer:
    """Lines of JSON: a header, then what is added and deleted."""
    found = hub.writable(asked, repo)
    files, message = dict(found.commits[found.find(revision)]), ""
    for line in asked.body.splitlines():
        item = json.loads(line)
        kind, value = item["key"], item["value"]
        if kind == "header":
            message = value["summary"]
        elif kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif kind == "deletedFile":
            del files[value["path"]]
        else:
            raise Refused(400, f"a fake Hub has no {kind}")
    oid = found.commit(files, revision, message)
    return Answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"})


def info(hub: FakeHub, asked: Asked, repo: str, revision: str = "main") -> Answer:
    found = hub.readable(asked, repo)
    oid = found.find(revision)
    siblings = [{"rfilename": path} for path in found.commits[oid]]
    return Answer({"id": repo, "modelId": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []})


def may_write(hub: FakeHub, asked: Asked, repo: str) -> Answer:
    hub.writable(asked, repo)
    return Answer({})


def tree(hub: FakeHub, asked: Asked, repo: str, revision: str, folder: str = "") -> Answer:
    found = hub.readable(asked, repo)
    files = found.commits[found.find(revision)]
    prefix = f"{folder}/" if folder else ""
    entries = [_entry(path, content) for path, content in files.items() if path.startswith(prefix)]
    if not entries:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    return Answer(entries)


def paths_info(hub: FakeHub, asked: Asked, repo: str, revision: str) -> Answer:
    found = hub.readable(asked, repo)
    files = found.commits[found.find(revision)]
    return Answer([_entry(path, files[path]) for path in asked.json()["paths"] if path in files])


def resolve(hub: FakeHub, asked: Asked, repo: str, revision: str, path: str) -> Answer:
    """A file; one of LFS lies elsewhere, as on the Hub."""
    found = hub.readable(asked, repo)
    oid = found.find(revision)
    headers = {"X-Repo-Commit": oid}
    if path not in found.commits[oid]:
        refusal = _refusal(Refused(404, "Entry not found", "EntryNotFound"))
        return Answer(refusal.body, 404, {**refusal.headers, **headers})
    content = found.commits[oid][path]
    name = hashlib.sha256(content).hexdigest()
    if name not in hub.objects:
        return Answer(content, 200, {**headers, "ETag": f'"{_git_oid(content)}"'})
    headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{name}"'}
    return Answer(b"", 302, {**headers, "ETag": f'"{name}"', "Location": f"{hub.storage}/{name}"})


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Answer]]] = [
    (("GET",), "/api/whoami-v2", whoami),
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate_yaml),
    (("POST",), _MODEL + "/preupload/(?P<revision>[^/]+)", preupload),
    (("POST",), _MODEL + "/commit/(?P<revision>[^/]+)", commit),
    (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    (("PUT",), "/storage/(?P<oid>[0-9a-f]+)", lfs_put),
    (("GET", "HEAD"), "/storage/(?P<oid>[0-9a-f]+)", lfs_get),
    (("GET",), _MODEL + "(?:/revision/(?P<revision>[^/]+))?", info),
    (("GET",), _MODEL + "/auth-check/write", may_write),
    (("GET",), _MODEL + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
    (("POST",), _MODEL + "/paths-info/(?P<revision>[^/]+)", paths_info),
    (("GET", "HEAD"), "/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}


def _refusal(error: Refused) -> Answer:
    headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
    return Answer({"error": str(error)}, error.status, headers)


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Nothing."""

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            asked = Asked(self.command, urlsplit(self.path).path, body, token if scheme == "Bearer" else None)
            answer = hub.answer(asked)
            if answer is None:
                self.close_connection = True
                self.connection.close()
                return
            is_json = not isinstance(answer.body, bytes)
            content = json.dumps(answer.body).encode() if is_json else answer.body
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    return Handler
