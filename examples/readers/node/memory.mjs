// Guest memory: docs/format.md, section 6.

import fs from 'node:fs';
import * as cbor from './cbor.mjs';
import { Refusal, corrupt, readWhole, smaller, within, writeAll } from './common.mjs';

const MEM = 'mem';
const METADATA = 'mem_metadata';

const MAX_ADDRESS = (1n << 64n) - 1n;
const MAX_DATA_BYTES = (1n << 63n) - 1n;

/** A limit of this reader's: 128 MiB, an index of 32 Mi blocks. */
const MAX_METADATA_BYTES = 1n << 27n;

// An LZ4 frame has a header, by which its block size is known, a size word before each block, and an end mark.
const BLOCK_SIZE_BY_HEADER = new Map([
  ['04224d18604082', 64n << 10n],
  ['04224d186050fb', 256n << 10n],
  ['04224d18606051', 1n << 20n],
  ['04224d18607073', 4n << 20n],
]);
const FRAME_HEADER_BYTES = 7;
const WORD_BYTES = 4;
const STORED_AS_IT_IS = 0x80000000;
const END_MARK = 0;
const MIN_MATCH_BYTES = 4;

const MAX_WRITE_BYTES = 1n << 20n;

// mem_metadata --------------------------------------------------------------------------------------------------------

/** The regions, the sum of their data, and how it is stored, all checked. Integers are BigInt. */
function readMetadata(fragment) {
  if (fragment.size > MAX_METADATA_BYTES) {
    throw new Refusal('unsupported', `has more than ${MAX_METADATA_BYTES} bytes, which is all this reader takes`);
  }
  const metadata = cbor.decodeAnyWay(readWhole(fragment));
  const regions = cbor.list(metadata, 'regions').map((region) => ({
    base: cbor.unsigned(region, 'guest_base'),
    size: cbor.unsigned(region, 'size'),
    ranges: cbor.list(region, 'data_ranges').map(readRange),
  }));
  checkRegions(regions);
  const dataSize = regions.reduce((sum, region) => sum + checkRanges(region), 0n);
  if (dataSize > MAX_DATA_BYTES) throw corrupt('the data ranges are more than a file can hold');
  const isCompressed = cbor.bool(metadata, 'compressed');
  const lz4 = metadata.get('lz4') ?? null; // crosvm writes none
  return { regions, dataSize, isCompressed, index: lz4 === null ? null : readIndex(lz4, dataSize) };
}

function readRange(range) {
  if (range?.size > 2) throw corrupt("a data range has another key than 'start' and 'end'");
  return [cbor.unsigned(range, 'start'), cbor.unsigned(range, 'end')];
}

/** Regions end within 64 bits, and do not overlap. */
function checkRegions(regions) {
  const ordered = [...regions].sort((a, b) => (a.base < b.base ? -1 : Number(a.base > b.base)));
  ordered.forEach((region, number) => {
    if (region.base + region.size > MAX_ADDRESS) throw corrupt(`the region at ${hex(region.base)} goes beyond 64 bits`);
    const previous = ordered[number - 1];
    // Two at one address would be one file, be there nothing in them.
    if (number > 0 && (region.base === previous.base || region.base < previous.base + previous.size)) {
      throw corrupt(`the regions at ${hex(previous.base)} and ${hex(region.base)} overlap`);
    }
  });
}

/** Data ranges ascend within their region, and none is empty. Returns their sum. */
function checkRanges({ base, size, ranges }) {
  let sum = 0n;
  let last = 0n;
  for (const [start, end] of ranges) {
    if (start < last || start >= end || end > size) {
      throw corrupt(`data ranges of the region at ${hex(base)} do not ascend in it`);
    }
    sum += end - start;
    last = end;
  }
  return sum;
}

/** vmsnap's index of a compressed `mem`: the stored length of each block. */
function readIndex(lz4, dataSize) {
  const blockSize = cbor.unsigned(lz4, 'block_size');
  let lengths = lz4.get('block_lengths');
  // JSON has no bytes, and lists the numbers.
  const isByte = (value) => Number.isInteger(value) && value >= 0 && value <= 255;
  if (Array.isArray(lengths) && lengths.every(isByte)) lengths = Uint8Array.from(lengths);
  if (!(lengths instanceof Uint8Array)) throw corrupt("'block_lengths' is missing or malformed");
  if (![...BLOCK_SIZE_BY_HEADER.values()].includes(blockSize)) {
    throw corrupt(`an index of blocks of ${blockSize} bytes`);
  }
  if (BigInt(lengths.length) !== ((dataSize + blockSize - 1n) / blockSize) * BigInt(WORD_BYTES)) {
    throw corrupt(`the index does not fit ${dataSize} bytes of data in blocks of ${blockSize}`);
  }
  return { blockSize, lengths: Buffer.from(lengths) };
}

function hex(address) {
  return address.toString(16).padStart(16, '0');
}

// mem -----------------------------------------------------------------------------------------------------------------

/** Bytes that come in pieces and are taken in other lengths. */
class ByteStream {
  #pieces;
  #piece = Buffer.alloc(0);

  constructor(pieces) {
    this.#pieces = pieces;
  }

  isAtEnd() {
    while (this.#piece.length === 0) {
      const { done, value } = this.#pieces.next();
      if (done) return true;
      this.#piece = value;
    }
    return false;
  }

