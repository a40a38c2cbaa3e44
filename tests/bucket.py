"""An object store for tests: a server of whole objects over HTTP, and fsspec's way to it.

    with BucketServer() as store:
        register(folder, store, monkeypatch)  # bucket://NAME/prefix, in this process and in those that it starts

As in S3 there are keys and no directories, nothing can be renamed, and the driver's errors are of classes of its own.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem


class BucketError(Exception):
    """The store failed, in a way that is no OSError."""


class BucketServer:
    """Objects by key. `status` other than 200 is what every request is answered, or those of the methods in `only`."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.status, self.only = 200, ()
        self.asked: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_any(self):
                store.answer(self)

            do_GET = do_PUT = do_DELETE = do_any

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        """Does what a request asks for."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        key, method = unquote(request.path.lstrip("/")), request.command
        with self.lock:
            self.asked.append((method, key))
            status, found = 200, b""
            if self.status != 200 and (not self.only or method in self.only):
                status = self.status
            elif key.startswith("?"):
                found = json.dumps([one for one in self.objects if one.startswith(key[1:])]).encode()
            elif method == "PUT":
                self.objects[key] = body
            elif key not in self.objects:
                status = 404
            elif method == "DELETE":
                del self.objects[key]
            else:
                found = self.objects[key]
        request.send_response(status)
        request.send_header("Content-Length", str(len(found)))
        request.end_headers()
        request.wfile.write(found)

    def folders(self, prefix: str) -> set[str]:
        """The names of what lies under a prefix, as directories would be."""
        with self.lock:
            return {key[len(prefix) :].split("/")[0] for key in self.objects if key.startswith(prefix)}


class BucketFileSystem(AbstractFileSystem):
    """The driver. It is told the store's address by FSSPEC_BUCKET_ENDPOINT."""

    protocol = "bucket"
    cachable = False

    def __init__(self, endpoint: str = "", **kwargs):
        super().__init__(**kwargs)
        self.endpoint = endpoint

    def _request(self, method, key, body=None):
        request = urllib.request.Request(f"{self.endpoint}/{quote(key, safe='?/')}", data=body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    raise FileNotFoundError(key) from None
                if error.code == 403:
                    raise PermissionError(f"no access to {key}") from None
                raise BucketError(f"{error.code} for {key}") from None
        except urllib.error.URLError as error:
            raise BucketError(str(error)) from None

    def makedirs(self, path, exist_ok=False):
        pass

    def put_file(self, lpath, rpath, **_):
        self._request("PUT", self._strip_protocol(rpath), Path(lpath).read_bytes())

    def pipe_file(self, path, value, **_):
        self._request("PUT", self._strip_protocol(path), value)

    def cat_file(self, path, **_):
        return self._request("GET", self._strip_protocol(path))

    def get_file(self, rpath, lpath, **_):
        Path(lpath).write_bytes(self.cat_file(rpath))

    def ls(self, path, detail=True, **_):
        prefix = f"{self._strip_protocol(path)}/"
        keys = json.loads(self._request("GET", f"?{prefix}"))
        names = sorted({prefix + key[len(prefix) :].split("/")[0] for key in keys})
        if not names:
            raise FileNotFoundError(path)
        return [{"name": name} for name in names] if detail else names

    def rm(self, path, recursive=False, maxdepth=None):
        keys = json.loads(self._request("GET", f"?{self._strip_protocol(path)}/"))
        if not keys:
            raise FileNotFoundError(path)
        for key in keys:
            self._request("DELETE", key)


def register(folder: Path, store: BucketServer, monkeypatch) -> None:
    """Makes bucket:// known here, and to processes that are started from now on, as an installed driver's is."""
    info = folder / "bucket_driver-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bucket-driver\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fsspec.specs]\nbucket = bucket:BucketFileSystem\n")
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, paths)))
    monkeypatch.setenv("FSSPEC_BUCKET_ENDPOINT", store.url)
    monkeypatch.setitem(fsspec.config.conf, "bucket", {"endpoint": store.url})
    fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
