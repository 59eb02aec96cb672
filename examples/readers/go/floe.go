package main

// FLOE as vmsnap uses it: section 2 of docs/format.md. Section numbers in all files refer to that page.

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha512"
	"encoding/binary"
	"io"
)

const (
	keyBytes = 32

	// The header: AEAD, KDF, segment length and IV length; the IV; the header tag.
	parametersBytes = 10
	floeIVBytes     = 32
	headerTagBytes  = 32
	headerTagOffset = parametersBytes + floeIVBytes
	headerBytes     = headerTagOffset + headerTagBytes

	// A segment: its length, or notLast; the nonce; the ciphertext; the tag.
	lengthBytes     = 4
	nonceBytes      = 12
	tagBytes        = 16
	segmentOverhead = lengthBytes + nonceBytes + tagBytes
	notLast         = 0xFFFFFFFF
	maxSegments     = 1 << 40

	headerTagPurpose  = "HEADER_TAG:"
	messageKeyPurpose = "MESSAGE_KEY:"
	messageKeyBytes   = 48
	segmentKeyPurpose = "DEK:"
	positionsPerKey   = 1 << 20
)

func parameters(segmentLength uint32) []byte {
	encoded := make([]byte, parametersBytes) // the first two stay 0: AES-256-GCM, HKDF-Expand-SHA-384
	binary.BigEndian.PutUint32(encoded[2:], segmentLength)
	binary.BigEndian.PutUint32(encoded[6:], floeIVBytes)
	return encoded
}

// floeKeys derives all keys of one ciphertext.
type floeKeys struct {
	key             []byte // the FLOE key
	parametersAndIV []byte
	aad             []byte
	aead            cipher.AEAD // under the segment key of the position below
	aeadPosition    uint64
}

// kdf is HKDF-Expand-SHA-384 for at most 48 bytes, which is a single HMAC.
func (k *floeKeys) kdf(key []byte, purpose string, length int) []byte {
	mac := hmac.New(sha512.New384, key)
	mac.Write(k.parametersAndIV)
	mac.Write([]byte(purpose))
	mac.Write(k.aad)
	mac.Write([]byte{0x01})
	return mac.Sum(nil)[:length]
}

func (k *floeKeys) headerTag() []byte { return k.kdf(k.key, headerTagPurpose, headerTagBytes) }

// segmentAEAD is for the segment at a position. One key serves 2^20 of them.
func (k *floeKeys) segmentAEAD(position uint64) (cipher.AEAD, error) {
	masked := position &^ (positionsPerKey - 1)
	if k.aead == nil || k.aeadPosition != masked {
		messageKey := k.kdf(k.key, messageKeyPurpose, messageKeyBytes)
		purpose := binary.BigEndian.AppendUint64([]byte(segmentKeyPurpose), masked)
		block, err := aes.NewCipher(k.kdf(messageKey, string(purpose), keyBytes))
		if err != nil {
			return nil, err
		}
		if k.aead, err = cipher.NewGCM(block); err != nil {
			return nil, err
		}
		k.aeadPosition = masked
	}
	return k.aead, nil
}

func segmentAAD(position uint64, last bool) []byte {
	aad := binary.BigEndian.AppendUint64(nil, position)
	if last {
		return append(aad, 0x01)
	}
	return append(aad, 0x00)
}

// floeUse is what differs between the files that are FLOE ciphertexts.
type floeUse struct {
	minSegment, maxSegment uint32
	// The kind of refusal where a file does not begin as a ciphertext: in the place of a fragment there may be anything,
	// while metadata that were found to be FLOE can only have been changed.
	malformed string
}

// floeReader gives the plaintext of a ciphertext whose header and last segment were found authentic.
type floeReader struct {
	file          io.ReaderAt
	what          string // as errors name it
	keys          floeKeys
	segmentLength uint64
	lastLength    uint64
	segments      uint64
	size          uint64 // of the plaintext

	buffer []byte
	next   uint64 // position of the segment that Read opens next
	rest   []byte // plaintext of the one before, not given out yet
}

