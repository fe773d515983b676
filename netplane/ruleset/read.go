package ruleset

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/wire"
)

// Read looks at what the kernel holds, as the next Apply will see it, and compares it with
// what want says about chains and kinds of sets: a table that differs in those is made
// anew. want may be nil.
func (k *Kernel) Read(ctx context.Context, want *Table) error {
	_, err := wire.Settled(ctx, func() (*Table, error) {
		err := k.readOnce(want)
		return k.have, err
	}, func(have *Table) bool { return have == nil || k.Holds(want) }, func(before, _ *Table) bool { return k.Holds(before) })
	if err != nil {
		k.have, k.empty = nil, false
		return fmt.Errorf("read table %s %s: %w", k.f.Name, k.name, err)
	}
	return nil
}

// Holds reports whether the kernel held exactly want at the last Read or Apply.
func (k *Kernel) Holds(want *Table) bool {
	if want == nil {
		return k.empty
	}
	if k.have == nil || changed(k.have, want) {
		return false
	}
	sets1, sets2 := names(k.have.Sets, want.Sets)
	chains1, chains2 := names(k.have.Chains, want.Chains)
	return len(sets1)+len(sets2)+len(chains1)+len(chains2)+len(elementChanges(k.have, want)) == 0
}

func (k *Kernel) readOnce(want *Table) error {
	k.have, k.empty = nil, false
	found := false
	err := k.dump(unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE, 0, "", func(body []byte) {
		wire.Attributes(body, func(kind uint16, v []byte) { found = found || kind == unix.NFTA_TABLE_NAME && textOf(v) == k.name })
	})
	if err != nil {
		return err
	}
	if !found {
		k.empty = true
		return nil
	}
	if want == nil {
		return nil
	}
	have := &Table{Sets: map[string]*Set{}, Chains: map[string]*Chain{}}
	sound, err := k.readSets(have, want)
	if err != nil || !sound {
		return err
	}
	if sound, err = k.readChains(have, want); err != nil || !sound {
		return err
	}
	for name, s := range have.Sets {
		if sound, err := k.readElements(name, s); err != nil || !sound {
			return err
		}
	}
	k.have = have
	return nil
}

// dump asks for everything of a kind in the table.
func (k *Kernel) dump(get, answer, table uint16, set string, each func(body []byte)) error {
	k.c.Reset()
	at, _ := k.c.Message(unix.NFNL_SUBSYS_NFTABLES<<8|get, unix.NLM_F_DUMP, [4]byte{k.f.Number, unix.NFNETLINK_V0})
	if table != 0 {
		k.c.Attr(table, k.name+"\x00")
	}
	if set != "" {
		k.c.Attr(unix.NFTA_SET_ELEM_LIST_SET, set+"\x00")
	}
	k.c.End(at)
	return k.c.Dump(unix.NFNL_SUBSYS_NFTABLES<<8|answer, each)
}

func textOf(v []byte) string { return string(bytes.TrimRight(v, "\x00")) }

func numberOf(v []byte) uint32 {
	if len(v) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(v)
}

// readSets lists the sets; false means that one is not of the kind that its name says.
func (k *Kernel) readSets(have, want *Table) (bool, error) {
	type found struct {
		name             string
		typ, flags, size uint32
	}
	var all []found
	err := k.dump(unix.NFT_MSG_GETSET, unix.NFT_MSG_NEWSET, unix.NFTA_SET_TABLE, "", func(body []byte) {
		var s found
		wire.Attributes(body, func(kind uint16, v []byte) {
			switch kind {
			case unix.NFTA_SET_NAME:
				s.name = textOf(v)
			case unix.NFTA_SET_FLAGS:
				s.flags = numberOf(v)
			case unix.NFTA_SET_KEY_TYPE:
				s.typ = numberOf(v)
			case unix.NFTA_SET_KEY_LEN:
				s.size = numberOf(v)
			}
		})
		all = append(all, s)
	})
	if err != nil {
		return false, err
	}
	for _, s := range all {
		kind, ok := k.kindOf(s.typ, s.flags, s.size)
		if w := want.Sets[s.name]; !ok || w != nil && w.Kind != kind {
			return false, nil
		}
		have.Sets[s.name] = &Set{Kind: kind}
	}
	return true, nil
}

