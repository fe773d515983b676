package backup_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"pgregory.net/rapid"

	"decree.dev/decree/raftstore/backup"
)

const (
	accessKey = "AKIDEXAMPLE"
	secretKey = "a secret key that nobody may see"
	bucket    = "backups"
)

// bucketServer is an S3-compatible service that checks signatures.
type bucketServer struct {
	*httptest.Server
	backend *s3mem.Backend

	mu       sync.Mutex
	requests []string
	bad      []string
	fail     func(*http.Request) bool
}

func newBucket(t *testing.T) *bucketServer {
	t.Helper()
	b := &bucketServer{backend: s3mem.New()}
	if err := b.backend.CreateBucket(bucket); err != nil {
		t.Fatal(err)
	}
	inner := gofakes3.New(b.backend).Server()
	b.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		fail := b.fail != nil && b.fail(r)
		b.requests = append(b.requests, r.Method+" "+r.URL.String())
		if err := checkSignature(r); err != nil {
			b.bad = append(b.bad, err.Error())
		}
		if r.Method == http.MethodPut && r.Header.Get("X-Amz-Checksum-Crc32c") == "" {
			b.bad = append(b.bad, r.URL.String()+" is uploaded without a checksum")
		}
		b.mu.Unlock()
		if fail {
			http.Error(w, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>", http.StatusForbidden)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		b.Close()
		for _, bad := range b.bad {
			t.Error(bad)
		}
	})
	t.Setenv("AWS_ACCESS_KEY_ID", accessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", secretKey)
	return b
}

func (b *bucketServer) target(t *testing.T) backup.Target {
	t.Helper()
	target, err := backup.NewS3(backup.S3Config{
		Bucket: bucket, Prefix: "some/prefix", Endpoint: b.URL, Region: "eu-central-1", Transport: b.Client().Transport,
	})
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// checkSignature computes the signature of a request anew (AWS Signature Version 4).
func checkSignature(r *http.Request) error {
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	if !ok {
		return fmt.Errorf("%s %s is not signed", r.Method, r.URL)
	}
	fields := map[string]string{}
	for part := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		fields[name] = value
	}
	credential := strings.Split(fields["Credential"], "/")
	if len(credential) != 5 || credential[0] != accessKey || credential[2] != "eu-central-1" || credential[3] != "s3" || credential[4] != "aws4_request" {
		return fmt.Errorf("%s %s: credential %q", r.Method, r.URL, fields["Credential"])
	}
	var canonical strings.Builder
	fmt.Fprintf(&canonical, "%s\n%s\n%s\n", r.Method, r.URL.EscapedPath(), strings.ReplaceAll(r.URL.Query().Encode(), "+", "%20"))
	for name := range strings.SplitSeq(fields["SignedHeaders"], ";") {
		value := r.Header.Get(name)
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = fmt.Sprint(r.ContentLength)
		}
		fmt.Fprintf(&canonical, "%s:%s\n", name, strings.TrimSpace(value))
	}
	fmt.Fprintf(&canonical, "\n%s\n%s", fields["SignedHeaders"], r.Header.Get("X-Amz-Content-Sha256"))
	sum := sha256.Sum256([]byte(canonical.String()))
	text := fmt.Sprintf("AWS4-HMAC-SHA256\n%s\n%s\n%x", r.Header.Get("X-Amz-Date"), strings.Join(credential[1:], "/"), sum)
	key := []byte("AWS4" + secretKey)
	for _, part := range append(credential[1:], text) {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	if subtle.ConstantTimeCompare([]byte(hex.EncodeToString(key)), []byte(fields["Signature"])) != 1 {
		return fmt.Errorf("%s %s: the signature is wrong", r.Method, r.URL)
	}
	return nil
}

func at(cluster string, hours int, revision uint64) backup.Name {
	return backup.Name{ClusterID: cluster, Time: now.Add(time.Duration(hours) * time.Hour), Revision: revision}
}

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}

