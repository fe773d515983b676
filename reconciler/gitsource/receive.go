package gitsource

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
)

const (
	maxCommands     = 1000    // references one push may change
	maxCommandBytes = 1 << 20 // of all command lines together
	// Clients notice a refusal only when their upload is through, so the rest of a
	// refused pack is read and thrown away, within reason.
	drainBytes = 2 << 30
	drainTime  = time.Minute
)

// pushRequest is what a client asks for before its pack.
type pushRequest struct {
	commands []*packp.Command
	caps     *capability.List
}

func (p *pushRequest) has(c capability.Capability) bool { return p.caps.Supports(c) }

// needsPack says whether a pack follows: for anything but deletions.
func (p *pushRequest) needsPack() bool {
	for _, c := range p.commands {
		if c.Action() != packp.Delete {
			return true
		}
	}
	return false
}

// readPushRequest reads the commands. It returns nil for a lone flush, with which
// clients probe the connection. Lines about a shallow client are of no interest:
// whatever the pack does not hold must be here already.
func readPushRequest(r io.Reader) (*pushRequest, error) {
	req := &pushRequest{caps: capability.NewList()}
	scan := pktline.NewScanner(io.LimitReader(r, maxCommandBytes))
	for scan.Scan() {
		line := scan.Bytes()
		if len(line) == 0 {
			if len(req.commands) == 0 {
				return nil, nil
			}
			return req, nil
		}
		if bytes.HasPrefix(line, []byte("shallow ")) {
			continue
		}
		if len(req.commands) == 0 {
			var caps []byte
			line, caps, _ = bytes.Cut(line, []byte{0})
			if err := req.caps.Decode(bytes.TrimSpace(caps)); err != nil {
				return nil, garbagef("push request: capabilities: %w", err)
			}
		}
		cmd, err := parseCommand(strings.TrimSuffix(string(line), "\n"))
		if err != nil {
			return nil, err
		}
		if req.commands = append(req.commands, cmd); len(req.commands) > maxCommands {
			return nil, limitf("a push changes more than %d references", maxCommands)
		}
	}
	if err := scan.Err(); err != nil {
		return nil, garbagef("push request: %w", err)
	}
	return nil, garbagef("push request: it ends before its commands do, or they are more than %s", bytesText(maxCommandBytes))
}

func parseCommand(line string) (*packp.Command, error) {
	f := strings.SplitN(line, " ", 3)
	if len(f) != 3 {
		return nil, garbagef("push request: command %q", line)
	}
	old, err := parseHash(f[0])
	if err != nil {
		return nil, garbagef("push request: %w", err)
	}
	new, err := parseHash(f[1])
	if err != nil {
		return nil, garbagef("push request: %w", err)
	}
	return &packp.Command{Name: plumbing.ReferenceName(f[2]), Old: old, New: new}, nil
}

// receive answers a push.
func (c *call) receive(body io.Reader) {
	ctx, cancel := context.WithTimeoutCause(c.r.Context(), c.s.limits.Time,
		fmt.Errorf("the push took longer than %s", c.s.limits.Time))
	defer cancel()
	noCache(c.w.Header())
	c.w.Header().Set("Content-Type", "application/x-"+receivePack+"-result")
	req, err := readPushRequest(body)
	if err != nil {
		c.refuse(http.StatusBadRequest, err.Error())
		return
	}
	if req == nil {
		return
	}
	var say *band
	if req.has(capability.Sideband64k) {
		say = newBand(c.w, false)
		defer say.shut()
	}
	p := &push{call: c, req: req, results: make(map[plumbing.ReferenceName]error)}
	p.progress = io.Discard
	if say != nil {
		p.progress = say
	}
	unpack := p.run(ctx, body)
	if err := c.report(p, say, unpack); err != nil {
		c.s.log.Debug("result of push not delivered", "repository", c.repo.name, "error", err)
	}
}

// report sends the verdict on the pack and on each reference.
func (c *call) report(p *push, say *band, unpack error) error {
	var buf bytes.Buffer
	if p.req.has(capability.ReportStatus) {
		status := packp.NewReportStatus()
		status.UnpackStatus = "ok"
		if unpack != nil {
			status.UnpackStatus = oneLine(unpack)
		}
		for _, cmd := range p.req.commands {
			text := "ok"
			if err := p.results[cmd.Name]; err != nil {
				text = oneLine(err)
			}
			status.CommandStatuses = append(status.CommandStatuses, &packp.CommandStatus{ReferenceName: cmd.Name, Status: text})
		}
		if err := status.Encode(&buf); err != nil {
			return err
		}
	}
	if say == nil {
		_, err := (&clientWriter{w: c.w}).Write(buf.Bytes())
		return err
	}
	_, err := say.Data().Write(buf.Bytes())
	return errors.Join(err, say.Close())
}

// oneLine is the first line of an error, fit for a status line.
func oneLine(err error) string {
	text, _, _ := strings.Cut(strings.TrimSpace(err.Error()), "\n")
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > 1000 {
		text = strings.ToValidUTF8(text[:1000], "") + "…"
	}
	if text == "" || text == "ok" {
		text = "refused"
	}
	return text
}

