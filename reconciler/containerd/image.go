package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"decree.dev/decree/reconciler/agent"
)

// imageInfo is what starting a container needs of an image. It never changes, since
// it belongs to a digest; only the users are read when first needed.
type imageInfo struct {
	Name    string
	Digest  digest.Digest // of the manifest or index that the name points to
	ChainID string        // the snapshot that containers start from
	Config  ocispec.ImageConfig

	usersMu       sync.Mutex
	usersLoaded   bool
	passwd, group []byte
}

type imageCache struct {
	mu    sync.Mutex
	infos map[digest.Digest]*imageInfo
	pulls keyLocks // by image name
}

func newImageCache() *imageCache { return &imageCache{infos: map[digest.Digest]*imageInfo{}} }

func (c *imageCache) get(d digest.Digest) *imageInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.infos[d]
}

func (c *imageCache) put(info *imageInfo) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.infos[info.Digest] = info
}

func (c *imageCache) drop(d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.infos, d)
}

// snapshotter returns overlayfs if containerd can use it, else native.
func (r *Runtime) snapshotter(ctx context.Context) (string, error) {
	r.snapMu.Lock()
	defer r.snapMu.Unlock()
	if r.cfg.Snapshotter != "" {
		return r.cfg.Snapshotter, nil
	}
	if r.snapName != "" {
		return r.snapName, nil
	}
	resp, err := r.client.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1")
	if err != nil {
		return "", fmt.Errorf("list snapshotters: %w", err)
	}
	ok := map[string]bool{}
	for _, p := range resp.Plugins {
		ok[p.ID] = p.InitErr == nil
	}
	for _, name := range []string{"overlayfs", "native"} {
		if ok[name] {
			r.snapName = name
			return name, nil
		}
	}
	return "", errors.New("containerd has neither the overlayfs nor the native snapshotter")
}

// parseImage turns an image as written in a pod into its full name.
func parseImage(name string) (reference.Named, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, fmt.Errorf("%w %q: %v", agent.ErrImageInvalid, name, err)
	}
	return ref, nil
}

// findImage returns the image record of a name; of a digest, any record will do.
func (r *Runtime) findImage(ctx context.Context, ref reference.Named) (images.Image, error) {
	store := r.client.ImageService()
	img, err := store.Get(ctx, ref.String())
	if err == nil || !errdefs.IsNotFound(err) {
		return img, err
	}
	digested, ok := ref.(reference.Digested)
	if !ok {
		return img, err
	}
	all, listErr := store.List(ctx, "target.digest=="+digested.Digest().String())
	if listErr != nil {
		return img, listErr
	}
	if len(all) == 0 {
		return img, err
	}
	return all[0], nil
}

// image returns what is known of a present, unpacked image, or an error matching
// errdefs.ErrNotFound when it, or a part of it, is not here.
func (r *Runtime) image(ctx context.Context, ref reference.Named) (*imageInfo, error) {
	img, err := r.findImage(ctx, ref)
	if err != nil {
		return nil, err
	}
	if info := r.images.get(img.Target.Digest); info != nil {
		return info, nil
	}
	return r.loadImage(ctx, img)
}

func (r *Runtime) loadImage(ctx context.Context, img images.Image) (*imageInfo, error) {
	name, err := r.snapshotter(ctx)
	if err != nil {
		return nil, err
	}
	handle := ctrd.NewImage(r.client, img)
	desc, err := handle.Config(ctx)
	if err != nil {
		return nil, err
	}
	data, err := content.ReadBlob(ctx, r.client.ContentStore(), desc)
	if err != nil {
		return nil, err
	}
	var spec ocispec.Image
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, fmt.Errorf("configuration of image %s: %w", img.Name, err)
	}
	unpacked, err := handle.IsUnpacked(ctx, name)
	if err != nil {
		return nil, err
	}
	if !unpacked {
		if err := handle.Unpack(ctx, name); err != nil {
			return nil, fmt.Errorf("unpack image %s: %w", img.Name, err)
		}
	}
	info := &imageInfo{
		Name: img.Name, Digest: img.Target.Digest, Config: spec.Config,
		ChainID: identity.ChainID(spec.RootFS.DiffIDs).String(),
	}
	if err := r.loadUsers(ctx, info); err != nil {
		return nil, err
	}
	r.images.put(info)
	return info, nil
}

// digestRef is the name of an image by digest.
func digestRef(ref reference.Named, d digest.Digest) string {
	return reference.TrimNamed(ref).Name() + "@" + d.String()
}

// ImportImage loads an image archive (OCI layout or docker save) and unpacks it. It
// returns the names of the images in it.
func (r *Runtime) ImportImage(ctx context.Context, archive io.Reader) ([]string, error) {
	ctx = r.ns(ctx)
	imgs, err := r.client.Import(ctx, archive, ctrd.WithImportPlatform(platforms.Default()))
	if err != nil {
		return nil, fmt.Errorf("import image archive: %w", err)
	}
	var names []string
	for _, img := range imgs {
		if _, err := r.loadImage(ctx, img); err != nil {
			return names, fmt.Errorf("import image %s: %w", img.Name, err)
		}
		names = append(names, img.Name)
	}
	if len(names) == 0 {
		return nil, errors.New("import image archive: it names no image: tag it when saving it")
	}
	return names, nil
}

// Image is one image that is present.
type Image struct {
	Name   string
	Digest string
}

// Images lists the images that are present.
func (r *Runtime) Images(ctx context.Context) ([]Image, error) {
	all, err := r.client.ImageService().List(r.ns(ctx))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var out []Image
	for _, img := range all {
		if !strings.HasPrefix(img.Name, "sha256:") {
			out = append(out, Image{Name: img.Name, Digest: img.Target.Digest.String()})
		}
	}
	return out, nil
}
