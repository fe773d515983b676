package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
)

// mark is what the log must at least hold, kept in a small file beside it.
//
// Every entry vouches for itself, but an entry that is gone cannot: a flipped bit in
// a page of bbolt makes the end of the log disappear, or an old version of a page come
// back, without any sign. The mark is written after the log was synced, so the log
// never legitimately holds less. It is not synced when it advances: after a power cut
// an older mark is still true, it only notices less. What must not be undone (the log
// may now hold less, nothing in the clear is accepted any more) is synced first.
type mark struct {
	ring *Keyring
	file *os.File
	seq  uint64
	markState

	plainTo atomic.Uint64 // the same as plain, for readers
}

type markState struct {
	index, term uint64 // of the last entry; term 0: not known
	stable      uint64 // version of the stable values
	plain       uint64 // entries up to this index were stored in the clear
}

// The file has two slots that are written in turn, so that a torn write or one
// damaged sector leaves the other.
const (
	slotSize = 512
	markSize = 2 * slotSize
)

var markName = []byte("mark")

// openMark reads the mark; it returns nil if there is none.
func openMark(path string, ring *Keyring) (*mark, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the log's mark: %w", err)
	}
	m := &mark{ring: ring, file: file}
	var data [markSize]byte
	_, err = file.ReadAt(data[:], 0)
	if err != nil {
		file.Close()
		return nil, corrupt("the log's mark "+path, "%w", err)
	}
	_, err0 := m.read(data[:slotSize])
	_, err1 := m.read(data[slotSize:])
	if err0 != nil && err1 != nil {
		file.Close()
		return nil, corrupt("the log's mark "+path, "%w", err0)
	}
	return m, nil
}

// createMark makes a mark.
func createMark(path string, ring *Keyring, s markState) (*mark, error) {
	m := &mark{ring: ring, markState: s}
	m.plainTo.Store(s.plain)
	var data [markSize]byte
	for i := range 2 {
		slot, err := m.encode(m.seq + uint64(i))
		if err != nil {
			return nil, err
		}
		copy(data[i*slotSize:], slot)
	}
	m.seq++
	err := writeFile("mark", path, data[:])
	if err == nil {
		m.file, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("write the log's mark: %w", err)
	}
	return m, nil
}

// read takes over what a slot says, unless that is older.
func (m *mark) read(slot []byte) (KeyID, error) {
	n := int(slot[0])
	if n > slotSize-1 {
		return KeyID{}, errTag
	}
	plain, err := m.ring.open(nil, slot[1:1+n], markName)
	if err != nil {
		return KeyID{}, err
	}
	if len(plain) != 5*8 {
		return KeyID{}, errTag
	}
	word := func(i int) uint64 { return binary.BigEndian.Uint64(plain[8*i:]) }
	if seq := word(0); seq >= m.seq {
		m.seq = seq
		m.markState = markState{index: word(1), term: word(2), stable: word(3), plain: word(4)}
		m.plainTo.Store(m.plain)
	}
	return KeyID(slot[3:]), nil
}

func (m *mark) encode(seq uint64) ([]byte, error) {
	box := newBox(5 * 8)
	for _, v := range []uint64{seq, m.index, m.term, m.stable, m.plain} {
		box = binary.BigEndian.AppendUint64(box, v)
	}
	box, err := m.ring.seal(box, markName)
	if err != nil {
		return nil, fmt.Errorf("write the log's mark: %w", err)
	}
	return append([]byte{byte(len(box))}, box...), nil
}

// advance writes the next slot.
func (m *mark) advance() error {
	slot, err := m.encode(m.seq + 1)
	if err != nil {
		return err
	}
	m.seq++
	if _, err := m.file.WriteAt(slot, int64(m.seq%2)*slotSize); err != nil {
		return fmt.Errorf("write the log's mark: %w", err)
	}
	return nil
}

// settle writes both slots, so that no older state is left, and syncs them. Its errors
// hide their cause: whatever it is, the mark is unknown now, and trying again is no way out.
func (m *mark) settle() error {
	m.plainTo.Store(m.plain)
	err := errors.Join(m.advance(), m.advance())
	if err == nil {
		reach("mark.fsync")
		err = m.file.Sync()
	}
	if err != nil {
		return fmt.Errorf("sync the log's mark: %v", err)
	}
	return nil
}
