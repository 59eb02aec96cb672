// The archive, a snapshot in one file: docs/format.md, section 7. The reader computes all headers and compares
// them; it does not parse tar. Sizes and offsets are BigInt.

import fs from 'node:fs';
import { Refusal, StoredFile, corrupt, readAt, within } from './common.mjs';
import {
  KEY_METADATA_NAME,
  MANIFEST_NAME,
  MAX_KEY_METADATA_BYTES,
  MAX_MANIFEST_BYTES,
  sortedByBytes,
} from './names.mjs';

const BLOCK_BYTES = 512;
const BLOCK = BigInt(BLOCK_BYTES);
const GLOBAL_HEADER_BYTES = 2 * BLOCK_BYTES;
const END_BYTES = 2n * BLOCK;
const MAX_NAME_FIELD_BYTES = 100;
const MIN_COMMENT_BYTES = 20n;
/** From this size on, fragments are the last members, and aligned. */
const LARGE_FRAGMENT_BYTES = 65536n;
const ALIGNMENT = { least: BLOCK, large: 4096n, manifest: 65536n };
/** In the 11 octal digits of a size or time. */
const MAX_OCTAL = (1n << 33n) - 1n;

// Offsets of the fields of a ustar header.
const [MODE, UID, GID, SIZE, MTIME, CHKSUM, TYPEFLAG, MAGIC] = [100, 108, 116, 124, 136, 148, 156, 257];
const [DEVMAJOR, DEVMINOR] = [329, 337];

// Headers -------------------------------------------------------------------------------------------------------------

const octal = (value, digits) => value.toString(8).padStart(digits, '0');

function ustarHeader(name, typeflag, size, seconds) {
  const block = Buffer.alloc(BLOCK_BYTES);
  block.write(name);
  block.write(typeflag === '5' ? '0000700' : '0000600', MODE);
  for (const offset of [UID, GID, DEVMAJOR, DEVMINOR]) block.write('0000000', offset);
  if (size <= MAX_OCTAL) {
    block.write(octal(size, 11), SIZE);
  } else {
    block[SIZE] = 0x80;
    block.writeBigUInt64BE(size, MTIME - 8);
  }
  block.write(octal(seconds, 11), MTIME);
  block.write(' '.repeat(8), CHKSUM);
  block.write(typeflag, TYPEFLAG);
  block.write('ustar\x0000', MAGIC);
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(`${octal(sum, 6)}\0`, CHKSUM);
  return block;
}

/** A pax record, which counts its own length, digits included. */
function paxRecord(keyword, value) {
  const rest = Buffer.from(` ${keyword}=${value}\n`);
  let digits = 1;
  while (String(rest.length + digits).length > digits) digits++;
  return Buffer.concat([Buffer.from(String(rest.length + digits)), rest]);
}

/** The record `comment` of that length, a Number: the text, then spaces. */
function comment(text, length) {
  const start = `${length} comment=${text}`;
  return Buffer.from(`${start.padEnd(length - 1)}\n`);
}

const GLOBAL_HEADER = Buffer.concat([
  ustarHeader('pax_global_header', 'g', BLOCK, 0n),
  comment('vmsnap archive 1', BLOCK_BYTES),
]);

function roundedUp(value, multiple) {
  return ((value + multiple - 1n) / multiple) * multiple;
}

/** A file or namespace in an archive. The path of a namespace ends in `/`. */
class Member {
  #path;
  #hasLongName;
  #records; // `path` and `size` of the pax header, if the member needs them
  #alignment;

