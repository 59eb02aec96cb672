package main

// Guest memory: section 6.

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sort"
	"unicode/utf8"
)

// The metadata ---------------------------------------------------------------------------------------------------------

const (
	memoryName             = "mem"
	memoryMetadataName     = "mem_metadata"
	maxMemoryMetadataBytes = 1 << 28 // enough for the index of 4 TiB of data in blocks of 64 KiB
)

type memoryMetadata struct {
	Regions    []guestRegion `cbor:"regions"`
	Compressed *bool         `cbor:"compressed"`
	LZ4        *blockIndex   `cbor:"lz4"` // nil where crosvm wrote it
}

type guestRegion struct {
	GuestBase  *uint64     `cbor:"guest_base"`
	Size       *uint64     `cbor:"size"`
	DataRanges []dataRange `cbor:"data_ranges"`
}

type dataRange struct {
	Start *uint64 `cbor:"start"`
	End   *uint64 `cbor:"end"`
}

type blockIndex struct {
	BlockSize    *uint64 `cbor:"block_size"`
	BlockLengths []byte  `cbor:"block_lengths"` // u32, little endian
}

// jsonMembers tells the members of an object. One that comes twice is refused: encoding/json would take the last.
func jsonMembers(data []byte) (map[string]json.RawMessage, error) {
	members := map[string]json.RawMessage{}
	d := json.NewDecoder(bytes.NewReader(data))
	if start, err := d.Token(); err != nil || start != json.Delim('{') {
		return nil, errors.New("an object is missing")
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		var member json.RawMessage
		if err := d.Decode(&member); err != nil {
			return nil, err
		}
		if _, there := members[name.(string)]; there {
			return nil, errors.New("a key comes twice")
		}
		members[name.(string)] = member
	}
	return members, nil
}

