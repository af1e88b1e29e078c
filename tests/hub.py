"""A hub of our own on 127.0.0.1, which speaks the protocol of huggingface_hub's client."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import references

# That of timm's public repositories.
CARD = "---\ntags:\n- image-classification\n- timm\nlicense: apache-2.0\n---\n# Model card\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclasses.dataclass(frozen=True)
class Cut:
    """Content whose connection breaks after some bytes."""

    content: bytes
    after: int


class Hub(http.server.ThreadingHTTPServer):
    """Serves the folders OWNER/NAME in a folder, each with one commit, `COMMIT`, on "main".

    As the public hub does, it redirects requests for large files to another host, "localhost", and
    states their sha256 and size in its own headers; the ETag of other files is Git's sha1.

    Attributes:
        requests: (method, path) of each request.
        gated: Repositories that need the token "hf_right".
        faults: File names -> a function that returns the content that is sent instead, or a `Cut`.
        status: An HTTP status for all requests, such as 503; None for the usual one.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.requests, self.gated, self.faults, self.status = [], set(), {}, None

    @property
    def url(self):
        """The address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serve(folder):
    """Runs a `Hub` in a thread during the block."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub = self.server
        hub.requests.append((self.command, self.path))
        if hub.status:
            return self.send(hub.status)
        if self.path.startswith("/large/"):
            return self.send_file(hub.folder / self.path.removeprefix("/large/"))
        match = _FILE.fullmatch(self.path)
        repository = match and hub.folder / match["repository"]
        if not match or not repository.is_dir():
            # The public hub does not say whether a private repository exists.
            return self.send(401, {"X-Error-Code": "RepoNotFound"})
        token = self.headers.get("Authorization")
        if match["repository"] in hub.gated and token != "Bearer hf_right":
            return self.send(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        if match["revision"] not in ("main", COMMIT):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": COMMIT}
        path = repository / match["file"]
        if not path.is_file():
            return self.send(404, {**commit, "X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self.send_file(path, {**commit, "ETag": f'"{etag}"'})
        etag = hashlib.sha256(content).hexdigest()
        large = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        location = f"http://localhost:{hub.server_port}/large/{path.relative_to(hub.folder)}"
        return self.send(302, {**commit, **large, "Location": location})

    def send_file(self, path, headers=None):
        content = path.read_bytes()
        if self.command == "GET" and path.name in self.server.faults:
            content = self.server.faults[path.name](content)
        self.send(200, headers, content)

    def send(self, status, headers=None, content=b""):
        after = None
        if isinstance(content, Cut):
            content, after, self.close_connection = content.content, content.after, True
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            # A client closes the connection when it has enough.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[:after])


def write_timm(folder, name, **options):
    """Writes a repository by timm's own code; returns the network, with random statistics."""
    timm = references.import_timm()
    network = timm.create_model(name.partition("/")[2], pretrained=False, **options)
    references.randomize(network.eval(), 0)
    timm.models.save_for_hf(network, folder / name, safe_serialization=True)
    # As in the public repositories, which timm has written before it knew licences.
    config = json.loads((folder / name / "config.json").read_text())
    config["pretrained_cfg"].pop("license", None)
    (folder / name / "config.json").write_text(json.dumps(config))
    (folder / name / "README.md").write_text(CARD)
    return network
