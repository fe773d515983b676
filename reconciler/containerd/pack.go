package containerd

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// nonRootUser is the user of packed images.
const nonRootUser = "65532:65532"

var architectures = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_RISCV: "riscv64"}

// PackImage writes an image archive that holds one statically linked program, and
// nothing else but a user database. image is its name, such as example/web:v1;
// entrypoint is the command line after the program's own path. The image runs as
// user 65532, and the same input always gives the same bytes.
func PackImage(binary, image string, entrypoint []string, w io.Writer) error {
	tag, err := name.NewTag(image)
	if err != nil {
		return fmt.Errorf("pack image: %w", err)
	}
	arch, err := staticArchitecture(binary)
	if err != nil {
		return fmt.Errorf("pack image %s: %w", image, err)
	}
	program := "/" + filepath.Base(binary)
	img, err := packed(binary, program)
	if err != nil {
		return fmt.Errorf("pack image %s: %w", image, err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("pack image %s: %w", image, err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", arch
	file.Config = v1.Config{
		Entrypoint: append([]string{program}, entrypoint...), User: nonRootUser, WorkingDir: "/",
		Env: []string{"PATH=/"},
	}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return fmt.Errorf("pack image %s: %w", image, err)
	}
	if err := tarball.Write(tag, img, w); err != nil {
		return fmt.Errorf("pack image %s: %w", image, err)
	}
	return nil
}

// staticArchitecture returns the architecture of a program; one that needs a dynamic
// linker could not start in an image that has none.
func staticArchitecture(binary string) (string, error) {
	f, err := elf.Open(binary)
	if err != nil {
		return "", fmt.Errorf("%s: %w", binary, err)
	}
	defer f.Close()
	arch, ok := architectures[f.Machine]
	if !ok {
		return "", fmt.Errorf("%s is for %s, which is not supported", binary, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return "", fmt.Errorf("%s is linked dynamically: build it with CGO_ENABLED=0", binary)
		}
	}
	return arch, nil
}

func packed(binary, program string) (v1.Image, error) {
	st, err := os.Stat(binary)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("the program is no regular file")
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		rd, wr := io.Pipe()
		go func() { wr.CloseWithError(writeLayer(wr, binary, program, st.Size())) }()
		return rd, nil
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(empty.Image, layer)
}

// writeLayer writes the files of the image, all of them without times and owners.
func writeLayer(w io.Writer, binary, program string, size int64) error {
	f, err := os.Open(binary)
	if err != nil {
		return err
	}
	defer f.Close()
	tw := tar.NewWriter(w)
	for _, dir := range []string{"etc/", "tmp/"} {
		mode := int64(0o755)
		if dir == "tmp/" {
			mode = 0o1777
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: mode}); err != nil {
			return err
		}
	}
	files := []struct {
		name string
		mode int64
		size int64
		data io.Reader
	}{
		{"etc/passwd", 0o644, -1, bytes.NewReader([]byte("root:x:0:0:root:/:/\nnonroot:x:65532:65532:nonroot:/:/\n"))},
		{"etc/group", 0o644, -1, bytes.NewReader([]byte("root:x:0:\nnonroot:x:65532:\n"))},
		{path.Base(program), 0o755, size, f},
	}
	for _, file := range files {
		if b, ok := file.data.(*bytes.Reader); ok {
			file.size = b.Size()
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file.name, Mode: file.mode, Size: file.size}); err != nil {
			return err
		}
		if _, err := io.CopyN(tw, file.data, file.size); err != nil {
			return fmt.Errorf("%s: %w", file.name, err)
		}
	}
	return tw.Close()
}
