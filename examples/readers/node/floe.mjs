// FLOE, as vmsnap uses it: docs/format.md, section 2.

import { createDecipheriv, createHmac, timingSafeEqual } from 'node:crypto';
import { Refusal } from './common.mjs';

export const KEY_BYTES = 32;

// The header is 10 bytes of parameters, the IV and the header tag.
export const PARAMETER_BYTES = 10;
const FLOE_IV_BYTES = 32;
const HEADER_TAG_BYTES = 32;
const HEADER_TAG_OFFSET = PARAMETER_BYTES + FLOE_IV_BYTES;
const HEADER_BYTES = HEADER_TAG_OFFSET + HEADER_TAG_BYTES;

// A segment is a length word, a nonce, the ciphertext of a chunk and a tag.
const WORD_BYTES = 4;
const NONCE_BYTES = 12;
const TAG_BYTES = 16;
export const SEGMENT_OVERHEAD_BYTES = WORD_BYTES + NONCE_BYTES + TAG_BYTES;
const NOT_LAST = 0xffffffff;

const MESSAGE_KEY_BYTES = 48;
const MAX_SEGMENTS = 1n << 40n;
const POSITIONS_PER_KEY = 1n << 20n;

/** The parameters with which a file begins whose segments have that length: AES-256-GCM, HKDF-Expand-SHA-384. */
export function parameters(segmentLength) {
  const bytes = Buffer.alloc(PARAMETER_BYTES);
  bytes.writeUInt32BE(segmentLength, 2);
  bytes.writeUInt32BE(FLOE_IV_BYTES, 6);
  return bytes;
}

/** The header tag in a file, not checked yet. */
export function storedHeaderTag(file) {
  return file.readAt(BigInt(HEADER_TAG_OFFSET), HEADER_TAG_BYTES);
}

/** Whether a file of so many bytes can hold so many of plaintext. An empty last segment may follow full ones. */
export function isFileSize(fileSize, size, chunk) {
  const segments = size === 0n ? 1n : (size + chunk - 1n) / chunk;
  const least = BigInt(HEADER_BYTES) + size + segments * BigInt(SEGMENT_OVERHEAD_BYTES);
  const mayEndEmpty = size !== 0n && size % chunk === 0n;
  return fileSize === least || (mayEndEmpty && fileSize === least + BigInt(SEGMENT_OVERHEAD_BYTES));
}

/**
 * One FLOE ciphertext, which is a whole file. Once made, header and last segment are authentic, and so is `size`.
 *
 * Sizes and positions are BigInt, for files may be longer than 2^53 bytes.
 */
export class FloeReader {
  #file;
  #parametersAndIv;
  #aad;
  #messageKey;
  #segmentKey = { position: -1n, key: null };
  #segmentLength;
  #segmentCount;
  #lastLength;

