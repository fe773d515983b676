package compile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/fxamacker/cbor/v2"

	"decree.dev/decree/schemas/api"
)

// How a worker ends. Anything else is a crash, which its last words explain.
const (
	exitOK       = 0
	exitProtocol = 3
	exitMemory   = 4
)

// Memory that a worker uses for itself, and the ceiling of one goroutine's stack.
const (
	workerMaxStack = 256 << 20
	watchInterval  = 5 * time.Millisecond
)

// WorkerMain is the whole life of a worker process: it loads the definitions, says that it
// is ready, reads one tree from stdin, evaluates it and writes the results to
// stdout. It returns the exit code. The parent is a [Process]; nobody else calls it.
//
// The parent sets hard limits on the process. Those here come first, and are
// there to end with a clear reason: the garbage collector works towards the limit, and
// a watchdog exits when the heap is over it.
func WorkerMain(stdin io.Reader, stdout io.Writer) int {
	debug.SetMaxStack(workerMaxStack)
	debug.SetGCPercent(400) // short-lived: memory is bounded by the limit instead
	w := &worker{in: newFrameReader(stdin, 1<<40), out: newFrameWriter(stdout), defs: newDefinitions()}
	if err := w.run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitProtocol
	}
	return exitOK
}

type worker struct {
	in   *frameReader
	out  *frameWriter
	defs *definitions
}

func (w *worker) run() error {
	if err := w.defs.preload(); err != nil {
		return err
	}
	version := binary.BigEndian.AppendUint32(nil, wireVersion)
	if err := errors.Join(w.out.write(frameReady, version), w.out.w.Flush()); err != nil {
		return err
	}
	opts, t, err := w.request()
	if err != nil {
		return err
	}
	debug.SetMemoryLimit(opts.Memory / 10 * 9)
	go watchMemory(opts.Memory)
	e := newEvaluator(w.defs, t)
	for _, dir := range opts.Dirs {
		if err := errors.Join(w.out.write(frameBegin, []byte(dir)), w.out.w.Flush()); err != nil {
			return err
		}
		packages := []wirePackage{}
		for _, r := range e.folder(dir) {
			packages = append(packages, toWire(r, r.raw))
		}
		if err := w.out.encode(frameResult, packages); err != nil {
			return err
		}
	}
	return errors.Join(w.out.write(frameEnd, nil), w.out.w.Flush())
}

// request reads what to do. The parent has checked the tree.
func (w *worker) request() (opts wireOptions, t *tree, err error) {
	t = &tree{files: map[string][]byte{}, dirs: map[string][]string{}}
	for {
		kind, payload, err := w.in.next()
		if err != nil {
			return opts, nil, fmt.Errorf("read request: %w", err)
		}
		switch kind {
		case frameOptions:
			err = cbor.Unmarshal(payload, &opts)
		case frameFile:
			var f wireFile
			if err = cbor.Unmarshal(payload, &f); err == nil {
				t.add(f.Name, f.Data)
			}
		case frameEnd:
			return opts, t, nil
		default:
			err = errFrame
		}
		if err != nil {
			return opts, nil, fmt.Errorf("read request: %w", err)
		}
	}
}

// preload builds the definitions of all kinds and of the short form, so that a waiting
// worker has done all that does not depend on the tree.
func (d *definitions) preload() error {
	for _, k := range api.Served() {
		if !k.FromGit() {
			continue
		}
		if _, err := d.kind(k); err != nil {
			return err
		}
	}
	if inst := d.instance(appPackage); inst != nil {
		return d.ctx.BuildInstance(inst).Err()
	}
	return nil
}

// watchMemory exits the process when it holds more than limit bytes of heap and
// stacks.
func watchMemory(limit int64) {
	sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	for range time.Tick(watchInterval) {
		metrics.Read(sample)
		if held := int64(sample[0].Value.Uint64() - sample[1].Value.Uint64()); held > limit {
			fmt.Fprintf(os.Stderr, "memory limit: %d bytes held\n", held)
			os.Exit(exitMemory)
		}
	}
}
