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
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
)

// Verb is the argument with which a program must call [Main].
const Verb = "front"

// maxState bounds what one request may tell, in bytes.
const maxState = 1 << 30

// Descriptors that a process begins with, behind those of every program. The sockets that it
// takes over follow.
const (
	controlFD = iota + 3
	readyFD
	socketFD
)

// birth is what a process is told on its standard input.
type birth struct {
	Config  []byte   // in JSON, so that versions agree on what is equal
	Sockets []string // what the descriptors from socketFD on are
	State   delta    // from nothing; with an empty To there is none
}

// process is one that serves.
type process struct {
	config  []byte
	build   string
	servers *Servers
	sockets *Sockets
	logs    *logs
	log     *slog.Logger
	control *http.Server
	retire  context.CancelFunc

	mu      sync.Mutex
	objects Objects
	name    string // of objects; empty: there are none yet
	retired bool   // a successor has taken over
}

// Main is the process: it takes what it shall be from its standard input, serves, and obeys
// the agent on the socket that it begins with. It returns when a successor has taken over and
// all requests have ended, and when ctx ends, whatever is under way. The folder in its
// arguments is for [Stop], which finds it by that.
func Main(ctx context.Context) error {
	ready := os.NewFile(readyFD, "ready")
	p, ln, err := newProcess()
	if err != nil {
		_, _ = io.WriteString(ready, err.Error())
		return err
	}
	retiring, cancel := context.WithCancel(context.Background())
	defer cancel()
	p.retire = func() {
		_, _ = ln.Close(), unix.Close(controlFD) // whoever comes now comes to the successor
		p.control.SetKeepAlivesEnabled(false)    // and whoever is here, too
		cancel()
	}
	p.control.BaseContext = func(net.Listener) context.Context { return retiring }
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := p.control.Serve(ln); retiring.Err() == nil && !errors.Is(err, net.ErrClosed) {
			p.log.Error("no agent is heard any more", "err", err)
		}
	})
	if _, err := io.WriteString(ready, readyWord); err != nil {
		return fmt.Errorf("who started this process has ended: %w", err)
	}
	ready.Close()
	retired := make(chan struct{})
	go func() {
		defer close(retired)
		p.servers.Run(retiring)
		serving.Wait()
	}()
	select {
	case <-retired:
	case <-ctx.Done():
	}
	return p.control.Close()
}

// readyWord is what a process says when it is about to serve.
const readyWord = "ready"

// newProcess becomes what its birth says.
func newProcess() (*process, net.Listener, error) {
	var b birth
	if err := gob.NewDecoder(io.LimitReader(os.Stdin, maxState)).Decode(&b); err != nil {
		return nil, nil, fmt.Errorf("read what to serve: %w", err)
	}
	fds := make([]int, len(b.Sockets))
	for i := range fds {
		fds[i] = socketFD + i
	}
	p := &process{config: b.Config, sockets: &Sockets{}, logs: &logs{spill: os.Stderr}}
	p.sockets.inherit(b.Sockets, fds)
	unix.CloseOnExec(readyFD)
	unix.CloseOnExec(controlFD) // it is the successor's by way of spawn only
	ln, err := listenerOf(controlFD)
	if err != nil {
		return nil, nil, fmt.Errorf("socket for the agent: %w", err)
	}
	var cfg Config
	if err := json.Unmarshal(b.Config, &cfg); err != nil {
		return nil, nil, fmt.Errorf("configuration: %w", err)
	}
	if p.build, err = build(); err != nil {
		return nil, nil, err
	}
	p.log = slog.New(slog.NewJSONHandler(p.logs, &slog.HandlerOptions{Level: cfg.Level}))
	if err := confine(); errors.Is(err, errors.ErrUnsupported) {
		p.log.Warn("the servers have more rights than they need: a program built with cgo cannot give them back")
	} else if err != nil {
		return nil, nil, err
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{Namespace: "decree_front"}))
	if p.servers, err = New(cfg, p.sockets, metrics, p.log); err != nil {
		return nil, nil, err
	}
	if b.State.To != "" {
		if err := p.set(b.State); err != nil {
			return nil, nil, err
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /about", p.about)
	mux.HandleFunc("POST /state", p.state)
	mux.HandleFunc("POST /successor", p.succeed)
	mux.HandleFunc("GET /logs", p.logs.serve)
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	p.control = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelWarn)}
	return p, ln, nil
}

// build tells programs apart.
func build() (string, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &st); err != nil {
		return "", fmt.Errorf("this program: %w", err)
	}
	return fmt.Sprintf("%d:%d:%d.%09d", st.Dev, st.Ino, st.Mtim.Sec, st.Mtim.Nsec), nil
}

