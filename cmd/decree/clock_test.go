package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/join"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// inMachine is set where TestServersClock may set the clock.
const inMachine = "DECREE_TEST_MACHINE"

// TestServersClock sets the clock of a machine with three servers, forward and back,
// while clients write and watch. The machine is a kernel that runs as a process (User
// Mode Linux): its clock is its own. The files are this machine's, what it writes goes
// to its memory.
func TestServersClock(t *testing.T) {
	if os.Getenv(inMachine) != "" {
		clockSteps(t)
		return
	}
	kernel, err := exec.LookPath("linux.uml")
	if err != nil {
		t.Fatalf("%v; run: go tool task setup-test", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	where, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script, code := filepath.Join(dir, "init"), filepath.Join(dir, "code")
	// Busybox by its path: its shell looks for it in /proc, which is not the machine's own yet.
	boot := fmt.Sprintf(`#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/mnt HOME=/mnt %s=1
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t tmpfs -o size=800m tmpfs /mnt
/bin/busybox ip link set lo up
cd %q
%q -test.run '^TestServersClock$' -test.v -test.timeout 6m
echo $? >%q
/bin/busybox poweroff -f
`, inMachine, where, self, code)
	if err := os.WriteFile(script, []byte(boot), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 7*time.Minute)
	defer cancel()
	machine := exec.CommandContext(ctx, kernel, "mem=1536M", "rootfstype=hostfs", "rootflags=/", "rw", "init="+script, "con=null", "con0=null,fd:1", "quiet")
	machine.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := machine.CombinedOutput()
	if result, readErr := os.ReadFile(code); strings.TrimSpace(string(result)) != "0" {
		t.Fatalf("the machine ended with %v, the test in it with %q, %v:\n%s", err, result, readErr, out)
	}
	t.Logf("%s", out)
}

// setClock moves the clock of this machine, if that is a kernel of its own.
func setClock(t *testing.T, by time.Duration) {
	t.Helper()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !strings.Contains(string(info), "User Mode Linux") {
		t.Fatalf("the clock of a machine that others use is not touched: %v", err)
	}
	to := unix.NsecToTimespec(time.Now().Add(by).UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &to); err != nil {
		t.Fatal(err)
	}
}

// clocked is a cluster whose clock is set while clients write and watch.
type clocked struct {
	elections int // after a step
	*controlPlane
	peers     *peer.Client
	followers [3]follower
	count     atomic.Int64 // of acknowledged writes
}

// clockSteps is TestServersClock inside the machine.
func clockSteps(t *testing.T) {
	begun := time.Now()
	c := &clocked{controlPlane: newLocalPlane(t, 3, "--heartbeat-timeout", "1s")} // one slow processor for all of them
	t.Logf("three servers after %s", time.Since(begun))
	c.peers = c.controlPlane.peers()
	addresses := []string{c.servers[0].address, c.servers[1].address, c.servers[2].address}
	token := c.token("agent", "")
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var acknowledged sync.Map
	for w := range 2 {
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("w%d-%d", w, n)
				if err := create(t.Context(), c.peers, addresses, name); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				acknowledged.Store(name, true)
				c.count.Add(1)
				time.Sleep(5 * time.Millisecond) // enough writes for a history, few enough to list it
			}
		})
	}
	watching, unwatch := context.WithCancel(t.Context())
	var watchers sync.WaitGroup
	for i := range c.followers {
		watchers.Go(func() {
			if err := c.followers[i].follow(watching, c.controlPlane, i); err != nil {
				t.Error(err)
			}
		})
	}
	for end := time.Now().Add(30 * time.Second); !c.watched(); time.Sleep(20 * time.Millisecond) { // see ask
		if time.Now().After(end) {
			t.Fatal("the watchers do not begin")
		}
	}
	for _, by := range []time.Duration{10 * time.Second, -10 * time.Second, time.Hour, -time.Hour} {
		c.step(by)
	}
	c.judgements(token)
	stop()
	clients.Wait()
	c.settled(3)
	c.compare(&acknowledged)
	time.Sleep(time.Second) // a watcher that is between two servers gets there
	unwatch()
	watchers.Wait()
	for i := range c.followers {
		f := &c.followers[i]
		acknowledged.Range(func(name, _ any) bool {
			if !f.seen[name.(string)] {
				t.Errorf("watcher %d never saw %s", i, name)
			}
			return true
		})
	}
	t.Logf("%d writes acknowledged, all of it in %s", c.count.Load(), time.Since(begun))
}

