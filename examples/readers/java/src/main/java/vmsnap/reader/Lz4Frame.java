package vmsnap.reader;

import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.Map;

/**
 * The LZ4 frame of compressed guest memory (section 6), as a stream of its decompressed bytes. The stream ends only
 * after the end mark was found at its place, with nothing behind it.
 */
final class Lz4Frame extends PieceStream {
    /** vmsnap's index of the blocks: the stored length of each, without its size word. */
    record Index(int blockSize, int[] storedLengths) {}

    /** The four headers there are, and the block size that each declares. */
    private static final Map<String, Integer> BLOCK_SIZES = Map.of(
            "04224d18604082", 64 << 10,
            "04224d186050fb", 256 << 10,
            "04224d18606051", 1 << 20,
            "04224d18607073", 4 << 20);

    private static final int HEADER_BYTES = 7;
    private static final int SIZE_WORD_BYTES = 4;
    private static final int END_MARK = 0;
    private static final int STORED_AS_IT_IS = 1 << 31;
    private static final int LONG_LENGTH = 15;
    private static final int MIN_MATCH_LENGTH = 4;

    private final InputStream frame;
    private final long size;
    private final Index index;
    private final String what;
    private final int blockSize;
    private long remaining;
    private int blockNumber;

    /** `size` is what the frame has to hold in all; `index` is null where there is none, as in crosvm's own. */
    Lz4Frame(InputStream frame, long size, Index index, String what) throws IOException {
        this.frame = frame;
        this.size = size;
        this.remaining = size;
        this.index = index;
        this.what = what;
        Integer declared = BLOCK_SIZES.get(HexFormat.of().formatHex(take(HEADER_BYTES)));
        if (declared == null || index != null && declared != index.blockSize) {
            throw refused("no LZ4 frame as guest memory has it, or of other blocks than its index says");
        }
        blockSize = declared;
    }

    static boolean isBlockSize(long size) {
        return BLOCK_SIZES.values().stream().anyMatch(possible -> possible == size);
    }

    @Override
    long size() {
        return size;
    }

    @Override
    ByteBuffer nextPiece() throws IOException {
        int sizeWord = ByteBuffer.wrap(take(SIZE_WORD_BYTES)).order(ByteOrder.LITTLE_ENDIAN).getInt();
        if (remaining == 0) {
            if (sizeWord != END_MARK || frame.read() >= 0) {
                throw refused("more than the data ranges");
            }
            return null;
        }
        // Every block but the last holds exactly the block size.
        int length = (int) Math.min(blockSize, remaining);
        int storedLength = sizeWord & ~STORED_AS_IT_IS;
        if (storedLength == 0 || storedLength > blockSize) {
            throw refused("block " + blockNumber + ": no block has this length");
        }
        if (index != null && storedLength != index.storedLengths[blockNumber]) {
            throw refused("block " + blockNumber + ": of another length than the index says");
        }
        byte[] stored = take(storedLength);
        byte[] block = (sizeWord & STORED_AS_IT_IS) != 0 ? stored : decoded(ByteBuffer.wrap(stored), length);
        if (block.length != length) {
            throw refused("block " + blockNumber + ": does not hold what it has to");
        }
        remaining -= length;
        blockNumber++;
        return ByteBuffer.wrap(block);
    }

    @Override
    public void close() throws IOException {
        frame.close();
    }

    /** Decodes a block by lz4_Block_format.md: sequences of literals and a match, the last of literals only. */
    private byte[] decoded(ByteBuffer stored, int length) throws Refused {
        ByteBuffer block = ByteBuffer.allocate(length);
        while (true) {
            int token = nextByte(stored);
            int literalLength = sequenceLength(token >> 4, stored);
            if (literalLength > stored.remaining() || literalLength > block.remaining()) {
                throw malformedBlock();
            }
            block.put(stored.slice(stored.position(), literalLength));
            stored.position(stored.position() + literalLength);
            if (!stored.hasRemaining()) {
                return Arrays.copyOf(block.array(), block.position());
            }

            int offset = nextByte(stored) | nextByte(stored) << 8;
            int matchLength = sequenceLength(token & 0xf, stored) + MIN_MATCH_LENGTH;
            if (offset == 0 || offset > block.position() || matchLength > block.remaining()) {
                throw malformedBlock();
            }
            // Byte by byte, because a match can reach into what it makes.
            for (int i = 0; i < matchLength; i++) {
                block.put(block.get(block.position() - offset));
            }
        }
    }

    /** To a length of 15 the next bytes are added, up to the first below 255. A block is too short to overflow it. */
    private int sequenceLength(int nibble, ByteBuffer stored) throws Refused {
        int length = nibble;
        if (nibble == LONG_LENGTH) {
            int more;
            do {
                more = nextByte(stored);
                length += more;
            } while (more == 0xff);
        }
        return length;
    }

    private int nextByte(ByteBuffer stored) throws Refused {
        if (!stored.hasRemaining()) {
            throw malformedBlock();
        }
        return stored.get() & 0xff;
    }

    private byte[] take(int length) throws IOException {
        byte[] bytes = frame.readNBytes(length);
        if (bytes.length < length) {
            throw refused("cut off");
        }
        return bytes;
    }

    private Refused malformedBlock() {
        return refused("block " + blockNumber + ": malformed");
    }

    private Refused refused(String why) {
        return Refused.corrupt(what + ": LZ4: " + why);
    }
}