// about is what an agent wants to know first.
type about struct {
	Build  string
	Config []byte
}

func (p *process) about(w http.ResponseWriter, _ *http.Request) {
	_ = json.NewEncoder(w).Encode(about{p.build, p.config}) // the agent asks again
}

func (p *process) state(w http.ResponseWriter, r *http.Request) {
	var d delta
	if err := gob.NewDecoder(http.MaxBytesReader(w, r.Body, maxState)).Decode(&d); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	switch err := p.set(d); {
	case errors.Is(err, errOther), errors.Is(err, errRetired):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// errOther: a change is one of other objects than those that are served.
var errOther = errors.New("this is a change of something else than what is served")

// errRetired: whoever asks shall ask the successor.
var errRetired = errors.New("a successor has taken over")

func (p *process) set(d delta) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.retired {
		return errRetired
	}
	from := p.objects
	switch d.From {
	case "":
		from = Objects{}
	case p.name:
	default:
		return errOther
	}
	o, err := d.apply(from)
	if err != nil {
		return err
	}
	p.objects, p.name = o, d.To
	p.servers.Set(o)
	return nil
}

// successor is who shall take over.
type successor struct {
	Program string
	Config  []byte
}

// succeed starts a successor with all that this process has, and retires once it serves. If
// it does not, nothing has changed.
func (p *process) succeed(w http.ResponseWriter, r *http.Request) {
	var to successor
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&to); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.mu.Lock() // until it has all that this one knows
	defer p.mu.Unlock()
	if p.retired { // while this request waited
		http.Error(w, errRetired.Error(), http.StatusConflict)
		return
	}
	if err := p.beget(r.Context(), to); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	p.retired = true
	p.retire()
	w.Header().Set("Connection", "close") // the next request is the successor's
	w.WriteHeader(http.StatusNoContent)
}

func (p *process) beget(ctx context.Context, to successor) error {
	b := birth{Config: to.Config}
	if p.name != "" {
		var err error
		if b.State, err = between("", &Objects{}, &p.objects); err != nil {
			return err
		}
		b.State.To = p.name
	}
	keys, fds, err := p.sockets.copies()
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	if err != nil {
		return err
	}
	b.Sockets = keys
	return spawn(ctx, to.Program, os.Args, int(os.Stderr.Fd()), controlFD, fds, b)
}

// patience is how long a process may take to begin.
const patience = 30 * time.Second

// spawn starts a process and returns once it serves.
func spawn(ctx context.Context, program string, args []string, log, control int, sockets []int, b birth) error {
	var in [2]*os.File // what it is told
	var out [2]*os.File
	var err error
	if in[0], in[1], err = os.Pipe(); err != nil {
		return err
	}
	defer in[0].Close()
	defer in[1].Close()
	if out[0], out[1], err = os.Pipe(); err != nil {
		return err
	}
	defer out[0].Close()
	defer out[1].Close()
	files := []uintptr{in[0].Fd(), uintptr(log), uintptr(log), uintptr(control), out[1].Fd()}
	for _, fd := range sockets {
		files = append(files, uintptr(fd))
	}
	// Not os/exec: it would put the sockets, which both processes share, into blocking mode.
	pid, err := syscall.ForkExec(program, args, &syscall.ProcAttr{
		Dir: "/", Env: environment(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s %s: %w", args[0], Verb, err)
	}
	child, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = child.Wait() // or else it would stay a zombie
	}()
	in[0].Close()
	out[1].Close()
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("it did not say that it serves"))
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		_ = in[1].SetWriteDeadline(time.Unix(1, 0))
		_ = out[0].SetReadDeadline(time.Unix(1, 0))
	})()
	written := gob.NewEncoder(in[1]).Encode(b)
	in[1].Close()
	said, err := io.ReadAll(io.LimitReader(out[0], 4096))
	if string(said) == readyWord {
		return nil
	}
	_ = child.Kill()
	<-gone
	if len(said) > 0 {
		return fmt.Errorf("start %s %s: %s", args[0], Verb, bytes.TrimSpace(said))
	}
	return fmt.Errorf("start %s %s: it ended: %w", args[0], Verb, errors.Join(written, err, context.Cause(ctx)))
}

// environment is what processes of this package get: nothing that was meant for the agent.
func environment() (env []string) {
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "DECREE_") {
			env = append(env, e)
		}
	}
	return env
}

// listenerOf is a listener on a copy of a descriptor.
func listenerOf(fd int) (net.Listener, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(n), "control")
	defer f.Close()
	return net.FileListener(f)
}

func socketPath(dir string) string { return filepath.Join(dir, "front.sock") }
