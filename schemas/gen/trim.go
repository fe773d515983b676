package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/format"
	"cuelang.org/go/cue/parser"
	"cuelang.org/go/cue/token"
)

// rawPackage is what `cue get go` wrote for one Go package.
type rawPackage struct {
	defs map[string]rawDef // by name without #
}

// rawDef is one definition, with the imports of the file it stands in.
type rawDef struct {
	value   ast.Expr
	imports map[string]string // identifier to Go import path
}

// readRaw parses all generated files of a folder.
func readRaw(dir string) (*rawPackage, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*_gen.cue"))
	if err != nil || len(names) == 0 {
		return nil, fmt.Errorf("no generated files in %s: %v", dir, err)
	}
	p := &rawPackage{defs: map[string]rawDef{}}
	for _, name := range names {
		f, err := parser.ParseFile(name, nil)
		if err != nil {
			return nil, err
		}
		imports := map[string]string{}
		for spec := range f.ImportSpecs() {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return nil, err
			}
			id := ast.ParseImportPath(path).Qualifier
			if spec.Name != nil {
				id = spec.Name.Name
			}
			imports[id] = path
		}
		for _, d := range f.Decls {
			if field, ok := d.(*ast.Field); ok {
				if id, ok := field.Label.(*ast.Ident); ok && strings.HasPrefix(id.Name, "#") {
					p.defs[id.Name[1:]] = rawDef{field.Value, imports}
				}
			}
		}
	}
	return p, nil
}

// outFile is the generated file of one package.
type outFile struct {
	path string // import path
	text []byte
}

// trimmer collects the definitions that are reachable from the roots.
type trimmer struct {
	raw     map[string]*rawPackage
	done    map[string]ast.Expr        // "corev1.Pod" to its definition
	imports map[string]map[string]bool // short name of a package to those it uses
	err     error
}

// trim returns the files to write, one for each package, in the order of packages.
func trim(raw map[string]*rawPackage) ([]outFile, error) {
	t := &trimmer{raw: raw, done: map[string]ast.Expr{}, imports: map[string]map[string]bool{}}
	for _, r := range roots {
		t.need(r.name)
	}
	if t.err != nil {
		return nil, t.err
	}
	var files []outFile
	for _, p := range packages {
		text, err := t.print(short(p.cuePath))
		if err != nil {
			return nil, err
		}
		files = append(files, outFile{p.cuePath, text})
	}
	return files, nil
}

// short returns the short name of the package with this import path.
func short(path string) string {
	for _, p := range packages {
		if p.goPath == path {
			path = p.cuePath
		}
	}
	for name, p := range shortNames {
		if p == path {
			return name
		}
	}
	return ""
}

// need converts the type with this name ("corev1.Pod") and all that it uses.
func (t *trimmer) need(name string) {
	if _, ok := t.done[name]; ok || byHand[name] != nil {
		return
	}
	pkg, typ, _ := strings.Cut(name, ".")
	raw, ok := t.raw[shortNames[pkg]]
	def, found := rawDef{}, false
	if ok {
		def, found = raw.defs[typ]
	}
	if !found {
		t.err = fmt.Errorf("the Go packages define no %s", name)
		return
	}
	t.done[name] = nil // breaks cycles
	if values := enumValues(raw, typ); values != nil {
		t.done[name] = enum(name, values)
		return
	}
	t.done[name] = t.convert(pkg, name, def, def.value)
}

