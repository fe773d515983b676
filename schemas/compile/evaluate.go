package compile

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/errors"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"decree.dev/decree/schemas/api"
)

// Evaluate compiles tree in this process: without a limit on time and memory, and
// without cache. The worker process uses it, and callers that trust the tree. The
// context is looked at between packages. Objects are ordered by package, then as
// they are written.
func Evaluate(ctx context.Context, fsys fs.FS, opts Options) (*Result, error) {
	opts = opts.withDefaults()
	t, diags, err := readTree(fsys, opts)
	if err != nil {
		return nil, err
	}
	if len(diags) > 0 {
		return finish(nil, diags, len(t.files)), nil
	}
	e := newEvaluator(newDefinitions(), t)
	var results []*packageResult
	for _, dir := range t.under(opts.Path) {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("evaluate folder %s: %w", dir, context.Cause(ctx))
		}
		results = append(results, e.folder(dir)...)
	}
	r := finish(results, nil, len(t.files))
	r.Evaluated = len(results)
	return r, nil
}

// packageResult is what one package means. It depends on nothing but the files of
// the folders in deps.
type packageResult struct {
	id      string
	deps    []string
	objects []Object
	diags   []api.Diagnostic
	raw     [][]byte // the objects as JSON, in a worker
}

// written is an object and the package it is in.
type written struct {
	Object
	pkg string
}

// finish joins the results of packages: duplicates are found here, and one diagnostic
// anywhere means no objects. The same content twice is one object, as it is for CUE,
// if it is in one package (all: [for d in deployments {d}]) or comes from the same
// text.
func finish(results []*packageResult, diags []api.Diagnostic, files int) *Result {
	r := &Result{Files: files, Diagnostics: slices.Clone(diags)}
	places := map[api.Key]written{}
	for _, p := range results {
		r.Diagnostics = append(r.Diagnostics, p.diags...)
		for _, o := range p.objects {
			key := api.KeyOf(o.Object)
			first, ok := places[key]
			if !ok {
				places[key] = written{o, p.id}
				r.Objects = append(r.Objects, o)
				continue
			}
			if (first.pkg == p.id || first.origin == o.origin) && equal(first.Object.Object, o.Object) {
				continue
			}
			r.Diagnostics = append(r.Diagnostics, api.Diagnostic{
				Pos: o.Pos, Object: key.String(), Message: "the object is written twice",
				Found: "also at " + first.Pos.String(), Hint: "remove one of them, or rename it",
			})
		}
	}
	r.Diagnostics = order(r.Diagnostics, "")
	if len(r.Diagnostics) > 0 {
		r.Objects = nil
	}
	return r
}

func equal(a, b api.Object) bool { return apiequality.Semantic.DeepEqual(a, b) }

// evaluator evaluates the packages of one tree.
type evaluator struct {
	*loader
	explain *explainer
}

func newEvaluator(defs *definitions, t *tree) *evaluator {
	return &evaluator{loader: newLoader(defs, t), explain: &explainer{defs: defs, tree: t}}
}

// folder evaluates the packages of one folder.
func (e *evaluator) folder(dir string) []*packageResult {
	var list []*packageResult
	for _, p := range e.packages(dir) {
		list = append(list, e.evaluate(p))
	}
	return list
}

// evaluate builds one package and collects its objects and all that is wrong in it. A
// panic of the CUE evaluator, which some programs cause, is an error of the package.
func (e *evaluator) evaluate(p *pkg) (r *packageResult) {
	defer func() {
		if cause := recover(); cause != nil {
			r = &packageResult{id: p.id(), deps: p.deps, diags: []api.Diagnostic{{
				Pos:     api.Position{File: p.files[0]},
				Message: fmt.Sprintf("CUE cannot evaluate this package: its evaluator fails with %q", fmt.Sprint(cause)),
				Hint:    "write the last change in another way",
			}}}
			*e = *newEvaluator(newDefinitions(), e.tree) // the old state cannot be trusted
		}
	}()
	inst := e.instance(p)
	r = &packageResult{id: p.id(), deps: p.deps}
	var v cue.Value
	if inst.Err == nil {
		v = e.defs.ctx.BuildInstance(inst)
	}
	if inst.Err != nil {
		// Syntax, imports, unresolved names: nothing was evaluated.
		r.diags = order(e.explain.errors(inst.Err, ""), p.files[0])
		return r
	}
	var lost []api.Position // objects whose errors are all elsewhere
	w := &walker{e: e, visit: func(f found) []api.Diagnostic {
		o, diags := e.object(f)
		switch {
		case len(diags) > 0:
		case o.Object.Object == nil:
			lost = append(lost, f.around)
		default:
			r.objects = append(r.objects, o.Object)
			r.raw = append(r.raw, o.raw)
		}
		return diags
	}}
	w.walk(v, api.Position{File: p.files[0], Line: 1})
	r.diags = w.diags
	if err := v.Validate(); err != nil {
		r.diags = append(r.diags, e.explain.rest(v, err, w.explained, r.diags)...)
	}
	if len(lost) > 0 && len(r.diags) == 0 {
		r.diags = e.explain.elsewhere
	}
	if len(lost) > 0 && len(r.diags) == 0 {
		r.diags = []api.Diagnostic{{Pos: lost[0], Message: "the object depends on a value in error"}}
	}
	e.explain.elsewhere = nil
	r.diags = order(r.diags, p.files[0])
	return r
}

