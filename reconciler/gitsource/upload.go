package gitsource

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
)

const (
	maxFetchBytes = 16 << 20 // of one fetch request, inflated
	maxWants      = 20_000
	maxHaves      = 100_000
)

// fetchRequest is one request of a fetch. Over HTTP a fetch takes several: each
// repeats what is wanted and adds to what the client has, until the server knows
// enough or the client is done.
type fetchRequest struct {
	caps    *capability.List
	wants   []plumbing.Hash
	shallow map[plumbing.Hash]bool // commits whose parents the client does not have
	depth   int                    // 0 for all of the history
	haves   []plumbing.Hash
	flushes int // flush packets after the wants
	done    bool
}

// readFetchRequest reads a request. It returns nil for a lone flush.
func readFetchRequest(r io.Reader) (*fetchRequest, error) {
	req := &fetchRequest{caps: capability.NewList(), shallow: make(map[plumbing.Hash]bool)}
	limited := &io.LimitedReader{R: r, N: maxFetchBytes}
	scan := pktline.NewScanner(limited)
	wanting := true
	for scan.Scan() {
		line := strings.TrimSuffix(string(scan.Bytes()), "\n")
		switch {
		case line == "" && wanting:
			if len(req.wants) == 0 {
				return nil, nil
			}
			wanting = false
			continue
		case line == "":
			req.flushes++
			continue
		case line == "done" && !wanting:
			req.done = true
			return req, nil
		}
		var err error
		if wanting {
			err = req.want(line)
		} else {
			err = req.have(line)
		}
		if err != nil {
			return nil, err
		}
	}
	if limited.N <= 0 {
		return nil, limitf("a fetch request is larger than %s", bytesText(maxFetchBytes))
	}
	if err := scan.Err(); err != nil {
		return nil, garbagef("fetch request: %w", err)
	}
	if wanting {
		return nil, garbagef("fetch request: it ends early")
	}
	return req, nil
}

func (req *fetchRequest) want(line string) error {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "want":
		hash, caps, _ := strings.Cut(rest, " ")
		if len(req.wants) == 0 {
			if err := req.caps.Decode([]byte(caps)); err != nil {
				return garbagef("fetch request: capabilities: %w", err)
			}
		}
		h, err := parseHash(hash)
		if err != nil {
			return garbagef("fetch request: %w", err)
		}
		if req.wants = append(req.wants, h); len(req.wants) > maxWants {
			return limitf("a fetch asks for more than %d objects", maxWants)
		}
	case "shallow":
		h, err := parseHash(rest)
		if err != nil {
			return garbagef("fetch request: %w", err)
		}
		if req.shallow[h] = true; len(req.shallow) > maxHaves {
			return limitf("a client has more than %d shallow commits", maxHaves)
		}
	case "deepen":
		n, err := strconv.Atoi(rest)
		if err != nil || n < 0 {
			return garbagef("fetch request: depth %q", rest)
		}
		req.depth = n
	default:
		return garbagef("fetch request: %q is not offered here", word)
	}
	return nil
}

func (req *fetchRequest) have(line string) error {
	hash, ok := strings.CutPrefix(line, "have ")
	if !ok {
		return garbagef("fetch request: %q where a have is expected", line)
	}
	h, err := parseHash(hash)
	if err != nil {
		return garbagef("fetch request: %w", err)
	}
	if req.haves = append(req.haves, h); len(req.haves) > maxHaves {
		return limitf("a client names more than %d commits it has", maxHaves)
	}
	return nil
}

// upload answers one request of a fetch.
func (c *call) upload(body io.Reader) {
	ctx, cancel := context.WithTimeoutCause(c.r.Context(), c.s.limits.Time,
		fmt.Errorf("the fetch took longer than %s", c.s.limits.Time))
	defer cancel()
	noCache(c.w.Header())
	c.w.Header().Set("Content-Type", "application/x-"+uploadPack+"-result")
	req, err := readFetchRequest(body)
	if err != nil {
		c.refuse(http.StatusBadRequest, err.Error())
		return
	}
	if req == nil {
		return
	}
	c.endBody(body)
	if err := c.answerFetch(ctx, req); err != nil {
		c.s.log.Info("fetch not served", "repository", c.repo.name, "identity", c.identity, "error", err)
	}
}

