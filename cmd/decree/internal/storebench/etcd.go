package storebench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
)

// etcd is three etcd servers. It is called by its gRPC API (etcdserverpb, version 3)
// with hand-made messages: less work for the client than its own library does.
type etcd struct {
	procs  []*process
	conns  []*grpc.ClientConn
	leader atomic.Int32 // index
}

// raw passes bytes through gRPC.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (raw) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}

const (
	etcdClientPort = 17543
	etcdPeerPort   = 17643
)

func startEtcd(ctx context.Context, cfg Config) (_ *etcd, err error) {
	e := &etcd{}
	defer func() {
		if err != nil {
			e.stop()
		}
	}()
	var cluster []string
	for i := range 3 {
		cluster = append(cluster, fmt.Sprintf("e%d=http://127.0.0.1:%d", i+1, etcdPeerPort+i))
	}
	for i := range 3 {
		name, peerURL, url := fmt.Sprint("e", i+1), fmt.Sprintf("http://127.0.0.1:%d", etcdPeerPort+i), fmt.Sprintf("http://127.0.0.1:%d", etcdClientPort+i)
		p := &process{name: name, log: filepath.Join(cfg.Dir, name+".log"), command: []string{
			cfg.Etcd, "--name", name, "--data-dir", filepath.Join(cfg.Dir, name),
			"--initial-advertise-peer-urls", peerURL, "--listen-peer-urls", peerURL,
			"--advertise-client-urls", url, "--listen-client-urls", url,
			"--initial-cluster", strings.Join(cluster, ","), "--initial-cluster-state", "new", "--logger", "zap", "--log-level", "error",
		}}
		if err := p.start(); err != nil {
			return nil, err
		}
		e.procs = append(e.procs, p)
		conn, err := connectEtcd(url)
		if err != nil {
			return nil, err
		}
		e.conns = append(e.conns, conn)
	}
	return e, e.findLeader(ctx)
}

func connectEtcd(url string) (*grpc.ClientConn, error) {
	return grpc.NewClient(strings.TrimPrefix(url, "http://"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 200 * time.Millisecond}, MinConnectTimeout: time.Second}))
}

// call sends one message.
func (e *etcd) call(ctx context.Context, server int, method string, request []byte, opts ...grpc.CallOption) ([]byte, error) {
	var answer []byte
	err := e.conns[server].Invoke(ctx, method, &request, &answer, opts...)
	return answer, err
}

// findLeader asks for the status of each member: member_id of the header is its own
// id, field 4 of the answer the leader's.
func (e *etcd) findLeader(ctx context.Context) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		for i := range e.conns {
			one, cancel := context.WithTimeout(ctx, time.Second)
			answer, err := e.call(one, i, "/etcdserverpb.Maintenance/Status", nil)
			cancel()
			if err != nil {
				continue
			}
			header, _ := field(answer, 1)
			_, id := field(header, 2)
			_, leader := field(answer, 4)
			if leader != 0 && leader == id {
				e.leader.Store(int32(i))
				return nil
			}
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return errors.New("etcd has no leader")
		}
		time.Sleep(20 * time.Millisecond) // other processes bring no event here
	}
}

// field returns the last value of a field: its bytes, or its number.
func field(b []byte, want protowire.Number) (data []byte, n uint64) {
	for len(b) > 0 {
		num, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			return data, n
		}
		b = b[size:]
		switch {
		case num == want && typ == protowire.BytesType:
			data, _ = protowire.ConsumeBytes(b)
		case num == want && typ == protowire.VarintType:
			n, _ = protowire.ConsumeVarint(b)
		}
		size = protowire.ConsumeFieldValue(num, typ, b)
		if size < 0 {
			return data, n
		}
		b = b[size:]
	}
	return data, n
}

func bytesField(b []byte, num protowire.Number, v string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), v)
}

func (e *etcd) name() string { return "etcd" }

func (e *etcd) fill(ctx context.Context, from, to, size int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(256)
	for i := from; i < to; i++ {
		g.Go(func() error { return e.putSize(ctx, i, size) })
	}
	return g.Wait()
}

func etcdKey(i int) string { return "/bench/k" + strconv.Itoa(i) }

func (e *etcd) put(ctx context.Context, i int) error { return e.putSize(ctx, i, valueSize) }

func (e *etcd) putSize(ctx context.Context, i, size int) error {
	_, err := e.call(ctx, int(e.leader.Load()), "/etcdserverpb.KV/Put", bytesField(bytesField(nil, 1, etcdKey(i)), 2, newValue(size)))
	return err
}

func (e *etcd) get(ctx context.Context, i int, stale bool) error {
	request := bytesField(nil, 1, etcdKey(i))
	if stale { // serializable
		request = protowire.AppendVarint(protowire.AppendTag(request, 7, protowire.VarintType), 1)
	}
	_, err := e.call(ctx, 0, "/etcdserverpb.KV/Range", request)
	return err
}

