"""Every line of the README, and of some pages, that a reader may copy is run as it stands; Rust by `cargo test`."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from guest import ask, need_qemu, qemu_command, running

REPOSITORY = Path(__file__).resolve().parents[1]


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["disk.img", "ram.img"]:
        (tmp_path / name).write_bytes(os.urandom(300_000))
    (tmp_path / "team.txt").write_text("\n".join(vmsnap.recipients_of(vmsnap.generate_identity())))
    return tmp_path


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    # One after the other, as they are read.
    script = "\n".join(blocks("python"))
    output = subprocess.check_output([sys.executable, "-c", script], cwd=folder, text=True)
    assert output == "[] ['disks']\n300000\n"


def test_the_python_of_the_guide_runs(tmp_path: Path) -> None:
    subprocess.check_output([sys.executable, "-c", "\n".join(blocks("python", "docs/guide.md"))], cwd=tmp_path)


def test_the_python_of_the_page_on_keys_runs(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path / "settings")}
    script = "\n".join(blocks("python", "docs/keys.md"))
    subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.STDOUT)


def key_services() -> dict[str, Any]:
    """The classes of the page on keys."""
    found: dict[str, Any] = {}
    for block in blocks("python", "docs/keys.md"):
        if "class " in block:
            exec(block, found)
    return found


def test_the_example_for_kms_asks_as_its_client_is_asked(tmp_path: Path) -> None:
    """A stand-in with the parameters and results of the boto3 client, because tests cannot use KMS itself."""

    class Client:
        def encrypt(self, *, KeyId: str, Plaintext: bytes) -> dict[str, bytes]:  # noqa: N803
            assert KeyId == "alias/vms"
            return {"CiphertextBlob": b"KMS:" + Plaintext[::-1]}

        def decrypt(self, *, KeyId: str, CiphertextBlob: bytes) -> dict[str, bytes]:  # noqa: N803
            assert (KeyId, CiphertextBlob[:4]) == ("alias/vms", b"KMS:")
            return {"Plaintext": CiphertextBlob[:3:-1]}

    provider = key_services()["AwsKms"](Client(), "alias/vms")
    vmsnap.SnapshotWriter(tmp_path / "vm1", key_provider=provider).write_fragment("a", 1)
    assert vmsnap.SnapshotReader(tmp_path / "vm1", key_provider=provider).read_fragment("a") == 1


def test_the_example_for_vault_asks_as_its_documentation_says(tmp_path: Path) -> None:
    """https://developer.hashicorp.com/vault/api-docs/secret/transit, from a server of our own."""
    with Vault(("127.0.0.1", 0), Transit) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        make = key_services()["VaultTransit"]
        provider = make(f"http://127.0.0.1:{server.server_port}", "the token", "vms")
        vmsnap.SnapshotWriter(tmp_path / "vm1", key_provider=provider).write_fragment("a", 1)
        assert vmsnap.SnapshotReader(tmp_path / "vm1", key_provider=provider).read_fragment("a") == 1
        stranger = make(f"http://127.0.0.1:{server.server_port}", "another token", "vms")
        with pytest.raises(vmsnap.KeyUnavailableError, match="403"):
            vmsnap.SnapshotReader(tmp_path / "vm1", key_provider=stranger)
        server.shutdown()


class Vault(ThreadingHTTPServer):
    """Keeps one key."""

    cipher = AESGCM(AESGCM.generate_key(256))


class Transit(BaseHTTPRequestHandler):
    """Two calls of the transit engine."""

    server: Vault

    def do_POST(self) -> None:
        if self.headers["X-Vault-Token"] != "the token":
            self.send_error(403)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/transit/encrypt/vms":
            nonce = os.urandom(12)
            sealed = nonce + self.server.cipher.encrypt(nonce, base64.b64decode(body["plaintext"]), None)
            data = {"ciphertext": "vault:v1:" + base64.b64encode(sealed).decode()}
        else:
            assert self.path == "/v1/transit/decrypt/vms"
            sealed = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"))
            plaintext = self.server.cipher.decrypt(sealed[:12], sealed[12:], None)
            data = {"plaintext": base64.b64encode(plaintext).decode()}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": data}).encode())

    def log_message(self, *_arguments: object) -> None:
        pass


def test_the_first_commands_of_the_readme_run(folder: Path) -> None:
    [commands] = [block for block in blocks("sh") if "vmsnap dump" in block and "vmsnap ls" not in block]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = subprocess.check_output(["sh", "-euc", commands], cwd=folder, env={**os.environ, "PATH": path})
    ram = (folder / "ram.img").read_bytes()
    assert f"00001000  {ram[4096:4104].hex(' ')}".encode() in output
    assert (folder / "first.img").read_bytes() == ram
    assert vmsnap.open(folder / "first").encrypted


def test_the_commands_of_the_readme_run(folder: Path) -> None:
    [commands] = [block for block in blocks("sh") if "vmsnap ls" in block]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = subprocess.check_output(["sh", "-euc", commands], cwd=folder, env={**os.environ, "PATH": path})
    ram = (folder / "ram.img").read_bytes()
    assert (folder / "back.img").read_bytes() == ram
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
    assert f"00001000  {ram[4096:4104].hex(' ')}".encode() in output
    assert b"mem\t" in output
    assert b"mem_metadata\t" in output


def test_the_guests_of_the_readme_are_saved(folder: Path) -> None:
    need_qemu()
    [commands] = [block for block in blocks("sh") if "vmsnap qemu save" in block]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    qmp = folder / "vm1.qmp"
    with running(qemu_command(qmp, memory=""), qmp):
        subprocess.check_call(["sh", "-euc", commands], cwd=folder, env={**os.environ, "PATH": path})
        assert ask(qmp, "query-status")["status"] == "running"
    memories = [vmsnap.open(folder / name).memory().regions for name in ("vm3", "vm4")]
    assert memories[0] == memories[1] != []


def test_the_archives_of_the_readme_are_what_it_says(folder: Path) -> None:
    [commands] = [block for block in blocks("sh") if "vmsnap pack" in block]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with vmsnap.create(folder / "vm1") as snapshot:
        snapshot.write_memory([vmsnap.GuestRegion(0, (folder / "ram.img").read_bytes())])
    output = subprocess.check_output(["sh", "-euc", commands], cwd=folder, env={**os.environ, "PATH": path})
    assert f"00001000  {(folder / 'ram.img').read_bytes()[4096:4104].hex(' ')}".encode() in output
    files = [{path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("vm1", "vm2")]
    assert files[0] == files[1]
    (folder / "unpacked").mkdir()
    subprocess.check_call(["tar", "-xf", "vm1.vmsnap.tar", "-C", "unpacked"], cwd=folder)
    assert {path.name: path.read_bytes() for path in (folder / "unpacked").iterdir()} == files[0]


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z]+)", (REPOSITORY / "README.md").read_text()))
    assert {"demo", "test", "build"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for document in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
