"""The pages of docs/: their code blocks run, and the site builds without a warning.

`test_readme.py`, `test_keys.py`, `test_qemu.py`, `test_recovery.py`, `test_object_store_page.py` and
`test_independent_reader.py` run blocks, too:
`BLOCKS` says which.
"""

import hmac
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import floe
import pytest
import vmsnap
from commands import run, write_private
from independent import vmsnap_packer, vmsnap_reader
from pages import REPOSITORY, at_a_terminal, blocks, commands, python, shell, text_of

DOCS = sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))

# The number of blocks of each language, and the tests that run them. Count a new block only when a test runs it.
BLOCKS = {
    ("README.md", "sh"): 5,  # test_readme; of the one with `make` it tells only that there are such targets
    ("README.md", "python"): 3,  # test_readme
    ("README.md", "rust"): 1,  # cargo test: src/lib.rs includes the README
    ("docs/cli.md", "sh"): 8,  # below
    ("docs/design.md", "text"): 3,  # diagrams
    # The worked example in test_independent_reader and below, a stream in test_migration_stream; formulas.
    ("docs/format.md", ""): 12,
    ("docs/guide.md", "python"): 6,  # test_readme
    ("docs/import.md", "python"): 1,  # test_libvirt
    ("docs/import.md", "sh"): 2,  # test_libvirt
    ("docs/index.md", "python"): 1,  # below
    ("docs/index.md", "sh"): 1,  # below
    ("docs/keys.md", "python"): 5,  # test_readme
    ("docs/keys.md", "sh"): 1,  # test_keys
    # test_object_store_page
    ("docs/object-stores.md", "json"): 2,
    ("docs/object-stores.md", "python"): 1,
    ("docs/object-stores.md", "sh"): 3,
    ("docs/qemu.md", "python"): 1,  # test_qemu
    ("docs/qemu.md", "sh"): 4,  # test_qemu
    ("docs/recovery.md", "python"): 2,  # test_recovery
    ("docs/recovery.md", "sh"): 14,  # test_recovery
    ("docs/rust.md", "rust"): 2,  # cargo test: src/lib.rs includes the page; the first is the README's
    ("docs/rust.md", "toml"): 1,  # how to depend on the crate; below
}


def test_every_code_block_is_one_that_a_test_knows() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for page in ["README.md", *(f"docs/{name}" for name in DOCS)]:
        fences = re.findall(r"^ *```(.*)$", text_of(page), re.MULTILINE)
        found.update((page, language) for language in fences[::2])
    assert found == BLOCKS


# Code blocks ----------------------------------------------------------------------------------------------------------


def test_the_two_minutes_of_the_first_page_are_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    [script] = blocks("docs/index.md", "sh")
    printed = shell(script, tmp_path).stdout
    assert (tmp_path / "settings/vmsnap/identity.txt").exists()
    assert "\nok: 2 fragments" in printed
    assert "\n00001000  " in printed
    # Three quarters are holes.
    assert sum(file.stat().st_size for file in (tmp_path / "vm1").iterdir()) < 17 << 20
    python("\n".join(blocks("docs/index.md", "python")), tmp_path)


def test_the_rust_of_its_page_is_the_one_that_cargo_runs() -> None:
    assert blocks("docs/rust.md", "rust")[:1] == blocks("README.md", "rust")
    library = (REPOSITORY / "src/lib.rs").read_text()
    assert '#[cfg(doctest)]\n#[doc = include_str!("../README.md")]' in library
    assert '#[cfg(all(doctest, feature = "age"))]\n#[doc = include_str!("../docs/rust.md")]' in library
    package = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["package"]
    [dependency] = blocks("docs/rust.md", "toml")
    assert list(tomllib.loads(dependency)["dependencies"]) == [package["name"]]
    assert package["repository"] in dependency


@pytest.fixture
def ram(tmp_path: Path) -> bytes:
    """The contents of the file ram.img."""
    content = os.urandom(1 << 20)
    (tmp_path / "ram.img").write_bytes(content)
    return content


