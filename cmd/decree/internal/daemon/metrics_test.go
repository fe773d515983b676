package daemon

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/raftstore/apiserver"
)

// gauges is a gatherer with a gauge of each name.
func gauges(t *testing.T, names ...string) prometheus.Gatherer {
	t.Helper()
	r := prometheus.NewRegistry()
	for _, name := range names {
		if err := r.Register(prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: "A test."})); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// gone is what cannot be collected.
type gone struct{}

func (gone) Describe(chan<- *prometheus.Desc) {}
func (gone) Collect(to chan<- prometheus.Metric) {
	to <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(nil), errors.New("the other process is gone"))
}

// TestExposition: the metrics of a node may be several gatherers'; one that fails is
// logged and takes away its own only, unless there are no others.
func TestExposition(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	broken := prometheus.NewRegistry()
	broken.MustRegister(gone{})
	h := exposed(prometheus.Gatherers{gauges(t, "a"), broken, gauges(t, "b")}, logger)
	e, err := exposition(t.Context(), h, nil)
	if err != nil || !strings.Contains(string(e.Body), "\na 0\n") || !strings.Contains(string(e.Body), "\nb 0\n") || !strings.HasPrefix(e.Type, "text/plain") || e.Encoding != "" {
		t.Errorf("%+v, %v", e, err)
	}
	if !strings.Contains(log.String(), "the other process is gone") {
		t.Errorf("nobody is told that a part is missing: %s", &log)
	}
	if _, err = exposition(t.Context(), exposed(broken, logger), nil); err == nil || !strings.Contains(err.Error(), "the other process is gone") {
		t.Errorf("with nothing to say: %v", err)
	}

	e, err = exposition(t.Context(), h, http.Header{"Accept-Encoding": {"gzip"}, "Accept": {"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"}})
	if err != nil || !strings.HasPrefix(e.Type, "application/vnd.google.protobuf") || e.Encoding != "gzip" {
		t.Fatalf("%+v, %v", e, err)
	}
	r, err := gzip.NewReader(bytes.NewReader(e.Body))
	if err != nil {
		t.Fatal(err)
	}
	if data, err := io.ReadAll(r); err != nil || !bytes.Contains(data, []byte("A test.")) {
		t.Errorf("%q, %v", data, err)
	}
}

// TestExpositionIsBounded in size and time.
func TestExpositionIsBounded(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	long := prometheus.NewRegistry()
	long.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "long", Help: strings.Repeat("x", apiserver.MaxExposition)}))
	if _, err := exposition(t.Context(), exposed(long, logger), nil); !errors.Is(err, apiserver.ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		defer close(over)
		stuck := prometheus.NewRegistry()
		stuck.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "stuck"}, func() float64 { <-over; return 0 }))
		if _, err := exposition(t.Context(), exposed(stuck, logger), nil); !apierrors.IsServiceUnavailable(err) {
			t.Errorf("stuck: %v", err)
		}
	})
}
