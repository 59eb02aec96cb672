package vmsnap.reader;

import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;

/** A stream that is read chunk by chunk. Each chunk is checked before any of it is returned; only one is in memory. */
abstract class PieceStream extends InputStream {
    private ByteBuffer piece = ByteBuffer.allocate(0);

    /** How many bytes there are in all. */
    abstract long size();

    /** The next piece, none of them empty; null after the last. */
    abstract ByteBuffer nextPiece() throws IOException;

    @Override
    public int read(byte[] bytes, int offset, int length) throws IOException {
        if (!piece.hasRemaining()) {
            ByteBuffer next = nextPiece();
            if (next == null) {
                return -1;
            }
            piece = next;
        }
        int count = Math.min(length, piece.remaining());
        piece.get(bytes, offset, count);
        return count;
    }

    @Override
    public int read() throws IOException {
        byte[] single = new byte[1];
        return read(single, 0, 1) < 0 ? -1 : single[0] & 0xff;
    }

    /** All bytes; for what is known to be small. */
    byte[] readWhole() throws IOException {
        byte[] whole = new byte[Math.toIntExact(size())];
        readNBytes(whole, 0, whole.length);
        return whole;
    }
}