def test_the_first_commands_of_the_page_on_them_do_what_it_says(tmp_path: Path, ram: bytes) -> None:
    first, *_, verify, _ = blocks("docs/cli.md", "sh")
    printed = shell(first, tmp_path).stdout
    assert "\nok: 2 fragments checked, " in printed
    assert f"\n00001000  {ram[4096:4104].hex(' ')}" in printed
    assert (tmp_path / "back.img").read_bytes() == ram
    printed = shell(verify, tmp_path).stdout
    assert re.search(r"^ok: 2 fragments checked, .*, sealed\nseal digest: [0-9a-f]{64}$", printed, re.MULTILINE)
    (tmp_path / "vm1/vmsnap_manifest").unlink()
    assert "\nFAILED: 1 problem, all fragments were read\n" in shell(verify, tmp_path, status=1).stdout


def test_the_commands_with_keys_do_what_their_page_says(tmp_path: Path, ram: bytes) -> None:
    keygen, told, dump, rekey, encrypt, decrypt = commands(blocks("docs/cli.md", "sh", "Keys")[0])
    shell(keygen, tmp_path)
    assert (tmp_path / "id.txt").stat().st_mode & 0o777 == 0o600
    (recipient,) = shell(told, tmp_path).stdout.splitlines()
    (tmp_path / "team.txt").write_text(f"# the team\n{recipient}\n")
    # For somebody else as well, whose recipient takes the place of the dots.
    (other,) = vmsnap.recipients_of(vmsnap.generate_identity())
    assert dump.count("age1...") == 1
    shell(dump.replace("age1...", other), tmp_path)
    at_a_terminal(rekey, tmp_path, ["hunter2", "hunter2"])
    at_a_terminal(encrypt, tmp_path, ["hunter2"])
    shell(decrypt, tmp_path)
    assert vmsnap.open(tmp_path / "vm1", passphrase="hunter2").memory()[0 : len(ram)] == ram
    assert vmsnap.open(tmp_path / "vm3").memory()[0 : len(ram)] == ram


