// Package state is the replicated state machine: immutable tables of objects and a
// pure function, [Reduce], that turns one state and one transaction into the next.
//
// It has no clock, no randomness, no I/O and no goroutines: the same log gives the
// same bytes on every replica. Time comes from the transactions, identity from the
// cluster id and the revision counter. How entries get here, and who watches, is
// the business of raftstore.
package state

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"iter"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// State is everything the cluster knows at one revision. It is immutable: methods
// are safe for concurrent use, and the objects it hands out must not be modified.
// It implements [api.Reader].
type State struct {
	settings *command.Bootstrap // nil before the first transaction
	index    uint64             // log index of the last transaction that changed the state
	revision uint64
	time     int64 // milliseconds since 1970, the newest time seen

	tables []table // by kindInfo.index
	owned  table   // by uid of the controller, then key

	services [maxFamilies]pool // of each family: offset in the service range -> service
	nodes    pool              // number of the node's pod ranges -> node
	ports    pool              // node port -> service

	sources tree[string, source] // by name of the Source
	history history
	parts   []*parts // in the order in which they were begun
}

type table = tree[string, api.Object]

// source is what the state machine remembers about a Source beside its object; it
// outlives the object, so that names of Revisions are never used twice.
type source struct {
	objects  int64  // objects that carry this source as origin
	sequence uint64 // number of the newest Revision
}

var _ api.Reader = (*State)(nil)

// New returns the state of a cluster before its first transaction: it accepts
// nothing but a Txn with Bootstrap.
func New() *State { return &State{tables: make([]table, len(kinds))} }

// Settings returns what the cluster was born with, nil before that. It must not be
// modified.
func (s *State) Settings() *command.Bootstrap { return s.settings }

// Revision implements [api.Reader].
func (s *State) Revision() uint64 { return s.revision }

// Index is the log index of the last transaction that changed the state.
func (s *State) Index() uint64 { return s.index }

// Time is the newest time that a transaction brought, in UTC; the zero time before
// the first one.
func (s *State) Time() time.Time {
	if s.time == 0 {
		return time.Time{}
	}
	return time.UnixMilli(s.time).UTC()
}

// Len is how many objects of a resource there are; zero for an unknown one.
func (s *State) Len(r api.Resource) int {
	if k, ok := kinds[r]; ok {
		return s.tables[k.index].Len()
	}
	return 0
}

// Get implements [api.Reader].
func (s *State) Get(k api.Key) (api.Object, bool) {
	kind, ok := kinds[k.Resource]
	if !ok {
		return nil, false
	}
	return s.tables[kind.index].get(tableKey(k.Namespace, k.Name))
}

// List implements [api.Reader].
func (s *State) List(r api.Resource, namespace string) iter.Seq[api.Object] {
	kind, ok := kinds[r]
	if !ok {
		return func(func(api.Object) bool) {}
	}
	if namespace == "" {
		return scan(s.tables[kind.index], "")
	}
	return scan(s.tables[kind.index], tableKey(namespace, ""))
}

// Owned implements [api.Reader]: ordered by resource, namespace, name.
func (s *State) Owned(uid types.UID) iter.Seq[api.Object] {
	return scan(s.owned, string(uid)+"\x00")
}

func scan(t table, prefix string) iter.Seq[api.Object] {
	return func(yield func(api.Object) bool) {
		for key, o := range t.from(prefix) {
			if !strings.HasPrefix(key, prefix) || !yield(o) {
				return
			}
		}
	}
}

// tableKey sorts by namespace, then name: no name contains a zero byte.
func tableKey(namespace, name string) string { return namespace + "\x00" + name }

func ownedKey(uid types.UID, k api.Key) string {
	return string(uid) + "\x00" + string(k.Resource) + "\x00" + k.Namespace + "\x00" + k.Name
}

// newUID derives the identity of the object that is created at a revision: a UUID
// of version 8 (RFC 9562) from a hash of cluster id and revision.
func newUID(clusterID string, revision uint64) types.UID {
	in := make([]byte, 0, 64) // on the stack
	in = append(append(append(in, "uid\x00"...), clusterID...), 0)
	h := sha256.Sum256(binary.BigEndian.AppendUint64(in, revision))
	h[6] = h[6]&0x0f | 0x80
	h[8] = h[8]&0x3f | 0x80
	out := hex.AppendEncode(make([]byte, 0, 36), h[:4])
	for i := 4; i < 10; i += 2 {
		out = hex.AppendEncode(append(out, '-'), h[i:i+2])
	}
	out = hex.AppendEncode(append(out, '-'), h[10:16])
	return types.UID(out)
}

// seconds is how objects carry time: whole seconds, as JSON does.
func seconds(ms int64) metav1.Time { return metav1.NewTime(time.Unix(ms/1000, 0).UTC()) }

// Event is one change of one object. Both objects are shared and immutable.
type Event struct {
	// Revision is the revision of this change; New has it as resourceVersion.
	Revision uint64
	Key      api.Key
	Old      api.Object // nil: the object did not exist before
	New      api.Object // nil: it does not exist any more
}
