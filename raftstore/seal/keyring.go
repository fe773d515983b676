package seal

import (
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// KeyID names a data key.
type KeyID [keyIDSize]byte

// String returns the id in hex.
func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// dataKey is one key of the ring. Everything written is sealed with the newest, and
// everything ever written can be read until [Keyring.Prune].
type dataKey struct {
	id      KeyID
	epoch   uint64
	created time.Time
	key     []byte
}

// Keyring holds the data keys of one server. On disk they are wrapped with a master
// key that is in a file of its own, so that the operator can keep that one elsewhere:
// without it the folder is worthless to a thief. All methods are safe for concurrent
// use.
type Keyring struct {
	path       string // of keyring.json
	masterPath string

	mu      sync.Mutex
	master  *master
	keys    []*dataKey // oldest first, never empty
	writer  *writer
	readers map[subkeyName]cipher.AEAD
}

// keyringFile is keyring.json. MAC covers the rest of it, so that a flipped byte is
// told from a wrong master key.
type keyringFile struct {
	Version int          `json:"version"`
	Master  string       `json:"master"` // which master key wraps the keys
	Keys    []wrappedKey `json:"keys"`
	MAC     []byte       `json:"mac"`
}

type wrappedKey struct {
	ID      string    `json:"id"`
	Epoch   uint64    `json:"epoch"`
	Created time.Time `json:"created"`
	// Wrapped is nonce and ciphertext of AES-256-GCM, with the id as additional data.
	// Random nonces do here: a master key wraps a handful of keys in its life.
	Wrapped []byte `json:"wrapped"`
}

const keyringVersion = 1

// OpenKeyring opens the keyring in dir, and makes one with a first key (epoch 0) if
// there is none. MasterPath is the file with the master key, dir/master.key if empty;
// it is made together with the keyring. The error matches [ErrMasterKey] or
// [ErrCorrupt], or is the system's.
func OpenKeyring(dir, masterPath string) (*Keyring, error) {
	if masterPath == "" {
		masterPath = filepath.Join(dir, "master.key")
	}
	k := &Keyring{path: filepath.Join(dir, "keyring.json"), masterPath: masterPath, readers: map[subkeyName]cipher.AEAD{}}
	data, err := os.ReadFile(k.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = k.create(dir)
	case err == nil:
		err = k.load(data)
	}
	if err != nil {
		return nil, fmt.Errorf("open keyring %s: %w", k.path, err)
	}
	return k, nil
}

// create makes the first key. The master key comes first: a crash in between leaves
// one that the next start uses.
func (k *Keyring) create(dir string) (err error) {
	if err := makeDir("keyring", dir); err != nil {
		return err
	}
	k.master, err = readMaster(k.masterPath)
	if errors.Is(err, fs.ErrNotExist) {
		k.master, err = createMaster(k.masterPath)
	}
	if err != nil {
		return err
	}
	k.keys = []*dataKey{newDataKey(0)}
	return k.write(k.master)
}

func newDataKey(epoch uint64) *dataKey {
	k := &dataKey{epoch: epoch, created: time.Now().UTC().Truncate(time.Second), key: make([]byte, keySize)}
	rand.Read(k.key) // never fails
	rand.Read(k.id[:])
	return k
}

// load reads an existing keyring.
func (k *Keyring) load(data []byte) error {
	var file keyringFile
	if err := json.Unmarshal(data, &file); err != nil {
		return corrupt("the keyring", "%w", err)
	}
	if file.Version > keyringVersion {
		return fmt.Errorf("it has version %d, this version of decree reads version %d: run the version that wrote it", file.Version, keyringVersion)
	}
	m, err := findMaster(k.masterPath, file.Master)
	if err != nil {
		return err
	}
	if !hmac.Equal(file.MAC, file.mac(m)) {
		return corrupt("the keyring", "%w", errTag)
	}
	k.master = m
	for _, w := range file.Keys {
		key := &dataKey{epoch: w.Epoch, created: w.Created}
		id, err := hex.DecodeString(w.ID)
		if err != nil || len(id) != keyIDSize {
			return corrupt("the keyring", "%q is no id of a key", w.ID)
		}
		key.id = KeyID(id)
		if key.key, err = m.unwrap(key.id, w.Wrapped); err != nil {
			return corrupt("the keyring", "key %s: %w", key.id, err)
		}
		k.keys = append(k.keys, key)
	}
	if len(k.keys) == 0 {
		return corrupt("the keyring", "it has no keys")
	}
	return nil
}

// mac authenticates everything of the file but itself.
func (f keyringFile) mac(m *master) []byte {
	f.MAC = nil
	data, err := json.Marshal(f)
	if err != nil {
		panic(err) // nothing in it can fail
	}
	h := hmac.New(sha256.New, m.macKey)
	h.Write(data)
	return h.Sum(nil)
}

// write stores the keys, wrapped with m. The caller holds mu, or is alone.
func (k *Keyring) write(m *master) error {
	file := keyringFile{Version: keyringVersion, Master: m.id}
	for _, key := range k.keys {
		file.Keys = append(file.Keys, wrappedKey{
			ID: key.id.String(), Epoch: key.epoch, Created: key.created, Wrapped: m.wrap(key.id, key.key),
		})
	}
	file.MAC = file.mac(m)
	data, err := json.MarshalIndent(file, "", "  ")
	if err != nil {
		return fmt.Errorf("write keyring: %w", err)
	}
	return writeFile("keyring", k.path, append(data, '\n'))
}

func (k *Keyring) current() *dataKey { return k.keys[len(k.keys)-1] }

func (k *Keyring) find(id KeyID) *dataKey {
	i := slices.IndexFunc(k.keys, func(key *dataKey) bool { return key.id == id })
	if i < 0 {
		return nil
	}
	return k.keys[i]
}

// Epoch returns the epoch of the key that seals what is written now.
func (k *Keyring) Epoch() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current().epoch
}

