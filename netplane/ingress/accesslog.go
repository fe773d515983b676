package ingress

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net/netip"
	"time"
)

// waitingRecords is how many lines wait for the writer; more are not written.
const waitingRecords = 8192

// record is one request of the access log.
type record struct {
	begun                             time.Time
	took                              time.Duration
	client                            netip.Addr
	method, host, uri, proto, agent   string
	referer, ingress, service, server string
	code                              int
	bytes                             int64
	tls                               bool
	failure                           string
}

// record is what the access log says of the exchange.
func (x *exchange) record(took time.Duration) record {
	r := x.request
	out := record{
		begun: x.begun, took: took, client: x.client, method: r.Method, host: r.Host, uri: r.RequestURI, proto: r.Proto, agent: r.UserAgent(), referer: r.Referer(),
		code: x.response.code, bytes: x.response.bytes, tls: r.TLS != nil, failure: x.failure,
	}
	if x.ingress != nil {
		out.ingress = x.ingress.name.namespace + "/" + x.ingress.name.name
	}
	if x.pool != nil {
		out.service = x.pool.key.Service
	}
	if x.endpoint != nil {
		out.server = x.endpoint.address
	}
	return out
}

// accessLog writes records beside the requests, not in their way.
type accessLog struct {
	records chan record
	out     *bufio.Writer
	log     slog.Handler
	metrics *metrics
}

func newAccessLog(w io.Writer, m *metrics) *accessLog {
	out := bufio.NewWriterSize(w, 64<<10)
	return &accessLog{records: make(chan record, waitingRecords), out: out, log: slog.NewJSONHandler(out, nil), metrics: m}
}

func (l *accessLog) add(r record) {
	select {
	case l.records <- r:
	default:
		l.metrics.unlogged.Inc()
	}
}

// run writes until ctx ends, and then what is left.
func (l *accessLog) run(ctx context.Context) {
	for {
		select {
		case r := <-l.records:
			l.write(ctx, r)
		case <-ctx.Done():
			for {
				select {
				case r := <-l.records:
					l.write(ctx, r)
				default:
					_ = l.out.Flush()
					return
				}
			}
		}
		if len(l.records) == 0 {
			_ = l.out.Flush()
		}
	}
}

func (l *accessLog) write(ctx context.Context, r record) {
	line := slog.NewRecord(r.begun, slog.LevelInfo, "request", 0)
	line.AddAttrs(
		slog.String("client", r.client.String()), slog.String("method", r.method), slog.String("host", r.host), slog.String("uri", r.uri), slog.String("proto", r.proto), slog.Bool("tls", r.tls),
		slog.Int("status", r.code), slog.Int64("bytes", r.bytes), slog.Float64("seconds", r.took.Seconds()),
		slog.String("ingress", r.ingress), slog.String("service", r.service), slog.String("endpoint", r.server), slog.String("agent", r.agent), slog.String("referer", r.referer),
	)
	if r.failure != "" {
		line.AddAttrs(slog.String("failure", r.failure))
	}
	_ = l.log.Handle(ctx, line)
}
