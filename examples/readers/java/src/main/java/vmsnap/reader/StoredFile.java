package vmsnap.reader;

import java.io.Closeable;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.SeekableByteChannel;

/** The bytes of one file of a snapshot: a whole file, or its part of an archive, which stays open. */
record StoredFile(SeekableByteChannel channel, long start, long size, boolean isWhole) implements Closeable {
    static StoredFile whole(SeekableByteChannel channel) throws IOException {
        return new StoredFile(channel, 0, channel.size(), true);
    }

    static StoredFile part(SeekableByteChannel archive, long start, long size) {
        return new StoredFile(archive, start, size, false);
    }

    /** The bytes from an offset on: fewer than asked for only where the file ends. */
    ByteBuffer readAt(long offset, int length) throws IOException {
        ByteBuffer bytes = ByteBuffer.allocate((int) Math.min(length, Math.max(0, size - offset)));
        channel.position(start + offset);
        while (bytes.hasRemaining() && channel.read(bytes) >= 0) {
            // read again: a file may give less than is asked for
        }
        return bytes.flip();
    }

    @Override
    public void close() throws IOException {
        if (isWhole) {
            channel.close();
        }
    }
}
