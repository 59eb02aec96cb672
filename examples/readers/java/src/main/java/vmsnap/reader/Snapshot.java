package vmsnap.reader;

import static java.nio.charset.StandardCharsets.US_ASCII;
import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.List;

/** A snapshot opened for reading: the list of its fragments, and their contents (sections 1, 3 and 5). */
final class Snapshot {
    /** Section 3: chunks of 32 bytes to 64 MiB. */
    static final Floe.Profile FRAGMENT_PROFILE = new Floe.Profile(
            32 + Floe.SEGMENT_OVERHEAD_BYTES, (64 << 20) + Floe.SEGMENT_OVERHEAD_BYTES, Refused.Kind.CORRUPT);

    private static final byte[] FRAGMENT_AAD = "vmsnap/1/fragment\0".getBytes(US_ASCII);

    private static final int MANIFEST_SEGMENT_LENGTH = (64 << 10) + Floe.SEGMENT_OVERHEAD_BYTES;
    private static final Floe.Profile MANIFEST_PROFILE =
            new Floe.Profile(MANIFEST_SEGMENT_LENGTH, MANIFEST_SEGMENT_LENGTH, Refused.Kind.AUTHENTICATION);
    private static final byte[] MANIFEST_AAD = "vmsnap/1/manifest".getBytes(US_ASCII);
    static final int MAX_MANIFEST_BYTES = 1 << 28;

    private final Store files;
    /** Null in a plain snapshot. */
    private final KeyPayload payload;
    /** Null where nothing is sealed. */
    private final Manifest manifest;

    /** Opens a snapshot; whoever gives a key wants an encrypted one (section 1), and without one it is null. */
    Snapshot(Path location, byte[] key) throws IOException {
        files = Store.open(location);
        boolean encrypted = files.hasEntry(Names.KEY_METADATA);
        if (key != null && !encrypted) {
            throw new Refused(
                    Refused.Kind.NOT_ENCRYPTED, "a key was given, and the snapshot has no " + Names.KEY_METADATA);
        }
        payload = encrypted ? readPayload(key) : null;
        manifest = files.hasEntry(Names.MANIFEST) ? readManifest() : null;
        if (manifest != null) {
            files.locate(manifest);
        } else if (encrypted && payload.sealed()) {
            throw Refused.corrupt("the snapshot is not complete: it is sealed, and has no " + Names.MANIFEST);
        }
    }

    /** The paths of all fragments, in the order of their bytes. */
    List<String> fragments() throws IOException {
        if (manifest != null) {
            return List.copyOf(manifest.fragments().keySet());
        }
        List<String> paths = files.fragments();
        paths.sort(Names.BY_BYTES);
        return paths;
    }

    /** Opens the fragment at a path. Of an encrypted one, header and last segment are checked. */
    PieceStream open(String path) throws IOException {
        String what = "fragment \"" + path + '"';
        Names.requirePath(path, Refused.Kind.MISSING, what);
        Manifest.Entry listed = null;
        if (manifest != null) {
            listed = manifest.fragments().get(path);
            if (listed == null) {
                throw new Refused(Refused.Kind.MISSING, what + ": not in the manifest");
            }
        }
        // What is listed has to be there.
        Refused.Kind whenMissing = listed == null ? Refused.Kind.MISSING : Refused.Kind.CORRUPT;
        StoredFile file = files.open(path, whenMissing, what);
        try {
            if (listed != null) {
                requireAsListed(file, listed, what);
            }
            return payload == null
                    ? new PlainFile(file, what)
                    : new Floe(file, payload.dataKey(), fragmentAad(path), FRAGMENT_PROFILE, what);
        } catch (IOException error) {
            file.close();
            throw error;
        }
    }

    private static void requireAsListed(StoredFile file, Manifest.Entry listed, String what)
            throws IOException {
        if (file.size() != listed.storedSize()) {
            throw Refused.corrupt(what + ": of another size than the manifest says");
        }
        if (listed.headerTag() != null) {
            int offset = Floe.HEADER_BYTES - Floe.HEADER_TAG_BYTES;
            ByteBuffer headerTag = file.readAt(offset, Floe.HEADER_TAG_BYTES);
            if (!headerTag.equals(ByteBuffer.wrap(listed.headerTag()))) {
                throw Refused.corrupt(what + ": not the one in the manifest");
            }
        }
    }

    /** The path in the AAD is why a fragment opens in its own place only. */
    private static byte[] fragmentAad(String path) {
        ByteArrayOutputStream aad = new ByteArrayOutputStream();
        aad.writeBytes(FRAGMENT_AAD);
        aad.writeBytes(path.getBytes(UTF_8));
        return aad.toByteArray();
    }

    private KeyPayload readPayload(byte[] key) throws IOException {
        try (StoredFile file = openAtRoot(Names.KEY_METADATA)) {
            return KeyPayload.unwrap(file, key);
        }
    }

    private Manifest readManifest() throws IOException {
        try (StoredFile file = openAtRoot(Names.MANIFEST)) {
            if (file.size() > MAX_MANIFEST_BYTES) {
                throw Refused.corrupt(Names.MANIFEST + ": longer than " + MAX_MANIFEST_BYTES + " bytes");
            }
            if (payload == null) {
                return Manifest.parse(new PlainFile(file, Names.MANIFEST).readWhole(), null);
            }
            Floe plaintext = new Floe(file, payload.dataKey(), MANIFEST_AAD, MANIFEST_PROFILE, Names.MANIFEST);
            return Manifest.parse(plaintext.readWhole(), payload.snapshotId());
        }
    }

    private StoredFile openAtRoot(String name) throws IOException {
        return files.open(name, Refused.Kind.CORRUPT, name);
    }
}
