package compile

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"decree.dev/decree/schemas/api"
)

// The limits that a zero Options stands for.
const (
	defaultTimeout  = 20 * time.Second
	defaultMemory   = 1 << 30
	defaultMaxFile  = 4 << 20
	defaultMaxFiles = 10_000
	defaultMaxTotal = 64 << 20

	maxDepth   = 64      // nested folders
	maxEntries = 200_000 // folder entries looked at, CUE or not
)

// withDefaults returns o with every zero value replaced.
func (o Options) withDefaults() Options {
	o.Path = path.Clean(cmp.Or(o.Path, "."))
	o.Timeout = cmp.Or(o.Timeout, defaultTimeout)
	o.Memory = cmp.Or(o.Memory, defaultMemory)
	o.MaxFile = cmp.Or(o.MaxFile, defaultMaxFile)
	o.MaxFiles = cmp.Or(o.MaxFiles, defaultMaxFiles)
	o.MaxTotal = cmp.Or(o.MaxTotal, defaultMaxTotal)
	return o
}

// tree is the part of a repository that an evaluation may see: its CUE files, in
// memory, within the limits.
type tree struct {
	files map[string][]byte   // by slash-separated path
	dirs  map[string][]string // folder to the names of its CUE files, ordered
}

// treeReader fills a tree and collects what it refuses.
type treeReader struct {
	fsys    fs.FS
	opts    Options
	tree    *tree
	total   int64
	entries int
	diags   []api.Diagnostic
}

// errStop ends a walk after a limit on the tree as a whole.
var errStop = errors.New("stop")

// readTree reads the CUE files of fsys. Whatever must not be in a tree is refused by
// name in the diagnostics; the error is about reading itself.
func readTree(fsys fs.FS, opts Options) (*tree, []api.Diagnostic, error) {
	r := &treeReader{fsys: fsys, opts: opts, tree: &tree{files: map[string][]byte{}, dirs: map[string][]string{}}}
	if !fs.ValidPath(opts.Path) {
		r.refuse(opts.Path, "the path of the source leaves the tree", "a folder of the repository, without '..'")
		return r.tree, r.diags, nil
	}
	if info, err := fs.Stat(fsys, opts.Path); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		r.refuse(opts.Path, "the path of the source is not a folder of the tree", "")
		return r.tree, r.diags, nil
	}
	if err := r.walk(".", 0); err != nil && err != errStop {
		return nil, nil, err
	}
	return r.tree, r.diags, nil
}

func (r *treeReader) refuse(name, message, expected string) {
	r.diags = append(r.diags, api.Diagnostic{
		Pos: api.Position{File: strings.ToValidUTF8(name, "\uFFFD")}, Message: message, Expected: expected,
	})
}

