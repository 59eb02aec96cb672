package main

// The archive (section 7): a snapshot in one file. The reader computes all headers and compares them; it does not parse
// tar.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	blockBytes         = 512
	globalHeaderBytes  = 2 * blockBytes
	archiveEndBytes    = 2 * blockBytes
	globalHeaderName   = "pax_global_header"
	globalComment      = "vmsnap archive 1"
	paxHeaderName      = "vmsnap.pax"
	replacementName    = "vmsnap" // in the name field, if the record `path` has the name
	maxNameFieldBytes  = 100
	minCommentBytes    = 20
	largeFragmentBytes = 65536 // from which on a fragment is among the last ones, and aligned

	minAlignment      = blockBytes
	largeAlignment    = 4096
	manifestAlignment = 65536

	typeFile      = '0'
	typeNamespace = '5'
	typePax       = 'x'
	typeGlobal    = 'g'

	maxOctal = 1<<33 - 1 // in the 11 digits of a size or time
)

// Fields of the ustar header.
const (
	modeOffset     = 100
	uidOffset      = 108
	gidOffset      = 116
	sizeOffset     = 124
	mtimeOffset    = 136
	chksumOffset   = 148
	typeflagOffset = 156
	magicOffset    = 257
	devmajorOffset = 329
	devminorOffset = 337
)

var elevenDigits = regexp.MustCompile(`^[0-7]{11}\x00`)

// Headers --------------------------------------------------------------------------------------------------------------

func ustarHeader(name string, typeflag byte, size, mtime uint64) []byte {
	block := make([]byte, blockBytes)
	copy(block, name)
	copy(block[modeOffset:], "0000600")
	if typeflag == typeNamespace {
		copy(block[modeOffset:], "0000700")
	}
	for _, zero := range []int{uidOffset, gidOffset, devmajorOffset, devminorOffset} {
		copy(block[zero:], "0000000")
	}
	if size <= maxOctal {
		copy(block[sizeOffset:], fmt.Sprintf("%011o", size))
	} else {
		block[sizeOffset] = 0x80
		binary.BigEndian.PutUint64(block[mtimeOffset-8:], size)
	}
	copy(block[mtimeOffset:], fmt.Sprintf("%011o", mtime))
	copy(block[chksumOffset:], "        ")
	block[typeflagOffset] = typeflag
	copy(block[magicOffset:], "ustar\x0000")
	sum := 0
	for _, value := range block {
		sum += int(value)
	}
	copy(block[chksumOffset:], fmt.Sprintf("%06o\x00", sum))
	return block
}

// paxRecord returns a record, which begins with its own length, digits included.
func paxRecord(keyword, value string) string {
	rest := fmt.Sprintf(" %s=%s\n", keyword, value)
	digits := 1
	for len(strconv.Itoa(len(rest)+digits)) > digits {
		digits++
	}
	return strconv.Itoa(len(rest)+digits) + rest
}

// comment returns the record `comment` of that length: the text, then spaces.
func comment(text string, length uint64) string {
	start := fmt.Sprintf("%d comment=%s", length, text)
	return start + strings.Repeat(" ", int(length)-len(start)-1) + "\n"
}

func globalHeader() []byte {
	header := ustarHeader(globalHeaderName, typeGlobal, blockBytes, 0)
	return append(header, comment(globalComment, blockBytes)...)
}

func roundedUp(value, multiple uint64) uint64 { return (value + multiple - 1) / multiple * multiple }

// member is a file or namespace in an archive. The offset at which it begins decides how long its headers are.
type member struct {
	path      string // of a namespace with a `/` at the end
	size      uint64
	alignment uint64
}

func fragmentMember(path string, storedSize uint64) member {
	if storedSize >= largeFragmentBytes {
		return member{path, storedSize, largeAlignment}
	}
	return member{path, storedSize, minAlignment}
}