func (e *etcd) watch(ctx context.Context, n *atomic.Int64) error {
	stream, err := e.conns[0].NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/etcdserverpb.Watch/Watch")
	if err != nil {
		return err
	}
	create := bytesField(bytesField(nil, 1, "/bench/"), 2, "/bench0")
	request := bytesField(nil, 1, string(create))
	if err := stream.SendMsg(&request); err != nil {
		return err
	}
	var created []byte
	if err := stream.RecvMsg(&created); err != nil {
		return err
	}
	go func() {
		for {
			var answer []byte
			if err := stream.RecvMsg(&answer); err != nil {
				return
			}
			n.Add(countField(answer, 11))
		}
	}()
	return nil
}

func countField(b []byte, want protowire.Number) (n int64) {
	for len(b) > 0 {
		num, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			return n
		}
		if num == want {
			n++
		}
		b = b[size:]
		if size = protowire.ConsumeFieldValue(num, typ, b); size < 0 {
			return n
		}
		b = b[size:]
	}
	return n
}

func (e *etcd) resident() float64 { return resident(e.procs) }

// term is field 6 of a member's status.
func (e *etcd) term(ctx context.Context) (uint64, error) {
	answer, err := e.call(ctx, 0, "/etcdserverpb.Maintenance/Status", nil)
	_, term := field(answer, 6)
	return term, err
}

// save stores what the Snapshot call streams: field 3 of each message.
func (e *etcd) save(ctx context.Context, file string) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	stream, err := e.conns[0].NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/etcdserverpb.Maintenance/Snapshot")
	if err != nil {
		return err
	}
	request := []byte{}
	if err := errors.Join(stream.SendMsg(&request), stream.CloseSend()); err != nil {
		return err
	}
	for {
		var answer []byte
		err := stream.RecvMsg(&answer)
		if errors.Is(err, io.EOF) {
			return out.Sync()
		}
		if err != nil {
			return err
		}
		blob, _ := field(answer, 3)
		if _, err := out.Write(blob); err != nil {
			return err
		}
	}
}

// restore needs etcdctl. It starts a member from what that made, and waits until it has
// answered a read.
func (e *etcd) restore(ctx context.Context, file string) error {
	tool, err := exec.LookPath("etcdctl")
	if err != nil {
		return errNotMeasured
	}
	data, url, peerURL := file+".restored", fmt.Sprintf("http://127.0.0.1:%d", etcdClientPort+len(e.procs)), fmt.Sprintf("http://127.0.0.1:%d", etcdPeerPort+len(e.procs))
	cmd := exec.CommandContext(ctx, tool, "snapshot", "restore", file, "--data-dir", data, "--name", "r1", "--initial-cluster", "r1="+peerURL, "--initial-advertise-peer-urls", peerURL)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("etcdctl snapshot restore: %w: %s", err, out)
	}
	p := &process{name: "r1", log: data + ".log", command: []string{
		e.procs[0].command[0], "--name", "r1", "--data-dir", data, "--listen-peer-urls", peerURL, "--advertise-client-urls", url, "--listen-client-urls", url,
		"--logger", "zap", "--log-level", "error",
	}}
	if err := p.start(); err != nil {
		return err
	}
	defer p.kill()
	conn, err := connectEtcd(url)
	if err != nil {
		return err
	}
	defer conn.Close()
	r := &etcd{conns: []*grpc.ClientConn{conn}}
	answer, err := r.call(ctx, 0, "/etcdserverpb.KV/Range", bytesField(nil, 1, etcdKey(0)), grpc.WaitForReady(true))
	if err == nil && countField(answer, 2) != 1 {
		err = errors.New("etcd: the restored member lacks a key")
	}
	return err
}

func (e *etcd) killLeader(ctx context.Context) (func() error, error) {
	if err := e.findLeader(ctx); err != nil {
		return nil, err
	}
	p := e.procs[e.leader.Load()]
	p.kill()
	return func() error {
		if err := p.start(); err != nil {
			return err
		}
		for i := range e.conns { // all must answer again before the next kill
			if _, err := e.call(ctx, i, "/etcdserverpb.KV/Range", bytesField(nil, 1, "x"), grpc.WaitForReady(true)); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// etcdPatience is how long one member has for a put before the next is asked. A member
// without a leader would hold it for seven seconds, several times what an election takes.
const etcdPatience = 250 * time.Millisecond

// write puts through whichever server answers.
func (e *etcd) write(ctx context.Context, i int) error {
	request := bytesField(bytesField(nil, 1, "/failover"), 2, strconv.Itoa(i))
	for {
		for s := range e.conns {
			one, cancel := context.WithTimeout(ctx, etcdPatience)
			_, err := e.call(one, s, "/etcdserverpb.KV/Put", request)
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

func (e *etcd) stop() {
	for _, c := range e.conns {
		c.Close()
	}
	for _, p := range e.procs {
		p.kill()
	}
}
