// vmsnap-reader reads vmsnap snapshots, plain and encrypted, without vmsnap, and writes encrypted ones.
//
// It was written from docs/format.md alone. To learn the format, read floe.go, cbor.go, files.go, snapshot.go, memory.go
// and archive.go.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"filippo.io/age"
)

const usage = `usage: vmsnap-reader SNAPSHOT [OPTION] COMMAND

SNAPSHOT is a directory or an archive.

  list                            sizes and paths of all fragments
  check                           decrypt all fragments, and print the SHA-256 of each
  cat PATH                        write a fragment to the standard output
  restore OUT_DIR [NAMESPACE]     make a folder with guest memory, a file for each region
  write SOURCE_DIR                make the directory SNAPSHOT, of all files below a folder; needs --key-file

At most one of the options, which open an encrypted snapshot:

  --key-file FILE                 32 bytes, or 64 hexadecimal digits
  --identity FILE                 age identities
  --passphrase-file FILE          a passphrase
`

const (
	exitRefused = 1
	exitUsage   = 2
)

// Kinds of refusals, as in ../README.md.
const (
	authentication = "authentication"
	corrupt        = "corrupt"
	unsupported    = "unsupported"
	noKey          = "key"
	notEncrypted   = "not-encrypted"
	missing        = "missing"
	ioFailed       = "io" // whatever the operating system refuses
)

type refusal struct{ kind, why string }

func (r *refusal) Error() string { return r.why }

func refuse(kind, format string, arguments ...any) error {
	return &refusal{kind, fmt.Sprintf(format, arguments...)}
}

func kindOf(err error) string {
	var refused *refusal
	if errors.As(err, &refused) {
		return refused.kind
	}
	return ioFailed
}

// obeyed are the characters that a terminal may obey instead of showing them.
func obeyed(r rune) bool {
	return r <= 0x1f || r >= 0x7f && r <= 0x9f || r == 0x61c || r == 0x200e || r == 0x200f || r >= 0x2028 && r <= 0x202e ||
		r >= 0x2066 && r <= 0x2069 || r == 0xfeff
}

// printable escapes them. It is unambiguous for paths, since no name has a backslash.
func printable(text string) string {
	var shown strings.Builder
	for _, r := range text {
		if obeyed(r) {
			fmt.Fprintf(&shown, `\u%04x`, r)
		} else {
			shown.WriteRune(r)
		}
	}
	return shown.String()
}

func report(err error) {
	fmt.Fprintf(os.Stderr, "refused: %s: %s\n", kindOf(err), printable(err.Error()))
}

// The commands ---------------------------------------------------------------------------------------------------------

// commands are what the command line knows. Each tells whether nothing was refused.
var commands = map[string]struct {
	minOperands, maxOperands int
	run                      func(s *snapshot, operands []string) (bool, error)
}{
	"list":    {0, 0, list},
	"check":   {0, 0, check},
	"cat":     {1, 1, cat},
	"restore": {1, 2, restoreMemory},
	"write":   {1, 1, nil}, // which opens no snapshot, but makes one
}

func list(s *snapshot, _ []string) (bool, error) {
	paths, err := s.paths()
	if err != nil {
		return false, err
	}
	good := true
	for _, path := range paths {
		f, err := s.openFragment(path)
		if err != nil {
			report(err)
			good = false
			continue
		}
		f.Close()
		if _, err := fmt.Printf("%16d  %s\n", f.size, printable(path)); err != nil {
			return false, err
		}
	}
	return good, nil
}

func check(s *snapshot, _ []string) (bool, error) {
	paths, err := s.paths()
	if err != nil {
		return false, err
	}
	refused, total := 0, int64(0)
	for _, path := range paths {
		hash := sha256.New()
		size, err := copyFragment(hash, s, path)
		if err != nil {
			refused++
			_, err = fmt.Printf("refused\t%s\t%s\t%s\n", kindOf(err), printable(path), printable(err.Error()))
		} else {
			total += size
			_, err = fmt.Printf("ok\t%d\t%x\t%s\n", size, hash.Sum(nil), printable(path))
		}
		if err != nil {
			return false, err
		}
	}
	fmt.Fprintf(os.Stderr, "%d fragments, %d of them refused; %d bytes in the others\n", len(paths), refused, total)
	return refused == 0, nil
}

func cat(s *snapshot, operands []string) (bool, error) {
	_, err := copyFragment(os.Stdout, s, operands[0])
	return true, err
}

func restoreMemory(s *snapshot, operands []string) (bool, error) {
	namespace := "" // the root
	if len(operands) == 2 {
		namespace = operands[1]
	}
	return true, restore(s, operands[0], namespace)
}

