package vmsnap.reader;

import static java.nio.charset.StandardCharsets.UTF_8;

import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.util.HashSet;
import java.util.Set;

/**
 * Checks that bytes are one CBOR map in the one encoding of section 4. Decoders are lenient, each in its own way, so
 * this class walks over the bytes before a decoder sees them. It remembers only the keys of maps.
 */
final class StrictCbor {
    private static final int MAX_LEVELS = 16;

    private final ByteBuffer data;
    private final String what;

    private StrictCbor(byte[] data, String what) {
        this.data = ByteBuffer.wrap(data);
        this.what = what;
    }

    static void requireMap(byte[] data, String what) throws Refused {
        StrictCbor walk = new StrictCbor(data, what);
        if (data.length == 0 || (data[0] & 0xff) >> 5 != 5) {
            throw walk.refused("not a map");
        }
        walk.item(1);
        if (walk.data.hasRemaining()) {
            throw walk.refused("bytes after the map");
        }
    }

    private void item(int level) throws Refused {
        if (level > MAX_LEVELS) {
            throw refused("nested deeper than " + MAX_LEVELS + " levels");
        }
        int initial = take(1).get() & 0xff;
        int info = initial & 0x1f;
        switch (initial >> 5) {
            case 0, 1 -> argument(info);
            case 2 -> take(argument(info));
            case 3 -> text(info);
            case 4 -> {
                for (long left = argument(info); left != 0; left--) {
                    item(level + 1);
                }
            }
            case 5 -> map(info, level);
            case 7 -> simpleOrFloat(info);
            default -> throw refused("a tag");
        }
    }

    private void map(int info, int level) throws Refused {
        Set<String> keys = new HashSet<>();
        for (long left = argument(info); left != 0; left--) {
            int initial = take(1).get() & 0xff;
            if (initial >> 5 != 3) {
                throw refused("a key that is not a text");
            }
            String key = text(initial & 0x1f);
            if (!keys.add(key)) {
                throw refused("the key \"" + key + "\" twice");
            }
            item(level + 1);
        }
    }

    private void simpleOrFloat(int info) throws Refused {
        switch (info) {
            case 20, 21, 22 -> {} // false, true, null
            case 25, 26, 27 -> take(1 << (info - 24)); // a float, whatever its bits
            default -> throw refused("a simple value other than false, true and null");
        }
    }

    private String text(int info) throws Refused {
        try {
            return UTF_8.newDecoder().decode(take(argument(info))).toString();
        } catch (CharacterCodingException error) {
            throw refused("a text that is not UTF-8");
        }
    }

    /** What follows the initial byte: a number, unsigned in all 64 bits, which has to be in its shortest form. */
    private long argument(int info) throws Refused {
        if (info < 24) {
            return info;
        }
        if (info > 27) {
            throw refused("a length that is not definite");
        }
        long value = 0;
        for (ByteBuffer bytes = take(1 << (info - 24)); bytes.hasRemaining(); ) {
            value = value << 8 | bytes.get() & 0xff;
        }
        long least = info == 24 ? 24 : 1L << (8 << (info - 25));
        if (Long.compareUnsigned(value, least) < 0) {
            throw refused("a number that is not in its shortest form");
        }
        return value;
    }

    private ByteBuffer take(long length) throws Refused {
        if (Long.compareUnsigned(length, data.remaining()) > 0) {
            throw refused("cut off");
        }
        ByteBuffer taken = data.slice(data.position(), (int) length);
        data.position(data.position() + (int) length);
        return taken;
    }

    private Refused refused(String why) {
        return Refused.corrupt(what + ": malformed CBOR: " + why);
    }
}
