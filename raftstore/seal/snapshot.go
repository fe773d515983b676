package seal

import (
	"cmp"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// A sealed snapshot is one file:
//
//	magic     8 bytes
//	length    4 bytes, of the box that follows
//	box       the raft.SnapshotMeta and a key of the file's own, see [Keyring.seal]
//	chunks    65536 bytes of content each (the last may be shorter), each with a tag
//
// The chunks are the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár: "Online
// Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", 2015), as age has
// it: AES-256-GCM under the file's key, a counter and a last-chunk flag in the nonce,
// so that chunks cannot be swapped, left out or cut off. The meta's box is the
// additional data of every chunk.
const (
	snapshotMagic  = "DCRSNAP1"
	snapshotSuffix = ".sealed"
	temporary      = ".tmp"
	chunkSize      = 64 << 10
	sealedChunk    = chunkSize + boxTag
	maxMeta        = 1 << 20
)

// SnapshotStore is a raft.SnapshotStore of sealed files. All methods are safe for
// concurrent use; raft writes one snapshot at a time.
type SnapshotStore struct {
	dir    string
	retain int
	ring   *Keyring
	disk   *Disk
	log    *slog.Logger
	reap   sync.Mutex

	mu    sync.Mutex
	sinks map[*sink]KeyID // being written: their keys are in use
}

var _ raft.SnapshotStore = (*SnapshotStore)(nil)

// OpenSnapshots opens the snapshots in the folder, which is made if absent, and
// removes what crashes have left there. The newest retain snapshots are kept, at least
// one. Snapshots of raft.FileSnapshotStore in the same folder can still be read, and
// count. Logger may be nil.
func OpenSnapshots(dir string, retain int, ring *Keyring, disk *Disk, logger *slog.Logger) (*SnapshotStore, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	s := &SnapshotStore{dir: dir, retain: max(1, retain), ring: ring, disk: disk, log: logger, sinks: map[*sink]KeyID{}}
	if err := makeDir("snapshots", dir); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), temporary) {
			if err := remove("snapshot", filepath.Join(dir, e.Name())); err != nil {
				return nil, fmt.Errorf("open snapshots: %w", err)
			}
		}
	}
	return s, nil
}

// snapshotHeader is what the box of a snapshot's file holds.
type snapshotHeader struct {
	Meta raft.SnapshotMeta
	Key  []byte
}

// Create implements raft.SnapshotStore.
func (s *SnapshotStore) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	if version != 1 {
		return nil, fmt.Errorf("create snapshot: version %d is not known", version)
	}
	header := snapshotHeader{
		Meta: raft.SnapshotMeta{
			Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixMilli()), Index: index, Term: term,
			Configuration: configuration, ConfigurationIndex: configurationIndex,
		},
		Key: make([]byte, keySize),
	}
	rand.Read(header.Key) // never fails
	k := &sink{store: s, id: header.Meta.ID, buffer: make([]byte, 0, sealedChunk)}
	if err := s.disk.doFile(func() error { return k.begin(header) }); err != nil {
		k.discard()
		return nil, fmt.Errorf("create snapshot %s: %w", k.id, err)
	}
	return k, nil
}

// sink is a snapshot that is being written. It holds one chunk in memory.
type sink struct {
	store  *SnapshotStore
	id     string
	file   *os.File
	aead   cipher.AEAD
	box    []byte // the additional data
	chunk  uint32
	buffer []byte
	done   bool
	err    error // what went wrong first
}

// ID implements raft.SnapshotSink.
func (k *sink) ID() string { return k.id }

func (k *sink) path() string { return filepath.Join(k.store.dir, k.id+snapshotSuffix) }

