"""A small Hub on this machine, for the real client: repositories, commits, files, and trouble.

It speaks the part of the API that huggingface_hub uses here: repositories, branches, pull requests,
preupload, LFS batches (one request, or parts), commits, trees, and files by HEAD, by byte ranges
and through signed links to another host. `Fire` says which request goes wrong, and how.
"""

import asyncio
import base64
import hashlib
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LARGE = (".safetensors", ".gguf", ".distcp", ".pt", ".bin")
PAGE = 1000
TOKEN = "hf_aSecretThatNobodyMayEverSee0123456789"
USER = "org"


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Repository:
    def __init__(self, private=False, gated=False):
        self.private = private
        self.gated = gated
        self.commits = {}  # sha -> path -> digest
        self.log = []  # (ref, sha, title, paths that it added)
        self.refs = {}
        self.pulls = 0
        self.commit("main", {}, "initial commit")

    def commit(self, ref, files, title, added=()):
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files.items())}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        self.log.append((ref, sha, title, list(added)))
        return sha

    def files(self, revision):
        sha = self.refs.get(revision, revision)
        return sha, self.commits.get(sha)


class Fire:
    """Which requests fail: each kind of trouble with its share of the requests that it may hit.

    Which of them, by number, the seed says for each kind alone: however requests of several kinds
    come in between each other.
    """

    def __init__(self, seed=0, **shares):
        self.shares = shares
        self.met = Counter()
        self._rngs = {kind: random.Random(f"{seed} {kind}") for kind in shares}
        self._lock = threading.Lock()

    def strikes(self, kind):
        if kind not in self.shares:
            return False
        with self._lock:
            hit = self._rngs[kind].random() < self.shares[kind]
            self.met[kind] += hit
            return hit