// rawObject is an object with the JSON it was decoded from.
type rawObject struct {
	Object
	raw []byte
}

// object checks one struct with apiVersion and kind, and decodes it.
func (e *evaluator) object(f found) (rawObject, []api.Diagnostic) {
	pos, origin, fields := e.explain.places(f.value, f.around)
	gv, err := schema.ParseGroupVersion(f.apiVersion)
	kind, ok := api.KindForGVK(gv.WithKind(f.kind))
	switch {
	case err != nil || !ok:
		return rawObject{}, []api.Diagnostic{unknownKind(f, pos)}
	case !kind.FromGit():
		return rawObject{}, []api.Diagnostic{{
			Pos: pos, Field: "kind", Message: fmt.Sprintf("objects of kind %s cannot be written in Git", f.kind),
			Hint: "Decree makes them itself",
		}}
	}
	def, err := e.defs.kind(kind)
	if err != nil {
		return rawObject{}, []api.Diagnostic{{Pos: pos, Message: err.Error()}}
	}
	u := def.value.Unify(f.value)
	if err := u.Validate(cue.Concrete(true)); err != nil {
		return rawObject{}, e.explain.object(kind, def, f.value, pos, err)
	}
	o := rawObject{Object: Object{Pos: pos, Fields: fields, origin: origin}}
	if o.Object.Object, o.raw, err = decode(kind, u); err != nil {
		return o, []api.Diagnostic{{Pos: pos, Object: e.explain.objectName(kind, f.value), Message: err.Error()}}
	}
	return o, checkRules(o.Object, e.explain.objectName(kind, f.value))
}

// unknownKind says which kinds there are.
func unknownKind(f found, pos api.Position) api.Diagnostic {
	d := api.Diagnostic{
		Pos: pos, Field: "kind", Message: "Decree does not serve this kind",
		Found: fmt.Sprintf("apiVersion %q, kind %q", f.apiVersion, f.kind),
	}
	var names []string
	for _, k := range api.Served() {
		if !k.FromGit() {
			continue
		}
		names = append(names, k.Kind)
		if k.Kind == f.kind {
			d.Field, d.Message = "apiVersion", "Decree serves this kind with another apiVersion"
			d.Expected = fmt.Sprintf("apiVersion %q", k.GroupVersion())
		}
	}
	if d.Expected == "" {
		d.Expected = "one of " + strings.Join(names, ", ")
		if n := nearest(f.kind, names); n != "" {
			d.Hint = fmt.Sprintf("did you mean %s?", n)
		}
	}
	return d
}

// kindDef is the definition of a kind.
type kindDef struct{ value cue.Value }

// kind returns the definition that validates objects of kind k.
func (d *definitions) kind(k *api.Kind) (*kindDef, error) {
	if def, ok := d.kinds[k.CUE]; ok {
		return def, nil
	}
	importPath, name, ok := strings.Cut(k.CUE, "#")
	inst := d.instance(importPath)
	if !ok || inst == nil {
		return nil, fmt.Errorf("the embedded module has no %s", k.CUE)
	}
	v := d.ctx.BuildInstance(inst)
	if err := v.Err(); err != nil {
		return nil, fmt.Errorf("the embedded package %s: %s", importPath, errors.Details(err, nil))
	}
	def := &kindDef{value: v.LookupPath(cue.MakePath(cue.Def(name)))}
	if err := def.value.Err(); err != nil {
		return nil, fmt.Errorf("the embedded definition %s: %s", k.CUE, errors.Details(err, nil))
	}
	d.kinds[k.CUE] = def
	return def, nil
}

// objectName is `deployments.apps "shop/web"` as far as it is known.
func (x *explainer) objectName(kind *api.Kind, v cue.Value) string {
	key := api.Key{Resource: kind.Resource, Name: x.text(v, "name")}
	if kind.Namespaced {
		key.Namespace = cmp.Or(x.text(v, "namespace"), defaultNamespace)
	}
	if key.Name == "" {
		return string(key.Resource)
	}
	return key.String()
}

// text returns a text of the metadata of v as the user wrote it, also if it is wrong.
func (x *explainer) text(v cue.Value, name string) string {
	field := v.LookupPath(cue.MakePath(cue.Str("metadata"), cue.Str(name)))
	if s, err := field.String(); err == nil {
		return s
	}
	if data, ok := x.data(field, isDefinition); ok {
		s, _ := data.String() // not a text: no name
		return s
	}
	return ""
}

// order sorts diagnostics by place and drops repetitions. One without a place is about
// the file.
func order(diags []api.Diagnostic, file string) []api.Diagnostic {
	for i := range diags {
		diags[i].Pos.File = cmp.Or(diags[i].Pos.File, file)
	}
	slices.SortStableFunc(diags, compareDiagnostics)
	return slices.Compact(diags)
}

func compareDiagnostics(a, b api.Diagnostic) int {
	return cmp.Or(
		cmp.Compare(a.Pos.File, b.Pos.File), cmp.Compare(a.Pos.Line, b.Pos.Line), cmp.Compare(a.Pos.Column, b.Pos.Column),
		cmp.Compare(a.Object, b.Object), cmp.Compare(a.Field, b.Field), cmp.Compare(a.Message, b.Message),
	)
}
