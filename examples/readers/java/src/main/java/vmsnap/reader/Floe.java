package vmsnap.reader;

import static java.nio.charset.StandardCharsets.US_ASCII;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.security.GeneralSecurityException;
import java.security.MessageDigest;
import java.util.Arrays;
import javax.crypto.AEADBadTagException;
import javax.crypto.Cipher;
import javax.crypto.Mac;
import javax.crypto.SecretKey;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.SecretKeySpec;

/** One FLOE ciphertext (section 2) as a stream of its plaintext. Once made, header and last segment are authentic. */
final class Floe extends PieceStream {
    static final int PARAMETER_BYTES = 10;
    static final int IV_BYTES = 32;
    static final int HEADER_TAG_BYTES = 32;
    static final int HEADER_BYTES = PARAMETER_BYTES + IV_BYTES + HEADER_TAG_BYTES;

    private static final int LENGTH_BYTES = 4;
    private static final int NONCE_BYTES = 12;
    private static final int TAG_BYTES = 16;
    static final int SEGMENT_OVERHEAD_BYTES = LENGTH_BYTES + NONCE_BYTES + TAG_BYTES;

    /** The first two bytes: AEAD 0, KDF 0. */
    private static final short AES_256_GCM_AND_HKDF_SHA_384 = 0;

    private static final int NOT_LAST = 0xffffffff;
    private static final long MAX_SEGMENTS = 1L << 40;
    private static final long POSITIONS_PER_KEY = 1L << 20;
    private static final int MESSAGE_KEY_BYTES = 48;
    private static final int SEGMENT_KEY_BYTES = 32;

    /** Which segment lengths are allowed, and the kind of error where a file does not even begin as a ciphertext. */
    record Profile(int minSegmentLength, int maxSegmentLength, Refused.Kind otherFile) {
        /** Takes the length as unsigned. */
        boolean allows(long segmentLength) {
            return Long.compareUnsigned(segmentLength, minSegmentLength) >= 0
                    && Long.compareUnsigned(segmentLength, maxSegmentLength) <= 0;
        }
    }

    /** What follows from a file's size alone; sizes are unsigned, because a manifest can have any. */
    record Layout(long segmentCount, int lastLength, long plaintextSize) {
        /** Null where no ciphertext has this size. */
        static Layout of(long fileSize, int segmentLength) {
            if (Long.compareUnsigned(fileSize, HEADER_BYTES + SEGMENT_OVERHEAD_BYTES) < 0) {
                return null;
            }
            long body = fileSize - HEADER_BYTES;
            long count = Long.divideUnsigned(body - 1, segmentLength) + 1;
            int lastLength = (int) (body - (count - 1) * segmentLength);
            boolean possible = lastLength >= SEGMENT_OVERHEAD_BYTES && count <= MAX_SEGMENTS;
            return possible ? new Layout(count, lastLength, body - count * SEGMENT_OVERHEAD_BYTES) : null;
        }
    }

    private final StoredFile file;
    private final byte[] parametersAndIv;
    private final byte[] aad;
    private final String what;
    private final byte[] messageKey;
    private final int segmentLength;
    private final Layout layout;
    private SecretKey segmentKey;
    private long segmentKeyPosition = -1;
    private long nextPosition;

    /** The checks of section 2, in the order given there. */
    Floe(StoredFile file, byte[] key, byte[] aad, Profile profile, String what) throws IOException {
        this.file = file;
        this.aad = aad;
        this.what = what;
        long fileSize = file.size();
        if (fileSize < HEADER_BYTES + SEGMENT_OVERHEAD_BYTES) {
            throw new Refused(profile.otherFile, what + ": too short for a FLOE ciphertext: cut off, or not encrypted");
        }
        ByteBuffer header = readExactly(0, HEADER_BYTES);
        short algorithms = header.getShort();
        segmentLength = header.getInt();
        if (algorithms != AES_256_GCM_AND_HKDF_SHA_384 || header.getInt() != IV_BYTES) {
            throw new Refused(profile.otherFile, what + ": no FLOE header: damaged, or not encrypted");
        }
        if (!profile.allows(Integer.toUnsignedLong(segmentLength))) {
            throw new Refused(profile.otherFile, what + ": a segment length that is not allowed here");
        }

        parametersAndIv = Arrays.copyOf(header.array(), PARAMETER_BYTES + IV_BYTES);
        byte[] headerTag = Arrays.copyOfRange(header.array(), PARAMETER_BYTES + IV_BYTES, HEADER_BYTES);
        if (!MessageDigest.isEqual(floeKdf(key, ascii("HEADER_TAG:"), HEADER_TAG_BYTES), headerTag)) {
            throw Refused.authentication(what + ": the key is wrong, or it is damaged, or not in its own place");
        }
        messageKey = floeKdf(key, ascii("MESSAGE_KEY:"), MESSAGE_KEY_BYTES);

        layout = Layout.of(fileSize, segmentLength);
        if (layout == null) {
            throw Refused.authentication(what + ": no FLOE ciphertext has this length: cut off or extended");
        }
        segment(layout.segmentCount - 1);
    }

