package compile

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode/utf8"

	"golang.org/x/tools/txtar"
)

// hostileFS is a file system that tells what it was given: names that no honest one
// has, links, and files that are larger than they say.
type hostileFS map[string]string // a value that begins with "-> " is a link

type hostileEntry struct {
	name string
	mode fs.FileMode
	size int64
}

func (e hostileEntry) Name() string               { return e.name }
func (e hostileEntry) IsDir() bool                { return e.mode.IsDir() }
func (e hostileEntry) Type() fs.FileMode          { return e.mode.Type() }
func (e hostileEntry) Info() (fs.FileInfo, error) { return e, nil }
func (e hostileEntry) Size() int64                { return e.size }
func (e hostileEntry) Mode() fs.FileMode          { return e.mode }
func (e hostileEntry) ModTime() time.Time         { return time.Time{} }
func (e hostileEntry) Sys() any                   { return nil }

func (h hostileFS) entry(name string) (hostileEntry, bool) {
	if text, ok := h[name]; ok {
		e := hostileEntry{name: path.Base(name), size: 1}
		if strings.HasPrefix(text, "-> ") {
			e.mode = fs.ModeSymlink
		}
		return e, true
	}
	for other := range h {
		if name == "." || strings.HasPrefix(other, name+"/") {
			return hostileEntry{name: path.Base(name), mode: fs.ModeDir}, true
		}
	}
	return hostileEntry{}, false
}

func (h hostileFS) Open(name string) (fs.File, error) {
	text, ok := h[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return fstest.MapFS{"f": {Data: []byte(text)}}.Open("f")
}

func (h hostileFS) Stat(name string) (fs.FileInfo, error) { return h.Lstat(name) }
func (h hostileFS) Lstat(name string) (fs.FileInfo, error) {
	if e, ok := h.entry(name); ok {
		return e, nil
	}
	return nil, fs.ErrNotExist
}

func (h hostileFS) ReadLink(name string) (string, error) {
	target, ok := strings.CutPrefix(h[name], "-> ")
	if !ok {
		return "", fs.ErrInvalid
	}
	return strings.TrimSuffix(target, "\n"), nil
}

func (h hostileFS) ReadDir(dir string) ([]fs.DirEntry, error) {
	seen := map[string]bool{}
	var list []fs.DirEntry
	for name := range h {
		rest, ok := strings.CutPrefix(name, dir+"/")
		if dir == "." {
			rest, ok = name, true
		}
		if !ok {
			continue
		}
		first, _, nested := strings.Cut(rest, "/")
		if nested && first == ".." {
			first, nested = rest, false // a name with a slash, as a broken tree object has
		}
		if seen[first] {
			continue
		}
		seen[first] = true
		e := hostileEntry{name: first}
		if nested {
			e.mode = fs.ModeDir
		} else if strings.HasPrefix(h[name], "-> ") {
			e.mode = fs.ModeSymlink
		}
		list = append(list, e)
	}
	return list, nil
}

func TestTreeRefusals(t *testing.T) {
	tests := []struct {
		name  string
		files hostileFS
		opts  Options
		want  string // file: message, "" for none
	}{
		{"link out", hostileFS{"a/l.cue": "-> ../../etc/passwd"}, Options{}, "a/l.cue: the symbolic link leaves the tree"},
		{"absolute link", hostileFS{"readme": "-> /etc/passwd"}, Options{}, "readme: the symbolic link leaves the tree"},
		{"link out through a link", hostileFS{"l.cue": "-> a/m.cue", "a/m.cue": "-> ../../x.cue"}, Options{}, "l.cue: the symbolic link leaves the tree"},
		{"folder link out", hostileFS{"d": "-> ../other"}, Options{}, "d: the symbolic link leaves the tree"},
		{"loop", hostileFS{"l.cue": "-> l.cue"}, Options{}, "l.cue: the symbolic link leads nowhere"},
		{"link inside", hostileFS{"l.cue": "-> a/m.cue", "a/m.cue": "x: 1"}, Options{}, ""},
		{"dot dot", hostileFS{"../x.cue": "x: 1"}, Options{}, "the name of a file leaves its folder"},
		{"backslash", hostileFS{`a\..\x.cue`: "x: 1"}, Options{}, "the name of a file leaves its folder"},
		{"name not UTF-8", hostileFS{"a\xff.cue": "x: 1"}, Options{}, "the name is not UTF-8"},
		{"not UTF-8", hostileFS{"a.cue": "x: 1\ny: \"\xff\""}, Options{}, "a.cue:2: the file is not UTF-8"},
		{"huge", hostileFS{"a.cue": strings.Repeat("x", 101)}, Options{MaxFile: 100}, "a.cue: the file is too large; expected at most 100 bytes"},
		{"other files may be huge", hostileFS{"a.bin": strings.Repeat("x", 101)}, Options{MaxFile: 100}, ""},
		{"too many", hostileFS{"a.cue": "", "b.cue": "", "c.cue": ""}, Options{MaxFiles: 2}, "the tree has too many CUE files; expected at most 2"},
		{"too large together", hostileFS{"a.cue": strings.Repeat("x", 60), "b.cue": strings.Repeat("x", 60)}, Options{MaxTotal: 100}, "too large together"},
		{"too deep", hostileFS{strings.Repeat("d/", 80) + "a.cue": ""}, Options{}, "nested too deeply"},
		{"path out", hostileFS{"a.cue": ""}, Options{Path: "../x"}, "leaves the tree"},
		{"no such path", hostileFS{"a.cue": ""}, Options{Path: "x"}, "not a folder of the tree"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, diags, err := readTree(tt.files, tt.opts.withDefaults())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, d := range diags {
				got = append(got, d.Error())
			}
			if text := strings.Join(got, "\n"); tt.want == "" && text != "" || !strings.Contains(text, tt.want) {
				t.Errorf("got %q, want %q", text, tt.want)
			}
		})
	}
}