  constructor(path, size, alignment = ALIGNMENT.least) {
    this.#path = path;
    this.size = size;
    this.#alignment = alignment;
    const bytes = Buffer.from(path);
    this.#hasLongName = bytes.length > MAX_NAME_FIELD_BYTES || bytes.some((byte) => byte > 0x7f);
    const records = [];
    if (this.#hasLongName) records.push(paxRecord('path', path));
    if (size > MAX_OCTAL) records.push(paxRecord('size', size));
    this.#records = Buffer.concat(records);
  }

  /** The length of the data of the pax header, if the member begins at `start`; 0 if there is no pax header. */
  #paxBytes(start) {
    const need = BigInt(this.#records.length);
    const alignment = this.#alignment;
    if (need === 0n && (start + BLOCK) % alignment === 0n) return 0n;
    let length = need === 0n ? BLOCK : roundedUp(need, BLOCK);
    length = roundedUp(start + 2n * BLOCK + length, alignment) - start - 2n * BLOCK;
    while (length > need && length - need < MIN_COMMENT_BYTES) length += alignment;
    return length;
  }

  /** The distance from the start of the member to its data. */
  headersBytes(start) {
    const length = this.#paxBytes(start);
    return length === 0n ? BLOCK : 2n * BLOCK + length;
  }

  /** All bytes from the start of the member to its data. */
  headers(start, seconds) {
    const parts = [];
    const length = this.#paxBytes(start);
    if (length > 0n) {
      parts.push(ustarHeader('vmsnap.pax', 'x', length, seconds), this.#records);
      const left = Number(length) - this.#records.length;
      if (left > 0) parts.push(comment('', left));
    }
    const name = this.#hasLongName ? 'vmsnap' : this.#path;
    parts.push(ustarHeader(name, this.#path.endsWith('/') ? '5' : '0', this.size, seconds));
    return Buffer.concat(parts);
  }
}

// Reading at random ---------------------------------------------------------------------------------------------------

export class Archive {
  #fd; // open as long as the program runs
  #size;
  #seconds;
  #files = new Map(); // by path the member, and at which offsets it and its data begin
  #end = BigInt(GLOBAL_HEADER_BYTES); // of the members that were placed until now
  #fragments = [];

  /** Find the key metadata and the manifest, and compare their headers. */
  constructor(location) {
    this.#fd = fs.openSync(location, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
    const stat = fs.fstatSync(this.#fd, { bigint: true });
    if (!stat.isFile()) throw corrupt('not a vmsnap archive: neither a file nor a directory');
    this.#size = stat.size;
    if (!readAt(this.#fd, 0n, GLOBAL_HEADER_BYTES).equals(GLOBAL_HEADER)) {
      throw corrupt('not a vmsnap archive: it begins otherwise');
    }
    // Size and time are taken from the headers, which are compared with the ones computed from them.
    const first = this.#read(this.#end, BLOCK_BYTES);
    this.#seconds = parseNumber(first, MTIME);
    if (first.toString('latin1').startsWith(`${KEY_METADATA_NAME}\0`)) {
      this.#placeByHeader(KEY_METADATA_NAME, ALIGNMENT.least, MAX_KEY_METADATA_BYTES);
    }
    this.#placeByHeader(MANIFEST_NAME, ALIGNMENT.manifest, MAX_MANIFEST_BYTES);
  }

  has(name) {
    return this.#files.has(name);
  }

  /** Compare the headers of a file, and call `use` with it. */
  withFile(path, kindIfNone, use) {
    const file = this.#files.get(path);
    if (file === undefined) throw new Refusal(kindIfNone, 'there is no such file');
    const { member, start, data } = file;
    if (!this.#read(start, Number(data - start)).equals(member.headers(start, this.#seconds))) throw foreign();
    return use(new StoredFile(this.#fd, data, member.size));
  }

  /** Compute where all members are, and compare the length of the archive. */
  locate({ namespaces, fragments, seconds }) {
    const time = seconds < 0 ? 0n : BigInt(seconds);
    if (this.#seconds !== (time > MAX_OCTAL ? MAX_OCTAL : time)) {
      throw corrupt('the headers have another time than the manifest');
    }
    this.#fragments = sortedByBytes(fragments.keys());
    for (const path of sortedByBytes(namespaces)) this.#place(`${path}/`, new Member(`${path}/`, 0n));
    const isLarge = (path) => fragments.get(path).storedSize >= LARGE_FRAGMENT_BYTES;
    for (const large of [false, true]) {
      for (const path of this.#fragments.filter((each) => isLarge(each) === large)) {
        const alignment = large ? ALIGNMENT.large : ALIGNMENT.least;
        this.#place(path, new Member(path, fragments.get(path).storedSize, alignment));
      }
    }
    if (this.#end + END_BYTES !== this.#size) {
      throw corrupt(`it has ${this.#size} bytes, and by its manifest ${this.#end + END_BYTES}`);
    }
  }

  fragments() {
    return this.#fragments;
  }

  /** Place a file whose size is only known from its header, and compare the headers. */
  #placeByHeader(path, alignment, most) {
    within(path, () => {
      const data = this.#end + new Member(path, 0n, alignment).headersBytes(this.#end);
      const size = parseNumber(this.#read(data - BLOCK, BLOCK_BYTES), SIZE);
      if (size > most) throw corrupt(`has more than ${most} bytes`);
      this.#place(path, new Member(path, size, alignment));
      this.withFile(path, 'corrupt', () => {});
    });
  }

  /** Put a member behind the members that were placed before. It must lie in the file. */
  #place(path, member) {
    const start = this.#end;
    const data = start + member.headersBytes(start);
    if (data + member.size > this.#size) throw corrupt('shorter than its headers or its manifest say');
    this.#files.set(path, { member, start, data });
    this.#end = data + roundedUp(member.size, BLOCK);
  }

  /** Bytes of the archive, of which there are never more than the headers of a member. */
  #read(offset, length) {
    if (offset + BigInt(length) > this.#size) throw corrupt('cut off');
    const bytes = readAt(this.#fd, offset, length);
    if (bytes.length < length) throw corrupt('became shorter while it was read');
    return bytes;
  }
}

/** The number of 11 octal digits in a field of a header. */
function parseNumber(header, offset) {
  const match = /^([0-7]{11})\0/.exec(header.toString('latin1', offset, offset + 12));
  if (match === null) throw foreign();
  return BigInt(`0o${match[1]}`);
}

function foreign() {
  return corrupt('a header of the archive is damaged, or by another program; unpack that with tar');
}
