package vmsnap.reader;

import java.io.IOException;
import java.nio.ByteBuffer;

/** A fragment of a plain snapshot: the bytes of the file. */
final class PlainFile extends PieceStream {
    private static final int PIECE_BYTES = 1 << 20;

    private final StoredFile file;
    private final String what;
    private long position;

    PlainFile(StoredFile file, String what) {
        this.file = file;
        this.what = what;
    }

    @Override
    long size() {
        return file.size();
    }

    @Override
    ByteBuffer nextPiece() throws IOException {
        if (position == file.size()) {
            return null;
        }
        ByteBuffer piece = file.readAt(position, PIECE_BYTES);
        if (!piece.hasRemaining()) {
            throw Refused.corrupt(what + ": became shorter while it was read");
        }
        position += piece.remaining();
        return piece;
    }

    @Override
    public void close() throws IOException {
        file.close();
    }
}