  /** At least one byte, and not more than `most`. */
  some(most) {
    if (this.isAtEnd()) throw corrupt('ends too early');
    const bytes = this.#piece.subarray(0, most);
    this.#piece = this.#piece.subarray(most);
    return bytes;
  }

  exactly(length) {
    const parts = [];
    for (let left = length; left > 0; left -= parts.at(-1).length) parts.push(this.some(left));
    return Buffer.concat(parts, length);
  }
}

/** Yield what the blocks of an LZ4 frame hold; each is valid until the next one is asked for. */
function* unpackFrame(frame, dataSize, index) {
  const blockSize = BLOCK_SIZE_BY_HEADER.get(frame.exactly(FRAME_HEADER_BYTES).toString('hex'));
  if (blockSize === undefined) throw corrupt('is no LZ4 frame as crosvm or vmsnap writes it');
  if (index !== null && index.blockSize !== blockSize) throw corrupt('the index has another block size');

  const buffer = Buffer.alloc(Number(blockSize));
  let left = dataSize;
  for (let number = 0; left > 0n; number++) {
    const block = buffer.subarray(0, smaller(left, blockSize));
    const word = frame.exactly(WORD_BYTES).readUInt32LE();
    if (word === END_MARK) throw corrupt('has fewer blocks than the data ranges need');
    const isAsItIs = word >= STORED_AS_IT_IS;
    const length = isAsItIs ? word - STORED_AS_IT_IS : word;
    if (index !== null && length !== index.lengths.readUInt32LE(number * WORD_BYTES)) {
      throw corrupt(`block ${number} is not as long as the index says`);
    }
    if (isAsItIs ? length !== block.length : length > blockSize) {
      throw corrupt(`block ${number} cannot have ${length} bytes`);
    }
    const stored = frame.exactly(length);
    if (isAsItIs) stored.copy(block);
    else within(`block ${number}`, () => unpackBlock(stored, block));
    yield block;
    left -= BigInt(block.length);
  }
  if (frame.exactly(WORD_BYTES).readUInt32LE() !== END_MARK) throw corrupt('has no end mark where the data ends');
  if (!frame.isAtEnd()) throw corrupt('has bytes after the end mark');
}

/** Decode a block of LZ4 (`lz4_Block_format.md` in LZ4's repository), which has to fill `output`. */
function unpackBlock(input, output) {
  let from = 0;
  let to = 0;

  function nextByte() {
    if (from === input.length) throw corrupt('is cut off');
    return input[from++];
  }

  /** A length of 15 in the token goes on in bytes, to the first that is not 255. */
  function wholeLength(length) {
    if (length < 15) return length;
    let byte;
    do {
      byte = nextByte();
      length += byte;
    } while (byte === 255);
    return length;
  }

  for (;;) {
    const token = nextByte();
    const literalsEnd = to + wholeLength(token >> 4);
    if (literalsEnd > output.length) throw corrupt('holds too much');
    while (to < literalsEnd) output[to++] = nextByte();
    if (from === input.length) break; // the last sequence has no match

    const offset = nextByte() | (nextByte() << 8);
    if (offset === 0 || offset > to) throw corrupt('copies from before its beginning');
    const matchEnd = to + wholeLength(token & 15) + MIN_MATCH_BYTES;
    if (matchEnd > output.length) throw corrupt('holds too much');
    for (; to < matchEnd; to++) output[to] = output[to - offset]; // which may be a byte that it has just made
  }
  if (to < output.length) throw corrupt('holds too little');
}

// Restoring -----------------------------------------------------------------------------------------------------------

/** Write the guest memory of a namespace, '' for the root, into a new folder: a sparse file for each region. */
export function restore(snapshot, folder, namespace) {
  const pathOf = (name) => (namespace === '' ? name : `${namespace}/${name}`);
  const { regions, dataSize, isCompressed, index } = snapshot.withFragment(pathOf(METADATA), readMetadata);
  snapshot.withFragment(pathOf(MEM), (mem) => {
    if (!isCompressed && mem.size !== dataSize) throw corrupt(`has ${mem.size} bytes, and the data ranges ${dataSize}`);
    const stored = new ByteStream(mem.pieces());
    const data = isCompressed ? new ByteStream(unpackFrame(stored, dataSize, index)) : stored;
    fs.mkdirSync(folder, { mode: 0o700 });
    try {
      for (const region of regions) writeRegion(`${folder}/${hex(region.base)}`, region, data);
      // Where a frame ends is looked at now.
      if (!data.isAtEnd()) throw corrupt('has more than the data ranges need');
    } catch (error) {
      fs.rmSync(folder, { recursive: true, force: true });
      throw error;
    }
  });
}

function writeRegion(place, { size, ranges }, data) {
  // Node takes sizes, and offsets to write at, as Number only.
  if (size > Number.MAX_SAFE_INTEGER) {
    throw new Refusal('unsupported', `a region of ${size} bytes is too large for this reader`);
  }
  const fd = fs.openSync(place, 'wx', 0o600);
  try {
    fs.ftruncateSync(fd, Number(size)); // all of it a hole
    for (const [start, end] of ranges) {
      let offset = start;
      while (offset < end) {
        const piece = data.some(smaller(end - offset, MAX_WRITE_BYTES));
        writeAll(fd, piece, Number(offset));
        offset += BigInt(piece.length);
      }
    }
  } finally {
    fs.closeSync(fd);
  }
}
