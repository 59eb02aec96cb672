package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/fxamacker/cbor/v2"
)

// The key payload (section 4) ------------------------------------------------------------------------------------------

const (
	keyMetadataName     = "enc_metadata"
	maxKeyMetadataBytes = 1 << 20
	payloadFormat       = "vmsnap-key"
	snapshotIDBytes     = 16

	keyAAD           = "vmsnap/1/key"
	keyChunkBytes    = 1024
	keySegmentLength = keyChunkBytes + segmentOverhead
	agePrefix        = "age-encryption.org/"
	ageVersion       = "v1"
	scryptStanza     = "scrypt" // the header of an age file with a passphrase has one of these, and nothing else
	maxWorkFactor    = 22       // scrypt's, its logarithm
	servicePrefix    = "\xd9\xd9\xf7"
)

var keyUse = floeUse{keySegmentLength, keySegmentLength, authentication}

type payload struct {
	Format     *string          `cbor:"format"`
	Version    *uint64          `cbor:"version"`
	SnapshotID *cbor.ByteString `cbor:"snapshot_id"` // []byte would take an array of numbers as well
	DataKey    *cbor.ByteString `cbor:"data_key"`
	Sealed     *bool            `cbor:"sealed"`
	Requires   []*string        `cbor:"requires"`
}

func isBytes(value *cbor.ByteString, length int) bool {
	return value != nil && len(*value) == length
}

// credential is what a snapshot is opened with; the zero value is none.
type credential struct {
	key []byte       // of --key-file
	age age.Identity // of --identity or --passphrase-file
}

func (c credential) given() bool { return c.key != nil || c.age != nil }

func readPayload(from store, with credential) (*payload, error) {
	file, err := openListed(from, keyMetadataName, keyMetadataName)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if file.Size() > maxKeyMetadataBytes {
		return nil, refuse(corrupt, "%s: longer than %d bytes", keyMetadataName, maxKeyMetadataBytes)
	}
	data, err := io.ReadAll(newPlainReader(file, keyMetadataName))
	if err != nil {
		return nil, err
	}
	plaintext, err := unwrap(data, with)
	if err != nil {
		return nil, err
	}
	p := &payload{}
	if err := decodeMetadata(plaintext, payloadFormat, keyMetadataName, p); err != nil {
		return nil, err
	}
	if !isBytes(p.SnapshotID, snapshotIDBytes) || !isBytes(p.DataKey, keyBytes) || p.Sealed == nil {
		return nil, refuse(corrupt, "%s: 'snapshot_id', 'data_key' or 'sealed' is missing or malformed", keyMetadataName)
	}
	return p, nil
}

// unwrap opens the contents of enc_metadata. How they are wrapped is told by the first bytes.
func unwrap(data []byte, with credential) ([]byte, error) {
	switch {
	case bytes.HasPrefix(data, parameters(keySegmentLength)):
		if with.key == nil {
			return nil, refuse(noKey, "%s: encrypted with a 32-byte key, which --key-file gives", keyMetadataName)
		}
		f, err := openFloe(bytes.NewReader(data), uint64(len(data)), with.key, keyAAD, keyMetadataName, keyUse)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(f)
	case bytes.HasPrefix(data, []byte(agePrefix)):
		return unwrapByAge(data, with)
	case bytes.HasPrefix(data, []byte(servicePrefix)):
		return nil, refuse(unsupported, "%s: the key is wrapped by a key service", keyMetadataName)
	}
	return nil, refuse(corrupt, "%s: no wrapped key of vmsnap's: damaged, or foreign", keyMetadataName)
}

func unwrapByAge(data []byte, with credential) ([]byte, error) {
	version, _, whole := bytes.Cut(data[len(agePrefix):], []byte("\n"))
	if whole && string(version) != ageVersion {
		return nil, refuse(unsupported, "%s: version '%.255s' of age", keyMetadataName, version)
	}
	if with.age == nil {
		return nil, refuse(noKey, "%s: encrypted by age, which --identity or --passphrase-file opens", keyMetadataName)
	}
	var plaintext []byte
	reader, err := age.Decrypt(bytes.NewReader(data), with.age)
	if err == nil {
		plaintext, err = io.ReadAll(reader)
	}
	var refused *refusal // by ageIdentity
	switch {
	case err == nil || errors.As(err, &refused):
	case strings.HasPrefix(err.Error(), "failed to read header"): // age has no error of its own for this
		err = refuse(corrupt, "%s: its age header is damaged, or cut off", keyMetadataName)
	default:
		err = refuse(authentication, "%s: the identity or passphrase is wrong, or the file damaged", keyMetadataName)
	}
	return plaintext, err
}

