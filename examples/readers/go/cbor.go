package main

// CBOR (RFC 8949) in the one encoding of section 4. checkStrict walks over the bytes and refuses any other encoding. The
// decoder, which is more lenient, sees only bytes that passed the check.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

const (
	maxNesting    = 16
	formatVersion = 1
)

// Major types.
const (
	majorUnsigned = iota
	majorNegative
	majorBytes
	majorText
	majorArray
	majorMap
	majorTag
	majorSimple
)

func checkStrict(data []byte) error {
	walker := cborWalker{rest: data}
	if err := walker.item(1); err != nil {
		return err
	}
	if len(walker.rest) != 0 {
		return errors.New("bytes follow the CBOR item")
	}
	return nil
}

type cborWalker struct{ rest []byte }

func (w *cborWalker) take(count uint64) ([]byte, error) {
	if count > uint64(len(w.rest)) {
		return nil, errors.New("the CBOR item is cut off")
	}
	taken := w.rest[:count]
	w.rest = w.rest[count:]
	return taken, nil
}

// head returns the major type, the additional information and the argument, which must be in its shortest form.
func (w *cborWalker) head() (major, info byte, argument uint64, err error) {
	first, err := w.take(1)
	if err != nil {
		return 0, 0, 0, err
	}
	major, info = first[0]>>5, first[0]&0x1f
	if info < 24 {
		return major, info, uint64(info), nil
	}
	if info > 27 {
		return 0, 0, 0, errors.New("a CBOR item has no definite length, or is not well-formed")
	}
	encoded, err := w.take(1 << (info - 24))
	if err != nil {
		return 0, 0, 0, err
	}
	var wide [8]byte
	copy(wide[8-len(encoded):], encoded)
	argument = binary.BigEndian.Uint64(wide[:])
	leastOfItsForm := [...]uint64{24, 1 << 8, 1 << 16, 1 << 32}[info-24]
	isFloat := major == majorSimple && info > 24 // whose argument is its bits, whatever they are
	if argument < leastOfItsForm && !isFloat {
		return 0, 0, 0, errors.New("a CBOR number or length is not in its shortest form")
	}
	return major, info, argument, nil
}

// item walks over one item. Each item is a level, also one that cannot hold others.
func (w *cborWalker) item(level int) error {
	if level > maxNesting {
		return fmt.Errorf("CBOR items are nested deeper than %d levels", maxNesting)
	}
	major, info, argument, err := w.head()
	if err != nil {
		return err
	}
	switch major {
	case majorUnsigned, majorNegative:
		return nil
	case majorBytes:
		_, err = w.take(argument)
		return err
	case majorText:
		_, err = w.text(argument)
		return err
	case majorArray:
		for ; argument > 0; argument-- {
			if err := w.item(level + 1); err != nil {
				return err
			}
		}
		return nil
	case majorMap:
		return w.pairs(argument, level)
	case majorSimple:
		isFloat, isKnown := info > 24, info >= 20 && info <= 22 // false, true, null
		if isFloat || isKnown {
			return nil
		}
	}
	return errors.New("a CBOR item has a tag, or is a simple value other than false, true and null")
}

func (w *cborWalker) pairs(count uint64, level int) error {
	seen := map[string]bool{}
	for ; count > 0; count-- {
		major, _, length, err := w.head()
		if err != nil {
			return err
		}
		if major != majorText {
			return errors.New("a key of a CBOR map is not text")
		}
		key, err := w.text(length)
		if err != nil {
			return err
		}
		if seen[key] {
			return fmt.Errorf("a CBOR map has the key '%.255s' twice", key)
		}
		seen[key] = true
		if err := w.item(level + 1); err != nil {
			return err
		}
	}
	return nil
}

func (w *cborWalker) text(length uint64) (string, error) {
	text, err := w.take(length)
	if err == nil && !utf8.Valid(text) {
		err = errors.New("a CBOR text is not UTF-8")
	}
	return string(text), err
}

// decoder takes what checkStrict let through, and the metadata of guest memory as they are; exactDecoder refuses unknown keys.
var (
	decoder      = newDecoder(cbor.ExtraDecErrorNone)
	exactDecoder = newDecoder(cbor.ExtraDecErrorUnknownField)
)

func newDecoder(extra cbor.ExtraDecErrorCond) cbor.DecMode {
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		ExtraReturnErrors: extra,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		MaxArrayElements:  math.MaxInt32,
		MaxMapPairs:       math.MaxInt32,
		MaxNestedLevels:   128,
	}.DecMode()
	if err != nil {
		panic(err) // at start, if the options contradicted each other
	}
	return mode
}

// decodeMetadata decodes the payload of the key metadata or the manifest. Version and features are looked at before
// anything that a later version may have changed.
func decodeMetadata(data []byte, format, what string, into any) error {
	if err := checkStrict(data); err != nil {
		return refuse(corrupt, "%s: %v", what, err)
	}
	// Pointers, here and in the types to come, are nil for what is missing or null.
	var head struct {
		Format   *string   `cbor:"format"`
		Version  *uint64   `cbor:"version"`
		Requires []*string `cbor:"requires"`
	}
	if err := decoder.Unmarshal(data, &head); err != nil {
		return refuse(corrupt, "%s: %v", what, err)
	}
	if head.Format == nil || head.Version == nil || head.Requires == nil {
		return refuse(corrupt, "%s: 'format', 'version' or 'requires' is missing", what)
	}
	for _, feature := range head.Requires {
		if feature == nil {
			return refuse(corrupt, "%s: 'requires' holds something else than texts", what)
		}
	}
	if *head.Format != format {
		return refuse(corrupt, "%s: its format is '%.255s', not '%s'", what, *head.Format, format)
	}
	if *head.Version != formatVersion {
		return refuse(unsupported, "%s: its version is %d", what, *head.Version)
	}
	if len(head.Requires) != 0 {
		return refuse(unsupported, "%s: it requires the feature '%.255s'", what, *head.Requires[0])
	}
	if err := decoder.Unmarshal(data, into); err != nil {
		return refuse(corrupt, "%s: %v", what, err)
	}
	return nil
}