    @Override
    long size() {
        return layout.plaintextSize;
    }

    @Override
    ByteBuffer nextPiece() throws IOException {
        while (nextPosition < layout.segmentCount) {
            byte[] plaintext = segment(nextPosition++);
            if (plaintext.length > 0) { // the last may be empty
                return ByteBuffer.wrap(plaintext);
            }
        }
        return null;
    }

    @Override
    public void close() throws IOException {
        file.close();
    }

    /** The plaintext of one segment, after its tag was checked. */
    private byte[] segment(long position) throws IOException {
        boolean last = position == layout.segmentCount - 1;
        int length = last ? layout.lastLength : segmentLength;
        ByteBuffer segment = readExactly(HEADER_BYTES + position * segmentLength, length);
        // The tag does not cover these 4 bytes.
        if (segment.getInt() != (last ? length : NOT_LAST)) {
            throw Refused.authentication(what + ": segment " + position + ": a wrong length in front of it");
        }
        byte[] segmentAad = ByteBuffer.allocate(Long.BYTES + 1).putLong(position).put((byte) (last ? 1 : 0)).array();
        byte[] bytes = segment.array();
        try {
            Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
            var nonce = new GCMParameterSpec(8 * TAG_BYTES, bytes, LENGTH_BYTES, NONCE_BYTES);
            cipher.init(Cipher.DECRYPT_MODE, segmentKey(position), nonce);
            cipher.updateAAD(segmentAad);
            return cipher.doFinal(bytes, LENGTH_BYTES + NONCE_BYTES, length - LENGTH_BYTES - NONCE_BYTES);
        } catch (AEADBadTagException error) {
            throw Refused.authentication(what + ": segment " + position + ": the key is wrong, or it is damaged");
        } catch (GeneralSecurityException error) {
            throw new IllegalStateException(error); // every Java platform has AES-GCM
        }
    }

    private SecretKey segmentKey(long position) {
        long masked = position & -POSITIONS_PER_KEY;
        if (masked != segmentKeyPosition) {
            byte[] purpose = ByteBuffer.allocate(4 + Long.BYTES).put(ascii("DEK:")).putLong(masked).array();
            segmentKey = new SecretKeySpec(floeKdf(messageKey, purpose, SEGMENT_KEY_BYTES), "AES");
            segmentKeyPosition = masked;
        }
        return segmentKey;
    }

    /** HKDF-Expand-SHA-384, which for at most 48 bytes is one HMAC (section 2, "Keys"). */
    private byte[] floeKdf(byte[] key, byte[] purpose, int length) {
        try {
            Mac hmac = Mac.getInstance("HmacSHA384");
            hmac.init(new SecretKeySpec(key, hmac.getAlgorithm()));
            hmac.update(parametersAndIv);
            hmac.update(purpose);
            hmac.update(aad);
            hmac.update((byte) 1);
            return Arrays.copyOf(hmac.doFinal(), length);
        } catch (GeneralSecurityException error) {
            throw new IllegalStateException(error);
        }
    }

    private ByteBuffer readExactly(long offset, int length) throws IOException {
        ByteBuffer bytes = file.readAt(offset, length);
        if (bytes.remaining() < length) {
            throw Refused.authentication(what + ": became shorter while it was read");
        }
        return bytes;
    }

    private static byte[] ascii(String text) {
        return text.getBytes(US_ASCII);
    }
}
