// Lists or unpacks a tar file with Go's archive/tar.
//
//	untar list ARCHIVE
//	untar unpack ARCHIVE DIR
//
// Blocks of zeros become holes.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	file, err := os.Open(arguments[1])
	if err != nil {
		return err
	}
	defer file.Close()
	archive := tar.NewReader(file)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case arguments[0] == "list":
			fmt.Println(header.Size, header.Name)
		case header.Typeflag == tar.TypeXGlobalHeader:
		case header.Typeflag == tar.TypeDir:
			err = os.Mkdir(filepath.Join(arguments[2], header.Name), 0o700)
		case header.Typeflag == tar.TypeReg:
			err = write(filepath.Join(arguments[2], header.Name), archive, header.Size)
		default:
			err = fmt.Errorf("%q has the type %q", header.Name, header.Typeflag)
		}
		if err != nil {
			return err
		}
	}
}

func write(path string, data io.Reader, size int64) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	block, zeros := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; {
		count, err := io.ReadFull(data, block)
		if !bytes.Equal(block[:count], zeros[:count]) {
			if _, err := file.WriteAt(block[:count], at); err != nil {
				return err
			}
		}
		at += int64(count)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return err
		}
	}
	return file.Truncate(size)
}
