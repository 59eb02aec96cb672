// Values. The metadata of vmsnap itself is CBOR in one encoding (docs/format.md, section 4); `mem_metadata` is any CBOR, or
// JSON. The package cborg decodes them; this file adds the checks that cborg leaves to its caller.

import { Tokenizer as CborTokenizer, Type, decode } from 'cborg';
import { Tokenizer as JsonTokenizer } from 'cborg/json';
import { Refusal, corrupt, decodeUtf8 } from './common.mjs';

/** Section 4. The outermost item is the first level. */
const MAX_DEPTH = 16;

// Limits of this reader's, so that whoever wrote a file cannot use up the memory or the stack. 4 Mi values are some
// 400,000 fragments, or 800,000 data ranges.
const MAX_VALUES = 1 << 22;
const MAX_JSON_BYTES = 1 << 25;
const MAX_DEPTH_OF_ANY = 1000;
const MAX_REASON_LENGTH = 200;

const MAX_UNSIGNED = (1n << 64n) - 1n;

const ANY_WAY = { allowBigInt: true, useMaps: true, rejectDuplicateMapKeys: true, retainStringBytes: true };
/** Shortest forms, definite lengths. cborg takes no tags, and of other simple values only undefined. */
const ONE_WAY = { ...ANY_WAY, strict: true, allowIndefinite: false, allowUndefined: false };

// Decoding ------------------------------------------------------------------------------------------------------------

/** Decode CBOR of vmsnap's own: one item, written in the one way. A map is a Map, an integer a Number or BigInt. */
export function decodeOneWay(bytes) {
  const tokenizer = new CheckedTokenizer(new CborTokenizer(bytes, ONE_WAY), MAX_DEPTH, true);
  return refusing(() => decode(bytes, { ...ONE_WAY, tokenizer }));
}

/** Decode one map of CBOR, however it is written, or one value of JSON; the same comes out. */
export function decodeAnyWay(bytes) {
  // The first byte of a map in CBOR begins nothing in JSON.
  const isCbor = bytes[0] >= 0xa0 && bytes[0] <= 0xbf;
  if (!isCbor && bytes.length > MAX_JSON_BYTES) {
    throw new Refusal('unsupported', 'is longer than any JSON this reader takes');
  }
  const inner = isCbor ? new CborTokenizer(bytes, ANY_WAY) : new JsonTokenizer(bytes, ANY_WAY);
  const tokenizer = new CheckedTokenizer(inner, MAX_DEPTH_OF_ANY, false);
  return refusing(() => {
    const value = decode(bytes, { ...ANY_WAY, tokenizer });
    // JSON.parse rounds large integers, of which cborg makes BigInt; but cborg also takes what is no JSON.
    if (!isCbor) JSON.parse(decodeUtf8(bytes, 'JSON'));
    return value;
  });
}

/** Make refusals of a decoder's errors. */
function refusing(action) {
  try {
    return action();
  } catch (error) {
    if (error instanceof Refusal) throw error;
    throw corrupt(`malformed: ${error.message.replace('CBOR decode error: ', '').slice(0, MAX_REASON_LENGTH)}`);
  }
}

/** Hands cborg one token after the other, as one of its own tokenizers finds them, and checks what cborg does not. */
class CheckedTokenizer {
  #tokenizer;
  #maxDepth;
  #onlyTextKeys;
  #valuesLeft = MAX_VALUES;
  #around = []; // the lists and maps around the next token, with how many tokens they still need

  constructor(tokenizer, maxDepth, onlyTextKeys) {
    this.#tokenizer = tokenizer;
    this.#maxDepth = maxDepth;
    this.#onlyTextKeys = onlyTextKeys;
  }

  done() {
    return this.#tokenizer.done();
  }

  pos() {
    return this.#tokenizer.pos();
  }

  next() {
    if (this.done()) throw corrupt('malformed: it is cut off');
    if (this.#valuesLeft-- === 0) throw new Refusal('unsupported', 'has more values than this reader takes');
    const token = this.#tokenizer.next();
    const is = (type) => Type.equals(token.type, type);

    while (this.#around.at(-1)?.left === 0) this.#around.pop();
    const parent = this.#around.at(-1);
    const isKey = parent !== undefined && parent.isMap && parent.isKeyNext;
    if (is(Type.break)) {
      // cborg would take it for a value.
      if (parent?.left !== Infinity || (parent.isMap && !isKey)) throw corrupt('malformed: a break within an item');
      this.#around.pop();
      return token;
    }
    if (this.#around.length === this.#maxDepth) throw corrupt(`malformed: nested deeper than ${this.#maxDepth} levels`);
    if (isKey && this.#onlyTextKeys && !is(Type.string)) throw corrupt('malformed: a key is not text');
    if (parent !== undefined) {
      parent.left -= 1;
      parent.isKeyNext = !isKey;
    }
    if (is(Type.array)) this.#around.push({ left: token.value, isMap: false });
    if (is(Type.map)) this.#around.push({ left: 2 * token.value, isMap: true, isKeyNext: true });

    // cborg makes 1.0 the integer 1.
    if (is(Type.float)) token.value = NaN;
    // cborg mends what is not UTF-8, and leaves out a byte order mark, so that another name would come out.
    if (token.byteValue !== undefined) token.value = decodeUtf8(token.byteValue, 'a text');
    return token;
  }
}

// What is in a decoded map --------------------------------------------------------------------------------------------

/** The value of a key, which has to pass a test. */
function required(map, key, isRight) {
  const value = map instanceof Map ? map.get(key) : undefined;
  if (!isRight(value)) throw corrupt(`'${key}' is missing or malformed`);
  return value;
}

export const text = (map, key) => required(map, key, (value) => typeof value === 'string');
export const bool = (map, key) => required(map, key, (value) => typeof value === 'boolean');
export const list = (map, key) => required(map, key, Array.isArray);
export const subMap = (map, key) => required(map, key, (value) => value instanceof Map);

export function texts(map, key) {
  return required(map, key, (value) => Array.isArray(value) && value.every((member) => typeof member === 'string'));
}

export function bytes(map, key, length) {
  return Buffer.from(required(map, key, (value) => value instanceof Uint8Array && value.length === length));
}

/** An unsigned integer of 64 bits, as BigInt. */
export function unsigned(map, key) {
  const isInteger = (value) => typeof value === 'bigint' || Number.isSafeInteger(value);
  return BigInt(required(map, key, (value) => isInteger(value) && value >= 0 && value <= MAX_UNSIGNED));
}
