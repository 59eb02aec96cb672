// A snapshot: its key, its manifest, its tree and its fragments. Section numbers refer to docs/format.md.

import fs from 'node:fs';
import { Archive } from './archive.mjs';
import * as cbor from './cbor.mjs';
import { Refusal, corrupt, readWhole, smaller, within } from './common.mjs';
import { Directory } from './directory.mjs';
import { FloeReader, KEY_BYTES, SEGMENT_OVERHEAD_BYTES, isFileSize, parameters, storedHeaderTag } from './floe.mjs';
import {
  KEY_METADATA_NAME,
  MANIFEST_NAME,
  MAX_KEY_METADATA_BYTES,
  MAX_MANIFEST_BYTES,
  isAllowedPath,
  sortedByBytes,
} from './names.mjs';

const MAX_SHOWN_LENGTH = 255;
const PLAIN_PIECE_BYTES = 1n << 20n;

// Section 3.
const FRAGMENT_AAD = 'vmsnap/1/fragment\0';
const [MIN_CHUNK_BYTES, MAX_CHUNK_BYTES] = [32, 64 << 20];
const FRAGMENT_SEGMENT_LENGTHS = [MIN_CHUNK_BYTES + SEGMENT_OVERHEAD_BYTES, MAX_CHUNK_BYTES + SEGMENT_OVERHEAD_BYTES];

// Section 4.
const KEY_AAD = 'vmsnap/1/key';
const KEY_SEGMENT_LENGTH = 1024 + SEGMENT_OVERHEAD_BYTES;
const AGE_PREFIX = Buffer.from('age-encryption.org/');
const KEY_SERVICE_PREFIX = Buffer.of(0xd9, 0xd9, 0xf7);
const SNAPSHOT_ID_BYTES = 16;

// Section 5.
const MANIFEST_AAD = 'vmsnap/1/manifest';
const MANIFEST_SEGMENT_LENGTH = 65536 + SEGMENT_OVERHEAD_BYTES;
const PROOF_BYTES = 32;

// The key payload (section 4) -----------------------------------------------------------------------------------------

/** Unwrap what the file `enc_metadata` holds. */
function readKeyMetadata(file, key) {
  if (file.size > MAX_KEY_METADATA_BYTES) throw corrupt(`has more than ${MAX_KEY_METADATA_BYTES} bytes`);
  const start = file.readAt(0n, AGE_PREFIX.length);
  const startsWith = (prefix) => start.subarray(0, prefix.length).equals(prefix);
  if (startsWith(AGE_PREFIX)) throw new Refusal('unsupported', 'the data key is wrapped by age');
  if (startsWith(KEY_SERVICE_PREFIX)) throw new Refusal('unsupported', 'the data key is wrapped by a key service');
  if (!startsWith(parameters(KEY_SEGMENT_LENGTH))) {
    throw corrupt('no wrapped key: damaged, or another program wrote it');
  }
  if (key === undefined) throw new Refusal('key', 'the snapshot is encrypted, and no key was given');

  const payload = openMap(readMessage(file, key, KEY_AAD, KEY_SEGMENT_LENGTH), 'vmsnap-key');
  return {
    snapshotId: cbor.bytes(payload, 'snapshot_id', SNAPSHOT_ID_BYTES),
    dataKey: cbor.bytes(payload, 'data_key', KEY_BYTES),
    isSealed: cbor.bool(payload, 'sealed'),
  };
}

/**
 * The plaintext of a file that can be nothing but a FLOE ciphertext with that segment length: what is none was changed,
 * so that all errors are of authentication.
 */
function readMessage(file, key, aad, segmentLength) {
  return readWhole(new FloeReader(file, key, aad, [segmentLength, segmentLength], 'authentication'));
}

/** Decode a map of vmsnap's own; check its form, format, version and requirements, in this order. */
function openMap(bytes, format) {
  const map = cbor.decodeOneWay(bytes);
  const found = cbor.text(map, 'format');
  const version = cbor.unsigned(map, 'version');
  const requires = cbor.texts(map, 'requires');
  if (found !== format) throw corrupt(`its format is ${shown(found)}, not '${format}'`);
  if (version !== 1n) throw new Refusal('unsupported', `its version is ${version}`);
  if (requires.length > 0) {
    throw new Refusal('unsupported', `it requires ${shown(requires[0])}, which this reader does not know`);
  }
  return map;
}

