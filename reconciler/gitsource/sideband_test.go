package gitsource

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBandKeepsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := httptest.NewRecorder()
		b := newBand(w, false)
		time.Sleep(2*keepaliveEvery + time.Second)
		synctest.Wait()
		if got := w.Body.String(); got != strings.Repeat("0005\x01", 2) {
			t.Errorf("in silence it sent %q", got)
		}
		fmt.Fprint(b, "half a line")
		time.Sleep(keepaliveEvery)
		fmt.Fprint(b, ", the rest\nnext")
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		want := strings.Repeat("0005\x01", 2) + "0010\x02half a line" + "0010\x02, the rest\n" + "000a\x02next\n" + "0000"
		if got := w.Body.String(); got != want {
			t.Errorf("it sent %q\nwant    %q", got, want)
		}
	})
}

// brokenWriter is a client that is gone.
type brokenWriter struct{ http.ResponseWriter }

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("gone") }

func TestBandForgivesLostClients(t *testing.T) {
	b := newBand(brokenWriter{httptest.NewRecorder()}, false)
	for range 3 {
		if n, err := fmt.Fprintln(b, "anybody?"); err != nil || n != 9 {
			t.Errorf("wrote %d, %v", n, err)
		}
	}
	if _, err := b.Data().Write([]byte("x")); err == nil {
		t.Error("data to a lost client went through")
	}
	if err := b.Close(); err == nil {
		t.Error("Close says nothing of the lost client")
	}
}
