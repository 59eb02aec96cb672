"""Signatures of requests to S3, version 4."""

import hashlib
import hmac
import re
from urllib.parse import parse_qsl, quote, urlsplit

from http_faults import Request


def sign_again(request: Request, access_key: str, secret_key: str) -> None:
    """Sign a request to S3 whose headers were changed after it was signed."""
    authorization = request.header("Authorization") or ""
    pattern = r"AWS4-HMAC-SHA256 Credential=[^/]+/([^,]+), ?SignedHeaders=([^,]+), ?Signature=.*"
    found = re.fullmatch(pattern, authorization)
    assert found, f"the proxy cannot sign requests with the authorization {authorization!r}"
    scope = found[1]
    names = [name for name in found[2].split(";") if request.header(name) is not None]
    address = urlsplit(request.target)
    query = sorted((quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in parse_qsl(address.query, True))
    canonical = [request.method, address.path, "&".join(f"{key}={value}" for key, value in query)]
    canonical += [f"{name}:{' '.join((request.header(name) or '').split())}" for name in names]
    canonical += ["", ";".join(names), request.header("x-amz-content-sha256") or "UNSIGNED-PAYLOAD"]
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    signed = "\n".join(["AWS4-HMAC-SHA256", request.header("x-amz-date") or "", scope, digest])
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    signature = hmac.digest(key, signed.encode(), hashlib.sha256).hex()
    request.headers = [each for each in request.headers if each[0].lower() != "authorization"]
    credential = f"Credential={access_key}/{scope}, SignedHeaders={';'.join(names)}, Signature={signature}"
    request.headers.append(("Authorization", f"AWS4-HMAC-SHA256 {credential}"))
