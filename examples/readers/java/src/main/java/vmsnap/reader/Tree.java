package vmsnap.reader;

import static java.nio.file.LinkOption.NOFOLLOW_LINKS;
import static java.nio.file.StandardOpenOption.READ;

import java.io.IOException;
import java.nio.file.DirectoryIteratorException;
import java.nio.file.DirectoryStream;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.NotDirectoryException;
import java.nio.file.Path;
import java.nio.file.SecureDirectoryStream;
import java.nio.file.attribute.BasicFileAttributeView;
import java.nio.file.attribute.BasicFileAttributes;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;

/**
 * The directory tree of a snapshot (section 1), below whose root no link is followed and no special file is opened. A
 * {@link SecureDirectoryStream} opens the entries of a folder that is held open, so that none can be put in between.
 */
final class Tree implements Store {
    private final Path root;

    Tree(Path root) {
        this.root = root;
    }

    @Override
    public boolean hasEntry(String name) throws IOException {
        Path file = Names.toFile(name);
        try (SecureDirectoryStream<Path> folder = openRoot()) {
            for (Path entry : folder) {
                if (entry.getFileName().equals(file)) {
                    return true;
                }
            }
            return false;
        } catch (DirectoryIteratorException error) {
            throw error.getCause();
        }
    }

    /** Refused where there is anything that no snapshot can have. */
    @Override
    public List<String> fragments() throws IOException {
        List<String> fragments = new ArrayList<>();
        try (SecureDirectoryStream<Path> folder = openRoot()) {
            addFragments(folder, "", fragments);
            return fragments;
        } catch (DirectoryIteratorException error) {
            throw error.getCause();
        }
    }

    private static void addFragments(SecureDirectoryStream<Path> folder, String prefix, List<String> fragments)
            throws IOException {
        for (Path entry : folder) {
            Path file = entry.getFileName();
            String name = Names.ofFile(file, "in the folder \"" + prefix + '"');
            if (Names.isReserved(name)) {
                continue;
            }
            String path = prefix + name;
            if (!Names.isAllowed(name)) {
                throw Refused.corrupt("\"" + path + "\": not allowed as a name");
            }
            BasicFileAttributes attributes = attributes(folder, file);
            if (attributes.isRegularFile()) {
                fragments.add(path);
            } else if (attributes.isDirectory()) {
                try (SecureDirectoryStream<Path> namespace = folder.newDirectoryStream(file, NOFOLLOW_LINKS)) {
                    addFragments(namespace, path + '/', fragments);
                }
            } else {
                throw linkOrSpecial("\"" + path + '"');
            }
        }
    }

    @Override
    public StoredFile open(String path, Refused.Kind whenMissing, String what) throws IOException {
        String[] names = path.split("/", -1);
        int last = names.length - 1;
        try (SecureDirectoryStream<Path> folder = openNamespace(names, last, whenMissing, what)) {
            Path file = Names.toFile(names[last]);
            require(false, folder, file, whenMissing, what);
            return StoredFile.whole(folder.newByteChannel(file, Set.of(READ, NOFOLLOW_LINKS)));
        } catch (NoSuchFileException error) {
            throw new Refused(whenMissing, what + ": there is none");
        } catch (FileSystemException error) {
            throw Refused.io(what + ": ", error);
        }
    }

    /** Opens the folder that the first `depth` names lead to. */
    private SecureDirectoryStream<Path> openNamespace(String[] names, int depth, Refused.Kind whenMissing, String what)
            throws IOException {
        SecureDirectoryStream<Path> folder = openRoot();
        for (int i = 0; i < depth; i++) {
            try (SecureDirectoryStream<Path> parent = folder) {
                Path file = Names.toFile(names[i]);
                require(true, parent, file, whenMissing, what);
                folder = parent.newDirectoryStream(file, NOFOLLOW_LINKS);
            }
        }
        return folder;
    }

    private SecureDirectoryStream<Path> openRoot() throws IOException {
        try {
            DirectoryStream<Path> folder = Files.newDirectoryStream(root);
            if (folder instanceof SecureDirectoryStream<Path> secureFolder) {
                return secureFolder;
            }
            folder.close();
            throw new Refused(Refused.Kind.IO, "Java has no openat() on this system");
        } catch (NoSuchFileException | NotDirectoryException error) {
            throw new Refused(Refused.Kind.MISSING, "there is no snapshot " + root);
        }
    }

    /** Looks at an entry before it is opened, because opening a pipe waits and opening a device can do anything. */
    private static void require(
            boolean directory, SecureDirectoryStream<Path> folder, Path file, Refused.Kind whenMissing, String what)
            throws IOException {
        BasicFileAttributes attributes = attributes(folder, file);
        if (attributes.isSymbolicLink() || attributes.isOther()) {
            throw linkOrSpecial(what);
        }
        if (attributes.isDirectory() != directory) {
            String other = directory ? "fragment" : "namespace";
            throw new Refused(whenMissing, what + ": there is a " + other + " in its place");
        }
    }

    private static BasicFileAttributes attributes(SecureDirectoryStream<Path> folder, Path file) throws IOException {
        return folder.getFileAttributeView(file, BasicFileAttributeView.class, NOFOLLOW_LINKS).readAttributes();
    }

    private static Refused linkOrSpecial(String what) {
        return Refused.corrupt(what + ": neither a regular file nor a directory");
    }
}
