"""The Hugging Face Hub on loopback: the part of its HTTP API that creates, pushes and pulls models.

    with LoopbackHub(tokens={"hf_alice": "alice"}) as hub:
        subprocess.run([...], env=os.environ | hub.environment("hf_alice", home=tmp_path))

Large files are uploaded through Git LFS's batch API, as to the Hub without Xet. A commit is atomic.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def add_commit(self, message: str, files: dict[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files.items())}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    def find(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """`tokens` maps each valid token to its user. Inside `with`, the server runs in a thread.

    `requests` lists the received requests. Uploads of more than `cut_after` bytes are cut off at that size.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """Environment variables for a process that uses this Hub, with its own caches in `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return variables | ({"HF_TOKEN": token} if token else {"HF_TOKEN": ""})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.read_body()
        if self.body is None:
            return
        hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    return answer(self, hub, **match.groupdict())
            raise Refused(404, message=f"no route for {self.command} {path}")
        except Refused as refused:
            error = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.answer({"error": refused.message}, refused.status, {k: v for k, v in error.items() if v})

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self) -> bytes | None:
        """The body of the request; None if the connection was cut on purpose."""
        length, cut = int(self.headers.get("Content-Length", 0)), self.server.hub.cut_after
        if self.command == "PUT" and cut is not None and length > cut:
            self.rfile.read(cut)
            self.close_connection = True
            self.connection.close()
            return None
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.server.hub.tokens.get(token)

    def open(self, repo: str, revision: str = "main", write: bool = False) -> tuple[Repository, Commit]:
        """As on the Hub, other users' private repositories do not exist for a user."""
        user, found = self.user(), self.server.hub.repositories.get(repo)
        owner = repo.split("/")[0]
        if found is None or (found.private and user != owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refused(403, message=f"You don't have the rights to write to {repo}")
        commit = found.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found, commit


def whoami(request: Handler, hub: LoopbackHub) -> None:
    user = request.user()
    if user is None:
        raise Refused(401, message="Invalid username or password.")
    request.answer({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})


def create(request: Handler, hub: LoopbackHub) -> None:
    asked, user = json.loads(request.body), request.user()
    if user is None:
        raise Refused(401, message="Invalid username or password.")
    repo = f"{asked.get('organization') or user}/{asked['name']}"
    if not repo.startswith(f"{user}/"):
        raise Refused(403, message=f"You don't have the rights to create a model under the namespace {repo}")
    answer = {"url": f"{hub.url}/{repo}", "name": repo, "id": "0"}
    if repo in hub.repositories:
        return request.answer(answer | {"error": "You already created this model repo"}, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.repositories[repo] = Repository(private)
    hub.repositories[repo].add_commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
    request.answer(answer)


def validate_card(request: Handler, hub: LoopbackHub) -> None:
    metadata = yaml.safe_load(json.loads(request.body)["content"].split("---")[1])
    bases = metadata.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not REPO_ID.fullmatch(base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return request.answer({"errors": [{"message": message}], "warnings": []}, 400)
    request.answer({"errors": [], "warnings": []})


def preupload(request: Handler, hub: LoopbackHub, repo: str, revision: str) -> None:
    request.open(repo, revision, write=True)
    large = (".safetensors", ".bin", ".png", ".pt", ".npy")
    files = [
        {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
        for file in json.loads(request.body)["files"]
    ]
    request.answer({"files": [file | {"shouldIgnore": False} for file in files]})


def lfs_batch(request: Handler, hub: LoopbackHub, repo: str) -> None:
    request.open(repo, write=True)
    objects = json.loads(request.body)["objects"]
    for entry in objects:
        if entry["oid"] not in hub.large_files:
            entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
            entry["actions"]["verify"] = {"href": f"{hub.url}/{repo}.git/info/lfs/verify"}
    request.answer({"transfer": "basic", "objects": objects})


def lfs_upload(request: Handler, hub: LoopbackHub, oid: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, message="The content does not have the announced SHA-256.")
    hub.large_files[oid] = request.body
    request.answer(b"")


def lfs_verify(request: Handler, hub: LoopbackHub, repo: str) -> None:
    asked = json.loads(request.body)
    if len(hub.large_files.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, message="The object was not uploaded.")
    request.answer(b"")


def commit(request: Handler, hub: LoopbackHub, repo: str, revision: str) -> None:
    repository, head = request.open(repo, revision, write=True)
    files, message = dict(head.files), ""
    for line in request.body.splitlines():
        operation = json.loads(line)
        kind, value = operation["key"], operation["value"]
        if kind == "header":
            message = value["summary"]
            if value.get("parentCommit", head.oid) != head.oid:
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        elif kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in hub.large_files:
                raise Refused(400, message=f"The LFS object of {value['path']} does not exist.")
            files[value["path"]] = hub.large_files[value["oid"]]
        elif kind == "deletedFile":
            del files[value["path"]]
        else:
            raise Refused(400, message=f"unknown operation {kind}")
    made = repository.add_commit(message, files)
    url = f"{hub.url}/{repo}/commit/{made.oid}"
    request.answer({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


def model_info(request: Handler, hub: LoopbackHub, repo: str, revision: str = "main") -> None:
    repository, found = request.open(repo, revision)
    siblings = [{"rfilename": path} for path in sorted(found.files)]
    about = {"_id": "0", "id": repo, "modelId": repo, "sha": found.oid, "private": repository.private}
    request.answer(about | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})


def tree(request: Handler, hub: LoopbackHub, repo: str, revision: str, folder: str = "") -> None:
    _, found = request.open(repo, revision)
    prefix = f"{folder}/" if folder else ""
    paths = sorted(path for path in found.files if path.startswith(prefix))
    if not paths:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    blobs = [{"path": path, "content": found.files[path]} for path in paths]
    request.answer([{"type": "file", "path": b["path"], **describe(b["content"])} for b in blobs])


def describe(content: bytes) -> dict:
    return {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


def resolve(request: Handler, hub: LoopbackHub, repo: str, revision: str, path: str) -> None:
    _, found = request.open(repo, revision)
    if path not in found.files:
        raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
    content = found.files[path]
    headers = {"X-Repo-Commit": found.oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
    request.answer(content, 200, headers)


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_card),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", lfs_verify),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", commit),
    ("GET", f"/api/models/{REPO}", model_info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", model_info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", tree),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}/(?P<folder>.+)", tree),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
]