// FuzzTree reads trees that are written as txtar: whatever stands in them, the loader
// keeps its limits, lets nothing in from outside, and lists packages without failing.
// The seeds are in testdata/fuzz.
func FuzzTree(f *testing.F) {
	opts := Options{MaxFile: 512, MaxFiles: 8, MaxTotal: 2048}.withDefaults()
	f.Fuzz(func(t *testing.T, data []byte) {
		files := hostileFS{}
		for _, file := range txtar.Parse(data).Files {
			files[file.Name] = string(file.Data)
		}
		tr, diags, err := readTree(files, opts)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrInvalid) {
			t.Fatal(err)
		}
		if err != nil {
			return
		}
		checkTree(t, tr, opts)
		for _, d := range diags {
			if d.Message == "" || !utf8.ValidString(d.Pos.File) {
				t.Errorf("diagnostic %+v", d)
			}
		}
		if len(diags) > 0 {
			return
		}
		l := newLoader(newDefinitions(), tr)
		for _, dir := range tr.under(".") {
			for _, p := range l.packages(dir) {
				inst := l.instance(p)
				_ = inst.Complete()
				if len(p.deps) == 0 {
					t.Errorf("package %s depends on nothing", p.id())
				}
			}
		}
	})
}

func checkTree(t *testing.T, tr *tree, opts Options) {
	t.Helper()
	total := 0
	for name, data := range tr.files {
		total += len(data)
		if !fs.ValidPath(name) || !utf8.ValidString(name) || !utf8.Valid(data) || int64(len(data)) > opts.MaxFile {
			t.Errorf("file %q of %d bytes was let in", name, len(data))
		}
	}
	if int64(total) > opts.MaxTotal || len(tr.files) > opts.MaxFiles {
		t.Errorf("%d files of %d bytes were let in", len(tr.files), total)
	}
}

// FuzzResponse decodes what a worker answers, which the parent must not trust.
func FuzzResponse(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &proc{out: newFrameReader(strings.NewReader(string(data)), 1<<20)}
		results, _, err := c.receive()
		if err == nil {
			for _, r := range results {
				_ = fmt.Sprint(finish(r.results, nil, 0))
			}
		}
	})
}