// unmarshalMembers decodes the members of a JSON object that have exactly these names; encoding/json by itself would take
// "START" for "start". One that is missing ends the decoding, before a long list of such objects takes much memory.
func unmarshalMembers(data []byte, optional string, targets map[string]any) error {
	members, err := jsonMembers(data)
	if err != nil {
		return err
	}
	for name, target := range targets {
		member, there := members[name]
		if !there && name != optional {
			return fmt.Errorf("'%s' is missing", name)
		}
		if there {
			if err := json.Unmarshal(member, target); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *memoryMetadata) UnmarshalJSON(data []byte) error {
	return unmarshalMembers(data, "lz4", map[string]any{"regions": &m.Regions, "compressed": &m.Compressed, "lz4": &m.LZ4})
}

func (r *guestRegion) UnmarshalJSON(data []byte) error {
	targets := map[string]any{"guest_base": &r.GuestBase, "size": &r.Size, "data_ranges": &r.DataRanges}
	return unmarshalMembers(data, "", targets)
}

func (r *dataRange) UnmarshalJSON(data []byte) error {
	if err := unmarshalMembers(data, "", map[string]any{"start": &r.Start, "end": &r.End}); err != nil {
		return err
	}
	members, err := jsonMembers(data)
	if err == nil && len(members) > 2 {
		err = errors.New("a data range has another key than 'start' and 'end'")
	}
	return err
}

// UnmarshalCBOR decodes a data range, which has no other keys.
func (r *dataRange) UnmarshalCBOR(data []byte) error {
	type values dataRange // without this method
	return exactDecoder.Unmarshal(data, (*values)(r))
}

func (i *blockIndex) UnmarshalJSON(data []byte) error {
	return unmarshalMembers(data, "", map[string]any{"block_size": &i.BlockSize, "block_lengths": &i.BlockLengths})
}

func decodeMemoryMetadata(data []byte) (*memoryMetadata, error) {
	m := &memoryMetadata{}
	if len(data) > 0 && data[0]>>5 == majorMap { // which are bytes that JSON never begins with
		return m, decoder.Unmarshal(data, m)
	}
	if !utf8.Valid(data) {
		return nil, errors.New("neither a CBOR map nor JSON")
	}
	return m, json.Unmarshal(data, m)
}

// check makes all checks that need no data, and returns how much data there has to be.
func (m *memoryMetadata) check() (dataBytes uint64, err error) {
	if m.Regions == nil || m.Compressed == nil {
		return 0, errors.New("'regions' or 'compressed' is missing")
	}
	for _, region := range m.Regions {
		if region.GuestBase == nil || region.Size == nil || region.DataRanges == nil {
			return 0, errors.New("'guest_base', 'size' or 'data_ranges' of a region is missing")
		}
		previousEnd := uint64(0)
		for _, stored := range region.DataRanges {
			if stored.Start == nil || stored.End == nil {
				return 0, errors.New("'start' or 'end' of a data range is missing")
			}
			start, end := *stored.Start, *stored.End
			if start < previousEnd || end <= start || end > *region.Size {
				return 0, fmt.Errorf("data range %#x to %#x does not ascend within its region at %#x", start, end, *region.GuestBase)
			}
			if end-start > math.MaxInt64-dataBytes {
				return 0, errors.New("the data ranges are more than a file can hold")
			}
			dataBytes += end - start
			previousEnd = end
		}
	}
	if err := checkApart(m.Regions); err != nil {
		return 0, err
	}
	if m.LZ4 == nil {
		return dataBytes, nil
	}
	return dataBytes, m.LZ4.check(dataBytes)
}

// checkApart checks that the regions end within 64 bits, and do not overlap.
func checkApart(regions []guestRegion) error {
	sorted := append([]guestRegion{}, regions...)
	sort.Slice(sorted, func(i, j int) bool { return *sorted[i].GuestBase < *sorted[j].GuestBase })
	for i, region := range sorted {
		if *region.Size > math.MaxUint64-*region.GuestBase {
			return fmt.Errorf("the region at %#x goes beyond 64 bits", *region.GuestBase)
		}
		if i == 0 {
			continue
		}
		// Two at one address could not both be restored, even if they are empty.
		base, before := *region.GuestBase, sorted[i-1]
		if base == *before.GuestBase || base < *before.GuestBase+*before.Size {
			return fmt.Errorf("the regions at %#x and %#x overlap", *before.GuestBase, base)
		}
	}
	return nil
}

func (i *blockIndex) check(dataBytes uint64) error {
	if i.BlockSize == nil || i.BlockLengths == nil {
		return errors.New("'block_size' or 'block_lengths' is missing")
	}
	for _, known := range blockHeaders {
		if *i.BlockSize != known.blockSize {
			continue
		}
		blocks := dataBytes / known.blockSize
		if dataBytes%known.blockSize != 0 {
			blocks++
		}
		if uint64(len(i.BlockLengths)) == blocks*blockLengthBytes {
			return nil
		}
	}
	return fmt.Errorf("an index of %d bytes, for blocks of %d, does not fit %d bytes of data", len(i.BlockLengths), *i.BlockSize, dataBytes)
}

// LZ4 ------------------------------------------------------------------------------------------------------------------

const (
	frameMagic       = "\x04\x22\x4d\x18\x60"
	blockLengthBytes = 4
	storedRaw        = 1 << 31 // in a size word: the block is stored as it is
	minMatchBytes    = 4
)

// blockHeaders are what may follow the magic, and the size of the blocks that it tells.
var blockHeaders = []struct {
	bytes     string
	blockSize uint64
}{{"\x40\x82", 64 << 10}, {"\x50\xfb", 256 << 10}, {"\x60\x51", 1 << 20}, {"\x70\x73", 4 << 20}}

// lz4Reader gives the data of a frame, a block at a time.
type lz4Reader struct {
	frame     io.Reader
	what      string
	blockSize uint64
	indexed   bool
	index     []byte // lengths of the blocks to come
	left      uint64 // data in the blocks to come
	stored    []byte
	decoded   []byte
	rest      []byte // of the last block, not given out yet
}

func newLZ4Reader(frame io.Reader, what string, index *blockIndex, dataBytes uint64) (*lz4Reader, error) {
	r := &lz4Reader{frame: frame, what: what, left: dataBytes}
	header := make([]byte, len(frameMagic)+2)
	if err := r.readFull(header); err != nil {
		return nil, err
	}
	for _, known := range blockHeaders {
		if string(header) == frameMagic+known.bytes {
			r.blockSize = known.blockSize
		}
	}
	if r.blockSize == 0 {
		return nil, refuse(corrupt, "%s: no header of an LZ4 frame that may be here", what)
	}
	if index != nil {
		r.indexed, r.index = true, index.BlockLengths
		if *index.BlockSize != r.blockSize {
			return nil, refuse(corrupt, "%s: the frame has blocks of %d bytes, the index of %d", what, r.blockSize, *index.BlockSize)
		}
	}
	return r, nil
}

func (r *lz4Reader) readFull(into []byte) error {
	_, err := io.ReadFull(r.frame, into)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return refuse(corrupt, "%s: the LZ4 frame is cut off", r.what)
	}
	return err
}

func (r *lz4Reader) Read(into []byte) (int, error) {
	if len(r.rest) == 0 {
		if r.left == 0 {
			return 0, r.end()
		}
		if err := r.nextBlock(); err != nil {
			return 0, err
		}
	}
	n := copy(into, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *lz4Reader) nextBlock() error {
	var word [blockLengthBytes]byte
	if err := r.readFull(word[:]); err != nil {
		return err
	}
	size := binary.LittleEndian.Uint32(word[:])
	length := size &^ storedRaw
	if r.indexed {
		if length != binary.LittleEndian.Uint32(r.index) {
			return refuse(corrupt, "%s: a block has %d bytes, and not as many as in the index", r.what, length)
		}
		r.index = r.index[blockLengthBytes:]
	}
	if length == 0 || uint64(length) > r.blockSize {
		return refuse(corrupt, "%s: a block of %d bytes, or an end mark before the end of the data", r.what, length)
	}
	holds := r.blockSize
	if holds > r.left {
		holds = r.left
	}
	if r.stored == nil {
		r.stored, r.decoded = make([]byte, r.blockSize), make([]byte, r.blockSize)
	}
	stored, decoded := r.stored[:length], r.decoded[:holds]
	if err := r.readFull(stored); err != nil {
		return err
	}
	if size&storedRaw != 0 {
		if uint64(length) != holds {
			return refuse(corrupt, "%s: a block of %d bytes has to have %d", r.what, length, holds)
		}
		decoded = stored
	} else if !decodeBlock(stored, decoded) {
		return refuse(corrupt, "%s: a block does not decompress to %d bytes", r.what, holds)
	}
	r.rest = decoded
	r.left -= holds
	return nil
}

// end checks that the end mark is all that follows the last block, and returns io.EOF if so.
func (r *lz4Reader) end() error {
	var mark [blockLengthBytes]byte
	if err := r.readFull(mark[:]); err != nil {
		return err
	}
	if mark != [blockLengthBytes]byte{} {
		return refuse(corrupt, "%s: more blocks than the data ranges need", r.what)
	}
	_, err := io.ReadFull(r.frame, mark[:1])
	if err == nil {
		return refuse(corrupt, "%s: bytes follow the LZ4 frame", r.what)
	}
	return err
}

// decodeBlock decodes one block (lz4_Block_format.md in LZ4's repository), and tells whether it fills the target exactly.
func decodeBlock(source, target []byte) bool {
	in, out := 0, 0
	// lengthOf adds to 4 bits of a token the bytes that continue it: all up to the first that is not 255.
	lengthOf := func(nibble byte) (length int, whole bool) {
		length = int(nibble)
		for more := nibble == 15; more; in++ {
			if in == len(source) {
				return 0, false
			}
			length += int(source[in])
			more = source[in] == 255
		}
		return length, true
	}
	for in < len(source) {
		token := source[in]
		in++
		literals, whole := lengthOf(token >> 4)
		if !whole || literals > len(source)-in || literals > len(target)-out {
			return false
		}
		out += copy(target[out:], source[in:in+literals])
		in += literals
		if in == len(source) { // the last sequence has literals only
			return out == len(target)
		}
		if len(source)-in < 2 {
			return false
		}
		offset := int(binary.LittleEndian.Uint16(source[in:]))
		in += 2
		match, whole := lengthOf(token & 15)
		match += minMatchBytes
		if !whole || offset == 0 || offset > out || match > len(target)-out {
			return false
		}
		for ; match > 0; match-- { // byte by byte: a match may overlap what it makes
			target[out] = target[out-offset]
			out++
		}
	}
	return false
}

// Restoring ------------------------------------------------------------------------------------------------------------

// restore makes a folder with a sparse file for each region; after an error there is none.
func restore(s *snapshot, folder, namespace string) (err error) {
	metadata, dataBytes, err := readMemoryMetadata(s, joinPath(namespace, memoryMetadataName))
	if err != nil {
		return err
	}
	mem, err := s.openFragment(joinPath(namespace, memoryName))
	if err != nil {
		return err
	}
	defer mem.Close()
	what := "fragment " + joinPath(namespace, memoryName)
	var data io.Reader = mem
	if *metadata.Compressed {
		if data, err = newLZ4Reader(mem, what, metadata.LZ4, dataBytes); err != nil {
			return err
		}
	} else if mem.size != dataBytes {
		return refuse(corrupt, "%s: has %d bytes, the data ranges %d", what, mem.size, dataBytes)
	}

	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(folder)
		}
	}()
	for _, region := range metadata.Regions {
		path := filepath.Join(folder, fmt.Sprintf("%016x", *region.GuestBase))
		if err := restoreRegion(path, region, data); err != nil {
			return err
		}
	}
	_, err = io.Copy(io.Discard, data) // nothing is left but the end of the frame, which is checked when it is read
	return err
}

