package front

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestLogs: what is said while there is an agent is told to it alone, all else is written down,
// and the last of that told to the next agent.
func TestLogs(t *testing.T) {
	spilled := &buffer{}
	l := &logs{spill: spilled}
	from := slog.New(slog.NewJSONHandler(l, nil))
	srv := httptest.NewServer(http.HandlerFunc(l.serve))
	defer srv.Close()
	for i := range untold + 1 {
		from.Warn("before", "n", i, "group", slog.GroupValue(slog.Int("a", 1)))
	}
	told := &buffer{}
	agent := slog.New(slog.NewTextHandler(told, &slog.HandlerOptions{Level: slog.LevelWarn}))
	res, err := http.Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- follow(t.Context(), res.Body, agent) }()
	until := func(b *buffer, text string) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !strings.Contains(b.String(), text); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("no %q in %s", text, b)
			}
		}
	}
	until(told, fmt.Sprint("n=", untold))
	from.Info("not of interest")
	from.Error("during", "why", "so")
	until(told, "level=ERROR msg=during why=so")
	if got := told.String(); strings.Contains(got, " n=0\n") || !strings.Contains(got, "n=1\n") || !strings.Contains(got, "group=map[a:1]") || strings.Contains(got, "interest") {
		t.Errorf("told:\n%s", got)
	}
	res.Body.Close()
	<-ended
	srv.CloseClientConnections()
	from.Error("after")
	until(spilled, "after")
	if got := spilled.String(); !strings.Contains(got, `"n":0,`) || strings.Contains(got, "during") {
		t.Errorf("written down:\n%s", got)
	}
	if err := follow(t.Context(), io.MultiReader(strings.NewReader("no JSON\n{}\n"), bytes.NewReader(nil)), agent); err != nil {
		t.Error(err)
	}
}
