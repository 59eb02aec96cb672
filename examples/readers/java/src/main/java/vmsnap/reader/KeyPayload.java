package vmsnap.reader;

import static java.nio.charset.StandardCharsets.US_ASCII;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.util.HexFormat;

/** The payload of `enc_metadata` (section 4). */
record KeyPayload(byte[] snapshotId, byte[] dataKey, boolean sealed) {
    static final int KEY_BYTES = 32;
    static final int SNAPSHOT_ID_BYTES = 16;

    static final int MAX_FILE_BYTES = 1 << 20;
    private static final byte[] AAD = "vmsnap/1/key".getBytes(US_ASCII);
    private static final int SEGMENT_LENGTH = 1056;
    /** Whatever is wrong after the first 10 bytes, which are looked at before, is a failed authentication. */
    private static final Floe.Profile PROFILE =
            new Floe.Profile(SEGMENT_LENGTH, SEGMENT_LENGTH, Refused.Kind.AUTHENTICATION);

    // How the file begins tells what the payload is wrapped with.
    private static final byte[] CALLERS_KEY = HexFormat.of().parseHex("00000000042000000020");
    private static final byte[] AGE = "age-encryption.org/".getBytes(US_ASCII);
    private static final byte[] KEY_SERVICE = HexFormat.of().parseHex("d9d9f7");

    /** Unwraps the payload with the caller's key, which may be null. */
    static KeyPayload unwrap(StoredFile file, byte[] key) throws IOException {
        String what = Names.KEY_METADATA;
        if (file.size() > MAX_FILE_BYTES) {
            throw Refused.corrupt(what + ": longer than " + MAX_FILE_BYTES + " bytes");
        }
        if (beginsWith(file, AGE) || beginsWith(file, KEY_SERVICE)) {
            throw new Refused(Refused.Kind.UNSUPPORTED, what + ": wrapped with age or by a key service");
        }
        if (key == null) {
            throw new Refused(Refused.Kind.KEY, "the snapshot is encrypted, and no key was given");
        }
        if (!beginsWith(file, CALLERS_KEY)) {
            throw Refused.corrupt(what + ": not a key file of vmsnap, or damaged");
        }
        byte[] payload = new Floe(file, key, AAD, PROFILE, what).readWhole();
        Fields fields = Fields.ofVmsnap(payload, "vmsnap-key", what);
        return new KeyPayload(
                fields.bytes("snapshot_id", SNAPSHOT_ID_BYTES),
                fields.bytes("data_key", KEY_BYTES),
                fields.bool("sealed"));
    }

    private static boolean beginsWith(StoredFile file, byte[] prefix) throws IOException {
        return file.readAt(0, prefix.length).equals(ByteBuffer.wrap(prefix));
    }
}
