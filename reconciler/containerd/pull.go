package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent"
)

const (
	dialTimeout   = 10 * time.Second
	headerTimeout = 30 * time.Second
	// stallTimeout ends a download that brings no byte for so long.
	stallTimeout = 60 * time.Second
)

// PullImage implements agent.Runtime. Errors match one of the agent's image errors.
// Registries are spoken to by HTTPS; plain HTTP is used for loopback only.
func (r *Runtime) PullImage(ctx context.Context, image string, policy corev1.PullPolicy, auth []agent.RegistryAuth) (string, error) {
	ctx = silent(r.ns(ctx))
	ref, err := parseImage(image)
	if err != nil {
		return "", err
	}
	defer r.images.pulls.lock(ref.String())()
	info, err := r.image(ctx, ref)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", fmt.Errorf("look for image %s: %w", ref, err)
	}
	present := err == nil
	switch {
	case present && policy != corev1.PullAlways:
		return digestRef(ref, info.Digest), nil
	case !present && policy == corev1.PullNever:
		return "", fmt.Errorf("image %s: %w", ref, agent.ErrImageNeverPull)
	}
	if info, err = r.pullWith(ctx, ref, info, candidates(ref, auth)); err != nil {
		return "", fmt.Errorf("pull image %s: %w", ref, err)
	}
	return digestRef(ref, info.Digest), nil
}

// silent keeps containerd's client from writing to stderr: what it has to say about
// a pull is in the error.
func silent(ctx context.Context) context.Context {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(logger))
}

// candidates are the credentials for the registry of ref. None is a candidate only
// when there is no other.
func candidates(ref reference.Named, auth []agent.RegistryAuth) []agent.RegistryAuth {
	var out []agent.RegistryAuth
	for _, a := range auth {
		host := strings.TrimPrefix(strings.TrimPrefix(a.Host, "https://"), "http://")
		host, _, _ = strings.Cut(host, "/")
		if host == "index.docker.io" || host == "registry-1.docker.io" {
			host = "docker.io"
		}
		if host == reference.Domain(ref) {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		out = append(out, agent.RegistryAuth{})
	}
	return out
}

// pullWith tries one credential after the other, until one is accepted.
func (r *Runtime) pullWith(ctx context.Context, ref reference.Named, have *imageInfo, auth []agent.RegistryAuth) (*imageInfo, error) {
	var err error
	for _, a := range auth {
		var info *imageInfo
		if info, err = r.pullOnce(ctx, ref, have, a); err == nil {
			return info, nil
		}
		if err = classify(err); !errors.Is(err, agent.ErrImageUnauthorized) {
			break
		}
	}
	return nil, err
}

func (r *Runtime) pullOnce(ctx context.Context, ref reference.Named, have *imageInfo, auth agent.RegistryAuth) (*imageInfo, error) {
	client := newRegistryClient()
	defer client.CloseIdleConnections()
	resolver := newResolver(client, auth)
	if have != nil {
		// Always means: ask whether the tag has moved, not: fetch again.
		_, desc, err := resolver.Resolve(ctx, ref.String())
		if err != nil {
			return nil, err
		}
		if desc.Digest == have.Digest {
			return have, nil
		}
	}
	snapshotter, err := r.snapshotter(ctx)
	if err != nil {
		return nil, err
	}
	img, err := r.client.Pull(ctx, ref.String(), ctrd.WithResolver(resolver), ctrd.WithPullUnpack, ctrd.WithPullSnapshotter(snapshotter))
	if err != nil {
		return nil, err
	}
	if err := r.recordDigest(ctx, ref, img.Metadata()); err != nil {
		return nil, err
	}
	return r.loadImage(ctx, img.Metadata())
}

// recordDigest names the image by digest too, so that it stays when its tag moves.
func (r *Runtime) recordDigest(ctx context.Context, ref reference.Named, img images.Image) error {
	name := digestRef(ref, img.Target.Digest)
	if name == img.Name {
		return nil
	}
	_, err := r.client.ImageService().Create(ctx, images.Image{Name: name, Target: img.Target})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("record image %s: %w", name, err)
	}
	return nil
}

func newResolver(client *http.Client, auth agent.RegistryAuth) remotes.Resolver {
	authorizer := docker.NewDockerAuthorizer(docker.WithAuthClient(client), docker.WithAuthCreds(func(string) (string, string, error) {
		return auth.Username, auth.Password, nil
	}))
	return docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(
		docker.WithClient(client), docker.WithAuthorizer(authorizer), docker.WithPlainHTTP(isLoopback),
	)})
}

// isLoopback reports whether a registry host (host or host:port) is this machine.
func isLoopback(host string) (bool, error) {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	ip := net.ParseIP(strings.Trim(name, "[]"))
	return name == "localhost" || ip != nil && ip.IsLoopback(), nil
}

func newRegistryClient() *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext
	transport.ResponseHeaderTimeout = headerTimeout
	return &http.Client{Transport: stallGuard{transport}}
}

// stallGuard ends responses whose body stops arriving.
type stallGuard struct{ *http.Transport }

func (g stallGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := g.Transport.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	body := &guardedBody{ReadCloser: resp.Body, cancel: cancel, ctx: ctx}
	body.timer = time.AfterFunc(stallTimeout, func() {
		cancel(fmt.Errorf("no data for %s: %w", stallTimeout, context.DeadlineExceeded))
	})
	resp.Body = body
	return resp, nil
}

type guardedBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (b *guardedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.timer.Reset(stallTimeout)
	}
	if err != nil && !errors.Is(err, io.EOF) && b.ctx.Err() != nil {
		err = context.Cause(b.ctx)
	}
	return n, err
}

func (b *guardedBody) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// classify tells the agent what went wrong with a pull.
func classify(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	var urlErr *url.Error
	var netErr net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden),
		errors.Is(err, docker.ErrInvalidAuthorization):
		return fmt.Errorf("%w: check the pull secret: %w", agent.ErrImageUnauthorized, err)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w: check name and tag: %w", agent.ErrImageNotFound, err)
	case errors.As(err, &urlErr), errors.As(err, &netErr), errors.As(err, &status) && status.StatusCode >= 500:
		return fmt.Errorf("%w: %w", agent.ErrRegistryUnreachable, err)
	default:
		return err
	}
}
