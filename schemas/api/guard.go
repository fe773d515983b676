package api

import "strconv"

// RevisionOf is the revision at which o was stored, zero when o was never stored.
func RevisionOf(o Object) uint64 {
	n, err := strconv.ParseUint(o.GetResourceVersion(), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// Guarded returns the mutation that stores o, a changed copy of an object that was
// read, and that is rejected if the stored object changed since then.
func Guarded(verb Verb, o Object) Mutation {
	return Mutation{Verb: verb, Key: KeyOf(o), Object: o, Revision: RevisionOf(o), UID: o.GetUID()}
}
