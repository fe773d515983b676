package dnsbench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// outstanding is how many questions are under way at a time.
const outstanding = 100

// generate asks the questions of a file over and over for a duration, or, if that is zero,
// each of them once.
func generate(ctx context.Context, cfg *Config, port int, path string, questions []string, duration time.Duration) (load, error) {
	if cfg.Dnsperf == "" {
		return generateHere(ctx, port, questions, duration)
	}
	args := []string{"-s", "127.0.0.1", "-p", strconv.Itoa(port), "-d", path, "-q", strconv.Itoa(outstanding), "-c", "4", "-T", "1"}
	if duration > 0 {
		args = append(args, "-l", strconv.Itoa(max(int(duration/time.Second), 1)))
	} else {
		args = append(args, "-n", "1")
	}
	out, err := exec.CommandContext(ctx, cfg.Dnsperf, args...).CombinedOutput()
	if err != nil {
		return load{}, fmt.Errorf("dnsperf: %w: %s", err, out)
	}
	return parseDnsperf(string(out))
}

var dnsperfLine = regexp.MustCompile(`(?m)^\s*(Queries per second|Queries completed|Queries lost):\s+([0-9.]+)`)

func parseDnsperf(out string) (l load, err error) {
	found := map[string]float64{}
	for _, m := range dnsperfLine.FindAllStringSubmatch(out, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return load{}, err
		}
		found[m[1]] = v
	}
	if len(found) != 3 {
		return load{}, fmt.Errorf("dnsperf said something else: %s", out)
	}
	return load{perSec: found["Queries per second"], completed: found["Queries completed"], lost: found["Queries lost"]}, nil
}

// packets are questions as they are sent.
func packets(questions []string) ([][]byte, error) {
	out := make([][]byte, len(questions))
	for i, q := range questions {
		name, _, _ := strings.Cut(q, " ")
		var err error
		if out[i], err = new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA).Pack(); err != nil {
			return nil, fmt.Errorf("question %q: %w", q, err)
		}
	}
	return out, nil
}

// generateHere is the generator for machines without dnsperf.
func generateHere(ctx context.Context, port int, questions []string, duration time.Duration) (load, error) {
	all, err := packets(questions)
	if err != nil {
		return load{}, err
	}
	var next, completed, lost atomic.Int64
	begun := time.Now()
	errs := make([]error, outstanding)
	var asking sync.WaitGroup
	for i := range outstanding {
		asking.Go(func() {
			c, err := dial(port)
			if err != nil {
				errs[i] = err
				return
			}
			defer c.Close()
			for ctx.Err() == nil && (duration == 0 || time.Since(begun) < duration) {
				n := int(next.Add(1) - 1)
				if duration == 0 && n >= len(all) {
					return
				}
				if ask(c, all[n%len(all)], uint16(n)) == nil {
					completed.Add(1)
				} else {
					lost.Add(1)
				}
			}
		})
	}
	asking.Wait()
	l := load{completed: float64(completed.Load()), lost: float64(lost.Load())}
	l.perSec = l.completed / time.Since(begun).Seconds()
	return l, errors.Join(append(errs, ctx.Err())...)
}

// oneAtATime asks n questions, each after the answer to the one before, and returns how
// many microseconds half of them, and 99 %, took at most.
func oneAtATime(ctx context.Context, port int, questions []string, n int) (p50, p99 float64, err error) {
	all, err := packets(questions)
	if err != nil {
		return 0, 0, err
	}
	c, err := dial(port)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var took []float64
	for i := range min(n, len(all)) {
		if ctx.Err() != nil {
			return 0, 0, context.Cause(ctx)
		}
		begun := time.Now()
		if err := ask(c, all[i], uint16(i)); err != nil {
			return 0, 0, err
		}
		took = append(took, float64(time.Since(begun).Nanoseconds())/1000)
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100], nil
}

func dial(port int) (net.Conn, error) {
	return net.Dial("udp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

// ask sends a question under an id and waits for its answer.
func ask(c net.Conn, question []byte, id uint16) error {
	var buf [2048]byte
	n := copy(buf[:], question)
	buf[0], buf[1] = byte(id>>8), byte(id)
	if _, err := c.Write(buf[:n]); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for {
		if _, err := c.Read(buf[:]); err != nil {
			return err
		}
		if buf[0] == byte(id>>8) && buf[1] == byte(id) { // else it is one that came late
			return nil
		}
	}
}

// upstream is the name server that all servers forward to: it answers with one address, at
// once.
type upstream struct {
	conn  *net.UDPConn
	ended chan struct{}
}

func startUpstream() (*upstream, error) {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	u := &upstream{conn, make(chan struct{})}
	go u.serve()
	return u, nil
}

func (u *upstream) address() string { return u.conn.LocalAddr().String() }

func (u *upstream) close() {
	u.conn.Close()
	<-u.ended
}

func (u *upstream) serve() {
	defer close(u.ended)
	buf := make([]byte, 4096)
	for {
		n, from, err := u.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		end := 12
		for end < n && buf[end] != 0 {
			end += int(buf[end]) + 1
		}
		if end += 5; end > n {
			continue
		}
		out := append([]byte(nil), buf[:end]...)
		out[2], out[3] = 0x81, 0x80
		copy(out[4:12], []byte{0, 1, 0, 1, 0, 0, 0, 0})
		out = append(out, 0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4, 192, 0, 2, 1) // A, for 300 s
		_, _ = u.conn.WriteToUDPAddrPort(out, from)
	}
}
