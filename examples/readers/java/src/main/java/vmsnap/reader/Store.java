package vmsnap.reader;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;

/** Where the files of a snapshot are: a directory or an archive. */
interface Store {
    /** Opens what the caller named, and so follows links. */
    static Store open(Path location) throws IOException {
        return Files.exists(location) && !Files.isDirectory(location) ? new Archive(location) : new Tree(location);
    }

    /** Whether the root has an entry of exactly this name, whatever it is. */
    boolean hasEntry(String name) throws IOException;

    /** Opens a regular file; `whenMissing` is the kind of error where there is none. */
    StoredFile open(String path, Refused.Kind whenMissing, String what) throws IOException;

    /** Computes where the fragments are, before the first fragment is opened. */
    default void locate(Manifest manifest) throws IOException {
        // A file system finds the files.
    }

    /** The paths of all fragments in the store. */
    List<String> fragments() throws IOException;
}
