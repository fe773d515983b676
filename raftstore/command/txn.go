package command

import (
	"encoding/binary"
	"fmt"

	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// Flags of a transaction and of a mutation.
const (
	hasCommit    = 1
	hasBootstrap = 2
	hasPart      = 4  // since format 2
	hasRestored  = 8  // since format 2
	hasNewKinds  = 16 // since format 2: a kind that format 2 brought
	hasAssigned  = 32 // since format 3: an object that format 3 brought
	hasExtended  = 64 // since format 3: settings that format 3 brought

	knownFlags1 = hasCommit | hasBootstrap
	knownFlags2 = knownFlags1 | hasPart | hasRestored | hasNewKinds
	knownFlags3 = knownFlags2 | hasAssigned | hasExtended

	hasObject = 1
	hasGrace  = 2
)

func appendTxn(b []byte, t *Txn) ([]byte, error) {
	if err := checkTxn(t); err != nil {
		return nil, err
	}
	b = appendString(b, t.Key)
	b = binary.AppendVarint(b, t.Time)
	b = appendString(b, t.Actor)
	b = appendString(b, t.Reason)
	b = append(b, flagsOf(t))
	var err error
	if t.Part != nil {
		if b, err = appendPart(b, t.Part); err != nil {
			return nil, err
		}
	}
	if t.Commit != nil {
		if b, err = appendCommit(b, t.Commit); err != nil {
			return nil, err
		}
	}
	if t.Bootstrap != nil {
		b = AppendBootstrap(b, t.Bootstrap)
	}
	b = binary.AppendUvarint(b, uint64(len(t.Mutations)))
	for i := range t.Mutations {
		if b, err = appendMutation(b, &t.Mutations[i]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func flagsOf(t *Txn) byte {
	var flags byte
	if t.Part != nil {
		flags |= hasPart
	}
	if t.Commit != nil {
		flags |= hasCommit
	}
	if t.Bootstrap != nil {
		flags |= hasBootstrap
		if t.Bootstrap.Restored != nil {
			flags |= hasRestored
		}
		if t.Bootstrap.extended() {
			flags |= hasExtended
		}
	}
	return flags | flagsOfMutations(t.Mutations)
}

func flagsOfMutations(ms []api.Mutation) (flags byte) {
	two, three := younger(ms)
	if two {
		flags |= hasNewKinds
	}
	if three {
		flags |= hasAssigned
	}
	return flags
}

// checkTxn makes sure that what is encoded can be decoded.
func checkTxn(t *Txn) error {
	if len(t.Mutations) > MaxMutations {
		return fmt.Errorf("%d mutations, at most %d are possible: %w", len(t.Mutations), MaxMutations, ErrTooLarge)
	}
	if len(t.Reason) > maxReason {
		return fmt.Errorf("reason of %d bytes, at most %d are possible: %w", len(t.Reason), maxReason, ErrTooLarge)
	}
	if err := checkNames(t.Key, t.Actor); err != nil {
		return err
	}
	if c := t.Commit; c != nil {
		if err := checkNames(c.Source, c.Parent); err != nil {
			return err
		}
	}
	if s := t.Bootstrap; s != nil {
		for _, mask := range []int{s.NodeMask, s.Second.NodeMask} {
			if mask < 0 || mask > 128 {
				return fmt.Errorf("node mask %d", mask)
			}
		}
		if s.Restored != nil {
			if err := checkNames(s.Restored.ClusterID); err != nil {
				return err
			}
		}
		return checkNames(s.ClusterID)
	}
	return nil
}

func checkNames(names ...string) error {
	for _, s := range names {
		if len(s) > maxName {
			return fmt.Errorf("name %.40q… of %d bytes, at most %d are possible: %w", s, len(s), maxName, ErrTooLarge)
		}
	}
	return nil
}

// txnHead reads what comes before the flags, and these. before is a transaction that
// may say the same.
func (r *reader) txnHead(t, before *Txn) (flags byte) {
	t.Key, t.Time = r.str(maxName), r.varint()
	t.Actor, t.Reason = r.same(maxName, before.Actor), r.same(maxReason, before.Reason)
	flags = r.byte()
	known := byte(knownFlags1)
	switch {
	case r.format >= 3:
		known = knownFlags3
	case r.format >= 2:
		known = knownFlags2
	}
	if flags&^known != 0 || flags&hasBootstrap == 0 && flags&(hasRestored|hasExtended) != 0 {
		r.fail("transaction flags %#x", flags)
	}
	return flags
}

func (r *reader) txn(t, before *Txn) {
	flags := r.txnHead(t, before)
	if flags&hasPart != 0 {
		t.Part = r.part()
	}
	if flags&hasCommit != 0 {
		t.Commit = r.commit()
	}
	if flags&hasBootstrap != 0 {
		t.Bootstrap = r.bootstrap(flags&hasRestored != 0, flags&hasExtended != 0)
	}
	if n := r.count(MaxMutations, 7); n > 0 {
		t.Mutations = make([]api.Mutation, n)
	}
	for i := range t.Mutations {
		r.mutation(&t.Mutations[i])
		if r.err != nil {
			return
		}
	}
	// Rules that depend on the content are those of the format that it says, or else
	// servers of two versions would make two things of it.
	if want := flagsOfMutations(t.Mutations); r.err == nil && want != flags&(hasNewKinds|hasAssigned) {
		r.fail("objects that are younger or older than the transaction's flags %#x say", flags)
	}
}

func appendCommit(b []byte, c *Commit) ([]byte, error) {
	b = appendString(b, c.Source)
	b = appendString(b, c.Parent)
	if c.Revision == nil {
		return append(b, 0), nil
	}
	return appendSized(b, c.Revision)
}

func (r *reader) commit() *Commit {
	c := &Commit{Source: r.str(maxName), Parent: r.str(maxName)}
	data := r.bytes(MaxObject + maxName + 16)
	if r.err != nil || len(data) == 0 {
		return c
	}
	o, err := DecodeObject(data)
	if err != nil {
		r.fail("commit of source %q: %w", c.Source, err)
		return c
	}
	revision, ok := o.(*api.Revision)
	if !ok {
		r.fail("commit of source %q carries a %T", c.Source, o)
	}
	c.Revision = revision
	return c
}

func appendMutation(b []byte, m *api.Mutation) ([]byte, error) {
	if err := checkNames(string(m.Key.Resource), m.Key.Namespace, m.Key.Name, string(m.UID)); err != nil {
		return nil, err
	}
	b = append(b, byte(m.Verb))
	b = appendString(b, string(m.Key.Resource))
	b = appendString(b, m.Key.Namespace)
	b = appendString(b, m.Key.Name)
	b = binary.AppendUvarint(b, m.Revision)
	b = appendString(b, string(m.UID))
	var flags byte
	if m.Object != nil {
		flags |= hasObject
	}
	if m.Grace != nil {
		flags |= hasGrace
	}
	b = append(b, flags)
	if m.Grace != nil {
		b = binary.AppendVarint(b, *m.Grace)
	}
	if m.Object == nil {
		return b, nil
	}
	return appendSized(b, m.Object)
}

// appendSized writes an object after its length.
func appendSized(b []byte, o api.Object) ([]byte, error) {
	kind, err := kindOf(o)
	if err != nil {
		return nil, err
	}
	if p, ok := o.(protobuf); ok { // whose size is known beforehand
		n := p.Size()
		b = binary.AppendUvarint(b, uint64(sizeOfUvarint(uint64(len(kind.Resource)))+len(kind.Resource)+1+n))
		return appendProtobuf(b, kind, o, p, n)
	}
	data, err := AppendObject(nil, o)
	if err != nil {
		return nil, err
	}
	return append(binary.AppendUvarint(b, uint64(len(data))), data...), nil
}

func (r *reader) mutation(m *api.Mutation) {
	m.Verb = api.Verb(r.byte())
	m.Key.Resource = r.resource()
	// Where there is an object, its names are those of the key: one copy will do. The
	// bytes stay what they are, whatever is read after them.
	namespace, name := r.bytes(maxName), r.bytes(maxName)
	m.Revision = r.uvarint()
	m.UID = types.UID(r.str(maxName))
	flags := r.byte()
	if flags&^(hasObject|hasGrace) != 0 {
		r.fail("mutation flags %#x", flags)
	}
	if flags&hasGrace != 0 {
		grace := r.varint()
		m.Grace = &grace
	}
	if flags&hasObject != 0 {
		m.Object = r.object()
	}
	m.Key.Namespace, m.Key.Name = text(namespace, m.Object, api.Object.GetNamespace), text(name, m.Object, api.Object.GetName)
	if r.err != nil && flags&hasObject != 0 && m.Object == nil {
		r.err = fmt.Errorf("%s: %w", m.Key, r.err)
	}
}

// text is b as a string, which is what of says about o when that is the same.
func text(b []byte, o api.Object, of func(api.Object) string) string {
	if o != nil {
		if s := of(o); s == string(b) {
			return s
		}
	}
	return string(b)
}

func (r *reader) object() api.Object {
	data := r.bytes(MaxObject + maxName + 16)
	if r.err != nil {
		return nil
	}
	o, err := DecodeObject(data)
	if err != nil {
		r.fail("%w", err)
		return nil
	}
	return o
}

// resource reads the name of a resource; known ones take no memory.
func (r *reader) resource() api.Resource {
	b := r.bytes(maxName)
	if kind, ok := api.KindFor(api.Resource(b)); ok {
		return kind.Resource
	}
	return api.Resource(b)
}
