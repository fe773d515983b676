package state_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// split cuts a transaction into n parts.
func split(t testing.TB, tx command.Txn, n int) []command.Txn {
	t.Helper()
	data, err := command.EncodeTxn(&tx)
	if err != nil {
		t.Fatal(err)
	}
	txns, err := command.Split(data, (len(data)+n-1)/n)
	if err != nil || len(txns) != n {
		t.Fatalf("%d parts, %v", len(txns), err)
	}
	return txns
}

// part applies a part; unlike do it allows that a rejection drops the parts before it.
func (w *world) part(tx command.Txn) command.Result {
	w.index++
	if tx.Time == 0 {
		tx.Time = w.now
	}
	var r command.Result
	w.s, r, w.events = state.Reduce(w.s, w.index, tx)
	return r
}

func large(name string) command.Txn {
	return command.Txn{Key: "large/" + name, Actor: "user/x", Mutations: []api.Mutation{
		mutation(api.Create, configMap(name+"-1", "1")), mutation(api.Create, configMap(name+"-2", strings.Repeat("x", 500))), mutation(api.Create, node(name)),
	}}
}

func TestPartsMakeOneTransaction(t *testing.T) {
	w := newWorld(t)
	parts := split(t, large("a"), 4)
	for i, n := range []int{2, 0, 2, 3} {
		before := w.s.Revision()
		r := w.part(parts[n])
		if r.Rejected != nil || r.Missing != []int{3, 2, 2, 1}[i] || r.Revision != before || w.s.Revision() != before || len(w.events) > 0 {
			t.Fatalf("part %d: %+v, %d events", n, r, len(w.events))
		}
		w.s = reread(t, w.s)
	}
	r := w.part(parts[1])
	if r.Rejected != nil || r.Missing != 0 || r.Revision != 4 || len(w.events) != 3 {
		t.Fatalf("the last part: %+v, %d events", r, len(w.events))
	}
	if n, size := w.s.Unfinished(); n != 0 || size != 0 {
		t.Fatalf("%d transactions with %d bytes are kept", n, size)
	}
	w.must(txn(api.Delete, configMap("a-1", "")))
	hash := w.s.Hash()
	for _, again := range append(parts, large("a")) {
		if r := w.part(again); r.Rejected != nil || r.Revision != 4 || r.Missing != 0 || w.s.Hash() != hash {
			t.Fatalf("tried again after it was applied: %+v", r)
		}
	}
}

func TestRejectedInParts(t *testing.T) {
	w := newWorld(t)
	tx := large("a")
	tx.Mutations = append(tx.Mutations, mutation(api.Create, configMap("a-1", "again")))
	parts := split(t, tx, 2)
	w.part(parts[0])
	r := w.part(parts[1])
	if r.Rejected == nil || r.Rejected.Code != command.Invalid || !strings.Contains(r.Rejected.Error(), "twice") || w.s.Len(api.ConfigMaps) != 0 || w.s.Revision() != 1 {
		t.Fatalf("got %+v", r)
	}
	if n, _ := w.s.Unfinished(); n != 0 {
		t.Fatal("the parts of a rejected transaction are kept")
	}
	if r := w.part(parts[1]); r.Missing != 1 {
		t.Fatalf("the proposer is not told to send all of it again: %+v", r)
	}
	if r := w.part(parts[0]); r.Rejected == nil {
		t.Fatalf("got %+v", r)
	}
}

func TestPartsExpire(t *testing.T) {
	w := newWorld(t)
	parts := split(t, large("a"), 3)
	w.part(parts[0])
	w.now += state.PartsExpiry - 1
	if r := w.part(parts[1]); r.Missing != 1 {
		t.Fatalf("expired too early: %+v", r)
	}
	w.now += state.PartsExpiry - 1
	w.must(txn(api.Create, configMap("x", "1")))
	if n, _ := w.s.Unfinished(); n != 1 {
		t.Fatal("expired although a part came")
	}
	w.now++
	w.must(txn(api.Create, configMap("y", "1")))
	if n, _ := w.s.Unfinished(); n != 0 {
		t.Fatal("did not expire")
	}
	if r := w.part(parts[2]); r.Missing != 2 {
		t.Fatalf("after it expired: %+v", r)
	}
}

func TestBadParts(t *testing.T) {
	w := newWorld(t)
	good := split(t, large("a"), 3)
	with := func(edit func(*command.Txn, *command.Part)) command.Txn {
		tx, p := good[1], *good[1].Part
		tx.Part = &p
		edit(&tx, &p)
		return tx
	}
	w.must(good[0])
	for name, c := range map[string]struct {
		code command.Code
		txn  command.Txn
		word string
	}{
		"with a key":      {command.Invalid, with(func(t *command.Txn, _ *command.Part) { t.Key = "k" }), "something else"},
		"with mutations":  {command.Invalid, with(func(t *command.Txn, _ *command.Part) { t.Mutations = large("a").Mutations }), "something else"},
		"no data":         {command.Invalid, with(func(_ *command.Txn, p *command.Part) { p.Data = nil }), "0 bytes"},
		"index":           {command.Invalid, with(func(_ *command.Txn, p *command.Part) { p.Index = 3 }), "part 4 of 3"},
		"no id":           {command.Invalid, with(func(_ *command.Txn, p *command.Part) { p.ID = "" }), "id"},
		"future format":   {command.Invalid, with(func(_ *command.Txn, p *command.Part) { p.Format = command.Newest + 1 }), "format"},
		"other sum":       {command.Conflict, with(func(_ *command.Txn, p *command.Part) { p.Sum[0]++ }), "another transaction"},
		"other count":     {command.Conflict, with(func(_ *command.Txn, p *command.Part) { p.Count = 4 }), "another transaction"},
		"other content":   {command.Conflict, with(func(_ *command.Txn, p *command.Part) { p.Index, p.Data = 0, []byte("x") }), "other content"},
		"too much":        {command.Conflict, with(func(_ *command.Txn, p *command.Part) { p.Data = make([]byte, p.Total-2) }), "too much"},
		"no room":         {command.Busy, with(func(_ *command.Txn, p *command.Part) { p.ID, p.Total = "b", state.MaxUnfinished }), "try again"},
		"before settings": {command.Invalid, good[0], "no settings"},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{t: t, s: w.s, index: w.index, now: w.now}
			if name == "before settings" {
				w.s = state.New()
			}
			w.refuse(c.code, c.txn, c.word)
		})
	}
	// Bytes that are not what was announced are found out when all are there.
	w.part(good[1])
	bad := *good[2].Part
	bad.Data = bytes.Clone(bad.Data)
	bad.Data[0]++
	if r := w.part(command.Txn{Part: &bad}); r.Rejected == nil || !strings.Contains(r.Rejected.Error(), "checksum") {
		t.Fatalf("got %+v", r)
	}
	if n, _ := w.s.Unfinished(); n != 0 {
		t.Fatal("broken parts are kept")
	}
}