/** A stranger's text in an error: of a long one the beginning. */
function shown(text) {
  return text.length > MAX_SHOWN_LENGTH ? `'${text.slice(0, MAX_SHOWN_LENGTH)}...'` : `'${text}'`;
}

// The manifest (section 5) --------------------------------------------------------------------------------------------

/** What the manifest lists: `namespaces`, and what it says of each fragment by path; and `seconds` of Unix time. */
function readManifest(file, keyMetadata) {
  if (file.size > MAX_MANIFEST_BYTES) throw corrupt(`has more than ${MAX_MANIFEST_BYTES} bytes`);
  const isEncrypted = keyMetadata !== undefined;
  const bytes = isEncrypted
    ? readMessage(file, keyMetadata.dataKey, MANIFEST_AAD, MANIFEST_SEGMENT_LENGTH)
    : file.readAt(0n, Number(file.size));

  const manifest = openMap(bytes, 'vmsnap-manifest');
  const snapshotId = cbor.bytes(manifest, 'snapshot_id', SNAPSHOT_ID_BYTES);
  if (isEncrypted && !snapshotId.equals(keyMetadata.snapshotId)) {
    throw corrupt("another snapshot's: its id is not that of the key");
  }
  const created = cbor.text(manifest, 'created');
  if (!isUtcTime(created)) throw corrupt("'created' is no time of RFC 3339 in UTC");
  cbor.text(manifest, 'generator');
  if (cbor.bool(manifest, 'encrypted') !== isEncrypted) throw corrupt("'encrypted' is not what the snapshot is");

  const listedNamespaces = cbor.texts(manifest, 'namespaces');
  const namespaces = new Set(listedNamespaces);
  if (namespaces.size < listedNamespaces.length) throw corrupt('it lists a namespace twice');
  const fragments = new Map();
  for (const [path, entry] of cbor.subMap(manifest, 'fragments')) {
    if (namespaces.has(path)) throw corrupt(`it lists ${shown(path)} as a namespace and as a fragment`);
    const listed = within(`of ${shown(path)}`, () => readEntry(entry, isEncrypted));
    fragments.set(path, listed);
  }
  for (const path of [...namespaces, ...fragments.keys()]) {
    if (!isAllowedPath(path)) throw corrupt(`it lists ${shown(path)}, which no snapshot can hold`);
    const parentEnd = path.lastIndexOf('/');
    if (parentEnd >= 0 && !namespaces.has(path.slice(0, parentEnd))) {
      throw corrupt(`it lists ${shown(path)}, not its namespace`);
    }
  }
  return { namespaces, fragments, seconds: unixTime(created) };
}

function readEntry(entry, isEncrypted) {
  const size = cbor.unsigned(entry, 'size');
  const storedSize = cbor.unsigned(entry, 'stored_size');
  for (const key of isEncrypted ? ['blake3'] : ['chunk_size', 'floe_header_tag']) {
    if (entry.has(key)) throw corrupt(`'${key}' belongs to the other kind of fragment`);
  }
  if (!isEncrypted) {
    cbor.bytes(entry, 'blake3', PROOF_BYTES); // which Node cannot compute
    if (storedSize !== size) throw corrupt('the sizes do not fit each other');
    return { storedSize };
  }
  const chunk = cbor.unsigned(entry, 'chunk_size');
  if (chunk < MIN_CHUNK_BYTES || chunk > MAX_CHUNK_BYTES || !isFileSize(storedSize, size, chunk)) {
    throw corrupt('the sizes do not fit each other');
  }
  return { storedSize, headerTag: cbor.bytes(entry, 'floe_header_tag', PROOF_BYTES) };
}

