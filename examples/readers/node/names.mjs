// Names and paths: docs/format.md, section 1. The two names of metadata, with their limits in sections 4 and 5.

export const KEY_METADATA_NAME = 'enc_metadata';
export const MANIFEST_NAME = 'vmsnap_manifest';
export const MAX_KEY_METADATA_BYTES = 1n << 20n;
export const MAX_MANIFEST_BYTES = 1n << 28n;
const MAX_NAME_BYTES = 255;

export function isReserved(name) {
  // Without the flag u, i is for ASCII letters: nothing beyond ASCII becomes one of them.
  return name.startsWith('.vmsnap') || /^(enc_metadata|vmsnap_manifest)$/i.test(name);
}

export function isAllowedName(name) {
  if (['', '.', '..'].includes(name) || /[/\\\0]/.test(name)) return false;
  return Buffer.byteLength(name) <= MAX_NAME_BYTES && !isReserved(name);
}

export function isAllowedPath(path) {
  return path.split('/').every(isAllowedName);
}

/** Sort by UTF-8 bytes, which is another order than that of JavaScript's UTF-16. */
export function sortedByBytes(paths) {
  const pairs = Array.from(paths, (path) => [Buffer.from(path), path]);
  return pairs.sort(([a], [b]) => Buffer.compare(a, b)).map(([, path]) => path);
}
