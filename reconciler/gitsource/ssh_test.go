package gitsource

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// sshServer runs git-upload-pack for one client key.
type sshServer struct {
	addr string
	keys []ssh.Signer
}

func newSigner(t *testing.T) (ssh.Signer, []byte) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte("open sesame"))
	if err != nil {
		t.Fatal(err)
	}
	return signer, pem.EncodeToMemory(block)
}

func startSSH(t *testing.T, client ssh.PublicKey) *sshServer {
	t.Helper()
	cfg := &ssh.ServerConfig{PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if c.User() != "git" || string(key.Marshal()) != string(client.Marshal()) {
			return nil, errors.New("no")
		}
		return nil, nil
	}}
	s := &sshServer{}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	first, err := ssh.NewSignerFromKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := newSigner(t)
	s.keys = []ssh.Signer{first, second}
	for _, k := range s.keys {
		cfg.AddHostKey(k)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serveSSH(conn, cfg) })
		}
	})
	return s
}

func serveSSH(conn net.Conn, cfg *ssh.ServerConfig) {
	defer conn.Close()
	c, chans, reqs, err := ssh.NewServerConn(conn, cfg)
	if err != nil {
		return
	}
	defer c.Close()
	go ssh.DiscardRequests(reqs)
	for nc := range chans {
		ch, reqs, err := nc.Accept()
		if err != nil {
			return
		}
		for req := range reqs {
			if req.Type != "exec" {
				_ = req.Reply(false, nil)
				continue
			}
			_ = req.Reply(true, nil)
			command := string(req.Payload[4:])
			status := []byte{0, 0, 0, 0}
			if !strings.HasPrefix(command, "git-upload-pack '") {
				status[3] = 127
			} else {
				cmd := exec.Command("sh", "-c", command)
				cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
				in, err := cmd.StdinPipe()
				if err != nil || cmd.Start() != nil {
					return
				}
				go func() { // ends when the channel is closed
					buf := make([]byte, 4096)
					for {
						n, err := ch.Read(buf)
						if _, werr := in.Write(buf[:n]); err != nil || werr != nil {
							in.Close()
							return
						}
					}
				}()
				if cmd.Wait() != nil {
					status[3] = 128
				}
			}
			_, _ = ch.SendRequest("exit-status", false, status)
			ch.Close()
		}
	}
}

func TestFetchSSH(t *testing.T) {
	o := newOrigin(t)
	signer, key := newSigner(t)
	srv := startSSH(t, signer.PublicKey())
	// known_hosts has only the second of the server's keys: the client must ask for that.
	known := []byte(knownhosts.Line([]string{srv.addr}, srv.keys[1].PublicKey()) + "\n")
	good := Auth{SSHKey: key, Password: "open sesame", KnownHosts: known}
	address := "ssh://git@" + srv.addr + o.work
	m := newTestMirror(t, Limits{})
	f, got := fetchFile(t, m, Remote{URL: address, Branch: "main", Auth: good}, "app.cue")
	if got != "replicas: 1\n" {
		t.Errorf("fetched %q", got)
	}
	second := o.commit(o.work, "app.cue", "replicas: 2\n")
	f2, got := fetchFile(t, m, Remote{URL: address, Branch: "main", Auth: good, Last: f.Hash}, "app.cue")
	if f2.Hash != second || got != "replicas: 2\n" || f2.Rewound {
		t.Errorf("fetched %q at %s", got, f2.Hash)
	}
	other, otherKey := newSigner(t)
	for name, tt := range map[string]struct {
		auth Auth
		url  string
		want Cause
		text string
	}{
		"unknown host":    {Auth{SSHKey: key, Password: "open sesame"}, address, CauseIdentity, "is unknown: ecdsa-sha2-nistp256 " + ssh.FingerprintSHA256(srv.keys[0].PublicKey())},
		"changed key":     {Auth{SSHKey: key, Password: "open sesame", KnownHosts: []byte(knownhosts.Line([]string{srv.addr}, other.PublicKey()))}, address, CauseIdentity, "has changed: it shows ssh-ed25519 " + ssh.FingerprintSHA256(srv.keys[1].PublicKey())},
		"wrong key":       {Auth{SSHKey: otherKey, Password: "open sesame", KnownHosts: known}, address, CauseAuth, ""},
		"locked key":      {Auth{SSHKey: key, KnownHosts: known}, address, CauseAuth, "passphrase"},
		"no key":          {Auth{KnownHosts: known}, address, CauseAuth, "ssh needs a key"},
		"bad key":         {Auth{SSHKey: []byte("x"), KnownHosts: known}, address, CauseAuth, "ssh key"},
		"bad known_hosts": {Auth{SSHKey: key, Password: "open sesame", KnownHosts: []byte("what is this")}, address, CauseIdentity, "known_hosts"},
		"no repository":   {good, "ssh://git@" + srv.addr + "/none.git", CauseNotFound, "not appear to be a git repository"},
		"no server":       {good, "ssh://git@127.0.0.1:1/x", CauseUnreachable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newTestMirror(t, Limits{})
			_, err := m.Fetch(t.Context(), Remote{URL: tt.url, Branch: "main", Auth: tt.auth})
			wantCause(t, err, tt.want, tt.text)
		})
	}
}
