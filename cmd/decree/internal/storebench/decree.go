package storebench

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// process is one server.
type process struct {
	name    string
	command []string
	log     string
	cmd     *exec.Cmd
	ended   chan struct{}
}

func (p *process) start() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd = exec.Command(p.command[0], p.command[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	ended, cmd := make(chan struct{}), p.cmd
	p.ended = ended
	go func() { defer close(ended); _ = cmd.Wait() }() // killed: it has an error
	return nil
}

func (p *process) kill() {
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.ended
}

// resident is the memory of the largest of some processes in MB.
func resident(ps []*process) float64 {
	most := 0.0
	for _, p := range ps {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
				most = max(most, kb/1024)
			}
		}
	}
	return most
}

// decree is three servers. Puts travel as servers' forwarded proposals do, everything
// else is the API.
type decree struct {
	procs     []*process
	addresses []string
	peers     *peer.Client
	clients   []*client.Client
	leader    atomic.Pointer[string]
}

const firstPort = 17443

func startDecree(ctx context.Context, cfg Config) (_ *decree, err error) {
	d := &decree{}
	defer func() {
		if err != nil {
			d.stop()
		}
	}()
	data := func(i int) string { return filepath.Join(cfg.Dir, fmt.Sprint("s", i+1)) }
	var token string
	for i := range 3 {
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+i)
		p := &process{name: fmt.Sprint("s", i+1), log: data(i) + ".log", command: []string{
			cfg.Binary, "server", "--data", data(i), "--node", fmt.Sprint("s", i+1), "--address", address, "--log-level", "info",
		}}
		if i > 0 {
			p.command = append(p.command, "--join", d.addresses[0], "--token", token)
		}
		if err := p.start(); err != nil {
			return nil, err
		}
		d.procs, d.addresses = append(d.procs, p), append(d.addresses, address)
		c, err := connect(ctx, data(i))
		if err != nil {
			return nil, fmt.Errorf("%w (see %s)", err, p.log)
		}
		d.clients = append(d.clients, c)
		if i == 0 {
			if token, err = newToken(ctx, c); err != nil {
				return nil, err
			}
		}
	}
	keeper, err := pki.OpenKeeper(filepath.Join(data(0), "pki", "server"), nil)
	if err != nil {
		return nil, err
	}
	d.peers = peer.NewClient(func() *tls.Config { return keeper.ClientTLS() })
	return d, d.settle(ctx)
}

// connect waits for the administrator's credentials of a server.
func connect(ctx context.Context, data string) (*client.Client, error) {
	deadline := time.Now().Add(30 * time.Second)
	for {
		cfg, err := client.FromKubeconfig(filepath.Join(data, "admin.kubeconfig"))
		if err == nil {
			cfg.Retries = -1 // a server that is down has others beside it
			return client.New(cfg)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return nil, err
		}
		time.Sleep(20 * time.Millisecond) // another process writes the file
	}
}

func newToken(ctx context.Context, c *client.Client) (string, error) {
	data, err := c.Raw(ctx, http.MethodPost, "/decree/v1/tokens", nil, "application/json", []byte(`{"role":"server"}`))
	var t struct{ Token string }
	if err == nil {
		err = json.Unmarshal(data, &t)
	}
	return t.Token, err
}

// settle waits until three servers vote and have applied what the leader has, and notes
// who leads.
func (d *decree) settle(ctx context.Context) error {
	deadline := time.Now().Add(60 * time.Second)
	for {
		rows, err := d.members(ctx)
		voters := 0
		for _, r := range rows {
			if r.State == "healthy" && r.Behind == 0 && (r.Role == "voter" || r.Role == "leader") {
				voters++
			}
		}
		if voters == 3 {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("no three servers that vote: %+v, %w", rows, err)
		}
		time.Sleep(20 * time.Millisecond) // other processes bring no event here
	}
}

func (d *decree) members(ctx context.Context) (rows []membership.Server, err error) {
	for _, c := range d.clients {
		one, cancel := context.WithTimeout(ctx, time.Second)
		var data []byte
		data, err = c.Raw(one, http.MethodGet, "/decree/v1/members", nil, "", nil)
		cancel()
		if err != nil {
			continue
		}
		if err = json.Unmarshal(data, &rows); err != nil {
			return nil, err
		}
		for _, r := range rows {
			if r.Role == "leader" {
				d.leader.Store(&r.Address)
			}
		}
		return rows, nil
	}
	return nil, err
}

func (d *decree) name() string { return "decree" }

func object(i, size int) *corev1.ConfigMap {
	o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "k" + strconv.Itoa(i)}, Data: map[string]string{"v": newValue(size)}}
	o.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMap"))
	return o
}

