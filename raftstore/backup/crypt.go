package backup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"filippo.io/age"
)

// Protection says who can read an archive: the holders of the keys of Recipients, or
// everybody. Exactly one of its fields is to be set, so that nobody gets a plain
// archive by forgetting something.
type Protection struct {
	Recipients []age.Recipient
	Plaintext  bool
}

// Check says what is wrong with p.
func (p Protection) Check() error {
	switch {
	case p.Plaintext && len(p.Recipients) > 0:
		return errors.New("a snapshot is either encrypted or plain: drop the recipients, or the wish for plaintext")
	case !p.Plaintext && len(p.Recipients) == 0:
		return errors.New("a snapshot holds the cluster's secrets: name a recipient or a passphrase to encrypt it with, or ask for plaintext")
	}
	return nil
}

// wrap returns a writer of the plain archive that writes to w what p asks for. Only
// its Close makes the archive complete; it does not close w.
func (p Protection) wrap(w io.Writer) (io.WriteCloser, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	if p.Plaintext {
		return nopCloser{w}, nil
	}
	enc, err := age.Encrypt(w, p.Recipients...)
	if err != nil {
		return nil, fmt.Errorf("encrypt snapshot: %w", err)
	}
	return enc, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// Recipients reads public keys ("age1...").
func Recipients(keys ...string) ([]age.Recipient, error) {
	var list []age.Recipient
	for _, key := range keys {
		r, err := age.ParseRecipients(strings.NewReader(key))
		if err != nil {
			return nil, fmt.Errorf("recipient %.12q…: %w (expected a public key such as age-keygen prints: age1...)", key, err)
		}
		list = append(list, r...)
	}
	return list, nil
}

// Passphrase reads a passphrase from the first line of a file, and returns what
// encrypts and what decrypts with it.
func Passphrase(path string) (age.Recipient, age.Identity, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("passphrase: %w", err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	line = strings.TrimSuffix(line, "\r")
	if line == "" {
		return nil, nil, fmt.Errorf("passphrase: the first line of %s is empty", path)
	}
	to, err := age.NewScryptRecipient(line)
	if err != nil {
		return nil, nil, fmt.Errorf("passphrase: %w", err)
	}
	by, err := age.NewScryptIdentity(line)
	if err != nil {
		return nil, nil, fmt.Errorf("passphrase: %w", err)
	}
	return to, by, nil
}

// Identities reads the private keys in a file, as age-keygen writes them.
func Identities(path string) ([]age.Identity, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	defer f.Close()
	list, err := age.ParseIdentities(f)
	if err != nil {
		return nil, fmt.Errorf("identity %s: %w", path, err)
	}
	return list, nil
}

// Keys say how an archive is read. Without Identities only a plain one can be, and
// with them only an encrypted one: who has a key expects the archive to need it.
type Keys struct {
	Identities []age.Identity
}

// ErrEncrypted means that the archive cannot be read without a key.
var ErrEncrypted = errors.New("the snapshot is encrypted: name the identity file or the passphrase that decrypts it")

// ErrNotEncrypted means that the archive is plain though a key was given.
var ErrNotEncrypted = errors.New("the snapshot is not encrypted, though a key to decrypt it was given: somebody may have put it there in the place of another; to read it all the same, ask for plaintext instead")

// Lock is what can be said of an archive without its key.
type Lock struct {
	Encrypted bool `json:"encrypted"`
	// Recipients is how many keys open it, Passphrase whether a passphrase does.
	Recipients int  `json:"recipients,omitempty"`
	Passphrase bool `json:"passphrase,omitempty"`
}

// The first bytes of the two kinds of archives: age's and Zstandard's.
var (
	ageMagic  = []byte("age-encryption.org/v1\n")
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// maxHeader bounds the header of an encrypted archive: about a hundred recipients.
const maxHeader = 64 << 10

// look reads how the archive is locked and leaves it as it was.
func look(r *bufio.Reader) (Lock, error) {
	start, err := r.Peek(len(ageMagic))
	switch {
	case bytes.Equal(start, ageMagic):
	case bytes.HasPrefix(start, zstdMagic):
		return Lock{}, nil
	case err != nil && !errors.Is(err, io.EOF):
		return Lock{}, damage(err)
	default:
		return Lock{}, corrupt("it begins with %.20q: no snapshot of decree does", start)
	}
	header, err := r.Peek(maxHeader)
	if err != nil && !errors.Is(err, io.EOF) {
		return Lock{}, damage(err)
	}
	lock := Lock{Encrypted: true}
	for line := range bytes.Lines(header) {
		switch {
		case bytes.HasPrefix(line, []byte("-> scrypt ")):
			lock.Passphrase = true
		case bytes.HasPrefix(line, []byte("-> ")):
			lock.Recipients++
		case bytes.HasPrefix(line, []byte("---")):
			return lock, nil
		}
	}
	return Lock{}, corrupt("its header has no end")
}

// unlock returns the plain archive in r. It returns the lock with every error that is
// about the keys.
func unlock(r io.Reader, keys Keys) (io.Reader, Lock, error) {
	buffered := bufio.NewReaderSize(&source{r}, maxHeader)
	lock, err := look(buffered)
	switch {
	case err != nil:
		return nil, lock, err
	case !lock.Encrypted && len(keys.Identities) > 0:
		return nil, lock, ErrNotEncrypted
	case !lock.Encrypted:
		return buffered, lock, nil
	case len(keys.Identities) == 0:
		return nil, lock, ErrEncrypted
	}
	plain, err := age.Decrypt(buffered, keys.Identities...)
	if err != nil {
		var none *age.NoIdentityMatchError
		if errors.As(err, &none) {
			return nil, lock, fmt.Errorf("decrypt snapshot: none of the given keys opens it: %w", err)
		}
		return nil, lock, damage(fmt.Errorf("decrypt: %w", err))
	}
	return plain, lock, nil
}
