package vmsnap.reader;

import static java.lang.Integer.parseInt;

import java.time.DateTimeException;
import java.time.LocalDate;
import java.util.Arrays;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * What the manifest (section 5) lists: the fragments by their paths, and the namespaces, both in the order of the bytes
 * of the paths; and when it was created, in seconds of Unix time.
 */
record Manifest(Map<String, Entry> fragments, List<String> namespaces, long seconds) {
    /** What a file has to be; the header tag is null in a plain snapshot. */
    record Entry(long storedSize, byte[] headerTag) {}

    private static final int BLAKE3_BYTES = 32;

    /** RFC 3339 in UTC; whether a month has that day is left to LocalDate. A leap second is 60. */
    private static final Pattern TIME = Pattern.compile(
            "(\\d{4})-(\\d\\d)-(\\d\\d)T([01]\\d|2[0-3]):([0-5]\\d):([0-5]\\d|60)(\\.\\d+)?Z");

    /** Checks the manifest; the snapshot id is that of the key payload, null in a plain snapshot. */
    static Manifest parse(byte[] cbor, byte[] snapshotId) throws Refused {
        String what = Names.MANIFEST;
        Fields fields = Fields.ofVmsnap(cbor, "vmsnap-manifest", what);
        boolean encrypted = snapshotId != null;
        byte[] ownId = fields.bytes("snapshot_id", KeyPayload.SNAPSHOT_ID_BYTES);
        if (fields.bool("encrypted") != encrypted || encrypted && !Arrays.equals(ownId, snapshotId)) {
            throw Refused.corrupt(what + ": it is another snapshot's");
        }
        long seconds = unixTime(fields.text("created"), what);
        fields.text("generator");

        List<String> namespaceList = fields.list("namespaces", String.class);
        Set<String> namespaces = new HashSet<>(namespaceList);
        if (namespaces.size() != namespaceList.size()) {
            throw Refused.corrupt(what + ": a namespace is listed twice");
        }
        for (String path : namespaces) {
            requirePath(path, namespaces, what);
        }
        Map<String, Entry> fragments = new TreeMap<>(Names.BY_BYTES);
        Fields entries = fields.nested("fragments");
        for (String path : entries.values().keySet()) {
            requirePath(path, namespaces, what);
            if (namespaces.contains(path)) {
                throw Refused.corrupt(what + ": \"" + path + "\" is both a namespace and a fragment");
            }
            Fields entry = entries.nested(path);
            fragments.put(path, encrypted ? encryptedEntry(entry) : plainEntry(entry));
        }
        namespaceList.sort(Names.BY_BYTES);
        return new Manifest(fragments, namespaceList, seconds);
    }

    /** The seconds since 1970, negative before. */
    private static long unixTime(String created, String what) throws Refused {
        Matcher parts = TIME.matcher(created);
        try {
            if (parts.matches()) {
                int[] numbers = new int[6];
                for (int i = 0; i < numbers.length; i++) {
                    numbers[i] = parseInt(parts.group(i + 1));
                }
                long days = LocalDate.of(numbers[0], numbers[1], numbers[2]).toEpochDay();
                return ((days * 24 + numbers[3]) * 60 + numbers[4]) * 60 + numbers[5];
            }
        } catch (DateTimeException error) {
            // a month without that day
        }
        throw Refused.corrupt(what + ": 'created' is no time of RFC 3339 in UTC");
    }

    private static void requirePath(String path, Set<String> namespaces, String what) throws Refused {
        Names.requirePath(path, Refused.Kind.CORRUPT, what);
        int slash = path.lastIndexOf('/');
        if (slash >= 0 && !namespaces.contains(path.substring(0, slash))) {
            throw Refused.corrupt(what + ": the namespace of \"" + path + "\" is not listed");
        }
    }

    private static Entry plainEntry(Fields entry) throws Refused {
        entry.bytes("blake3", BLAKE3_BYTES); // no standard library has BLAKE3, so this reader cannot check it
        long storedSize = entry.unsigned("stored_size");
        boolean right = storedSize == entry.unsigned("size")
                && !entry.has("chunk_size")
                && !entry.has("floe_header_tag");
        requireRight(right, entry);
        return new Entry(storedSize, null);
    }

    private static Entry encryptedEntry(Fields entry) throws Refused {
        byte[] headerTag = entry.bytes("floe_header_tag", Floe.HEADER_TAG_BYTES);
        long storedSize = entry.unsigned("stored_size");
        long size = entry.unsigned("size");
        long segmentLength = entry.unsigned("chunk_size") + Floe.SEGMENT_OVERHEAD_BYTES;
        requireRight(Snapshot.FRAGMENT_PROFILE.allows(segmentLength) && !entry.has("blake3"), entry);
        Floe.Layout layout = Floe.Layout.of(storedSize, (int) segmentLength);
        requireRight(layout != null && layout.plaintextSize() == size, entry);
        return new Entry(storedSize, headerTag);
    }

    private static void requireRight(boolean right, Fields entry) throws Refused {
        if (!right) {
            throw Refused.corrupt(entry.what() + ": sizes that do not fit, or keys of the other kind of fragment");
        }
    }
}