func (m member) hasLongName() bool {
	notASCII := strings.IndexFunc(m.path, func(r rune) bool { return r > 0x7f }) >= 0
	return len(m.path) > maxNameFieldBytes || notASCII
}

// records returns the pax records `path` and `size`, if the member needs them.
func (m member) records() string {
	records := ""
	if m.hasLongName() {
		records = paxRecord("path", m.path)
	}
	if m.size > maxOctal {
		records += paxRecord("size", strconv.FormatUint(m.size, 10))
	}
	return records
}

// paxBytes returns the length of the data of the pax header, or 0 if the member does not have a pax header. `need` is
// the length of its records.
func (m member) paxBytes(start, need uint64) uint64 {
	if need == 0 && (start+blockBytes)%m.alignment == 0 {
		return 0
	}
	length := roundedUp(need, blockBytes)
	if length == 0 {
		length = blockBytes
	}
	length += -(start + 2*blockBytes + length) % m.alignment
	for length > need && length-need < minCommentBytes {
		length += m.alignment
	}
	return length
}

// headersBytes returns the distance from the start of the member to its data.
func (m member) headersBytes(start uint64) uint64 {
	if length := m.paxBytes(start, uint64(len(m.records()))); length != 0 {
		return 2*blockBytes + length
	}
	return blockBytes
}

// headers returns all bytes from the start of the member to its data.
func (m member) headers(start, mtime uint64) []byte {
	var headers []byte
	records := m.records()
	need := uint64(len(records))
	if length := m.paxBytes(start, need); length != 0 {
		headers = append(ustarHeader(paxHeaderName, typePax, length, mtime), records...)
		if length > need {
			headers = append(headers, comment("", length-need)...)
		}
	}
	name, typeflag := m.path, byte(typeFile)
	if m.hasLongName() {
		name = replacementName
	}
	if strings.HasSuffix(m.path, "/") {
		typeflag = typeNamespace
	}
	return append(headers, ustarHeader(name, typeflag, m.size, mtime)...)
}

// Reading at random ----------------------------------------------------------------------------------------------------

// placed is a member with the offsets at which it and its data begin.
type placed struct {
	member
	start, data uint64
}

type archive struct {
	path    string // as the caller named it
	file    *os.File
	size    uint64
	mtime   uint64
	members map[string]placed // the files by their paths
	end     uint64            // of the members that were placed until now
	paths   []string          // of the fragments
}

// openArchive opens what the caller named, finds the key metadata and the manifest in it, and compares their headers.
func openArchive(path string) (*archive, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	a := &archive{path: path, file: file, members: map[string]placed{}, end: globalHeaderBytes}
	if err := a.readStart(); err != nil {
		file.Close()
		return nil, err
	}
	return a, nil
}

func (a *archive) readStart() error {
	status, err := a.file.Stat()
	if err != nil {
		return err
	}
	if !status.Mode().IsRegular() {
		return refuse(corrupt, "%s: not a vmsnap archive: neither a file nor a directory", a.path)
	}
	a.size = uint64(status.Size())
	start, err := a.read(0, globalHeaderBytes)
	if err != nil && kindOf(err) != corrupt {
		return err
	}
	if !bytes.Equal(start, globalHeader()) {
		return refuse(corrupt, "%s: not a vmsnap archive: it begins otherwise", a.path)
	}
	// Size and time are taken from the headers, which are compared with the ones computed from them.
	first, err := a.read(a.end, blockBytes)
	if err != nil {
		return err
	}
	if a.mtime, err = octal(first[mtimeOffset:]); err != nil {
		return a.foreign("the first member")
	}
	if bytes.HasPrefix(first, []byte(keyMetadataName+"\x00")) {
		if err := a.placeByHeader(member{path: keyMetadataName, alignment: minAlignment}, maxKeyMetadataBytes); err != nil {
			return err
		}
	}
	return a.placeByHeader(member{path: manifestName, alignment: manifestAlignment}, maxManifestBytes)
}

