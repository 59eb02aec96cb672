#!/usr/bin/env node
// Reads a vmsnap snapshot, plain or encrypted, without vmsnap. ../README.md describes the output.

import { createHash } from 'node:crypto';
import fs from 'node:fs';
import { Refusal, readAt, writeAll } from './common.mjs';
import { KEY_BYTES } from './floe.mjs';
import { restore } from './memory.mjs';
import { Snapshot } from './snapshot.mjs';

const USAGE =
  'usage: vmsnap-reader.mjs SNAPSHOT [--key-file FILE] list | check | cat PATH | restore OUT_DIR [NAMESPACE]';
const [GOOD, REFUSED, WRONG_USAGE] = [0, 1, 2];
const [STDOUT, STDERR] = [1, 2];
const SIZE_COLUMNS = 16;

/** Wrong usage, or a key file that is none. */
class UsageError extends Error {}

// Output --------------------------------------------------------------------------------------------------------------

/** Escape what a terminal would obey. Unambiguous: a backslash is in no name. */
function printable(text) {
  const obeyed = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
  return text.replace(obeyed, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

function print(line) {
  writeAll(STDOUT, Buffer.from(`${line}\n`), null);
}

function complain(line) {
  try {
    writeAll(STDERR, Buffer.from(`${line}\n`), null);
  } catch {
    // Nobody reads it; the exit code remains.
  }
}

/** Kind and text of an error of the snapshot's or the operating system's. Others are bugs of this program. */
function explain(error) {
  if (!(error instanceof Refusal) && error.syscall === undefined) throw error;
  return { kind: error.kind ?? 'io', why: printable(error.message) };
}

function complainOf(error) {
  const { kind, why } = explain(error);
  complain(`refused: ${kind}: ${why}`);
}

// Commands: each returns the exit code --------------------------------------------------------------------------------

function list(snapshot) {
  let exitCode = GOOD;
  for (const path of snapshot.fragments()) {
    let size;
    try {
      size = snapshot.withFragment(path, (fragment) => fragment.size);
    } catch (error) {
      complainOf(error);
      exitCode = REFUSED;
      continue;
    }
    print(`${String(size).padStart(SIZE_COLUMNS)}  ${printable(path)}`);
  }
  return exitCode;
}

function check(snapshot) {
  const paths = snapshot.fragments();
  let good = 0;
  let bytes = 0n;
  for (const path of paths) {
    let fields;
    try {
      const { size, sha256 } = snapshot.withFragment(path, digest);
      fields = ['ok', size, sha256, printable(path)];
      good += 1;
      bytes += size;
    } catch (error) {
      const { kind, why } = explain(error);
      fields = ['refused', kind, printable(path), why];
    }
    print(fields.join('\t'));
  }
  const proof = snapshot.isEncrypted ? 'encrypted' : 'plain: nothing proves that they are unchanged';
  complain(`${good} of ${paths.length} fragments are good, ${bytes} bytes (${proof})`);
  return good === paths.length ? GOOD : REFUSED;
}

function digest(fragment) {
  const hash = createHash('sha256');
  for (const piece of fragment.pieces()) hash.update(piece);
  return { size: fragment.size, sha256: hash.digest('hex') };
}

function cat(snapshot, path) {
  snapshot.withFragment(path, (fragment) => {
    for (const piece of fragment.pieces()) writeAll(STDOUT, piece, null);
  });
  return GOOD;
}

function restoreMemory(snapshot, folder, namespace = '') {
  restore(snapshot, folder, namespace);
  return GOOD;
}

// The command line ----------------------------------------------------------------------------------------------------

/** By command its function, and how many arguments it takes. */
const COMMANDS = new Map([
  ['list', { run: list, least: 0, most: 0 }],
  ['check', { run: check, least: 0, most: 0 }],
  ['cat', { run: cat, least: 1, most: 1 }],
  ['restore', { run: restoreMemory, least: 1, most: 2 }],
]);

function parseArguments([root, ...words]) {
  const keyFile = words[0] === '--key-file' ? words.splice(0, 2)[1] : undefined;
  const [name, ...operands] = words;
  const command = COMMANDS.get(name);
  if (command === undefined || operands.length < command.least || operands.length > command.most) {
    throw new UsageError(USAGE);
  }
  return { root, key: keyFile === undefined ? undefined : readKey(keyFile), run: command.run, operands };
}

/** The key in a file, which may be a pipe: 32 bytes, or 64 hexadecimal digits with or without a line end. */
function readKey(place) {
  let data;
  try {
    const fd = fs.openSync(place, 'r');
    data = readAt(fd, null, 2 * KEY_BYTES + '\r\n'.length + 1);
    fs.closeSync(fd);
  } catch (error) {
    throw new UsageError(`the key file cannot be read: ${error.message}`);
  }
  if (data.length === KEY_BYTES) return data;
  const match = /^([0-9A-Fa-f]{64})(\r?\n)?$/.exec(data.toString('latin1'));
  if (match === null) {
    throw new UsageError(`the key file ${place} has neither ${KEY_BYTES} bytes nor their hexadecimal digits`);
  }
  return Buffer.from(match[1], 'hex');
}

function main(words) {
  try {
    const { root, key, run, operands } = parseArguments(words);
    return run(new Snapshot(root, key), ...operands);
  } catch (error) {
    if (error instanceof UsageError) {
      complain(printable(error.message));
      return WRONG_USAGE;
    }
    // EPIPE: whoever read our output went away, as `head` does.
    if (error.code !== 'EPIPE') complainOf(error);
    return REFUSED;
  }
}

process.exitCode = main(process.argv.slice(2));
