package vmsnap.reader;

import java.io.IOException;
import java.util.Locale;

/** An error in a snapshot or fragment. The README of all readers explains the kinds. */
final class Refused extends IOException {
    private static final long serialVersionUID = 1;

    enum Kind {
        AUTHENTICATION, CORRUPT, UNSUPPORTED, KEY, NOT_ENCRYPTED, MISSING, IO;

        String label() {
            return name().toLowerCase(Locale.ROOT).replace('_', '-');
        }
    }

    final Kind kind;

    Refused(Kind kind, String message) {
        super(message);
        this.kind = kind;
    }

    static Refused authentication(String message) {
        return new Refused(Kind.AUTHENTICATION, message);
    }

    static Refused corrupt(String message) {
        return new Refused(Kind.CORRUPT, message);
    }

    /** What the operating system refuses. Often the exception's name says why, and its message is only a path. */
    static Refused io(String where, IOException error) {
        return new Refused(Kind.IO, where + error.getClass().getSimpleName() + ": " + error.getMessage());
    }
}