// placeByHeader places a member whose size is only known from its header, and compares the headers.
func (a *archive) placeByHeader(m member, maxBytes uint64) error {
	header, err := a.read(a.end+m.headersBytes(a.end)-blockBytes, blockBytes)
	if err != nil {
		return err
	}
	if m.size, err = octal(header[sizeOffset:]); err != nil {
		return a.foreign(m.path)
	}
	if m.size > maxBytes {
		return refuse(corrupt, "%s: longer than %d bytes", m.path, maxBytes)
	}
	if err := a.place(m); err != nil {
		return err
	}
	return a.compareHeaders(a.members[m.path], m.path)
}

// octal returns the number of 11 octal digits in a field.
func octal(field []byte) (uint64, error) {
	if !elevenDigits.Match(field) {
		return 0, errors.New("not a number of 11 octal digits")
	}
	return strconv.ParseUint(string(field[:11]), 8, 64)
}

func (a *archive) foreign(what string) error {
	return refuse(corrupt, "%s: its header in the archive is damaged, or by another program; unpack that with tar", what)
}

// place puts a member behind the members that were placed before. It must lie in the file, so that no sum overflows.
func (a *archive) place(m member) error {
	data := a.end + m.headersBytes(a.end)
	if data > a.size || m.size > a.size-data {
		return refuse(corrupt, "%s: shorter than its manifest and headers say", a.path)
	}
	a.members[m.path] = placed{m, a.end, data}
	a.end = data + roundedUp(m.size, blockBytes)
	return nil
}

// locate computes where all members are, and compares the length of the archive.
func (a *archive) locate(m *manifest) error {
	if a.mtime != m.unixTime() {
		return refuse(corrupt, "%s: its headers have another time than the manifest", a.path)
	}
	var members []member
	namespaces := append([]string(nil), m.Namespaces...)
	sort.Strings(namespaces)
	for _, path := range namespaces {
		members = append(members, member{path: path + "/", alignment: minAlignment})
	}
	var large []member
	a.paths = m.Fragments.paths()
	for _, path := range a.paths {
		fragment := fragmentMember(path, *m.Fragments[path].StoredSize)
		if fragment.size < largeFragmentBytes {
			members = append(members, fragment)
		} else {
			large = append(large, fragment)
		}
	}
	for _, each := range append(members, large...) {
		if err := a.place(each); err != nil {
			return err
		}
	}
	if a.end+archiveEndBytes != a.size {
		return refuse(corrupt, "%s: %d bytes long, and by its manifest %d", a.path, a.size, a.end+archiveEndBytes)
	}
	return nil
}

func (a *archive) compareHeaders(p placed, what string) error {
	found, err := a.read(p.start, p.data-p.start)
	if err == nil && !bytes.Equal(found, p.headers(p.start, a.mtime)) {
		err = a.foreign(what)
	}
	return err
}

// read returns bytes of the archive, of which there are never more than the headers of a member.
func (a *archive) read(offset, length uint64) ([]byte, error) {
	if offset > a.size || length > a.size-offset {
		return nil, refuse(corrupt, "%s: cut off", a.path)
	}
	data := make([]byte, length)
	_, err := a.file.ReadAt(data, int64(offset))
	if errors.Is(err, io.EOF) {
		err = refuse(corrupt, "%s: became shorter while it was read", a.path)
	}
	return data, err
}

func (a *archive) Close() error { return a.file.Close() }

func (a *archive) has(name string) (bool, error) {
	_, found := a.members[name]
	return found, nil
}

func (a *archive) fragments() ([]string, error) { return a.paths, nil }

// open compares the headers of a file before anything is read from it.
func (a *archive) open(path, what string) (*storedFile, error) {
	p, found := a.members[path]
	if !found {
		return nil, refuse(missing, "%s: not in the archive", what)
	}
	if err := a.compareHeaders(p, what); err != nil {
		return nil, err
	}
	return &storedFile{io.NewSectionReader(a.file, int64(p.data), int64(p.size)), io.NopCloser(nil)}, nil
}