// ageIdentity looks at what the header of an age file says before it tries to open it.
type ageIdentity struct {
	passphrase bool
	identities []age.Identity
}

func (i ageIdentity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	for _, stanza := range stanzas {
		isPassphrase := stanza.Type == scryptStanza
		if isPassphrase && !i.passphrase {
			return nil, refuse(noKey, "%s: encrypted with a passphrase, which --passphrase-file gives", keyMetadataName)
		}
		if !isPassphrase && i.passphrase {
			return nil, refuse(noKey, "%s: encrypted for age recipients, which --identity opens", keyMetadataName)
		}
		if isPassphrase && len(stanza.Args) == 2 {
			if factor, err := strconv.Atoi(stanza.Args[1]); err == nil && factor > maxWorkFactor {
				return nil, refuse(unsupported, "%s: a work factor of 2^%d, above 2^%d", keyMetadataName, factor, maxWorkFactor)
			}
		}
	}
	for _, identity := range i.identities {
		if fileKey, err := identity.Unwrap(stanzas); !errors.Is(err, age.ErrIncorrectIdentity) {
			return fileKey, err
		}
	}
	return nil, age.ErrIncorrectIdentity
}

// The manifest (section 5) ---------------------------------------------------------------------------------------------

const (
	manifestName          = "vmsnap_manifest"
	maxManifestBytes      = 1 << 28
	manifestFormat        = "vmsnap-manifest"
	manifestAAD           = "vmsnap/1/manifest"
	manifestChunkBytes    = 65536
	manifestSegmentLength = manifestChunkBytes + segmentOverhead
	blake3Bytes           = 32
	dayLayout             = "2006-01-02"
)

var (
	manifestUse = floeUse{manifestSegmentLength, manifestSegmentLength, authentication}
	timeOfDay   = regexp.MustCompile(`^T([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?Z$`) // RFC 3339 has leap seconds
)

type manifest struct {
	Format     *string          `cbor:"format"`
	Version    *uint64          `cbor:"version"`
	SnapshotID *cbor.ByteString `cbor:"snapshot_id"`
	Created    *string          `cbor:"created"`
	Generator  *string          `cbor:"generator"`
	Encrypted  *bool            `cbor:"encrypted"`
	Requires   []*string        `cbor:"requires"`
	Namespaces []string         `cbor:"namespaces"`
	Fragments  listedFragments  `cbor:"fragments"`
}

type listedFragments map[string]*listedFragment

type listedFragment struct {
	Size       *uint64          `cbor:"size"`
	StoredSize *uint64          `cbor:"stored_size"`
	ChunkSize  *uint64          `cbor:"chunk_size,omitempty"`
	BLAKE3     *cbor.ByteString `cbor:"blake3,omitempty"`
	HeaderTag  *cbor.ByteString `cbor:"floe_header_tag,omitempty"`

	keys map[string]cbor.RawMessage // all that are there: a nil above may also be a null, which is not allowed
}

// UnmarshalCBOR decodes an entry of the manifest.
func (l *listedFragment) UnmarshalCBOR(data []byte) error {
	type values listedFragment // without this method
	if err := decoder.Unmarshal(data, (*values)(l)); err != nil {
		return err
	}
	return decoder.Unmarshal(data, &l.keys)
}

func (l *listedFragment) has(key string) bool {
	_, found := l.keys[key]
	return found
}

// readManifest returns what the manifest says, checked. `p` is the payload of an encrypted snapshot, nil for a plain one.
func readManifest(from store, p *payload) (*manifest, error) {
	file, err := openListed(from, manifestName, manifestName)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if file.Size() > maxManifestBytes {
		return nil, refuse(corrupt, "%s: longer than %d bytes", manifestName, maxManifestBytes)
	}
	var contents io.Reader = newPlainReader(file, manifestName)
	if p != nil {
		size := uint64(file.Size())
		if contents, err = openFloe(file, size, []byte(*p.DataKey), manifestAAD, manifestName, manifestUse); err != nil {
			return nil, err
		}
	}
	data, err := io.ReadAll(contents)
	if err != nil {
		return nil, err
	}
	m := &manifest{}
	if err := decodeMetadata(data, manifestFormat, manifestName, m); err != nil {
		return nil, err
	}
	if err := m.check(p); err != nil {
		return nil, refuse(corrupt, "%s: %v", manifestName, err)
	}
	return m, nil
}

