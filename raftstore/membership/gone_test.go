package membership

import (
	"net"
	"testing"

	"decree.dev/decree/raftstore"
)

// TestRefuses has a listener for each way that a port answers.
func TestRefuses(t *testing.T) {
	tests := []struct {
		name string
		// each is called with every connection, and once with nil before the first.
		each func(l net.Listener, c net.Conn)
		want bool
	}{
		{"no process", func(l net.Listener, _ net.Conn) { l.Close() }, true},
		{"a process that closes its port last", func(l net.Listener, c net.Conn) {
			if c != nil {
				l.Close()
				c.Close()
			}
		}, true},
		{"a server", func(net.Listener, net.Conn) {}, false},
		{"a server that has no room for strangers", func(_ net.Listener, c net.Conn) {
			if c != nil {
				c.Close()
			}
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				for tt.each(l, nil); ; {
					c, err := l.Accept()
					if err != nil {
						return
					}
					defer c.Close()
					tt.each(l, c)
				}
			}()
			if got := refuses(l.Addr().String()); got != tt.want {
				t.Errorf("refuses: %v", got)
			}
			l.Close()
			<-ended
		})
	}
}

func TestStands(t *testing.T) {
	at := func(leader string, term, last uint64) Status {
		var s Status
		s.Leader, s.Term, s.LastIndex = leader, term, last
		return s
	}
	tests := []struct {
		name         string
		mine, theirs Status
		want         bool
	}{
		{"it has not noticed", at("a", 3, 7), at("a", 3, 7), false},
		{"it stands with the same log", at("a", 3, 7), at("", 4, 7), true},
		{"it stands with a longer log", at("a", 3, 7), at("", 4, 8), true},
		{"it stands with a log that is too short", at("a", 3, 7), at("", 4, 6), true},
		{"it is about to stand with a log that is too short", at("a", 3, 7), at("", 3, 6), true},
		{"it was refused because its log is too short", at("a", 4, 7), at("", 4, 6), false},
		{"it was refused, and tries again", at("a", 4, 7), at("", 5, 6), true},
		{"it has won", at("a", 4, 7), at("b", 4, 8), true},
		{"it follows the one that has won", at("a", 4, 7), at("c", 4, 8), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := stands(tt.mine, tt.theirs, "a", 3); got != tt.want {
				t.Errorf("stands: %v", got)
			}
		})
	}
}

func TestInLine(t *testing.T) {
	tests := []struct {
		self          string
		behind        bool
		place         int
		before, after string
	}{
		{"a", false, 0, "", "bc"},
		{"b", false, 1, "a", "c"},
		{"c", false, 2, "ab", ""},
		{"a", true, 3, "bc", ""},
		{"b", true, 4, "ac", ""},
		{"x", false, -1, "", ""},
	}
	ids := func(members []raftstore.Member) (all string) {
		for _, m := range members {
			all += m.ID
		}
		return all
	}
	for _, tt := range tests {
		place, before, after := inLine([]raftstore.Member{{ID: "b"}, {ID: "c"}, {ID: "a"}}, tt.self, tt.behind)
		if place != tt.place || ids(before) != tt.before || ids(after) != tt.after {
			t.Errorf("%s, behind %v: place %d, before %q, after %q", tt.self, tt.behind, place, ids(before), ids(after))
		}
	}
}