GUEST = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[0x5000:0x5004] = b"boot"
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(f"{start:x}-{start + (1 << 30):x}", flush=True)
sys.stdin.read()
"""


def test_the_commands_with_guest_memory_do_what_their_page_says(tmp_path: Path, ram: bytes) -> None:
    whole, ranges, process = commands(blocks("docs/cli.md", "sh", "Guest memory")[0])
    image, root = tmp_path / "ram.img", tmp_path / "vm1"
    shell(whole, tmp_path)
    assert vmsnap.open(root).memory()[0 : len(ram)] == ram

    shutil.rmtree(root)
    with open(image, "r+b") as file:
        file.truncate(0x1_4000_0000)
        file.seek(0xC000_0000)
        file.write(b"above the hole")
    shell(ranges, tmp_path)
    memory = vmsnap.open(root).memory()
    assert memory.regions == [range(0xC000_0000), range(0x1_0000_0000, 0x1_8000_0000)]
    assert memory[0x1_0000_0000:0x1_0000_000E] == b"above the hole"

    shutil.rmtree(root)
    command = [sys.executable, "-c", GUEST]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdout is not None
        addresses = guest.stdout.readline().strip()
        # The line that finds the guest's memory. The kernel may merge the mapping with its neighbours.
        [find] = commands(blocks("docs/cli.md", "sh", "Guest memory")[1])
        found = shell(find.replace("4711", str(guest.pid)), tmp_path).stdout
        start, end = (int(address, 16) for address in addresses.split("-"))
        mappings = [[int(each, 16) for each in line.split()[0].split("-")] for line in found.splitlines()]
        assert any(first <= start and end <= last for first, last in mappings)
        # The number and the addresses belong to a process on another machine.
        for written, here in (("4711", str(guest.pid)), ("7f3a00000000-7f3a40000000", addresses)):
            assert process.count(written) == 1
            process = process.replace(written, here)
        shell(process, tmp_path)
        guest.communicate()
    memory = vmsnap.open(root).memory()
    assert memory.regions == [range(1 << 30)]
    assert memory[0x5000:0x5004] == b"boot"


def test_the_copies_do_what_their_page_says(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    key = write_private(tmp_path / "vm.key", bytes(range(32))).read_bytes()
    with vmsnap.SnapshotWriter(tmp_path / "vm1").add_namespace("disks").raw_fragment("sda") as fragment:
        fragment.write(content)
    shell(blocks("docs/cli.md", "sh", "Fragments and files")[0], tmp_path)
    assert (tmp_path / "sda.img").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "vm1/disks/sdb").read_bytes() == content
    with vmsnap.open(tmp_path / "vm2", key=key).namespace("disks").raw_fragment("sda") as copy:
        assert copy.read() == content


def test_the_commands_with_archives_do_what_their_page_says(tmp_path: Path, ram: bytes) -> None:
    run("dump", tmp_path / "ram.img", tmp_path / "vm1")
    printed = shell(blocks("docs/cli.md", "sh", "One file")[0], tmp_path).stdout
    assert "\nok: 2 fragments checked, " in printed
    for name in ("vm1", "vm1.vmsnap.tar", "vm2", "vm3.vmsnap.tar"):
        assert (tmp_path / name).is_dir() == (not name.endswith(".tar"))
        assert vmsnap.open(tmp_path / name).memory()[0 : len(ram)] == ram
    again = [(tmp_path / name / "vmsnap_manifest").read_bytes() for name in ("vm1", "vm2")]
    assert again[0] == again[1]


def test_the_lines_for_completion_set_it_up(tmp_path: Path) -> None:
    bash, fish = commands(blocks("docs/cli.md", "sh", "Completion")[0])
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    script = tmp_path / "bashrc"
    script.write_text(f"{bash}\ncomplete -p vmsnap\n")
    assert "-F _vmsnap_completion" in shell(f"bash {script}", tmp_path).stdout
    # A shell that few have: without it, that the first half of the line prints what it understands.
    if shutil.which("fish"):
        (tmp_path / "config.fish").write_text(f"{fish}\ncomplete -c vmsnap\n")
        assert "_vmsnap_completion" in shell(f"fish {tmp_path}/config.fish", tmp_path).stdout
    else:
        command, pipe, source = fish.partition("#")[0].partition("|")
        assert (pipe, source.strip()) == ("|", "source")
        assert "complete --no-files --command vmsnap" in shell(command, tmp_path).stdout


def test_the_page_on_the_command_line_has_every_command() -> None:
    section = text_of("docs/cli.md", "Commands")
    told = {title: re.findall(r"^\| `vmsnap ((?:qemu )?[a-z-]+)", rows, re.MULTILINE) for title, rows in parts(section)}
    lines = run("--help").stdout.decode()
    known = {
        title: re.findall(
            r"^  ((?:qemu )?[a-z-]+) ", lines.partition(f"\n{title}:\n")[2].partition("\n\n")[0], re.MULTILINE
        )
        for title in told
    }
    assert told == known
    assert len(told) == 6
    machine_readable = text_of("docs/cli.md", "Output for programs")
    for name in (name for names in known.values() for name in names):
        if not name.startswith("qemu ") and "--json" in run(name, "--help").stdout.decode():
            assert f"\n| `{name}`" in machine_readable, name


def parts(section: str) -> list[tuple[str, str]]:
    """The parts of a section, each with its heading."""
    return re.findall(r"^### ([^\n]*)\n(.*?)(?=^### |\Z)", section, re.MULTILINE | re.DOTALL)


def test_the_versions_on_the_page_on_compatibility_are_those_of_the_tests(shared_dir: Path) -> None:
    lines = text_of("docs/compatibility.md", "By version").splitlines()
    rows = {cells[0]: cells[1] for line in lines if len(cells := line.strip("| ").split(" | ")) == 4}
    golden = (shared_dir / "golden/README.md").read_text()
    for row, era in (("crosvm, CBOR", "crosvm-cbor"), ("crosvm, JSON", "crosvm-json")):
        [commit] = re.findall("`([0-9a-f]{12})`", rows[row])
        assert re.search(rf"^\| `{era}` \| {commit}", golden, re.MULTILINE), row
    [commit] = re.findall("`([0-9a-f]{7})`", rows["known answers of FLOE"])
    assert f"commit {commit}," in (shared_dir / "vectors/floe/README.md").read_text()
    locked = tomllib.loads((REPOSITORY / "Cargo.lock").read_text())["package"]
    for crate in ("ciborium", "lz4_flex"):
        assert rows[crate].split(";")[0].split(",")[0] in {each["version"] for each in locked if each["name"] == crate}
    assert f"age/cmd/age@v{rows['age in Go']}" in (REPOSITORY / "tests/test_keys.py").read_text()
    assert f'"pyrage>={rows["pyrage"].split()[0]}"' in (REPOSITORY / "pyproject.toml").read_text()
    versions = [path.name for path in (REPOSITORY / "tests/golden").iterdir() if path.is_dir()]
    assert rows["vmsnap"] == ", ".join(sorted(versions))
    tested = text_of("docs/qemu.md", "Tested versions")
    for version in re.findall(r"[0-9]+[.][0-9.]+[0-9]", rows["QEMU"]):
        assert f"QEMU {version} (" in tested


# The worked example of the format ------------------------------------------------------------------------------------


def test_the_values_on_the_way_to_the_worked_example_are_right() -> None:
    [block] = [block for block in blocks("docs/format.md", "") if block.startswith("params")]
    # A name is words and one space between them; after it the value, which may go on in the next lines.
    said: dict[str, list[str]] = {}
    for line in block.splitlines():
        name, value = line[:13].strip(), line[13:].split("  ")[0].strip()
        if name:
            key = name if name != "info of the h" else "info"
            said[key] = [] if key == "info" else [value]
        else:
            said[list(said)[-1]].append(value)
    values = {name: [bytes.fromhex(part) for part in parts] for name, parts in said.items()}
    parameters, iv, purpose, aad = values["info"]
    assert (parameters, iv, purpose) == (values["params"][0], bytes(32), b"HEADER_TAG:")
    assert [aad] == values["aad"] == [floe.fragment_aad("vm/blob")]
    assert len(b"".join(values["info"])) == 78

    def kdf(key: bytes, purpose: bytes, length: int) -> bytes:
        return hmac.digest(key, parameters + iv + purpose + aad + b"\x01", "sha384")[:length]

    assert values["header tag"] == [kdf(bytes(32), b"HEADER_TAG:", 32)]
    message_key = kdf(bytes(32), b"MESSAGE_KEY:", 48)
    assert values["message key"] == [message_key]
    segment_keys = [kdf(message_key, b"DEK:" + first.to_bytes(8, "big"), 32) for first in (0, 1 << 20)]
    assert values["segment key"] == segment_keys
    assert values["segment AAD"] == [bytes(9), bytes(7) + b"\x01\x01"]


def test_the_payload_of_the_worked_example_is_right() -> None:
    [block] = [block for block in blocks("docs/format.md", "") if block.startswith("a6\n")]
    payload = bytes.fromhex(block)
    assert payload == floe.cbor(floe.payload_with(data_key=bytes(32), snapshot_id=bytes(range(16))))
    assert len(payload) == 118


def test_the_archive_of_the_worked_example_is_right(tmp_path: Path) -> None:
    """The snapshot of the example, sealed, packed by the Python reader."""
    root, caller_key, data_key = tmp_path / "vm1", bytes([0x11]) * 32, bytes(32)
    (root / "vm").mkdir(parents=True)

    def write(path: str, key: bytes, aad: bytes, plaintext: bytes, chunk: int) -> bytes:
        sealed = floe.seal(key, aad, plaintext, chunk, iv=bytes(32), counted_nonces=True)
        (root / path).write_bytes(sealed)
        return sealed

    payload = floe.cbor(floe.payload_with(data_key=data_key))
    write("enc_metadata", caller_key, floe.KEY_AAD, payload, floe.KEY_CHUNK_BYTES)
    manifest = {
        "format": "vmsnap-manifest",
        "version": 1,
        "snapshot_id": floe.SNAPSHOT_ID,
        "created": "2026-11-26T12:00:00Z",
        "generator": "example",
        "encrypted": True,
        "requires": [],
        "namespaces": ["vm"],
        "fragments": {},
    }
    for path, plaintext in (("vm/blob", bytes(range(40))), ("vm/empty", b"")):
        sealed = write(path, data_key, floe.fragment_aad(path), plaintext, 32)
        entry = {"size": len(plaintext), "stored_size": len(sealed), "chunk_size": 32, "floe_header_tag": sealed[42:74]}
        manifest["fragments"][path] = entry
    write("vmsnap_manifest", data_key, b"vmsnap/1/manifest", floe.cbor(manifest), 65536)
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(root, caller_key), tmp_path / "vm1.vmsnap.tar")
    archive = (tmp_path / "vm1.vmsnap.tar").read_bytes()

    [block] = [block for block in blocks("docs/format.md", "") if block.startswith('0     "pax_global_header"')]
    for line in block.splitlines():
        offset, said = line.split(maxsplit=1)
        data = b""
        for text, byte, count in re.findall(r'(?:"([^"]*)"|(\b[0-9a-f]{2}\b))(?:\*(\d+))?', said):
            data += (text.encode() or bytes.fromhex(byte)) * int(count or 1)
        assert archive[int(offset) : int(offset) + len(data)] == data, line
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text_of("docs/format.md"), re.MULTILINE)
    with tarfile.open(tmp_path / "vm1.vmsnap.tar") as tar:
        members = [(member.name, member.offset, member.offset_data, member.size) for member in tar.getmembers()]
    assert members == [(row[0].rstrip("/"), *(int(number.replace(",", "")) for number in row[1:])) for row in rows]
    assert f"The file has {len(archive):,} bytes." in text_of("docs/format.md")


# The site ------------------------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """The directory of the site, and the output of mkdocs."""

    root: Path
    said: str

    def read(self, page: str) -> str:
        return (self.root / page).read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site as `make docs` builds it, with a page that stands for rustdoc's many."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module} beside this Python: pip install --group docs")
    folder = tmp_path_factory.mktemp("site")
    (folder / "rustdoc/vmsnap").mkdir(parents=True)
    (folder / "rustdoc/vmsnap/index.html").write_text("<html></html>")
    environment = os.environ | {"VMSNAP_RUSTDOC": str(folder / "rustdoc"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder / "html"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Site(folder / "html", done.stdout + done.stderr)


def test_every_page_is_built_and_in_the_navigation(site: Site) -> None:
    navigation = re.findall(r"^  - .*: ([a-z-]+\.md)\b", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted([*DOCS, "changelog.md"])
    first = site.read("index.html")
    for page in navigation:
        built = page.replace(".md", ".html")
        assert f'href="{built}" class="md-nav__link' in first, page
        assert "<h1" in site.read(built), page
    assert "not released yet" in site.read("changelog.html")
    assert "WARNING" not in site.said


class Elements(HTMLParser):
    """The elements of a page with their attributes, and all ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(page)
        self.ids = {attributes["id"] for _, attributes in self.elements if "id" in attributes}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def addresses(self, *tags: str) -> Iterator[str]:
        for tag, attributes in self.elements:
            if tag in tags:
                yield from (attributes[name] for name in ("href", "src", "srcset", "data") if name in attributes)


