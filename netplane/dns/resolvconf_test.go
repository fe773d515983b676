package dns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/dns"
)

// TestUpstreams: resolv.conf is read again when it changes, and this server is
// never its own upstream.
func TestUpstreams(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	s := New(Config{ResolvConf: path})
	s.Set(fixture())
	f := s.forward
	servers := func() (list []string) {
		f.reload()
		ups, _ := f.group("example.org.").order(f.self)
		for _, u := range ups {
			list = append(list, u.addr.String())
		}
		return list
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := servers(); len(got) != 0 {
		t.Errorf("no file: %v", got)
	}
	if _, _, err := f.resolve(t.Context(), "example.org.", dns.TypeA, keyOf(t, "example.org.", dns.TypeA)); !errors.Is(err, errNoUpstream) {
		t.Errorf("no file: %v", err)
	}
	write("search x\nnameserver 10.97.0.10\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nnameserver nonsense\n")
	if got := servers(); fmt.Sprint(got) != "[192.0.2.53:53 [2001:db8::53]:53]" {
		t.Errorf("%v", got)
	}
	first := f.upstream.Load().servers[1]
	write("nameserver 192.0.2.54\nnameserver 192.0.2.53\noptions timeout:1 rotate\n")
	if got := []string{servers()[0], servers()[0]}; got[0] == got[1] {
		t.Errorf("with rotate: %v is first twice", got)
	}
	if f.upstream.Load().servers[1] != first {
		t.Error("a server that stayed is forgotten")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got := servers(); len(got) != 2 {
		t.Errorf("while the file is replaced: %v", got)
	}
	write("nameserver 10.97.0.10\n")
	if got := servers(); len(got) != 0 {
		t.Errorf("only itself: %v", got)
	}
}

func TestParseStub(t *testing.T) {
	got, err := ParseStub("Corp.Example=10.0.0.53,[2001:db8::53]:5353,2001:db8::1")
	if want := "{corp.example. [10.0.0.53:53 [2001:db8::53]:5353 [2001:db8::1]:53]}"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v; want %s", got, err, want)
	}
	for _, bad := range []string{"", "=10.0.0.1", "corp.example", "corp.example=", "corp.example=dns.corp.example", "a..b=10.0.0.1", "a=10.0.0.1,"} {
		if _, err := ParseStub(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
