package gitsource

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
)

const (
	dialTimeout   = 10 * time.Second
	headerTimeout = 60 * time.Second // from the request to the first byte of the answer
	// maxAdvertisement bounds the list of references: about 400,000 of them.
	maxAdvertisement = 32 << 20
)

// httpSession speaks smart HTTP.
type httpSession struct {
	transport transport.UploadPackSession
	adv       *packp.AdvRefs
	idle      func()
}

func openHTTP(u *url.URL, a Auth, lim Limits) (session, error) {
	clean := *u
	clean.User = nil
	ep, err := transport.NewEndpoint(clean.String())
	if err != nil {
		return nil, because(CauseInvalid, err)
	}
	base, err := httpTransport(u, a)
	if err != nil {
		return nil, because(CauseInvalid, err)
	}
	client := githttp.NewClient(&http.Client{Transport: &boundedTransport{base, lim}})
	s, err := client.NewUploadPackSession(ep, httpAuth(u, a))
	if err != nil {
		return nil, err
	}
	return &httpSession{transport: s, idle: base.CloseIdleConnections}, nil
}

func httpTransport(u *url.URL, a Auth) (*http.Transport, error) {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		ForceAttemptHTTP2:     true,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if len(a.CA) > 0 {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(a.CA) {
			return nil, errors.New("the CA holds no PEM certificate")
		}
		t.TLSClientConfig.RootCAs = pool
	}
	if u.Scheme == "http" { // the name was checked; this checks what it resolves to
		t.Proxy = nil
		t.DialContext = dialLoopback
	}
	return t, nil
}

func dialLoopback(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); !ok || !tcp.IP.IsLoopback() {
		return nil, errors.Join(because(CauseInvalid, fmt.Errorf("%s is not on loopback", addr)), conn.Close())
	}
	return conn, nil
}

// httpAuth turns credentials into what the library sends. It drops them when a
// redirect leaves the origin.
func httpAuth(u *url.URL, a Auth) transport.AuthMethod {
	if a.Username == "" && a.Password == "" && u.User != nil {
		a.Username = u.User.Username()
		a.Password, _ = u.User.Password()
	}
	switch {
	case a.Token != "" && a.Username == "":
		return &githttp.TokenAuth{Token: a.Token}
	case a.Token != "":
		return &githttp.BasicAuth{Username: a.Username, Password: a.Token}
	case a.Username != "" || a.Password != "":
		return &githttp.BasicAuth{Username: a.Username, Password: a.Password}
	}
	return nil
}

// boundedTransport bounds what an answer may hold, whatever the server says, and
// refuses to leave for http.
type boundedTransport struct {
	base http.RoundTripper
	lim  Limits
}

func (b *boundedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !loopbackName(r.URL.Hostname()) {
		return nil, because(CauseInvalid, fmt.Errorf("the server sends us on to %s://, which is not safe", r.URL.Scheme))
	}
	resp, err := b.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	max := b.lim.PackBytes + b.lim.PackBytes/64 + 1<<20 // the side band adds a little
	what := "the pack"
	if strings.HasSuffix(r.URL.Path, "/info/refs") {
		max, what = maxAdvertisement, "the list of references"
	}
	if resp.StatusCode >= 300 {
		max, what = 64<<10, "an error page"
	}
	resp.Body = &boundedBody{body: resp.Body, left: max, max: max, what: what}
	return resp, nil
}

// boundedBody is a body that ends in an error when it is too long.
type boundedBody struct {
	body      io.ReadCloser
	left, max int64
	what      string
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, limitf("%s is larger than %s", b.what, bytesText(b.max))
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.body.Read(p)
	b.left -= int64(n)
	return n, err
}

func (b *boundedBody) Close() error { return b.body.Close() }

func (s *httpSession) references(ctx context.Context) (*packp.AdvRefs, error) {
	adv, err := s.transport.AdvertisedReferencesContext(ctx)
	if err != nil {
		return nil, advertisementError(httpError(err))
	}
	s.adv = adv
	return adv, nil
}

// httpError makes the library's errors fit for people and for errors.Is: error
// pages of servers are dropped, and a wrapper that hides its cause is opened.
func httpError(err error) error {
	var unexpected *plumbing.UnexpectedError
	if errors.As(err, &unexpected) {
		err = unexpected.Err
	}
	var status *githttp.Err
	if errors.As(err, &status) {
		return because(CauseUnreachable, fmt.Errorf("the server answered %s", status.Response.Status))
	}
	for _, plain := range []error{transport.ErrAuthenticationRequired, transport.ErrAuthorizationFailed, transport.ErrRepositoryNotFound} {
		if errors.Is(err, plain) {
			return plain
		}
	}
	return err
}

// advertisementError tells an answer that is no list of references from a
// connection that failed.
func advertisementError(err error) error {
	var data *packp.ErrUnexpectedData
	var line *pktline.ErrorLine
	switch {
	case errors.Is(err, transport.ErrEmptyRemoteRepository):
		return because(CauseNotFound, errors.New("the repository is empty"))
	case errors.As(err, &line):
		return because(CauseNotFound, fmt.Errorf("the server says: %s", line.Text))
	case errors.As(err, &data), errors.Is(err, packp.ErrEmptyInput), errors.Is(err, packp.ErrEmptyAdvRefs),
		errors.Is(err, pktline.ErrInvalidPktLen), strings.Contains(err.Error(), "pkt-line"): // go-git has no type for the last
		return because(CauseGarbage, errors.New("the server does not answer with a list of references; is this the address of a Git repository?"))
	}
	return err
}

func (s *httpSession) pack(ctx context.Context, wants, haves []plumbing.Hash) (io.ReadCloser, error) {
	req := fetchRequestFor(s.adv, wants, haves)
	resp, err := s.transport.UploadPack(ctx, req)
	if err != nil {
		err = httpError(err)
		for _, text := range []string{"invalid pkt-len", "unexpected content", "malformed ACK"} {
			if strings.Contains(err.Error(), text) { // go-git hides the cause here
				return nil, because(CauseGarbage, err)
			}
		}
		return nil, err
	}
	return packReader(req, resp), nil
}

func (s *httpSession) close() error {
	err := s.transport.Close()
	s.idle()
	return err
}
