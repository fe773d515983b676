package front

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"golang.org/x/sys/unix"
)

// KeeperConfig says which process to keep.
type KeeperConfig struct {
	// Dir is the folder of the process' socket; it is made if there is none.
	Dir string
	// LogFile takes what the process says while there is no agent.
	LogFile string
	Config  Config
	// Log takes what the process says, as one's own; nil: slog.Default.
	Log *slog.Logger
}

// Keeper holds on to the process of a folder, of which there is one. All methods are safe for
// concurrent use.
type Keeper struct {
	cfg    KeeperConfig
	config []byte
	build  string
	log    *slog.Logger
	client *http.Client

	up atomic.Bool // the process is there; changes while mu is held

	want    atomic.Pointer[Objects]
	offered chan struct{} // holds one signal: it is wanted, and nobody waits for it

	mu   sync.Mutex
	old  bool    // it is of another program or configuration, and could not be replaced
	have Objects // that the process has
	name string  // of those; empty: nobody knows what it has
}

// Bounds of how long the process may take: to answer, and to take over what it serves.
const (
	answerTimeout = 10 * time.Second
	// gatherTimeout is short, so that a scrape of the node has its other metrics in time.
	gatherTimeout = 3 * time.Second
	stateTimeout  = 30 * time.Second
)

// logSize is how large a log file may be when a process begins, in bytes.
const logSize = 10 << 20

// NewKeeper starts nothing yet.
func NewKeeper(cfg KeeperConfig) (*Keeper, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if n := len(socketPath(cfg.Dir)); n > 107 {
		return nil, fmt.Errorf("socket path %s has %d bytes, more than the 107 a socket path may have: choose a shorter run folder", socketPath(cfg.Dir), n)
	}
	if cfg.Config.Ingress != nil {
		if err := cfg.Config.Ingress.Validate(); err != nil {
			return nil, err
		}
	}
	config, err := json.Marshal(cfg.Config)
	if err != nil {
		return nil, err
	}
	k := &Keeper{cfg: cfg, config: config, log: cfg.Log, offered: make(chan struct{}, 1)}
	if k.build, err = build(); err != nil {
		return nil, err
	}
	k.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socketPath(cfg.Dir))
		},
	}}
	return k, nil
}

// Close lets go of the process, which goes on.
func (k *Keeper) Close() { k.client.CloseIdleConnections() }

// Set makes o what is served. When it returns without an error, no request is led to an
// endpoint that o does not have. After an error, Run tries again.
func (k *Keeper) Set(ctx context.Context, o Objects) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.want.Store(&o)
	return k.tell(ctx)
}

// Offer makes o what is served as soon as Run can see to it.
func (k *Keeper) Offer(o Objects) {
	k.want.Store(&o)
	select {
	case k.offered <- struct{}{}:
	default:
	}
}

// tell makes the process serve what is wanted. The caller holds mu.
func (k *Keeper) tell(ctx context.Context) error {
	for again := false; ; again = true {
		err := k.connect(ctx)
		if want := k.want.Load(); err == nil && want != nil {
			err = k.send(ctx, want)
		}
		if err == nil {
			return nil
		}
		k.forget()
		if again || ctx.Err() != nil {
			return fmt.Errorf("servers of this node: %w", err)
		}
	}
}

// send tells the process what has changed.
func (k *Keeper) send(ctx context.Context, want *Objects) error {
	d, err := between(k.name, &k.have, want)
	if err != nil {
		return err
	}
	if k.name != "" && len(d.Changes) == 0 && d.Settings.equal(settingsOf(&k.have)) {
		return nil
	}
	var body bytes.Buffer
	if err := gob.NewEncoder(&body).Encode(d); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	if err := k.post(ctx, "state", &body); err != nil {
		return err
	}
	k.have, k.name = *want, d.To
	return nil
}

func (k *Keeper) post(ctx context.Context, what string, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://front/"+what, body)
	if err != nil {
		return err
	}
	_, err = k.do(req)
	return err
}

// errConflict: the process is another one, or knows other things, than was thought.
var errConflict = errors.New("conflict")

func (k *Keeper) do(req *http.Request) ([]byte, error) {
	res, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if res.StatusCode == http.StatusConflict {
		return nil, fmt.Errorf("%w: %s", errConflict, bytes.TrimSpace(data))
	}
	if res.StatusCode >= 300 {
		return nil, fmt.Errorf("%s: %s", res.Status, bytes.TrimSpace(data))
	}
	return data, err
}

// connect finds the process, or starts it, and has it replaced if it is of another program or
// configuration. The caller holds mu.
func (k *Keeper) connect(ctx context.Context) error {
	if k.up.Load() {
		return nil
	}
	has, err := k.ask(ctx)
	k.old = false
	switch {
	case err == nil && has.Build == k.build && bytes.Equal(has.Config, k.config):
		k.log.Debug("servers of this node go on", "socket", socketPath(k.cfg.Dir))
	case err == nil:
		if err := k.replace(ctx); errors.Is(err, errConflict) {
			return err
		} else if err != nil {
			k.old = true // it still serves, and that is better than nobody
			k.log.Error("servers of this node go on as they were; will try again", "err", err)
		}
	case ctx.Err() != nil:
		return err
	default:
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
			k.log.Error("servers of this node do not answer, and are ended", "err", err)
		}
		if err := Stop(ctx, k.cfg.Dir); err != nil {
			return err
		}
		if err := k.start(ctx); err != nil {
			return err
		}
	}
	k.up.Store(true)
	return nil
}

