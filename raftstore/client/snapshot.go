package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"decree.dev/decree/raftstore/backup"
)

// Snapshot is a plain archive of the cluster on its way here. Reading it ends with
// io.EOF when the server has sent all of it, and else with what the server says went
// wrong. The caller closes it.
type Snapshot struct {
	// Name is what the server calls it.
	Name backup.Name
	resp *http.Response
}

// Snapshot asks a server for a snapshot. Nothing bounds its time but ctx.
func (c *Client) Snapshot(ctx context.Context) (*Snapshot, error) {
	resp, err := c.do(ctx, request{method: http.MethodGet, path: backup.Path, accept: "application/zstd, application/json"})
	if err != nil {
		return nil, err
	}
	name, ok := backup.ParseName(resp.Header.Get(backup.HeaderName))
	if !ok {
		resp.Body.Close()
		return nil, errors.New("take snapshot: the server answers without naming the snapshot: is it of another version?")
	}
	return &Snapshot{Name: name, resp: resp}, nil
}

// Read implements io.Reader.
func (s *Snapshot) Read(p []byte) (int, error) {
	n, err := s.resp.Body.Read(p)
	if err != nil {
		if said := s.resp.Trailer.Get(backup.TrailerError); said != "" {
			err = fmt.Errorf("take snapshot: the server gave up: %s", said)
		}
	}
	return n, err
}

// Close ends the request.
func (s *Snapshot) Close() error { return s.resp.Body.Close() }