// openFloe makes the first three of the checks in section 2, in their order. Read makes the fourth.
func openFloe(file io.ReaderAt, fileSize uint64, key []byte, aad, what string, use floeUse) (*floeReader, error) {
	if fileSize < headerBytes+segmentOverhead {
		return nil, refuse(use.malformed, "%s: too short for a FLOE ciphertext: cut off, or not encrypted", what)
	}
	f := &floeReader{file: file, what: what}
	header := make([]byte, headerBytes)
	if err := f.readAt(header, 0); err != nil {
		return nil, err
	}
	segmentLength := binary.BigEndian.Uint32(header[2:])
	if string(header[:parametersBytes]) != string(parameters(segmentLength)) {
		return nil, refuse(use.malformed, "%s: no FLOE header: damaged, or not encrypted", what)
	}
	if segmentLength < use.minSegment || segmentLength > use.maxSegment {
		return nil, refuse(use.malformed, "%s: a segment length of %d is not allowed here", what, segmentLength)
	}

	f.keys = floeKeys{key: key, parametersAndIV: header[:headerTagOffset], aad: []byte(aad)}
	if !hmac.Equal(f.keys.headerTag(), header[headerTagOffset:]) {
		return nil, refuse(authentication, "%s: the key is wrong, or the header damaged, or the file not in its place", what)
	}

	body := fileSize - headerBytes
	f.segmentLength = uint64(segmentLength)
	f.segments = (body-1)/f.segmentLength + 1
	f.lastLength = body - (f.segments-1)*f.segmentLength
	if f.lastLength < segmentOverhead || f.segments > maxSegments {
		return nil, refuse(authentication, "%s: no FLOE ciphertext has this length: cut off or extended", what)
	}
	f.size = body - f.segments*segmentOverhead
	_, err := f.segment(f.segments - 1)
	return f, err
}

// segment returns the plaintext of one segment after its tag was checked. It is valid until the next call.
func (f *floeReader) segment(position uint64) ([]byte, error) {
	last := position == f.segments-1
	length, lengthWord := f.segmentLength, uint32(notLast)
	if last {
		length, lengthWord = f.lastLength, uint32(f.lastLength)
	}
	if uint64(cap(f.buffer)) < length {
		f.buffer = make([]byte, length)
	}
	stored := f.buffer[:length]
	if err := f.readAt(stored, headerBytes+position*f.segmentLength); err != nil {
		return nil, err
	}
	// No tag covers these 4 bytes.
	if binary.BigEndian.Uint32(stored) != lengthWord {
		return nil, refuse(authentication, "%s: wrong length in front of segment %d: damaged, cut off or extended", f.what, position)
	}
	aead, err := f.keys.segmentAEAD(position)
	if err != nil {
		return nil, err
	}
	nonce, sealed := stored[lengthBytes:lengthBytes+nonceBytes], stored[lengthBytes+nonceBytes:]
	plaintext, err := aead.Open(sealed[:0], nonce, sealed, segmentAAD(position, last))
	if err != nil {
		return nil, refuse(authentication, "%s: segment %d: the key is wrong, or the file damaged", f.what, position)
	}
	return plaintext, nil
}

func (f *floeReader) readAt(into []byte, offset uint64) error {
	n, err := f.file.ReadAt(into, int64(offset))
	if n == len(into) {
		return nil
	}
	if err == io.EOF {
		return refuse(authentication, "%s: became shorter while it was read", f.what)
	}
	return err
}

// Read gives out the plaintext, a segment at a time.
func (f *floeReader) Read(into []byte) (int, error) {
	for len(f.rest) == 0 {
		if f.next == f.segments {
			return 0, io.EOF
		}
		plaintext, err := f.segment(f.next)
		if err != nil {
			return 0, err
		}
		f.rest = plaintext
		f.next++
	}
	n := copy(into, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}