// copyFragment copies a fragment's plaintext, at most 1 MiB at a time.
func copyFragment(target io.Writer, s *snapshot, path string) (int64, error) {
	f, err := s.openFragment(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.CopyBuffer(struct{ io.Writer }{target}, f, make([]byte, 1<<20)) // the struct hides what would read otherwise
}

// The command line -----------------------------------------------------------------------------------------------------

// usageError is wrong usage, or a key file that is none. It never tells what is in a file.
type usageError string

func (e usageError) Error() string { return string(e) }

func run(arguments []string) (bool, error) {
	if len(arguments) == 0 {
		return false, usageError("SNAPSHOT is missing")
	}
	root := arguments[0]
	if root == "-h" || root == "--help" {
		return false, flag.ErrHelp
	}
	options := flag.NewFlagSet("vmsnap-reader", flag.ContinueOnError)
	options.SetOutput(io.Discard)
	for name := range credentialFiles {
		options.String(name, "", "")
	}
	if err := options.Parse(arguments[1:]); errors.Is(err, flag.ErrHelp) {
		return false, err
	} else if err != nil {
		return false, usageError(err.Error())
	}
	if options.NArg() == 0 {
		return false, usageError("the command is missing")
	}
	operands := options.Args()[1:]
	command, known := commands[options.Arg(0)]
	if !known || len(operands) < command.minOperands || len(operands) > command.maxOperands {
		return false, usageError("no such command, or a wrong number of operands")
	}
	with, err := readCredential(options)
	if err != nil {
		return false, err
	}
	if command.run == nil {
		if with.key == nil {
			return false, usageError("write needs --key-file")
		}
		return true, writeSnapshot(root, operands[0], with.key)
	}
	s, err := openSnapshot(root, with)
	if err != nil {
		return false, err
	}
	defer s.files.Close()
	return command.run(s, operands)
}

// credentialFiles are the options, and what makes a credential of what is in the file.
var credentialFiles = map[string]func(contents []byte) (credential, error){
	"key-file":        parseKey,
	"identity":        parseIdentities,
	"passphrase-file": parsePassphrase,
}

const maxCredentialBytes = 1 << 20

func readCredential(options *flag.FlagSet) (credential, error) {
	var given []*flag.Flag
	options.Visit(func(option *flag.Flag) { given = append(given, option) })
	if len(given) == 0 {
		return credential{}, nil
	}
	if len(given) > 1 {
		return credential{}, usageError("more than one of --key-file, --identity and --passphrase-file")
	}
	var with credential
	contents, err := readSmall(given[0].Value.String())
	if err == nil {
		with, err = credentialFiles[given[0].Name](contents)
	}
	if err != nil {
		return credential{}, usageError(fmt.Sprintf("--%s: %v", given[0].Name, err))
	}
	return with, nil
}

func readSmall(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	contents, err := io.ReadAll(io.LimitReader(file, maxCredentialBytes+1))
	if err == nil && len(contents) > maxCredentialBytes {
		err = errors.New("the file is too long")
	}
	return contents, err
}

func withoutLineEnd(contents []byte) []byte {
	if bytes.HasSuffix(contents, []byte("\r\n")) {
		return contents[:len(contents)-2]
	}
	return bytes.TrimSuffix(contents, []byte("\n"))
}

func parseKey(contents []byte) (credential, error) {
	if len(contents) == keyBytes {
		return credential{key: contents}, nil
	}
	key, err := hex.DecodeString(string(withoutLineEnd(contents)))
	if err != nil || len(key) != keyBytes {
		return credential{}, errors.New("the file holds neither 32 bytes nor 64 hexadecimal digits")
	}
	return credential{key: key}, nil
}

func parseIdentities(contents []byte) (credential, error) {
	identities, err := age.ParseIdentities(bytes.NewReader(contents))
	if err != nil {
		return credential{}, errors.New("the file holds something else than identities of age, or none")
	}
	return credential{age: ageIdentity{false, identities}}, nil
}

func parsePassphrase(contents []byte) (credential, error) {
	identity, err := age.NewScryptIdentity(string(withoutLineEnd(contents)))
	if err != nil {
		return credential{}, errors.New("the passphrase is empty")
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	return credential{age: ageIdentity{true, []age.Identity{identity}}}, nil
}

func main() {
	signal.Ignore(syscall.SIGPIPE) // so that a write to a closed pipe is an error like others
	good, err := run(os.Args[1:])
	var wrongUsage usageError
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
	case errors.As(err, &wrongUsage):
		fmt.Fprintf(os.Stderr, "vmsnap-reader: %s\n%s", printable(err.Error()), usage)
		os.Exit(exitUsage)
	case errors.Is(err, syscall.EPIPE): // whoever read the output went away
		os.Exit(exitRefused)
	case err != nil:
		report(err)
		os.Exit(exitRefused)
	case !good:
		os.Exit(exitRefused)
	}
}