func (m *manifest) check(p *payload) error {
	if !isBytes(m.SnapshotID, snapshotIDBytes) || m.Created == nil || m.Generator == nil || m.Encrypted == nil ||
		m.Namespaces == nil || m.Fragments == nil {
		return errors.New("a key is missing or malformed")
	}
	encrypted := p != nil
	if *m.Encrypted != encrypted {
		return errors.New("'encrypted' is not what the snapshot is")
	}
	if encrypted && *m.SnapshotID != *p.SnapshotID {
		return errors.New("it is another snapshot's")
	}
	if !isTime(*m.Created) {
		return errors.New("'created' is no time of RFC 3339 in UTC, with Z")
	}
	namespaces := map[string]bool{}
	for _, path := range m.Namespaces {
		if namespaces[path] {
			return fmt.Errorf("the namespace '%.255s' is listed twice", path)
		}
		namespaces[path] = true
	}
	for _, path := range m.Namespaces {
		if err := checkPlace(path, namespaces); err != nil {
			return err
		}
	}
	for path, listed := range m.Fragments {
		if err := checkPlace(path, namespaces); err != nil {
			return err
		}
		if namespaces[path] {
			return fmt.Errorf("'%.255s' is both a namespace and a fragment", path)
		}
		if listed == nil || !listed.isComplete(encrypted) || encrypted && !listed.sizesFit() {
			return fmt.Errorf("of '%.255s', a key is missing, malformed or of the other kind, or the sizes do not fit", path)
		}
	}
	return nil
}

func isTime(text string) bool {
	if len(text) < len(dayLayout) || !timeOfDay.MatchString(text[len(dayLayout):]) {
		return false
	}
	_, err := time.Parse(dayLayout, text[:len(dayLayout)])
	return err == nil
}

// unixTime is when the manifest was created, as the headers of an archive have it.
func (m *manifest) unixTime() uint64 {
	created := *m.Created
	day, _ := time.Parse(dayLayout, created[:len(dayLayout)]) // which check did before
	var hour, minute, second int64
	fmt.Sscanf(created[len(dayLayout):], "T%02d:%02d:%02d", &hour, &minute, &second)
	seconds := day.Unix() + hour*3600 + minute*60 + second
	switch {
	case seconds < 0:
		return 0
	case seconds > maxOctal:
		return maxOctal
	}
	return uint64(seconds)
}

// checkPlace checks the names of a path, and that the namespace it is in is listed.
func checkPlace(path string, namespaces map[string]bool) error {
	if err := checkPath(path); err != nil {
		return err
	}
	if end := strings.LastIndexByte(path, '/'); end >= 0 && !namespaces[path[:end]] {
		return fmt.Errorf("the namespace of '%.255s' is not listed", path)
	}
	return nil
}

// isComplete tells whether all keys are there, and none of the other kind of fragment.
func (l *listedFragment) isComplete(encrypted bool) bool {
	if l.Size == nil || l.StoredSize == nil {
		return false
	}
	if encrypted {
		return l.ChunkSize != nil && isBytes(l.HeaderTag, headerTagBytes) && !l.has("blake3")
	}
	return !l.has("chunk_size") && !l.has("floe_header_tag") && isBytes(l.BLAKE3, blake3Bytes) && *l.Size == *l.StoredSize
}

// sizesFit tells whether an encrypted fragment can have these sizes: "How many segments" in section 2.
func (l *listedFragment) sizesFit() bool {
	size, stored, chunk := *l.Size, *l.StoredSize, *l.ChunkSize
	if chunk < minChunkBytes || chunk > maxChunkBytes || stored < size {
		return false
	}
	segments := size / chunk
	if size%chunk != 0 || size == 0 {
		segments++
	}
	if segments > maxSegments { // above which what follows could overflow
		return false
	}
	overhead := stored - size
	withEmptyLast := size != 0 && size%chunk == 0 && overhead == headerBytes+(segments+1)*segmentOverhead
	return withEmptyLast || overhead == headerBytes+segments*segmentOverhead
}

// Fragments and the snapshot (sections 1, 3 and 5) ---------------------------------------------------------------------

const (
	fragmentAAD   = "vmsnap/1/fragment\x00"
	minChunkBytes = 32
	maxChunkBytes = 64 << 20
)

