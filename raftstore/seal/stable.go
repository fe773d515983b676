package seal

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"sync"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// StableStore is a raft.StableStore whose values (the term, the vote) are sealed. They
// are few and rarely change, so all of them are one box with a version number: none
// can get lost or become old alone, and a server never votes twice because a page of
// the disk came back from the past. All methods are safe for concurrent use.
type StableStore struct {
	log *LogStore // for its mark, ring and disk

	mu      sync.Mutex
	version uint64
	values  map[string][]byte
	key     KeyID
}

var _ raft.StableStore = (*StableStore)(nil)

var (
	stableKey  = []byte("decree.sealed")
	stableName = []byte("stable")
	// plainKeys are what hashicorp/raft stores, and what a version that did not seal
	// has left.
	plainKeys = []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand"}
)

type stableFile struct {
	Version uint64            `json:"version"`
	Values  map[string][]byte `json:"values"`
}

func openStable(l *LogStore) (*StableStore, error) {
	s := &StableStore{log: l, values: map[string][]byte{}}
	var box []byte
	err := guarded("the stable values", func() (err error) { box, err = get(l.inner, stableKey); return err })
	if err != nil {
		return nil, err
	}
	if box != nil {
		err = s.load(box)
	} else if l.mark.stable == 0 {
		err = s.adopt()
	}
	if err != nil {
		return nil, err
	}
	if s.version < l.mark.stable {
		return nil, corrupt("the stable values", "version %d was stored, and version %d is there", l.mark.stable, s.version)
	}
	return s, nil
}

// get returns nil for a key that is not there.
func get(inner raft.StableStore, key []byte) ([]byte, error) {
	v, err := inner.Get(key)
	if err != nil && err.Error() == raftboltdb.ErrKeyNotFound.Error() { // raft compares the text, too
		return nil, nil
	}
	return v, err
}

func (s *StableStore) load(box []byte) error {
	plain, err := s.log.ring.open(nil, box, stableName)
	var file stableFile
	if err == nil {
		err = json.Unmarshal(plain, &file)
	}
	if err != nil {
		return corrupt("the stable values", "%w", err)
	}
	s.version, s.key = file.Version, KeyID(box[2:])
	if file.Values != nil {
		s.values = file.Values
	}
	return nil
}

// adopt takes over the values that were stored in the clear.
func (s *StableStore) adopt() error {
	for _, key := range plainKeys {
		var v []byte
		err := guarded("the stable values", func() (err error) { v, err = get(s.log.inner, []byte(key)); return err })
		if err != nil {
			return err
		}
		if v != nil {
			s.values[key] = v
		}
	}
	return s.store(s.values)
}

// store makes values the current ones. The caller holds mu, or is alone.
func (s *StableStore) store(values map[string][]byte) error {
	plain, err := json.Marshal(stableFile{Version: s.version + 1, Values: values})
	if err != nil {
		return fmt.Errorf("store the stable values: %w", err)
	}
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	box, err := l.ring.seal(append(newBox(len(plain)), plain...), stableName)
	if err == nil {
		err = l.disk.do("stable", func() error { return l.inner.Set(stableKey, box) })
	}
	if err != nil {
		return fmt.Errorf("store the stable values: %w", err)
	}
	s.version++
	s.values, s.key = values, KeyID(box[2:])
	l.mark.stable = s.version
	l.disk.note(l.mark.advance())
	return nil
}

// Set implements raft.StableStore. Errors are those of [LogStore.StoreLogs].
func (s *StableStore) Set(key, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	values := maps.Clone(s.values)
	values[string(key)] = append([]byte{}, value...)
	return s.store(values)
}

// Get implements raft.StableStore. The error for a key that was never set reads "not
// found", as raft expects.
func (s *StableStore) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.values[string(key)]
	if !ok {
		return nil, raftboltdb.ErrKeyNotFound
	}
	return append([]byte{}, v...), nil
}

// SetUint64 implements raft.StableStore.
func (s *StableStore) SetUint64(key []byte, value uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

// GetUint64 implements raft.StableStore.
func (s *StableStore) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, corrupt("the stable values", "%s has %d bytes", key, len(v))
	}
	return binary.BigEndian.Uint64(v), nil
}

// reseal seals the values with the current key.
func (s *StableStore) reseal() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store(s.values)
}

// sealedWith returns the key that the values are sealed with.
func (s *StableStore) sealedWith() KeyID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.key
}
