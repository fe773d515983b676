package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// S3Config says which bucket snapshots go to, and how it is reached.
type S3Config struct {
	Bucket, Prefix string
	// Endpoint is host[:port], or a URL with http or https; empty: Amazon's. The scheme
	// is https unless it says http.
	Endpoint string
	Region   string // empty: as the service says
	// CredentialsFile and Profile name a file as Amazon's tools write it. Credentials
	// are sought in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY first, then in this
	// file (empty: ~/.aws/credentials), then the machine's role is asked for.
	CredentialsFile, Profile string
	// Transport, when not nil, makes the requests.
	Transport http.RoundTripper
}

// s3Config reads s3://BUCKET/PREFIX?endpoint=...&region=...&credentials=FILE&profile=NAME.
func s3Config(u *url.URL) (S3Config, error) {
	cfg := S3Config{Bucket: u.Host, Prefix: strings.Trim(u.Path, "/")}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return cfg, err
	}
	for key, values := range query {
		field := map[string]*string{"endpoint": &cfg.Endpoint, "region": &cfg.Region, "credentials": &cfg.CredentialsFile, "profile": &cfg.Profile}[key]
		if field == nil || len(values) != 1 {
			return cfg, fmt.Errorf("%s: expected endpoint, region, credentials or profile, once each", key)
		}
		*field = values[0]
	}
	if cfg.Bucket == "" {
		return cfg, errors.New("the bucket is missing: s3://BUCKET/PREFIX")
	}
	return cfg, nil
}

// S3 is a target in a bucket of an S3-compatible service.
type S3 struct {
	cfg    S3Config
	client *minio.Client
}

var _ Target = (*S3)(nil)

// partSize is what an upload holds in memory. An object has 10,000 parts at most, so a
// snapshot of 160 GB is the largest.
const partSize = 16 << 20

// NewS3 returns the target; no connection is made yet.
func NewS3(cfg S3Config) (*S3, error) {
	host, secure := cfg.Endpoint, true
	if rest, ok := strings.CutPrefix(host, "http://"); ok {
		host, secure = rest, false
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "https://"), "/")
	if host == "" {
		host = "s3.amazonaws.com"
	}
	client, err := minio.New(host, &minio.Options{
		Creds: credentials.NewChainCredentials([]credentials.Provider{
			&credentials.EnvAWS{},
			&credentials.FileAWSCredentials{Filename: cfg.CredentialsFile, Profile: cfg.Profile},
			&credentials.IAM{},
		}),
		Secure: secure, Region: cfg.Region, Transport: cfg.Transport,
	})
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", cfg.Bucket, err)
	}
	client.SetAppInfo("decree", fmt.Sprint(Format))
	return &S3{cfg: cfg, client: client}, nil
}

func (s *S3) key(name Name) string { return path.Join(s.cfg.Prefix, name.String()) }

// said puts an error of the service into words; it never holds credentials.
func (s *S3) said(verb string, err error) error {
	return fmt.Errorf("%s in bucket %s: %w", verb, s.cfg.Bucket, err)
}

// Put implements [Target]. The upload is in parts, each with its checksum, that become
// an object when all are there.
func (s *S3) Put(ctx context.Context, name Name, write func(io.Writer) error) (int64, error) {
	if !validCluster(name.ClusterID) {
		return 0, fmt.Errorf("put snapshot: %q is no cluster's id", name.ClusterID)
	}
	pr, pw := io.Pipe()
	written := make(chan error, 1)
	go func() {
		err := write(pw)
		if err != nil {
			// Whatever it is: the library takes an io.ErrUnexpectedEOF for the end.
			pw.CloseWithError(abortedUpload{})
		} else {
			pw.Close()
		}
		written <- err
	}()
	info, err := s.client.PutObject(ctx, s.cfg.Bucket, s.key(name), pr, -1, minio.PutObjectOptions{
		ContentType: "application/octet-stream", PartSize: partSize, NumThreads: 1, AutoChecksum: minio.ChecksumCRC32C,
	})
	pr.CloseWithError(abortedUpload{}) // ends a write that nobody reads
	writeErr := <-written
	switch {
	case writeErr != nil && (err == nil || errors.As(err, new(abortedUpload))):
		err = writeErr
	case err != nil:
		err = s.said("put snapshot", err)
	}
	if err != nil {
		s.abandon(ctx, name)
		return 0, err
	}
	return info.Size, nil
}

type abortedUpload struct{}

func (abortedUpload) Error() string { return "the snapshot was not completed" }

// abandonTimeout is how long removing the parts of a failed upload may take.
const abandonTimeout = 30 * time.Second

// abandon removes the parts of a failed upload, which cost money where nobody sees
// them. It is a courtesy: buckets should expire such parts themselves.
func (s *S3) abandon(ctx context.Context, name Name) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abandonTimeout)
	defer cancel()
	_ = s.client.RemoveIncompleteUpload(ctx, s.cfg.Bucket, s.key(name))
}

// List implements [Target].
func (s *S3) List(ctx context.Context, clusterID string) ([]Entry, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the listing's goroutine on every way out
	prefix := s.cfg.Prefix
	if prefix != "" {
		prefix += "/"
	}
	within := prefix
	if clusterID != "" {
		within += clusterID + "/"
	}
	var list []Entry
	for object := range s.client.ListObjectsIter(ctx, s.cfg.Bucket, minio.ListObjectsOptions{Prefix: within, Recursive: true}) {
		if object.Err != nil {
			return nil, s.said("list snapshots", object.Err)
		}
		if name, ok := ParseName(strings.TrimPrefix(object.Key, prefix)); ok {
			list = append(list, Entry{Name: name, Size: object.Size})
		}
	}
	if err := context.Cause(ctx); err != nil {
		return nil, s.said("list snapshots", err)
	}
	sortEntries(list)
	return list, nil
}

// Get implements [Target].
func (s *S3) Get(ctx context.Context, name Name) (io.ReadCloser, error) {
	object, err := s.client.GetObject(ctx, s.cfg.Bucket, s.key(name), minio.GetObjectOptions{})
	if err == nil {
		_, err = object.Stat() // the request is made here
	}
	if err != nil {
		if object != nil {
			object.Close()
		}
		if minio.ToErrorResponse(err).Code == minio.NoSuchKey {
			return nil, fmt.Errorf("get snapshot %s: %w", name, ErrNotFound)
		}
		return nil, s.said("get snapshot", err)
	}
	return object, nil
}

// Delete implements [Target].
func (s *S3) Delete(ctx context.Context, name Name) error {
	if err := s.client.RemoveObject(ctx, s.cfg.Bucket, s.key(name), minio.RemoveObjectOptions{}); err != nil {
		return s.said("delete snapshot", err)
	}
	return nil
}
