"""Uploads to fake-gcs-server in the form in which Rust's object_store makes them: by Google's XML API."""

import io
import json
import secrets
from urllib.parse import unquote, urlsplit

from http_faults import Answer, Fault, Request

# No object of a test has it.
_BOUNDARY = secrets.token_hex(16)


class XmlUploads(Fault):
    """Makes an upload of the JSON API, the only one that fake-gcs-server has, of each PUT of an object."""

    def before(self, request: Request) -> None:
        bucket, name = (unquote(part) for part in urlsplit(request.target).path.removeprefix("/").split("/", 1))
        metadata = {
            key.lower().removeprefix("x-goog-meta-"): value
            for key, value in request.headers
            if key.lower().startswith("x-goog-meta-")
        }
        resource = json.dumps({"name": name, "metadata": metadata})
        content_type = request.header("Content-Type") or "application/octet-stream"
        head = f"--{_BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{resource}\r\n"
        head += f"--{_BOUNDARY}\r\nContent-Type: {content_type}\r\n\r\n"
        generation = request.header("x-goog-if-generation-match")
        condition = "" if generation is None else f"&ifGenerationMatch={generation}"
        request.method = "POST"
        request.target = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart{condition}"
        request.body = head.encode() + request.body + f"\r\n--{_BOUNDARY}--\r\n".encode()
        request.headers = [
            ("Host", request.header("Host") or ""),
            ("Content-Type", f"multipart/related; boundary={_BOUNDARY}"),
            ("Content-Length", str(len(request.body))),
        ]

    def after(self, answer: Answer) -> Answer:
        if answer.status != 200:
            return answer
        told = json.loads(answer.body.read())
        headers = [("ETag", f'"{told["etag"]}"'), ("x-goog-generation", told["generation"]), ("Content-Length", "0")]
        return Answer(200, headers, io.BytesIO())
