package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/netplane/netspace"
)

// load is a stream of requests, each over a connection of its own.
type load struct {
	stop   context.CancelFunc
	group  sync.WaitGroup
	mu     sync.Mutex
	served int
	failed []string
}

// startLoad asks url from inside the world's network, with four clients that use 1,000 ports
// again and again, as a client does who has been asking for long.
func startLoad(t *testing.T, l *live, url string) *load {
	t.Helper()
	if err := netspace.Do(filepath.Join("/run/netns", l.netns), func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40999"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := l.dial(ctx, network, address)
		return closesLast{conn}, err
	}
	return startLoadBy(t, &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}, url)
}

// closesLast is a connection that is closed after the other end closed it, so that its port is
// free at once.
type closesLast struct{ net.Conn }

func (c closesLast) Close() error {
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	_, _ = io.Copy(io.Discard, c.Conn)
	return c.Conn.Close()
}

// dial opens a connection inside the world's network.
func (w *world) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = netspace.Do(filepath.Join("/run/netns", w.netns), func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

func startLoadBy(t *testing.T, client *http.Client, url string) *load {
	t.Helper()
	return startLoadOf(t, func() error { return ask(client, url) })
}

// startLoadOf asks four times at a time in any way.
func startLoadOf(t *testing.T, ask func() error) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &load{stop: cancel}
	for range 4 {
		s.group.Go(func() {
			for ctx.Err() == nil {
				err := ask()
				s.mu.Lock()
				if err == nil {
					s.served++
				} else {
					s.failed = append(s.failed, time.Now().Format("15:04:05.000 ")+err.Error())
				}
				s.mu.Unlock()
			}
		})
	}
	return s
}

func ask(client *http.Client, url string) error {
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", resp.Status)
	}
	return nil
}

// goOn waits until so many more requests were asked.
func (s *load) goOn(t *testing.T, more int) {
	t.Helper()
	count := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.served + len(s.failed)
	}
	target := count() + more
	for end := time.Now().Add(time.Minute); count() < target; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody asks any more")
		}
	}
}

// check ends the stream. Not one request may have failed.
func (s *load) check(t *testing.T) {
	t.Helper()
	s.stop()
	s.group.Wait()
	t.Logf("%d requests served", s.served)
	if len(s.failed) > 0 {
		t.Errorf("%d of %d requests failed:\n%s", len(s.failed), s.served+len(s.failed), strings.Join(s.failed[:min(len(s.failed), 20)], "\n"))
	}
	if s.served < 200 {
		t.Errorf("only %d requests: the test proves little", s.served)
	}
}

// TestRollout changes, scales and rolls back an application under load: a request
// that finds a service is answered.
func TestRollout(t *testing.T) {
	l := newLive(t)
	ip := strings.TrimSpace(l.must(t, "decree get service hello -o jsonpath={.spec.clusterIP}"))
	before := l.read(t, "hello.cue")
	l.push(t, "hello.cue", strings.Replace(before, "replicas: 2", "replicas: 4", 1))
	four := l.read(t, "hello.cue")
	s := startLoad(t, l, "http://"+ip+"/")
	for n := range 3 {
		out := l.push(t, "hello.cue", strings.Replace(four, "replicas: 4", fmt.Sprintf("replicas: 4\n\tenv: ROUND: \"%d\"", n), 1))
		contains(t, out, "healthy after")
	}
	l.push(t, "hello.cue", strings.Replace(four, "replicas: 4", "replicas: 1\n\tenv: ROUND: \"2\"", 1))
	l.eventually(t, "decree get pods", func(out string) bool { return lines(out) == 1 && running(out) == 1 })
	for range 2 {
		l.must(t, "git revert --no-edit HEAD && git push && git revert --no-edit HEAD && git push")
	}
	s.check(t)
	l.end(t)
}