// testTarget is what every target has to do.
func testTarget(t *testing.T, target backup.Target) {
	ctx := t.Context()
	list := func(cluster string) []backup.Entry {
		t.Helper()
		got, err := target.List(ctx, cluster)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := list(""); len(got) > 0 {
		t.Fatalf("a new target holds %v", got)
	}
	if _, err := backup.Newest(ctx, target); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("the newest of none: %v", err)
	}
	if _, err := target.Get(ctx, at("a", 0, 1)); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("get what is not there: %v", err)
	}
	if err := target.Delete(ctx, at("a", 0, 1)); err != nil {
		t.Errorf("delete what is not there: %v", err)
	}
	for _, name := range []backup.Name{at("a", 9, 3), at("a", 10, 2), at("b", 1, 1), at("a", 9, 11)} {
		if n, err := target.Put(ctx, name, text("content of "+name.String())); err != nil || n != int64(len("content of "+name.String())) {
			t.Fatalf("put %s: %d, %v", name, n, err)
		}
	}
	want := []backup.Name{at("a", 9, 3), at("a", 9, 11), at("a", 10, 2)}
	if got := names(list("a")); !cmp.Equal(got, want) {
		t.Errorf("list %v, want %v", got, want)
	}
	if got := names(list("")); !cmp.Equal(got, append(want, at("b", 1, 1))) {
		t.Errorf("list of all: %v", got)
	}
	if got := list("b")[0].Size; got != int64(len("content of "+at("b", 1, 1).String())) {
		t.Errorf("size %d", got)
	}
	if got := list("c"); len(got) > 0 {
		t.Errorf("of another cluster: %v", got)
	}
	if _, err := backup.Newest(ctx, target); err == nil || !strings.Contains(err.Error(), at("a", 10, 2).String()) || strings.Contains(err.Error(), at("a", 9, 3).String()) {
		t.Errorf("the newest of two clusters: %v", err)
	}
	if got := read(t, target, at("a", 10, 2)); got != "content of "+at("a", 10, 2).String() {
		t.Errorf("got %q", got)
	}
	if err := target.Delete(ctx, at("b", 1, 1)); err != nil {
		t.Error(err)
	}
	if got, err := backup.Newest(ctx, target); err != nil || got != at("a", 10, 2) {
		t.Errorf("newest %v, %v", got, err)
	}
	testPutFails(t, target)
	if got := names(list("")); !cmp.Equal(got, want) {
		t.Errorf("after failures: %v, want %v", got, want)
	}
}

