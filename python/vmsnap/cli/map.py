"""``vmsnap map``: a picture of guest memory, page by page."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from vmsnap import GuestMemory
from vmsnap.cli.command import Command
from vmsnap.cli.failure import CommandError
from vmsnap.cli.io import new_file, refuse_inside
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import force_option, json_option, threads_option
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.targets import namespace_option, open_memory, snapshot_argument
from vmsnap.cli.terminal import human_size, printable, progress

if TYPE_CHECKING:
    from PIL.Image import Image

_PAGE_BYTES = 4096
_READ_BATCH_BYTES = 4 << 20

# Printable ASCII, tab, line feed and carriage return.
_TEXT = bytes((*range(0x20, 0x7F), 0x09, 0x0A, 0x0D))

_KINDS = ("hole", "zero", "text-like", "dense")
_HOLE, _ZERO, _TEXT_LIKE, _DENSE = range(len(_KINDS))
_COLORS = ((226, 229, 233), (143, 163, 190), (46, 160, 108), (201, 84, 56))
_PAPER, _INK, _FAINT = (255, 255, 255), (38, 42, 50), (118, 124, 134)
# Fills up the last row.
_BEYOND = len(_KINDS)

_WIDTH = 1024
_LEFT, _RIGHT, _TOP, _BOTTOM = 168, 40, 76, 24
_FONT_SIZE = 14
_LINE = 22


@dataclass
class _Region:
    addresses: range
    pages: bytearray
    """The kind of each page."""

    def counts(self) -> dict[str, int]:
        return {name: self.pages.count(kind) for kind, name in enumerate(_KINDS)}


def look_of(page: bytes | memoryview) -> int:
    """Return the kind of a page: zero, text-like or dense.

    A page is text-like if a sixteenth of it is text, and nine tenths of its nonzero bytes are: strings in memory are
    padded with zeros.
    """
    content = bytes(page).replace(b"\0", b"")
    text = len(content) - len(content.translate(None, _TEXT))
    if not content:
        return _ZERO
    return _TEXT_LIKE if text * 16 >= len(page) and text * 10 >= len(content) * 9 else _DENSE


def _scan(memory: GuestMemory) -> list[_Region]:
    regions = []
    with progress("read", memory.data_bytes) as advance:
        for number, addresses in enumerate(memory.regions):
            pages = bytearray(-(-(addresses.stop - addresses.start) // _PAGE_BYTES))
            for data in memory.data_ranges(number):
                first = data.start - data.start % _PAGE_BYTES
                for start in range(first, data.stop, _READ_BATCH_BYTES):
                    end = min(start + _READ_BATCH_BYTES, data.stop)
                    batch = memoryview(memory.read(addresses.start + start, end - start))
                    for at in range(0, len(batch), _PAGE_BYTES):
                        pages[(start + at) // _PAGE_BYTES] = look_of(batch[at : at + _PAGE_BYTES])
                    advance(len(batch))
            regions.append(_Region(addresses, pages))
    return regions


def _bands(pages: bytearray, columns: int) -> Iterator["Image"]:
    """Give a region's picture in bands from top to bottom, at a width of `_WIDTH`."""
    from PIL import Image

    # A dot that stands for several pages has the mean of their colors.
    band = columns * max(1, columns // _WIDTH) * 64
    for start in range(0, len(pages), band):
        shown = pages[start : start + band]
        rows = -(-len(shown) // columns)
        image = Image.frombytes("P", (columns, rows), bytes(shown.ljust(rows * columns, bytes([_BEYOND]))))
        image.putpalette([value for color in (*_COLORS, _PAPER) for value in color])
        height = max(1, rows * _WIDTH // columns)
        yield image.convert("RGB").resize((_WIDTH, height), Image.Resampling.BOX)


def draw(title: str, regions: list[_Region]) -> "Image":
    """Draw all regions one above the other, all at one scale, with their addresses beside them."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError:
        raise CommandError("vmsnap map needs Pillow: pip install 'vmsnap[map]'") from None

    total = sum(len(region.pages) for region in regions)
    # A power of two of pages a row, so that addresses at its ends are round; about a square; at most 16 dots a page.
    columns = 1 << max(6, math.ceil(math.log2(max(total, 1)) / 2))
    pictures = [list(_bands(region.pages, columns)) for region in regions]
    height = _TOP + sum(_LINE + sum(band.height for band in each) for each in pictures) + _LINE + _BOTTOM
    picture = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, height), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    pen.text((_LEFT, 14), title, _INK, font)
    x = _LEFT
    for kind, name in enumerate(_KINDS):
        count = sum(region.pages.count(kind) for region in regions)
        text = f"{name} {human_size(count * _PAGE_BYTES)}"
        pen.rectangle((x, 40, x + 13, 53), _COLORS[kind], _FAINT)
        pen.text((x + 20, 38), text, _INK, font)
        x += 56 + int(pen.textlength(text, font))
    y = _TOP
    for number, (region, bands) in enumerate(zip(regions, pictures, strict=True)):
        size = region.addresses.stop - region.addresses.start
        pen.text((_LEFT, y), f"region {number}: {human_size(size)} from {region.addresses.start:#x}", _INK, font)
        y += _LINE
        for at in range(0, max(1, sum(band.height for band in bands) - _FONT_SIZE), 64):
            address = region.addresses.start + at * columns // _WIDTH * columns * _PAGE_BYTES
            text = f"{address:#x}"
            pen.text((_LEFT - 14 - pen.textlength(text, font), y + at - 9), text, _FAINT, font)
            pen.line((_LEFT - 9, y + at, _LEFT - 3, y + at), _FAINT)
        for band in bands:
            picture.paste(band, (_LEFT, y))
            y += band.height
    for quarter in range(5):
        at = _LEFT + quarter * _WIDTH // 4
        pen.line((at, y + 4, at, y + 9), _FAINT)
        text = "+0" if quarter == 0 else f"+{human_size(columns * _PAGE_BYTES * quarter / 4)}"
        pen.text((at - pen.textlength(text, font) / 2, y + 12), text, _FAINT, font)
    return picture


@click.command(
    "map", cls=Command, examples=["vmsnap map vm1 -o map.png", "vmsnap map vm1 -o map.png --json --key-file vm.key"]
)
@snapshot_argument
@click.option("-o", "--output", required=True, type=TEXT_PATH, metavar="FILE", help="The PNG file to write.")
@namespace_option
@opening_options
@force_option
@json_option
@threads_option
@store_options
def map_memory(
    snapshot: Snapshot, output: str, namespace: str, keys: OpeningKeys, force: bool, as_json: bool, threads: int | None
) -> None:
    """Draw guest memory as a picture, page by page.

    Colors show holes, zero pages, text-like pages and dense pages. Addresses grow from left to right and from top to
    bottom. In the picture of a large memory a dot stands for several pages and has the mean of their colors. --json
    also prints the number of pages of each kind.

    All data is read and decrypted. Needs Pillow: pip install 'vmsnap[map]'.
    """
    refuse_inside(output, snapshot)
    regions = _scan(open_memory(snapshot, namespace, keys, threads))
    picture = draw(printable(str(snapshot)), regions)
    with new_file(output, force=force) as file:
        picture.save(file, "PNG")
    if as_json:
        told = [
            {
                "guest_base": region.addresses.start,
                "size": region.addresses.stop - region.addresses.start,
                "pages": region.counts(),
            }
            for region in regions
        ]
        click.echo(json.dumps({"page_bytes": _PAGE_BYTES, "regions": told}))