// watched reports whether every watcher has the connection that it began with.
func (c *clocked) watched() bool {
	for i := range c.followers {
		if c.followers[i].watches.Load() != 1 {
			return false
		}
	}
	return true
}

// terms asks all servers, by connections that are there from the first time on, who leads.
func (c *clocked) terms() string {
	c.t.Helper()
	var list []string
	for _, s := range c.servers {
		var status membership.Status
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) { // see ask
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			err := c.peers.Call(ctx, s.address, "status", struct{}{}, &status)
			cancel()
			if err == nil {
				break
			}
			if time.Now().After(end) {
				c.t.Fatalf("%s does not answer: %v", s.name, err)
			}
		}
		list = append(list, fmt.Sprintf("%s follows %s in term %d", s.name, status.Leader, status.Term))
	}
	return strings.Join(list, ", ")
}

// step sets the clock: writes go on, and nobody stands for election for that.
func (c *clocked) step(by time.Duration) {
	c.t.Helper()
	before, count := c.terms(), c.count.Load()
	setClock(c.t, by)
	// More than a heartbeat's timeout, for who takes the new time for silence.
	for begun := time.Now(); time.Since(begun) < 2*time.Second || c.count.Load() < count+20; time.Sleep(20 * time.Millisecond) {
		if time.Since(begun) > 30*time.Second {
			c.t.Fatalf("after a step by %s no write is acknowledged any more", by)
		}
	}
	if after := c.terms(); after != before {
		// One may be for want of processor, with three servers in a slow machine; if the
		// clock were the reason, every step would have its own.
		report := c.t.Errorf
		if c.elections++; c.elections == 1 {
			report = c.t.Logf
		}
		report("a step by %s: %s; before: %s", by, after, before)
	}
	if !c.watched() {
		c.t.Errorf("a step by %s ends watches", by)
	}
	c.t.Logf("step by %s: %d writes, %s", by, c.count.Load()-count, before)
}

// judgements: tokens and certificates are judged by the clock as it is set, and whoever
// is refused is told by which time.
func (c *clocked) judgements(token string) {
	c.step(-time.Hour) // before the certificates begin; connections that are there go on
	if err := c.list(); err == nil || !strings.Contains(err.Error(), "expired or is not yet valid: current time") || !strings.Contains(err.Error(), "is before") {
		c.t.Errorf("an hour too early: %v", err)
	}
	c.step(3 * time.Hour) // the token was for one
	if err := c.join(token); !errors.Is(err, pki.ErrToken) {
		c.t.Errorf("with a token that has ended: %v", err)
	}
	setClock(c.t, 400*24*time.Hour) // within a minute nobody would hear anybody any more
	if err := c.list(); err == nil || !strings.Contains(err.Error(), "expired or is not yet valid: current time") || !strings.Contains(err.Error(), "is after") {
		c.t.Errorf("a year too late: %v", err)
	}
	setClock(c.t, -400*24*time.Hour-2*time.Hour)
	// Who looked at the clock before may still end a connection.
	err := c.list()
	for begun := time.Now(); err != nil && time.Since(begun) < 10*time.Second; err = c.list() {
	}
	if err != nil {
		c.t.Errorf("with the right time again: %v", err)
	}
}

// list asks by a new connection.
func (c *clocked) list() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	api, err := c.client(c.servers[0])
	if err != nil {
		return err
	}
	defer api.Close()
	_, _, err = client.List[*corev1.ConfigMap](ctx, api, client.ListOptions{Namespace: "default"})
	return err
}

// join asks to be let in as an agent.
func (c *clocked) join(token string) error {
	keeper, err := pki.OpenKeeper(filepath.Join(c.dir, "agent"), nil)
	if err != nil {
		return err
	}
	csr, err := keeper.JoinRequest()
	if err != nil {
		return err
	}
	parsed, err := pki.ParseToken(token)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err = join.Request(ctx, join.Application{Address: c.servers[0].address, Token: parsed, Role: api.RoleAgent, Node: "n1", CSR: csr})
	return err
}
