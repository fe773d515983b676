package gitsource

import (
	"bytes"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"
)

// keepaliveEvery is how long the server stays silent at most while it works. Git's
// own server uses the same interval.
const keepaliveEvery = 5 * time.Second

// band is the side band of one answer to a git client: data on channel 1, lines
// for people on channel 2. Lines go out as soon as they are complete. When the
// client is gone, writes are dropped in silence. It is safe for concurrent use.
type band struct {
	flush func()

	mu    sync.Mutex
	out   *pktline.Encoder
	mux   *sideband.Muxer
	line  []byte // begun and not complete
	quiet bool   // nobody wants lines
	err   error  // the first error of writing; nothing is written after it
	busy  bool   // something was written since the last tick

	once sync.Once
	stop chan struct{}
	done chan struct{}
}

// newBand starts a side band on w. Close ends it.
func newBand(w http.ResponseWriter, quiet bool) *band {
	ctl := http.NewResponseController(w)
	cw := &clientWriter{w: w}
	b := &band{
		flush: func() { _ = ctl.Flush() },
		out:   pktline.NewEncoder(cw),
		mux:   sideband.NewMuxer(sideband.Sideband64k, cw),
		quiet: quiet,
		stop:  make(chan struct{}),
		done:  make(chan struct{}),
	}
	go b.keepalive()
	return b
}

// keepalive sends an empty packet when nothing else was sent for a while, so that
// proxies and clients do not take the silence of a long rollout for a dead server.
func (b *band) keepalive() {
	defer close(b.done)
	tick := time.NewTicker(keepaliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-b.stop:
			return
		case <-tick.C:
		}
		b.mu.Lock()
		if len(b.line) > 0 {
			b.sendLine()
		}
		if !b.busy {
			b.send(func() error { return b.out.Encode([]byte{byte(sideband.PackData)}) })
		}
		b.busy = false
		b.mu.Unlock()
	}
}

// Write takes text for people. It never fails.
func (b *band) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(p)
	for {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			break
		}
		b.line = append(b.line, p[:i+1]...)
		p = p[i+1:]
		b.sendLine()
	}
	if b.line = append(b.line, p...); len(b.line) > 32<<10 {
		b.sendLine()
	}
	return n, nil
}

// sendLine sends what has gathered. The caller holds mu.
func (b *band) sendLine() {
	if !b.quiet {
		b.send(func() error {
			_, err := b.mux.WriteChannel(sideband.ProgressMessage, b.line)
			return err
		})
	}
	b.line = b.line[:0]
}

// send writes and flushes unless the client is gone. The caller holds mu.
func (b *band) send(write func() error) {
	if b.err != nil {
		return
	}
	b.busy = true
	if b.err = write(); b.err == nil {
		b.flush()
	}
}

// Data returns the writer of channel 1. Unlike text, data reports a lost client.
func (b *band) Data() io.Writer { return bandData{b} }

type bandData struct{ b *band }

func (d bandData) Write(p []byte) (int, error) {
	d.b.mu.Lock()
	defer d.b.mu.Unlock()
	if d.b.err == nil {
		d.b.busy = true
		_, d.b.err = d.b.mux.Write(p)
	}
	if d.b.err != nil {
		return 0, d.b.err
	}
	return len(p), nil
}

// Fatal tells the client that the operation is over, on channel 3.
func (b *band) Fatal(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.send(func() error {
		_, err := b.mux.WriteChannel(sideband.ErrorMessage, []byte(text+"\n"))
		return err
	})
}

// shut stops the keepalives. Close does it too; a deferred shut covers panics.
func (b *band) shut() {
	b.once.Do(func() { close(b.stop) })
	<-b.done
}

// Close sends what is left and ends the answer.
func (b *band) Close() error {
	b.shut()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.line) > 0 {
		b.line = append(b.line, '\n')
		b.sendLine()
	}
	b.send(b.out.Flush)
	return b.err
}
