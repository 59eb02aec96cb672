package vmsnap.reader;

import static java.nio.charset.StandardCharsets.US_ASCII;
import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;

/**
 * A file or namespace in an archive (section 7). The path of a namespace ends in `/`. The size is unsigned, because a
 * manifest can have any. The offset at which a member begins decides how long its headers are.
 */
record Member(String path, long size, int alignment) {
    static final int BLOCK_BYTES = 512;
    static final int LEAST_ALIGNMENT = BLOCK_BYTES;
    static final int MANIFEST_ALIGNMENT = 65536;
    /** The greatest size and time in 11 octal digits. */
    static final long MAX_OCTAL = (1L << 33) - 1;

    // Offsets of the fields of a ustar header.
    private static final int MODE = 100;
    private static final int UID = 108;
    private static final int GID = 116;
    static final int SIZE = 124;
    static final int MTIME = 136;
    private static final int CHKSUM = 148;
    private static final int TYPEFLAG = 156;
    private static final int MAGIC = 257;
    private static final int DEVMAJOR = 329;
    private static final int DEVMINOR = 337;

    private static final char FILE = '0';
    private static final char NAMESPACE = '5';
    private static final char PAX = 'x';
    private static final char GLOBAL = 'g';

    private static final int MAX_NAME_FIELD_BYTES = 100;
    private static final int MIN_COMMENT_BYTES = 20;
    private static final int LARGE_ALIGNMENT = 4096;
    private static final long LARGE_FRAGMENT_BYTES = 65536;

    static final byte[] GLOBAL_HEADER = joined(
            ustar("pax_global_header", GLOBAL, BLOCK_BYTES, 0), comment("vmsnap archive 1", BLOCK_BYTES));

    static Member ofFragment(String path, long storedSize) {
        boolean large = Long.compareUnsigned(storedSize, LARGE_FRAGMENT_BYTES) >= 0;
        return new Member(path, storedSize, large ? LARGE_ALIGNMENT : LEAST_ALIGNMENT);
    }

    /** Whether it is one of the fragments that come last. */
    boolean isLarge() {
        return alignment == LARGE_ALIGNMENT;
    }

    /** The distance from the start of the member to its data. */
    long headersBytes(long start) {
        int paxBytes = paxBytes(start, records().length);
        return paxBytes == 0 ? BLOCK_BYTES : 2 * BLOCK_BYTES + (long) paxBytes;
    }

    /** All bytes from the start of the member to its data. */
    byte[] headers(long start, long seconds) {
        String name = hasLongName() ? "vmsnap" : path;
        byte[] ustar = ustar(name, path.endsWith("/") ? NAMESPACE : FILE, size, seconds);
        byte[] records = records();
        int paxBytes = paxBytes(start, records.length);
        if (paxBytes == 0) {
            return ustar;
        }
        byte[] comment = paxBytes == records.length ? new byte[0] : comment("", paxBytes - records.length);
        return joined(ustar("vmsnap.pax", PAX, paxBytes, seconds), records, comment, ustar);
    }

    /** The length of the data of the pax header, or 0 without a pax header. `need` is the length of the records. */
    private int paxBytes(long start, int need) {
        if (need == 0 && (start + BLOCK_BYTES) % alignment == 0) {
            return 0;
        }
        long length = Math.max(BLOCK_BYTES, roundedUp(need, BLOCK_BYTES));
        length += Math.floorMod(-(start + 2 * BLOCK_BYTES + length), alignment);
        while (0 < length - need && length - need < MIN_COMMENT_BYTES) {
            length += alignment;
        }
        return Math.toIntExact(length);
    }

    /** The pax records `path` and `size`, if the member needs them. */
    private byte[] records() {
        byte[] pathRecord = hasLongName() ? record("path", path) : new byte[0];
        boolean large = Long.compareUnsigned(size, MAX_OCTAL) > 0;
        return large ? joined(pathRecord, record("size", Long.toUnsignedString(size))) : pathRecord;
    }

    private boolean hasLongName() {
        return path.length() > MAX_NAME_FIELD_BYTES || path.chars().anyMatch(character -> character > 0x7f);
    }

    /** A pax record, which begins with its own length, digits included. */
    private static byte[] record(String keyword, String value) {
        byte[] rest = (' ' + keyword + '=' + value + '\n').getBytes(UTF_8);
        int digits = 1;
        while (Integer.toString(rest.length + digits).length() > digits) {
            digits++;
        }
        return joined(Integer.toString(rest.length + digits).getBytes(US_ASCII), rest);
    }

    /** The record `comment` of that length: the text, then spaces. */
    private static byte[] comment(String text, int length) {
        String start = length + " comment=" + text;
        return (start + " ".repeat(length - start.length() - 1) + '\n').getBytes(US_ASCII);
    }

    private static byte[] ustar(String name, char typeflag, long size, long seconds) {
        byte[] block = new byte[BLOCK_BYTES];
        put(block, 0, name);
        put(block, MODE, typeflag == NAMESPACE ? "0000700" : "0000600");
        for (int offset : new int[] {UID, GID, DEVMAJOR, DEVMINOR}) {
            put(block, offset, "0000000");
        }
        if (Long.compareUnsigned(size, MAX_OCTAL) <= 0) {
            put(block, SIZE, String.format("%011o", size));
        } else {
            block[SIZE] = (byte) 0x80;
            ByteBuffer.wrap(block).putLong(MTIME - Long.BYTES, size);
        }
        put(block, MTIME, String.format("%011o", seconds));
        put(block, CHKSUM, " ".repeat(8));
        block[TYPEFLAG] = (byte) typeflag;
        put(block, MAGIC, "ustar\0" + "00");
        int sum = 0;
        for (byte value : block) {
            sum += Byte.toUnsignedInt(value);
        }
        put(block, CHKSUM, String.format("%06o\0", sum));
        return block;
    }

    private static void put(byte[] block, int offset, String text) {
        byte[] bytes = text.getBytes(US_ASCII);
        System.arraycopy(bytes, 0, block, offset, bytes.length);
    }

    static long roundedUp(long value, int multiple) {
        return value + Math.floorMod(-value, multiple);
    }

    private static byte[] joined(byte[]... parts) {
        ByteArrayOutputStream whole = new ByteArrayOutputStream();
        for (byte[] part : parts) {
            whole.writeBytes(part);
        }
        return whole.toByteArray();
    }
}
