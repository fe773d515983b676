package compile

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/fxamacker/cbor/v2"

	"decree.dev/decree/schemas/api"
)

// The protocol between the parent and a worker: frames of a kind (1 byte), a length
// (4 bytes, big endian) and as many bytes. The worker says ready with its version
// when its definitions are loaded; the parent sends options, files and end; the worker
// sends begin and result for every folder, and end.

// wireVersion changes with every change of the protocol or its structs: parent and
// worker are the same binary, unless it was replaced in between.
const wireVersion = 1

// The kinds of frames.
const (
	frameReady   = 'V' // version, 4 bytes
	frameOptions = 'O' // wireOptions
	frameFile    = 'F' // wireFile
	frameBegin   = 'B' // folder
	frameResult  = 'R' // []wirePackage
	frameEnd     = 'E' // empty
)

const (
	maxFrame    = 256 << 20 // bytes of one frame
	maxResponse = 512 << 20 // bytes that a worker may answer
)

var (
	errFrame = errors.New("compile worker: malformed frame")
	errLarge = errors.New("compile worker: the result is too large")
)

// wireOptions is what a worker is to do.
type wireOptions struct {
	_      struct{} `cbor:",toarray"`
	Memory int64
	Dirs   []string // the folders to evaluate
}

// wireFile is one file of the tree.
type wireFile struct {
	_    struct{} `cbor:",toarray"`
	Name string
	Data []byte
}

// wirePackage is a packageResult.
type wirePackage struct {
	_       struct{} `cbor:",toarray"`
	ID      string
	Deps    []string
	Files   []string // names that places refer to by index
	Objects []wireObject
	Diags   []wireDiag
}

type wirePlace struct {
	_                  struct{} `cbor:",toarray"`
	File, Line, Column int
}

type wireField struct {
	_     struct{} `cbor:",toarray"`
	Path  string
	Place wirePlace
}

type wireObject struct {
	_        struct{} `cbor:",toarray"`
	Resource string
	JSON     []byte
	Place    wirePlace
	Origin   wirePlace
	Fields   []wireField
}

type wireDiag struct {
	_                                             struct{} `cbor:",toarray"`
	Place                                         wirePlace
	Object, Field, Message, Expected, Found, Hint string
}

// decMode refuses what no honest worker sends.
var decMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		MaxArrayElements: 10_000_000, MaxMapPairs: 16, MaxNestedLevels: 16,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden, UTF8: cbor.UTF8RejectInvalid,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return m
}()

// frameWriter writes frames; it is not safe for concurrent use.
type frameWriter struct{ w *bufio.Writer }

func newFrameWriter(w io.Writer) *frameWriter { return &frameWriter{bufio.NewWriterSize(w, 64<<10)} }

func (f *frameWriter) write(kind byte, payload []byte) error {
	if len(payload) > maxFrame {
		return errLarge
	}
	var head [5]byte
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(payload)))
	if _, err := f.w.Write(head[:]); err != nil {
		return err
	}
	_, err := f.w.Write(payload)
	return err
}

func (f *frameWriter) encode(kind byte, v any) error {
	payload, err := cbor.Marshal(v)
	if err != nil {
		return err
	}
	return f.write(kind, payload)
}

// frameReader reads frames, at most left bytes of them.
type frameReader struct {
	r    *bufio.Reader
	left int64
}

func newFrameReader(r io.Reader, limit int64) *frameReader {
	return &frameReader{bufio.NewReaderSize(r, 64<<10), limit}
}

// next returns the next frame. The end of the stream between frames is io.EOF.
func (f *frameReader) next() (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return 0, nil, err
	}
	n := int64(binary.BigEndian.Uint32(head[1:]))
	if n > maxFrame || n+5 > f.left {
		return 0, nil, errLarge
	}
	f.left -= n + 5
	// Grow with what arrives: a length alone must not make the reader allocate.
	payload = make([]byte, 0, min(n, 1<<20))
	for int64(len(payload)) < n {
		chunk := min(n-int64(len(payload)), max(int64(len(payload)), 1<<20))
		start := len(payload)
		payload = append(payload, make([]byte, chunk)...)
		if _, err := io.ReadFull(f.r, payload[start:]); err != nil {
			return 0, nil, fmt.Errorf("%w: %w", errFrame, err)
		}
	}
	return head[0], payload, nil
}

// toWire encodes a result.
func toWire(p *packageResult, raw [][]byte) wirePackage {
	w := wirePackage{ID: p.id, Deps: p.deps}
	index := map[string]int{}
	place := func(pos api.Position) wirePlace {
		i, ok := index[pos.File]
		if !ok {
			i = len(w.Files)
			index[pos.File] = i
			w.Files = append(w.Files, pos.File)
		}
		return wirePlace{File: i, Line: pos.Line, Column: pos.Column}
	}
	for i, o := range p.objects {
		wo := wireObject{Resource: string(api.KindOf(o.Object).Resource), JSON: raw[i], Place: place(o.Pos), Origin: place(o.origin)}
		for field, pos := range o.Fields {
			wo.Fields = append(wo.Fields, wireField{Path: field, Place: place(pos)})
		}
		w.Objects = append(w.Objects, wo)
	}
	for _, d := range p.diags {
		w.Diags = append(w.Diags, wireDiag{
			Place: place(d.Pos), Object: d.Object, Field: d.Field, Message: d.Message,
			Expected: d.Expected, Found: d.Found, Hint: d.Hint,
		})
	}
	return w
}

// fromWire decodes a result, and the Go objects in it.
func fromWire(w wirePackage) (*packageResult, error) {
	p := &packageResult{id: w.ID, deps: w.Deps}
	place := func(wp wirePlace) (api.Position, error) {
		if wp.File < 0 || wp.File >= len(w.Files) || wp.Line < 0 || wp.Line > math.MaxInt32 || wp.Column < 0 {
			return api.Position{}, errFrame
		}
		return api.Position{File: w.Files[wp.File], Line: wp.Line, Column: wp.Column}, nil
	}
	for _, wo := range w.Objects {
		kind, ok := api.KindFor(api.Resource(wo.Resource))
		if !ok {
			return nil, fmt.Errorf("%w: resource %q", errFrame, wo.Resource)
		}
		object, err := decodeJSON(kind, wo.JSON)
		if err != nil {
			return nil, err
		}
		o := Object{Object: object, Fields: make(map[string]api.Position, len(wo.Fields))}
		if o.Pos, err = place(wo.Place); err != nil {
			return nil, err
		}
		if o.origin, err = place(wo.Origin); err != nil {
			return nil, err
		}
		for _, f := range wo.Fields {
			if o.Fields[f.Path], err = place(f.Place); err != nil {
				return nil, err
			}
		}
		p.objects = append(p.objects, o)
	}
	for _, d := range w.Diags {
		pos, err := place(d.Place)
		if err != nil {
			return nil, err
		}
		p.diags = append(p.diags, api.Diagnostic{
			Pos: pos, Object: d.Object, Field: d.Field, Message: d.Message, Expected: d.Expected, Found: d.Found, Hint: d.Hint,
		})
	}
	return p, nil
}
