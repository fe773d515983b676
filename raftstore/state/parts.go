package state

import (
	"bytes"
	"fmt"
	"slices"

	"decree.dev/decree/raftstore/command"
)

// Bounds of transactions in parts. They are part of the state machine: replicas with
// different values diverge.
const (
	// MaxUnfinished bounds the bytes of all transactions in parts that are not complete.
	// One counts with its total from its first part on: what was begun can be finished.
	MaxUnfinished = command.MaxTxn
	// MaxUnfinishedSets bounds their number.
	MaxUnfinishedSets = 64
	// PartsExpiry is how long such a transaction is kept after its newest part, in
	// milliseconds of the log's time.
	PartsExpiry = 10 * 60 * 1000
)

// parts is a transaction of which some parts are still missing. It is immutable.
type parts struct {
	command.Part          // what is the same in all parts; no Index and Data
	data         [][]byte // by index, nil: missing
	have         int      // parts that are there
	size         int64    // bytes that are there
	touched      int64    // log time of the newest part
}

// Unfinished says how many transactions in parts are not complete, and how many bytes
// of them are there.
func (s *State) Unfinished() (transactions int, size int64) {
	for _, p := range s.parts {
		size += p.size
	}
	return len(s.parts), size
}

// partsKey is how the history remembers a transaction that came in parts.
func partsKey(id string) string { return "\x00parts\x00" + id }

// applyPart takes a part, and applies the transaction when it is the last one.
func (d *draft) applyPart(t *command.Txn) (command.Result, []Event) {
	if revision, ok := d.next.history.find(partsKey(t.Part.ID)); ok {
		return command.Result{Revision: revision}, nil
	}
	d.begin(t)
	set, isNew, rejection := d.addPart()
	if rejection != nil || !isNew {
		d.undo()
		result := command.Result{Revision: d.next.revision, Rejected: rejection}
		if set != nil {
			result.Missing = set.Count - set.have
		}
		return result, nil
	}
	d.keep()
	if missing := set.Count - set.have; missing > 0 {
		return command.Result{Revision: d.next.revision, Missing: missing}, nil
	}
	d.dropParts(set.ID)
	whole, err := command.Join(set.data, set.Sum, set.Format)
	if err != nil {
		return command.Result{Revision: d.next.revision, Rejected: &command.Rejection{Code: command.Invalid, Message: err.Error()}}, nil
	}
	result, events := d.apply(whole)
	if result.Rejected == nil {
		d.next.history.add(d.edit, partsKey(set.ID), result.Revision)
	}
	return result, events
}

// addPart puts the part beside those that are there. isNew is false if it was there.
func (d *draft) addPart() (set *parts, isNew bool, rejection *command.Rejection) {
	p := d.txn.Part
	if rejection := d.checkPart(); rejection != nil {
		return nil, false, rejection
	}
	d.expireParts()
	i := slices.IndexFunc(d.next.parts, func(s *parts) bool { return s.ID == p.ID })
	if i < 0 {
		if rejection := d.roomForParts(p.Total); rejection != nil {
			return nil, false, rejection
		}
		set = &parts{Part: *p, data: make([][]byte, p.Count)}
		set.Index, set.Data = 0, nil
		i = len(d.next.parts)
		d.next.parts = append(slices.Clip(d.next.parts), set)
	}
	set = d.next.parts[i]
	if set.Count != p.Count || set.Total != p.Total || set.Sum != p.Sum || set.Format != p.Format {
		return nil, false, conflictingPart(p, "belongs to another transaction than the parts with the same id")
	}
	if before := set.data[p.Index]; before != nil {
		if !bytes.Equal(before, p.Data) {
			return nil, false, conflictingPart(p, "came before, with other content")
		}
		return set, false, nil
	}
	if set.size+int64(len(p.Data)) > set.Total {
		return nil, false, conflictingPart(p, fmt.Sprintf("is too much: %d bytes were announced", set.Total))
	}
	set = set.with(p, d.now)
	d.next.parts = slices.Clone(d.next.parts)
	d.next.parts[i] = set
	return set, true, nil
}

// with returns the set with one part more.
func (s *parts) with(p *command.Part, now int64) *parts {
	next := *s
	next.data = slices.Clone(s.data)
	next.data[p.Index] = p.Data
	next.have++
	next.size += int64(len(p.Data))
	next.touched = now
	return &next
}

func (d *draft) checkPart() *command.Rejection {
	t := d.txn
	if t.Bootstrap == nil && d.next.settings == nil {
		return d.bootstrap()
	}
	if t.Key != "" || t.Commit != nil || t.Bootstrap != nil || len(t.Mutations) > 0 {
		return &command.Rejection{Code: command.Invalid, Message: "a part of a transaction carries something else beside it"}
	}
	if err := t.Part.Check(); err != nil {
		return &command.Rejection{Code: command.Invalid, Message: err.Error()}
	}
	return nil
}

func (d *draft) roomForParts(total int64) *command.Rejection {
	reserved := total
	for _, p := range d.next.parts {
		reserved += p.Total
	}
	if reserved <= MaxUnfinished && len(d.next.parts) < MaxUnfinishedSets {
		return nil
	}
	return &command.Rejection{Code: command.Busy, Message: fmt.Sprintf(
		"%d large transactions of %d bytes are on their way already: try again when they are complete, or have expired after %d minutes",
		len(d.next.parts), reserved-total, PartsExpiry/60_000)}
}

func conflictingPart(p *command.Part, what string) *command.Rejection {
	return &command.Rejection{Code: command.Conflict, Message: fmt.Sprintf("part %d of %d of transaction %q %s", p.Index+1, p.Count, p.ID, what)}
}

// expireParts forgets the transactions that nobody completes.
func (d *draft) expireParts() {
	expired := func(p *parts) bool { return d.now-p.touched >= PartsExpiry }
	if slices.ContainsFunc(d.next.parts, expired) {
		d.next.parts = slices.DeleteFunc(slices.Clone(d.next.parts), expired)
	}
}

func (d *draft) dropParts(id string) {
	d.next.parts = slices.DeleteFunc(slices.Clone(d.next.parts), func(p *parts) bool { return p.ID == id })
}