// ask asks the process what it is.
func (k *Keeper) ask(ctx context.Context) (a about, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://front/about", nil)
	if err != nil {
		return a, err
	}
	data, err := k.do(req)
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(data, &a)
}

// replace has the process start its successor.
func (k *Keeper) replace(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	body, err := json.Marshal(successor{Program: self, Config: k.config})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience+answerTimeout)
	defer cancel()
	defer k.client.CloseIdleConnections() // they are to the predecessor
	return k.post(ctx, "successor", bytes.NewReader(body))
}

// start starts a process that has nobody to take over from.
func (k *Keeper) start(ctx context.Context) error {
	if err := os.MkdirAll(k.cfg.Dir, 0o700); err != nil {
		return err
	}
	log, err := openLog(k.cfg.LogFile)
	if err != nil { // such as that of a full disk
		k.log.Error("what the servers of this node say while there is no agent will be lost", "err", err)
		if log, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return err
		}
	}
	defer log.Close()
	if err := os.Remove(socketPath(k.cfg.Dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", socketPath(k.cfg.Dir))
	if err != nil {
		return err
	}
	defer ln.Close()
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // it is the process' from now on
	control, err := ln.(*net.UnixListener).File()
	if err != nil {
		return err
	}
	defer control.Close()
	err = spawn(ctx, "/proc/self/exe", []string{os.Args[0], Verb, k.cfg.Dir}, int(log.Fd()), int(control.Fd()), nil, birth{Config: k.config})
	if err != nil {
		return errors.Join(err, os.Remove(socketPath(k.cfg.Dir)))
	}
	return nil
}

// openLog appends to a log, moving a large one aside first.
func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if st, err := os.Stat(path); err == nil && st.Size() > logSize {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

// Run keeps the process running, with what was set last, and logs what it says, until ctx
// ends; the process goes on then.
func (k *Keeper) Run(ctx context.Context) error {
	const first, longest = 50 * time.Millisecond, 10 * time.Second
	for wait := first; ; {
		begun := time.Now()
		err := k.follow(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		k.log.Warn("servers of this node have ended, or are out of reach", "err", err)
		if time.Since(begun) > longest {
			wait = first
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		wait = min(2*wait, longest)
	}
}

// follow listens to the process until it ends.
func (k *Keeper) follow(ctx context.Context) error {
	k.mu.Lock()
	err := k.tell(ctx)
	old := k.old
	k.mu.Unlock()
	if err != nil {
		return err
	}
	if old {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Minute)
		defer cancel()
	}
	defer k.lost()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var telling sync.WaitGroup
	telling.Go(func() { cancel(k.deliver(ctx)) })
	defer telling.Wait()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://front/logs", nil)
	if err != nil {
		return err
	}
	res, err := k.client.Do(req)
	if err == nil {
		err = follow(ctx, res.Body, k.log)
		res.Body.Close()
	}
	cancel(err)
	return context.Cause(ctx)
}

// deliver tells the process of what is offered, until ctx ends or that fails.
func (k *Keeper) deliver(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.offered:
		}
		k.mu.Lock()
		err := k.tell(ctx)
		k.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// Up reports whether there is a process that serves, without waiting for one.
func (k *Keeper) Up() bool { return k.up.Load() }

// lost has the next one look for the process anew.
func (k *Keeper) lost() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.forget()
}

// forget makes nothing known of the process. The caller holds mu.
func (k *Keeper) forget() {
	k.up.Store(false)
	k.name, k.have = "", Objects{}
}

// Gather implements [prometheus.Gatherer] with the metrics of the process: none if it does
// not answer.
func (k *Keeper) Gather() (families []*dto.MetricFamily, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), gatherTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://front/metrics", nil)
	if err != nil {
		return nil, err
	}
	format := expfmt.NewFormat(expfmt.TypeProtoDelim)
	req.Header.Set("Accept", string(format))
	res, err := k.client.Do(req)
	if err != nil {
		k.log.Debug("metrics of the servers of this node", "err", err)
		return nil, nil
	}
	defer res.Body.Close()
	for in := expfmt.NewDecoder(res.Body, expfmt.ResponseFormat(res.Header)); ; {
		f := &dto.MetricFamily{}
		if err := in.Decode(f); errors.Is(err, io.EOF) {
			return families, nil
		} else if err != nil {
			return nil, fmt.Errorf("metrics of the servers of this node: %w", err)
		}
		families = append(families, f)
	}
}

// Stop ends all processes of a folder, those that have a successor as well.
func Stop(ctx context.Context, dir string) error {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		running, err := processes(dir)
		if err != nil {
			return err
		}
		for _, pid := range running {
			if err := end(ctx, pid, signal); err != nil {
				return fmt.Errorf("end the servers of this node (pid %d): %w", pid, err)
			}
		}
		if len(running) == 0 {
			break
		}
	}
	return nil
}

// processes are those of a folder.
func processes(dir string) (pids []int, err error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		args := bytes.Split(line, []byte{0})
		if len(args) < 3 || string(args[1]) != Verb || string(args[2]) != dir {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// end sends a signal and waits a while for the process to be gone.
func end(ctx context.Context, pid int, signal syscall.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for wait := time.Now().Add(5 * time.Second); time.Now().Before(wait) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n == 1 || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return ctx.Err()
}