func (d *decree) propose(ctx context.Context, t command.Txn) error {
	t.Time, t.Actor = time.Now().UnixMilli(), "bench"
	data, err := command.EncodeTxn(&t)
	if err != nil {
		return err
	}
	for {
		r, err := d.peers.Propose(ctx, *d.leader.Load(), data)
		if errors.Is(err, raftstore.ErrNotLeader) { // nothing happened: another one leads
			if _, err := d.members(ctx); err != nil {
				return err
			}
			continue
		}
		if err == nil {
			err = r.Err()
		}
		return err
	}
}

func (d *decree) fill(ctx context.Context, from, to, size int) error {
	for from < to {
		t := command.Txn{}
		for ; from < to && len(t.Mutations) < 1000; from++ {
			o := object(from, size)
			t.Mutations = append(t.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
		}
		if err := d.propose(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

func (d *decree) put(ctx context.Context, i int) error {
	o := object(i, valueSize)
	return d.propose(ctx, command.Txn{Mutations: []api.Mutation{{Verb: api.Update, Key: api.KeyOf(o), Object: o}}})
}

func (d *decree) get(ctx context.Context, i int, stale bool) error {
	q := map[string][]string{}
	if stale {
		q["resourceVersion"] = []string{"0"}
	}
	_, err := d.clients[0].Raw(ctx, http.MethodGet, "/api/v1/namespaces/default/configmaps/k"+strconv.Itoa(i), q, "", nil)
	return err
}

func (d *decree) watch(ctx context.Context, n *atomic.Int64) error {
	k, _ := api.KindFor(api.ConfigMaps)
	data, err := d.clients[0].Raw(ctx, http.MethodGet, "/api/v1/namespaces/default/configmaps", map[string][]string{"limit": {"1"}}, "", nil)
	if err != nil {
		return err
	}
	var list metav1.PartialObjectMetadataList
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	after, err := strconv.ParseUint(list.ResourceVersion, 10, 64)
	if err != nil {
		return err
	}
	body, err := d.clients[0].WatchRaw(ctx, k, "default", after)
	if err != nil {
		return err
	}
	go func() {
		defer body.Close()
		buf := make([]byte, 256<<10)
		for {
			c, err := body.Read(buf)
			n.Add(int64(bytes.Count(buf[:c], []byte{'\n'})))
			if err != nil {
				return
			}
		}
	}()
	return nil
}

func (d *decree) resident() float64 { return resident(d.procs) }

func (d *decree) term(ctx context.Context) (uint64, error) {
	data, err := d.clients[0].Raw(ctx, http.MethodGet, "/metrics", nil, "", nil)
	if err != nil {
		return 0, err
	}
	n, err := metric(string(data), "decree_store_term")
	return uint64(n), err
}

// metric finds a metric without labels in the text format of Prometheus.
func metric(text, name string) (float64, error) {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(rest), 64)
		}
	}
	return 0, fmt.Errorf("the server does not tell %s", name)
}

func (d *decree) save(ctx context.Context, file string) error {
	return d.run(ctx, "snapshot", "save", file, "--plaintext")
}

// restore also starts the server, and waits until it has answered a read.
func (d *decree) restore(ctx context.Context, file string) error {
	data, address := file+".restored", fmt.Sprintf("127.0.0.1:%d", firstPort+len(d.procs))
	if err := d.run(ctx, "snapshot", "restore", file, "--plaintext", "--data", data, "--node", "r1", "--address", address); err != nil {
		return err
	}
	p := &process{name: "r1", log: data + ".log", command: []string{d.procs[0].command[0], "server", "--data", data, "--node", "r1", "--address", address}}
	if err := p.start(); err != nil {
		return err
	}
	defer p.kill()
	c, err := connect(ctx, data)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Raw(ctx, http.MethodGet, "/api/v1/namespaces/default/configmaps/k0", nil, "", nil)
	return err
}

// run calls the program as the first server's administrator.
func (d *decree) run(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, d.procs[0].command[0], args...)
	dir := strings.TrimSuffix(d.procs[0].log, ".log")
	cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+filepath.Join(dir, "admin.kubeconfig"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("decree %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (d *decree) killLeader(ctx context.Context) (func() error, error) {
	if _, err := d.members(ctx); err != nil {
		return nil, err
	}
	for i, a := range d.addresses {
		if a == *d.leader.Load() {
			d.procs[i].kill()
			return func() error {
				if err := d.procs[i].start(); err != nil {
					return err
				}
				return d.settle(ctx)
			}, nil
		}
	}
	return nil, errors.New("no server leads")
}

// write makes a token, through whichever server answers: the API waits for a leader.
func (d *decree) write(ctx context.Context, _ int) error {
	for {
		for _, c := range d.clients {
			one, cancel := context.WithTimeout(ctx, 10*time.Second)
			_, err := newToken(one, c)
			cancel()
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return err
			}
		}
	}
}

func (d *decree) stop() {
	for _, c := range d.clients {
		c.Close()
	}
	if d.peers != nil {
		d.peers.Close()
	}
	for _, p := range d.procs {
		p.kill()
	}
}
