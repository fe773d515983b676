package gitsource

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// sshSession speaks Git's protocol with git-upload-pack on the other side of an
// ssh connection. The library's own client cannot be bounded in time and bytes.
type sshSession struct {
	ctx     context.Context
	stop    func() bool
	client  *ssh.Client
	session *ssh.Session
	in      io.WriteCloser
	out     *bufio.Reader
	stderr  *tail
	adv     *packp.AdvRefs
}

func openSSH(ctx context.Context, u *url.URL, a Auth, m *Mirror) (session, error) {
	host := u.Host
	if u.Port() == "" {
		host = net.JoinHostPort(u.Hostname(), "22")
	}
	cfg, err := sshConfig(u, a, host, m.cfg.Dir)
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", host)
	if err != nil {
		return nil, because(CauseUnreachable, err)
	}
	// Closing the connection is what ends every blocked read when ctx ends.
	s := &sshSession{ctx: ctx, stderr: &tail{}, stop: context.AfterFunc(ctx, func() { conn.Close() })}
	c, chans, reqs, err := ssh.NewClientConn(conn, host, cfg)
	if err != nil {
		s.stop()
		return nil, errors.Join(s.because(sshCause(err), err), ignoreClosed(conn.Close()))
	}
	s.client = ssh.NewClient(c, chans, reqs)
	if err := s.start(u.Path, m.limits); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// start runs git-upload-pack on the server.
func (s *sshSession) start(path string, lim Limits) error {
	var err error
	if s.session, err = s.client.NewSession(); err != nil {
		return s.because(CauseUnreachable, err)
	}
	if s.in, err = s.session.StdinPipe(); err != nil {
		return s.because(CauseUnreachable, err)
	}
	out, err := s.session.StdoutPipe()
	if err != nil {
		return s.because(CauseUnreachable, err)
	}
	s.session.Stderr = s.stderr
	max := maxAdvertisement + lim.PackBytes + lim.PackBytes/64
	s.out = bufio.NewReader(&boundedBody{body: io.NopCloser(out), left: max, max: max, what: "the answer"})
	if err := s.session.Start(uploadPack + " " + shellQuote(path)); err != nil {
		return s.because(CauseUnreachable, err)
	}
	return nil
}

// because prefers the end of the context over what it made fail.
func (s *sshSession) because(c Cause, err error) error {
	if s.ctx.Err() != nil {
		return because(CauseUnreachable, context.Cause(s.ctx))
	}
	return because(c, err)
}

// sshCause tells a wrong host from wrong credentials from a broken connection.
func sshCause(err error) Cause {
	var known *caused
	switch {
	case errors.As(err, &known):
		return known.cause
	case strings.Contains(err.Error(), "unable to authenticate"): // x/crypto/ssh has no type for it
		return CauseAuth
	}
	return CauseUnreachable
}

func sshConfig(u *url.URL, a Auth, host, dir string) (*ssh.ClientConfig, error) {
	cfg := &ssh.ClientConfig{User: "git", Timeout: dialTimeout}
	password := a.Password
	if u.User != nil {
		cfg.User = u.User.Username()
		if p, ok := u.User.Password(); ok && password == "" {
			password = p
		}
	} else if a.Username != "" {
		cfg.User = a.Username
	}
	switch {
	case len(a.SSHKey) > 0:
		key, err := ssh.ParsePrivateKey(a.SSHKey)
		var locked *ssh.PassphraseMissingError
		if errors.As(err, &locked) && password != "" {
			key, err = ssh.ParsePrivateKeyWithPassphrase(a.SSHKey, []byte(password))
		}
		if err != nil {
			return nil, because(CauseAuth, fmt.Errorf("ssh key: %w", err))
		}
		cfg.Auth = []ssh.AuthMethod{ssh.PublicKeys(key)}
	case password != "":
		cfg.Auth = []ssh.AuthMethod{ssh.Password(password)}
	default:
		return nil, because(CauseAuth, errors.New("ssh needs a key; put one into the source's secret"))
	}
	check, err := hostKeys(a.KnownHosts, dir)
	if err != nil {
		return nil, because(CauseIdentity, fmt.Errorf("known_hosts: %w", err))
	}
	cfg.HostKeyCallback = checkHostKey(check)
	cfg.HostKeyAlgorithms = knownAlgorithms(check, host)
	return cfg, nil
}

// hostKeys reads known_hosts lines. The parser wants a file; what is in it is
// public.
func hostKeys(lines []byte, dir string) (check ssh.HostKeyCallback, err error) {
	f, err := os.CreateTemp(dir, "known-hosts-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(lines)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return knownhosts.New(f.Name())
}

// checkHostKey says in words what is wrong with a host key.
func checkHostKey(check ssh.HostKeyCallback) ssh.HostKeyCallback {
	return func(host string, addr net.Addr, key ssh.PublicKey) error {
		err := check(host, addr, key)
		var bad *knownhosts.KeyError
		var revoked *knownhosts.RevokedError
		got := key.Type() + " " + ssh.FingerprintSHA256(key)
		switch {
		case err == nil:
			return nil
		case errors.As(err, &revoked):
			return because(CauseIdentity, fmt.Errorf("the host key of %s, %s, is revoked in known_hosts", host, got))
		case errors.As(err, &bad) && len(bad.Want) == 0:
			return because(CauseIdentity, fmt.Errorf("the host key of %s is unknown: %s; if that is the right one, add it to known_hosts (ssh-keyscan prints the line)", host, got))
		case errors.As(err, &bad):
			var want []string
			for _, k := range bad.Want {
				want = append(want, k.Key.Type()+" "+ssh.FingerprintSHA256(k.Key))
			}
			return because(CauseIdentity, fmt.Errorf("the host key of %s has changed: it shows %s, known_hosts has %s; somebody may be in between", host, got, strings.Join(want, ", ")))
		}
		return because(CauseIdentity, fmt.Errorf("the host key of %s, %s: %w", host, got, err))
	}
}

// knownAlgorithms lists the kinds of host key that known_hosts has for a host, so
// that the server shows one of them and not another that nobody has seen. Nil
// stands for the library's own list.
func knownAlgorithms(check ssh.HostKeyCallback, host string) []string {
	var bad *knownhosts.KeyError
	if err := check(host, &net.TCPAddr{IP: net.IPv4zero}, noKey{}); !errors.As(err, &bad) {
		return nil
	}
	var list []string
	for _, k := range bad.Want {
		algs := []string{k.Key.Type()}
		if k.Key.Type() == ssh.KeyAlgoRSA {
			algs = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
		}
		for _, a := range algs {
			if !slices.Contains(list, a) {
				list = append(list, a)
			}
		}
	}
	return list
}

// noKey is a key that no host has.
type noKey struct{}

func (noKey) Type() string                        { return "none" }
func (noKey) Marshal() []byte                     { return []byte("none") }
func (noKey) Verify([]byte, *ssh.Signature) error { return errors.New("not a key") }

// shellQuote quotes a path the way git does for the other side's shell.
func shellQuote(s string) string {
	return "'" + strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(s) + "'"
}

func (s *sshSession) references(context.Context) (*packp.AdvRefs, error) {
	adv := packp.NewAdvRefs()
	err := adv.Decode(s.out)
	if err == nil && adv.IsEmpty() || errors.Is(err, packp.ErrEmptyAdvRefs) {
		return nil, because(CauseNotFound, errors.New("the repository is empty"))
	}
	if err == nil {
		s.adv = adv
		return adv, nil
	}
	if said := s.finalWords(); said != "" {
		cause := CauseNotFound
		if strings.Contains(strings.ToLower(said), "denied") || strings.Contains(strings.ToLower(said), "not allowed") {
			cause = CauseAuth
		}
		return nil, s.because(cause, fmt.Errorf("the server says: %s", said))
	}
	if errors.Is(err, packp.ErrEmptyInput) {
		return nil, s.because(CauseUnreachable, errors.New("the server closed the connection"))
	}
	return nil, s.because(classify(advertisementError(err)), err)
}

// finalWords waits for the command to end and returns what it wrote to stderr.
func (s *sshSession) finalWords() string {
	_ = s.in.Close()
	done := make(chan struct{})
	go func() { defer close(done); _ = s.session.Wait() }()
	select {
	case <-done:
	case <-s.ctx.Done():
	}
	s.client.Close()
	<-done
	return s.stderr.String()
}

func (s *sshSession) pack(_ context.Context, wants, haves []plumbing.Hash) (io.ReadCloser, error) {
	req := fetchRequestFor(s.adv, wants, haves)
	var buf bytes.Buffer
	if err := req.UploadRequest.Encode(&buf); err != nil {
		return nil, because(CauseLocal, err)
	}
	if err := req.UploadHaves.Encode(&buf, false); err != nil {
		return nil, because(CauseLocal, err)
	}
	if err := pktline.NewEncoder(&buf).EncodeString("done\n"); err != nil {
		return nil, because(CauseLocal, err)
	}
	if _, err := s.in.Write(buf.Bytes()); err != nil {
		return nil, s.because(CauseUnreachable, err)
	}
	if err := s.in.Close(); err != nil {
		return nil, s.because(CauseUnreachable, err)
	}
	var answer packp.ServerResponse
	if err := answer.Decode(s.out, false); err != nil {
		return nil, s.because(CauseGarbage, err)
	}
	return packReader(req, io.NopCloser(s.out)), nil
}

func (s *sshSession) close() error {
	s.stop()
	if s.client == nil {
		return nil
	}
	return ignoreClosed(s.client.Close())
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// tail keeps the end of what a command writes.
type tail struct {
	mu   sync.Mutex
	data []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.data = append(t.data, p...); len(t.data) > 1024 {
		t.data = t.data[len(t.data)-1024:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(strings.Fields(string(t.data)), " ")
}
