package command

import (
	"encoding/binary"
	"fmt"

	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// Version is the format that [EncodeEntry] writes, the first byte of every entry.
const Version = 1

// Bounds of the format. An encoder refuses what a decoder would refuse.
const (
	MaxEntry     = 32 << 20 // bytes of one log entry
	MaxTxns      = 4096     // transactions in one entry
	MaxMutations = 200_000  // mutations in one transaction
	maxName      = 1024     // bytes of a key, name, actor or uid
	maxReason    = 4096     // bytes of a reason
)

// VersionError says that an entry was written by a version of Decree that this one
// does not understand. Such an entry stops the server; it is never skipped.
type VersionError struct{ Got byte }

// Error implements error.
func (e *VersionError) Error() string {
	return fmt.Sprintf("log format %d is not known, this version of decree understands format %d: run the version that wrote it", e.Got, Version)
}

// EncodeTxn returns the encoding of t for [EncodeEntry]. It returns an error
// matching [ErrTooLarge] if t exceeds a bound of the format.
func EncodeTxn(t *Txn) ([]byte, error) {
	b, err := appendTxn(nil, t)
	if err != nil {
		return nil, fmt.Errorf("encode transaction of %s: %w", t.Actor, err)
	}
	if len(b) > MaxEntry-16 {
		return nil, fmt.Errorf("encode transaction of %s: %d bytes in %d mutations, at most %d are possible (split the commit): %w",
			t.Actor, len(b), len(t.Mutations), MaxEntry-16, ErrTooLarge)
	}
	return b, nil
}

// EncodeEntry joins encoded transactions into one log entry.
func EncodeEntry(txns ...[]byte) ([]byte, error) {
	size := 16
	for _, t := range txns {
		size += len(t) + binary.MaxVarintLen32
	}
	b := append(make([]byte, 0, size), Version)
	b = binary.AppendUvarint(b, uint64(len(txns)))
	for _, t := range txns {
		b = append(binary.AppendUvarint(b, uint64(len(t))), t...)
	}
	if len(b) > MaxEntry || len(txns) > MaxTxns {
		return nil, fmt.Errorf("encode entry: %d transactions in %d bytes: %w", len(txns), len(b), ErrTooLarge)
	}
	return b, nil
}

// DecodeEntry decodes one log entry. Nothing in the result shares memory with b.
// It returns a [*VersionError] for an unknown format, and an error matching
// [ErrMalformed] for anything that no encoder writes; it never panics.
func DecodeEntry(b []byte) ([]Txn, error) {
	if len(b) > MaxEntry {
		return nil, fmt.Errorf("decode entry of %d bytes: %w", len(b), ErrTooLarge)
	}
	r := reader{b: b}
	version := r.byte()
	if r.err == nil && version != Version {
		return nil, &VersionError{Got: version}
	}
	txns := make([]Txn, r.count(MaxTxns, 1))
	for i := range txns {
		part := reader{b: r.bytes(MaxEntry)}
		if r.err != nil {
			break
		}
		txns[i] = part.txn()
		if part.err == nil && len(part.b) > 0 {
			part.fail("%d bytes too many", len(part.b))
		}
		if part.err != nil {
			return nil, fmt.Errorf("decode transaction %d of %d: %w", i+1, len(txns), part.err)
		}
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes too many", len(r.b))
	}
	if r.err != nil {
		return nil, fmt.Errorf("decode entry: %w", r.err)
	}
	return txns, nil
}

// Flags of a transaction and of a mutation.
const (
	hasCommit    = 1
	hasBootstrap = 2

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
	var flags byte
	if t.Commit != nil {
		flags |= hasCommit
	}
	if t.Bootstrap != nil {
		flags |= hasBootstrap
	}
	b = append(b, flags)
	var err error
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

// checkTxn makes sure that what is encoded can be decoded.
func checkTxn(t *Txn) error {
	if len(t.Mutations) > MaxMutations {
		return fmt.Errorf("%d mutations, at most %d are possible: %w", len(t.Mutations), MaxMutations, ErrTooLarge)
	}
	if len(t.Reason) > maxReason {
		return fmt.Errorf("reason of %d bytes, at most %d are possible: %w", len(t.Reason), maxReason, ErrTooLarge)
	}
	names := []string{t.Key, t.Actor}
	if c := t.Commit; c != nil {
		names = append(names, c.Source, c.Parent)
	}
	if s := t.Bootstrap; s != nil {
		names = append(names, s.ClusterID)
		if s.NodeMask < 0 || s.NodeMask > 128 {
			return fmt.Errorf("node mask %d", s.NodeMask)
		}
	}
	return checkNames(names...)
}

func checkNames(names ...string) error {
	for _, s := range names {
		if len(s) > maxName {
			return fmt.Errorf("name %.40q… of %d bytes, at most %d are possible: %w", s, len(s), maxName, ErrTooLarge)
		}
	}
	return nil
}

func (r *reader) txn() Txn {
	t := Txn{Key: r.str(maxName), Time: r.varint(), Actor: r.str(maxName), Reason: r.str(maxReason)}
	flags := r.byte()
	if flags&^(hasCommit|hasBootstrap) != 0 {
		r.fail("transaction flags %#x", flags)
	}
	if flags&hasCommit != 0 {
		t.Commit = r.commit()
	}
	if flags&hasBootstrap != 0 {
		t.Bootstrap = r.bootstrap()
	}
	if n := r.count(MaxMutations, 7); n > 0 {
		t.Mutations = make([]api.Mutation, n)
	}
	for i := range t.Mutations {
		t.Mutations[i] = r.mutation()
		if r.err != nil {
			break
		}
	}
	return t
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

// AppendBootstrap appends the encoding of s to b.
func AppendBootstrap(b []byte, s *Bootstrap) []byte {
	b = appendString(b, s.ClusterID)
	b = appendPrefix(b, s)
	b = binary.AppendUvarint(b, uint64(s.NodeMask))
	dns, _ := s.DNS.MarshalBinary() // never fails
	return appendString(b, string(dns))
}

func appendPrefix(b []byte, s *Bootstrap) []byte {
	service, _ := s.ServiceCIDR.MarshalBinary() // never fails
	pod, _ := s.PodCIDR.MarshalBinary()
	return appendString(appendString(b, string(service)), string(pod))
}

// DecodeBootstrap decodes what [AppendBootstrap] wrote, all of b.
func DecodeBootstrap(b []byte) (*Bootstrap, error) {
	r := reader{b: b}
	s := r.bootstrap()
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes too many", len(r.b))
	}
	if r.err != nil {
		return nil, fmt.Errorf("decode cluster settings: %w", r.err)
	}
	return s, nil
}

func (r *reader) bootstrap() *Bootstrap {
	s := &Bootstrap{ClusterID: r.str(maxName)}
	service, pod := r.bytes(64), r.bytes(64)
	mask := r.uvarint()
	dns := r.bytes(64)
	if r.err != nil {
		return s
	}
	if mask > 128 {
		r.fail("node mask %d", mask)
		return s
	}
	s.NodeMask = int(mask)
	for _, err := range []error{s.ServiceCIDR.UnmarshalBinary(service), s.PodCIDR.UnmarshalBinary(pod), s.DNS.UnmarshalBinary(dns)} {
		if err != nil {
			r.fail("cluster settings: %w", err)
		}
	}
	return s
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
	data, err := AppendObject(nil, o)
	if err != nil {
		return nil, err
	}
	return append(binary.AppendUvarint(b, uint64(len(data))), data...), nil
}

func (r *reader) mutation() api.Mutation {
	m := api.Mutation{
		Verb:     api.Verb(r.byte()),
		Key:      api.Key{Resource: api.Resource(r.str(maxName)), Namespace: r.str(maxName), Name: r.str(maxName)},
		Revision: r.uvarint(),
		UID:      types.UID(r.str(maxName)),
	}
	flags := r.byte()
	if flags&^(hasObject|hasGrace) != 0 {
		r.fail("mutation flags %#x", flags)
	}
	if flags&hasGrace != 0 {
		grace := r.varint()
		m.Grace = &grace
	}
	if flags&hasObject != 0 {
		data := r.bytes(MaxObject + maxName + 16)
		if r.err != nil {
			return m
		}
		o, err := DecodeObject(data)
		if err != nil {
			r.fail("%s: %w", m.Key, err)
			return m
		}
		m.Object = o
	}
	return m
}