// convert copies a type expression, converting the types it refers to.
func (t *trimmer) convert(pkg, owner string, def rawDef, x ast.Expr) ast.Expr {
	switch x := x.(type) {
	case *ast.StructLit:
		return t.convertStruct(pkg, owner, def, x)
	case *ast.ListLit:
		list := &ast.ListLit{}
		for _, e := range x.Elts {
			if el, ok := e.(*ast.Ellipsis); ok {
				e = &ast.Ellipsis{Type: t.convert(pkg, "", def, el.Type)}
			}
			list.Elts = append(list.Elts, e)
		}
		return list
	case *ast.BinaryExpr:
		if b, ok := x.X.(*ast.BasicLit); ok && x.Op == token.OR && b.Kind == token.NULL {
			return t.convert(pkg, owner, def, x.Y) // a Go pointer: absent, never null
		}
		return &ast.BinaryExpr{X: t.convert(pkg, "", def, x.X), Op: x.Op, Y: t.convert(pkg, "", def, x.Y)}
	case *ast.Ident:
		if strings.HasPrefix(x.Name, "#") {
			t.need(pkg + "." + x.Name[1:])
		}
		return ast.NewIdent(x.Name)
	case *ast.SelectorExpr:
		return t.convertSelector(pkg, def, x)
	}
	return x
}

func (t *trimmer) convertSelector(pkg string, def rawDef, x *ast.SelectorExpr) ast.Expr {
	id, sel := x.X.(*ast.Ident), x.Sel.(*ast.Ident)
	other := short(def.imports[id.Name])
	if other == "" {
		t.err = fmt.Errorf("%s: package %q is not in the table of packages", sel.Name, def.imports[id.Name])
		return x
	}
	t.need(other + "." + sel.Name[1:])
	return t.reference(pkg, other+"."+sel.Name)
}

// reference returns a reference from pkg to "corev1.#Pod".
func (t *trimmer) reference(pkg, to string) ast.Expr {
	other, name, _ := strings.Cut(to, ".")
	if other == pkg {
		return ast.NewIdent(name)
	}
	if t.imports[pkg] == nil {
		t.imports[pkg] = map[string]bool{}
	}
	t.imports[pkg][other] = true
	return ast.NewSel(ast.NewIdent(other), name)
}

// convertStruct copies a struct: embedded structs inline, implemented fields with
// their marks, the others as attributes.
func (t *trimmer) convertStruct(pkg, owner string, def rawDef, x *ast.StructLit) *ast.StructLit {
	out := &ast.StructLit{}
	var refused, owned []string
	for _, d := range x.Elts {
		field, ok := d.(*ast.Field)
		if !ok {
			if e, ok := d.(*ast.EmbedDecl); ok {
				out.Elts = append(out.Elts, t.embedded(pkg, owner, def, e.Expr)...)
			}
			continue
		}
		name, _, err := ast.LabelName(field.Label)
		if err != nil { // a pattern such as [string]: string
			out.Elts = append(out.Elts, &ast.Field{Label: field.Label, Value: t.convert(pkg, "", def, field.Value)})
			continue
		}
		switch {
		case isEmbedded(name, field.Value):
			out.Elts = append(out.Elts, t.embedded(pkg, owner, def, field.Value)...)
		case clusterOwned[owner][name]:
			owned = append(owned, name)
		case implemented[owner] != nil && !implemented[owner][name]:
			refused = append(refused, name)
		default:
			mark := token.NOT
			if field.Constraint == token.OPTION && !(name == "metadata" && isRoot(owner)) {
				mark = token.OPTION
			}
			value := field.Value
			if by, ok := mapTypes[owner+"."+name]; ok {
				value = t.reference(pkg, by)
			} else {
				value = t.convert(pkg, "", def, value)
			}
			out.Elts = append(out.Elts, &ast.Field{Label: ast.NewIdent(name), Constraint: mark, Value: value})
		}
	}
	out.Elts = append(out.Elts, mark("unimplemented", refused)...)
	out.Elts = append(out.Elts, mark("cluster", owned)...)
	return out
}

// mark returns the attribute @name(a,b,c), or nothing without words.
func mark(name string, words []string) []ast.Decl {
	if len(words) == 0 {
		return nil
	}
	return []ast.Decl{&ast.Attribute{Text: "@" + name + "(" + strings.Join(words, ",") + ")"}}
}

// isEmbedded reports whether a field is what `cue get go` makes of an embedded
// struct with the tag json:"": a field named like its type.
func isEmbedded(name string, value ast.Expr) bool {
	switch v := value.(type) {
	case *ast.Ident:
		return v.Name == "#"+name
	case *ast.SelectorExpr:
		return v.Sel.(*ast.Ident).Name == "#"+name
	}
	return false
}

