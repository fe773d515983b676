package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
)

// TestServersLife walks a cluster through its life: a token that is wrong, a server that
// is replaced, one whose disk is damaged, one that is removed, keys and CA that rotate,
// and a snapshot that becomes another cluster.
func TestServersLife(t *testing.T) {
	p := newControlPlane(t, 3, "--ca-overlap", "1s")
	peers := p.peers()
	addresses := []string{p.servers[0].address, p.servers[1].address, p.servers[2].address}
	for i := range 20 {
		if err := create(t.Context(), peers, addresses, "a"+strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("wrong tokens", func(t *testing.T) { p.t = t; p.wrongTokens(t) })
	t.Run("damaged disk", func(t *testing.T) {
		p.t = t
		s := p.servers[2]
		p.kill(s)
		damage(t, filepath.Join(s.data, "raft", "raft.db"))
		p.start(s)
		p.settled(3)
		p.compare(&sync.Map{})
		if aside, _ := filepath.Glob(filepath.Join(s.data, "raft", "damaged-*")); len(aside) != 1 {
			t.Errorf("the damaged files are not kept: %v", aside)
		}
	})
	t.Run("lost disk", func(t *testing.T) {
		p.t = t
		s := p.servers[1]
		p.kill(s)
		if err := os.RemoveAll(s.data); err != nil {
			t.Fatal(err)
		}
		p.start(s, "--join", p.servers[0].address, "--token", p.token("server", "s2"))
		p.settled(3)
		p.compare(&sync.Map{})
	})
	t.Run("removed", func(t *testing.T) { p.t = t; p.removed(t) })
	t.Run("keys", func(t *testing.T) { p.t = t; p.rotateKeys(t) })
	t.Run("CA", func(t *testing.T) { p.t = t; p.rotateCA(t) })
	t.Run("stale", func(t *testing.T) { p.t = t; p.stale(t) })
	t.Run("snapshot", func(t *testing.T) { p.t = t; p.snapshot(t) })
	p.t = t
}

// damage flips a bit in every page of a file.
func damage(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := 2*4096 + 100; i < len(data); i += 4096 {
		data[i] ^= 0x40
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *controlPlane) wrongTokens(t *testing.T) {
	agent, good := p.token("agent", ""), p.token("server", "")
	parts := strings.Split(good, ".")
	hash := []byte(parts[len(parts)-1])
	slices.Reverse(hash)
	otherCA := strings.Join(append(slices.Clone(parts[:len(parts)-1]), string(hash)), ".")
	otherSecret := strings.Join(append([]string{parts[0], parts[1], strings.Repeat("A", len(parts[2]))}, parts[3:]...), ".")
	for what, try := range map[string]struct{ token, want string }{
		"an agent's token":     {agent, "token"},
		"another CA's hash":    {otherCA, "not a server of the cluster that the token was made for"},
		"another secret":       {otherSecret, "token"},
		"no token at all":      {"", "token"},
		"something else":       {"hello", "token"},
		"the name of a server": {good, "member already"},
	} {
		data := filepath.Join(t.TempDir(), "x")
		node := "s9"
		if what == "the name of a server" {
			node = "s1"
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out, err := exec.CommandContext(ctx, p.binary, "server", "--data", data, "--node", node, "--address", "127.0.0.1:0", "--join", p.servers[0].address, "--token", try.token).CombinedOutput()
		cancel()
		if err == nil || ctx.Err() == context.DeadlineExceeded || !strings.Contains(string(out), try.want) {
			t.Errorf("%s: %v, want %q:\n%s", what, err, try.want, out)
		}
	}
	if rows := p.settled(3); len(rows) != 3 {
		t.Errorf("%+v", rows)
	}
}

func (p *controlPlane) rotateKeys(t *testing.T) {
	if err := p.ask(http.MethodPost, "keys", "", nil); err != nil {
		t.Fatal(err)
	}
	var keys struct {
		Epoch   int64
		Servers []struct{ Epoch int64 }
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // see ask
		if err := p.ask(http.MethodGet, "keys", "", &keys); err != nil {
			t.Fatal(err)
		}
		done := len(keys.Servers) == 3
		for _, s := range keys.Servers {
			done = done && s.Epoch == keys.Epoch
		}
		if done {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("keys are not rotated: %+v", keys)
		}
	}
	for _, s := range p.servers { // what is on disk can be read with the new keys
		p.kill(s)
		p.start(s)
		p.settled(3)
	}
	p.compare(&sync.Map{})
}

// removed: a server that was taken out of the cluster has no connection left, does
// nothing any more, and is told why.
func (p *controlPlane) removed(t *testing.T) {
	s := p.servers[2]
	keeper, err := pki.OpenKeeper(filepath.Join(s.data, "pki", "server"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var open []net.Conn
	for _, other := range p.servers[:2] {
		open = append(open, connect(t, other.address, keeper.ClientTLS(peer.ProtocolRaft)))
		open = append(open, greeted(t, connect(t, other.address, keeper.ClientTLS("http/1.1"))))
	}
	was := peer.NewClient(func() *tls.Config { return keeper.ClientTLS() })
	defer was.Close()
	if err := create(t.Context(), was, []string{p.servers[0].address}, "by-s3"); err != nil {
		t.Fatal(err)
	}
	if err := p.ask(http.MethodDelete, "members/s3", "", nil); err != nil {
		t.Fatal(err)
	}
	for _, conn := range open {
		closedByPeer(t, conn)
	}
	for range 10 { // a connection that has just ended may be the one that is tried first
		if err = tryOnce(t.Context(), was, p.servers[0].address, "by-s3-again"); !errors.Is(err, raftstore.ErrLeadershipLost) {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "was removed from the cluster") {
		t.Errorf("a removed server writes: %v", err)
	}
	p.settled(2)
	p.kill(s)
	p.start(s)
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		t.Fatal("a removed server goes on")
	}
	if log, _ := os.ReadFile(s.data + ".log"); !strings.Contains(string(log), "was removed from the cluster") {
		t.Error("a removed server does not say why it ends")
	}
	if err := os.RemoveAll(s.data); err != nil {
		t.Fatal(err)
	}
	p.start(s, "--join", p.servers[0].address, "--token", p.token("server", ""))
	p.settled(3)
}

// connect opens a connection that somebody is known by.
func connect(t *testing.T, address string, config *tls.Config) net.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// greeted makes a request: the server keeps the connection for the next one, for longer
// than closedByPeer waits.
func greeted(t *testing.T, conn net.Conn) net.Conn {
	t.Helper()
	if _, err := fmt.Fprint(conn, "GET /livez HTTP/1.1\r\nHost: decree\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", conn.RemoteAddr(), resp.Status, err)
	}
	return conn
}

// closedByPeer waits until the other end has closed a connection that nothing is said on.
func closedByPeer(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection to %s stays open", conn.RemoteAddr())
	}
}

// caStatus is what the cluster says of its CAs.
type caStatus struct {
	Stage   string
	Waiting []string
	CAs     []struct {
		Fingerprint string
		Active      bool
		Machines    int
	}
}

// rotateCA: a new CA takes the place of the old one, and with the old one end the
// connections of who has no other certificate; writes go on.
func (p *controlPlane) rotateCA(t *testing.T) {
	var before, now caStatus
	if err := p.ask(http.MethodGet, "ca", "", &before); err != nil {
		t.Fatal(err)
	}
	copied, err := pki.ReadKubeconfig(filepath.Join(p.servers[0].data, "admin.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := copied.Pair.TLS()
	if err != nil {
		t.Fatal(err)
	}
	operator := &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}, // the other end is what is tested
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }, // whatever CAs it asks for
	}
	var open []net.Conn
	for _, s := range p.servers {
		open = append(open, greeted(t, connect(t, s.address, operator)))
	}
	if err := p.ask(http.MethodPost, "ca", "", nil); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(90 * time.Second); ; time.Sleep(100 * time.Millisecond) { // see ask
		if err := p.ask(http.MethodGet, "ca", "", &now); err != nil {
			t.Fatal(err)
		}
		if len(now.CAs) == 1 && now.CAs[0].Fingerprint != before.CAs[0].Fingerprint {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the old CA is not given up: %+v", now)
		}
	}
	if !now.CAs[0].Active || now.CAs[0].Machines != 3 {
		t.Errorf("%+v", now)
	}
	for _, conn := range open {
		closedByPeer(t, conn)
		again := connect(t, conn.RemoteAddr().String(), operator) // the client's part of the handshake is over before the server's
		closedByPeer(t, again)
	}
	if err := create(t.Context(), p.peers(), []string{p.servers[0].address, p.servers[1].address, p.servers[2].address}, "new-ca"); err != nil {
		t.Errorf("with certificates of the new CA: %v", err)
	}
	p.settled(3)
	p.compare(&sync.Map{})
}

// stale: without a quorum nothing is written and nothing is read as if it were new; who
// asks for what is at hand gets it, and is told how old it may be.
func (p *controlPlane) stale(t *testing.T) {
	get := func(flags ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, p.binary, append([]string{"get", "configmaps"}, flags...)...)
		cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+filepath.Join(p.servers[2].data, "admin.kubeconfig"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	p.kill(p.servers[0])
	p.kill(p.servers[1])
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) { // see ask
		if _, err := get(); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a server without a quorum answers as if it had one")
		}
	}
	out, err := get("--stale")
	if err != nil || !strings.Contains(out, "a19") || !strings.Contains(out, "since the leader was heard of") && !strings.Contains(out, "this server leads") {
		t.Errorf("a stale read: %v\n%s", err, out)
	}
	p.start(p.servers[0])
	p.start(p.servers[1])
	p.settled(3)
}

func (p *controlPlane) snapshot(t *testing.T) {
	file, data := filepath.Join(t.TempDir(), "c.decree"), filepath.Join(t.TempDir(), "restored")
	run := func(kubeconfig string, args ...string) string {
		t.Helper()
		cmd := exec.Command(p.binary, args...)
		cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+kubeconfig)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("decree %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	old := filepath.Join(p.servers[0].data, "admin.kubeconfig")
	run(old, "snapshot", "save", file, "--plaintext")
	run(old, "snapshot", "verify", file, "--plaintext")
	s := p.add(len(p.servers))
	s.data = data
	run(old, "snapshot", "restore", file, "--plaintext", "--data", data, "--node", s.name, "--address", s.address)
	p.start(s)
	restored := filepath.Join(data, "admin.kubeconfig")
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // see ask
		if _, err := os.Stat(restored); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the restored server does not start")
		}
	}
	if out := run(restored, "get", "configmaps"); !strings.Contains(out, "a19") {
		t.Errorf("the restored cluster lacks what was saved:\n%s", out)
	}
	cfg, err := client.FromKubeconfig(old)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Server, cfg.Retries = "https://"+s.address, -1
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Raw(t.Context(), http.MethodGet, "/version", nil, "", nil); err == nil {
		t.Error("credentials of the old cluster work in the restored one")
	}
}
