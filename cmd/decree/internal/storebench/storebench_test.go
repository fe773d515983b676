package storebench

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

func TestSummary(t *testing.T) {
	if got := summary(nil); got != (Sample{}) {
		t.Errorf("of nothing: %+v", got)
	}
	var times []time.Duration
	for i := 100; i > 0; i-- {
		times = append(times, time.Duration(i)*time.Millisecond)
	}
	want := Sample{P50: 51, P90: 91, P99: 100, Max: 100}
	if got := summary(times); got != want {
		t.Errorf("of 1 to 100 ms: %+v, want %+v", got, want)
	}
}

func TestNewValue(t *testing.T) {
	a, b := newValue(valueSize), newValue(valueSize)
	if len(a) != valueSize || len(b) != valueSize || a == b {
		t.Errorf("%d and %d bytes, the same: %v", len(a), len(b), a == b)
	}
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	const n = 1000
	for range n {
		fmt.Fprint(w, newValue(largeSize))
	}
	w.Close()
	if packed.Len() < n*largeSize*7/10 { // 6 bits of 8 are random
		t.Errorf("%d bytes are %d when compressed", n*largeSize, packed.Len())
	}
}

func TestFields(t *testing.T) {
	var b []byte
	b = protowire.AppendVarint(protowire.AppendTag(b, 6, protowire.VarintType), 300)
	b = bytesField(b, 11, "one")
	b = bytesField(b, 11, "two")
	if _, n := field(b, 6); n != 300 {
		t.Errorf("number: %d", n)
	}
	if data, _ := field(b, 11); string(data) != "two" {
		t.Errorf("bytes: %q", data)
	}
	if n := countField(b, 11); n != 2 {
		t.Errorf("count: %d", n)
	}
	for end := range b { // of an answer that is cut off
		field(b[:end], 11)
		if n := countField(b[:end], 11); n > 2 {
			t.Errorf("%d of %d bytes: %d", end, len(b), n)
		}
	}
}

func TestMetric(t *testing.T) {
	const text = "# TYPE decree_store_term gauge\ndecree_store_term_total 9\ndecree_store_term 1.2e+01\n"
	if n, err := metric(text, "decree_store_term"); err != nil || n != 12 {
		t.Errorf("%v, %v", n, err)
	}
	if _, err := metric(text, "decree_store_ter"); err == nil {
		t.Error("a metric that is not there")
	}
}

// fake is a store whose leader can be killed so often.
type fake struct {
	target
	kills int
	down  bool
}

func (f *fake) name() string { return "fake" }

func (f *fake) write(context.Context, int) error {
	if f.kills < 0 {
		return errors.New("nobody leads")
	}
	return nil
}

func (f *fake) killLeader(context.Context) (func() error, error) {
	if f.down {
		return nil, errors.New("the server before was not started again")
	}
	f.kills--
	f.down = true
	return func() error { f.down = false; return nil }, nil
}

func TestFailover(t *testing.T) {
	for _, tt := range []struct {
		name     string
		can      int
		measured float64
		err      string
	}{
		{"all", 5, 5, ""},
		{"what there was before an error counts", 3, 3, "kill 4: the write after: nobody leads"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var said []Sample
			b := &bench{Config: Config{Kills: 5, Say: func(s Sample) { said = append(said, s) }}, targets: []target{&fake{kills: tt.can}}}
			if err := b.failover(t.Context()); (err != nil) != (tt.err != "") {
				t.Errorf("error: %v", err)
			}
			if len(said) != 1 || said[0].Value != tt.measured || said[0].LastErr != tt.err {
				t.Errorf("%+v", said)
			}
		})
	}
}

func TestWanted(t *testing.T) {
	b := &bench{Config: Config{Only: "killed", Kills: 1}}
	if !b.wanted("leader killed to next acknowledged write") || b.wanted("put, 64 callers") {
		t.Error("what was asked for is not what is measured")
	}
}

func TestDrive(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	times, failed, last := drive(ctx, 1, func(_ context.Context, i int) error {
		if i < 0 || i >= keys {
			t.Errorf("key %d", i)
		}
		calls++
		switch calls {
		case 2:
			return errors.New("no")
		case 4: // under way when the time is up: it is waited for and not counted
			cancel()
		}
		return nil
	})
	if len(times) != 2 || failed != 1 || last == nil || !strings.Contains(last.Error(), "no") {
		t.Errorf("%d calls, %d failed, %v", len(times), failed, last)
	}
}