// Keys returns the ids of all keys, the current one last.
func (k *Keyring) Keys() []KeyID {
	k.mu.Lock()
	defer k.mu.Unlock()
	ids := make([]KeyID, len(k.keys))
	for i, key := range k.keys {
		ids[i] = key.id
	}
	return ids
}

// Rotate makes a new key for what is written from now on. It does nothing if the
// current key has this epoch or a later one, so that it can be called at every start.
func (k *Keyring) Rotate(epoch uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current().epoch >= epoch {
		return nil
	}
	k.keys = append(k.keys, newDataKey(epoch))
	if err := k.write(k.master); err != nil {
		k.keys = k.keys[:len(k.keys)-1]
		return fmt.Errorf("rotate the data key to epoch %d: %w", epoch, err)
	}
	k.writer = nil
	return nil
}

// RotateMaster wraps the data keys with a new master key, which replaces the old one
// in its file. No data are written again.
//
// The new master key is first written beside the old one; a crash after the keyring
// was written with it is finished by the next [OpenKeyring].
func (k *Keyring) RotateMaster() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	m, err := createMaster(nextMaster(k.masterPath))
	if err == nil {
		err = k.write(m)
	}
	if err == nil {
		err = rename("master", nextMaster(k.masterPath), k.masterPath)
	}
	if err != nil {
		return fmt.Errorf("rotate the master key %s: %w", k.masterPath, err)
	}
	k.master = m
	return nil
}

// Prune forgets the keys that are older than every key in use, and returns how many
// those were. A key that is in the ring but not in use stays if an older one is used:
// keys come and go in order. The current key always stays.
func (k *Keyring) Prune(used []KeyID) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	oldest := slices.IndexFunc(k.keys, func(key *dataKey) bool { return key == k.current() || slices.Contains(used, key.id) })
	if oldest == 0 {
		return 0, nil
	}
	before := k.keys
	k.keys = slices.Clone(k.keys[oldest:])
	if err := k.write(k.master); err != nil {
		k.keys = before
		return 0, fmt.Errorf("prune keys: %w", err)
	}
	for name := range k.readers {
		if k.find(KeyID(name[:keyIDSize])) == nil {
			delete(k.readers, name)
		}
	}
	return oldest, nil
}
