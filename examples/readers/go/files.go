package main

// The files of a snapshot: the store that opens them, their names, and the directory (section 1). The other store is in
// archive.go.

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// store is where the files of a snapshot are: a directory or an archive.
type store interface {
	io.Closer
	// has returns whether the root has an entry of exactly this name.
	has(name string) (bool, error)
	// open opens a file. If there is no file at the path, the refusal has the kind `missing`.
	open(path, what string) (*storedFile, error)
	// locate computes where the fragments are. It is called before the first fragment is opened.
	locate(m *manifest) error
	// fragments returns the paths of all fragments in the store, ascending by their bytes.
	fragments() ([]string, error)
}

// storedFile is one file of a snapshot: a whole file, or its part of an archive.
type storedFile struct {
	*io.SectionReader
	io.Closer
}

func openStore(path string) (store, error) {
	status, err := os.Stat(path)
	if err == nil && !status.IsDir() {
		return openArchive(path)
	}
	root, err := openFolder(path)
	if err != nil {
		return nil, err
	}
	return directory{root}, nil
}

// openListed opens a file that has to be there, because a list says so.
func openListed(from store, path, what string) (*storedFile, error) {
	file, err := from.open(path, what)
	if err != nil && kindOf(err) == missing {
		err = refuse(corrupt, "%s: is listed, and is no file", what)
	}
	return file, err
}

// Names ---------------------------------------------------------------------------------------------------------------

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
		return nil, refuse(missing, "%s: no such directory", path)
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

// A snapshot in a directory -------------------------------------------------------------------------------------------

// directory is a snapshot in a directory.
type directory struct{ root *os.File }

func (d directory) Close() error { return d.root.Close() }

// has looks among the names, because a file system may find a name that is written otherwise.
func (d directory) has(name string) (bool, error) {
	names, err := namesIn(d.root)
	for _, found := range names {
		if found == name {
			return true, nil
		}
	}
	return false, err
}

func (d directory) open(path, what string) (*storedFile, error) {
	file, size, err := openBelow(d.root, path, unix.S_IFREG, what)
	if err != nil {
		return nil, err
	}
	return &storedFile{io.NewSectionReader(file, 0, int64(size)), file}, nil
}

// locate has nothing to do: the file system finds the files.
func (d directory) locate(*manifest) error { return nil }

func (d directory) fragments() ([]string, error) {
	_, fragments, err := walk(d.root, true)
	return fragments, err
}