  /**
   * @param file a StoredFile
   * @param key 32 bytes
   * @param aad the FLOE AAD
   * @param segmentLengths the least and the most that is allowed
   * @param notFloe the kind of refusal where the parameters are none of FLOE's, or the file is too short for any
   */
  constructor(file, key, aad, [least, most], notFloe = 'corrupt') {
    this.#file = file;
    this.#aad = Buffer.from(aad);

    // In the order of "What a reader checks". First the parameters.
    if (file.size < BigInt(HEADER_BYTES + SEGMENT_OVERHEAD_BYTES)) {
      throw new Refusal(notFloe, 'too short for a FLOE ciphertext: cut off, or not encrypted');
    }
    const header = this.#read(0n, HEADER_BYTES);
    this.#segmentLength = header.readUInt32BE(2);
    if (!header.subarray(0, PARAMETER_BYTES).equals(parameters(this.#segmentLength))) {
      throw new Refusal(notFloe, 'has no FLOE header: damaged, or not encrypted');
    }
    if (this.#segmentLength < least || this.#segmentLength > most) {
      throw new Refusal(notFloe, `a segment length of ${this.#segmentLength} is not allowed here`);
    }

    // The header tag binds parameters, IV, key and AAD.
    this.#parametersAndIv = header.subarray(0, HEADER_TAG_OFFSET);
    const headerTag = this.#kdf(key, 'HEADER_TAG:', HEADER_TAG_BYTES);
    if (!timingSafeEqual(headerTag, header.subarray(HEADER_TAG_OFFSET))) {
      throw new Refusal('authentication', 'the key is wrong, or the header was changed, or it is not in its own place');
    }
    this.#messageKey = this.#kdf(key, 'MESSAGE_KEY:', MESSAGE_KEY_BYTES);

    // How many segments there are follows from the file's size alone ("How many segments").
    const body = file.size - BigInt(HEADER_BYTES);
    const segmentLength = BigInt(this.#segmentLength);
    this.#segmentCount = (body + segmentLength - 1n) / segmentLength;
    this.#lastLength = Number(body - (this.#segmentCount - 1n) * segmentLength);
    if (this.#lastLength < SEGMENT_OVERHEAD_BYTES || this.#segmentCount > MAX_SEGMENTS) {
      throw new Refusal('authentication', 'no FLOE ciphertext has this length: cut off or extended');
    }
    /** Bytes of plaintext. */
    this.size = body - this.#segmentCount * BigInt(SEGMENT_OVERHEAD_BYTES);

    // The last segment proves the length.
    this.#segment(this.#segmentCount - 1n);
  }

  /** Yield the plaintext, each segment after its tag was checked. */
  *pieces() {
    for (let position = 0n; position < this.#segmentCount; position++) yield this.#segment(position);
  }

  /** The plaintext of a segment. */
  #segment(position) {
    const isLast = position === this.#segmentCount - 1n;
    const length = isLast ? this.#lastLength : this.#segmentLength;
    const segment = this.#read(BigInt(HEADER_BYTES) + position * BigInt(this.#segmentLength), length);
    // The tag does not cover this word.
    if (segment.readUInt32BE(0) !== (isLast ? length : NOT_LAST)) {
      throw new Refusal('authentication', `wrong length in front of segment ${position}: damaged, cut off or extended`);
    }
    const aad = Buffer.alloc(9);
    aad.writeBigUInt64BE(position);
    aad[8] = isLast ? 1 : 0;

    const nonce = segment.subarray(WORD_BYTES, WORD_BYTES + NONCE_BYTES);
    const decipher = createDecipheriv('aes-256-gcm', this.#keyAt(position), nonce, { authTagLength: TAG_BYTES });
    decipher.setAAD(aad);
    decipher.setAuthTag(segment.subarray(length - TAG_BYTES));
    const plaintext = decipher.update(segment.subarray(WORD_BYTES + NONCE_BYTES, length - TAG_BYTES));
    try {
      decipher.final(); // compares the tag; before it, nobody may see the plaintext
    } catch {
      throw new Refusal('authentication', `segment ${position} was changed, or is not in its own place`);
    }
    return plaintext;
  }

  #keyAt(position) {
    const first = position - (position % POSITIONS_PER_KEY);
    if (this.#segmentKey.position !== first) {
      const purpose = Buffer.concat([Buffer.from('DEK:'), Buffer.alloc(8)]);
      purpose.writeBigUInt64BE(first, 4);
      this.#segmentKey = { position: first, key: this.#kdf(this.#messageKey, purpose, KEY_BYTES) };
    }
    return this.#segmentKey.key;
  }

  /** HKDF-Expand-SHA-384 of not more than 48 bytes, which is one HMAC ("Keys"). */
  #kdf(key, purpose, length) {
    const hmac = createHmac('sha384', key).update(this.#parametersAndIv).update(purpose).update(this.#aad);
    return hmac.update(Buffer.of(1)).digest().subarray(0, length);
  }

  #read(offset, length) {
    const bytes = this.#file.readAt(offset, length);
    if (bytes.length < length) throw new Refusal('authentication', 'became shorter while it was read');
    return bytes;
  }
}
