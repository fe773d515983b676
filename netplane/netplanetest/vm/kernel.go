package vm

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// kernel is an unpacked kernel package.
type kernel struct {
	image   string
	release string
	// files are all modules of the package by name, underscores for dashes.
	files map[string]string
}

// Folder is where the kernel package is unpacked, from the top of the source tree.
const Folder = "bin/debian-kernel"

// findKernel looks for the kernel above the current folder: tests run in that of
// their package.
func findKernel() (*kernel, error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	for {
		images, err := filepath.Glob(filepath.Join(dir, Folder, "boot", "vmlinuz-*"))
		if err != nil {
			return nil, err
		}
		if len(images) > 0 {
			return openKernel(filepath.Join(dir, Folder), images[0])
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return nil, fmt.Errorf("no kernel in %s: %w", Folder, ErrMissing)
		}
		dir = parent
	}
}

func openKernel(dir, image string) (*kernel, error) {
	k := &kernel{image: image, files: map[string]string{}}
	k.release = strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
	err := filepath.WalkDir(filepath.Join(dir, "lib", "modules", k.release), func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok && err == nil {
			k.files[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look for modules: %w", err)
	}
	if len(k.files) == 0 {
		return nil, fmt.Errorf("no modules named *.ko in %s (compressed ones are not supported)", dir)
	}
	return k, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// module is what a module says of itself.
type module struct {
	name    string
	depends []string
	aliases []string
}

// modules returns the named modules and all that they depend on, those first.
func (k *kernel) modules(names []string) ([]module, error) {
	var out []module
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if name = moduleName(name); seen[name] {
			return nil
		}
		seen[name] = true
		m, err := k.module(name)
		if err != nil {
			return err
		}
		for _, d := range m.depends {
			if err := add(d); err != nil {
				return fmt.Errorf("module %s: %w", name, err)
			}
		}
		out = append(out, m)
		return nil
	}
	for _, n := range names {
		if err := add(n); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// module reads the section .modinfo, strings of the form "key=value\0".
func (k *kernel) module(name string) (module, error) {
	m := module{name: name}
	path, ok := k.files[name]
	if !ok {
		return m, fmt.Errorf("kernel %s has no module %s", k.release, name)
	}
	f, err := elf.Open(path)
	if err != nil {
		return m, fmt.Errorf("module %s: %w", name, err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return m, fmt.Errorf("module %s says nothing of itself", name)
	}
	info, err := s.Data()
	if err != nil {
		return m, fmt.Errorf("module %s: %w", name, err)
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		switch key, value, _ := strings.Cut(string(entry), "="); key {
		case "depends":
			m.depends = slices.DeleteFunc(strings.Split(value, ","), func(s string) bool { return s == "" })
		case "alias":
			m.aliases = append(m.aliases, value)
		}
	}
	return m, nil
}

// initramfs writes the whole file system of the machine.
func (k *kernel) initramfs(path string, cfg *Config) (err error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w; %w", err, ErrMissing)
	}
	modules, err := k.modules(cfg.Modules)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a := newArchive(f)
	for _, dir := range []string{"bin", "sbin", "proc", "sys", "dev", "run", "tmp", "root", "lib", "lib/modules", "lib/modules/" + k.release, "var", "var/run", "etc"} {
		a.folder(dir)
	}
	a.copy("bin/busybox", busybox)
	a.text("sbin/modprobe", modprobe)
	a.copy("bin/main", cfg.Binary)
	a.text("init", initScript(cfg))
	if err := a.addFiles(cfg.Files); err != nil {
		return err
	}
	var deps, aliases strings.Builder
	for _, m := range modules {
		a.copy("lib/modules/"+k.release+"/"+m.name+".ko", k.files[m.name])
		all, err := k.modules(m.depends)
		if err != nil {
			return err
		}
		deps.WriteString(m.name + ".ko:")
		for _, d := range slices.Backward(all) { // the last is loaded first
			deps.WriteString(" " + d.name + ".ko")
		}
		deps.WriteByte('\n')
		for _, alias := range m.aliases {
			fmt.Fprintf(&aliases, "alias %s %s\n", alias, m.name)
		}
	}
	a.text("lib/modules/"+k.release+"/modules.dep", deps.String())
	a.text("lib/modules/"+k.release+"/modules.alias", aliases.String())
	return a.end()
}

// modprobe is what the kernel calls when a module is missing. That of busybox takes a
// module that another process is just loading for one that is there: the kernel then
// answers EINVAL to who asked first. The wait has an end, as a module that begins may
// itself ask for another one.
const modprobe = `#!/bin/busybox sh
/bin/busybox modprobe "$@"
status=$?
tries=0
while /bin/busybox grep -q ' Loading ' /proc/modules && [ $tries -lt 100 ]; do
	/bin/busybox sleep 0.01
	tries=$((tries + 1))
done
exit $status
`

// initScript is the first process. The exit status stands alone on a line.
func initScript(cfg *Config) string {
	var b strings.Builder
	b.WriteString(`#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/root TMPDIR=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
ip link set lo up
cd /root
`)
	for _, e := range cfg.Env {
		b.WriteString("export " + quote(e) + "\n")
	}
	b.WriteString("/bin/main")
	for _, a := range cfg.Args {
		b.WriteString(" " + quote(a))
	}
	b.WriteString(" </dev/null\nstatus=$?\necho\necho '" + marker + "'$status\npoweroff -f\n")
	return b.String()
}

// quote makes s one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// archive writes a cpio archive in the "newc" format, which is what the kernel
// unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	w       io.Writer
	ino     int
	folders map[string]bool
	err     error
}

func newArchive(w io.Writer) *archive { return &archive{w: w, folders: map[string]bool{}} }

// The kinds of entries, as in a mode of stat(2).
const (
	kindFolder = 0o040755
	kindFile   = 0o100755
)

// entry writes the header of an entry, and its content.
func (a *archive) entry(name string, mode int, size int64, content io.Reader) {
	if a.err != nil {
		return
	}
	a.ino++
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	for len(header)%4 != 0 {
		header += "\x00"
	}
	if _, a.err = io.WriteString(a.w, header); a.err != nil {
		return
	}
	n, err := io.Copy(a.w, content)
	if err == nil && n != size {
		err = fmt.Errorf("%s changed while it was read", name)
	}
	if err == nil {
		_, err = a.w.Write(make([]byte, (4-size%4)%4))
	}
	a.err = err
}

func (a *archive) folder(name string) {
	a.folders[name] = true
	a.entry(name, kindFolder, 0, strings.NewReader(""))
}

func (a *archive) text(name, content string) {
	a.entry(name, kindFile, int64(len(content)), strings.NewReader(content))
}

func (a *archive) copy(name, from string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(from)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	a.entry(name, kindFile, info.Size(), f)
}

// end writes the trailer and returns the first error.
func (a *archive) end() error {
	a.entry("TRAILER!!!", 0, 0, strings.NewReader(""))
	if a.err != nil {
		return fmt.Errorf("write initramfs: %w", a.err)
	}
	return nil
}