func readMemoryMetadata(s *snapshot, path string) (*memoryMetadata, uint64, error) {
	what := "fragment " + path
	f, err := s.openFragment(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	if f.size > maxMemoryMetadataBytes {
		return nil, 0, refuse(corrupt, "%s: longer than %d bytes", what, maxMemoryMetadataBytes)
	}
	encoded, err := io.ReadAll(f)
	if err != nil {
		return nil, 0, err
	}
	metadata, err := decodeMemoryMetadata(encoded)
	if err != nil {
		return nil, 0, refuse(corrupt, "%s: %v", what, err)
	}
	dataBytes, err := metadata.check()
	if err != nil {
		return nil, 0, refuse(corrupt, "%s: %v", what, err)
	}
	return metadata, dataBytes, nil
}

func restoreRegion(path string, region guestRegion, data io.Reader) error {
	if *region.Size > math.MaxInt64 {
		return fmt.Errorf("%s: no file can have %d bytes", path, *region.Size)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(int64(*region.Size)); err != nil {
		return err
	}
	for _, stored := range region.DataRanges {
		if _, err := file.Seek(int64(*stored.Start), io.SeekStart); err != nil {
			return err
		}
		if _, err := io.CopyN(file, data, int64(*stored.End-*stored.Start)); err != nil {
			return err
		}
	}
	return file.Close()
}
