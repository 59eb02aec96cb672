// Shared by all files: errors, and reads and writes that are never cut short.

import fs from 'node:fs';

/** An error; `kind` is one of the kinds in ../README.md. */
export class Refusal extends Error {
  constructor(kind, why) {
    super(why);
    this.kind = kind;
  }
}

export function corrupt(why) {
  return new Refusal('corrupt', why);
}

/** Run `action`, and let a refusal say what it is about. */
export function within(what, action) {
  try {
    return action();
  } catch (error) {
    if (error instanceof Refusal) error.message = `${what}: ${error.message}`;
    throw error;
  }
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Decode UTF-8, of which nothing is mended or left out; `what` is for the refusal of anything else. */
export function decodeUtf8(bytes, what) {
  try {
    return utf8.decode(bytes);
  } catch {
    throw corrupt(`${what} is not UTF-8`);
  }
}

/** The smaller of two BigInt, as a Number. */
export function smaller(a, b) {
  return Number(a < b ? a : b);
}

/** Read `length` bytes at an offset, a BigInt, or null in a stream; fewer where it ends before. */
export function readAt(fd, offset, length) {
  const buffer = Buffer.alloc(length);
  let done = 0;
  while (done < length) {
    const count = fs.readSync(fd, buffer, done, length - done, offset === null ? null : offset + BigInt(done));
    if (count === 0) break;
    done += count;
  }
  return buffer.subarray(0, done);
}

/** The bytes of one file of a snapshot: of a whole file, or of its part of an archive. */
export class StoredFile {
  #fd;
  #start;

  /** `start` and `size` are BigInt, because files may be longer than 2^53 bytes. */
  constructor(fd, start, size) {
    this.#fd = fd;
    this.#start = start;
    this.size = size;
  }

  /** Read `length` bytes at an offset, a BigInt; fewer if the file ends before. */
  readAt(offset, length) {
    const left = this.size - offset;
    return left <= 0n ? Buffer.alloc(0) : readAt(this.#fd, this.#start + offset, smaller(BigInt(length), left));
  }
}

/** All of a fragment, or whatever else has `size` and `pieces()`. */
export function readWhole(fragment) {
  const whole = Buffer.alloc(Number(fragment.size));
  let done = 0;
  for (const piece of fragment.pieces()) done += piece.copy(whole, done);
  return whole;
}

/** Write all of a buffer at an offset, a Number, or null in a stream. */
export function writeAll(fd, buffer, offset) {
  let done = 0;
  while (done < buffer.length) {
    try {
      done += fs.writeSync(fd, buffer, done, buffer.length - done, offset === null ? null : offset + done);
    } catch (error) {
      // A pipe that was made non-blocking, and is full: Node cannot wait for it, so sleep a little.
      if (error.code !== 'EAGAIN') throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5);
    }
  }
}