// walk reads one folder and those below it. Folders that begin with '.' or '_' and
// files that do are not CUE's, as for the cue command.
func (r *treeReader) walk(dir string, depth int) error {
	if depth > maxDepth {
		r.refuse(dir, "the folder is nested too deeply", fmt.Sprintf("at most %d levels", maxDepth))
		return nil
	}
	entries, err := fs.ReadDir(r.fsys, dir)
	if err != nil {
		return fmt.Errorf("read folder %s of the tree: %w", dir, err)
	}
	if r.entries += len(entries); r.entries > maxEntries {
		r.refuse(dir, "the tree has too many files and folders", fmt.Sprintf("at most %d", maxEntries))
		return errStop
	}
	for _, e := range entries {
		name := e.Name()
		full := path.Join(dir, name)
		switch {
		case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\\\x00"):
			r.refuse(dir+"/"+name, "the name of a file leaves its folder", "a name without '/', '\\' and '..'")
		case !utf8.ValidString(name):
			r.refuse(full, "the name is not UTF-8", "")
		case strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_"):
		case e.Type()&fs.ModeSymlink != 0:
			err = r.link(dir, name)
		case e.IsDir():
			err = r.walk(full, depth+1)
		case e.Type().IsRegular() && isCUE(name):
			err = r.file(dir, name, full)
		case isCUE(name):
			r.refuse(full, "not a regular file", "")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// isCUE reports whether a file takes part in an evaluation.
func isCUE(name string) bool {
	return strings.HasSuffix(name, ".cue") && !strings.HasSuffix(name, "_tool.cue") && !strings.HasSuffix(name, "_test.cue")
}

// link refuses a symbolic link that leaves the tree. One that stays inside is
// followed when it is a CUE file.
func (r *treeReader) link(dir, name string) error {
	full := path.Join(dir, name)
	links, ok := r.fsys.(fs.ReadLinkFS)
	if !ok {
		if isCUE(name) {
			r.refuse(full, "a symbolic link cannot be followed here", "a regular file")
		}
		return nil
	}
	target, err := links.ReadLink(full)
	if err != nil {
		return fmt.Errorf("read link %s of the tree: %w", full, err)
	}
	for hops := 0; ; hops++ {
		if path.IsAbs(target) || !fs.ValidPath(path.Join(dir, target)) {
			r.refuse(full, "the symbolic link leaves the tree", "a target inside the repository")
			return nil
		}
		to := path.Join(dir, target)
		info, err := links.Lstat(to)
		switch {
		case err != nil || hops > 8:
			if isCUE(name) {
				r.refuse(full, "the symbolic link leads nowhere", "a target inside the repository")
			}
			return nil
		case info.Mode()&fs.ModeSymlink != 0:
			dir = path.Dir(to)
			if target, err = links.ReadLink(to); err != nil {
				return fmt.Errorf("read link %s of the tree: %w", to, err)
			}
			continue
		case info.Mode().IsRegular() && isCUE(name):
			return r.file(path.Dir(full), name, to)
		}
		return nil
	}
}

// file reads one file, whose content stands at source, into the tree.
func (r *treeReader) file(dir, name, source string) error {
	full := path.Join(dir, name)
	if len(r.tree.files) >= r.opts.MaxFiles {
		r.refuse(full, "the tree has too many CUE files", fmt.Sprintf("at most %d", r.opts.MaxFiles))
		return errStop
	}
	f, err := r.fsys.Open(source)
	if err != nil {
		return fmt.Errorf("open %s of the tree: %w", source, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, r.opts.MaxFile+1))
	if err != nil {
		return fmt.Errorf("read %s of the tree: %w", source, err)
	}
	if int64(len(data)) > r.opts.MaxFile {
		r.refuse(full, "the file is too large", fmt.Sprintf("at most %d bytes", r.opts.MaxFile))
		return nil
	}
	if r.total += int64(len(data)); r.total > r.opts.MaxTotal {
		r.refuse(full, "the CUE files of the tree are too large together", fmt.Sprintf("at most %d bytes", r.opts.MaxTotal))
		return errStop
	}
	if at := invalidUTF8(data); at >= 0 {
		line := 1 + strings.Count(string(data[:at]), "\n")
		r.refuse(full, "the file is not UTF-8", "")
		r.diags[len(r.diags)-1].Pos.Line = line
		return nil
	}
	r.tree.add(full, data)
	return nil
}

// invalidUTF8 returns the offset of the first byte that is not UTF-8, or -1.
func invalidUTF8(data []byte) int {
	if utf8.Valid(data) {
		return -1
	}
	for i := 0; i < len(data); {
		c, size := utf8.DecodeRune(data[i:])
		if c == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return -1
}

// add puts a file into the tree; files of a folder come in order.
func (t *tree) add(name string, data []byte) {
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	t.files[name] = data
	t.dirs[dir] = append(t.dirs[dir], base)
}

// under returns the folders with CUE files at or below dir, ordered.
func (t *tree) under(dir string) []string {
	var dirs []string
	for d := range t.dirs {
		if path.Base(d) != "cue.mod" && !strings.Contains(d+"/", "cue.mod/") && within(d, dir) {
			dirs = append(dirs, d)
		}
	}
	slices.Sort(dirs)
	return dirs
}

// within reports whether the folder d is dir or below it.
func within(d, dir string) bool {
	return dir == "." || d == dir || strings.HasPrefix(d, dir+"/")
}
