package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"slices"
	"strings"
)

// Entry is one snapshot in a target.
type Entry struct {
	Name Name
	Size int64 // bytes
}

// Target is where snapshots are kept. Its methods are safe for concurrent use.
type Target interface {
	// Put stores what write writes. The name is there once everything is, durably, or
	// not at all: an error of write leaves nothing. It returns the size in bytes.
	Put(ctx context.Context, name Name, write func(io.Writer) error) (int64, error)
	// List returns the snapshots of a cluster, or of all for "", oldest first within
	// each cluster. What is no snapshot is passed over.
	List(ctx context.Context, clusterID string) ([]Entry, error)
	// Get opens a snapshot; the error matches [ErrNotFound] if there is none.
	Get(ctx context.Context, name Name) (io.ReadCloser, error)
	// Delete removes a snapshot; one that is not there is fine.
	Delete(ctx context.Context, name Name) error
}

// ErrNotFound means that there is no such snapshot.
var ErrNotFound = errors.New("no such snapshot")

// OpenTarget returns the target at a URL: file:///FOLDER, a folder's path, or
// s3://BUCKET/PREFIX?endpoint=HOST[:PORT]&region=REGION, see [S3Config]. No connection
// is made yet.
func OpenTarget(at string) (Target, error) {
	if !strings.Contains(at, "://") {
		if at == "" {
			return nil, errors.New("snapshot target: name a folder or a URL")
		}
		return Folder(at), nil
	}
	u, err := url.Parse(at)
	if err != nil {
		return nil, fmt.Errorf("snapshot target: %w", err.(*url.Error).Err) // the URL may hold a password
	}
	if u.User != nil {
		return nil, fmt.Errorf("snapshot target %s: credentials do not belong into the URL: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file with credentials=FILE", u.Redacted())
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" || u.Path == "" || u.RawQuery != "" {
			return nil, fmt.Errorf("snapshot target %s: expected file:///FOLDER", at)
		}
		return Folder(u.Path), nil
	case "s3":
		cfg, err := s3Config(u)
		if err != nil {
			return nil, fmt.Errorf("snapshot target %s: %w", at, err)
		}
		return NewS3(cfg)
	}
	return nil, fmt.Errorf("snapshot target %s: expected a folder, file:///FOLDER or s3://BUCKET/PREFIX", at)
}

// Split takes the URL or path of one snapshot, as [Locate] and people write it, apart:
// into its target and the name there. It reports false for what is no snapshot's name.
func Split(at string) (target string, name Name, ok bool) {
	query := ""
	if strings.Contains(at, "://") {
		at, query, _ = strings.Cut(at, "?")
	}
	folder, file := path.Split(at)
	above, cluster := path.Split(strings.TrimSuffix(folder, "/"))
	name, ok = ParseName(cluster + "/" + file)
	if !ok {
		return "", Name{}, false
	}
	if above == "" {
		above = "."
	}
	if query != "" {
		query = "?" + query
	}
	return above + query, name, true
}

// Locate is the URL of a snapshot in the target at a URL, for people.
func Locate(target string, name Name) string {
	at, query := target, ""
	if strings.Contains(target, "://") {
		at, query, _ = strings.Cut(target, "?")
	}
	at = strings.TrimSuffix(at, "/") + "/" + name.String()
	if query != "" {
		at += "?" + query
	}
	return at
}

// Newest returns the newest snapshot in a target that holds those of one cluster only.
func Newest(ctx context.Context, t Target) (Name, error) {
	list, err := t.List(ctx, "")
	if err != nil {
		return Name{}, err
	}
	if len(list) == 0 {
		return Name{}, fmt.Errorf("%w: there is none at all", ErrNotFound)
	}
	var clusters []string
	for _, e := range list {
		if !slices.Contains(clusters, e.Name.ClusterID) {
			clusters = append(clusters, e.Name.ClusterID)
		}
	}
	if len(clusters) > 1 {
		return Name{}, fmt.Errorf("there are snapshots of several clusters, name one of them: the newest of each are %s", strings.Join(newestOfEach(list), ", "))
	}
	return list[len(list)-1].Name, nil
}

func newestOfEach(list []Entry) []string {
	var names []string
	for i, e := range list {
		if i+1 == len(list) || list[i+1].Name.ClusterID != e.Name.ClusterID {
			names = append(names, e.Name.String())
		}
	}
	return names
}

// sortEntries puts a listing into the order that List promises.
func sortEntries(list []Entry) {
	slices.SortFunc(list, func(a, b Entry) int {
		if c := strings.Compare(a.Name.ClusterID, b.Name.ClusterID); c != 0 {
			return c
		}
		return older(a.Name, b.Name)
	})
}

// countWriter counts what passes.
type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
