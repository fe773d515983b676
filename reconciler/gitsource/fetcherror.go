package gitsource

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/transport"
)

// Cause says why an external repository could not be fetched.
type Cause string

// The causes, in the words that status shows.
const (
	CauseUnreachable Cause = "unreachable" // no connection, time over, server trouble
	CauseAuth        Cause = "auth"        // credentials missing, wrong or not enough
	CauseIdentity    Cause = "identity"    // the server is not who it should be: host key or certificate
	CauseNotFound    Cause = "not found"   // no such repository, branch, tag or commit
	CauseGarbage     Cause = "garbage"     // what came is not sound Git data
	CauseLimit       Cause = "limit"       // more came than Limits allow
	CauseInvalid     Cause = "invalid"     // the Remote itself makes no sense
	CauseLocal       Cause = "local"       // trouble with the mirror's own folder
)

// FetchError is what Mirror.Fetch returns. Its text holds no credentials.
type FetchError struct {
	Cause Cause
	URL   string // redacted
	Err   error

	secrets []string
}

func (e *FetchError) Error() string {
	text := fmt.Sprintf("fetch %s: %s: %v", e.URL, e.Cause, e.Err)
	for _, s := range e.secrets {
		text = strings.ReplaceAll(text, s, "…")
	}
	return text
}

// Unwrap gives the reason. It is nil when its text would show a credential.
func (e *FetchError) Unwrap() error {
	if e.Err == nil {
		return nil
	}
	text := e.Err.Error()
	for _, s := range e.secrets {
		if strings.Contains(text, s) {
			return nil
		}
	}
	return e.Err
}

// caused marks an error with its cause on the way up.
type caused struct {
	cause Cause
	err   error
}

func (c *caused) Error() string { return c.err.Error() }
func (c *caused) Unwrap() error { return c.err }

func because(c Cause, err error) error {
	if err == nil {
		return nil
	}
	return &caused{c, err}
}

// classify finds the cause of an error that a transport, the intake or the disk
// returned.
func classify(err error) Cause {
	var known *caused
	var cert *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &known):
		return known.cause
	case errors.Is(err, ErrLimit):
		return CauseLimit
	case errors.Is(err, ErrGarbage), errors.Is(err, pktline.ErrInvalidPktLen):
		return CauseGarbage
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return CauseUnreachable
	case errors.Is(err, transport.ErrAuthenticationRequired), errors.Is(err, transport.ErrAuthorizationFailed),
		errors.Is(err, transport.ErrInvalidAuthMethod):
		return CauseAuth
	case errors.Is(err, transport.ErrRepositoryNotFound), errors.Is(err, ErrNotFound), errors.Is(err, plumbing.ErrReferenceNotFound):
		return CauseNotFound
	case errors.As(err, &cert), errors.As(err, &authority), errors.As(err, &host):
		return CauseIdentity
	}
	return CauseUnreachable
}

// secretsOf lists what must not appear in any text.
func secretsOf(u *url.URL, a Auth) []string {
	list := []string{a.Password, a.Token}
	if u != nil && u.User != nil {
		if p, ok := u.User.Password(); ok {
			list = append(list, p, url.QueryEscape(p), url.PathEscape(p))
		}
	}
	out := list[:0]
	for _, s := range list {
		if len(s) > 3 { // a shorter one would blot out the text, and protects nothing
			out = append(out, s)
		}
	}
	return out
}
