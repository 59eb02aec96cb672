package vmsnap.reader;

import static java.nio.charset.StandardCharsets.UTF_8;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.core.JsonToken;
import com.fasterxml.jackson.core.StreamReadConstraints;
import com.fasterxml.jackson.core.TSFBuilder;
import com.fasterxml.jackson.dataformat.cbor.CBORFactory;
import java.io.EOFException;
import java.io.IOException;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * A decoded map, whose values are asked for by name and type: one of another type is refused, as a missing one is. The
 * types are those in the tables of the format: String, Boolean, byte[], Long, List and Fields; all else is null.
 */
record Fields(Map<String, Object> values, String what) {
    private static final Object NULL = new Object();
    private static final long VERSION = 1;
    private static final long MAX_TOKENS = 1 << 26;

    /** Decodes a map of vmsnap's own: the key payload (section 4) or the manifest (section 5). */
    static Fields ofVmsnap(byte[] cbor, String format, String what) throws Refused {
        StrictCbor.requireMap(cbor, what);
        Fields fields = decoded(CBORFactory.builder(), cbor, what);
        String foundFormat = fields.text("format");
        long version = fields.unsigned("version");
        List<String> requires = fields.list("requires", String.class);
        if (!foundFormat.equals(format)) {
            throw Refused.corrupt(what + ": its format is not " + format);
        }
        if (version != VERSION) {
            String found = Long.toUnsignedString(version);
            throw new Refused(Refused.Kind.UNSUPPORTED, what + ": it is of version " + found);
        }
        if (!requires.isEmpty()) {
            throw new Refused(Refused.Kind.UNSUPPORTED, what + ": it requires " + String.join(", ", requires));
        }
        return fields;
    }

    /** Decodes a map of crosvm's, in CBOR or JSON (section 6). What begins a map in CBOR begins nothing in JSON. */
    static Fields ofCrosvm(byte[] data, String what) throws Refused {
        boolean cbor = data.length > 0 && (data[0] & 0xff) >> 5 == 5;
        return decoded(cbor ? CBORFactory.builder() : JsonFactory.builder(), data, what);
    }

    private static Fields decoded(TSFBuilder<?, ?> format, byte[] data, String what) throws Refused {
        // A path can be longer than Jackson's longest name; what nobody writes must not fill the memory.
        StreamReadConstraints constraints = StreamReadConstraints.builder()
                .maxNameLength(Integer.MAX_VALUE)
                .maxStringLength(Integer.MAX_VALUE)
                .maxTokenCount(MAX_TOKENS)
                .build();
        // Jackson's table of the names seen gives up where too many collide in it.
        JsonFactory factory = format.streamReadConstraints(constraints)
                .disable(JsonFactory.Feature.CANONICALIZE_FIELD_NAMES)
                .build();
        try (JsonParser parser = factory instanceof CBORFactory
                ? factory.createParser(data)
                : factory.createParser(utf8(data))) {
            parser.nextToken();
            if (item(parser, what) instanceof Fields fields && parser.nextToken() == null) {
                return fields;
            }
        } catch (CharacterCodingException error) {
            throw Refused.corrupt(what + ": neither CBOR nor JSON");
        } catch (JsonProcessingException error) {
            throw Refused.corrupt(what + ": malformed: " + error.getOriginalMessage());
        } catch (IOException error) {
            throw Refused.corrupt(what + ": malformed: " + error.getMessage());
        }
        throw Refused.corrupt(what + ": not one map");
    }

    /** JSON is made text of here, since Jackson would also take UTF-16, and bytes that are not UTF-8. */
    private static String utf8(byte[] data) throws CharacterCodingException {
        return UTF_8.newDecoder().decode(ByteBuffer.wrap(data)).toString();
    }

    /** The item that the parser is at, with all that is in it. */
    private static Object item(JsonParser parser, String what) throws IOException {
        JsonToken token = parser.currentToken();
        if (token == null) {
            throw new EOFException("cut off");
        }
        return switch (token) {
            case START_OBJECT -> {
                Map<String, Object> values = new HashMap<>();
                while (parser.nextToken() == JsonToken.FIELD_NAME) {
                    String name = parser.currentName();
                    parser.nextToken();
                    if (values.containsKey(name)) {
                        throw new IOException("the key '" + name + "' twice");
                    }
                    values.put(name, item(parser, what));
                }
                yield new Fields(values, what);
            }
            case START_ARRAY -> {
                List<Object> elements = new ArrayList<>();
                while (parser.nextToken() != JsonToken.END_ARRAY) {
                    elements.add(item(parser, what));
                }
                yield elements;
            }
            case VALUE_STRING -> parser.getText();
            case VALUE_EMBEDDED_OBJECT -> parser.getBinaryValue();
            case VALUE_NUMBER_INT -> unsigned(parser.getBigIntegerValue());
            case VALUE_TRUE -> true;
            case VALUE_FALSE -> false;
            case VALUE_NULL -> NULL;
            default -> null; // of no use to any field
        };
    }

    /** An integer from 0 to 2^64 - 1. From 2^63 on the long is negative: {@link Long#compareUnsigned} compares it. */
    private static Long unsigned(BigInteger value) {
        return value.signum() >= 0 && value.bitLength() <= Long.SIZE ? value.longValue() : null;
    }

    boolean has(String name) {
        return values.containsKey(name);
    }

    boolean isNull(String name) {
        return values.get(name) == NULL;
    }

    /** How many fields there are, known or not. */
    int size() {
        return values.size();
    }

    String text(String name) throws Refused {
        return value(name, String.class);
    }

    boolean bool(String name) throws Refused {
        return value(name, Boolean.class);
    }

    long unsigned(String name) throws Refused {
        return value(name, Long.class);
    }

    byte[] bytes(String name, int length) throws Refused {
        byte[] bytes = value(name, byte[].class);
        if (bytes.length != length) {
            throw malformed(name);
        }
        return bytes;
    }

    /** Bytes of any length. JSON has none, and a list of numbers instead. */
    byte[] bytesOrNumbers(String name) throws Refused {
        if (values.get(name) instanceof byte[] bytes) {
            return bytes;
        }
        List<Long> numbers = list(name, Long.class);
        byte[] bytes = new byte[numbers.size()];
        for (int i = 0; i < bytes.length; i++) {
            bytes[i] = numbers.get(i).byteValue();
            if (numbers.get(i) != Byte.toUnsignedLong(bytes[i])) {
                throw malformed(name);
            }
        }
        return bytes;
    }

    Fields nested(String name) throws Refused {
        return new Fields(value(name, Fields.class).values, what + ": '" + name + "'");
    }

    <T> List<T> list(String name, Class<T> type) throws Refused {
        List<T> elements = new ArrayList<>();
        for (Object element : value(name, List.class)) {
            if (!type.isInstance(element)) {
                throw malformed(name);
            }
            elements.add(type.cast(element));
        }
        return elements;
    }

    private <T> T value(String name, Class<T> type) throws Refused {
        Object value = values.get(name);
        if (!type.isInstance(value)) {
            throw malformed(name);
        }
        return type.cast(value);
    }

    private Refused malformed(String name) {
        return Refused.corrupt(what + ": '" + name + "' is missing or malformed");
    }
}
