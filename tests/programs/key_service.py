"""A key service for the tests: a process of its own that listens on a socket and keeps the only key.

``key_service.py SOCKET BEHAVIOUR``; BEHAVIOUR is "good", "wrong" (it answers with other bytes), "slow" (it answers
after a minute) or "rude" (it hangs up). A request is "wrap" or "unwrap", a space and bytes, and ends with the sending
side closed; so does the answer, which is "ok" or "no", a space and bytes.
"""

import os
import secrets
import socket
import sys
import time

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

path, behaviour = sys.argv[1:]
cipher = AESGCM(AESGCM.generate_key(256))


def answer(request: bytes) -> bytes:
    verb, _, content = request.partition(b" ")
    if behaviour == "wrong":
        return b"ok " + secrets.token_bytes(100)
    if verb == b"wrap":
        nonce = secrets.token_bytes(12)
        return b"ok " + nonce + cipher.encrypt(nonce, content, None)
    try:
        return b"ok " + cipher.decrypt(content[:12], content[12:], None)
    except (InvalidTag, ValueError):
        return b"no such key"


with socket.socket(socket.AF_UNIX) as server:
    server.bind(path + ".new")
    server.listen()
    os.rename(path + ".new", path)  # a process that sees it can connect
    while True:
        connection, _ = server.accept()
        with connection:
            request = b""
            while piece := connection.recv(65536):
                request += piece
            if behaviour == "slow":
                time.sleep(60)
            if behaviour != "rude":
                connection.sendall(answer(request))
