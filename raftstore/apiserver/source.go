package apiserver

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// serveDecree handles the subresources of Decree's own group.
func (s *Server) serveDecree(w http.ResponseWriter, r *http.Request, t target, who Identity) error {
	if t.kind.Resource != api.Sources {
		return notServed(t.kind.GroupVersion(), t.kind.Plural+"/"+t.subresource)
	}
	if r.Method != http.MethodPost {
		return apierrors.NewMethodNotSupported(groupResource(t.kind.Resource+api.Resource("/"+t.subresource)), r.Method)
	}
	if _, ok := s.cfg.Store.View().Get(t.key()); !ok && t.subresource != "plan" {
		return apierrors.NewNotFound(groupResource(t.kind.Resource), t.name)
	}
	if s.cfg.Sources == nil {
		return apierrors.NewServiceUnavailable("this server follows no sources")
	}
	var err error
	switch t.subresource {
	case "sync":
		err = s.cfg.Sources.Sync(r.Context(), t.name, who.Name)
	case "suspend":
		err = s.cfg.Sources.Suspend(r.Context(), t.name, who.Name, clip(r.URL.Query().Get("reason"), 256))
	case "resume":
		err = s.cfg.Sources.Resume(r.Context(), t.name, who.Name)
	case "plan":
		return s.servePlan(w, r, t)
	default:
		return notServed(t.kind.GroupVersion(), t.kind.Plural+"/"+t.subresource)
	}
	if err != nil {
		return fmt.Errorf("%s source %s: %w", t.subresource, t.name, err)
	}
	s.log.Info("source", "action", t.subresource, "source", t.name, "user", who.Name)
	return writeObject(w, http.StatusOK, format{}, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusSuccess})
}

func (s *Server) servePlan(w http.ResponseWriter, r *http.Request, t target) error {
	tree, err := readTree(r.Body, s.cfg.Tree)
	if err != nil {
		return err
	}
	p, err := s.cfg.Sources.Plan(r.Context(), t.name, tree)
	if err != nil {
		return fmt.Errorf("plan source %s: %w", t.name, err)
	}
	return writeObject(w, http.StatusOK, format{}, p)
}

// maxTreeFiles bounds the files of a tree that is sent to be planned.
const maxTreeFiles = 20_000

// readTree reads a tar of regular files and folders into memory, as a file system.
// Its size is bounded by the body's limit and, should that be compressed one day,
// by limit. Symbolic links stay what they are, as in a commit; devices, hard links
// and paths that leave the tree are refused by name.
func readTree(r io.Reader, limit int64) (fs.FS, error) {
	// A zip without compression is an fs.FS that the standard library can read.
	var packed bytes.Buffer
	z := zip.NewWriter(&packed)
	in := tar.NewReader(r)
	seen := map[string]bool{}
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, badTree(err)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
		if h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		switch limit -= h.Size; {
		case h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeSymlink:
			return nil, apierrors.NewBadRequest(fmt.Sprintf("tree: %q is neither a file, a folder nor a symbolic link", clip(h.Name, 256)))
		case !fs.ValidPath(name) || name == "." || strings.Contains(name, `\`):
			return nil, apierrors.NewBadRequest(fmt.Sprintf("tree: %q leaves the tree or is not a clean path", clip(h.Name, 256)))
		case seen[name]:
			return nil, apierrors.NewBadRequest(fmt.Sprintf("tree: %q is there twice", clip(h.Name, 256)))
		case limit < 0 || len(seen) == maxTreeFiles:
			return nil, apierrors.NewRequestEntityTooLargeError("the tree has too many files or bytes")
		}
		seen[name] = true
		if err := packFile(z, name, h, in); err != nil {
			return nil, badTree(err)
		}
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("read tree: %w", err)
	}
	tree, err := zip.NewReader(bytes.NewReader(packed.Bytes()), int64(packed.Len()))
	if err != nil {
		return nil, fmt.Errorf("read tree: %w", err)
	}
	return tree, nil
}

func packFile(z *zip.Writer, name string, h *tar.Header, in io.Reader) error {
	header := &zip.FileHeader{Name: name, Method: zip.Store}
	header.SetMode(0o644)
	if h.Typeflag == tar.TypeSymlink {
		header.SetMode(fs.ModeSymlink | 0o777)
		in = strings.NewReader(h.Linkname)
	}
	f, err := z.CreateHeader(header)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, in)
	return err
}

func badTree(err error) error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return err
	}
	return apierrors.NewBadRequest("tree: " + err.Error())
}
