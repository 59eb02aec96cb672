"""A new file that is complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EEXIST, EISDIR, ENOENT, EOPNOTSUPP


@contextmanager
def new_file(path: str, *, durable: bool) -> Iterator[int]:
    """Give the descriptor of a new file with mode 0600, which is at the path once the block has succeeded.

    Where the file system has files without a name, the file does not have one until then, so that nothing is left even
    by a process that is killed.

    Raises
    ------
    FileExistsError
        Something exists at the path. It is not changed.
    """
    if os.path.exists(path) or os.path.islink(path):
        raise FileExistsError(EEXIST, "exists already, and nothing is overwritten", path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        named, file = _open(path)
        try:
            yield file
            if durable:
                os.fsync(file)
            if not named:
                # With a directory's descriptor, Python follows the link to the file.
                os.link(f"/proc/self/fd/{file}", os.path.basename(path), dst_dir_fd=directory)
            if durable:
                with suppress(OSError):  # not every file system can sync directories
                    os.fsync(directory)
        except BaseException:
            if named:
                with suppress(OSError):
                    os.unlink(path)
            raise
        finally:
            os.close(file)
    finally:
        os.close(directory)


def _open(path: str) -> tuple[bool, int]:
    """Return whether the file has its name already, and its descriptor."""
    if os.path.exists("/proc/self/fd"):
        try:
            return False, os.open(os.path.dirname(path) or ".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (EOPNOTSUPP, EISDIR, ENOENT):
                raise
    return True, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
