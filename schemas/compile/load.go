package compile

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/build"
	"cuelang.org/go/cue/cuecontext"
	"cuelang.org/go/cue/errors"
	"cuelang.org/go/cue/parser"
	"cuelang.org/go/cue/token"
	"cuelang.org/go/mod/modfile"

	"decree.dev/decree/schemas"
)

// schemaPrefix begins the names of files of the embedded module, so that no
// position in them is taken for one of the user's.
const schemaPrefix = "decree:"

// appPackage is the short form of an application.
const appPackage = "decree.dev/app"

// definitions is the embedded module in a CUE context of its own. It is filled
// before a tree is known, and serves one evaluation. It is not safe for concurrent
// use.
type definitions struct {
	ctx   *cue.Context
	build *build.Context
	insts map[string]*build.Instance // by import path; nil: not in the module
	kinds map[string]*kindDef        // by CUE path of the registry
}

func newDefinitions() *definitions {
	return &definitions{
		ctx: cuecontext.New(), build: build.NewContext(),
		insts: map[string]*build.Instance{}, kinds: map[string]*kindDef{},
	}
}

// instance returns the embedded package with this import path, or nil if there is none.
func (d *definitions) instance(importPath string) *build.Instance {
	if inst, ok := d.insts[importPath]; ok {
		return inst
	}
	d.insts[importPath] = nil
	dir := "module/" + importPath
	entries, err := fs.ReadDir(schemas.Module, dir)
	if err != nil {
		return nil
	}
	inst := d.build.NewInstance(dir, func(_ token.Pos, p string) *build.Instance { return d.instance(p) })
	inst.ImportPath = importPath
	found := false
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		text, err := fs.ReadFile(schemas.Module, path.Join(dir, e.Name()))
		if err != nil {
			return nil
		}
		f, err := parser.ParseFile(schemaPrefix+importPath+"/"+e.Name(), text)
		if err != nil {
			inst.ReportError(errors.Promote(err, "embedded definitions"))
			continue
		}
		inst.AddSyntax(f)
		found = true
	}
	if !found {
		return nil
	}
	d.insts[importPath] = inst
	_ = inst.Complete() // recorded in inst.Err, which an importer reports
	return inst
}

// pkg is one thing to evaluate: a package of a folder, or a file without package
// clause.
type pkg struct {
	dir   string
	name  string   // package name; "" for a file without one
	files []string // paths in the tree
	// deps are the folders of the tree whose files the result depends on, and the parts
	// of folders (partOf), ordered.
	deps []string
}

// id is unique among the packages of a tree.
func (p *pkg) id() string {
	if p.name == "" {
		return p.files[0]
	}
	return p.dir + ":" + p.name
}

// loader turns the packages of a tree into build instances.
type loader struct {
	defs   *definitions
	tree   *tree
	parsed map[string]*parsedFile
	mods   map[string]*module // by root folder
}

// parsedFile is a file's syntax, or what is wrong with it.
type parsedFile struct {
	syntax *ast.File
	err    errors.Error
}

// module is a CUE module of the tree: a folder with cue.mod/module.cue, or the whole
// tree if there is none.
type module struct {
	root  string
	path  string // import path without major version; "" if it has none
	err   errors.Error
	build *build.Context
	insts map[string]*build.Instance // by import path
}

func newLoader(defs *definitions, t *tree) *loader {
	return &loader{defs: defs, tree: t, parsed: map[string]*parsedFile{}, mods: map[string]*module{}}
}

// packages lists what stands in a folder: its packages, then its files without
// package, each in the order of names.
func (l *loader) packages(dir string) []*pkg {
	byName := map[string]*pkg{}
	var list, single []*pkg
	for _, base := range l.tree.dirs[dir] {
		file := path.Join(dir, base)
		name := l.packageOf(file)
		if name == "" {
			single = append(single, &pkg{dir: dir, files: []string{file}})
			continue
		}
		p, ok := byName[name]
		if !ok {
			p = &pkg{dir: dir, name: name}
			byName[name] = p
			list = append(list, p)
		}
		p.files = append(p.files, file)
	}
	for _, p := range list {
		p.files = append(l.inherited(p.dir, p.name), p.files...)
	}
	slices.SortFunc(list, func(a, b *pkg) int { return strings.Compare(a.name, b.name) })
	return append(list, single...)
}