// isRoot reports whether a type is written as an object of its own.
func isRoot(name string) bool {
	return slices.ContainsFunc(roots, func(r root) bool { return r.name == name })
}

// embedded returns the fields of an embedded struct.
func (t *trimmer) embedded(pkg, owner string, def rawDef, x ast.Expr) []ast.Decl {
	name := pkg + "."
	switch v := x.(type) {
	case *ast.Ident:
		name += v.Name[1:]
	case *ast.SelectorExpr:
		name = short(def.imports[v.X.(*ast.Ident).Name]) + "." + v.Sel.(*ast.Ident).Name[1:]
	}
	if name == "metav1.TypeMeta" {
		for _, r := range roots {
			if r.name == owner {
				_, kind, _ := strings.Cut(owner, ".")
				return []ast.Decl{
					&ast.Field{Label: ast.NewIdent("apiVersion"), Value: ast.NewString(r.apiVersion)},
					&ast.Field{Label: ast.NewIdent("kind"), Value: ast.NewString(kind)},
				}
			}
		}
		t.err = fmt.Errorf("%s embeds TypeMeta but is no root", owner)
		return nil
	}
	otherPkg, typ, _ := strings.Cut(name, ".")
	other := t.raw[shortNames[otherPkg]].defs[typ]
	return t.convertStruct(otherPkg, name, other, other.value.(*ast.StructLit)).Elts
}

// enumValues returns the constants of an enumeration in their order, or nil.
func enumValues(raw *rawPackage, typ string) []string {
	list, ok := raw.defs["enum"+typ]
	if !ok {
		return nil
	}
	var values []string
	var walk func(ast.Expr)
	walk = func(x ast.Expr) {
		switch x := x.(type) {
		case *ast.BinaryExpr:
			walk(x.X)
			walk(x.Y)
		case *ast.Ident:
			if c, ok := raw.defs[x.Name[1:]].value.(*ast.BinaryExpr); ok {
				if lit, ok := c.Y.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if s, err := strconv.Unquote(lit.Value); err == nil && s != "" && !slices.Contains(values, s) {
						values = append(values, s)
					}
				}
			}
		}
	}
	walk(list.value)
	return values
}

// enum returns the disjunction of the implemented values.
func enum(name string, values []string) ast.Expr {
	var x ast.Expr
	for _, v := range values {
		if allowed := implementedEnums[name]; allowed != nil && !allowed["*"] && !allowed[v] {
			continue
		}
		lit := ast.Expr(ast.NewString(v))
		if x != nil {
			lit = &ast.BinaryExpr{X: x, Op: token.OR, Y: lit}
		}
		x = lit
	}
	return x
}

// print formats the definitions of one package, ordered by name.
func (t *trimmer) print(pkg string) ([]byte, error) {
	path := shortNames[pkg]
	f := &ast.File{Decls: []ast.Decl{&ast.Package{Name: ast.NewIdent(ast.ParseImportPath(path).Qualifier)}}}
	var specs []*ast.ImportSpec
	for other := range t.imports[pkg] {
		specs = append(specs, &ast.ImportSpec{Name: ast.NewIdent(other), Path: ast.NewString(shortNames[other])})
	}
	slices.SortFunc(specs, func(a, b *ast.ImportSpec) int { return strings.Compare(a.Path.Value, b.Path.Value) })
	if specs != nil {
		f.Decls = append(f.Decls, &ast.ImportDecl{Specs: specs})
	}
	var names []string
	for name := range t.done {
		if p, _, _ := strings.Cut(name, "."); p == pkg {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		_, typ, _ := strings.Cut(name, ".")
		f.Decls = append(f.Decls, &ast.Field{Label: ast.NewIdent("#" + typ), Value: t.done[name]})
	}
	text, err := format.Node(f, format.Simplify())
	if err != nil {
		return nil, fmt.Errorf("format %s: %w", path, err)
	}
	return append([]byte("// Code generated by schemas/gen. DO NOT EDIT.\n\n"), text...), nil
}
