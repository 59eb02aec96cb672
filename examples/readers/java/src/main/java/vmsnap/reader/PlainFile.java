package vmsnap.reader;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.SeekableByteChannel;

/** A fragment of a plain snapshot: the bytes of the file. */
final class PlainFile extends PieceStream {
    private static final int PIECE_BYTES = 1 << 20;

    private final SeekableByteChannel file;
    private final String what;
    private final long size;
    private long position;

    PlainFile(SeekableByteChannel file, String what) throws IOException {
        this.file = file;
        this.what = what;
        this.size = file.size();
    }

    @Override
    long size() {
        return size;
    }

    @Override
    ByteBuffer nextPiece() throws IOException {
        if (position == size) {
            return null;
        }
        ByteBuffer piece = readAt(file, position, (int) Math.min(PIECE_BYTES, size - position));
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
