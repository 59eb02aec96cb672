package main

// Writes an encrypted, sealed snapshot of a directory.

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/fxamacker/cbor/v2"
	"golang.org/x/sys/unix"
)

const (
	generator       = "vmsnap-reader (Go)"
	chunkBytes      = 65536
	smallChunkBytes = 4096
	smallFileBytes  = 65536 // up to which a fragment gets small chunks

	stagingPrefix      = reservedPrefix + "-"
	stagingRandomBytes = 8
)

// writeSnapshot makes a snapshot of a folder: a fragment of each file, a namespace of each folder in it.
//
// At the target is nothing until all of it is on the disk: it is made in a hidden folder beside, and renamed.
func writeSnapshot(target, source string, key []byte) (err error) {
	target = filepath.Clean(target)
	if err := checkAbsent(target); err != nil {
		return err
	}
	root, err := openFolder(source)
	if err != nil {
		return err
	}
	defer root.Close()
	namespaces, paths, err := walk(root, false) // before the hidden folder is made, which may be below the source
	if err != nil {
		return err
	}

	random, err := randomBytes(stagingRandomBytes)
	if err != nil {
		return err
	}
	parent := filepath.Dir(target)
	staging := filepath.Join(parent, stagingPrefix+hex.EncodeToString(random))
	if err := os.Mkdir(staging, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(staging)
		}
	}()
	lock, err := os.Open(staging)
	if err != nil {
		return err
	}
	defer lock.Close()
	// The lock of section 5. Nobody seals or adds to this folder but we, so it only keeps `vmsnap clean` away, which
	// removes hidden folders that nobody holds. Where there are no locks it removes none: an error is of no importance.
	_ = unix.Flock(int(lock.Fd()), unix.LOCK_SH)

	if err := fillSnapshot(staging, root, namespaces, paths, key); err != nil {
		return err
	}
	for _, namespace := range append(namespaces, "") { // the last is the root
		if err := syncFolder(filepath.Join(staging, namespace)); err != nil {
			return err
		}
	}
	// Rename replaces an empty folder, and nothing else that could appear between these two calls.
	if err := checkAbsent(target); err != nil {
		return err
	}
	if err := os.Rename(staging, target); err != nil {
		return err
	}
	return syncFolder(parent)
}

func checkAbsent(path string) error {
	_, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err == nil:
		return fmt.Errorf("%s: %w", path, os.ErrExist)
	}
	return err
}

func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

func randomBytes(count int) ([]byte, error) {
	random := make([]byte, count)
	_, err := rand.Read(random)
	return random, err
}

func fillSnapshot(staging string, source *os.File, namespaces, paths []string, key []byte) error {
	snapshotID, err := randomBytes(snapshotIDBytes)
	if err != nil {
		return err
	}
	dataKey, err := randomBytes(keyBytes)
	if err != nil {
		return err
	}
	for _, namespace := range namespaces { // outer ones come first
		if err := os.Mkdir(filepath.Join(staging, namespace), 0o700); err != nil {
			return err
		}
	}
	listed := listedFragments{}
	for _, path := range paths {
		if listed[path], err = writeFragment(staging, source, path, dataKey); err != nil {
			return err
		}
	}

	encodedPayload, err := cbor.Marshal(payload{
		Format:     pointer(payloadFormat),
		Version:    pointer(uint64(formatVersion)),
		SnapshotID: pointer(cbor.ByteString(snapshotID)),
		DataKey:    pointer(cbor.ByteString(dataKey)),
		Sealed:     pointer(true),
		Requires:   []*string{},
	})
	if err != nil {
		return err
	}
	path := filepath.Join(staging, keyMetadataName)
	if _, err := writeFile(path, bytes.NewReader(encodedPayload), key, keyAAD, keyChunkBytes); err != nil {
		return err
	}

	encodedManifest, err := cbor.Marshal(manifest{
		Format:     pointer(manifestFormat),
		Version:    pointer(uint64(formatVersion)),
		SnapshotID: pointer(cbor.ByteString(snapshotID)),
		Created:    pointer(time.Now().UTC().Format(time.RFC3339)),
		Generator:  pointer(generator),
		Encrypted:  pointer(true),
		Requires:   []*string{},
		Namespaces: append([]string{}, namespaces...), // an empty array if there are none, not null
		Fragments:  listed,
	})
	if err != nil {
		return err
	}
	path = filepath.Join(staging, manifestName)
	written, err := writeFile(path, bytes.NewReader(encodedManifest), dataKey, manifestAAD, manifestChunkBytes)
	if err == nil && *written.StoredSize > maxManifestBytes {
		err = errors.New("more fragments than a manifest can list")
	}
	return err
}