func (k *Kernel) kindOf(typ, flags, size uint32) (Kind, bool) {
	for kind := Addrs; kind <= Verdicts; kind++ {
		t, fl, fields := k.f.shape(kind)
		if t == typ && fl == flags && keyBytes(fields) == size {
			return kind, true
		}
	}
	return 0, false
}

// readChains lists the chains; false means that one that want has is not as it should be.
// Of others only the name matters.
func (k *Kernel) readChains(have, want *Table) (bool, error) {
	hooks := map[string]*Hook{}
	err := k.dump(unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, 0, "", func(body []byte) {
		table, name := "", ""
		var hook *Hook
		wire.Attributes(body, func(kind uint16, v []byte) {
			switch kind {
			case unix.NFTA_CHAIN_TABLE:
				table = textOf(v)
			case unix.NFTA_CHAIN_NAME:
				name = textOf(v)
			case unix.NFTA_CHAIN_HOOK:
				hook = hookOf(v)
			}
		})
		if table == k.name {
			hooks[name] = hook
		}
	})
	if err != nil {
		return false, err
	}
	tags, err := Tags(k.c, k.f.Number, k.name)
	if err != nil {
		return false, err
	}
	for name, hook := range hooks {
		w := want.Chains[name]
		if w == nil {
			if hook != nil {
				return false, nil // packets pass it, which no chain of ours by another name does
			}
			have.Chains[name] = &Chain{}
			continue
		}
		if ok, err := k.same(hook, tags[name], w); err != nil || !ok {
			return false, err
		}
		have.Chains[name] = w
	}
	return true, nil
}

func (k *Kernel) same(hook *Hook, tags []string, want *Chain) (bool, error) {
	if (hook == nil) != (want.Hook == nil) || hook != nil && *hook != *want.Hook {
		return false, nil
	}
	return Tagged(k.f.Number, tags, want.Rules)
}

func hookOf(v []byte) *Hook {
	h := &Hook{}
	wire.Attributes(v, func(kind uint16, v []byte) {
		switch kind {
		case unix.NFTA_HOOK_HOOKNUM:
			h.Number = numberOf(v)
		case unix.NFTA_HOOK_PRIORITY:
			h.Priority = int32(numberOf(v))
		}
	})
	return h
}

// readElements loads a set; false means that it holds what it cannot.
func (k *Kernel) readElements(name string, s *Set) (sound bool, err error) {
	_, _, fields := k.f.shape(s.Kind)
	size := int(keyBytes(fields))
	var ends []string
	sound = true
	err = k.dump(unix.NFT_MSG_GETSETELEM, unix.NFT_MSG_NEWSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, name, func(body []byte) {
		wire.Attributes(body, func(kind uint16, list []byte) {
			if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			wire.Attributes(list, func(_ uint16, item []byte) {
				e, end := decode(item)
				switch sound = sound && len(e.Key) == size; {
				case !sound:
				case end:
					ends = append(ends, e.Key)
				default:
					s.Elems = append(s.Elems, e)
				}
			})
		})
	})
	if err != nil || !sound {
		return false, err
	}
	s.Sort()
	if s.Kind == Ranges {
		s.close(ends)
	}
	return true, nil
}

// close gives each range its end: the last address before the next mark of an end.
func (s *Set) close(ends []string) {
	slices.Sort(ends)
	for i := range s.Elems {
		e := &s.Elems[i]
		j, _ := slices.BinarySearch(ends, e.Key+"\x00")
		if j < len(ends) {
			after, _ := netip.AddrFromSlice([]byte(ends[j]))
			e.Val = string(after.Prev().AsSlice())
			continue
		}
		e.Val = string(bytes.Repeat([]byte{0xff}, len(e.Key)))
	}
}

func decode(item []byte) (e Elem, end bool) {
	wire.Attributes(item, func(kind uint16, v []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_FLAGS:
			end = numberOf(v)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_KEY:
			wire.Attributes(v, func(_ uint16, v []byte) { e.Key = string(v) })
		case unix.NFTA_SET_ELEM_DATA:
			wire.Attributes(v, func(_ uint16, v []byte) {
				wire.Attributes(v, func(kind uint16, v []byte) {
					if kind == unix.NFTA_VERDICT_CHAIN {
						e.Val = textOf(v)
					}
				})
			})
		}
	})
	return e, end
}