func TestNumberOfUnfinishedIsBounded(t *testing.T) {
	w := newWorld(t)
	for i := range state.MaxUnfinishedSets {
		if r := w.part(split(t, large(fmt.Sprint("n", i)), 2)[0]); r.Missing != 1 {
			t.Fatalf("got %+v", r)
		}
	}
	w.refuse(command.Busy, split(t, large("more"), 2)[0], "try again", "10 minutes")
	if r := w.part(split(t, large("n3"), 2)[1]); r.Rejected != nil || r.Missing != 0 {
		t.Fatalf("what was begun cannot be finished: %+v", r)
	}
	w.must(split(t, large("more"), 2)[0])
}

func TestPartsWithinParts(t *testing.T) {
	w := newWorld(t)
	for _, p := range split(t, split(t, large("a"), 2)[0], 2) {
		if r := w.part(p); r.Missing == 0 && (r.Rejected == nil || !strings.Contains(r.Rejected.Error(), "within parts")) {
			t.Fatalf("got %+v", r)
		}
	}
}

// TestSnapshotVersion: an older server is sent what it can read, as long as there is
// nothing new in it.
func TestSnapshotVersion(t *testing.T) {
	write := func(s *state.State) []byte {
		var buf bytes.Buffer
		if _, err := s.WriteTo(&buf); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	w := newWorld(t)
	w.must(txn(api.Create, configMap("a", "1")))
	old := write(w.s)
	if _, err := state.ReadFormat(bytes.NewReader(old), 1); err != nil || !bytes.HasPrefix(old, []byte("decree state 1\n")) {
		t.Fatalf("%.20q: %v", old, err)
	}
	server := &api.Server{}
	meta(server, "one")
	restored := bootstrap()
	restored.Restored = &command.Restored{ClusterID: "before", Revision: 7, Time: 8}
	for name, tx := range map[string]command.Txn{
		"parts":    split(t, large("a"), 2)[0],
		"server":   {Actor: "system", Mutations: []api.Mutation{mutation(api.Create, server)}},
		"restored": {Bootstrap: restored},
	} {
		t.Run(name, func(t *testing.T) {
			base := w.s
			if name == "restored" {
				base = state.New()
			}
			s, r, _ := state.Reduce(base, 9, tx)
			if r.Rejected != nil {
				t.Fatal(r.Rejected)
			}
			data := write(s)
			if _, err := state.ReadFormat(bytes.NewReader(data), 1); !errors.Is(err, state.ErrCorrupt) || !strings.Contains(err.Error(), "upgrade") {
				t.Fatalf("the version before reads it: %v", err)
			}
			again := reread(t, s)
			if again.Hash() != s.Hash() || again.Hash() == base.Hash() {
				t.Fatal("not the same after reading it")
			}
			if name == "restored" && *again.Settings().Restored != *restored.Restored {
				t.Fatalf("settings %+v", again.Settings())
			}
			copy(data, old[:15])
			if _, err := state.Read(bytes.NewReader(data)); !errors.Is(err, state.ErrCorrupt) {
				t.Fatalf("new content under the old version: %v", err)
			}
		})
	}
}

// TestLargeCommit is the size that was asked for: 10,000 objects, 30 MB.
func TestLargeCommit(t *testing.T) {
	w := sources(t, "shop")
	tx := commit("shop", "", "c1")
	for i := range 10_000 {
		tx.Mutations = append(tx.Mutations, mutation(api.Create, from(configMap(fmt.Sprint("c", i), strings.Repeat("x", 3000)), "shop")))
	}
	data, err := command.EncodeTxn(&tx)
	if err != nil {
		t.Fatal(err)
	}
	parts, err := command.Split(data, 1<<20)
	if err != nil || len(data) < 30<<20 {
		t.Fatalf("%d bytes, %v", len(data), err)
	}
	for _, p := range parts[:len(parts)-1] {
		if r := w.part(p); r.Rejected != nil || w.s.Len(api.ConfigMaps) != 0 {
			t.Fatalf("got %+v", r)
		}
	}
	if r := w.part(parts[len(parts)-1]); r.Rejected != nil || r.Missing != 0 || w.s.Len(api.ConfigMaps) != 10_000 {
		t.Fatalf("got %+v", r)
	}
}