var fragmentUse = floeUse{minChunkBytes + segmentOverhead, maxChunkBytes + segmentOverhead, corrupt}

// plainReader gives as many bytes as a file had when it was opened.
type plainReader struct {
	file io.Reader
	what string
	left uint64
}

func newPlainReader(file *storedFile, what string) *plainReader {
	return &plainReader{file, what, uint64(file.Size())}
}

func (p *plainReader) Read(into []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	if uint64(len(into)) > p.left {
		into = into[:p.left]
	}
	n, err := p.file.Read(into)
	p.left -= uint64(n)
	if err == io.EOF {
		err = refuse(corrupt, "%s: became shorter while it was read", p.what)
	}
	return n, err
}

// fragment is the plaintext of an open fragment, as a stream.
type fragment struct {
	io.Reader
	io.Closer
	size uint64
}

type snapshot struct {
	files    store
	dataKey  []byte    // nil if it is plain
	manifest *manifest // nil if it is not sealed
}

func openSnapshot(path string, with credential) (*snapshot, error) {
	from, err := openStore(path)
	if err != nil {
		return nil, err
	}
	s := &snapshot{files: from}
	if err := s.readMetadata(path, with); err != nil {
		from.Close()
		return nil, err
	}
	return s, nil
}

func (s *snapshot) readMetadata(path string, with credential) error {
	encrypted, err := s.files.has(keyMetadataName)
	if err != nil {
		return err
	}
	sealed, err := s.files.has(manifestName)
	if err != nil {
		return err
	}
	if !encrypted && with.given() {
		// Whoever can write there could have removed it, and put plain files in the place of encrypted ones.
		return refuse(notEncrypted, "%s: a key was given, and there is no %s", path, keyMetadataName)
	}
	var p *payload
	if encrypted {
		if p, err = readPayload(s.files, with); err != nil {
			return err
		}
		s.dataKey = []byte(*p.DataKey)
	}
	if sealed {
		if s.manifest, err = readManifest(s.files, p); err != nil {
			return err
		}
		return s.files.locate(s.manifest)
	}
	if encrypted && *p.Sealed {
		return refuse(corrupt, "%s: not complete, there is no %s", path, manifestName)
	}
	return nil
}

// paths lists the fragments: what the manifest has, else what is on the disk.
func (s *snapshot) paths() ([]string, error) {
	if s.manifest == nil {
		return s.files.fragments()
	}
	return s.manifest.Fragments.paths(), nil
}

// paths returns them ascending by their bytes.
func (l listedFragments) paths() []string {
	paths := make([]string, 0, len(l))
	for path := range l {
		paths = append(paths, path)
	}
	sort.Strings(paths)
	return paths
}

// openFragment opens a fragment. Of an encrypted one, header and last segment are authentic then.
func (s *snapshot) openFragment(path string) (*fragment, error) {
	what := "fragment " + path
	if err := checkPath(path); err != nil {
		return nil, refuse(missing, "%s: %v", what, err)
	}
	file, err := s.openFile(path, what)
	if err != nil {
		return nil, err
	}
	size := uint64(file.Size())
	if s.dataKey == nil {
		return &fragment{newPlainReader(file, what), file, size}, nil
	}
	f, err := openFloe(file, size, s.dataKey, fragmentAAD+path, what, fragmentUse)
	if err != nil {
		file.Close()
		return nil, err
	}
	return &fragment{f, file, f.size}, nil
}

// openFile opens the file of a fragment. If the snapshot is sealed, the file is held against what the manifest says of
// it, except for the BLAKE3 of a plain one, which b3sum checks.
func (s *snapshot) openFile(path, what string) (*storedFile, error) {
	if s.manifest == nil {
		return s.files.open(path, what)
	}
	listed := s.manifest.Fragments[path]
	if listed == nil {
		return nil, refuse(missing, "%s: not in the manifest", what)
	}
	file, err := openListed(s.files, path, what)
	if err != nil {
		return nil, err
	}
	same := uint64(file.Size()) == *listed.StoredSize
	if same && s.dataKey != nil {
		tag := make([]byte, headerTagBytes)
		_, err := file.ReadAt(tag, headerTagOffset)
		same = err == nil && string(tag) == string(*listed.HeaderTag)
	}
	if !same {
		file.Close()
		return nil, refuse(corrupt, "%s: its stored size or header tag is not the one in the manifest", what)
	}
	return file, nil
}