LOADING = ("script", "link", "img", "iframe", "source", "video", "audio", "object", "embed")


def loaded_from_elsewhere(root: Path) -> tuple[list[str], int]:
    """Return the URLs on other hosts that pages and style sheets of a site load, and the number of all loaded URLs."""
    found, count = [], 0
    for page in root.rglob("*.html"):
        for address in Elements(page.read_text()).addresses(*LOADING):
            count += 1
            if urlsplit(address).netloc:
                found.append(f"{page.name}: {address}")
    for sheet in root.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", sheet.read_text()):
            count += 1
            if urlsplit(address).netloc:
                found.append(f"{sheet.name}: {address}")
    return found, count


def test_nothing_is_loaded_from_another_host(site: Site) -> None:
    found, count = loaded_from_elsewhere(site.root)
    assert not found
    # Each page has at least a style sheet and a script.
    assert count > 2 * len(DOCS)
    for page in site.root.glob("*.html"):
        text = page.read_text()
        # Requests of the theme's script to other hosts: the stars of a repository, and the library for diagrams.
        assert 'data-md-component="source"' not in text, page.name
        assert 'class="mermaid"' not in text, page.name


def test_rustdoc_loads_nothing_from_another_host() -> None:
    rustdoc = REPOSITORY / "target/doc"
    if not (rustdoc / "vmsnap/index.html").exists():
        pytest.skip("no rustdoc in target/doc: cargo doc --locked --no-deps")
    found, count = loaded_from_elsewhere(rustdoc)
    assert not found
    assert count > 100


