"""``vmsnap map``: a picture of guest memory, page by page."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmsnap import GuestMemory
from vmsnap.cli.copy import new_file, refuse_inside
from vmsnap.cli.failure import CommandError
from vmsnap.cli.keys import OpeningKeys, opening_options, threads_option
from vmsnap.cli.memory import open_memory
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.places import directory_argument, json_option, namespace_option
from vmsnap.cli.terminal import human_size, printable, progress

if TYPE_CHECKING:
    from PIL.Image import Image

_PAGE_BYTES = 4096
_PIECE_BYTES = 4 << 20

# Printable ASCII, tab, line feed and carriage return.
_TEXT = bytes((*range(0x20, 0x7F), 0x09, 0x0A, 0x0D))

_KINDS = ("hole", "zero", "text-like", "dense")
_HOLE, _ZERO, _TEXT_LIKE, _DENSE = range(len(_KINDS))
_COLORS = ((226, 229, 233), (143, 163, 190), (46, 160, 108), (201, 84, 56))
_PAPER, _INK, _FAINT = (255, 255, 255), (38, 42, 50), (118, 124, 134)
# What fills up the last row.
_BEYOND = len(_KINDS)

_WIDTH = 1024
_LEFT, _RIGHT, _TOP, _BOTTOM = 168, 40, 76, 24
_FONT_SIZE = 14
_LINE = 22


@dataclass
class _Region:
    addresses: range
    pages: bytearray
    """What each looks like."""

    def counts(self) -> dict[str, int]:
        return {name: self.pages.count(kind) for kind, name in enumerate(_KINDS)}


def look_of(page: bytes | memoryview) -> int:
    """Return what a page looks like: zero, text-like or dense.

    Text-like is a page of which a sixteenth is text, and nine tenths of what is not zero: strings in memory are padded
    with zeros.
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
                for start in range(first, data.stop, _PIECE_BYTES):
                    end = min(start + _PIECE_BYTES, data.stop)
                    piece = memoryview(memory.read(addresses.start + start, end - start))
                    for at in range(0, len(piece), _PAGE_BYTES):
                        pages[(start + at) // _PAGE_BYTES] = look_of(piece[at : at + _PAGE_BYTES])
                    advance(len(piece))
            regions.append(_Region(addresses, pages))
    return regions


def _strips(pages: bytearray, columns: int) -> Iterator["Image"]:
    """Give a region's picture in strips from above, at a width of `_WIDTH`."""
    from PIL import Image

    # Where a dot is several pages, it has the mean of their colors.
    strip = columns * max(1, columns // _WIDTH) * 64
    for start in range(0, len(pages), strip):
        part = pages[start : start + strip]
        rows = -(-len(part) // columns)
        image = Image.frombytes("P", (columns, rows), bytes(part.ljust(rows * columns, bytes([_BEYOND]))))
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
    strips = [list(_strips(region.pages, columns)) for region in regions]
    height = _TOP + sum(_LINE + sum(strip.height for strip in each) for each in strips) + _LINE + _BOTTOM
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
    for number, (region, parts) in enumerate(zip(regions, strips, strict=True)):
        size = region.addresses.stop - region.addresses.start
        pen.text((_LEFT, y), f"region {number}: {human_size(size)} from {region.addresses.start:#x}", _INK, font)
        y += _LINE
        for at in range(0, max(1, sum(part.height for part in parts) - _FONT_SIZE), 64):
            address = region.addresses.start + at * columns // _WIDTH * columns * _PAGE_BYTES
            text = f"{address:#x}"
            pen.text((_LEFT - 14 - pen.textlength(text, font), y + at - 9), text, _FAINT, font)
            pen.line((_LEFT - 9, y + at, _LEFT - 3, y + at), _FAINT)
        for part in parts:
            picture.paste(part, (_LEFT, y))
            y += part.height
    for quarter in range(5):
        at = _LEFT + quarter * _WIDTH // 4
        pen.line((at, y + 4, at, y + 9), _FAINT)
        text = "+0" if quarter == 0 else f"+{human_size(columns * _PAGE_BYTES * quarter / 4)}"
        pen.text((at - pen.textlength(text, font) / 2, y + 12), text, _FAINT, font)
    return picture


@click.command("map")
@directory_argument
@click.option("-o", "--output", required=True, type=TEXT_PATH, metavar="FILE", help="The picture, a PNG file.")
@namespace_option
@opening_options
@click.option("--force", is_flag=True, help="Replace an existing plain file outside of the snapshot.")
@json_option
@threads_option
def map_memory(
    directory: Path, output: str, namespace: str, keys: OpeningKeys, force: bool, as_json: bool, threads: int | None
) -> None:
    """Draw guest memory: what is a hole, zero, text-like or dense, page by page.

    Addresses grow from left to right and from above to below. Of large memory a dot is several pages, and has the mean
    of their colors. All data is read. Needs Pillow: pip install 'vmsnap[map]'.
    """
    refuse_inside(output, str(directory))
    regions = _scan(open_memory(directory, namespace, keys, threads))
    picture = draw(printable(str(directory)), regions)
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