// inherited returns the files of the same package in the folders above, up to the
// root of the module: they are part of the package, as for the cue command.
func (l *loader) inherited(dir, name string) []string {
	root := l.rootOf(dir)
	var files []string
	for dir != root {
		dir = path.Dir(dir)
		var here []string
		for _, base := range l.tree.dirs[dir] {
			if file := path.Join(dir, base); l.packageOf(file) == name {
				here = append(here, file)
			}
		}
		files = append(here, files...)
	}
	return files
}

// packageOf returns the package name in the file, "" without one.
func (l *loader) packageOf(file string) string {
	p := l.parse(file)
	if p.syntax == nil {
		return ""
	}
	if name := p.syntax.PackageName(); name != "_" {
		return name
	}
	return ""
}

// parse parses a file of the tree once.
func (l *loader) parse(file string) *parsedFile {
	if p, ok := l.parsed[file]; ok {
		return p
	}
	f, err := parser.ParseFile(file, l.tree.files[file], parser.AllErrors)
	p := &parsedFile{syntax: f}
	if err != nil {
		p.err = errors.Promote(err, "syntax")
	} else {
		p.err = refuseAttributes(f)
	}
	l.parsed[file] = p
	return p
}

// refuseAttributes reports file attributes that would have to read other files or
// depend on flags, which an evaluation does not have.
func refuseAttributes(f *ast.File) (errs errors.Error) {
	for _, d := range f.Decls {
		a, ok := d.(*ast.Attribute)
		if !ok {
			continue
		}
		switch name, _ := a.Split(); name {
		case "extern", "if", "ignore":
			errs = errors.Append(errs, errors.Newf(a.Pos(), "the attribute @%s is not supported by Decree", name))
		}
	}
	return errs
}

// rootOf returns the root folder of the module that dir belongs to.
func (l *loader) rootOf(dir string) string {
	for d := dir; d != "."; d = path.Dir(d) {
		if _, ok := l.tree.files[path.Join(d, "cue.mod", "module.cue")]; ok {
			return d
		}
	}
	return "."
}

// module returns the module that dir belongs to.
func (l *loader) module(dir string) *module {
	root := l.rootOf(dir)
	if m, ok := l.mods[root]; ok {
		return m
	}
	m := &module{root: root, build: build.NewContext(), insts: map[string]*build.Instance{}}
	l.mods[root] = m
	name := path.Join(root, "cue.mod", "module.cue")
	if data, ok := l.tree.files[name]; ok {
		f, err := modfile.FixLegacy(data, name)
		if err != nil {
			m.err = errors.Promote(err, "module file")
			if !m.err.Position().IsValid() {
				m.err = errors.Newf(filePos(name, data), "%v", err)
			}
			return m
		}
		m.path = ast.ParseImportPath(f.QualifiedModule()).Path
	}
	return m
}

// filePos is a position at the beginning of a file that was not parsed.
func filePos(name string, data []byte) token.Pos {
	f := token.NewFile(name, -1, len(data)+1)
	f.SetLinesForContent(data)
	return f.Pos(0, token.NoRelPos)
}

// instance builds the instance of p; problems are in its Err. It records in p.deps
// the folders that were looked at.
func (l *loader) instance(p *pkg) *build.Instance {
	m := l.module(p.dir)
	deps := map[string]bool{}
	inst := l.build(m, p, deps)
	for d := range deps {
		p.deps = append(p.deps, d)
	}
	slices.Sort(p.deps)
	return inst
}