// testPutFails holds that what is not complete never gets its name.
func testPutFails(t *testing.T, target backup.Target) {
	t.Helper()
	broken := errors.New("broken")
	for _, fail := range []error{broken, io.ErrUnexpectedEOF, io.EOF} {
		for _, n := range []int{0, 100, 20 << 20} {
			_, err := target.Put(t.Context(), at("a", 20, 1), func(w io.Writer) error {
				if _, err := w.Write(make([]byte, n)); err != nil {
					return err
				}
				return fail
			})
			if !errors.Is(err, fail) {
				t.Errorf("%v after %d bytes: %v", fail, n, err)
			}
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := target.Put(ctx, at("a", 20, 1), func(w io.Writer) error {
		cancel(broken)
		_, err := w.Write(make([]byte, 20<<20))
		return err
	})
	if err == nil {
		t.Error("put although it was cancelled")
	}
	if _, err := target.Put(t.Context(), at("../a", 1, 1), text("x")); err == nil {
		t.Error("put outside of the target")
	}
}

func names(list []backup.Entry) []backup.Name {
	var out []backup.Name
	for _, e := range list {
		out = append(out, e.Name)
	}
	return out
}

func read(t *testing.T, target backup.Target, name backup.Name) string {
	t.Helper()
	r, err := target.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "backups")
	target, err := backup.OpenTarget("file://" + dir)
	if err != nil {
		t.Fatal(err)
	}
	testTarget(t, target)
	// What is no snapshot is passed over; what was left behind goes after a day.
	for _, name := range []string{"a/notes.txt", "a/.partial-old", "a/.partial-new", "a/2026-11-26T16-00-00Z-r01.decree", "stray.decree"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(filepath.Join(dir, "a/.partial-old"), time.Time{}, time.Now().Add(-25*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if list, err := target.List(t.Context(), ""); err != nil || len(list) != 3 {
		t.Errorf("list %v, %v", list, err)
	}
	if _, err := target.Put(t.Context(), at("a", 30, 1), text("x")); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	var partial []string
	for _, f := range files {
		if strings.HasPrefix(f.Name(), ".partial-") {
			partial = append(partial, f.Name())
		}
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", f.Name(), info.Mode(), err)
		}
	}
	if !cmp.Equal(partial, []string{".partial-new"}) {
		t.Errorf("partial files %q", partial)
	}
}

func TestS3(t *testing.T) {
	b := newBucket(t)
	testTarget(t, b.target(t))
	uploads := 0
	for _, r := range b.requests {
		if strings.HasPrefix(r, "POST ") && strings.Contains(r, "uploads") {
			uploads++
		}
		if strings.Contains(r, url.QueryEscape(secretKey)) {
			t.Errorf("the secret key in %s", r)
		}
	}
	if uploads < 4 {
		t.Errorf("%d uploads in parts", uploads)
	}
}

// TestS3Archive takes an archive of several parts to a bucket and restores from there.
func TestS3Archive(t *testing.T) {
	b := newBucket(t)
	target := b.target(t)
	k := newKey(t)
	src := source()
	src.Repositories = repositories{"cluster": bytes.Repeat(big(), 12)} // 36 MiB: three parts
	name := backup.Name{ClusterID: "c", Time: now, Revision: src.State.Revision()}
	size, err := target.Put(t.Context(), name, func(w io.Writer) error {
		_, err := backup.Save(t.Context(), w, src, k.Protection)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	parts := 0
	for _, r := range b.requests {
		if strings.HasPrefix(r, "PUT ") && strings.Contains(r, "partNumber=") {
			parts++
		}
	}
	if list, err := target.List(t.Context(), "c"); err != nil || len(list) != 1 || list[0].Size != size || parts != 3 {
		t.Errorf("listed %v, %v; %d parts, want 3", list, err, parts)
	}
	r, err := target.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := filepath.Join(t.TempDir(), "data")
	if _, err := backup.Restore(t.Context(), r, k.Keys, restoring(dir)); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "git", "cluster")); err != nil || len(got) != 12*len(big()) {
		t.Errorf("restored %d bytes, %v", len(got), err)
	}
}

func TestS3Refused(t *testing.T) {
	b := newBucket(t)
	b.fail = func(r *http.Request) bool { return r.Method != http.MethodPost }
	target := b.target(t)
	_, err := target.Put(t.Context(), at("a", 1, 1), func(w io.Writer) error {
		_, err := w.Write(make([]byte, 40<<20))
		return err
	})
	_, listErr := target.List(t.Context(), "")
	_, getErr := target.Get(t.Context(), at("a", 1, 1))
	for _, err := range []error{err, listErr, getErr} {
		if err == nil || strings.Contains(err.Error(), secretKey) || !strings.Contains(err.Error(), bucket) || errors.Is(err, backup.ErrNotFound) {
			t.Errorf("refused: %v", err)
		}
	}
}

func TestOpenTarget(t *testing.T) {
	for _, bad := range []string{
		"", "http://x/y", "file://host/x", "file:///x?y=z", "s3://", "s3://b/x?endpoint=a&endpoint=b", "s3://b/x?key=secret",
		"s3://AKID:topsecret@bucket/x", "s3://user:topsecret@bu cket/%zz",
	} {
		target, err := backup.OpenTarget(bad)
		if err == nil {
			t.Errorf("%q opened %v", bad, target)
		} else if strings.Contains(err.Error(), "topsecret") {
			t.Errorf("the error shows a credential: %v", err)
		}
	}
	for _, good := range []string{"/var/backups", "backups", "file:///var/backups", "s3://bucket", "s3://bucket/a/b?region=x&endpoint=h:9000&profile=p&credentials=/f"} {
		if _, err := backup.OpenTarget(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
}

func TestNames(t *testing.T) {
	n := backup.Name{ClusterID: "4f2a", Time: now, Revision: 77}
	const want = "4f2a/2026-11-26T16-00-00Z-r77.decree"
	if n.String() != want {
		t.Errorf("name %s, want %s", n, want)
	}
	for _, bad := range []string{
		"", "4f2a", "2026-11-26T16-00-00Z-r77.decree", "../2026-11-26T16-00-00Z-r77.decree", "a/b/2026-11-26T16-00-00Z-r77.decree", "/2026-11-26T16-00-00Z-r77.decree",
		"4f2a/2026-11-26T16-00-00Z-r077.decree", "4f2a/2026-11-26T16-00-00Z-r77", "4f2a/2026-11-26T16-00-00Z.decree", "4f2a/2026-13-26T16-00-00Z-r77.decree", "4f2a/2026-11-26T16-00-00Z-r-1.decree",
	} {
		if n, ok := backup.ParseName(bad); ok {
			t.Errorf("%q was taken for %v", bad, n)
		}
	}
	for _, target := range []string{"/var/backups", "s3://bucket/a?region=x&endpoint=http%3A%2F%2Fh", "s3://bucket?region=x", "file:///var/backups"} {
		located := backup.Locate(target, n)
		where, name, ok := backup.Split(located)
		if !ok || name != n {
			t.Errorf("%s: %v, %v", located, name, ok)
			continue
		}
		if strings.Replace(where, "/?", "?", 1) != target && strings.TrimSuffix(where, "/") != target {
			t.Errorf("%s is in %s, want %s", located, where, target)
		}
	}
	if _, _, ok := backup.Split("cluster.decree"); ok {
		t.Error("a file was taken for one in a target")
	}
	rapid.Check(t, func(t *rapid.T) {
		n := backup.Name{
			ClusterID: rapid.StringMatching(`[a-z0-9]{1,32}`).Draw(t, "cluster"), Revision: rapid.Uint64().Draw(t, "revision"),
			Time: time.Unix(rapid.Int64Range(0, 4e9).Draw(t, "time"), 0).UTC(),
		}
		if got, ok := backup.ParseName(n.String()); !ok || got != n {
			t.Fatalf("%s was read as %v, %v", n, got, ok)
		}
		m := n
		m.Time = n.Time.Add(time.Duration(rapid.IntRange(1, 1e9).Draw(t, "later")) * time.Second)
		if !slices.IsSorted([]string{n.String(), m.String()}) {
			t.Fatalf("%s does not sort before %s", n, m)
		}
	})
}
