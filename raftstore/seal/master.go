package seal

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// master is a master key, ready for use.
type master struct {
	id     string // says which one it is, and nothing about it
	aead   cipher.AEAD
	macKey []byte
}

func newMaster(key []byte) (*master, error) {
	id, err := derive(key, nil, "master id", 8)
	if err != nil {
		return nil, err
	}
	wrap, err := derive(key, nil, "wrap", keySize)
	if err != nil {
		return nil, err
	}
	m := &master{id: hex.EncodeToString(id)}
	if m.macKey, err = derive(key, nil, "keyring", keySize); err != nil {
		return nil, err
	}
	m.aead, err = newAEAD(wrap)
	return m, err
}

func (m *master) wrap(id KeyID, key []byte) []byte {
	nonce := make([]byte, m.aead.NonceSize())
	rand.Read(nonce) // never fails
	return m.aead.Seal(nonce, nonce, key, id[:])
}

func (m *master) unwrap(id KeyID, wrapped []byte) ([]byte, error) {
	n := m.aead.NonceSize()
	if len(wrapped) < n {
		return nil, errTag
	}
	key, err := m.aead.Open(nil, wrapped[:n], wrapped[n:], id[:])
	if err != nil || len(key) != keySize {
		return nil, errTag
	}
	return key, nil
}

// nextMaster is where a new master key waits until the keyring is wrapped with it.
func nextMaster(path string) string { return path + ".next" }

// findMaster returns the master key that has the id, and finishes a rotation of the
// master key that a crash interrupted.
func findMaster(path, id string) (*master, error) {
	m, err := readMaster(path)
	if err == nil && m.id == id {
		if _, err := os.Lstat(nextMaster(path)); err == nil { // of a rotation that came to nothing
			return m, remove("master", nextMaster(path))
		}
		return m, nil
	}
	next, nextErr := readMaster(nextMaster(path))
	if nextErr == nil && next.id == id {
		return next, rename("master", nextMaster(path), path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist: put back the file from where you keep a copy of it, without it the log and the snapshots of this server cannot be read (if it is lost, remove the data folder and join again)", ErrMasterKey, path)
	}
	if err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %s is another key (%s) than the one that the keyring needs (%s): put back the file that belongs to this data folder", ErrMasterKey, path, m.id, id)
}

// readMaster reads a master key; the error matches fs.ErrNotExist if there is none.
func readMaster(path string) (*master, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMasterKey, err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s can be read by others than its owner (mode %04o): chmod 600 it, and rotate it if others have seen it", ErrMasterKey, path, mode)
	}
	key, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMasterKey, err)
	}
	if len(key) != keySize {
		return nil, fmt.Errorf("%w: %s has %d bytes, a master key has %d random ones: put back the file that belongs to this data folder", ErrMasterKey, path, len(key), keySize)
	}
	return newMaster(key)
}

// createMaster draws a master key and writes it, durably, where none may be in use.
func createMaster(path string) (*master, error) {
	key := make([]byte, keySize)
	rand.Read(key) // never fails
	if err := makeDir("master", filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMasterKey, err)
	}
	if err := writeFile("master", path, key); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMasterKey, err)
	}
	return newMaster(key)
}
