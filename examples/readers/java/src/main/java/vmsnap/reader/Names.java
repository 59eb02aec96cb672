package vmsnap.reader;

import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.ByteArrayOutputStream;
import java.net.URI;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Comparator;
import java.util.HexFormat;
import java.util.Set;
import java.util.regex.Pattern;

/** Names and paths (section 1). */
final class Names {
    static final String KEY_METADATA = "enc_metadata";
    static final String MANIFEST = "vmsnap_manifest";

    /** The order of paths: that of their bytes. String's own is another one where there is anything beyond U+FFFF. */
    static final Comparator<String> BY_BYTES =
            Comparator.comparing(path -> path.getBytes(UTF_8), Arrays::compareUnsigned);

    private static final String RESERVED_PREFIX = ".vmsnap";
    /** In any case of the ASCII letters, and of no others. */
    private static final Pattern RESERVED = Pattern.compile(KEY_METADATA + '|' + MANIFEST, Pattern.CASE_INSENSITIVE);

    private static final Set<String> FORBIDDEN = Set.of("", ".", "..");
    private static final String FORBIDDEN_CHARACTERS = "/\\\0";
    private static final int MAX_NAME_BYTES = 255;

    /** What a terminal would obey; the list is in the README of all readers. */
    private static final Pattern UNPRINTABLE = Pattern.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f"
            + "\\u2028-\\u202e\\u2066-\\u2069\\ufeff]");

    private Names() {}

    static boolean isReserved(String name) {
        return name.startsWith(RESERVED_PREFIX) || RESERVED.matcher(name).matches();
    }

    static boolean isAllowed(String name) {
        return !FORBIDDEN.contains(name)
                && name.chars().noneMatch(character -> FORBIDDEN_CHARACTERS.indexOf(character) >= 0)
                && name.getBytes(UTF_8).length <= MAX_NAME_BYTES
                && !isReserved(name);
    }

    /** Refuses a path that no fragment and no namespace can have. */
    static void requirePath(String path, Refused.Kind kind, String what) throws Refused {
        for (String name : path.split("/", -1)) {
            if (!isAllowed(name)) {
                throw new Refused(kind, what + ": \"" + name + "\" is not allowed as a name");
            }
        }
    }

    static String printable(String text) {
        return UNPRINTABLE.matcher(text).replaceAll(match -> String.format("\\\\u%04x", (int) match.group().charAt(0)));
    }

    // Names of files are bytes. Java takes them for text in the encoding of the locale, which may be ASCII and which no
    // program can choose. But a Path keeps the bytes, and as a URI it shows them and can be made of them.

    static String ofFile(Path file, String what) throws Refused {
        String uri = file.toUri().getRawPath().replaceFirst("/$", "");
        String escaped = uri.substring(uri.lastIndexOf('/') + 1);
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        for (int i = 0; i < escaped.length(); i++) {
            if (escaped.charAt(i) == '%') {
                bytes.write(HexFormat.fromHexDigits(escaped, i + 1, i + 3));
                i += 2;
            } else {
                bytes.write(escaped.charAt(i));
            }
        }
        try {
            return UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes.toByteArray())).toString();
        } catch (CharacterCodingException error) {
            throw Refused.corrupt(what + ": the name " + escaped + " is not UTF-8");
        }
    }

    static Path toFile(String name) {
        String escaped = HexFormat.of().withPrefix("%").formatHex(name.getBytes(UTF_8));
        return Path.of(URI.create("file:///" + escaped)).getFileName();
    }
}