// push is one push while it is worked on.
type push struct {
	*call
	req      *pushRequest
	progress io.Writer
	results  map[plumbing.ReferenceName]error
	q        *quarantine

	othersDone bool
	kept       bool // see keep
}

// run takes the pack in and carries out the commands. The error is about the pack;
// then no command was carried out. Results of commands are in p.results.
func (p *push) run(ctx context.Context, body io.Reader) error {
	var err error
	if p.q, err = newQuarantine(p.repo.dir, p.repo.objects); err != nil {
		p.failAll(errors.New("the server cannot store the push"))
		p.s.log.Error("push", "repository", p.repo.name, "error", err)
		return errors.New("the server cannot store the push; see its log")
	}
	defer func() {
		if err := p.q.remove(); err != nil {
			p.s.log.Warn("remove quarantine", "repository", p.repo.name, "error", err)
		}
	}()
	if p.req.needsPack() {
		if err := p.takePack(ctx, body); err != nil {
			p.s.log.Info("push refused", "repository", p.repo.name, "pusher", p.identity, "reason", err)
			p.explain(err)
			p.failAll(errors.New("unpacker error"))
			return err
		}
	}
	p.endBody(body)
	release, err := p.repo.acquire(ctx)
	if err != nil {
		p.failAll(err)
		return nil
	}
	defer release()
	p.execute(ctx, release)
	return nil
}

// endBody reads the end of the request, which is what makes the HTTP server notice
// when the client goes away, and lifts the deadline on reading.
func (c *call) endBody(body io.Reader) {
	_, _ = io.Copy(io.Discard, io.LimitReader(body, 64<<10))
	_ = http.NewResponseController(c.w).SetReadDeadline(time.Time{})
}

// takePack reads the pack into quarantine.
func (p *push) takePack(ctx context.Context, body io.Reader) error {
	select {
	case p.s.uploads <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for other uploads: %w", context.Cause(ctx))
	}
	defer func() { <-p.s.uploads }()
	err := p.q.receivePack(ctx, body, p.s.limits)
	if err != nil && ctx.Err() == nil {
		deadline := time.Now().Add(drainTime)
		_, _ = io.Copy(io.Discard, io.LimitReader(untilReader{body, deadline}, drainBytes))
	}
	return err
}

// untilReader ends after a point in time.
type untilReader struct {
	r  io.Reader
	at time.Time
}

func (u untilReader) Read(p []byte) (int, error) {
	if time.Now().After(u.at) {
		return 0, io.EOF
	}
	return u.r.Read(p)
}

// explain sends a reason that has more than one line to the pusher.
func (p *push) explain(err error) {
	text := strings.TrimRight(err.Error(), "\n")
	if strings.Contains(text, "\n") {
		_, _ = io.WriteString(p.progress, text+"\n")
	}
}

func (p *push) failAll(err error) {
	for _, c := range p.req.commands {
		if p.results[c.Name] == nil {
			p.results[c.Name] = err
		}
	}
}

// execute carries out the commands, the followed branch first: it is the one that
// may be refused for its content. With "atomic" one refusal refuses all.
func (p *push) execute(ctx context.Context, release func()) {
	var followed *packp.Command
	seen := make(map[plumbing.ReferenceName]bool)
	for _, c := range p.req.commands {
		err := p.check(c)
		if err == nil && seen[c.Name] {
			err = errors.New("named twice in one push")
		}
		seen[c.Name] = true
		p.results[c.Name] = err
		if c.Name == FollowedRef {
			followed = c
		}
	}
	if err := p.tryOthers(ctx); err != nil {
		p.s.log.Error("push", "repository", p.repo.name, "error", err)
		p.failAll(err)
		return
	}
	atomic := p.req.has(capability.Atomic)
	if atomic && p.failed() {
		p.failAll(errAtomic)
		return
	}
	if followed != nil && p.results[followed.Name] == nil {
		err := p.follow(ctx, followed, func() { p.updateOthers(ctx); release() })
		if p.results[followed.Name] = err; atomic && err != nil {
			p.failAll(errAtomic)
			return
		}
	}
	p.updateOthers(ctx)
}

var errAtomic = errors.New("atomic push: another reference was refused")

func (p *push) failed() bool {
	for _, err := range p.results {
		if err != nil {
			return true
		}
	}
	return false
}

// check looks at one command before any is carried out.
func (p *push) check(c *packp.Command) error {
	if err := c.Name.Validate(); err != nil || !(c.Name.IsBranch() || c.Name.IsTag() || c.Name.IsNote()) {
		return errors.New("only refs/heads/…, refs/tags/… and refs/notes/… can be pushed")
	}
	if c.Action() == packp.Invalid {
		return errors.New("nothing to do")
	}
	if c.Action() != packp.Delete {
		kind, _, err := p.q.read(c.New)
		if err != nil {
			return fmt.Errorf("object %s was not sent", c.New)
		}
		if c.Name.IsBranch() && kind != plumbing.CommitObject {
			return fmt.Errorf("a branch cannot point to a %s", kind)
		}
	}
	return nil // follow and tryOthers check the rest
}

func short(h plumbing.Hash) string {
	if h.IsZero() {
		return "no commit"
	}
	return h.String()[:12]
}