class Hub:
    def __init__(self):
        self.repositories = {}
        self.blobs = {}  # sha256 or git hash -> content
        self.parts = {}
        self.fire = Fire()
        self.stored = Counter()  # how often the content of each large file was received whole
        self.requests = Counter()
        self.leaks = []
        self.granted = {TOKEN}
        self.part_bytes = 0
        self.link_uses = None
        self.links = {}
        self.held = False  # what is fetched or sent waits as long as this is so
        self.together = 0  # ... and until so many wait at once
        self.waiting = 0
        self.bytes_out = Counter()  # by digest
        self.lies = {}  # path -> how many bytes more than there are the listing says
        self.bad_names = []
        self.on_commit = None
        self.ignored = ()  # endings of the names that the `.gitignore` of a repository has
        self.card_faults = {}  # what a card may not hold -> what the Hub says of it
        self.endpoint = self.store = ""

    # -- what tests do to it

    def add(self, name, files, **how):
        """Create a repository with files, path -> bytes."""
        repository = self.repositories[name] = Repository(**how)
        repository.commit("main", self.put(files), "files", files)
        return repository

    def put(self, files):
        """Store contents; return path -> digest."""
        return {path: self.keep(path, data) for path, data in files.items()}

    def keep(self, path, data):
        digest = sha256(data) if path.endswith(LARGE) else git_hash(data)
        self.blobs[digest] = data
        return digest

    def tree(self, name, revision="main"):
        """Return path -> content."""
        _, files = self.repositories[name].files(revision)
        return {path: self.blobs[digest] for path, digest in files.items()}

    def __enter__(self):
        routes = [Route("/{rest:path}", self.handle, methods=["GET", "HEAD", "POST", "PUT"])]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=0, log_level="critical", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self._address = self._server.servers[0].sockets[0].getsockname()
        port = self._address[1]
        self.endpoint, self.store = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        return self

    def __exit__(self, *error):
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)

    @contextmanager
    def holding(self):
        """Hold back meanwhile what is fetched or sent."""
        self.held = True
        try:
            yield
        finally:
            self.held = False

    def until_waiting(self):
        """Return once somebody waits for what is held back."""
        while not self.waiting:
            time.sleep(0.001)

    def settle(self):
        """Return once all that clients who are gone had sent is done with."""
        with socket.create_connection(self._address) as last:  # behind all that came before
            last.sendall(b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while last.recv(4096):
                pass
        state = self._server.server_state
        while state.connections or state.tasks:
            time.sleep(0.001)

    # -- what the client asks

    async def handle(self, request):
        path = request.scope["raw_path"].decode().split("?")[0]
        for method, pattern, action in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if found and request.method in method:
                self.requests[action.__name__] += 1
                words = {key: unquote(text) for key, text in found.groupdict().items()}
                return await self._answer(action, request, words)
        return Response(f"no such route {request.method} {path}", 404)

    async def _answer(self, action, request, words):
        to_store = action in (Hub.download, Hub.upload, Hub.upload_part)
        if to_store and "authorization" in request.headers:
            self.leaks.append(request.url.path)
        if not to_store:
            if self.fire.strikes("429"):
                return Response("slow down", 429, {"Retry-After": "0"})
            if self.fire.strikes("503"):
                return Response("busy", 503)
        repository = None
        if "repo" in words:
            repository = self.repositories.get(words["repo"])
            token = request.headers.get("authorization", "").removeprefix("Bearer ")
            if repository is None or (repository.private and token not in self.granted):
                return _refusal(401 if not token else 404, "RepoNotFound", "Repository not found")
            if repository.gated and token not in self.granted and "resolve" in request.url.path:
                return _refusal(403, "GatedRepo", "Access to this model is restricted")
            if request.method in ("POST", "PUT") and token not in self.granted:
                return _refusal(403, "", "You have no write access")
        return await action(self, request, repository, **words)

    async def info(self, request, repository, repo, rev="main"):
        sha, files = repository.files(rev)
        if files is None:
            return _refusal(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in files]
        return JSONResponse({
            "id": repo, "sha": sha, "private": repository.private, "siblings": siblings,
            "gated": repository.gated, "tags": [], "downloads": 0, "likes": 0,
        })  # fmt: skip

    async def list_tree(self, request, repository, repo, rev):
        _, files = repository.files(rev)
        if files is None:
            return _refusal(404, "RevisionNotFound", "Invalid rev id")
        entries = [self._entry(path, digest) for path, digest in sorted(files.items())]
        entries += [{**self._entry("x", git_hash(b"x"), b"x"), "path": p} for p in self.bad_names]
        start = int(request.query_params.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            url = f"{self.endpoint}{request.url.path}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        return JSONResponse(entries[start : start + PAGE], headers=headers)

    def _entry(self, path, digest, data=None):
        size = len(self.blobs[digest] if data is None else data) + self.lies.get(path, 0)
        entry = {"type": "file", "path": path, "size": size, "oid": digest}
        if len(digest) == 64:
            entry["oid"] = git_hash(digest.encode())
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        return entry

    async def paths_info(self, request, repository, repo, rev):
        form = parse_qs((await request.body()).decode())
        _, files = repository.files(rev)
        return JSONResponse([self._entry(p, files[p]) for p in form["paths"] if p in files])

    async def create_repo(self, request, repository):
        asked = await request.json()
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _refusal(401, "", "Invalid username or password.")
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.repositories:
            there = {"error": "You already created this repo", "url": f"{self.endpoint}/{name}"}
            return JSONResponse(there, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[name] = Repository(private=private)
        return JSONResponse({"url": f"{self.endpoint}/{name}"})

    async def create_branch(self, request, repository, repo, branch):
        if branch in repository.refs:
            return _refusal(409, "", "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        return JSONResponse({})

    async def create_pull(self, request, repository, repo):
        repository.pulls += 1
        repository.refs[f"refs/pr/{repository.pulls}"] = repository.refs["main"]
        return JSONResponse({"num": repository.pulls})

    async def pull(self, request, repository, repo, number):
        if int(number) > repository.pulls:
            return _refusal(404, "", "no such discussion")
        return JSONResponse({
            "num": int(number), "title": "x", "status": "open", "isPullRequest": True,
            "author": {"name": USER}, "createdAt": "2026-01-01T00:00:00.000Z", "events": [],
            "filesWithConflicts": [], "changes": {"base": "refs/heads/main"},
            "repo": {"name": repo, "type": "model"},
        })  # fmt: skip

    async def preupload(self, request, repository, repo, rev):
        _, files = repository.files(rev)
        if files is None:
            return _refusal(404, "RevisionNotFound", "Invalid rev id")
        asked = (await request.json())["files"]
        return JSONResponse({
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": file["path"].endswith(tuple(self.ignored)),
                    "oid": files.get(file["path"]),
                }
                for file in asked
            ]
        })  # fmt: skip

    async def batch(self, request, repository, repo):
        objects = []
        for wanted in (await request.json())["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            item = {"oid": oid, "size": size}
            if oid not in self.blobs:
                item["actions"] = {"upload": self._upload_action(oid, size)}
                verify = f"{self.endpoint}/lfs/verify"
                item["actions"]["verify"] = {"href": verify, "header": {}}
            objects.append(item)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _let_go(self):
        """Wait as long as requests are held back."""
        self.waiting += 1
        try:
            if self.waiting >= self.together:
                self.together = 0
            while self.held or self.together:
                await asyncio.sleep(0.001)
        finally:
            self.waiting -= 1

    def _upload_action(self, oid, size):
        if not self.part_bytes or size <= self.part_bytes:
            return {"href": f"{self.store}/store/{oid}?sig=once"}
        count = -(-size // self.part_bytes)
        parts = {f"{n + 1:05d}": f"{self.store}/store/{oid}/{n + 1}?sig=p" for n in range(count)}
        header = {"chunk_size": str(self.part_bytes), **parts}
        return {"href": f"{self.endpoint}/lfs/complete", "header": header}

    async def _received(self, request):
        """Return a body, unless the store lets go of it half-way."""
        if self.fire.strikes("upload cut"):
            raise ConnectionError("the store hangs up")
        data = await request.body()
        if self.fire.strikes("upload expired"):
            return b"expired"
        await self._let_go()
        return None if self.fire.strikes("upload 503") else data

    async def upload(self, request, repository, oid):
        data = await self._received(request)
        if data is None:
            return Response("busy", 503)
        if data == b"expired":
            return Response("Request has expired", 403)
        if sha256(data) != oid:
            return Response("the content has another hash", 400)
        self.blobs[oid] = data
        self.stored[oid] += 1
        return Response("", 200, {"ETag": f'"{oid}"'})

    async def upload_part(self, request, repository, oid, number):
        data = await self._received(request)
        if data is None:
            return Response("busy", 503)
        if data == b"expired":
            return Response("Request has expired", 403)
        self.parts.setdefault(oid, {})[int(number)] = data
        return Response("", 200, {"ETag": f'"{oid}-{number}"'})

    async def complete(self, request, repository):
        oid = (await request.json())["oid"]
        data = b"".join(data for _, data in sorted(self.parts.pop(oid, {}).items()))
        if sha256(data) != oid:
            return Response("the parts have another hash", 400)
        self.blobs[oid] = data
        self.stored[oid] += 1
        return JSONResponse({"success": True})

    async def verify(self, request, repository):
        oid = (await request.json())["oid"]
        return Response("", 200 if oid in self.blobs else 404)

    async def validate(self, request, repository):
        card = (await request.json())["content"]
        errors = [{"message": said} for text, said in self.card_faults.items() if text in card]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def make_commit(self, request, repository, repo, rev):
        sha, files = repository.files(rev)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        header = lines[0]["value"]
        if self.on_commit:
            self.on_commit(repository, rev)
            sha, files = repository.files(rev)
        if self.fire.strikes("commit fails"):
            return Response("oh no", 500)
        if header.get("parentCommit") not in (None, sha):
            return _refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files, added = dict(files), []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = git_hash(data)
                self.blobs[git_hash(data)] = data
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return Response(f"{value['path']} was never uploaded", 400)
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            added.append(value["path"])
        new = repository.commit(rev, files, header["summary"], added)
        if self.fire.strikes("commit lost"):
            return Response("the answer is lost", 502)
        return JSONResponse({
            "success": True, "commitOid": new, "commitUrl": f"{self.endpoint}/{repo}/commit/{new}",
            "hookOutput": "",
        })  # fmt: skip

    async def resolve(self, request, repository, repo, rev, path):
        sha, files = repository.files(rev)
        if files is None or path not in files:
            return _refusal(404, "EntryNotFound", "Entry not found")
        digest = files[path]
        data = self.blobs[digest]
        etag = "0" * len(digest) if self.fire.strikes("etag") else digest
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if len(digest) == 64:
            key = f"{len(self.links)}"
            self.links[key] = self.link_uses
            headers |= {
                "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)),
                "Location": f"{self.store}/cdn/{digest}?Signature={key}",
            }  # fmt: skip
            return Response("", 302, headers)
        return self._ranged(request, data, headers)

    async def download(self, request, repository, digest):
        key = request.query_params["Signature"]
        if self.links.get(key) is not None:
            self.links[key] -= 1
            if self.links[key] < 0:
                return Response("Request has expired", 403)
        if self.fire.strikes("expired"):
            return Response("Request has expired", 403)
        if self.fire.strikes("store 503"):
            return Response("busy", 503)
        if self.fire.strikes("stall"):
            while not await request.is_disconnected():
                await asyncio.sleep(0.001)
        await self._let_go()
        data = self.blobs[digest]
        if self.fire.strikes("corrupt"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        answer = self._ranged(request, data, {"ETag": f'"{digest}"'})
        self.bytes_out[digest] += int(answer.headers.get("Content-Length", 0))
        return answer

    def _ranged(self, request, data, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        total, status, first = len(data), 200, 0
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or total), total - 1)
            if first >= total:
                return Response("", 416, {"Content-Range": f"bytes */{total}"})
            data, status = data[first : last + 1], 206
        if request.method == "GET" and self.fire.strikes("short"):
            data = data[: len(data) // 2 + 1]
        if asked:
            headers = {
                **headers, "Content-Range": f"bytes {first}-{first + len(data) - 1}/{total}"
            }  # fmt: skip
        headers = {**headers, "Content-Length": str(len(data))}
        if request.method == "HEAD":
            return Response("", status, headers)
        if self.fire.strikes("cut") and len(data) > 1:
            return StreamingResponse(iter([data[: len(data) // 2]]), status, headers)
        return Response(data, status, headers)

    MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
    ROUTES = (
        (("GET",), MODEL, info),
        (("GET",), MODEL + r"/revision/(?P<rev>[^/]+)", info),
        (("GET",), MODEL + r"/tree/(?P<rev>[^/]+)", list_tree),
        (("POST",), MODEL + r"/paths-info/(?P<rev>[^/]+)", paths_info),
        (("POST",), MODEL + r"/preupload/(?P<rev>[^/]+)", preupload),
        (("POST",), MODEL + r"/commit/(?P<rev>[^/]+)", make_commit),
        (("POST",), MODEL + r"/branch/(?P<branch>[^/]+)", create_branch),
        (("POST",), MODEL + r"/discussions", create_pull),
        (("GET",), MODEL + r"/discussions/(?P<number>\d+)", pull),
        (("POST",), r"/api/repos/create", create_repo),
        (("POST",), r"/api/validate-yaml", validate),
        (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        (("POST",), r"/lfs/complete", complete),
        (("POST",), r"/lfs/verify", verify),
        (("PUT",), r"/store/(?P<oid>[0-9a-f]+)", upload),
        (("PUT",), r"/store/(?P<oid>[0-9a-f]+)/(?P<number>\d+)", upload_part),
        (("GET",), r"/cdn/(?P<digest>[0-9a-f]+)", download),
        (
            ("GET", "HEAD"),
            r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)",
            resolve,
        ),
    )


def _refusal(status, code, message):
    headers = {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    return JSONResponse({"error": message}, status, headers)
