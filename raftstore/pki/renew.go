package pki

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	renewTimeout = time.Minute
	renewRecheck = time.Hour // the wall clock may have been set, or the certificate replaced
	retryFirst   = 2 * time.Second
	retryMost    = 5 * time.Minute
)

// Renew has a certificate request signed, and returns the new chain and all trusted
// CAs. Agents ask a server; a server signs by itself, with the CA of its state.
type Renew func(ctx context.Context, csrPEM []byte) (chainPEM, bundlePEM []byte, err error)

// Run renews the certificate when two thirds of its life are over, up to a tenth of
// its life later, so that machines that joined together do not renew together; and
// at once after [Keeper.RenewNow]. What fails is tried again, every five minutes in
// the end. It returns nil when ctx is done.
func (k *Keeper) Run(ctx context.Context, renew Renew) error {
	timer := time.NewTimer(k.untilDue(time.Now()))
	defer timer.Stop()
	for failures := 0; ; {
		kick := k.kick
		if failures > 0 {
			kick = nil // it must not bypass the backoff
		}
		select {
		case <-ctx.Done():
			return nil
		case <-kick:
		case <-timer.C:
			if failures == 0 && !k.due(time.Now()) {
				timer.Reset(k.untilDue(time.Now()))
				continue
			}
			k.unkick() // what it asks for is done now
		}
		if err := k.renewOnce(ctx, renew); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			failures++
			wait := backoff(failures)
			k.log.Warn("renew certificate", "err", err, "retry", wait.Round(time.Second))
			timer.Reset(wait)
			continue
		}
		failures = 0
		timer.Reset(k.untilDue(time.Now()))
	}
}

// RenewNow makes [Keeper.Run] renew the certificate at once: the CA has changed, or
// what the certificate must say.
func (k *Keeper) RenewNow() {
	select {
	case k.kick <- struct{}{}:
	default: // asked for already
	}
}

func (k *Keeper) unkick() {
	select {
	case <-k.kick:
	default:
	}
}

func (k *Keeper) renewOnce(ctx context.Context, renew Renew) error {
	if k.Leaf() == nil {
		return ErrNoCertificate
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	csr, err := k.renewRequest()
	if err != nil {
		return err
	}
	chain, bundle, err := renew(ctx, csr)
	if err != nil {
		return fmt.Errorf("have it signed: %w", err)
	}
	if err := k.Install(chain, bundle, time.Now()); err != nil {
		return err
	}
	leaf := k.Leaf()
	k.log.Info("certificate renewed", "name", leaf.Subject.CommonName, "until", leaf.NotAfter.UTC(), "issuer", k.Issuer())
	return nil
}

func (k *Keeper) due(now time.Time) bool {
	leaf := k.Leaf()
	return leaf != nil && !now.Before(dueAt(leaf))
}

func (k *Keeper) untilDue(now time.Time) time.Duration {
	leaf := k.Leaf()
	if leaf == nil {
		return renewRecheck
	}
	return min(max(dueAt(leaf).Sub(now), 0), renewRecheck)
}

// dueAt is when a certificate is to be renewed. The jitter comes from the certificate
// itself, so that a restart does not roll the dice again.
func dueAt(leaf *x509.Certificate) time.Time {
	sum := sha256.Sum256(leaf.Raw)
	part := float64(binary.BigEndian.Uint32(sum[:])) / (1 << 32)
	tenth := leaf.NotAfter.Sub(leaf.NotBefore) / 10
	return renewAt(leaf).Add(time.Duration(part * float64(tenth)))
}

// backoff doubles with every failure; up to half of it is random.
func backoff(failures int) time.Duration {
	d := retryMost
	if failures < 8 {
		d = min(d, retryFirst<<(failures-1))
	}
	return d/2 + rand.N(d/2)
}
