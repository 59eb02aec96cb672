// A snapshot in a directory: docs/format.md, section 1.

import fs from 'node:fs';
import { Refusal, StoredFile, corrupt, decodeUtf8 } from './common.mjs';
import { isAllowedName, isReserved } from './names.mjs';

export class Directory {
  #root;

  constructor(root) {
    this.#root = root;
  }

  /** Whether the root has this entry. Names are compared byte by byte, unlike in some file systems. */
  has(name) {
    return fs.readdirSync(this.#root, { encoding: 'buffer' }).some((entry) => entry.equals(Buffer.from(name)));
  }

  /**
   * Open the file at a path below the root for `use`; where there is none, that is a refusal of the kind `kindIfNone`.
   * Each component is looked at first, for none may be a link or special file. (Node has no openat: a link that
   * somebody puts there at this very moment is followed, but for the last component.)
   */
  withFile(path, kindIfNone, use) {
    let place = this.#root;
    let stat;
    for (const name of path.split('/')) {
      if (stat?.isFile()) throw new Refusal(kindIfNone, `${place} is a file, not a namespace`);
      place += `/${name}`;
      stat = fs.lstatSync(place, { throwIfNoEntry: false });
      if (stat === undefined) throw new Refusal(kindIfNone, 'there is no such file');
      if (!stat.isFile() && !stat.isDirectory()) throw corrupt(`${place} is a link or a special file`);
    }
    if (stat.isDirectory()) throw new Refusal(kindIfNone, 'is a namespace');

    const fd = fs.openSync(place, fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW | fs.constants.O_NONBLOCK);
    try {
      const opened = fs.fstatSync(fd, { bigint: true });
      if (!opened.isFile()) throw corrupt('became something else than a file');
      return use(new StoredFile(fd, 0n, opened.size));
    } finally {
      fs.closeSync(fd);
    }
  }

  /** Nothing to do: the file system finds the files. */
  locate() {}

  /** Paths of all fragments in the tree below the root, in any order. */
  fragments() {
    const fragments = [];
    const namespaces = [''];
    while (namespaces.length > 0) {
      const namespace = namespaces.pop();
      for (const entry of fs.readdirSync(`${this.#root}/${namespace}`, { encoding: 'buffer' })) {
        const name = decodeUtf8(entry, `a name in ${namespace || 'the root'}`);
        if (isReserved(name)) continue;
        const path = namespace === '' ? name : `${namespace}/${name}`;
        if (!isAllowedName(name)) throw corrupt(`${path}: no snapshot can hold this name`);
        const stat = fs.lstatSync(`${this.#root}/${path}`);
        if (!stat.isFile() && !stat.isDirectory()) throw corrupt(`${path} is a link or a special file`);
        (stat.isFile() ? fragments : namespaces).push(path);
      }
    }
    return fragments;
  }
}