func (c *call) answerFetch(ctx context.Context, req *fetchRequest) error {
	if err := c.mayWant(ctx, req.wants); err != nil {
		return c.failFetch(err)
	}
	sel := newSelection(ctx, c.repo.objects, req)
	var head bytes.Buffer
	out := pktline.NewEncoder(&head)
	w := &clientWriter{w: c.w}
	err := sel.checkWants()
	if err == nil && req.depth > 0 {
		err = sel.cut(out)
	}
	ready := false
	if err == nil && (req.done || req.flushes > 0) {
		ready, err = negotiate(req, sel, out)
	}
	if err != nil {
		return c.failFetch(err)
	}
	if _, err := w.Write(head.Bytes()); err != nil || !ready {
		return err
	}
	tokens := c.s.uploads
	if c.fromServer {
		tokens = c.s.sends
	}
	select {
	case tokens <- struct{}{}:
		defer func() { <-tokens }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return c.sendPack(ctx, req, sel, w)
}

func (c *call) failFetch(err error) error {
	line := &pktline.ErrorLine{Text: "upload-pack: " + oneLine(err)}
	return errors.Join(err, line.Encode(&clientWriter{w: c.w}))
}

// mayWant refuses to hand out objects that no reference leads to: a push that was
// refused, or a branch that was deleted because of what is in it. Other servers may
// have everything: they fetch commits before these come into force.
func (c *call) mayWant(ctx context.Context, wants []plumbing.Hash) error {
	if c.fromServer {
		return nil
	}
	refs, _, err := c.s.table(ctx, c.repo)
	if err != nil {
		return err
	}
	head, lacking, err := c.s.inForce(ctx, c.repo)
	if err != nil || lacking != nil {
		return errors.Join(lacking, err)
	}
	tips := refs.hashes()
	if !head.IsZero() {
		tips = append(tips, head)
	}
	left := make(map[plumbing.Hash]bool)
	for _, h := range wants {
		left[h] = true
	}
	for _, h := range tips {
		delete(left, h)
	}
	if len(left) == 0 {
		return nil
	}
	var starts []plumbing.Hash
	for _, h := range tips {
		if h, err := commitOf(c.repo.objects, h); err == nil {
			starts = append(starts, h)
		}
	}
	err = walkAll(ctx, c.repo.objects, starts, func(n *node) bool {
		delete(left, n.hash)
		return len(left) > 0
	})
	for h := range left {
		return errors.Join(fmt.Errorf("not our ref %s", h), err)
	}
	return err
}

// selected lists the objects to send. Another server gets only the oldest part of
// what is much, keeps it, and asks again: neither side can take all of a long history
// at once.
func (c *call) selected(sel *selection) ([]plumbing.Hash, error) {
	if !c.fromServer {
		return sel.objects()
	}
	for part, err := range sel.parts(c.s.limits) {
		return part, err
	}
	return nil, nil
}

// negotiate answers what the client says it has and reports whether the pack
// follows.
func negotiate(req *fetchRequest, sel *selection, out *pktline.Encoder) (ready bool, err error) {
	detailed := req.caps.Supports(capability.MultiACKDetailed)
	var last plumbing.Hash
	for _, h := range req.haves {
		ok, err := sel.addHave(h)
		if err != nil {
			return false, err
		}
		if !ok {
			continue
		}
		first := last.IsZero()
		last = h
		switch {
		case detailed:
			err = out.Encodef("ACK %s common\n", h)
		case first && !req.done:
			err = out.Encodef("ACK %s\n", h)
		}
		if err != nil {
			return false, err
		}
	}
	if req.done {
		if last.IsZero() {
			return true, out.EncodeString("NAK\n")
		}
		return true, out.Encodef("ACK %s\n", last)
	}
	if detailed && !last.IsZero() && sel.enough() {
		if err := out.Encodef("ACK %s ready\n", last); err != nil {
			return false, err
		}
		if req.caps.Supports(capability.Capability("no-done")) {
			if err := out.EncodeString("NAK\n"); err != nil {
				return false, err
			}
			return true, out.Encodef("ACK %s\n", last)
		}
	}
	if detailed || last.IsZero() {
		return false, out.EncodeString("NAK\n")
	}
	return false, nil
}

// sendPack sends the selected objects, one at a time.
func (c *call) sendPack(ctx context.Context, req *fetchRequest, sel *selection, w io.Writer) error {
	if !req.caps.Supports(capability.Sideband64k) {
		list, err := c.selected(sel)
		if err != nil {
			return err
		}
		return writePack(ctx, w, c.repo.objects, list)
	}
	say := newBand(c.w, req.caps.Supports(capability.NoProgress))
	defer say.shut()
	list, err := c.selected(sel)
	if err == nil {
		fmt.Fprintf(say, "%d objects\n", len(list))
		err = writePack(ctx, say.Data(), c.repo.objects, list)
	}
	if err != nil {
		say.Fatal(oneLine(err))
	}
	return errors.Join(err, say.Close())
}

// writePack writes a pack of whole objects. It holds one object in memory.
func writePack(ctx context.Context, w io.Writer, r objectReader, list []plumbing.Hash) error {
	sum := sha1.New()
	buf := newPackBuffer(io.MultiWriter(w, sum))
	head := binary.BigEndian.AppendUint32(append([]byte("PACK"), 0, 0, 0, 2), uint32(len(list)))
	if _, err := buf.Write(head); err != nil {
		return err
	}
	zw, err := zlib.NewWriterLevel(nil, zlib.BestSpeed)
	if err != nil {
		return err
	}
	for _, h := range list {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		kind, data, err := r.read(h)
		if err != nil {
			return err
		}
		if err := writePackEntry(buf, zw, kind, data); err != nil {
			return fmt.Errorf("send object %s: %w", h, err)
		}
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	_, err = w.Write(sum.Sum(nil))
	return err
}