// build makes an instance from the files of p and resolves its imports.
func (l *loader) build(m *module, p *pkg, deps map[string]bool) *build.Instance {
	inst := m.build.NewInstance(p.dir, func(pos token.Pos, importPath string) *build.Instance {
		return l.resolve(m, pos, importPath, deps)
	})
	inst.PkgName = p.name
	deps[p.dir] = true
	for d := p.dir; ; d = path.Dir(d) {
		deps[path.Join(d, "cue.mod")] = true // its root may move here
		if d != p.dir && p.name != "" {
			deps[partOf(d, p.name)] = true
		}
		if d == m.root || d == "." {
			break
		}
	}
	if m.err != nil {
		inst.ReportError(m.err)
	}
	for _, file := range p.files {
		f := l.parse(file)
		if f.err != nil {
			inst.ReportError(f.err)
			continue
		}
		l.checkImports(m, inst, f.syntax, deps)
		inst.AddSyntax(f.syntax)
	}
	return inst
}

const cannotImport = " cannot be imported: "

// checkImports reports every import of a file that cannot be resolved: CUE itself stops
// at the first.
func (l *loader) checkImports(m *module, inst *build.Instance, f *ast.File, deps map[string]bool) {
	for spec := range f.ImportSpecs() {
		importPath, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue // the parser has reported it
		}
		imp := l.resolve(m, spec.Path.Pos(), importPath, deps)
		if imp == nil || imp.Err == nil {
			continue
		}
		first := errors.Errors(imp.Err)[0]
		switch pos := first.Position(); {
		case !pos.IsValid() || pos.Filename() == f.Filename:
			inst.ReportError(first)
		default:
			cause := fmt.Sprintf("%s:%d: %s", pos.Filename(), pos.Line(), first.Error())
			if i := strings.LastIndex(cause, cannotImport); i >= 0 {
				cause = cause[i+len(cannotImport):] // of a chain of packages the last is to blame
			}
			inst.ReportError(errors.Newf(spec.Path.Pos(), "package %q%s%s", importPath, cannotImport, cause))
		}
	}
}

// resolve finds an imported package: of CUE itself (nil), embedded, or of the same
// module. There is no other place, and no network.
func (l *loader) resolve(m *module, pos token.Pos, importPath string, deps map[string]bool) *build.Instance {
	ip := ast.ParseImportPath(importPath)
	if first, _, _ := strings.Cut(ip.Path, "/"); !strings.Contains(first, ".") {
		return nil // a package of CUE itself; the evaluator knows which exist
	}
	if strings.HasPrefix(ip.Path, ".") {
		ip.Path = "" // CUE has no relative imports
	}
	if inst := l.defs.instance(ip.Path); inst != nil {
		return inst
	}
	if inst, ok := m.insts[importPath]; ok {
		return inst
	}
	fail := func(format string, args ...any) *build.Instance {
		inst := m.build.NewInstance("", nil)
		inst.ReportError(errors.Newf(pos, format, args...))
		return inst
	}
	if m.path == "" || !within(ip.Path, m.path) {
		return fail("package %q is not known; expected a package of this module%s, of CUE, or one of %s",
			importPath, quoteIf(m.path), strings.Join(embeddedPackages(), ", "))
	}
	dir := path.Join(m.root, strings.TrimPrefix(strings.TrimPrefix(ip.Path, m.path), "/"))
	deps[dir] = true
	for _, p := range l.packages(dir) {
		if p.name == ip.Qualifier && p.name != "" {
			m.insts[importPath] = fail("the import of %q leads back to itself", importPath)
			inst := l.build(m, p, deps)
			_ = inst.Complete()
			m.insts[importPath] = inst
			return inst
		}
	}
	return fail("folder %s has no package %s", dir, ip.Qualifier)
}

func quoteIf(s string) string {
	if s == "" {
		return ""
	}
	return fmt.Sprintf(" (%s/...)", s)
}

// embeddedPackages lists the import paths that users may import.
func embeddedPackages() []string {
	var list []string
	_ = fs.WalkDir(schemas.Module, "module", func(name string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			if dir := strings.TrimPrefix(path.Dir(name), "module/"); !slices.Contains(list, dir) {
				list = append(list, dir)
			}
		}
		return err
	})
	return list
}
