package vmsnap.reader;

import static java.nio.charset.StandardCharsets.US_ASCII;
import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.BufferedOutputStream;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.PrintStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** The command line, as the README of all readers has it. */
public final class Main {
    private static final String USAGE = "usage: vmsnap-reader SNAPSHOT [--key-file FILE] "
            + "list | check | cat PATH | restore OUT_DIR [NAMESPACE]";

    private static final int GOOD = 0;
    private static final int REFUSED = 1;
    private static final int WRONG_USAGE = 2;

    private static final int COPY_BYTES = 1 << 16;
    private static final Pattern KEY_IN_HEX = Pattern.compile("([0-9A-Fa-f]{64})\\r?\\n?");
    private static final int MAX_KEY_FILE_BYTES = 2 * KeyPayload.KEY_BYTES + 2;

    /** UTF-8 whatever the locale. It keeps errors of writing to itself, until it is asked for them. */
    private final PrintStream output = new PrintStream(
            new BufferedOutputStream(new FileOutputStream(FileDescriptor.out), COPY_BYTES), false, UTF_8);

    private final PrintStream errors = new PrintStream(new FileOutputStream(FileDescriptor.err), true, UTF_8);

    /** The message says what is wrong with the arguments. */
    private static final class UsageException extends Exception {
        private static final long serialVersionUID = 1;

        UsageException(String message) {
            super(message);
        }
    }

    public static void main(String[] arguments) {
        System.exit(new Main().run(arguments));
    }

    private int run(String[] arguments) {
        int result = REFUSED;
        try {
            result = command(arguments) ? GOOD : REFUSED;
        } catch (UsageException error) {
            errors.println(Names.printable(error.getMessage()));
            errors.println(USAGE);
            return WRONG_USAGE;
        } catch (IOException error) {
            output.flush();
            report(error);
        } catch (OutOfMemoryError | StackOverflowError error) {
            errors.println("refused: io: not enough memory; java -Xmx and -Xss give more");
        }
        // Where whoever reads the output has gone away, there is nobody to be told.
        return output.checkError() ? REFUSED : result;
    }

    /** Carries out a command, and tells whether all was good. */
    private boolean command(String[] arguments) throws IOException, UsageException {
        requireUtf8(arguments);
        boolean withKey = arguments.length > 2 && arguments[1].equals("--key-file");
        int commandIndex = withKey ? 3 : 1;
        if (arguments.length <= commandIndex || arguments[0].isEmpty()) {
            throw new UsageException("no snapshot, or no command");
        }
        Path root = Path.of(arguments[0]);
        byte[] key = withKey ? readKey(arguments[2]) : null;
        String command = arguments[commandIndex];
        List<String> operands = List.of(arguments).subList(commandIndex + 1, arguments.length);
        return switch (command + ' ' + operands.size()) {
            case "list 0" -> list(new Snapshot(root, key));
            case "check 0" -> check(new Snapshot(root, key));
            case "cat 1" -> cat(new Snapshot(root, key), operands.get(0));
            case "restore 1" -> restore(new Snapshot(root, key), operands.get(0), null);
            case "restore 2" -> restore(new Snapshot(root, key), operands.get(0), operands.get(1));
            default -> throw new UsageException("no such command, or other operands than it has");
        };
    }

    private boolean list(Snapshot snapshot) throws IOException {
        boolean good = true;
        for (String path : snapshot.fragments()) {
            try (PieceStream fragment = snapshot.open(path)) {
                output.print(String.format("%16d  %s\n", fragment.size(), Names.printable(path)));
            } catch (IOException error) {
                report(error);
                good = false;
            }
        }
        return good;
    }

    private boolean check(Snapshot snapshot) throws IOException {
        int good = 0;
        long goodBytes = 0;
        List<String> paths = snapshot.fragments();
        for (String path : paths) {
            String printablePath = Names.printable(path);
            try (PieceStream fragment = snapshot.open(path)) {
                String size = Long.toString(fragment.size());
                output.print(String.join("\t", "ok", size, sha256(fragment), printablePath) + '\n');
                good++;
                goodBytes += fragment.size();
            } catch (IOException error) {
                Refused refusal = asRefused(error);
                String why = Names.printable(refusal.getMessage());
                output.print(String.join("\t", "refused", refusal.kind.label(), printablePath, why) + '\n');
            }
            if (output.checkError()) {
                return false;
            }
        }
        errors.println(good + " of " + paths.size() + " fragments are good, with " + goodBytes + " bytes");
        return good == paths.size();
    }

    private boolean cat(Snapshot snapshot, String path) throws IOException {
        byte[] buffer = new byte[COPY_BYTES];
        try (PieceStream fragment = snapshot.open(path)) {
            int count;
            while ((count = fragment.read(buffer)) >= 0 && !output.checkError()) {
                output.write(buffer, 0, count);
            }
        }
        return true;
    }

    private static boolean restore(Snapshot snapshot, String folder, String namespace) throws IOException {
        GuestMemory.restore(snapshot, namespace, Path.of(folder));
        return true;
    }

    private static String sha256(InputStream stream) throws IOException {
        MessageDigest digest;
        try {
            digest = MessageDigest.getInstance("SHA-256");
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException(error); // every Java platform has it
        }
        byte[] buffer = new byte[COPY_BYTES];
        int count;
        while ((count = stream.read(buffer)) >= 0) {
            digest.update(buffer, 0, count);
        }
        return HexFormat.of().formatHex(digest.digest());
    }

    private void report(IOException error) {
        Refused refusal = asRefused(error);
        errors.println("refused: " + refusal.kind.label() + ": " + Names.printable(refusal.getMessage()));
    }

    /** What this reader does not refuse, the operating system does. */
    private static Refused asRefused(IOException error) {
        return error instanceof Refused refusal ? refusal : Refused.io("", error);
    }

    /** Java decodes arguments by the locale; where that is not UTF-8, they are no longer what was given. */
    private static void requireUtf8(String[] arguments) throws UsageException {
        String encoding = System.getProperty("sun.jnu.encoding");
        if (!"UTF-8".equals(encoding) && !US_ASCII.newEncoder().canEncode(String.join("", arguments))) {
            throw new UsageException("an argument is not ASCII, and the locale has " + encoding
                    + " instead of UTF-8: set LC_ALL=C.UTF-8 or the like");
        }
    }

    private static byte[] readKey(String file) throws UsageException {
        byte[] data;
        try (InputStream stream = Files.newInputStream(Path.of(file))) {
            data = stream.readNBytes(MAX_KEY_FILE_BYTES + 1);
        } catch (IOException error) {
            throw new UsageException("the key file cannot be read: " + error);
        }
        if (data.length == KeyPayload.KEY_BYTES) {
            return data;
        }
        Matcher hex = KEY_IN_HEX.matcher(new String(data, US_ASCII));
        if (!hex.matches()) {
            throw new UsageException("the key file holds neither 32 bytes nor 64 hexadecimal digits: " + file);
        }
        return HexFormat.of().parseHex(hex.group(1));
    }
}