def test_every_link_within_the_site_leads_somewhere(site: Site) -> None:
    pages = {page.name: Elements(page.read_text()) for page in site.root.glob("*.html") if page.name != "404.html"}
    followed = 0
    for name, page in pages.items():
        for address in page.addresses("a", *LOADING):
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue
            target = unquote(url.path) or name
            assert (site.root / target).is_file(), f"{name}: {address}"
            if url.fragment and target in pages and url.fragment != "__skip":
                assert unquote(url.fragment) in pages[target].ids, f"{name}: {address}"
            followed += 1
    assert followed > 500
    assert "rust-api/vmsnap/index.html" in pages["rust.html"].addresses("a")
    assert "changelog.html" in pages["index.html"].addresses("a")


def test_links_that_leave_the_pages_lead_to_the_code_host(site: Site) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    host = project["urls"]["Repository"]
    assert f'href="{host}/tree/main/examples/readers/python"' in site.read("keys.html")
    assert f'href="{host}/blob/main/README.md#try-it"' in site.read("index.html")
    on_the_host = set()
    for page in site.root.glob("*.html"):
        for address in Elements(page.read_text()).addresses("a"):
            if found := re.fullmatch(rf"{re.escape(host)}/(blob|tree)/main/([^#]+)(#.*)?", address):
                assert (REPOSITORY / found[2]).is_dir() == (found[1] == "tree"), address
                on_the_host.add(found[2])
    assert len(on_the_host) > 3


