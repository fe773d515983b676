package pki

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func openKeeper(t *testing.T, dir string) *Keeper {
	t.Helper()
	k, err := OpenKeeper(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// enroll gives k its first certificate.
func enroll(t *testing.T, k *Keeper, i *Issuer, r Request, now time.Time) {
	t.Helper()
	csr, err := k.JoinRequest()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Install(must(i.Sign(csr, r, now)), i.Bundle(), now); err != nil {
		t.Fatal(err)
	}
}

func TestKeeperOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	i := issuer(t, newSpec(t, start))
	k := openKeeper(t, dir)
	if err := k.Ready(start); !errors.Is(err, ErrNoCertificate) || k.Leaf() != nil || k.Issuer() != "" {
		t.Errorf("empty: %v", err)
	}
	changed := k.Changed()
	enroll(t, k, i, Node("n1"), start)
	select {
	case <-changed:
	default:
		t.Error("nobody is told")
	}
	for name, mode := range map[string]os.FileMode{".": os.ModeDir | 0o700, identityFile: 0o600, trustFile: 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("left over: %v", entries)
	}
	again := openKeeper(t, dir)
	if !again.Leaf().Equal(k.Leaf()) || again.Issuer() != i.Fingerprint() || !bytes.Equal(again.Bundle(), i.Bundle()) {
		t.Error("another certificate after a restart")
	}
	if err := again.Ready(start); err != nil {
		t.Error(err)
	}
	if err := again.Ready(start.Add(DefaultLifetime + 1)); err == nil || !strings.Contains(err.Error(), "join again") {
		t.Errorf("expired: %v", err)
	}
	for _, name := range []string{identityFile, trustFile} {
		good := must(os.ReadFile(filepath.Join(dir, name)))
		if err := os.WriteFile(filepath.Join(dir, name), good[:len(good)/2], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenKeeper(dir, nil); err == nil || !strings.Contains(err.Error(), "join again") {
			t.Errorf("half of %s: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSameKeyAfterALostAnswer is why a machine that crashed while it joined, or
// while it renewed, is not taken for another one.
func TestSameKeyAfterALostAnswer(t *testing.T) {
	dir := t.TempDir()
	i := issuer(t, newSpec(t, start))
	first := must(ParseCSR(must(openKeeper(t, dir).JoinRequest())))
	k := openKeeper(t, dir)
	if !sameKey(first, must(ParseCSR(must(k.JoinRequest())))) {
		t.Error("another key to join with")
	}
	enroll(t, k, i, Node("n1"), start)
	if !sameKey(first, k.Leaf().PublicKey) {
		t.Error("the certificate is for another key")
	}
	if !sameKey(first, must(ParseCSR(must(k.JoinRequest())))) {
		t.Error("a member joins again with another key")
	}
	renewal := must(ParseCSR(must(k.renewRequest())))
	if sameKey(first, renewal) {
		t.Error("a renewal keeps the key")
	}
	if !sameKey(renewal, must(ParseCSR(must(openKeeper(t, dir).renewRequest())))) {
		t.Error("another key for the same renewal")
	}
}

func TestInstallRefuses(t *testing.T) {
	i, other := issuer(t, newSpec(t, start)), issuer(t, newSpec(t, start))
	k := openKeeper(t, t.TempDir())
	enroll(t, k, i, Node("n1"), start)
	before := k.Leaf()
	csr := must(k.renewRequest())
	stranger := must(openKeeper(t, t.TempDir()).renewRequest())
	good := must(i.Sign(csr, Node("n1"), start))
	for _, tt := range []struct {
		name          string
		chain, bundle []byte
		now           time.Time
		want          string
	}{
		{"another identity", must(i.Sign(csr, Node("n2"), start)), i.Bundle(), start, "system:node:n2"},
		{"another group", must(i.Sign(csr, Request{Name: "system:node:n1", Groups: []string{GroupAdmins}}, start)), i.Bundle(), start, "another machine"},
		{"another key", must(i.Sign(stranger, Node("n1"), start)), i.Bundle(), start, "not ours"},
		{"another CA", must(other.Sign(csr, Node("n1"), start)), i.Bundle(), start, "trusted CA"},
		{"expired", good, i.Bundle(), start.Add(DefaultLifetime + 1), "trusted CA"},
		{"no chain", nil, i.Bundle(), start, "there are none"},
		{"no bundle", good, nil, start, "there are none"},
		{"a bundle of leaves", good, good, start, "not the certificate of a CA"},
		{"garbage", []byte("x"), i.Bundle(), start, "not PEM"},
		{"a huge bundle", good, bytes.Repeat(i.Bundle(), 200), start, "at most"},
		{"many CAs", good, bytes.Repeat(i.Bundle(), 17), start, "more than"},
	} {
		if err := k.Install(tt.chain, tt.bundle, tt.now); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if k.Leaf() != before {
		t.Error("the certificate was replaced")
	}
	if err := k.Install(good, i.Bundle(), start); err != nil {
		t.Error(err)
	}
}

// TestRunRenews lets a year pass. The cluster is down for a while in the middle.
func TestRunRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := issuer(t, newSpec(t, time.Now()))
		k := openKeeper(t, t.TempDir())
		enroll(t, k, i, Node("n1"), time.Now())
		// The third renewal is due between day 180 and 207, the certificate ends on day
		// 210 at the earliest.
		day := 24 * time.Hour
		down, up := time.Now().Add(170*day), time.Now().Add(208*day)
		var renewals, attempts int
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- k.Run(ctx, func(_ context.Context, csr []byte) ([]byte, []byte, error) {
				if now := time.Now(); now.After(down) && now.Before(up) {
					attempts++
					return nil, nil, errors.New("no server answers")
				}
				if left := time.Until(k.Leaf().NotAfter); renewals < 2 && (left > 31*day || left < 20*day) {
					t.Errorf("renewed with %v left", left)
				}
				renewals++
				chain, err := i.Sign(csr, Node("n1"), time.Now())
				return chain, i.Bundle(), err
			})
		}()
		for range 365 * 24 {
			time.Sleep(time.Hour)
			if err := k.Ready(time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if renewals < 4 || renewals > 6 || attempts == 0 {
			t.Errorf("%d renewals, %d attempts while the cluster was down", renewals, attempts)
		}
		if most := int(up.Sub(down)/(retryMost/2)) + 10; attempts > most {
			t.Errorf("%d attempts while the cluster was down", attempts)
		}
	})
}

func TestRenewNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := issuer(t, newSpec(t, time.Now()))
		k := openKeeper(t, t.TempDir())
		enroll(t, k, i, Node("n1"), time.Now())
		var calls atomic.Int32
		var healthy atomic.Bool
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- k.Run(ctx, func(_ context.Context, csr []byte) ([]byte, []byte, error) {
				calls.Add(1)
				if !healthy.Load() {
					return nil, nil, errors.New("busy")
				}
				chain, err := i.Sign(csr, Node("n1"), time.Now())
				return chain, i.Bundle(), err
			})
		}()
		synctest.Wait()
		first := k.Leaf()
		k.RenewNow()
		synctest.Wait()
		k.RenewNow() // during the backoff: one attempt more, not two
		synctest.Wait()
		if calls.Load() != 1 {
			t.Errorf("%d attempts at once", calls.Load())
		}
		healthy.Store(true)
		time.Sleep(2 * retryFirst)
		synctest.Wait()
		if calls.Load() != 2 || k.Leaf().Equal(first) {
			t.Errorf("%d attempts, renewed %v", calls.Load(), !k.Leaf().Equal(first))
		}
		time.Sleep(24 * time.Hour)
		if calls.Load() != 2 {
			t.Errorf("%d attempts", calls.Load())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestJitter(t *testing.T) {
	i := issuer(t, newSpec(t, start))
	seen := map[time.Time]bool{}
	for range 20 {
		k := openKeeper(t, t.TempDir())
		enroll(t, k, i, Node("n1"), start)
		due := dueAt(k.Leaf())
		if due != dueAt(k.Leaf()) || due.Before(start.Add(59*24*time.Hour)) || due.After(start.Add(70*24*time.Hour)) {
			t.Errorf("due %v", due)
		}
		seen[due] = true
	}
	if len(seen) < 15 {
		t.Errorf("%d different times for 20 machines", len(seen))
	}
}
