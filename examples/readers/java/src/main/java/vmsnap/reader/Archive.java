package vmsnap.reader;

import static java.nio.charset.StandardCharsets.US_ASCII;
import static java.nio.file.StandardOpenOption.READ;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.channels.SeekableByteChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * A snapshot in one file (section 7). The reader computes all headers and compares them; it does not parse tar. The
 * file stays open as long as the program runs.
 */
final class Archive implements Store {
    private static final int END_BYTES = 2 * Member.BLOCK_BYTES;

    /** A member, and the offsets at which it and its data begin. */
    private record Placed(Member member, long start, long data) {}

    private final Path location;
    private final SeekableByteChannel channel;
    private final long size;
    private final long seconds;
    private final Map<String, Placed> files = new HashMap<>();
    /** Of the members that were placed until now; never behind the end of the file. */
    private long end = Member.GLOBAL_HEADER.length;

    private List<String> fragments = List.of();

    /** Finds the key metadata and the manifest, and compares their headers. */
    Archive(Path location) throws IOException {
        this.location = location;
        if (!Files.isRegularFile(location)) {
            throw Refused.corrupt(location + ": not a vmsnap archive: neither a file nor a directory");
        }
        channel = FileChannel.open(location, READ);
        size = channel.size();
        if (!bytes(0, Member.GLOBAL_HEADER.length).equals(ByteBuffer.wrap(Member.GLOBAL_HEADER))) {
            throw Refused.corrupt(location + ": not a vmsnap archive: it begins otherwise");
        }
        // Size and time are taken from the headers, which are compared with the ones computed from them.
        ByteBuffer first = bytes(end, Member.BLOCK_BYTES);
        seconds = number(first, Member.MTIME, "the first member");
        byte[] keyMetadata = (Names.KEY_METADATA + '\0').getBytes(US_ASCII);
        if (first.slice(0, Math.min(keyMetadata.length, first.limit())).equals(ByteBuffer.wrap(keyMetadata))) {
            placeByHeader(Names.KEY_METADATA, Member.LEAST_ALIGNMENT, KeyPayload.MAX_FILE_BYTES);
        }
        placeByHeader(Names.MANIFEST, Member.MANIFEST_ALIGNMENT, Snapshot.MAX_MANIFEST_BYTES);
    }

    @Override
    public boolean hasEntry(String name) {
        return files.containsKey(name);
    }

    @Override
    public List<String> fragments() {
        return fragments;
    }

    @Override
    public StoredFile open(String path, Refused.Kind whenMissing, String what) throws IOException {
        Placed file = files.get(path);
        if (file == null) {
            throw new Refused(whenMissing, what + ": not in the archive");
        }
        byte[] headers = file.member.headers(file.start, seconds);
        if (!bytes(file.start, headers.length).equals(ByteBuffer.wrap(headers))) {
            throw foreign(what);
        }
        return StoredFile.part(channel, file.data, file.member.size());
    }

    @Override
    public void locate(Manifest manifest) throws IOException {
        if (seconds != Math.max(0, Math.min(manifest.seconds(), Member.MAX_OCTAL))) {
            throw Refused.corrupt(location + ": its headers have another time than the manifest");
        }
        for (String path : manifest.namespaces()) {
            place(new Member(path + '/', 0, Member.LEAST_ALIGNMENT));
        }
        for (boolean large : new boolean[] {false, true}) {
            for (Map.Entry<String, Manifest.Entry> fragment : manifest.fragments().entrySet()) {
                Member member = Member.ofFragment(fragment.getKey(), fragment.getValue().storedSize());
                if (member.isLarge() == large) {
                    place(member);
                }
            }
        }
        if (size - end != END_BYTES) {
            throw Refused.corrupt(location + ": longer or shorter than it is by its manifest");
        }
        fragments = List.copyOf(manifest.fragments().keySet());
    }

    /** Places a file whose size is only known from its header, and compares the headers. */
    private void placeByHeader(String path, int alignment, int maxBytes) throws IOException {
        long data = end + new Member(path, 0, alignment).headersBytes(end);
        ByteBuffer header = bytes(data - Member.BLOCK_BYTES, Member.BLOCK_BYTES);
        long fileBytes = number(header, Member.SIZE, path);
        if (fileBytes > maxBytes) {
            throw Refused.corrupt(path + ": longer than " + maxBytes + " bytes");
        }
        place(new Member(path, fileBytes, alignment));
        open(path, Refused.Kind.CORRUPT, path);
    }

    /** Puts a member behind the members that were placed before. It must lie in the file, so that no sum overflows. */
    private void place(Member member) throws Refused {
        long headersBytes = member.headersBytes(end);
        long room = size - end - headersBytes;
        long dataBytes = Member.roundedUp(member.size(), Member.BLOCK_BYTES);
        if (room < 0
                || Long.compareUnsigned(member.size(), room) > 0
                || Long.compareUnsigned(dataBytes, room) > 0) {
            throw Refused.corrupt(location + ": shorter than its headers or its manifest say");
        }
        files.put(member.path(), new Placed(member, end, end + headersBytes));
        end += headersBytes + dataBytes;
    }

    /** A number of 11 octal digits in a header. */
    private static long number(ByteBuffer header, int offset, String what) throws Refused {
        long number = 0;
        for (int i = 0; i < 11; i++) {
            int digit = header.limit() == Member.BLOCK_BYTES ? header.get(offset + i) - '0' : -1;
            if (digit < 0 || digit > 7) {
                throw foreign(what);
            }
            number = number << 3 | digit;
        }
        return number;
    }

    /** Bytes of the archive, never more than the headers of a member; fewer where the file ends. */
    private ByteBuffer bytes(long offset, int length) throws IOException {
        return StoredFile.part(channel, 0, size).readAt(offset, length);
    }

    private static Refused foreign(String what) {
        return Refused.corrupt(what
                + ": its header in the archive is damaged, or by another program; unpack that with tar");
    }
}