def test_tables_and_lists_are_what_the_code_host_makes_of_them(site: Site) -> None:
    for name in DOCS:
        text, html = text_of(f"docs/{name}"), site.read(name.replace(".md", ".html"))
        # A table is one, and not a paragraph, in which a pipe in code has no backslash.
        assert len(re.findall(r"^\|(?:-+\|)+$", text, re.MULTILINE)) == html.count("<table>"), name
        assert not re.findall(r"<code>[^<]*\\\|", html), name
        for paragraph in re.findall(r"<p>(.*?)</p>", html, re.DOTALL):
            assert not re.search(r"^([-*|]|\d+\.) ", paragraph, re.MULTILINE), (name, paragraph)
        # On the code host a pipe in a cell's code begins a new cell, unless there is a backslash.
        for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
            rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
            assert len(set(rows)) == 1, (name, table)


# The page of the Python API ------------------------------------------------------------------------------------------


def public_modules() -> Iterator[ModuleType]:
    """All modules of the package but the command line's and those whose names say that they are not public."""
    yield vmsnap
    for module in pkgutil.iter_modules(vmsnap.__path__):
        if not module.name.startswith("_") and module.name != "cli":
            yield importlib.import_module(f"vmsnap.{module.name}")


def test_every_public_name_is_on_the_page_of_the_python_api(site: Site) -> None:
    ids = Elements(site.read("python.html")).ids
    missing = []
    for module in public_modules():
        for name in module.__all__:
            documented = {f"vmsnap.{name}", f"{module.__name__}.{name}"} & ids
            if not documented:
                missing.append(f"{module.__name__}.{name}")
            found = getattr(module, name)
            # `open` is a class by another name.
            if inspect.isclass(found) and found.__name__ == name:
                # The fields of a dataclass are in its signature.
                fields = {*getattr(found, "__dataclass_fields__", ()), *getattr(found, "__slots__", ())}
                members = {member for member in vars(found) if not member.startswith("_")} - fields
                missing += [f"{path}.{member}" for path in documented for member in members]
    missing = [name for name in missing if name not in ids]
    assert not missing


def test_the_page_of_the_python_api_has_no_name_that_is_not_there(site: Site) -> None:
    named = re.findall(r"^::: vmsnap\.(.*)$", text_of("docs/python.md"), re.MULTILINE)
    assert len(named) == len(set(named))
    for name in named:
        module, _, last = f"vmsnap.{name}".rpartition(".")
        assert last in importlib.import_module(module).__all__, name


def test_parameters_told_together_have_each_its_own_type(site: Site) -> None:
    text = site.read("python.html").partition('id="vmsnap.create"')[2].partition('id="vmsnap.StagedSnapshot"')[0]
    text = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    for entry in ("encrypt ( bool , default: False )", "key ( ReadableBuffer | None , default: None )"):
        assert entry in text, textwrap.shorten(text, 2000)