func pointer[T any](value T) *T { return &value }

// MarshalCBOR writes the map ascending by the bytes of the paths, which is none of the orders that the encoder has.
func (l listedFragments) MarshalCBOR() ([]byte, error) {
	encoded, err := cbor.Marshal(len(l))
	if err != nil {
		return nil, err
	}
	encoded[0] |= majorMap << 5 // the head of a map is that of a number, but for the major type
	for _, path := range l.paths() {
		for _, item := range []any{path, l[path]} {
			part, err := cbor.Marshal(item)
			if err != nil {
				return nil, err
			}
			encoded = append(encoded, part...)
		}
	}
	return encoded, nil
}

func writeFragment(staging string, source *os.File, path string, dataKey []byte) (*listedFragment, error) {
	file, size, err := openBelow(source, path, unix.S_IFREG, path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	chunk := chunkBytes
	if size <= smallFileBytes {
		chunk = smallChunkBytes
	}
	return writeFile(filepath.Join(staging, path), file, dataKey, fragmentAAD+path, chunk)
}

// writeFile makes a file that is one FLOE ciphertext, and returns what a manifest says of it.
func writeFile(path string, plaintext io.Reader, key []byte, aad string, chunk int) (*listedFragment, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	written, err := encrypt(file, plaintext, key, aad, chunk)
	if err != nil {
		return nil, err
	}
	if err := file.Sync(); err != nil {
		return nil, err
	}
	return written, file.Close()
}

// encrypt writes a FLOE ciphertext (section 2) of all that the plaintext gives.
func encrypt(target io.Writer, plaintext io.Reader, key []byte, aad string, chunk int) (*listedFragment, error) {
	iv, err := randomBytes(floeIVBytes)
	if err != nil {
		return nil, err
	}
	keys := floeKeys{key: key, parametersAndIV: append(parameters(uint32(chunk+segmentOverhead)), iv...), aad: []byte(aad)}
	headerTag := keys.headerTag()
	for _, part := range [][]byte{keys.parametersAndIV, headerTag} {
		if _, err := target.Write(part); err != nil {
			return nil, err
		}
	}

	size, storedSize := uint64(0), uint64(headerBytes)
	ahead := bufio.NewReaderSize(plaintext, chunk)
	piece := make([]byte, chunk)
	segment := make([]byte, 0, chunk+segmentOverhead)
	for position, last := uint64(0), false; !last; position++ {
		n, err := io.ReadFull(ahead, piece)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return nil, err
		}
		// A full chunk is the last one too, unless more plaintext follows it.
		_, err = ahead.Peek(1)
		if err != nil && err != io.EOF {
			return nil, err
		}
		last = err == io.EOF
		lengthWord := uint32(notLast)
		if last {
			lengthWord = uint32(n + segmentOverhead)
		}
		nonce, err := randomBytes(nonceBytes)
		if err != nil {
			return nil, err
		}
		aead, err := keys.segmentAEAD(position)
		if err != nil {
			return nil, err
		}
		segment = append(binary.BigEndian.AppendUint32(segment[:0], lengthWord), nonce...)
		segment = aead.Seal(segment, nonce, piece[:n], segmentAAD(position, last))
		if _, err := target.Write(segment); err != nil {
			return nil, err
		}
		size += uint64(n)
		storedSize += uint64(len(segment))
	}
	return &listedFragment{
		Size:       &size,
		StoredSize: &storedSize,
		ChunkSize:  pointer(uint64(chunk)),
		HeaderTag:  pointer(cbor.ByteString(headerTag)),
	}, nil
}