func (k *sink) begin(header snapshotHeader) (err error) {
	if err := k.sealHeader(header); err != nil {
		return err
	}
	if k.aead, err = newAEAD(header.Key); err != nil {
		return err
	}
	k.file, err = os.OpenFile(k.path()+temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	reach("snapshot.begin")
	start := binary.BigEndian.AppendUint32([]byte(snapshotMagic), uint32(len(k.box)))
	_, err = k.file.Write(append(start, k.box...))
	return err
}

func (k *sink) sealHeader(header snapshotHeader) error {
	plain, err := json.Marshal(header)
	if err != nil {
		return err
	}
	k.store.mu.Lock() // so that keys sees what has been sealed
	defer k.store.mu.Unlock()
	if k.box, err = k.store.ring.seal(append(newBox(len(plain)), plain...), snapshotName(k.id)); err != nil {
		return err
	}
	k.store.sinks[k] = KeyID(k.box[2:])
	return nil
}

// snapshotName binds the box to the name of the file.
func snapshotName(id string) []byte { return []byte("snapshot " + id) }

// Write implements io.Writer.
func (k *sink) Write(p []byte) (written int, err error) {
	if k.done {
		return 0, fmt.Errorf("write snapshot %s: %w", k.id, fs.ErrClosed)
	}
	for len(p) > 0 && k.err == nil {
		if len(k.buffer) == chunkSize { // more follows, so it is not the last one
			k.flush(false)
		}
		n := min(len(p), chunkSize-len(k.buffer))
		k.buffer = append(k.buffer, p[:n]...)
		p = p[n:]
		written += n
	}
	return written, k.err
}

// flush writes a chunk; the first error stays.
func (k *sink) flush(last bool) {
	if k.err != nil {
		return
	}
	sealed := k.aead.Seal(k.buffer[:0], chunkNonce(k.chunk, last), k.buffer, k.box)
	k.err = k.store.disk.doFile(func() error {
		_, err := k.file.Write(sealed)
		return err
	})
	if k.err != nil {
		k.err = fmt.Errorf("write snapshot %s: %w", k.id, k.err)
	}
	k.chunk++ // 2^32 of them are 256 TiB
	k.buffer = k.buffer[:0]
}

func chunkNonce(n uint32, last bool) []byte {
	nonce := make([]byte, 12)
	binary.BigEndian.PutUint32(nonce[7:], n)
	if last {
		nonce[11] = 1
	}
	return nonce
}

// Close implements io.Closer. The snapshot counts once it returned nil. Calling it
// again returns the same.
func (k *sink) Close() error {
	if k.done {
		return k.err
	}
	k.flush(true)
	k.done = true
	if k.err == nil {
		k.err = k.store.disk.doFile(k.finish)
	}
	if k.err != nil {
		k.discard()
		return fmt.Errorf("finish snapshot %s: %w", k.id, k.err)
	}
	k.forget()
	k.store.reapOld()
	return nil
}

func (k *sink) forget() {
	k.store.mu.Lock()
	defer k.store.mu.Unlock()
	delete(k.store.sinks, k)
}

// finish makes the file durable, then its name.
func (k *sink) finish() error {
	reach("snapshot.fsync")
	err := errors.Join(k.file.Sync(), k.file.Close())
	k.file = nil
	if err != nil {
		return err
	}
	return rename("snapshot", k.path()+temporary, k.path())
}

// Cancel implements raft.SnapshotSink.
func (k *sink) Cancel() error {
	if k.done {
		return nil
	}
	k.done = true
	if k.err == nil {
		k.err = fmt.Errorf("snapshot %s was cancelled", k.id)
	}
	return k.discard()
}

func (k *sink) discard() error {
	k.forget()
	if k.file != nil {
		k.file.Close()
	}
	if err := os.Remove(k.path() + temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	return nil
}

// reapOld removes what is over the retention. Trouble with that does not make the new
// snapshot worse: it is logged, and the next one tries again.
func (s *SnapshotStore) reapOld() {
	s.reap.Lock()
	defer s.reap.Unlock()
	list, err := s.files()
	for i := s.retain; err == nil && i < len(list); i++ {
		err = remove("snapshot", filepath.Join(s.dir, list[i].name))
	}
	if err != nil {
		s.log.Warn("old snapshots could not be removed", "error", err)
	}
}

// snapshotFile is the name of a snapshot, sealed or not.
type snapshotFile struct {
	name, id   string
	term, when uint64
	index      uint64
	sealed     bool
}

// files returns the snapshots by their names, newest first.
func (s *SnapshotStore) files() ([]snapshotFile, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var list []snapshotFile
	for _, e := range entries {
		f := snapshotFile{name: e.Name()}
		f.id, f.sealed = strings.CutSuffix(f.name, snapshotSuffix)
		if n, err := fmt.Sscanf(f.id+"\n", "%d-%d-%d\n", &f.term, &f.index, &f.when); n == 3 && err == nil && f.sealed == !e.IsDir() {
			list = append(list, f)
		}
	}
	slices.SortFunc(list, func(a, b snapshotFile) int {
		return cmp.Or(cmp.Compare(b.term, a.term), cmp.Compare(b.index, a.index), cmp.Compare(b.when, a.when))
	})
	return list, nil
}

// List implements raft.SnapshotStore. A damaged snapshot among the newest is an error,
// not left out: raft would go back to an older one without a word.
func (s *SnapshotStore) List() ([]*raft.SnapshotMeta, error) {
	files, err := s.files()
	if err != nil {
		return nil, err
	}
	var list []*raft.SnapshotMeta
	for _, f := range files[:min(len(files), s.retain)] {
		meta, err := s.meta(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue // reaped meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
		list = append(list, meta)
	}
	return list, nil
}

func (s *SnapshotStore) meta(f snapshotFile) (*raft.SnapshotMeta, error) {
	if !f.sealed {
		meta, err := s.plainMeta(f.id)
		if err != nil {
			return nil, err
		}
		return &meta.SnapshotMeta, nil
	}
	r, err := s.openSealed(f.id)
	if err != nil {
		return nil, err
	}
	return &r.meta, r.Close()
}

// Open implements raft.SnapshotStore. Reading returns an error that matches
// [ErrCorrupt] at the first damaged chunk, and before any byte of it.
func (s *SnapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	r, err := s.openSealed(id)
	if err == nil {
		return &r.meta, r, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("open snapshot: %w", err)
	}
	meta, plain, err := s.openPlain(id)
	if err != nil {
		return nil, nil, fmt.Errorf("open snapshot: %w", err)
	}
	return meta, plain, nil
}

// keys returns the data keys that the snapshots need.
func (s *SnapshotStore) keys() ([]KeyID, error) {
	s.mu.Lock() // first those that are being written: they may be finished meanwhile
	keys := slices.Collect(maps.Values(s.sinks))
	s.mu.Unlock()
	files, err := s.files()
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if !f.sealed {
			continue
		}
		r, err := s.openSealed(f.id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // reaped meanwhile
		}
		if err != nil {
			return nil, err
		}
		r.file.Close()
		keys = append(keys, r.key)
	}
	return keys, nil
}
