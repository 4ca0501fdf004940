"""A store that speaks enough of S3 for pyarrow, in this process, and fails when it is told to."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Fault = Callable[[str, str], str | None]
"""Says what goes wrong with a call of a method and object, or with an object's BODY.

Calls may be answered "503"; a body may be "cut" halfway, or "spoilt" in transit.
"""


class Store:
    """Objects by name, and what is to go wrong.

    Attributes:
        objects: Content by `bucket/key`.
        fault: Asked before every call.
        calls: Method and object of every call, in their order.
        address: Where it listens.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.fault: Fault = lambda _method, _name: None
        self.calls: list[tuple[str, str]] = []
        self.address = ""

    def uri(self, path: str) -> str:
        """Return the address of a bucket and key as pyarrow takes it."""
        host = self.address.replace(":", "%3A")
        return f"s3://key:secret@{path}?scheme=http&endpoint_override={host}&region=us-east-1"

    def listing(self, bucket: str, query: dict[str, list[str]]) -> str:
        """Return the answer to ListObjectsV2."""
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        keys = [name.removeprefix(f"{bucket}/") for name in sorted(self.objects)]
        found, folders, count = "", set[str](), 0
        for key in (key for key in keys if key.startswith(prefix)):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                count += 1
                size = len(self.objects[f"{bucket}/{key}"])
                found += (
                    f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>&quot;x&quot;"
                    "</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        for folder in sorted(folders):
            found += f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
        facts = f"<KeyCount>{count + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{facts}{found}</ListBucketResult>"


@contextmanager
def s3_server() -> Iterator[Store]:
    """Serve an empty store, with one bucket called `bucket`, to this machine alone."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    store.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_words: object) -> None:
        """Say nothing."""

    def _split(self) -> tuple[str, dict[str, list[str]]]:
        place = urlsplit(self.path)
        return unquote(place.path).removeprefix("/"), parse_qs(place.query, keep_blank_values=True)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
                return data
            return _unchunked(iter(data.split(b"\r\n")))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            return _unchunked(iter(content.split(b"\r\n")))
        return content

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fails(self, name: str) -> bool:
        self.store.calls.append((self.command, name))
        if self.store.fault(self.command, name) == "503":
            self._body()
            self._answer(503, b"<Error><Code>ServiceUnavailable</Code></Error>")
            return True
        return False

    def do_GET(self) -> None:
        name, query = self._split()
        if self._fails(name):
            return
        if "list-type" in query:
            bucket = name.partition("/")[0]
            self._answer(200, self.store.listing(bucket, query).encode())
            return
        self._object(name)

    def do_HEAD(self) -> None:
        name, _ = self._split()
        if not self._fails(name):
            self._object(name)

    def _object(self, name: str) -> None:
        if name == "bucket":
            self._answer(200)
        elif name not in self.store.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._content(name, self.store.objects[name])

    def _content(self, name: str, data: bytes) -> None:
        code, headers = 200, {"ETag": '"x"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            code, whole, data = 206, len(data), data[int(first) : int(last or len(data)) + 1]
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
        if self.command == "HEAD":
            headers["Content_Length"] = str(len(data))
        elif fault := self.store.fault("BODY", name):
            headers["Content_Length"] = str(len(data))
            self.close_connection = fault == "cut"
            data = data[: len(data) // 2] if fault == "cut" else bytes(len(data))
        self._answer(code, data, **headers)

    def do_PUT(self) -> None:
        name, query = self._split()
        if self._fails(name):
            return
        data = self._body()
        if "partNumber" in query:
            number = int(query["partNumber"][0])
            self.store.parts[query["uploadId"][0]][number] = data
        else:
            self.store.objects[name] = data
        self._answer(200, ETag='"x"')

    def do_POST(self) -> None:
        name, query = self._split()
        if self._fails(name):
            return
        body = self._body()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.store.parts[upload] = {}
            made = f"<UploadId>{upload}</UploadId>"
            told = f"<InitiateMultipartUploadResult>{made}</InitiateMultipartUploadResult>"
            self._answer(200, told.encode())
        elif "uploadId" in query:
            parts = self.store.parts[query["uploadId"][0]]  # kept, as a client may ask twice
            self.store.objects[name] = b"".join(parts[number] for number in sorted(parts))
            told = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
            self._answer(200, told.encode())
        else:
            for key in body.split(b"<Key>")[1:]:
                self.store.objects.pop(f"{name}/{key.split(b'<')[0].decode()}", None)
            self._answer(200, b"<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:
        name, query = self._split()
        if self._fails(name):
            return
        self.store.parts.pop(query.get("uploadId", [""])[0], None)
        self.store.objects.pop(name, None)
        self._answer(204)


def _unchunked(lines: Iterator[bytes]) -> bytes:
    """Return the content of AWS's own chunks, which have a signature each."""
    content = b""
    for line in lines:
        size = int(line.split(b";")[0], 16)
        if not size:
            return content
        piece = next(lines)
        while len(piece) < size:
            piece += b"\r\n" + next(lines)
        content += piece
    return content
