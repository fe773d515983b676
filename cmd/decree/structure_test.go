package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "decree.dev/decree/"

// pure packages decide; they touch neither clock nor world.
var pure = []string{
	"schemas/api", "schemas/compile/rules", "raftstore/command", "raftstore/state", "raftstore/audit",
	"reconciler/plan", "reconciler/workload", "reconciler/schedule",
	"netplane/render", "netplane/diff", "netplane/policy", "netplane/netcheck", "netplane/ingress/route",
}

// forbidden lists, for pure packages, what they must not import.
var impure = []string{
	"os", "os/exec", "net", "net/http", "io/fs", "syscall", "log/slog", "math/rand", "math/rand/v2", "crypto/rand",
	"github.com/hashicorp/raft", "github.com/go-git/go-git/v5", "github.com/containerd/containerd/v2/client",
}

// walls are the imports between rooms that DESIGN.md forbids.
var walls = []struct{ from, to string }{
	{"netplane", "raftstore"},
	{"raftstore", "netplane"},
	{"netplane", "reconciler"},
	{"raftstore", "reconciler"},
	{"schemas", "raftstore"},
	{"schemas", "reconciler"},
	{"schemas", "netplane"},
	{"raftstore", "cmd"},
	{"raftstore/membership", "raftstore/raftsim"},
	{"cmd", "raftstore/raftsim"},
	{"reconciler", "cmd"},
	{"netplane", "cmd"},
	{"schemas", "cmd"},
	{"schemas/api", "schemas/compile"},
}

// topLevel is the whole top level of the repository, apart from dotfiles.
var topLevel = []string{
	"cmd", "reconciler", "raftstore", "netplane", "schemas", "examples",
	"go.mod", "go.sum", "Taskfile.yml", "README.md", "DESIGN.md", "CHANGELOG.md", "LICENSE",
	"bin", // built, ignored by git
}

type pkg struct {
	dir     string
	files   []*ast.File // without tests
	imports []string    // of those files
	doc     bool
}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") && !slices.Contains(topLevel, e.Name()) {
			t.Errorf("%s: does not belong at the top level", e.Name())
		}
	}
}

func TestImportRules(t *testing.T) {
	for _, p := range packages(t) {
		for _, imp := range p.imports {
			local, ok := strings.CutPrefix(imp, module)
			if !ok {
				continue
			}
			for _, w := range walls {
				if within(p.dir, w.from) && within(local, w.to) {
					t.Errorf("%s imports %s: %s must not know %s", p.dir, local, w.from, w.to)
				}
			}
		}
	}
}

func TestPurePackages(t *testing.T) {
	for _, p := range packages(t) {
		if !slices.Contains(pure, p.dir) {
			continue
		}
		for _, imp := range p.imports {
			if slices.Contains(impure, imp) {
				t.Errorf("%s is pure and must not import %s", p.dir, imp)
			}
		}
		for _, f := range p.files {
			ast.Inspect(f, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "NewTimer", "NewTicker"}, sel.Sel.Name) {
						t.Errorf("%s is pure and must not call time.%s: take now as an argument", p.dir, sel.Sel.Name)
					}
				}
				return true
			})
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		if !p.doc {
			t.Errorf("%s has no package comment", p.dir)
		}
		for _, bad := range []string{"util", "utils", "common", "helper", "helpers", "manager", "misc"} {
			if path.Base(p.dir) == bad {
				t.Errorf("%s: name the package after what it is for", p.dir)
			}
		}
	}
}

const root = "../.."

func within(dir, room string) bool { return dir == room || strings.HasPrefix(dir, room+"/") }

// packages parses every non-test package of the repository.
func packages(t *testing.T) []*pkg {
	t.Helper()
	byDir := map[string]*pkg{}
	fset := token.NewFileSet()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := d.Name(); name != root && (strings.HasPrefix(base, ".") || base == "testdata" || base == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(name))
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(rel)
		p := byDir[dir]
		if p == nil {
			p = &pkg{dir: dir}
			byDir[dir] = p
		}
		p.files = append(p.files, f)
		p.doc = p.doc || f.Doc != nil
		for _, imp := range f.Imports {
			p.imports = append(p.imports, strings.Trim(imp.Path.Value, `"`))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(byDir) < 5 {
		t.Fatalf("found %d packages only: is %s the root?", len(byDir), root)
	}
	list := make([]*pkg, 0, len(byDir))
	for _, p := range byDir {
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b *pkg) int { return strings.Compare(a.dir, b.dir) })
	return list
}
