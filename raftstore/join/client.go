package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"decree.dev/decree/raftstore/pki"
)

// Errors of who asks.
var (
	// ErrWrongCA says that the other side is not of the cluster that the token is for.
	// Nothing secret was sent.
	ErrWrongCA = errors.New("this is not a server of the cluster that the token was made for: there may be a machine in between that pretends to be one, or the address is of another cluster, or the cluster has replaced its CA since (then make a new token); nothing secret was sent")
	// ErrUnreachable says that nobody answers, or nobody who speaks TLS 1.3.
	ErrUnreachable = errors.New("the server cannot be reached: see the address, the firewall, and whether it runs")
	// ErrUnavailable says that the cluster cannot decide now; trying again may help.
	ErrUnavailable = errors.New("the cluster cannot answer now")
)

// Application is what a machine needs to join.
type Application struct {
	Address string    // host:port of any server
	Token   pki.Token // see pki.ParseToken
	Role    string    // api.RoleServer or api.RoleAgent
	Node    string    // the name it wants
	Hosts   []string  // of a server: names and addresses it answers under
	CSR     []byte    // see pki.Keeper.JoinRequest
}

// Answer is what a machine got: the rest of what [pki.Keeper.Install] needs.
type Answer struct {
	Chain, Bundle []byte // PEM
	Info
}

// Request asks a server to let this machine in. It works in two connections. Over the
// first, whose other side is unknown, it asks for the CAs and keeps those whose
// fingerprints are in the token. The second must be with a server that has a
// certificate of one of them: only there the secret is sent. A server that is busy or
// cannot decide yet is asked again until ctx is done.
func Request(ctx context.Context, a Application) (*Answer, error) {
	pinned, err := fetchPinned(ctx, a.Address, a.Token)
	if err != nil {
		return nil, fmt.Errorf("join %s: %w", a.Address, err)
	}
	roots := x509.NewCertPool()
	for _, c := range pinned {
		roots.AddCert(c)
	}
	client := newHTTP(pki.RequireGroup(&tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: pki.ServerName}, pki.GroupServers))
	var got certificates
	err = call(ctx, client, http.MethodPost, "https://"+a.Address+JoinPath, joinRequest{
		ID: a.Token.ID, Secret: a.Token.Secret, Role: a.Role, Node: a.Node, Hosts: a.Hosts, CSR: string(a.CSR),
	}, &got)
	if err != nil {
		return nil, fmt.Errorf("join %s as %s %s: %w", a.Address, a.Role, a.Node, err)
	}
	cas, err := pki.ParseBundle([]byte(got.Bundle))
	if err != nil {
		return nil, fmt.Errorf("join %s: read its answer: %w", a.Address, err)
	}
	if len(a.Token.Pinned(cas)) == 0 {
		return nil, fmt.Errorf("join %s: its answer does not trust the CA of the token: the cluster dropped that CA just now: make a new token", a.Address)
	}
	return &Answer{Chain: []byte(got.Chain), Bundle: []byte(got.Bundle), Info: got.Info}, nil
}

// fetchPinned returns those CAs of a server that the token names.
func fetchPinned(ctx context.Context, address string, token pki.Token) ([]*x509.Certificate, error) {
	// Nothing is verified here, because there is nothing yet to verify by. Nothing is
	// sent either, and what comes back is believed only if the token has its hash.
	client := newHTTP(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, ServerName: pki.ServerName})
	var got trust
	if err := call(ctx, client, http.MethodGet, "https://"+address+caPath, nil, &got); err != nil {
		return nil, err
	}
	cas, err := pki.ParseBundle([]byte(got.Bundle))
	if err != nil {
		return nil, fmt.Errorf("%w (its CAs: %w)", ErrWrongCA, err)
	}
	pinned := token.Pinned(cas)
	if len(pinned) == 0 {
		return nil, fmt.Errorf("%w (its CA has the fingerprint %s, the token says %s)", ErrWrongCA, pki.Fingerprint(cas[0]), token.CAs[0])
	}
	return pinned, nil
}

// newHTTP returns a client that makes a new connection for each request: each is
// judged by what is trusted now, and shows the certificate that is current now.
func newHTTP(c *tls.Config) *http.Client {
	c.NextProtos = []string{"http/1.1"}
	return &http.Client{
		Timeout: time.Minute,
		Transport: &http.Transport{
			TLSClientConfig:     c,
			DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSHandshakeTimeout: 10 * time.Second,
			DisableKeepAlives:   true,
		},
		// A secret goes where it was meant to go, or nowhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// call sends body as JSON and reads the answer into got. It waits and repeats while
// the server is busy or cannot decide, until ctx is done.
func call(ctx context.Context, client *http.Client, method, url string, body, got any) error {
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
	}
	for {
		wait, err := once(ctx, client, method, url, data, got)
		if wait == 0 {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%w (gave up: %w)", err, context.Cause(ctx))
		}
	}
}

// once makes one attempt. A wait above zero says when another may help.
func once(ctx context.Context, client *http.Client, method, url string, data []byte, got any) (wait time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(data))
	if err != nil {
		return 0, fmt.Errorf("make request: %w", err)
	}
	if data != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, connecting(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 2*maxBody))
	if err != nil {
		return 0, fmt.Errorf("read answer: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(answer, got); err != nil {
			return 0, fmt.Errorf("read answer: %w", err)
		}
		return 0, nil
	}
	if slices.Contains([]int{http.StatusTooManyRequests, http.StatusServiceUnavailable}, resp.StatusCode) {
		wait = retryAfter(resp)
	}
	return wait, refused(resp, answer)
}

// connecting tells a server that is not ours from one that is not there.
func connecting(err error) error {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return fmt.Errorf("%w (%w)", ErrWrongCA, err)
	}
	if errors.Is(err, pki.ErrPeer) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// retryAfter bounds what a server may ask for: it is not always verified.
func retryAfter(resp *http.Response) time.Duration {
	seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil {
		seconds = 2
	}
	return time.Duration(min(max(seconds, 1), 30)) * time.Second
}

// refused turns an answer back into the error it came from.
func refused(resp *http.Response, answer []byte) error {
	var r refusal
	if err := json.Unmarshal(answer, &r); err != nil || r.Code == "" {
		return fmt.Errorf("the server answers %.80q: is it a decree server, and new enough?", resp.Status)
	}
	for _, c := range codes {
		if c.code == r.Code {
			return c.err
		}
	}
	if r.Code == codeUnavailable || r.Code == codeBusy {
		return fmt.Errorf("%w: %.200q", ErrUnavailable, r.Error)
	}
	return fmt.Errorf("the server refuses: %.500q", r.Error) // quoted: it may not be verified
}
