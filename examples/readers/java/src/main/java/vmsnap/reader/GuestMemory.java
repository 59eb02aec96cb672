package vmsnap.reader;

import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.FileAttribute;
import java.nio.file.attribute.PosixFilePermission;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Set;

/** Guest memory (section 6): what `mem_metadata` says of `mem`, and writing it into files. */
record GuestMemory(List<Region> regions, long dataSize, boolean compressed, Lz4Frame.Index index) {
    /** Addresses and sizes are unsigned. */
    record Region(long guestBase, long size, List<Range> dataRanges) {
        /** The file's name is the guest-physical address. */
        Path file(Path folder) {
            return folder.resolve(String.format("%016x", guestBase));
        }
    }

    /** What is stored, in bytes from the region's start. */
    record Range(long start, long end) {}

    /** This reader's own limit, since it holds the metadata in memory. */
    private static final int MAX_METADATA_BYTES = 1 << 28;

    private static final int COPY_BYTES = 1 << 16;

    /** Writes each region into a sparse file of a new folder, which is removed again after an error. */
    static void restore(Snapshot snapshot, String namespace, Path folder) throws IOException {
        String prefix = namespace == null ? "" : namespace + '/';
        GuestMemory memory;
        try (PieceStream metadata = snapshot.open(prefix + "mem_metadata")) {
            String what = "fragment \"" + prefix + "mem_metadata\"";
            if (metadata.size() > MAX_METADATA_BYTES) {
                throw Refused.corrupt(what + ": longer than " + MAX_METADATA_BYTES + " bytes");
            }
            memory = parse(Fields.ofCrosvm(metadata.readWhole(), what));
        }
        try (PieceStream mem = snapshot.open(prefix + "mem");
                PieceStream data = memory.data(mem, "fragment \"" + prefix + "mem\"")) {
            Files.createDirectory(folder, mode("rwx------"));
            boolean written = false;
            try {
                memory.write(data, folder);
                written = true;
            } finally {
                if (!written) {
                    memory.remove(folder);
                }
            }
        }
    }

    private static GuestMemory parse(Fields fields) throws Refused {
        List<Region> regions = new ArrayList<>();
        long dataSize = 0;
        for (Fields region : fields.list("regions", Fields.class)) {
            List<Range> ranges = new ArrayList<>();
            long size = region.unsigned("size");
            long previousEnd = 0;
            for (Fields range : region.list("data_ranges", Fields.class)) {
                long start = range.unsigned("start");
                long end = range.unsigned("end");
                if (range.size() != 2) {
                    throw Refused.corrupt(fields.what() + ": a data range has other fields than 'start' and 'end'");
                }
                if (isLess(start, previousEnd) || !isLess(start, end) || isLess(size, end)) {
                    throw Refused.corrupt(fields.what() + ": a data range is empty, out of order or out of its region");
                }
                if (end - start < 0 || end - start > Long.MAX_VALUE - dataSize) {
                    throw Refused.corrupt(fields.what() + ": more data than any file holds");
                }
                dataSize += end - start;
                previousEnd = end;
                ranges.add(new Range(start, end));
            }
            regions.add(new Region(region.unsigned("guest_base"), size, ranges));
        }
        requireApart(regions, fields.what());
        boolean indexed = fields.has("lz4") && !fields.isNull("lz4");
        Lz4Frame.Index index = indexed ? parseIndex(fields.nested("lz4"), dataSize) : null;
        return new GuestMemory(regions, dataSize, fields.bool("compressed"), index);
    }

    private static void requireApart(List<Region> regions, String what) throws Refused {
        List<Region> ascending = new ArrayList<>(regions);
        ascending.sort(Comparator.comparing(Region::guestBase, Long::compareUnsigned));
        Region previous = null;
        for (Region region : ascending) {
            long end = region.guestBase + region.size;
            if (isLess(end, region.guestBase)) {
                throw Refused.corrupt(what + ": a region ends after the last address");
            }
            // An empty region overlaps nothing, but two regions at one address would be one file.
            if (previous != null
                    && (region.guestBase == previous.guestBase
                            || isLess(region.guestBase, previous.guestBase + previous.size))) {
                throw Refused.corrupt(what + ": regions overlap");
            }
            previous = region;
        }
    }

    private static Lz4Frame.Index parseIndex(Fields fields, long dataSize) throws Refused {
        long blockSize = fields.unsigned("block_size");
        ByteBuffer lengths = ByteBuffer.wrap(fields.bytesOrNumbers("block_lengths")).order(ByteOrder.LITTLE_ENDIAN);
        if (!Lz4Frame.isBlockSize(blockSize)) {
            throw Refused.corrupt(fields.what() + ": no LZ4 frame has blocks of " + blockSize + " bytes");
        }
        long blockCount = dataSize / blockSize + (dataSize % blockSize == 0 ? 0 : 1);
        if (lengths.remaining() % Integer.BYTES != 0 || lengths.remaining() / Integer.BYTES != blockCount) {
            throw Refused.corrupt(fields.what() + ": the index of LZ4 blocks does not fit the data ranges");
        }
        int[] storedLengths = new int[(int) blockCount];
        lengths.asIntBuffer().get(storedLengths);
        return new Lz4Frame.Index((int) blockSize, storedLengths);
    }

    private PieceStream data(PieceStream mem, String what) throws IOException {
        if (compressed) {
            return new Lz4Frame(mem, dataSize, index, what);
        }
        if (mem.size() != dataSize) {
            throw Refused.corrupt(what + ": not as long as the data ranges");
        }
        return mem;
    }

    /** Writes the data, which was found to be as long as the ranges. */
    private void write(PieceStream data, Path folder) throws IOException {
        for (Region region : regions) {
            Path path = region.file(folder);
            if (region.size < 0) {
                throw new Refused(Refused.Kind.IO, path + ": larger than any file can be");
            }
            Files.createFile(path, mode("rw-------"));
            try (RandomAccessFile file = new RandomAccessFile(path.toFile(), "rw")) {
                file.setLength(region.size); // what is not written stays a hole
                for (Range range : region.dataRanges) {
                    file.seek(range.start);
                    copy(data, file, range.end - range.start);
                }
            }
        }
        data.read(); // nothing is left, but an LZ4 frame looks for its end mark
    }

    private static void copy(PieceStream data, RandomAccessFile file, long length) throws IOException {
        byte[] buffer = new byte[(int) Math.min(COPY_BYTES, length)];
        for (long left = length; left > 0; ) {
            int count = data.read(buffer, 0, (int) Math.min(buffer.length, left));
            file.write(buffer, 0, count);
            left -= count;
        }
    }

    private void remove(Path folder) throws IOException {
        for (Region region : regions) {
            Files.deleteIfExists(region.file(folder));
        }
        Files.delete(folder);
    }

    private static FileAttribute<Set<PosixFilePermission>> mode(String permissions) {
        return PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString(permissions));
    }

    private static boolean isLess(long left, long right) {
        return Long.compareUnsigned(left, right) < 0;
    }
}