/** Whether a text is a time of RFC 3339 in UTC, with `Z`. Second 60 is a leap second. */
function isUtcTime(text) {
  const form = /^\d{4}-(0[1-9]|1[0-2])-\d\dT([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?Z$/;
  // Where a month has no such day, Date goes on to the next, or is none.
  return form.test(text) && new Date(`${text.slice(0, 10)}T00:00:00Z`).getUTCDate() === Number(text.slice(8, 10));
}

/** The whole seconds since 1970 of a time that `isUtcTime` found right. */
function unixTime(text) {
  const [hour, minute, second] = text.slice(11, 19).split(':').map(Number);
  return Date.parse(`${text.slice(0, 10)}T00:00:00Z`) / 1000 + hour * 3600 + minute * 60 + second;
}

// Fragments and the snapshot ------------------------------------------------------------------------------------------

/** A fragment of a plain snapshot: the bytes themselves. */
class PlainReader {
  #file;

  constructor(file) {
    this.#file = file;
    this.size = file.size;
  }

  /** Yield the bytes in pieces. */
  *pieces() {
    for (let offset = 0n; offset < this.size; offset += PLAIN_PIECE_BYTES) {
      const length = smaller(this.size - offset, PLAIN_PIECE_BYTES);
      const piece = this.#file.readAt(offset, length);
      if (piece.length < length) throw corrupt('became shorter while it was read');
      yield piece;
    }
  }
}

/**
 * Where the files of a snapshot are: a Directory or an Archive. Both have
 *
 * - `has(name)`: whether the root has this entry;
 * - `withFile(path, kindIfNone, use)`: call `use` with the StoredFile at a path;
 * - `locate(manifest)`: compute where the fragments are, before the first fragment is opened;
 * - `fragments()`: the paths of all fragments in the store.
 */
function openStore(location) {
  let isDirectory;
  try {
    isDirectory = fs.statSync(location).isDirectory();
  } catch (error) {
    if (error.code !== 'ENOENT' && error.code !== 'ENOTDIR') throw error;
    throw new Refusal('missing', `${location}: there is no such file or directory`);
  }
  return isDirectory ? new Directory(location) : within(location, () => new Archive(location));
}

export class Snapshot {
  #files; // as openStore returns them
  #dataKey;
  #listed; // by path what the manifest says of each fragment; undefined without a manifest

  /** Open the snapshot at `location`; `key` is the wrapping key, or undefined. */
  constructor(location, key) {
    this.#files = openStore(location);
    const read = (name, use) => within(name, () => this.#files.withFile(name, 'corrupt', use));

    let keyMetadata;
    if (this.#files.has(KEY_METADATA_NAME)) {
      keyMetadata = read(KEY_METADATA_NAME, (file) => readKeyMetadata(file, key));
      this.#dataKey = keyMetadata.dataKey;
    } else if (key !== undefined) {
      throw new Refusal('not-encrypted', `a key was given, and there is no ${KEY_METADATA_NAME}`);
    }
    if (this.#files.has(MANIFEST_NAME)) {
      const manifest = read(MANIFEST_NAME, (file) => readManifest(file, keyMetadata));
      within(location, () => this.#files.locate(manifest));
      this.#listed = manifest.fragments;
    } else if (keyMetadata?.isSealed) {
      throw corrupt(`the snapshot is not complete: it has no ${MANIFEST_NAME}`);
    }
  }

  get isEncrypted() {
    return this.#dataKey !== undefined;
  }

  /** Paths of all fragments, in the order of their bytes: of a sealed snapshot those listed, whatever else is there. */
  fragments() {
    return sortedByBytes(this.#listed === undefined ? this.#files.fragments() : this.#listed.keys());
  }

  /** Call `use` with the fragment at a path, which has `size` and `pieces()`, and is closed afterwards. */
  withFragment(path, use) {
    return within(`fragment ${path}`, () => {
      if (!isAllowedPath(path)) throw new Refusal('missing', 'no fragment can have this path');
      const entry = this.#listed?.get(path);
      if (this.#listed !== undefined && entry === undefined) throw new Refusal('missing', 'is not in the manifest');
      return this.#files.withFile(path, entry === undefined ? 'missing' : 'corrupt', (file) => {
        if (entry !== undefined && entry.storedSize !== file.size) {
          throw corrupt('has another size than in the manifest');
        }
        if (!this.isEncrypted) return use(new PlainReader(file));
        if (entry !== undefined && !entry.headerTag.equals(storedHeaderTag(file))) {
          throw corrupt('is not the one in the manifest');
        }
        return use(new FloeReader(file, this.#dataKey, FRAGMENT_AAD + path, FRAGMENT_SEGMENT_LENGTHS));
      });
    });
  }
}
