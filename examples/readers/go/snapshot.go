package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"filippo.io/age"
	"github.com/fxamacker/cbor/v2"
	"golang.org/x/sys/unix"
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

func readPayload(root *os.File, with credential) (*payload, error) {
	file, size, err := openListed(root, keyMetadataName, keyMetadataName)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if size > maxKeyMetadataBytes {
		return nil, refuse(corrupt, "%s: longer than %d bytes", keyMetadataName, maxKeyMetadataBytes)
	}
	data, err := io.ReadAll(&plainReader{file, keyMetadataName, size})
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
func readManifest(root *os.File, p *payload) (*manifest, error) {
	file, size, err := openListed(root, manifestName, manifestName)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if size > maxManifestBytes {
		return nil, refuse(corrupt, "%s: longer than %d bytes", manifestName, maxManifestBytes)
	}
	var contents io.Reader = &plainReader{file, manifestName, size}
	if p != nil {
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

// Names and files (section 1) ------------------------------------------------------------------------------------------

const (
	reservedPrefix = ".vmsnap"
	maxNameBytes   = 255
)

func isReserved(name string) bool {
	lower := strings.Map(func(r rune) rune { // no other letters than those of ASCII
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, name)
	return strings.HasPrefix(name, reservedPrefix) || lower == keyMetadataName || lower == manifestName
}

func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\\\x00") || len(name) > maxNameBytes ||
		!utf8.ValidString(name) || isReserved(name) {
		return fmt.Errorf("'%.255s' is not allowed as a name", name)
	}
	return nil
}

func checkPath(path string) error {
	for _, name := range strings.Split(path, "/") {
		if err := checkName(name); err != nil {
			return err
		}
	}
	return nil
}

func joinPath(namespace, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + "/" + name
}

// openFolder opens what the caller named, and so follows links.
func openFolder(path string) (*os.File, error) {
	folder, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, refuse(missing, "%s: no such folder", path)
	}
	return folder, err
}

// typeOf returns what an entry of a folder is: unix.S_IFREG, unix.S_IFDIR …
func typeOf(folder *os.File, name, what string) (uint32, error) {
	var status unix.Stat_t
	err := unix.Fstatat(int(folder.Fd()), name, &status, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
		return 0, refuse(missing, "%s: there is no '%s'", what, name)
	case err != nil:
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	return uint32(status.Mode) & unix.S_IFMT, nil
}

// openAt opens an entry of a folder without following it, if it is of the type that is wanted, and returns its size.
func openAt(folder *os.File, name string, wanted uint32, what string) (*os.File, uint64, error) {
	// Looked at before it is opened, because opening a device can do things; and after, because it may have changed.
	found, err := typeOf(folder, name, what)
	switch {
	case err != nil:
		return nil, 0, err
	case found == wanted:
	case found == unix.S_IFREG:
		return nil, 0, refuse(missing, "%s: '%s' is a file, not a folder", what, name)
	case found == unix.S_IFDIR:
		return nil, 0, refuse(missing, "%s: '%s' is a folder, not a file", what, name)
	default:
		return nil, 0, refuse(corrupt, "%s: '%s' is a link or special file", what, name)
	}
	flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	descriptor, err := unix.Openat(int(folder.Fd()), name, flags, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", what, err)
	}
	file := os.NewFile(uintptr(descriptor), name)
	var status unix.Stat_t
	if err := unix.Fstat(descriptor, &status); err != nil || uint32(status.Mode)&unix.S_IFMT != wanted {
		file.Close()
		return nil, 0, refuse(corrupt, "%s: '%s' was replaced while it was opened", what, name)
	}
	return file, uint64(status.Size), nil
}

// openBelow opens what lies at a path below the root, each component as openAt does.
func openBelow(root *os.File, path string, wanted uint32, what string) (file *os.File, size uint64, err error) {
	names := strings.Split(path, "/")
	file = root
	for i, name := range names {
		folder, kind := file, uint32(unix.S_IFDIR)
		if i == len(names)-1 {
			kind = wanted
		}
		file, size, err = openAt(folder, name, kind, what)
		if folder != root {
			folder.Close()
		}
		if err != nil {
			return nil, 0, err
		}
	}
	return file, size, nil
}

// openListed opens a file that has to be there, because a list says so.
func openListed(root *os.File, path, what string) (*os.File, uint64, error) {
	file, size, err := openBelow(root, path, unix.S_IFREG, what)
	if err != nil && kindOf(err) == missing {
		err = refuse(corrupt, "%s: is listed, and is no file", what)
	}
	return file, size, err
}

// namesIn returns the names of a folder's entries.
func namesIn(folder *os.File) ([]string, error) {
	again, _, err := openAt(folder, ".", unix.S_IFDIR, folder.Name()) // since reading moves the position of a descriptor
	if err != nil {
		return nil, err
	}
	defer again.Close()
	names, err := again.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", folder.Name(), err)
	}
	return names, nil
}

// walk returns the paths of all namespaces and fragments on the disk, ascending by their bytes. What has a reserved name
// is not part of a snapshot; where a snapshot is to be made of the folder, it is refused.
func walk(root *os.File, skipReserved bool) (namespaces, fragments []string, err error) {
	var visit func(folder *os.File, namespace string) error
	visit = func(folder *os.File, namespace string) error {
		names, err := namesIn(folder)
		if err != nil {
			return err
		}
		for _, name := range names {
			path := joinPath(namespace, name)
			if skipReserved && utf8.ValidString(name) && isReserved(name) {
				continue
			}
			if err := checkName(name); err != nil {
				return refuse(corrupt, "%s: %v", path, err)
			}
			found, err := typeOf(folder, name, path)
			switch {
			case err != nil:
				return err
			case found == unix.S_IFREG:
				fragments = append(fragments, path)
			case found == unix.S_IFDIR:
				namespaces = append(namespaces, path)
				inner, _, err := openAt(folder, name, unix.S_IFDIR, path)
				if err != nil {
					return err
				}
				err = visit(inner, path)
				inner.Close()
				if err != nil {
					return err
				}
			default:
				return refuse(corrupt, "%s: a link or special file", path)
			}
		}
		return nil
	}
	if err := visit(root, ""); err != nil {
		return nil, nil, err
	}
	sort.Strings(namespaces)
	sort.Strings(fragments)
	return namespaces, fragments, nil
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
	root     *os.File
	dataKey  []byte    // nil if it is plain
	manifest *manifest // nil if it is not sealed
}

func openSnapshot(path string, with credential) (*snapshot, error) {
	root, err := openFolder(path)
	if err != nil {
		return nil, err
	}
	s := &snapshot{root: root}
	if err := s.readMetadata(path, with); err != nil {
		root.Close()
		return nil, err
	}
	return s, nil
}

func (s *snapshot) readMetadata(path string, with credential) error {
	names, err := namesIn(s.root)
	if err != nil {
		return err
	}
	// Looked for among the names, because a file system may find a name that is written otherwise.
	encrypted, sealed := false, false
	for _, name := range names {
		encrypted = encrypted || name == keyMetadataName
		sealed = sealed || name == manifestName
	}
	if !encrypted && with.given() {
		// Whoever can write there could have removed it, and put plain files in the place of encrypted ones.
		return refuse(notEncrypted, "%s: a key was given, and there is no %s", path, keyMetadataName)
	}
	var p *payload
	if encrypted {
		if p, err = readPayload(s.root, with); err != nil {
			return err
		}
		s.dataKey = []byte(*p.DataKey)
	}
	if sealed {
		s.manifest, err = readManifest(s.root, p)
		return err
	}
	if encrypted && *p.Sealed {
		return refuse(corrupt, "%s: not complete, there is no %s", path, manifestName)
	}
	return nil
}

// paths lists the fragments: what the manifest has, else what is on the disk.
func (s *snapshot) paths() ([]string, error) {
	if s.manifest == nil {
		_, fragments, err := walk(s.root, true)
		return fragments, err
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

// open opens a fragment. Of an encrypted one, header and last segment are authentic then.
func (s *snapshot) open(path string) (*fragment, error) {
	what := "fragment " + path
	if err := checkPath(path); err != nil {
		return nil, refuse(missing, "%s: %v", what, err)
	}
	file, size, err := s.openFile(path, what)
	if err != nil {
		return nil, err
	}
	if s.dataKey == nil {
		return &fragment{&plainReader{file, what, size}, file, size}, nil
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
func (s *snapshot) openFile(path, what string) (*os.File, uint64, error) {
	if s.manifest == nil {
		return openBelow(s.root, path, unix.S_IFREG, what)
	}
	listed := s.manifest.Fragments[path]
	if listed == nil {
		return nil, 0, refuse(missing, "%s: not in the manifest", what)
	}
	file, size, err := openListed(s.root, path, what)
	if err != nil {
		return nil, 0, err
	}
	same := size == *listed.StoredSize
	if same && s.dataKey != nil {
		tag := make([]byte, headerTagBytes)
		_, err := file.ReadAt(tag, headerTagOffset)
		same = err == nil && string(tag) == string(*listed.HeaderTag)
	}
	if !same {
		file.Close()
		return nil, 0, refuse(corrupt, "%s: its stored size or header tag is not the one in the manifest", what)
	}
	return file, size, nil
}
